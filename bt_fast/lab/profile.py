"""Profiles an iteration: its time phase by phase, its joules, and a trace for a timeline viewer."""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
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
from bt_fast.lab.provenance import fingerprint, machine
from bt_fast.lab.report import label, plain_table
from bt_fast.lab.training import WARM_UP, Contestant
from bt_fast.placement import Placement
from bt_fast.power import PowerMonitor, Summary
from bt_fast.ranges import PHASES

TRACED = 3  # iterations in the trace: its files are large
ITERATION, OTHER = "bt_fast::iteration", "other"
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_WORK = ("kernel", "gpu_memcpy", "gpu_memset")

Event = dict[str, Any]
Batch = tuple[Tensor, Tensor, Tensor, Placement | None]  # images, labels, their numbers, and where they are cropped
Work = list[tuple[float, float]] | None  # start of the launch and duration of each piece of work, in microseconds


@dataclass(frozen=True)
class Phase:
    """A phase of the traced iterations, averaged per iteration."""

    name: str  # one of `PHASES`, or "other", the rest
    calls: float  # 0 for "other"
    host: float  # seconds of the host; on the CPU this is the time of its work
    device: float | None  # seconds of the GPU work launched in it; None if none was traced


@dataclass(frozen=True)
class Profile:
    """Time and energy of a method's iterations."""

    method: str  # in the form for `Method.parse`
    loss: str
    batch_size: int
    epoch: int  # the number of training images
    seconds: tuple[float, ...]  # of each iteration without a trace
    phases: tuple[Phase, ...]  # of `TRACED` further iterations, which tracing slows down
    power: tuple[Summary, ...]  # of each device during the iterations of `seconds`
    reason: str | None  # why there is no power, or None
    joules: float | None  # per iteration, of all devices; None if unknown
    machine: dict[str, Any]  # as of `provenance.machine`


