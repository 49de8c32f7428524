"""Charts of the errors under common corruptions, by corruption and by severity."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bt_fast.lab.corruptions import SEVERITIES
from bt_fast.lab.html_report import drawing
from bt_fast.lab.html_report.charts import DRAWN, HEIGHT, Styles, undrawn
from bt_fast.lab.html_report.drawing import BOTTOM, TOP
from bt_fast.lab.html_report.loading import LoadedRun, Result
from bt_fast.lab.html_report.markup import Html, element, panel, table
from bt_fast.lab.html_report.numbers import percent

ABOUT_ERRORS = (
    "Errors on the corrupted test set: marks are means over the severities, lines means over the corruptions. The "
    "robust accuracy of these methods is 1 minus the mean over both."
)
_NAMES = 150  # the width of the corruptions' names
_APART = 10  # between the marks of two methods

Errors = dict[str, list[float]]  # shares for each severity, by corruption


def corruption_errors(runs: Sequence[LoadedRun], styles: Styles) -> list[Html]:
    """Two panels for each run with a record of such errors: by corruption, and by severity."""
    found = []
    for run in runs:
        if errors := [(result, record[-1]["errors"]) for result in run.results if (record := _recorded(run, result))]:
            found.append(panel(f"{run.letter}: by corruption", _by_corruption(run, errors, styles)))
            found.append(panel(f"{run.letter}: by severity", _by_severity(run, errors, styles)))
    return found


def _recorded(run: LoadedRun, result: Result) -> list[dict[str, Errors]]:
    return [record for record in run.of_kind("corruptions", result.name) if record.get("errors")]


def _by_corruption(run: LoadedRun, errors: list[tuple[Result, Errors]], styles: Styles) -> Html:
    """A row for each corruption, in it a mark for each method, one below the other."""
    shown, names = errors[:DRAWN], dict.fromkeys(name for _, found in errors for name in found)
    row = _APART * (len(shown) + 1)
    height = row * len(names) + BOTTOM
    most = max(statistics.fmean(of_severities) for _, found in errors for of_severities in found.values())
    x = drawing.Scale(0, _above(most), _NAMES, drawing.WIDTH - drawing.RIGHT)
    drawn = [drawing.upright_grid(x, height - BOTTOM, "error, mean over severities (%)")]
    for i, name in enumerate(names):
        drawn.append(drawing.words(_NAMES - 8, (i + 0.5) * row + 4, name.replace("_", " "), "end"))
        drawn.append(element("line", x1=0, y1=(i + 1) * row, x2=x.end, y2=(i + 1) * row, class_="grid"))
        for k, (result, found) in enumerate(shown):
            if name in found:
                place = x(100 * statistics.fmean(found[name])), i * row + _APART * (k + 1)
                drawn.append(drawing.mark(place, styles[result.name]))
    title = f"Error by corruption, run {run.letter}"
    worst = ", ".join(f"{result.label} {_worst(found)}" for result, found in shown)
    rows = [
        [name.replace("_", " "), result.label, *map(percent, found[name]), percent(statistics.fmean(found[name]))]
        for name in names
        for result, found in errors
        if name in found
    ]
    header = ["corruption", "method", *(f"severity {n}" for n in SEVERITIES), "mean"]
    legend = [drawing.key(styles[result.name], result.label, lined=False) for result, _ in shown]
    name, text = f"corruptions-{run.letter}", f"Most errors: {worst}.{undrawn(len(errors))}"
    return drawing.figure(name, title, text, height, drawn, legend, [table(title, header, rows)])


def _above(most: float) -> float:
    """The end of an axis of percents on which this share is the largest."""
    return 105 * most if most > 0 else 1.0


def _worst(errors: Errors) -> str:
    name = max(errors, key=lambda each: statistics.fmean(errors[each]))
    return f"under {name.replace('_', ' ')}, {percent(statistics.fmean(errors[name]))}"


def _by_severity(run: LoadedRun, errors: list[tuple[Result, Errors]], styles: Styles) -> Html:
    means = [
        (result, [statistics.fmean(e[i] for e in found.values()) for i in range(len(SEVERITIES))])
        for result, found in errors
    ]
    x = drawing.x_scale(SEVERITIES[0], SEVERITIES[-1])
    most = max(max(of_severities) for _, of_severities in means)
    y = drawing.y_scale(0, _above(most), TOP, HEIGHT - BOTTOM)
    drawn, legend = [drawing.axes(x, y, "severity", "error, mean over corruptions (%)")], []
    for result, of_severities in means[:DRAWN]:
        points = [(x(n), y(100 * error)) for n, error in zip(SEVERITIES, of_severities, strict=True)]
        drawn.append(drawing.line(points, styles[result.name]))
        legend.append(drawing.key(styles[result.name], result.label))
    title = f"Error by severity, run {run.letter}"
    told = "; ".join(f"{result.label}, {percent(e[0])} to {percent(e[-1])}" for result, e in means[:DRAWN])
    rows = [[result.label, *map(percent, e), percent(statistics.fmean(e))] for result, e in means]
    header = ["method", *(f"severity {n}" for n in SEVERITIES), "mean"]
    name, text = f"severities-{run.letter}", f"From the least severity to the greatest: {told}.{undrawn(len(errors))}"
    return drawing.figure(name, title, text, HEIGHT, drawn, legend, [table(title, header, rows)])
