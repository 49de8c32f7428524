"""The charts of training measurements: accuracy, trade-off, fractions, groups, signed variances."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from bt_fast.lab.html_report import drawing
from bt_fast.lab.html_report.drawing import COLOURS, DRAWN, Columns, Panel, Style, Table, drawable, hollow, line, marks
from bt_fast.lab.html_report.loading import LoadedRun, Record, Result
from bt_fast.lab.html_report.numbers import count, duration, joules, percent, plain

_BINS = 24
_RECORDS = 300  # most records of a kind in a chart
_LABELLED = 40  # most labelled points of the trade-off
_COMPARABLE = ("test_size", "loss", "epsilon", "eval_steps", "eval_restarts")
_GROUPS = ("boundary", "robust", "outlier")
_F_R = "F_R, moving robust accuracy"
_STYLES: dict[str, Style] = {
    "boundary": {"color": COLOURS["s2"], "marker": "o"},
    "robust": {"color": COLOURS["s1"], "marker": "s", "linestyle": "--"},
    "outlier": {"color": COLOURS["s0"], "marker": "^", "linestyle": "-."},
    _F_R: hollow({"color": COLOURS["s4"], "marker": "D", "linestyle": ":"}),
}

_SAMPLES = hollow({"color": COLOURS["s1"], "marker": "o", "linestyle": "none"})

Styles = Mapping[str, Style]


def styles_of(runs: Sequence[LoadedRun]) -> dict[str, Style]:
    """Returns a style for each method, the same in all runs and charts."""
    names = dict.fromkeys(result.name for run in runs for result in run.results)
    return {name: drawing.style_of(i) for i, name in enumerate(names)}


# Accuracy against time


def accuracy(runs: Sequence[LoadedRun], styles: Styles) -> list[Panel]:
    """Returns a panel for each run with the same accuracy axis, and the same time axis if the runs took alike."""
    records = {run.letter: [r for x in run.results for r in run.of_kind("epoch", x.name)] for run in runs}
    shares = [r.get(key) for of_run in records.values() for r in of_run for key in ("clean", "robust")]
    least = min((share for share in shares if share is not None and drawable(share)), default=0)
    low = min(10 * math.floor(10 * least), 90)
    ends = {letter: max((r["seconds"] for r in of_run), default=0.0) for letter, of_run in records.items()}
    known = [seconds for seconds in ends.values() if seconds > 0 and drawable(seconds)]
    if known and max(known) <= 4 * min(known):
        ends = dict.fromkeys(ends, max(known))
    return [_accuracy(run, styles, low, ends[run.letter]) for run in runs]


def _accuracy(run: LoadedRun, styles: Styles, low: float, end: float) -> Panel:
    heading = f"{run.letter}: {run.title}"
    records = [(result, run.of_kind("epoch", result.name)) for result in run.results]
    if not any(of_method for _, of_method in records) or not (end > 0 and drawable(end)):
        return Panel("metrics.jsonl has no accuracy of any epoch.", heading)
    unit, name = (3600.0, "hours") if end > 3600 else (1.0, "seconds")
    figure, axes = drawing.chart(f"training time ({name})", "accuracy (%)")
    axes.set(xlim=(0, end / unit * 1.02), ylim=(low, 100))
    series = []
    for result, of_method in records[:DRAWN]:
        seconds, style = [r["seconds"] / unit for r in of_method], styles[result.name]
        line(axes, seconds, [r["clean"] for r in of_method], hollow(style))
        series.append((line(axes, seconds, [r.get("robust") for r in of_method], style), result.label))
    drawing.legend(figure, series)
    columns: Columns = {
        "method": str,
        "epoch": count,
        "clean": percent,
        "robust": percent,
        "time": duration,
        "energy": joules,
    }
    rows = [
        (result.label, r["epoch"], r["clean"], r.get("robust"), r["seconds"], r.get("joules"))
        for result, of_method in records
        for r in of_method
    ]
    title = f"Accuracy against training time, run {run.letter}"
    last = "; ".join(_last_epoch(result, of_method) for result, of_method in records[:DRAWN])
    text = f"Filled marks, solid line: robust; hollow marks, dashed line: clean. After the last epoch: {last}."
    text += drawing.undrawn(len(records))
    return Panel(text, heading, f"accuracy-{run.letter}", title, figure, [Table(title, columns, rows)])


def _last_epoch(result: Result, records: list[Record]) -> str:
    if not records:
        return f"{result.label}, not recorded"
    last = records[-1]
    robust = f", robust {percent(last['robust'])}" if last.get("robust") is not None else ""
    return f"{result.label}, clean {percent(last['clean'])}{robust} in {duration(last['seconds'])}"


# Clean against robust accuracy


def trade_off(runs: Sequence[LoadedRun], styles: Styles) -> list[Panel]:
    """Returns a chart for each set of runs with comparable accuracies: the same data and the same attack."""
    comparable: dict[str, list[LoadedRun]] = {}
    for run in runs:
        options = ", ".join(f"{key} {run.config.get(key)}" for key in _COMPARABLE)
        tested = f"{run.config.get('curve_size')} test images" if run.unfinished else "all test images"
        comparable.setdefault(", ".join([run.trained_on, options, tested]), []).append(run)
    return [_trade_off(same, styles) for same in comparable.values()]


def _trade_off(runs: Sequence[LoadedRun], styles: Styles) -> Panel:
    letters = ", ".join(run.letter for run in runs)
    heading = f"{runs[0].config.get('data')}: {'run' if len(runs) == 1 else 'runs'} {letters}"
    results = [
        (run.row_name(result), result, (100 * result.clean, 100 * result.robust))
        for run in runs
        for result in run.results
        if result.robust is not None and drawable(result.clean, result.robust)
    ]
    if not results:
        return Panel("No method has a robust accuracy.", heading)
    figure, axes = drawing.chart("clean accuracy (%)", "robust accuracy (%)")
    axes.margins(0.08)
    drawn = {r.name: (marks(axes, [point], styles[r.name]), r.label) for _, r, point in results}
    shown = list(drawn.values())[: 2 * DRAWN]
    drawing.legend(figure, shown)
    if len(results) <= _LABELLED:
        _label(figure, axes, {name: point for name, _, point in results})
    columns: Columns = {"point": str, "method": str, "clean": percent, "robust": percent, "against": str}
    rows = [(name, result.label, result.clean, result.robust, result.attack) for name, result, _ in results]
    title = f"Clean and robust accuracy after training, {heading}"
    best, result, _ = max(results, key=lambda each: each[2][1])
    text = (
        "Up is more robust, right is more accurate. Points are named as rows of the first table. Most robust: "
        f"{best}, {result.label}, {percent(result.robust)} at {percent(result.clean)} clean."
    )
    if len(shown) < len(drawn):
        text += f" The legend names {len(shown)} of {len(drawn)} methods."
    return Panel(text, heading, f"trade-off-{runs[0].letter}", title, figure, [Table(title, columns, rows)])


def _label(figure: Figure, axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Writes its name beside each mark, on the side where it hides the least."""
    figure.draw_without_rendering()  # places the marks
    places = axes.transData.transform(list(points.values()))
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in places]
    for (name, point), (x, y) in zip(points.items(), places, strict=True):
        width = 8 * len(name)
        sides = [(x + right, y + up) for up in (-5, 6, -18) for right in (7, -7 - width, -width / 2)]
        boxes = [Bbox.from_bounds(left, bottom, width, 12) for left, bottom in sides]
        box = min(boxes, key=lambda box: box.count_overlaps(taken))
        taken.append(box)
        axes.annotate(name, point, (box.x0 - x, box.y0 - y + 2), textcoords="offset points")


