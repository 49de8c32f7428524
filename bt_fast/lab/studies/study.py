"""The parts of a study: its configurations, a run folder for each seed, and finally NAME.json and NAME.png."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from bt_fast.deciding import STEP_FACTOR
from bt_fast.lab import report
from bt_fast.lab.checkpoint import load_checkpoint
from bt_fast.lab.config import PRESETS, RunConfig
from bt_fast.lab.corruptions import CorruptedTestSet, corruption_errors, mean_corruption_error
from bt_fast.lab.data import ImageDataset
from bt_fast.lab.files import write_text
from bt_fast.lab.fitting import check_training
from bt_fast.lab.locks import alone
from bt_fast.lab.provenance import check_configuration
from bt_fast.lab.session import train
from bt_fast.lab.terminal import console, progress_bar, stop_signals
from bt_fast.lab.training import Contestant, Observe, Run

SCALES = ("laptop", "paper")
# for minutes on two cores; with --data and --train-size for more than the embedded digits
LAPTOP = dataclasses.replace(PRESETS["digits"], epochs=5, decay_epochs=(4,))
PAPER = PRESETS["cifar10"]
# PGD training of the figures
EPSILON, STEPS = 0.3, 7
PGD: dict[str, Any] = {"loss": "pgd", "epsilon": EPSILON, "steps": STEPS, "step_size": STEP_FACTOR * EPSILON / STEPS}


@dataclass(frozen=True)
class Study:
    """One table or figure of the paper."""

    name: str
    title: str
    laptop: RunConfig  # the configuration of a run at each scale; the seed is set for each run
    paper: RunConfig
    picture: Callable[[Findings], Figure]
    answers: Callable[[Findings], dict[str, Any]]  # summarises the findings in numbers
    observe: Observe | None = None  # called with the run after every tenth iteration
    corruptions: bool = False  # whether robust accuracy is measured on a corrupted test set

    def config(self, scale: str) -> RunConfig:
        """Returns the configuration at a scale."""
        return self.laptop if scale == "laptop" else self.paper


@dataclass(frozen=True)
class Findings:
    """The results of a study's runs: for each seed the summary (`report.summarise`) and the records."""

    study: str
    title: str
    scale: str
    summaries: Sequence[dict[str, Any]]
    records: Sequence[list[dict[str, Any]]]

    @property
    def config(self) -> dict[str, Any]:
        """The first run's configuration."""
        config: dict[str, Any] = self.summaries[0]["config"]
        return config

    @property
    def methods(self) -> list[str]:
        """The names of the methods, in the order of training."""
        return list(self.summaries[0]["methods"])

    def values(self, method: str, key: str) -> list[Any]:
        """Returns an entry of a method's summary, for each seed; None if it is missing."""
        return [summary["methods"][method].get(key) for summary in self.summaries]

    def mean(self, method: str, key: str) -> float:
        """Returns the mean of an entry over the seeds."""
        return mean(self.values(method, key))

    def label(self, method: str) -> str:
        """Returns a method's name in tables and pictures."""
        return str(self.values(method, "label")[0])

    def clock(self, method: str, over: str) -> float:
        """Returns the measured speedup over another method: the mean over seeds of the median ratios of iterations."""
        return 1.0 if method == over else mean([ratios[over] for ratios in self.values(method, "speedup")])


def mean(values: Sequence[float]) -> float:
    """Returns the arithmetic mean."""
    return float(sum(values) / len(values))


def check_run(config: RunConfig, dataset: ImageDataset, folder: Path, device: torch.device) -> None:
    """Raises ValueError for a seed's run that cannot be trained, or that differs from the existing one."""
    check_training(config, dataset, device)
    path = folder / f"seed{config.seed}" / "checkpoint.pt"
    if path.exists():
        stored, state = load_checkpoint(path)
        check_configuration(config, stored, path, but_data=state.get("data") is not None)


def open_run(study: Study, config: RunConfig, dataset: ImageDataset, folder: Path, device: torch.device) -> Run:
    """Returns the run of the configuration's seed, new or resumed."""
    place = folder / f"seed{config.seed}"
    return Run(place, config, dataset, device, resume=(place / "checkpoint.pt").exists(), observe=study.observe)


def conduct(
    study: Study,
    config: RunConfig,
    dataset: ImageDataset,
    folder: Path,
    device: torch.device,
    test_set: CorruptedTestSet | None,
) -> tuple[Run, dict[str, Any]]:
    """Trains the run of the configuration's seed, or the rest of it, and prints its summary.

    With a corrupted test set, `robust` in the summary is each method's accuracy on it.
    """
    with ExitStack() as stack:
        with stop_signals() as stop:
            run = open_run(study, config, dataset, folder, device)
            stack.callback(run.close)
            train(run, stop, f"the same command goes on in {folder}")
        with progress_bar(f"evaluation, seed {config.seed}", len(config.methods)) as bar:
            summary = report.summarise(run, bar.advance)
        if test_set is not None:
            for contestant in run.contestants:
                record = _under_corruption(run, contestant, test_set)
                summary["methods"][contestant.method] |= {"robust": record["robust"], "errors": record["errors"]}
    console.print(report.table(summary))
    return run, summary


def _under_corruption(run: Run, contestant: Contestant, test_set: CorruptedTestSet) -> dict[str, Any]:
    """Returns the last record of a method's accuracy under corruption, measured once for each test set."""
    records = [r for r in run.records() if r["kind"] == "corruptions" and r["method"] == contestant.method]
    if records and records[-1].get("sha256") == test_set.fingerprint:
        return records[-1]
    same = [r for r in records if r.get("sha256") == test_set.fingerprint]
    if same:
        measured = {key: same[-1][key] for key in ("robust", "images", "sha256", "errors")}
    else:
        errors = dict(corruption_errors(contestant.model, test_set, run.device))
        robust = 1.0 - mean_corruption_error(errors)
        measured = {"robust": robust, "images": len(test_set.labels), "sha256": test_set.fingerprint, "errors": errors}
    run.append(kind="corruptions", method=contestant.method, **measured)
    return run.records()[-1]


def write(study: Study, scale: str, runs: Sequence[tuple[Run, dict[str, Any]]], folder: Path) -> list[Path]:
    """Writes NAME.json and NAME.png; returns their paths."""
    summaries, records = [summary for _, summary in runs], [run.records() for run, _ in runs]
    findings = Findings(study.name, study.title, scale, summaries, records)
    content = {
        "study": study.name,
        "title": study.title,
        "scale": scale,
        "seeds": [run.config.seed for run, _ in runs],
        "answers": study.answers(findings),
        "runs": summaries,
    }
    path = folder / f"{study.name}.json"
    with alone(folder / f".{study.name}.lock", lambda _: None):  # one process writes both files
        write_text(path, json.dumps(content, indent=2) + "\n")
        return [path, report.save_figure(study.picture(findings), folder / f"{study.name}.png")]
