"""Writes a run's curves as TensorBoard scalars."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bt_fast.lab import locks
from bt_fast.lab.html_report.loading import LoadedRun, Result

_TAGS = {"clean": "accuracy/clean", "robust": "accuracy/robust", "loss": "loss", "joules": "joules"}
_FRACTIONS = ("boundary", "robust", "outlier", "robust_fraction")


def write_scalars(runs: Sequence[LoadedRun], folder: Path) -> None:
    """Writes a folder of events for each method of each run: accuracy, loss, joules and fractions by iteration.

    For all except the fractions the clock is the method's training time, which TensorBoard's RELATIVE axis shows.

    Raises:
        ValueError: the tensorboard package is not installed, the folder is not empty, or another process writes there.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        message = f"--tensorboard needs the package tensorboard: pip install 'bt-fast[tensorboard]' ({error})"
        raise ValueError(message) from error
    _check_free(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locks.held(folder):
        _check_free(folder)  # another process may have written there meanwhile
        for run in runs:
            for result in run.results:
                name = re.sub(r"[^\w.,=+-]", "_", result.name)
                with SummaryWriter(str(folder / f"{run.row_name(result)}-{name}")) as writer:
                    _write(writer, run, result)


def _check_free(folder: Path) -> None:
    """Raises ValueError unless the path does not exist or is an empty folder."""
    if folder.exists() and not (folder.is_dir() and all(child.name == locks.NAME for child in folder.iterdir())):
        raise ValueError(f"--tensorboard {folder}: already there and not an empty folder; name another")


def _write(writer: Any, run: LoadedRun, result: Result) -> None:
    started = run.written - result.seconds
    for record in run.of_kind("epoch", result.name):
        for key, tag in _TAGS.items():
            if record.get(key) is not None:
                writer.add_scalar(tag, record[key], record["iteration"], walltime=started + record["seconds"])
    for record in run.of_kind("fractions", result.name):
        for key in _FRACTIONS:
            writer.add_scalar(f"fractions/{key}", record[key], record["iteration"], walltime=run.written)
