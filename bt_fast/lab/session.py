"""Begins, resumes or repeats a training for the command line, from its options to its summary."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bt_fast.attack.balanced import Balance
from bt_fast.lab import report
from bt_fast.lab.checkpoint import load_checkpoint
from bt_fast.lab.config import PRESETS, RunConfig
from bt_fast.lab.data import ImageDataset, load_dataset
from bt_fast.lab.locks import held
from bt_fast.lab.provenance import Provenance, changes, check_configuration, check_data, fingerprint, this_start
from bt_fast.lab.terminal import Bar, console, progress_bar, say, stop_signals
from bt_fast.lab.training import Run, median_speedup
from bt_fast.lab.world import World, joined, norms_alone


@dataclass(frozen=True)
class Start:
    """A training's data, device and folder, and the run that it continues; fields are named like the options.

    Raises:
        ValueError: a resumed run is also given another folder.
    """

    data_dir: Path
    device: str | None
    out: Path | None
    resume: Path | None
    repeat: Path | None
    balance: bool
    rank_timeout: float  # minutes

    def __post_init__(self) -> None:
        for option, value in (("--out", self.out), ("--repeat", self.repeat)):
            if self.resume is not None and value is not None:
                raise ValueError(f"{option}: a resumed run stays in its folder; leave {option} or --resume away")

    @property
    def previous(self) -> Path | None:
        """The folder of the run to resume or repeat."""
        if self.resume is not None and self.resume.name == "checkpoint.pt":
            return self.resume.parent
        return self.resume or self.repeat


def run_training(start: Start, options: dict[str, Any]) -> None:
    """Begins, resumes or repeats a run, trains it to its end, and prints its results.

    Args:
        options: values of `RunConfig`'s fields.
    """
    with _joined_ranks(start) as (world, device), ExitStack() as stack:
        if start.balance and world.group is None:
            raise ValueError(
                "--balance shares an attack out over ranks: start several with torchrun; leave it away on one"
            )
        folder, resume = start.out, start.resume is not None
        if start.previous is None:
            config, dataset = configure(options, start.data_dir)
        elif resume:
            folder = start.previous
            if world.leads and (folder / "checkpoint.pt").is_file():
                stack.enter_context(held(folder))  # refused before the data are read
            config, dataset = _resumed(folder, options, start.data_dir)
        else:
            config, dataset = _repeated(start.previous, options, start.data_dir)
        if start.previous is not None and world.leads:
            _say_changes(start.previous, device)
        if start.balance and (config.loss == "augmix" or not any(m.startswith("bullet") for m in config.methods)):
            raise ValueError(
                "--balance shares BulletTrain's attack out: it needs a method bullet, and a loss but augmix; "
                "leave it away"
            )
        balance = Balance(ranks_per_node=world.per_node) if start.balance else None
        with stop_signals() as stop:
            run = Run(folder, config, dataset, device, resume=resume, world=world, balance=balance)
            stack.callback(run.close)
            begun = run.iteration
            if world.group is not None and norms_alone(run.contestants[0].model):
                say("batch norm: torch synchronises it on CUDA alone; here it sees each rank's own samples")
            say(f"{config.data}: {sizes(dataset)}; run folder {run.folder}")
            for contestant in run.contestants:
                if contestant.memory is not None:
                    say(f"{contestant.method}: memory {contestant.memory.description()}")
            train(run, stop, f"go on with --resume {run.folder}")
        _report(run, trained=run.iteration > begun)


@contextmanager
def _joined_ranks(start: Start) -> Iterator[tuple[World, torch.device]]:
    """Yields the ranks that train together and this process's device; only the first rank prints."""
    with joined(start.device, start.rank_timeout) as (world, name):
        quiet, console.quiet = console.quiet, not world.leads
        try:
            yield world, usable_device(name)
        finally:
            console.quiet = quiet


def named_device(name: str) -> torch.device:
    """Returns the device of that name, which need not exist."""
    with suppress(RuntimeError):
        if (device := torch.device(name)).type in ("cpu", "cuda"):
            return device
    raise ValueError(f"--device {name}: expected cpu, cuda or cuda:N")


def usable_device(name: str | None) -> torch.device:
    """Returns the device of that name, or the default one; ValueError if it cannot compute."""
    device = named_device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        torch.zeros(1, device=device)  # a launch, which fails on a GPU that torch was not built for
    except (RuntimeError, AssertionError) as error:
        hint = "bt-fast doctor says what to do, and --device cpu goes without"
        raise ValueError(f"--device {device}: {str(error).splitlines()[0].split('. ')[0]}; {hint}") from error
    return device


# Configuration and data


def configure(options: dict[str, Any], data_dir: Path) -> tuple[RunConfig, ImageDataset]:
    """Returns the configuration of a new run with these options, and its data."""
    source = options.get("data", "digits")
    dataset = load_dataset(source, data_dir)
    return adapt(dataclasses.replace(preset(source, dataset), data=source), options, dataset)


def preset(source: str, dataset: ImageDataset) -> RunConfig:
    """Returns the defaults for a data set, or for a similar one."""
    return PRESETS.get(source) or PRESETS["mnist" if dataset.x_train.shape[1] == 1 else "cifar10"]


