"""Makes the page: what was run, on which machine and data, and the results."""

from __future__ import annotations

import functools
import json
import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined

import bt_fast
from bt_fast.lab.files import write_text
from bt_fast.lab.html_report import charts
from bt_fast.lab.html_report.corruption_errors import corruption_errors
from bt_fast.lab.html_report.drawing import RC, Columns, Panel, Table
from bt_fast.lab.html_report.loading import LoadedRun, Result
from bt_fast.lab.html_report.numbers import (
    UNKNOWN,
    duration,
    joules,
    passes,
    percent,
    printable,
    shares,
    times,
    watts,
)
from bt_fast.lab.html_report.waterfall import waterfall

_TEMPLATES = Environment(
    loader=PackageLoader("bt_fast.lab", "html_report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_NO_REASON = "the summary has no joules, and does not say why"


def write_page(runs: Sequence[LoadedRun], path: Path) -> None:
    """Writes the report of at least one run, replacing the file atomically.

    Raises:
        ValueError: see `check_path`.
    """
    check_path(path)
    write_text(path, page(runs, datetime.now(timezone.utc)))


def check_path(path: Path) -> None:
    """Raises ValueError if a report cannot be written there: the folder is missing, or the path is a folder."""
    if not path.parent.is_dir() or path.is_dir():
        what = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise ValueError(f"--out {path}: {what}; expected a file to write")


def page(runs: Sequence[LoadedRun], now: datetime) -> str:
    """Returns the report as HTML, one file that loads nothing and runs nothing."""
    with matplotlib.rc_context(RC), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of glyphs that matplotlib's font lacks: the reader's has them
        text = _TEMPLATES.get_template("page.html").render(
            runs=runs,
            date=_date(now),
            version=bt_fast.__version__,
            overview=_overview(runs),
            sections=[section for section in _sections(runs) if section[2]],
            str=str,
        )
    return printable(text)


def _sections(runs: Sequence[LoadedRun]) -> list[tuple[str, str, Sequence[Table | Panel]]]:
    """Returns the sections of the page: id, name and content; those for studies may be empty."""
    styles = charts.styles_of(runs)
    return [
        ("methods", "Methods", [_methods(runs), *_memories(runs), *_over_seeds(runs), *_missing(runs)]),
        ("accuracy", "Accuracy against time", charts.accuracy(runs, styles)),
        ("trade-offs", "Clean and robust accuracy", charts.trade_off(runs, styles)),
        ("time", "Where an iteration's time goes", [waterfall(run) for run in runs]),
        ("fractions", "Fractions", charts.of_methods(runs, "fractions")),
        ("svar", "Signed variances and assigned steps", charts.of_methods(runs, "allocation")),
        ("groups", "Groups as an attack finds them", [p for run in runs for p in charts.attacked_groups(run)]),
        ("corruptions", "Errors under corruptions", [p for run in runs for p in corruption_errors(run, styles)]),
        ("energy", "Energy", _energy(runs)),
        ("configuration", "Configuration", [_differences("Configuration", runs, [_configuration(r) for r in runs])]),
        ("versions", "Versions and machine", [_differences("Versions", runs, [run.machine for run in runs])]),
    ]


def _overview(runs: Sequence[LoadedRun]) -> Table:
    names = ("run", "folder", "summary dated", "objective", "data", "model", "seed", "device", "torch")
    rows = []
    for run in runs:
        config = [_value(run.config, key) for key in ("loss", "data", "model", "seed")]
        machine = [_value(run.machine, key) for key in ("device", "torch")]
        dated = _date(datetime.fromtimestamp(run.written, timezone.utc))
        rows.append((run.letter, run.title, dated, *config, *machine))
    return Table("The runs", dict.fromkeys(names, str), rows)


def _date(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M UTC")


def _value(entries: Mapping[str, Any], key: str) -> str:
    value = entries.get(key, "not recorded")
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return ", ".join(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# Methods


def _methods(runs: Sequence[LoadedRun]) -> Table:
    columns: Columns = {
        **{"": str, "run": str, "method": str, "clean": percent, "robust": percent, "against": str},
        **{"F_B / F_R / F_O": shares, "theory": times, "passes": passes, "clock": times},
        **{"iteration": duration, "time": duration},
    }
    rows = []
    for run in runs:
        for r in run.results:
            accuracy = (r.clean, r.robust, UNKNOWN if r.robust is None else r.attack)
            speed = (r.theoretical_speedup, r.forward_passes, _clock(run, r), r.iteration_seconds, r.seconds)
            rows.append((run.row_name(r), run.letter, r.label, *accuracy, r.fractions, *speed))
    return Table("All methods of all runs", columns, rows)


def _clock(run: LoadedRun, result: Result) -> float | None:
    first = run.results[0]
    return 1.0 if result is first else result.speedup.get(first.name)


def _memories(runs: Sequence[LoadedRun]) -> list[Table]:
    rows = [(run.row_name(r), r.label, r.memory) for run in runs for r in run.results if r.memory is not None]
    return [Table("What is remembered of attacks", dict.fromkeys(("", "method", "memory"), str), rows)] if rows else []


def _missing(runs: Sequence[LoadedRun]) -> list[Table]:
    """Lists, for each entry that some summaries lack, the rows of the first table without it."""
    rows: dict[str, list[str]] = {}
    for run in runs:
        for result in run.results:
            for key in result.missing:
                rows.setdefault(key, []).append(run.row_name(result))
    caption = "Not in the summaries, which an older version wrote"
    columns = {"entry": str, "missing in": str}
    return [Table(caption, columns, [(key, ", ".join(names)) for key, names in rows.items()])] if rows else []


def _over_seeds(runs: Sequence[LoadedRun]) -> list[Table]:
    """Returns a table of means for each set of finished runs that differ only in their seeds; each seed counts once."""
    groups: dict[str, dict[str, LoadedRun]] = {}
    for run in runs:
        if not run.unfinished:
            rest = {key: value for key, value in run.config.items() if key not in ("seed", "data")}
            same = json.dumps([rest, run.trained_on, [result.name for result in run.results]], sort_keys=True)
            groups.setdefault(same, {}).setdefault(json.dumps(run.config.get("seed")), run)
    return [_means(list(by_seed.values())) for by_seed in groups.values() if len(by_seed) > 1]


def _means(runs: list[LoadedRun]) -> Table:
    rows = [
        (
            results[0].label,
            [result.clean for result in results],
            [result.robust for result in results],
            [_clock(run, result) for run, result in zip(runs, results, strict=True)],
            [result.seconds for result in results],
        )
        for results in zip(*(run.results for run in runs), strict=True)
    ]
    writers = {"clean": percent, "robust": percent, "clock": times, "time": duration}
    columns: Columns = {"method": str, **{name: functools.partial(_mean, write) for name, write in writers.items()}}
    caption = f"Means over the seeds (runs {', '.join(run.letter for run in runs)}), with the least and the greatest"
    return Table(caption, columns, rows)


def _mean(write: Callable[[float | None], str], values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return UNKNOWN
    return f"{write(statistics.fmean(known))} ({write(min(known))} to {write(max(known))})"


# Energy, configuration, versions


def _energy(runs: Sequence[LoadedRun]) -> list[Table | Panel]:
    """Returns the measured energy of methods, and for the others the reason why it is missing."""
    rows: list[tuple[Any, ...]] = []
    unmeasured: dict[str, list[str]] = {}  # rows of the first table, by reason
    for run in runs:
        for result in run.results:
            name, energy = run.row_name(result), result.joules
            if energy is None:
                unmeasured.setdefault(result.joules_reason or _NO_REASON, []).append(name)
                continue
            epochs = len(run.of_kind("epoch", result.name))
            power = energy / result.seconds if 0 < result.seconds < math.inf else None
            rows.append((name, result.label, energy, energy / epochs if epochs else None, power))
    columns: Columns = {"": str, "method": str, "energy": joules, "per epoch": joules, "mean power": watts}
    remarks = [Panel(f"Not measured of {', '.join(names)}: {reason}.") for reason, names in unmeasured.items()]
    return [*([Table("Energy of training", columns, rows)] if rows else []), *remarks]


def _configuration(run: LoadedRun) -> dict[str, Any]:
    """Returns the run's configuration; data are named by their hash if known, instead of their path."""
    return run.config | ({"data": f"SHA-256 {run.data[:12]}..."} if run.data else {})


def _differences(caption: str, runs: Sequence[LoadedRun], entries: Sequence[Mapping[str, Any]]) -> Table:
    """Returns a row for each name and a column for each run; rows with different values are marked, also in words."""
    names = dict.fromkeys(name for of_run in entries for name in of_run)
    rows = [[name, *(_value(of_run, name) for of_run in entries)] for name in names]
    marked = [i for i, (_, *values) in enumerate(rows) if len(set(values)) > 1]
    columns = ["name", *(f"run {run.letter}" for run in runs)]
    if len(runs) > 1:
        columns.append("the runs")
        rows = [[*row, "differ" if i in marked else "agree"] for i, row in enumerate(rows)]
    return Table(caption, dict.fromkeys(columns, str), rows, marked)
