"""What stands in for the GPU where a stage is rehearsed: the CPU, and the tests' emulated streams and graphs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from benchmarks.on_gpu.stage import Context


def device_of(context: Context) -> torch.device:
    """Where the stage's work runs."""
    if context.rehearsal:
        torch.set_num_threads(1)
        return torch.device("cpu")
    return torch.device("cuda", 0)


def stand_in(context: Context) -> AbstractContextManager[object]:
    """In a rehearsal `torch.cuda`'s streams, graphs and pools are emulated inside."""
    if not context.rehearsal:
        return nullcontext()
    from emulated_device import EmulatedDevice  # of the tests

    return EmulatedDevice()
