"""The charts of the errors under common corruptions, by corruption and by severity."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from bt_fast.lab.corruptions import SEVERITIES
from bt_fast.lab.html_report import drawing
from bt_fast.lab.html_report.drawing import COLOURS, DRAWN, Columns, Panel, Style, Table
from bt_fast.lab.html_report.loading import LoadedRun, Result
from bt_fast.lab.html_report.numbers import percent, printable

_SHARES = {**{f"severity {n}": percent for n in SEVERITIES}, "mean": percent}
Errors = Sequence[tuple[Result, Mapping[str, Sequence[float]]]]  # by method: shares by corruption, for each severity


def corruption_errors(run: LoadedRun, styles: Mapping[str, Style]) -> list[Panel]:
    """Returns the errors by corruption, and by severity, if the run recorded them."""
    errors = [
        (result, records[-1]["errors"])
        for result in run.results
        if (records := [r for r in run.of_kind("corruptions", result.name) if r.get("errors")])
    ]
    return [_by_corruption(run, errors, styles), _by_severity(run, errors, styles)] if errors else []


def _by_corruption(run: LoadedRun, errors: Errors, styles: Mapping[str, Style]) -> Panel:
    """Draws a row for each corruption, with a mark for each method, one below another."""
    names = {name: printable(name.replace("_", " ")) for _, of_method in errors for name in of_method}
    means = [(r, {name: statistics.fmean(shares) for name, shares in of_method.items()}) for r, of_method in errors]
    apart = 1 / (len(means[:DRAWN]) + 1)
    figure, axes = drawing.chart("error, mean over severities (%)", height=0.7 + 0.15 * len(names) / apart)
    series, worst = [], []
    for k, (result, of_method) in enumerate(means[:DRAWN], start=1):
        points = [(100 * of_method[name], i + k * apart) for i, name in enumerate(names) if name in of_method]
        series.append((drawing.marks(axes, points, styles[result.name]), result.label))
        name = max(of_method, key=lambda name: of_method[name])
        worst.append(f"{result.label} under {names[name]}, {percent(of_method[name])}")
    drawing.legend(figure, series)
    axes.set(xlim=(0, max(axes.get_xlim()[1], 1)), ylim=(len(names), 0))
    axes.set_yticks([i + 0.5 for i in range(len(names))], [drawing.shortened(name) for name in names.values()])
    axes.grid(False, axis="y")
    axes.grid(True, axis="x")
    for i in range(len(names) + 1):
        axes.axhline(i, color=COLOURS["grid"], linewidth=0.8)
    rows = [
        (names[name], result.label, *of_method[name], statistics.fmean(of_method[name]))
        for name in names
        for result, of_method in errors
        if name in of_method
    ]
    columns: Columns = {"corruption": str, "method": str, **_SHARES}
    title, heading = f"Error by corruption, run {run.letter}", f"{run.letter}: by corruption"
    text = f"Most errors: {', '.join(worst)}.{drawing.undrawn(len(errors))}"
    return Panel(text, heading, f"corruptions-{run.letter}", title, figure, [Table(title, columns, rows)])


def _by_severity(run: LoadedRun, errors: Errors, styles: Mapping[str, Style]) -> Panel:
    means = [(r, [statistics.fmean(e) for e in zip(*of_method.values(), strict=True)]) for r, of_method in errors]
    figure, axes = drawing.chart("severity", "error, mean over corruptions (%)")
    drawn = [(drawing.line(axes, SEVERITIES, e, styles[result.name]), result.label) for result, e in means[:DRAWN]]
    drawing.legend(figure, drawn)
    axes.set(xticks=SEVERITIES, ylim=(0, max(axes.get_ylim()[1], 1)))
    title, heading = f"Error by severity, run {run.letter}", f"{run.letter}: by severity"
    ends = "; ".join(f"{result.label}, {percent(e[0])} to {percent(e[-1])}" for result, e in means[:DRAWN])
    text = f"From the least severity to the greatest: {ends}.{drawing.undrawn(len(errors))}"
    columns: Columns = {"method": str, **_SHARES}
    rows = [(result.label, *e, statistics.fmean(e)) for result, e in means]
    return Panel(text, heading, f"severities-{run.letter}", title, figure, [Table(title, columns, rows)])