# Values over the iterations


def of_methods(runs: Sequence[LoadedRun], kind: str) -> list[Panel]:
    """Returns a panel for each method with records of a kind in `_KINDS`, up to DRAWN a run, and remarks on others."""
    make, without = _KINDS[kind]
    panels, left = [], []
    for run in runs:
        recorded = [(result, records) for result in run.results if (records := run.of_kind(kind, result.name))]
        panels += [make(run.row_name(result), result.label, records) for result, records in recorded[:DRAWN]]
        left += [run.row_name(result) for result, _ in recorded[DRAWN:]]
    if left:
        panels.append(Panel(f"Drawn are the first {DRAWN} of each run; not drawn: {', '.join(left)}."))
    return panels or [Panel(without)]


def _fractions(row: str, label: str, records: list[Record]) -> Panel:
    """Plots the shares of the groups in the minibatches of a method with BulletTrain, and F_R."""
    last = records[-1]
    ends = ", ".join(f"{group} {percent(last[group])}" for group in _GROUPS)
    text = f"In the last minibatches: {ends}; F_R {percent(last['robust_fraction'])} (compare Fig. 3)."
    values = {group: [r[group] for r in records] for group in _GROUPS}
    values[_F_R] = [r["robust_fraction"] for r in records]
    title = f"Shares of the groups in training, {row}, {label}"
    return _over_iterations(Panel(text, f"{row}: {label}", f"fractions-{row}", title), records, values)


