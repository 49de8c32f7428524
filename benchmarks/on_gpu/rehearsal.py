"""Replaces the GPU when a stage is rehearsed, by the CPU and the tests' emulated streams and graphs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from benchmarks.on_gpu.stage import Context


def device_of(context: Context) -> torch.device:
    """Returns the device on which the stage's work runs."""
    if context.rehearsal:
        torch.set_num_threads(1)
        return torch.device("cpu")
    return torch.device("cuda", 0)


@contextmanager
def stand_in(context: Context) -> Iterator[None]:
    """Emulates `torch.cuda`'s streams, graphs, pools and events inside, in a rehearsal."""
    if not context.rehearsal:
        yield
        return
    from emulated_device import EmulatedDevice  # of the tests

    with EmulatedDevice(), mock.patch.object(torch.cuda, "Event", HostEvent):
        yield


class HostEvent:
    """Replaces torch.cuda.Event: on the host all work is done when an event is recorded."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._time = 0.0

    def record(self) -> None:
        """Records the current time."""
        self._time = time.perf_counter()

    def elapsed_time(self, later: HostEvent) -> float:
        """Returns the milliseconds between the two."""
        return 1e3 * (later._time - self._time)
