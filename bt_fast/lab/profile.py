"""Where an iteration's time goes, phase by phase, what it costs in joules, and a trace for a timeline viewer."""

from __future__ import annotations

import dataclasses
import json
import statistics
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, record_function

from bt_fast.device import synchronize
from bt_fast.lab.augment import crop_and_flip
from bt_fast.lab.config import RunConfig
from bt_fast.lab.data import ImageDataset, images, minibatches
from bt_fast.lab.files import write_text
from bt_fast.lab.fitting import check_training
from bt_fast.lab.locks import held, new_folder
from bt_fast.lab.provenance import machine
from bt_fast.lab.report import label
from bt_fast.lab.training import WARM_UP, Contestant
from bt_fast.power import PowerMonitor, Summary
from bt_fast.ranges import PHASES

TRACED = 3  # iterations in the trace, whose files are large
ITERATION, OTHER = "bt_fast::iteration", "other"
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_WORK = ("kernel", "gpu_memcpy", "gpu_memset")

Event = dict[str, Any]


@dataclass(frozen=True)
class Phase:
    """A phase of the traced iterations, per iteration.

    Attributes:
        name: one of `PHASES`, or "other": what lies in none of them.
        calls: how often it was entered; 0 for "other".
        host: seconds of the host in it; on the CPU that is the time of its work.
        device: seconds of the GPU's work that was launched in it; None where none was traced.
    """

    name: str
    calls: float
    host: float
    device: float | None


@dataclass(frozen=True)
class Profile:
    """What some iterations of a method came to.

    Attributes:
        method: as `Method.parse` reads it; loss: its objective.
        batch_size: m. epoch: the number of training images.
        seconds: of each iteration without a trace.
        phases: of `TRACED` further iterations, which tracing slows down.
        power: of each device during the iterations of `seconds`. reason: why there is none, or None.
        joules: per iteration, of all devices; None where they do not tell.
        machine: as `report.machine`.
    """

    method: str
    loss: str
    batch_size: int
    epoch: int
    seconds: tuple[float, ...]
    phases: tuple[Phase, ...]
    power: tuple[Summary, ...]
    reason: str | None
    joules: float | None
    machine: dict[str, Any]

    @property
    def joules_per_sample(self) -> float | None:
        """Of a training image."""
        return None if self.joules is None else self.joules / self.batch_size


def profile(
    config: RunConfig, dataset: ImageDataset, device: torch.device, folder: Path | None, iterations: int
) -> tuple[Profile, Path]:
    """Run `WARM_UP` iterations of the configuration's only method, then `iterations` timed and `TRACED` traced ones.

    Writes `trace.json`, for Perfetto or chrome://tracing, and `profile.json` into the folder, which is this process's
    meanwhile.

    Args:
        folder: None for a new one, `profiles/DATE-TIME`.

    Returns:
        what came of it, and the folder.

    Raises:
        ValueError: as of `fitting.check_training`; the folder holds such a file already, or another process writes one.
    """
    check_training(config, dataset, device)
    (method,) = config.methods
    contestant = Contestant(method, config, dataset, device)
    folder = new_folder(Path("profiles")) if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder):
        for name in ("trace.json", "profile.json"):
            if (folder / name).exists():
                raise ValueError(f"--out: {folder} already holds {name}; name another folder")
        return _profiled(contestant, dataset, folder, iterations), folder


def _profiled(contestant: Contestant, dataset: ImageDataset, folder: Path, iterations: int) -> Profile:
    config, device = contestant.config, contestant.device
    ready = list(islice(_batches(config, dataset, device), WARM_UP + TRACED))
    for x, y in ready[:WARM_UP]:
        contestant.step(x, y)
    with PowerMonitor(device) as monitor:
        for k in range(iterations):
            contestant.step(*ready[k % len(ready)])
    seconds = tuple(contestant.seconds[-iterations:])
    events = _traced(contestant, ready[-TRACED:], folder / "trace.json")
    joules = monitor.joules()
    found = Profile(
        method=contestant.method,
        loss=config.loss,
        batch_size=len(ready[0][1]),
        epoch=len(dataset.x_train),
        seconds=seconds,
        phases=phases_of(events),
        power=monitor.summary(),
        reason=monitor.reason,
        joules=None if joules is None else joules / iterations,
        machine=machine(device),
    )
    write_text(folder / "profile.json", json.dumps(dataclasses.asdict(found), indent=2) + "\n")
    return found


