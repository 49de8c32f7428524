"""Pretends a device that the host cannot wait for: meta tensors that call themselves CUDA.

They hold no values, so any hidden read (`.item()`, `bool(tensor)`, a boolean mask, `nonzero`, `equal`, `tolist`)
raises, and so does any copy between them and the host. The code under test takes the paths that it takes on a GPU,
backward included. The one permitted read returns the numbers of a plan.
"""

from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bt_fast import faults
from bt_fast.ops import availability

DEVICE = torch.device("meta")
COPIES = ("_to_copy", "copy_", "lift_fresh", "_copy_from")


class _CallsItselfCuda(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == torch.Tensor.is_cuda.__get__:
            return args[0].device == DEVICE
        if func in (torch.tensor, torch.as_tensor) and torch.device((kwargs or {}).get("device") or "cpu") == DEVICE:
            raise AssertionError("a tensor made on the host was copied to the device")
        return func(*args, **(kwargs or {}))


class _NoCopies(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        copies = func.overloadpacket.__name__ in COPIES
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor) and (copies or t.dim())]
        if len({t.device.type for t in tensors}) > 1:
            raise AssertionError(f"{func} copies between host and device")
        return out


class Reads:
    """Counts reads started and waited for, and answers each with the plan's numbers, then with zeros."""

    def __init__(self, plan=()):
        self.plan, self.started, self.waited = list(plan), 0, 0

    def __call__(self, values):
        self.started += 1
        return SimpleNamespace(wait=lambda: self._answer(len(values)))

    def _answer(self, length):
        self.waited += 1
        return (self.plan + [0] * length)[:length]


@contextmanager
def pretended_device(plan=()):
    reads, kernels_run = Reads(plan), mock.patch.dict(availability._plain, {(DEVICE, b): None for b in (False, True)})
    with mock.patch.object(faults, "HostRead", reads), kernels_run, _CallsItselfCuda(), _NoCopies():
        yield reads


@contextmanager
def counted_waits():
    """Yields a list that gets one entry for every wait for a real read."""
    waits, wait = [], faults.HostRead.wait
    with mock.patch.object(faults.HostRead, "wait", lambda read: waits.append(read) or wait(read)):
        yield waits