def attacked_groups(run: LoadedRun) -> list[Panel]:
    """Plots the shares and mean signed variances of an attack's groups, if the run recorded them."""
    if not (records := [r for r in run.records if r["kind"] == "groups"]):
        return []
    heading = f"{run.letter}: {run.results[0].label}"
    shares = {group: [r["shares"][group] for r in records] for group in _GROUPS}
    means = ", ".join(f"{group} {percent(statistics.fmean(of_group))}" for group, of_group in shares.items())
    title = f"Shares of the groups as an attack finds them, run {run.letter}"
    text = f"In mean over training: {means} (compare Fig. 3)."
    of_shares = Panel(text, f"{heading}, shares", f"groups-{run.letter}", title)
    variances = {group: [r["svar"].get(group) for r in records] for group in _GROUPS}
    variances["boundary below robust"] = chances = [r.get("boundary_below_robust") for r in records]
    text = "A group without samples in a minibatch has no mean there (compare Fig. 4)."
    if known := [chance for chance in chances if chance is not None]:
        text += " The chance that a boundary sample's SVar lies below a robust one's: "
        text += f"{percent(statistics.fmean(known))} in mean over {len(known)} minibatches with both."
    title = f"Mean signed prediction variance of the groups as an attack finds them, run {run.letter}"
    of_variances = Panel(text, f"{heading}, signed variances", f"groups-svar-{run.letter}", title)
    return [
        _over_iterations(of_shares, records, shares),
        _over_iterations(of_variances, records, variances, variance=True),
    ]


def _over_iterations(
    panel: Panel, records: list[Record], values: Mapping[str, list[float | None]], variance: bool = False
) -> Panel:
    """Returns the panel with a line for each list of values with a style: of variances, or else of shares."""
    shown = range(len(records))[-1 :: -math.ceil(len(records) / _RECORDS)][::-1]  # evenly spread, and the last
    iterations = [records[i]["iteration"] for i in shown]
    figure, axes = drawing.chart("iteration", "mean signed variance (SVar)" if variance else "share (%)")
    scale, write = (1, plain) if variance else (100, percent)
    series = [
        (line(axes, iterations, [values[name][i] for i in shown], style, scale), name)
        for name, style in _STYLES.items()
        if name in values
    ]
    drawing.legend(figure, series)
    axes.set_xlim(left=0)
    axes.locator_params("x", integer=True)
    if not variance:
        axes.set_ylim(0, 100)
    columns: Columns = {"iteration": str, **{name: write if name in _STYLES else percent for name in values}}
    rows = [(records[i]["iteration"], *(of_series[i] for of_series in values.values())) for i in shown]
    cut = f" {len(shown)} of {len(records)} records are shown." if len(shown) < len(records) else ""
    return dataclasses.replace(panel, text=panel.text + cut, figure=figure, tables=[Table(panel.title, columns, rows)])