def _batches(config: RunConfig, dataset: ImageDataset, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Whole minibatches as training sees them, without end."""
    size, iteration = min(config.batch_size, len(dataset.x_train)), 0
    for epoch in count():
        for batch in minibatches(len(dataset.x_train), size, seed=config.seed, epoch=epoch):
            if len(batch) < size:  # an epoch's last one would not compare
                continue
            x = images(dataset.x_train[batch], device)
            if config.augment:
                x = crop_and_flip(x, seed=config.seed, iteration=iteration)
            yield x, dataset.y_train[batch].to(device)
            iteration += 1


def _traced(contestant: Contestant, batches: Sequence[tuple[Tensor, Tensor]], path: Path) -> list[Event]:
    """The events of one iteration on each batch; the trace goes to `path`."""
    activities = [ProfilerActivity.CPU]
    if contestant.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiled:
        for x, y in batches:
            with record_function(ITERATION):
                contestant.step(x, y)
                synchronize(contestant.device)
    profiled.export_chrome_trace(str(path))
    trace: dict[str, Any] = json.loads(path.read_text())
    for name in ("host_name", "traceName"):  # whose machine it was is nobody's business
        trace.pop(name, None)
    write_text(path, json.dumps(trace))
    events: list[Event] = trace["traceEvents"]
    return events


def phases_of(events: Sequence[Event]) -> tuple[Phase, ...]:
    """The phases of a trace's iterations, and the rest, in mean per iteration.

    A phase inside another (the oracle's attack inside the mining, say) belongs to the outer one. A kernel belongs to
    the phase in whose time the host launched it, on whatever thread, since autograd's threads launch the backward.

    Args:
        events: "traceEvents" of a chrome trace, times in microseconds.

    Raises:
        ValueError: the trace holds no iteration.
    """
    iterations = _annotations(events, [ITERATION])
    if not iterations:
        raise ValueError(f"the trace holds no {ITERATION}: give one that `bt-fast profile` wrote")
    ranges, end = [], float("-inf")
    for event in _annotations(events, PHASES):
        if event["ts"] >= end:
            ranges.append(event)
            end = event["ts"] + event["dur"]
    work = _launched(events)
    n = len(iterations)
    found = []
    for name in PHASES:
        mine = [event for event in ranges if event["name"] == name]
        if mine:
            found.append(Phase(name, len(mine) / n, _host(mine) / n, _within(work, mine, n)))
    host = _host(iterations) / n - sum(phase.host for phase in found)
    device = _within(work, iterations, n)
    if device is not None:
        device -= sum(phase.device for phase in found if phase.device is not None)
    return (*found, Phase(OTHER, 0, host, device))


def _annotations(events: Sequence[Event], names: Sequence[str]) -> list[Event]:
    """The host's ranges of these names, by their start."""
    found = [e for e in events if e.get("cat") == "user_annotation" and e.get("ph") == "X" and e["name"] in names]
    return sorted(found, key=lambda event: (event["ts"], -event["dur"]))


def _host(ranges: Sequence[Event]) -> float:
    return sum(float(event["dur"]) for event in ranges) / 1e6


def _launched(events: Sequence[Event]) -> list[tuple[float, float]] | None:
    """When each piece of the GPU's work was launched and how long it took, in microseconds; None without any."""
    launches = {e["args"]["correlation"]: e["ts"] for e in events if e.get("cat") in _LAUNCHES and _correlated(e)}
    work = [e for e in events if e.get("cat") in _WORK and _correlated(e) and e["args"]["correlation"] in launches]
    return [(launches[e["args"]["correlation"]], e["dur"]) for e in work] or None


def _correlated(event: Event) -> bool:
    return "correlation" in event.get("args", {})


def _within(work: list[tuple[float, float]] | None, ranges: Sequence[Event], iterations: int) -> float | None:
    """Seconds per iteration of the work that was launched within the ranges, which do not overlap."""
    if work is None:
        return None
    starts = [event["ts"] for event in ranges]
    total = 0.0
    for launched, duration in work:
        k = bisect_right(starts, launched) - 1
        if k >= 0 and launched < ranges[k]["ts"] + ranges[k]["dur"]:
            total += duration
    return total / 1e6 / iterations


# For the terminal


def table(found: Profile) -> Table:
    """The phases of one iteration, for the terminal."""
    view = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    view.add_column(label(found.method, found.loss), no_wrap=True)
    for column in ("calls", "host ms", "share", "GPU ms"):
        view.add_column(column, justify="right", no_wrap=True)
    whole = sum(phase.host for phase in found.phases)
    for phase in found.phases:
        view.add_row(
            phase.name.removeprefix("bt_fast::").replace("_", " "),
            f"{phase.calls:.3g}" if phase.calls else "-",
            f"{1e3 * phase.host:.2f}",
            f"{100 * phase.host / whole:.0f}%",
            "-" if phase.device is None else f"{1e3 * phase.device:.2f}",
        )
    return view


def lines(found: Profile) -> list[str]:
    """Time and energy per iteration, sample and epoch, and what NVML tells besides."""
    seconds = statistics.median(found.seconds)
    per_epoch = found.epoch / found.batch_size
    said = [
        f"time: {1e3 * seconds:.2f} ms per iteration (median of {len(found.seconds)}, not traced), "
        f"{1e6 * seconds / found.batch_size:.1f} us per sample, {per_epoch * seconds:.1f} s per epoch of {found.epoch}"
    ]
    if found.reason is not None:
        return [*said, f"energy: not measured: {found.reason}"]
    if found.joules is None or found.joules_per_sample is None:
        said.append("energy: not measured: the device does not tell it, or was lost")
    else:
        said.append(
            f"energy: {found.joules:.4g} J per iteration, {found.joules_per_sample:.4g} J per sample, "
            f"{found.joules_per_sample * found.epoch:.4g} J per epoch of {found.epoch}, at this rate"
        )
    return [*said, *(_line(summary) for summary in found.power)]


def _line(s: Summary) -> str:
    """What there is of a summary."""
    parts = [
        None if s.energy_source is None else f"energy from the {s.energy_source}",
        _said("{:.0f} W in mean", s.mean_power),
        _said("{:.0f} W at most", s.max_power),
        _said("SM {:.0%}", s.mean_sm_utilisation),
        _said("memory {:.0%}", s.mean_memory_utilisation),
        _said("{:.0f} MHz", s.mean_sm_clock),
        _said("{:.0f} C", s.max_temperature),
        None if s.peak_memory is None else f"{s.peak_memory / 2**30:.1f} GiB in use",
        None if not s.throttle else "clocks held back: " + ", ".join(f"{n} {v:.0%}" for n, v in s.throttle.items()),
        None if s.lost is None else f"LOST: {s.lost}",
        s.shared,
    ]
    return f"{s.name}: " + ", ".join(part for part in parts if part)


def _said(form: str, value: float | None) -> str | None:
    return None if value is None else form.format(value)
