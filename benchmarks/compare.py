"""Compares two result files of pytest-benchmark and reports what got slower beyond noise.

python -m benchmarks.compare OLD.json NEW.json [--noise 0.03]

Benchmarks are matched by their full names. If an interleaved benchmark recorded the seconds of its variants, these are
compared one by one, and their speedups over the first variant; else the rounds as a whole.

A benchmark is slower (or faster) if the difference is at least `noise` and certain: the median of the ratios of all new
to all old rounds is at least 1 + noise (at most 1 / (1 + noise)), and their 95 % rank interval (Mann and Whitney's: of
the ratio by which the rounds differ, whatever their distribution) does not contain 1. Fewer than 4 rounds on each side
decide nothing. If a file has no single rounds, the interval is that of two normal medians with the file's quartiles.
The rounds of one run do not show how the machine differs from run to run: hence the least difference.

Whole numbers (FLOPs, bytes, launches) are counted, not measured: every change is shown. Exit status: 1 if something got
slower, 0 if nothing did, 2 if a file cannot be read.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NOISE = 0.03
MACHINE = ("bt_fast", "torch", "python", "system", "processor", "threads", "device", "driver")  # of `report.machine`
OUTSIDE = 0.025  # the probability beyond each end of an interval
LEAST_ROUNDS, MOST_ROUNDS = 4, 50
WHOLE = "round"  # the name of the timings if there are no variants


@dataclass(frozen=True)
class Times:
    """One variant's seconds.

    Attributes:
        rounds: one by one; empty if the file does not have them.
        median: of the rounds.
        error: the median's standard error, relative to the median; None if there are too few rounds.
    """

    rounds: tuple[float, ...]
    median: float
    error: float | None

    @classmethod
    def of(cls, rounds: list[float]) -> Times:
        """Samples evenly if there are more than MOST_ROUNDS rounds."""
        every, median = -(-len(rounds) // MOST_ROUNDS), statistics.median(rounds)
        return cls(tuple(rounds[::every]), median, _error(median, statistics.pstdev(rounds), len(rounds)))


@dataclass(frozen=True)
class Benchmark:
    """One benchmark of a result file.

    Attributes:
        times: by variant, in their order.
        counts: whole numbers by name.
        machine: the machine it ran on.
    """

    times: dict[str, Times]
    counts: dict[str, int]
    machine: dict[str, Any]


@dataclass(frozen=True)
class Change:
    """A ratio of new to old, its 95 % interval, and the verdict; without an interval if there are too few rounds."""

    ratio: float
    interval: tuple[float, float] | None
    noise: float

    @property
    def verdict(self) -> str:
        """Slower, faster, same, or unclear."""
        if self.interval is None:
            return "unclear"
        low, high = self.interval
        if low > 1 and self.ratio >= 1 + self.noise:
            return "slower"
        return "faster" if high < 1 and self.ratio <= 1 / (1 + self.noise) else "same"

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.ratio:.3f}x, too few rounds to tell"
        return f"{self.ratio:.3f}x ({self.interval[0]:.3f} to {self.interval[1]:.3f})"


@dataclass
class Comparison:
    """The outcome: lines for the reader, and the number of each verdict."""

    lines: list[str] = field(default_factory=list)
    verdicts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("slower", "faster", "same", "unclear"), 0))


# Reading


def read(path: Path) -> dict[str, Benchmark]:
    """Returns the benchmarks of a result file by their full names.

    Raises:
        ValueError: the file cannot be read, or is not one of pytest-benchmark's.
    """
    try:
        entries = json.loads(path.read_text())["benchmarks"]
        result = {entry["fullname"]: _benchmark(entry) for entry in entries}
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{path}: found {what}; expected a result file of pytest-benchmark") from error
    if len(result) < len(entries):
        raise ValueError(f"{path}: found a benchmark twice; expected every full name once")
    return result


def _benchmark(entry: Mapping[str, Any]) -> Benchmark:
    info = entry.get("extra_info") or {}
    variants = info.get("seconds") or {WHOLE: None}
    times = {name: _whole(entry["stats"]) if rounds is None else _times(rounds) for name, rounds in variants.items()}
    counts = {k: v for k, v in _counts(info) if k not in MACHINE}
    return Benchmark(times, counts, {key: info.get(key) for key in MACHINE})


def _whole(stats: Mapping[str, Any]) -> Times:
    if stats.get("data"):
        return _times(stats["data"])
    median, deviation = _seconds(stats["median"]), float(stats["iqr"]) / 1.349  # of a normal distribution
    return Times((), median, _error(median, deviation, int(stats["rounds"])))


def _error(median: float, deviation: float, rounds: int) -> float | None:
    """Returns the standard error of a median relative to it, for normally distributed rounds."""
    return math.sqrt(math.pi / 2 / rounds) * deviation / median if rounds >= LEAST_ROUNDS else None


def _times(rounds: list[Any]) -> Times:
    if not rounds:
        raise ValueError("a benchmark without rounds")
    return Times.of([_seconds(t) for t in rounds])


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"a time of {value!r} seconds")
    return float(value)


def _counts(info: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, int]]:
    """Yields the whole numbers; a number in an inner mapping has both names."""
    for key, value in info.items():
        if isinstance(value, Mapping):
            yield from _counts(value, f"{before}{key}, ")
        elif isinstance(value, int) and not isinstance(value, bool):
            yield f"{before}{key}", value


# Comparing


def change(old: Times, new: Times, noise: float = NOISE) -> Change:
    """Returns the change of the seconds."""
    if not (old.rounds and new.rounds):
        ratio = new.median / old.median
        if old.error is None or new.error is None:
            return Change(ratio, None, noise)
        spread = math.exp(1.96 * math.hypot(old.error, new.error))
        return Change(ratio, (ratio / spread, ratio * spread), noise)
    ratios = sorted(b / a for a in old.rounds for b in new.rounds)
    k = _ratios_outside(len(old.rounds), len(new.rounds))
    return Change(statistics.median(ratios), (ratios[k - 1], ratios[-k]) if k else None, noise)


def _ratios_outside(n: int, m: int) -> int:
    """Returns which of the n·m sorted ratios, from each end, bounds a 95 % interval; 0 if there are too few rounds.

    This is the first value that Mann and Whitney's U does not exceed with a probability of more than OUTSIDE, if
    nothing differs. The ways to reach each value are the coefficients of the product over i = 1..n of
    (1 - q^(m + i)) / (1 - q^i).
    """
    ways = [1] + [0] * (n * m)
    for i in range(1, n + 1):
        for u in range(n * m, m + i - 1, -1):
            ways[u] -= ways[u - m - i]
        for u in range(i, n * m + 1):
            ways[u] += ways[u - i]
    total, below = math.comb(n + m, n), 0
    for u, count in enumerate(ways):
        below += count
        if below > OUTSIDE * total:
            return u
    raise AssertionError("the ways add up to all")


def compare(old: Mapping[str, Benchmark], new: Mapping[str, Benchmark], noise: float = NOISE) -> Comparison:
    """Compares the new benchmarks with the old ones."""
    common = [name for name in old if name in new]
    result = Comparison(lines=list(_machines(old, new, common)))
    for name in common:
        result.lines.append(name)
        result.lines += (f"  {line}" for line in _one(old[name], new[name], noise, result.verdicts))
    for where, those, others in (("old", old, new), ("new", new, old)):
        result.lines += (f"only in the {where} file: {name}" for name in those if name not in others)
    result.lines.append(", ".join(f"{count} {verdict}" for verdict, count in result.verdicts.items()))
    return result


def _machines(old: Mapping[str, Benchmark], new: Mapping[str, Benchmark], common: list[str]) -> Iterator[str]:
    """Yields a warning for each difference between the machines."""
    for key in MACHINE:
        pairs = {tuple(_shown(file[name].machine[key]) for file in (old, new)) for name in common}
        for before, after in sorted(pairs):
            if before != after:
                yield f"warning: {key} was {before}, is {after}"


def _shown(value: Any) -> str:
    return "not known" if value is None else str(value)


def _one(old: Benchmark, new: Benchmark, noise: float, verdicts: dict[str, int]) -> Iterator[str]:
    common = [name for name in old.times if name in new.times]
    for name in common:
        result = change(old.times[name], new.times[name], noise)
        verdicts[result.verdict] += 1
        before, after = (_readable(times.median) for times in (old.times[name], new.times[name]))
        yield f"{result.verdict:<8}{name}: {before} -> {after}, {result}"
    for name in common[1:]:
        yield from _speedup(old.times, new.times, common[0], name, noise)
    for where, those, others in (("old", old.times, new.times), ("new", new.times, old.times)):
        yield from (f"only in the {where} file: {name}" for name in those if name not in others)
    for name in {**old.counts, **new.counts}:
        before, after = old.counts.get(name, "none"), new.counts.get(name, "none")
        if before != after:
            yield f"count   {name}: {before} -> {after}"


def _speedup(old: Mapping[str, Times], new: Mapping[str, Times], base: str, name: str, noise: float) -> Iterator[str]:
    """Yields a line if the speedup over `base` changed beyond noise; in ratios of pairs the machine's pace cancels."""

    def pairs(times: Mapping[str, Times]) -> Times | None:
        both = times[base].rounds, times[name].rounds
        return Times.of([a / b for a, b in zip(*both, strict=True)]) if len(both[0]) == len(both[1]) > 0 else None

    before, after = pairs(old), pairs(new)
    if before and after and (result := change(before, after, noise)).verdict in ("slower", "faster"):
        word = "more" if result.verdict == "slower" else "less"  # a higher speedup is better
        yield f"{word:<8}speedup of {name} over {base}: {before.median:.2f}x -> {after.median:.2f}x, {result}"


def _readable(seconds: float) -> str:
    unit, size = next((u, s) for u, s in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 0.0)) if seconds >= s)
    return f"{seconds / (size or 1e-9):.4g} {unit}"


# The command


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a share of at least 0, such as 0.03, got {text!r}")
    return value


def main(arguments: list[str] | None = None) -> int:
    """Compares two files and returns the exit status."""
    parser = argparse.ArgumentParser("python -m benchmarks.compare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument(
        "--noise", type=_share, default=NOISE, help="the least share that counts (default: %(default)s)"
    )
    given = parser.parse_args(arguments)
    try:
        old, new = read(given.old), read(given.new)
        if not old.keys() & new.keys():
            raise ValueError(f"{given.new}: no benchmark of {given.old} is there")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    result = compare(old, new, given.noise)
    print(*result.lines, sep="\n")
    return int(result.verdicts["slower"] > 0)


if __name__ == "__main__":
    sys.exit(main())
