"""Compares two pieces of work on a device that may be so fast that small work takes only the time of its launches."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from bt_fast.device import synchronize


def median_ratio(slower: Sequence[float], faster: Sequence[float]) -> float:
    """Returns the median of the pairwise ratios."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


def work_ratio(
    names: tuple[str, str],
    work: Mapping[str, Callable[[], object]],
    prepare: Callable[[str], object],
    seconds: Mapping[str, Sequence[float]],
    device: torch.device,
) -> float:
    """Returns the first piece's work as a multiple of the second's.

    On the CPU it compares the seconds of interleaved rounds; on a GPU the seconds in which kernels ran, since there
    both may take as long as their launches, whatever they compute.

    Args:
        names: the names of both in `work`, in `seconds` and for `prepare`.
    """
    first, second = names
    if device.type != "cuda":
        return median_ratio(seconds[first], seconds[second])
    busy = {}
    for name in names:
        prepare(name)
        busy[name] = busy_seconds(work[name], device)
    return busy[first] / busy[second]


def busy_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Returns the sum of the seconds of all kernels and copies that the GPU runs for it."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        work()
        synchronize(device)
    rows = [row for row in profiled.key_averages() if not row.is_user_annotation]  # annotations span kernels
    return 1e-6 * float(sum(row.self_device_time_total for row in rows))
