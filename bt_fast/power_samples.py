"""Samples of a GPU's power, energy, clocks and memory, and their evaluation."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal

EnergySource = Literal["counter", "power"]

MIN_COUNTER_MOVES = 10  # a counter that has moved less often is coarser than integrated power
MAX_WATTS = 3000.0  # a counter that implies more was reset (the driver was reloaded) rather than wrapped
COUNTER_BITS = (32, 64)


@dataclass(frozen=True)
class Sample:
    """One reading of one device. A value is None if the device does not report it, or did not this time.

    Attributes:
        device: UUID, "GPU-..." or "MIG-...".
        time: seconds of `time.perf_counter`.
        power: watts.
        energy: millijoules since the driver was loaded: only differences are meaningful.
        sm_utilisation, memory_utilisation: in [0, 1], the share of NVML's window in which some kernel ran, and in which
            memory was read or written.
        sm_clock, memory_clock: MHz.
        temperature: degrees Celsius.
        throttle: the reasons for reduced clocks, for example "sw_power_cap".
        memory_used: bytes, of all processes.
    """

    device: str
    time: float
    power: float | None = None
    energy: int | None = None
    sm_utilisation: float | None = None
    memory_utilisation: float | None = None
    sm_clock: int | None = None
    memory_clock: int | None = None
    temperature: int | None = None
    throttle: tuple[str, ...] | None = None
    memory_used: int | None = None


@dataclass(frozen=True)
class Summary:
    """The summary of one device from its first to its last sample. A value is None if the device does not report it.

    Attributes:
        device: UUID, "GPU-..." or "MIG-..."; name: the product's.
        samples: their number. seconds: from the first to the last.
        joules: used in these seconds. energy_source: "counter" (the difference of the total energy) or "power" (the
            trapezoidal integral over the samples, if there is no counter or it moved less than ten times).
        mean_power: over time, max_power: in watts. power_source: "instant" or "average", as NVML calls it.
        mean_sm_utilisation, mean_memory_utilisation: in [0, 1]; mean_sm_clock, mean_memory_clock: MHz; over samples.
        max_temperature: degrees Celsius.
        throttle: the share of samples by reason, for reasons that occurred.
        peak_memory: the largest memory in use by all processes in any sample, in bytes.
        unsupported: the fields of `Sample` that this device lacks.
        lost: why the readings ended before the block or span, or None.
        shared: how the readings include more than this device, or None.
    """

    device: str
    name: str
    samples: int
    seconds: float
    joules: float | None
    energy_source: EnergySource | None
    mean_power: float | None
    max_power: float | None
    power_source: str | None
    mean_sm_utilisation: float | None
    mean_memory_utilisation: float | None
    mean_sm_clock: float | None
    mean_memory_clock: float | None
    max_temperature: int | None
    throttle: Mapping[str, float] | None
    peak_memory: int | None
    unsupported: tuple[str, ...]
    lost: str | None
    shared: str | None


def summarise(samples: Sequence[Sample], **of_device: Any) -> Summary:
    """Returns the summary of at least one sample; `of_device` are the fields that samples do not give."""
    joules, source = energy_of(samples)
    integral = integrated_power(samples)
    return Summary(
        device=samples[0].device,
        samples=len(samples),
        seconds=samples[-1].time - samples[0].time,
        joules=joules,
        energy_source=source,
        mean_power=_mean(samples, "power") if integral is None else integral[0] / integral[1],
        max_power=max(_values(samples, "power"), default=None),
        mean_sm_utilisation=_mean(samples, "sm_utilisation"),
        mean_memory_utilisation=_mean(samples, "memory_utilisation"),
        mean_sm_clock=_mean(samples, "sm_clock"),
        mean_memory_clock=_mean(samples, "memory_clock"),
        max_temperature=max(_values(samples, "temperature"), default=None),
        throttle=_shares(_values(samples, "throttle")),
        peak_memory=max(_values(samples, "memory_used"), default=None),
        **of_device,
    )


def energy_of(samples: Sequence[Sample]) -> tuple[float | None, EnergySource | None]:
    """Returns joules from the first to the last sample, and whether they come from the counter or from the power."""
    counted, integral = counted_energy(samples), integrated_power(samples)
    if counted is not None and (counted[1] >= MIN_COUNTER_MOVES or (counted[1] and integral is None)):
        return counted[0], "counter"
    if integral is not None:
        return integral[0], "power"
    return None, None


def counted_energy(samples: Sequence[Sample]) -> tuple[float, int] | None:
    """Joules by the counter, which may wrap, and its number of moves; None if it was reset or has no two readings."""
    readings = _series(samples, "energy")
    if len(readings) < 2:
        return None
    millijoules = moves = 0
    for (t, before), (u, after) in pairwise(readings):
        gained = after - before
        if gained < 0:
            gained += 2 ** next(bits for bits in COUNTER_BITS if before < 2**bits)
            if gained > 1000 * MAX_WATTS * max(u - t, 1e-3):
                return None
        millijoules += gained
        moves += gained > 0
    return millijoules / 1000, moves


def integrated_power(samples: Sequence[Sample]) -> tuple[float, float] | None:
    """Returns the trapezoidal integral of the power in joules, and the seconds it spans; None without two readings."""
    readings = _series(samples, "power")
    if len(readings) < 2 or readings[-1][0] <= readings[0][0]:
        return None
    return sum(_trapezoids(readings)), readings[-1][0] - readings[0][0]


def power_within(samples: Sequence[Sample], intervals: Sequence[tuple[float, float]]) -> float | None:
    """Returns joules in intervals of time: the integral of the power, interpolated linearly between the samples.

    None without two readings, or if an interval is not between the first and the last of them.
    """
    readings: list[tuple[float, float]] = _series(samples, "power")
    if len(readings) < 2 or not all(readings[0][0] <= begin <= end <= readings[-1][0] for begin, end in intervals):
        return None
    times = [t for t, _ in readings]
    until = list(accumulate(_trapezoids(readings), initial=0.0))

    def joules(at: float) -> float:
        """Returns joules from the first sample to this time."""
        k = bisect_right(times, at) - 1
        if k == len(readings) - 1:
            return until[k]
        (t, p), (u, q) = readings[k], readings[k + 1]
        return until[k] + (at - t) * (p + (q - p) * (at - t) / (u - t) / 2)

    return sum(joules(end) - joules(begin) for begin, end in intervals)


def _trapezoids(readings: Sequence[tuple[float, float]]) -> list[float]:
    return [(u - t) * (p + q) / 2 for (t, p), (u, q) in pairwise(readings)]


def _series(samples: Sequence[Sample], field: str) -> list[tuple[float, Any]]:
    """Returns (time, value) of the samples that have a value."""
    return [(s.time, value) for s in samples if (value := getattr(s, field)) is not None]


def _values(samples: Sequence[Sample], field: str) -> list[Any]:
    return [value for _, value in _series(samples, field)]


def _mean(samples: Sequence[Sample], field: str) -> float | None:
    values: list[float] = _values(samples, field)
    return sum(values) / len(values) if values else None


def _shares(reasons: Sequence[tuple[str, ...]]) -> dict[str, float] | None:
    if not reasons:
        return None
    occurring = sorted({name for names in reasons for name in names})
    return {name: sum(name in names for names in reasons) / len(reasons) for name in occurring}
