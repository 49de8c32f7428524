"""A run's curves as TensorBoard scalars."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bt_fast.lab import locks
from bt_fast.lab.html_report.loading import LoadedRun, Result

_TAKEN = "already there and not an empty folder; name another"
INSTALL = "pip install 'bt-fast[tensorboard]'"


def write_scalars(runs: Sequence[LoadedRun], folder: Path) -> None:
    """Write a folder of events for each method of each run: accuracy, loss, joules and fractions by iteration.

    The clock of all but the fractions is the method's training time: TensorBoard's RELATIVE axis shows it.

    Raises:
        ValueError: the tensorboard package is not installed, the folder is not empty, or another process writes there.
    """
    writer_of = _summary_writer()
    if not _is_free(folder):
        raise ValueError(f"--tensorboard {folder}: {_TAKEN}")
    folder.mkdir(parents=True, exist_ok=True)
    with locks.held(folder):
        if not _is_free(folder):  # another process has written there since
            raise ValueError(f"--tensorboard {folder}: {_TAKEN}")
        for run in runs:
            for n, result in enumerate(run.results, start=1):
                name = re.sub(r"[^\w.,=+-]", "_", result.name)
                with writer_of(str(folder / f"{run.letter}{n}-{name}")) as writer:
                    _write(writer, run, result)


def _is_free(folder: Path) -> bool:
    """Whether nothing is there, or an empty folder."""
    return not folder.exists() or (folder.is_dir() and all(child.name == locks.NAME for child in folder.iterdir()))


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(f"--tensorboard needs the package tensorboard: {INSTALL} ({error})") from error
    return SummaryWriter


def _write(writer: Any, run: LoadedRun, result: Result) -> None:
    started = run.written - result.seconds
    for record in run.of_kind("epoch", result.name):
        for key in ("clean", "robust", "loss", "joules"):
            if record.get(key) is not None:
                tag = f"accuracy/{key}" if key in ("clean", "robust") else key
                writer.add_scalar(tag, record[key], record["iteration"], walltime=started + record["seconds"])
    for record in run.of_kind("fractions", result.name):
        for key in ("boundary", "robust", "outlier", "robust_fraction"):
            writer.add_scalar(f"fractions/{key}", record[key], record["iteration"], walltime=run.written)
