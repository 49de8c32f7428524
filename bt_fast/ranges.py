"""Named ranges of host time for profilers: mining, each attack step, the update.

While a torch profiler runs, a range is a `record_function`, so that traces of the CPU show it too; under
`torch.autograd.profiler.emit_nvtx` that becomes an NVTX range. Otherwise it is an NVTX range, pushed whether or not a
tool listens: Nsight Systems then needs no change of the code. A build of torch without CUDA has no NVTX.

Ranges enclose replays of graphs and are never inside a capture, which would record each only once; the work of a device
in a range are the kernels launched within it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.cuda import nvtx

MINING = "bt_fast::mining"
ATTACK_STEP = "bt_fast::attack_step"
UPDATE = "bt_fast::update"
BACKWARD = "bt_fast::backward"  # and the optimizer's step: the caller's part of the update, named by the lab
PHASES = (MINING, ATTACK_STEP, UPDATE, BACKWARD)


class _NvtxRange:
    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        nvtx.range_push(self._name)

    def __exit__(self, *error: object) -> None:
        nvtx.range_pop()


_WITHOUT_NVTX = nullcontext()
_NVTX = {name: _NvtxRange(name) for name in PHASES} if torch.backends.cuda.is_built() else {}


def range_(name: str) -> AbstractContextManager[object]:
    """Returns a range around the work of a `with` block; `name` is one of `PHASES`."""
    if torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
        return torch.profiler.record_function(name)
    return _NVTX.get(name, _WITHOUT_NVTX)