# Signed variances


def _allocation(row: str, label: str, records: list[Record]) -> Panel:
    """Plots signed variances and assigned steps of the samples of a method's last recorded minibatch."""
    last = records[-1]
    svar, steps, threshold = np.array(last["svar"], float), np.array(last["steps"], float), float(last["threshold"])
    lines = {"0 ": 0.0, " T": threshold} if drawable(threshold) else {"0 ": 0.0}
    low, high = min(*svar, *lines.values()), max(*svar, *lines.values())
    margin = max((0.001 - (high - low)) / 2, 0.06 * (high - low))
    edges = np.linspace(low - margin, high + margin, _BINS + 1)
    figure = Figure(figsize=(drawing.WIDTH, 4.8))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    upper.hist(svar, edges, color=COLOURS["s1"], rwidth=0.95)
    upper.set_ylabel("samples")
    upper.locator_params("y", nbins=5, integer=True)
    marks(lower, list(zip(svar, steps, strict=True)), _SAMPLES)
    lower.set(xlabel="signed prediction variance (SVar)", ylabel="attack steps", xlim=(edges[0], edges[-1]))
    lower.locator_params("x", nbins=6)
    for name, place in lines.items():
        for axes in (upper, lower):
            axes.axvline(place, color=COLOURS["text"], linestyle="--", linewidth=1)
        side = "left" if name.startswith(" ") else "right"
        upper.text(place, 1, name, transform=upper.get_xaxis_transform(), ha=side, va="top")
    counts: collections.Counter[float] = collections.Counter(last["steps"])
    taken = ", ".join(f"{counts[n]} took {n:g} steps" for n in sorted(counts))
    text = (
        f"The minibatch of iteration {last['iteration']}: of {len(svar)} samples {taken}; misclassified ones lie below "
        f"0, robust ones above the threshold T = {plain(threshold)} (compare Fig. 5)."
    )
    title = f"Signed variances and assigned steps, {row}, {label}"
    tables = [_histogram(title, svar, steps, edges), _course(f"Over training, {row}, {label}", records)]
    return Panel(text, f"{row}: {label}", f"svar-{row}", title, figure, tables)


def _histogram(title: str, svar: np.ndarray, steps: np.ndarray, edges: np.ndarray) -> Table:
    """Tabulates for each bin with samples their number, and how many took each number of steps."""
    samples = {"samples": np.histogram(svar, edges)[0]}
    samples |= {f"of {n:g} steps": np.histogram(svar[steps == n], edges)[0] for n in np.unique(steps)}
    bins = [f"{low:.4f} to {high:.4f}".replace("-", "−") for low, high in itertools.pairwise(edges)]
    rows = [row for row in zip(bins, *samples.values(), strict=True) if row[1]]
    return Table(title, {"SVar": str, **dict.fromkeys(samples, count)}, rows)


def _course(title: str, records: list[Record]) -> Table:
    steps = sorted({n for r in records for n in r["steps"]})
    of_steps = {f"samples of {n:g} steps": count for n in steps}
    columns: Columns = {"iteration": str, "threshold T": plain, "mean SVar": plain, **of_steps}
    rows = [
        (r["iteration"], r["threshold"], statistics.fmean(r["svar"]), *map(r["steps"].count, steps)) for r in records
    ]
    return Table(title, columns, rows)


_KINDS = {  # kinds of records, each with its chart, and a remark for runs without
    "fractions": (
        _fractions,
        "No method of these runs recorded fractions: they are of BulletTrain, every ten iterations.",
    ),
    "allocation": (
        _allocation,
        "Not recorded: runs with BulletTrain of this version record it after each epoch.",
    ),
}