def profile(
    config: RunConfig, dataset: ImageDataset, device: torch.device, folder: Path | None, iterations: int
) -> tuple[Profile, Path]:
    """Runs `WARM_UP` iterations of the configuration's only method, then `iterations` timed and `TRACED` traced ones.

    Writes `trace.json`, for Perfetto or chrome://tracing, and `profile.json` into the folder, which this process locks
    meanwhile. A folder of None is a new one, `profiles/DATE-TIME`.

    Returns:
        the profile and the folder.

    Raises:
        ValueError: see `fitting.check_training`; or the folder already holds such a file, or another process writes
            one.
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
        everything = torch.zeros(len(dataset.x_train), dtype=torch.int64, device="cpu")
        with tempfile.TemporaryDirectory(prefix=".memory-", dir=folder) as passing:  # a profile's memory ends with it
            contestant.remember(Path(passing), everything, fingerprint(dataset))
            return _profiled(contestant, dataset, folder, iterations), folder


def _profiled(contestant: Contestant, dataset: ImageDataset, folder: Path, iterations: int) -> Profile:
    config, device = contestant.config, contestant.device
    ready = list(islice(_batches(config, dataset, device), WARM_UP + TRACED))
    for batch in ready[:WARM_UP]:
        contestant.step(*batch)
    with PowerMonitor(device) as monitor:
        for k in range(iterations):
            contestant.step(*ready[k % len(ready)])
    seconds = tuple(contestant.seconds[-iterations:])
    events = _traced(contestant, ready[-TRACED:], folder / "trace.json")
    joules = monitor.joules()
    result = Profile(
        method=contestant.method,
        loss=config.loss,
        batch_size=len(ready[0][0]),
        epoch=len(dataset.x_train),
        seconds=seconds,
        phases=phases_of(events),
        power=monitor.summary(),
        reason=monitor.reason,
        joules=None if joules is None else joules / iterations,
        machine=machine(device),
    )
    write_text(folder / "profile.json", json.dumps(dataclasses.asdict(result), indent=2) + "\n")
    return result


def _batches(config: RunConfig, dataset: ImageDataset, device: torch.device) -> Iterator[Batch]:
    """Yields whole minibatches as in training, without end."""
    n = len(dataset.x_train)
    size, iteration = min(config.batch_size, n), count()
    for epoch in count():
        for batch in minibatches(n, size, seed=config.seed, epoch=epoch):
            if len(batch) < size:  # an epoch's last minibatch is not comparable
                continue
            x, placement = images(dataset.x_train[batch], device), None
            if config.augment:
                x, placement = crop_and_flip(x, seed=config.seed, iteration=next(iteration))
            yield x, dataset.y_train[batch].to(device), batch, placement


def _traced(contestant: Contestant, batches: Sequence[Batch], path: Path) -> list[Event]:
    """Returns the events of one iteration on each batch; writes the trace to `path`."""
    activities = [ProfilerActivity.CPU]
    if contestant.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiled:
        for batch in batches:
            with record_function(ITERATION):
                contestant.step(*batch)
                synchronize(contestant.device)
    profiled.export_chrome_trace(str(path))
    trace: dict[str, Any] = json.loads(path.read_text())
    for name in ("host_name", "traceName"):  # these identify the machine
        trace.pop(name, None)
    write_text(path, json.dumps(trace))
    events: list[Event] = trace["traceEvents"]
    return events


def phases_of(events: Sequence[Event]) -> tuple[Phase, ...]:
    """Returns the phases of a trace's iterations, and the rest, averaged per iteration.

    A phase inside another (for example the oracle's attack inside the mining) belongs to the outer one. A kernel
    belongs to the phase during which the host launched it, on any thread, since autograd's threads launch the backward.

    Args:
        events: "traceEvents" of a chrome trace, times in microseconds.

    Raises:
        ValueError: the trace holds no iteration.
    """
    iterations = _annotations(events, [ITERATION])
    if not iterations:
        raise ValueError(f"the trace holds no {ITERATION}: give one that `bt-fast profile` wrote")
    outermost: dict[str, list[Event]] = {name: [] for name in PHASES}
    end = float("-inf")
    for event in _annotations(events, PHASES):
        if event["ts"] >= end:
            outermost[event["name"]].append(event)
            end = event["ts"] + event["dur"]
    work, n = _launched(events), len(iterations)
    phases = [_phase(name, ranges, work, n) for name, ranges in outermost.items() if ranges]
    whole = _phase(ITERATION, iterations, work, n)
    host = whole.host - sum(phase.host for phase in phases)
    device = None if whole.device is None else whole.device - sum(phase.device or 0.0 for phase in phases)
    return (*phases, Phase(OTHER, 0, host, device))


def _annotations(events: Sequence[Event], names: Sequence[str]) -> list[Event]:
    """Returns the host's ranges of these names, sorted by start."""
    ranges = [e for e in events if e.get("cat") == "user_annotation" and e.get("ph") == "X" and e["name"] in names]
    return sorted(ranges, key=lambda event: (event["ts"], -event["dur"]))


def _launched(events: Sequence[Event]) -> Work:
    """Returns the GPU's work, or None."""
    linked = [e for e in events if "correlation" in e.get("args", {})]
    launches = {e["args"]["correlation"]: e["ts"] for e in linked if e.get("cat") in _LAUNCHES}
    work = [(launches.get(e["args"]["correlation"]), e["dur"]) for e in linked if e.get("cat") in _WORK]
    return [(launched, duration) for launched, duration in work if launched is not None] or None


def _phase(name: str, ranges: Sequence[Event], work: Work, iterations: int) -> Phase:
    """Returns the phase of these ranges, which are sorted and do not overlap."""
    starts, device = [event["ts"] for event in ranges], 0.0
    for launched, duration in work or ():
        k = bisect_right(starts, launched) - 1
        if k >= 0 and launched < ranges[k]["ts"] + ranges[k]["dur"]:
            device += duration
    host = sum(float(event["dur"]) for event in ranges)
    seconds_on_device = None if work is None else device / 1e6 / iterations
    return Phase(name, len(ranges) / iterations, host / 1e6 / iterations, seconds_on_device)


# For the terminal


def table(result: Profile) -> Table:
    """Returns the phases of one iteration, for the terminal."""
    view = plain_table(None, label(result.method, result.loss), "calls", "host ms", "share", "GPU ms")
    whole = sum(phase.host for phase in result.phases)
    for phase in result.phases:
        view.add_row(
            phase.name.removeprefix("bt_fast::").replace("_", " "),
            f"{phase.calls:.3g}" if phase.calls else "-",
            f"{1e3 * phase.host:.2f}",
            f"{100 * phase.host / whole:.0f}%",
            "-" if phase.device is None else f"{1e3 * phase.device:.2f}",
        )
    return view


def lines(result: Profile) -> list[str]:
    """Returns time and energy per iteration, sample and epoch, and NVML's other figures."""
    seconds, m, n = statistics.median(result.seconds), result.batch_size, result.epoch
    time = (
        f"time: {1e3 * seconds:.2f} ms per iteration (median of {len(result.seconds)}, not traced), "
        f"{1e6 * seconds / m:.1f} us per sample, {n / m * seconds:.1f} s per epoch of {n}"
    )
    if result.reason is not None:
        return [time, f"energy: not measured: {result.reason}"]
    energy = "energy: not measured: the device does not tell it, or was lost"
    if result.joules is not None:
        energy = (
            f"energy: {result.joules:.4g} J per iteration, {result.joules / m:.4g} J per sample, "
            f"{result.joules / m * n:.4g} J per epoch of {n}, at this rate"
        )
    return [time, energy, *map(_line, result.power)]


def _line(s: Summary) -> str:
    """Formats a device's summary, without unknown values."""
    throttled = ", ".join(f"{name} {share:.0%}" for name, share in (s.throttle or {}).items())
    parts = {
        "energy from the {}": s.energy_source,
        "{:.0f} W in mean": s.mean_power,
        "{:.0f} W at most": s.max_power,
        "SM {:.0%}": s.mean_sm_utilisation,
        "memory {:.0%}": s.mean_memory_utilisation,
        "{:.0f} MHz": s.mean_sm_clock,
        "{:.0f} C": s.max_temperature,
        "{:.1f} GiB in use": None if s.peak_memory is None else s.peak_memory / 2**30,
        "clocks held back: {}": throttled or None,
        "LOST: {}": s.lost,
        "{}": s.shared,
    }
    return f"{s.name}: " + ", ".join(form.format(value) for form, value in parts.items() if value is not None)
