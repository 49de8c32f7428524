"""The page: what was run, on what, and what came of it."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import bt_fast
from bt_fast.lab.files import write_text
from bt_fast.lab.html_report.attacked_groups import ABOUT_GROUPS, attacked_groups
from bt_fast.lab.html_report.charts import Styles, accuracy, allocations, fractions, row_name, styles_of, trade_off
from bt_fast.lab.html_report.corruption_errors import ABOUT_ERRORS, corruption_errors
from bt_fast.lab.html_report.loading import LoadedRun, Result
from bt_fast.lab.html_report.markup import Html, element, join, note, table
from bt_fast.lab.html_report.numbers import UNKNOWN, duration, percent, plain, shares, times
from bt_fast.lab.html_report.style import style_sheet
from bt_fast.lab.html_report.waterfall import waterfalls

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # a browser that follows it fetches nothing at all
_NO_REASON = "the summary has no joules, and does not say why"


def write_page(runs: Sequence[LoadedRun], path: Path) -> None:
    """Write the report of at least one run, replacing the file as a whole.

    Raises:
        ValueError: as of `check_path`.
    """
    check_path(path)
    write_text(path, page(runs, datetime.now(timezone.utc)))


def check_path(path: Path) -> None:
    """Raise ValueError if a report cannot be written there: without its folder, or where a folder is."""
    if not path.parent.is_dir() or path.is_dir():
        what = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise ValueError(f"--out {path}: {what}; expected a file to write")


def page(runs: Sequence[LoadedRun], now: datetime) -> str:
    """The report as HTML, one file that fetches nothing."""
    styles = styles_of(runs)
    sections = [
        _section("methods", "Methods", _methods(runs)),
        _section("accuracy", "Accuracy against time", [_panels(accuracy(runs, styles))]),
        _section("trade-offs", "Clean and robust accuracy", [_panels(trade_off(runs, styles))]),
        _section("time", "Where an iteration's time goes", [_about_time(), _panels(waterfalls(runs))]),
        _section("fractions", "Fractions", [_panels(fractions(runs))]),
        _section("svar", "Signed variances and assigned steps", [_panels(allocations(runs))]),
        *_of_studies(runs, styles),
        _section("energy", "Energy", _energy(runs)),
        _section("configuration", "Configuration", [_differences("Configuration", runs, _configuration)]),
        _section("versions", "Versions and machine", [_differences("Versions", runs, lambda run: run.machine)]),
    ]
    title = f"bt-fast: {', '.join(run.title for run in runs[:3])}{' and more' if len(runs) > 3 else ''}"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Html(style_sheet())),
    )
    links = [element("li", element("a", name, href=f"#{id_}")) for id_, name, _ in sections]
    body = element(
        "body",
        element("a", "Skip to the results", href="#results", class_="skip"),
        element("header", _header(runs, now), element("nav", element("ul", *links), aria_label="Contents")),
        element("main", *(content for *_, content in sections), id="results", tabindex="-1"),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _section(id_: str, name: str, content: list[Html]) -> tuple[str, str, Html]:
    id_ = f"section-{id_}"
    whole = element("section", element("h2", name, id=f"{id_}-name"), *content, id=id_, aria_labelledby=f"{id_}-name")
    return id_, name, whole


def _of_studies(runs: Sequence[LoadedRun], styles: Styles) -> list[tuple[str, str, Html]]:
    """What studies alone record: there are no such sections without it."""
    groups, errors = attacked_groups(runs), corruption_errors(runs, styles)
    found = []
    if groups:
        found.append(_section("groups", "Groups as an attack tells them", [note(ABOUT_GROUPS), _panels(groups)]))
    if errors:
        found.append(_section("corruptions", "Errors under corruptions", [note(ABOUT_ERRORS), _panels(errors)]))
    return found


def _panels(found: list[Html]) -> Html:
    return element("div", *found, class_="panels")


def _header(runs: Sequence[LoadedRun], now: datetime) -> Html:
    what = "one run" if len(runs) == 1 else f"{len(runs)} runs"
    written = f"Of {what}, written {_date(now)} by bt-fast {bt_fast.__version__}."
    rows = [
        [run.letter, run.title, _date(datetime.fromtimestamp(run.written, timezone.utc))]
        + [_value(run.config, key) for key in ("loss", "data", "model", "seed")]
        + [_value(run.machine, "device"), _value(run.machine, "torch")]
        for run in runs
    ]
    header = ["run", "folder", "summary dated", "objective", "data", "model", "seed", "device", "torch"]
    unfinished = [f"run {run.letter}, {run.unfinished}" for run in runs if run.unfinished]
    about = "Not finished, so told by its last records, with the accuracies after that epoch: "
    told = [note(f"{about}{'; '.join(unfinished)}.")] if unfinished else []
    return join([element("h1", "Training report"), element("p", written), *told, table("The runs", header, rows)])


def _date(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M UTC")


def _value(found: Mapping[str, Any], key: str) -> str:
    if key not in found:
        return "not recorded"
    value = found[key]
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return ", ".join(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# Methods


def _methods(runs: Sequence[LoadedRun]) -> list[Html]:
    header = ["", "run", "method", "clean", "robust", "against", "F_B / F_R / F_O"]
    header += ["theory", "passes", "clock", "iteration", "time"]
    rows = [_method(run, result) for run in runs for result in run.results]
    about = note(
        "Theory is Eq. 7 over the objective itself. Passes are forward-pass equivalents (F) of an iteration. Clock is "
        "the speedup over the run's first method, the median over paired iterations. Iteration is a median, time that "
        "of all training."
    )
    found = [about, table("All methods of all runs", header, rows), *_over_seeds(runs)]
    missing = _missing(runs)
    if missing:
        told = [element("li", text) for text in missing]
        found += [note("Not in the summaries, which an older version wrote:"), element("ul", *told, class_="note")]
    return found


def _method(run: LoadedRun, result: Result) -> list[str]:
    return [
        row_name(run, result),
        run.letter,
        result.label,
        percent(result.clean),
        percent(result.robust),
        result.attack if result.robust is not None else UNKNOWN,
        shares(result.fractions),
        times(result.theoretical_speedup),
        plain(result.forward_passes, "F"),
        times(_clock(run, result)),
        duration(result.iteration_seconds),
        duration(result.seconds),
    ]


def _clock(run: LoadedRun, result: Result) -> float | None:
    first = run.results[0]
    return 1.0 if result is first else result.speedup.get(first.name)


def _missing(runs: Sequence[LoadedRun]) -> list[str]:
    """For each entry that a summary lacks, of which rows."""
    lacking: dict[str, list[str]] = {}
    for run in runs:
        for result in run.results:
            for key in result.missing:
                lacking.setdefault(key, []).append(row_name(run, result))
    return [f"{key} of {', '.join(rows)}" for key, rows in lacking.items()]


def _over_seeds(runs: Sequence[LoadedRun]) -> list[Html]:
    """A table of means for every set of finished runs that differ in nothing but their seeds; each seed counts once."""
    return [_means(group) for group in _seed_groups(runs) if len(group) > 1]


def _seed_groups(runs: Sequence[LoadedRun]) -> list[list[LoadedRun]]:
    groups: dict[str, dict[str, LoadedRun]] = {}
    for run in runs:
        if run.unfinished:
            continue
        rest = {key: value for key, value in run.config.items() if key not in ("seed", "data")}
        same = json.dumps([rest, run.trained_on, [result.name for result in run.results]], sort_keys=True)
        groups.setdefault(same, {}).setdefault(json.dumps(run.config.get("seed")), run)
    return [list(of_seeds.values()) for of_seeds in groups.values()]


def _means(runs: list[LoadedRun]) -> Html:
    rows = []
    for i, result in enumerate(runs[0].results):
        of_seeds = [run.results[i] for run in runs]
        clocks = [_clock(run, mine) for run, mine in zip(runs, of_seeds, strict=True)]
        rows.append(
            [
                result.label,
                _mean([r.clean for r in of_seeds], percent),
                _mean([r.robust for r in of_seeds], percent),
                _mean(clocks, times),
                _mean([r.seconds for r in of_seeds], duration),
            ]
        )
    letters = ", ".join(run.letter for run in runs)
    caption = f"Means over the seeds (runs {letters}), with the least and the greatest"
    return table(caption, ["method", "clean", "robust", "clock", "time"], rows)


def _mean(values: Sequence[float | None], write: Callable[[float | None], str]) -> str:
    told = [value for value in values if value is not None]
    if len(told) < len(values):
        return UNKNOWN
    return f"{write(statistics.fmean(told))} ({write(min(told))} to {write(max(told))})"


# Time, energy


def _about_time() -> Html:
    return note(
        "From the objective as its authors wrote it to ours, each optimisation one bar, as far as the run has the "
        "methods. The marks are where the time would be if each attack step and the update took alike (Eq. 7), and if "
        "each forward pass took as long as in the first row (FLOP). A bar that ends right of a mark has overhead that "
        "the mark does not count; one that ends left of it saves what the mark does not count."
    )


def _energy(runs: Sequence[LoadedRun]) -> list[Html]:
    rows: list[list[str]] = []
    untold: dict[str, list[str]] = {}  # rows of the first table by why
    for run in runs:
        for result in run.results:
            if result.joules is None:
                untold.setdefault(result.joules_reason or _NO_REASON, []).append(row_name(run, result))
                continue
            epochs = len(run.of_kind("epoch", result.name))
            of_epoch = result.joules / epochs if epochs else None
            told = plain(result.joules, "J"), plain(of_epoch, "J"), plain(_ratio(result.joules, result.seconds), "W")
            rows.append([row_name(run, result), result.label, *told])
    header = ["", "method", "energy", "per epoch", "mean power"]
    found = [table("Energy of training", header, rows)] if rows else []
    return found + [note(f"Not measured of {', '.join(names)}: {why}.") for why, names in untold.items()]


def _ratio(a: float | None, b: float) -> float | None:
    return a / b if a is not None and b > 0 and math.isfinite(b) else None


# Configuration, versions


def _configuration(run: LoadedRun) -> dict[str, Any]:
    """In which data are what they are, not where they lay."""
    if run.data is None:
        return run.config
    return {key: f"SHA-256 {run.data[:12]}..." if key == "data" else value for key, value in run.config.items()}


def _differences(caption: str, runs: Sequence[LoadedRun], of: Callable[[LoadedRun], Mapping[str, Any]]) -> Html:
    """A row for each name, a column for each run; a row whose values differ is marked, in words too."""
    names = dict.fromkeys(itertools.chain.from_iterable(of(run) for run in runs))
    values = [[_value(of(run), name) for run in runs] for name in names]
    differ = frozenset(i for i, row in enumerate(values) if len(set(row)) > 1)
    header = ["name", *(f"run {run.letter}" for run in runs)]
    rows = [[name, *row] for name, row in zip(names, values, strict=True)]
    if len(runs) > 1:
        header.append("the runs")
        rows = [[*row, "differ" if i in differ else "agree"] for i, row in enumerate(rows)]
    return table(caption, header, rows, differ)