def adapt(base: RunConfig, options: dict[str, Any], dataset: ImageDataset) -> tuple[RunConfig, ImageDataset]:
    """Returns a configuration with these options, and the part of the data that it uses."""
    implied: dict[str, Any] = {}
    if options.get("model", "small-cnn") != "small-cnn":
        implied["width"] = None
    if options.get("loss", base.loss) == "augmix":  # a sample is augmented or it is not
        implied |= {"boundary_steps": 1, "robust_steps": 0, "outlier_steps": 0}
    elif "steps" in options:
        implied["boundary_steps"] = options["steps"]
    config = dataclasses.replace(base, **(implied | options))
    config.check()
    if all(config.of_method(name)[1].memory for name in config.methods):
        config.check_steps(options)  # else they are those of the other methods
    dataset = dataset.take(config.train_size, config.test_size)
    return dataclasses.replace(config, curve_size=min(config.curve_size, len(dataset.x_test))), dataset


def data_of(config: RunConfig, data_dir: Path) -> ImageDataset:
    """Loads a run's data, which may have been moved."""
    try:
        return load_dataset(config.data, data_dir).take(config.train_size, config.test_size)
    except ValueError as error:
        raise ValueError(f"{error}; say with --data where the run's data are now") from error


def _repeated(folder: Path, options: dict[str, Any], data_dir: Path) -> tuple[RunConfig, ImageDataset]:
    """Returns the configuration of the run in the folder, and its data, which may lie in another place."""
    path = folder / "run.json"
    original = Provenance.read(path)
    others = sorted(set(options) - {"data"})
    if others:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise ValueError(f"{names}: --repeat {folder} takes the options of that run; leave away what is to be another")
    config = dataclasses.replace(original.config, **options)
    dataset = data_of(config, data_dir)
    check_data(dataset, fingerprint(dataset), original.data["sha256"], path)
    return config, dataset


def _resumed(folder: Path, options: dict[str, Any], data_dir: Path) -> tuple[RunConfig, ImageDataset]:
    """Returns the configuration and the data of a run that continues in its folder."""
    path = folder / "checkpoint.pt"
    if folder.is_dir() and not path.exists():
        raise ValueError(f"{folder}: has no checkpoint.pt, so nothing was saved yet: start it with --out instead")
    stored, state = load_checkpoint(path)
    config = dataclasses.replace(stored, **options)
    check_configuration(config, stored, path, but_data=state.get("data") is not None)
    return config, data_of(config, data_dir)


def _say_changes(folder: Path, device: torch.device) -> None:
    """Prints what has changed since the last start of the run in the folder, and why that matters."""
    path = folder / "run.json"
    starts = Provenance.read(path).starts if path.exists() else []
    if starts and (differences := changes(starts[-1], this_start(0, device, 1))):
        say(f"{folder}: what follows may differ in its last bits, for it was started with {'; '.join(differences)}")


# Training


def sizes(dataset: ImageDataset) -> str:
    """Describes the numbers of images."""
    return f"{len(dataset.x_train)} training, {len(dataset.x_test)} test images"


def train(run: Run, stop: list[int], how_to_go_on: str) -> None:
    """Trains to the end, or to the first iteration after a signal in any rank's `stop`: then saves and exits."""
    with progress_bar("training", run.iterations, run.iteration) as bar:
        try:
            number = _train_until_signal(run, stop, bar)
        except OSError as error:
            raise OSError(f"{error}; what was saved before is whole: {how_to_go_on}") from error
    if number:
        say(f"stopped and saved: {how_to_go_on}")
        sys.exit(128 + number)


def _train_until_signal(run: Run, stop: list[int], bar: Bar) -> int:
    """Returns the number of the signal, or 0."""
    for at in run.train():
        bar.reach(at.iteration, _ratios(run))
        if at.epoch_ended and run.world.leads:
            say(_epoch_line(run))
        if number := run.world.most(stop[0] if stop else 0):
            run.save()
            run.world.most(0)  # when one rank ends, torchrun signals the others: all must have arrived here before
            return number
    return 0


def _epoch_line(run: Run) -> str:
    latest = run.records()[-len(run.contestants) :]
    measures = ("clean",) if run.config.loss == "augmix" else ("clean", "robust")
    parts = []
    for record in latest:
        accuracies = " / ".join(f"{record[measure]:.1%}" for measure in measures)
        age = record.get("memory_age")
        memory = "" if age is None else f", memory {age:.2f} epochs old"
        parts.append(f"{record['method']} {accuracies} in {record['seconds']:.0f} s{memory}")
    return f"epoch {latest[0]['epoch']}, {' / '.join(measures)}: {', '.join(parts)}"


def _ratios(run: Run) -> str:
    first, *others = run.contestants
    ratios = [f"{c.method} {median_speedup(first.seconds[-50:], c.seconds[-50:]):.2f}x" for c in others]
    return ", ".join(ratios) or "training"


def _report(run: Run, *, trained: bool) -> None:
    """Evaluates the run's models, writes and prints summary and plots. Collective; the first rank writes."""
    if not run.world.leads:
        for contestant in run.contestants:
            run.final(contestant)
        return
    with progress_bar("final evaluation", len(run.config.methods)) as bar:
        summary = report.summarise(run, bar.advance)
    paths = report.plot(run)
    console.print(report.table(summary))
    for contestant in run.contestants:
        if contestant.criterion is not None and trained:
            say(f"{contestant.method}: {contestant.criterion.explain().replace(chr(10), '; ')}")
    for method, entry in summary["methods"].items():
        if entry.get("skipped"):
            skipped = f"{entry['skipped']} minibatches skipped for NaN or Inf"
            say(f"{method}: {skipped}; metrics.jsonl tells which and why")
    say("wrote", ", ".join(str(p) for p in [run.folder / "summary.json", run.folder / "metrics.jsonl", *paths]))
