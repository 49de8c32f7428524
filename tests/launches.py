"""Counts what a device is given to run: a launch for every op except views and memory allocations."""

import importlib
import pkgutil
from contextlib import ExitStack
from dataclasses import dataclass
from unittest import mock

import torch
from pretended_device import DEVICE, pretended_device
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ROOM = ("empty", "empty_strided", "new_empty", "empty_like", "detach", "alias", "lift_fresh", "_unsafe_view")
WITHOUT_READING = ("fill_", "zero_", "copy_")


class _Launches(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names, self.bytes = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not views and name not in ROOM and size((args, kwargs, out)):
            self.names.append(func._schema.name)
            changed = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
            read = args[1:] if name in WITHOUT_READING else (args, kwargs)
            self.bytes += size(read) + size(args[:1] if changed else out)
        return out


def size(tree):
    """Returns the bytes that the tensors hold; an expanded tensor holds no more than its memory."""
    tensors = [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)


def launches(work):
    """Returns the names of the ops that `work()` launches; an op of ours counts once, without the ops inside it."""
    with torch.no_grad(), _Launches() as counter:
        work()
    return counter.names


@dataclass(frozen=True)
class Traffic:
    """The launches of a piece of work, and the bytes that torch's own ops move."""

    launches: int
    bytes: int


def traffic(work, *args):
    """Returns the traffic of `work(*args)` on a device without values; our kernels are counted instead of launched."""
    args = tree_map(lambda v: v.to(DEVICE) if isinstance(v, torch.Tensor) else v, args)
    kernels = []
    with ExitStack() as stack:
        for file, name in _kernels():
            stand_in = mock.MagicMock()
            stand_in.__getitem__.return_value = lambda *_, **__: kernels.append(1)
            stack.enter_context(mock.patch.object(file, name, stand_in))
        stack.enter_context(pretended_device())
        counter = stack.enter_context(_Launches())
        work(*args)
    return Traffic(len(counter.names) + len(kernels), counter.bytes)


def _kernels():
    from bt_fast import kernels

    for result in pkgutil.iter_modules(kernels.__path__):
        file = importlib.import_module(f"bt_fast.kernels.{result.name}")
        yield from ((file, name) for name in vars(file) if name.endswith("_kernel"))
