"""The charts of what was measured in training: accuracy, trade-off, fractions, signed variances."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Mapping, Sequence

from bt_fast.lab.html_report import drawing
from bt_fast.lab.html_report.drawing import BOTTOM, DASHES, TOP, WIDTH, Point, Style
from bt_fast.lab.html_report.loading import LoadedRun, Record, Result
from bt_fast.lab.html_report.markup import Html, element, note, panel, table
from bt_fast.lab.html_report.numbers import duration, percent, plain

DRAWN = 8  # methods in a chart, or charts of a run: more cannot be told apart; tables have all
HEIGHT = 320
_BINS = 24
_RECORDS = 300  # of a kind in a chart
_LABELLED = 40  # points of the trade-off
_COMPARABLE = ("test_size", "loss", "epsilon", "eval_steps", "eval_restarts")
GROUP_STYLES = {"boundary": Style(2, 0), "robust": Style(1, 1, DASHES[1]), "outlier": Style(0, 2, DASHES[2])}
SHARE = "share of the minibatches (%)"
_ROBUST_FRACTION = Style(4, 3, DASHES[3], hollow=True)

Styles = Mapping[str, Style]


def styles_of(runs: Sequence[LoadedRun]) -> dict[str, Style]:
    """A style for each method, the same in all runs and charts."""
    names = dict.fromkeys(result.name for run in runs for result in run.results)
    return {name: Style.of(i) for i, name in enumerate(names)}


def row_name(run: LoadedRun, result: Result) -> str:
    """`A2`, the second method of run A: as rows and points are called."""
    return f"{run.letter}{list(run.results).index(result) + 1}"


# Accuracy against time


def accuracy(runs: Sequence[LoadedRun], styles: Styles) -> list[Html]:
    """A panel for each run, with the same axis of accuracy; that of time too, where the runs took alike."""
    records = {run.letter: [r for x in run.results for r in run.of_kind("epoch", x.name)] for run in runs}
    every = [r.get(key) for found in records.values() for r in found for key in ("clean", "robust")]
    finite = [100 * v for v in every if v is not None and math.isfinite(v)]
    low = min(10 * math.floor(min(finite) / 10), 90) if finite else 0.0
    last = {letter: max((r["seconds"] for r in found), default=0.0) for letter, found in records.items()}
    ends = [seconds for seconds in last.values() if seconds > 0 and math.isfinite(seconds)]
    alike = ends and max(ends) <= 4 * min(ends)
    panels = []
    for run in runs:
        end = max(ends) if alike else last[run.letter]
        panels.append(panel(_heading(run), *_accuracy(run, styles, low, end)))
    return panels


def _accuracy(run: LoadedRun, styles: Styles, low: float, end: float) -> list[Html]:
    records = {result.name: run.of_kind("epoch", result.name) for result in run.results}
    if not any(records.values()) or not (end > 0 and math.isfinite(end)):
        return [note("metrics.jsonl has no accuracy of any epoch.")]
    unit, name = (3600.0, "hours") if end > 3600 else (1.0, "seconds")
    x = drawing.x_scale(0, end / unit * 1.02)
    y = drawing.y_scale(low, 100, TOP, HEIGHT - BOTTOM)
    drawn, legend = [drawing.axes(x, y, f"training time ({name})", "accuracy (%)")], []
    for result in run.results[:DRAWN]:
        style, mine = styles[result.name], records[result.name]
        for measure, line_style in (("robust", style), ("clean", _clean(style))):
            points = [(x(r["seconds"] / unit), y(100 * r[measure])) for r in mine if r.get(measure) is not None]
            drawn.append(drawing.line(points, line_style))
        legend.append(drawing.key(style, result.label))
    legend.append(element("li", "filled, solid line: robust; hollow, dashed line: clean"))
    rows = [[result.label, str(r["epoch"]), *_told(r)] for result in run.results for r in records[result.name]]
    header = ["method", "epoch", "clean", "robust", "time", "energy"]
    title = f"Accuracy against training time, run {run.letter}"
    ended = "; ".join(_last(result, records[result.name]) for result in run.results[:DRAWN])
    text = f"After the last epoch: {ended}.{undrawn(len(run.results))}"
    name = f"accuracy-{run.letter}"
    return [drawing.figure(name, title, text, HEIGHT, drawn, legend, [table(title, header, rows)])]


def _told(record: Record) -> tuple[str, ...]:
    accuracies = percent(record["clean"]), percent(record.get("robust"))
    return (*accuracies, duration(record["seconds"]), plain(record.get("joules"), "J"))


def _clean(style: Style) -> Style:
    return Style(style.colour, style.shape, DASHES[1], hollow=True)


def _last(result: Result, records: list[Record]) -> str:
    if not records:
        return f"{result.label}, not recorded"
    last = records[-1]
    robust = f", robust {percent(last['robust'])}" if last.get("robust") is not None else ""
    return f"{result.label}, clean {percent(last['clean'])}{robust} in {duration(last['seconds'])}"


def undrawn(methods: int) -> str:
    """A sentence about the methods that are too many for a chart, where they are."""
    rest = methods - DRAWN
    return f" The first {DRAWN} methods are drawn; the table has {rest} more." if rest > 0 else ""


def _heading(run: LoadedRun) -> str:
    return f"{run.letter}: {run.title}"


# Clean against robust accuracy


def trade_off(runs: Sequence[LoadedRun], styles: Styles) -> list[Html]:
    """A chart for each set of runs whose accuracies can be compared: on the same data, against the same attack."""
    alike: dict[str, list[LoadedRun]] = {}
    for run in runs:
        options = ", ".join(f"{key} {run.config.get(key)}" for key in _COMPARABLE)
        tested = f"{run.config.get('curve_size')} test images" if run.unfinished else "all test images"
        alike.setdefault(", ".join([run.trained_on, options, tested]), []).append(run)
    return [_trade_off(same, styles) for same in alike.values()]


def _trade_off(runs: Sequence[LoadedRun], styles: Styles) -> Html:
    letters = ", ".join(run.letter for run in runs)
    heading = f"{runs[0].config.get('data')}: {'run' if len(runs) == 1 else 'runs'} {letters}"
    found = [
        (row_name(run, result), result, 100 * result.clean, 100 * result.robust)
        for run in runs
        for result in run.results
        if result.robust is not None and math.isfinite(result.clean + result.robust)
    ]
    if not found:
        return panel(heading, note("No method has a robust accuracy."))
    x = drawing.x_scale(*drawing.spread([clean for _, _, clean, _ in found], 2.0))
    y = drawing.y_scale(*drawing.spread([robust for *_, robust in found], 2.0), TOP, HEIGHT - BOTTOM)
    drawn = [drawing.axes(x, y, "clean accuracy (%)", "robust accuracy (%)")]
    places = [(x(clean), y(robust)) for _, _, clean, robust in found]
    drawn += [drawing.mark(place, styles[item[1].name]) for place, item in zip(places, found, strict=True)]
    if len(found) <= _LABELLED:
        drawn += _labels(places, [name for name, *_ in found])
    named = {result.name: result.label for _, result, *_ in found}
    shown = list(named.items())[: 2 * DRAWN]
    more = f" The legend names {len(shown)} of {len(named)} methods." if len(shown) < len(named) else ""
    legend = [drawing.key(styles[name], label, lined=False) for name, label in shown]
    title = f"Clean and robust accuracy after training, {heading}"
    rows = [[name, r.label, percent(r.clean), percent(r.robust), r.attack] for name, r, *_ in found]
    best = max(found, key=lambda item: item[3])
    text = "Up is more robust, right is more accurate. Points are named as rows of the first table. Most robust: "
    text += f"{best[0]}, {best[1].label}, {percent(best[1].robust)} at {percent(best[1].clean)} clean.{more}"
    numbers = table(title, ["point", "method", "clean", "robust", "against"], rows)
    name = f"trade-off-{runs[0].letter}"
    return panel(heading, drawing.figure(name, title, text, HEIGHT, drawn, legend, [numbers]))


def _labels(places: list[Point], names: list[str]) -> list[Html]:
    """A name beside each mark, on the side where it hides least."""
    taken: list[tuple[float, float, float, float]] = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    drawn = []
    for (x, y), name in zip(places, names, strict=True):
        width = 8.0 * len(name)
        corners = [(x + 8, y - 6), (x - 8 - width, y - 6), (x - width / 2, y - 20), (x - width / 2, y + 8)]
        corners += [(x + 8, y - 20), (x + 8, y + 8), (x - 8 - width, y - 20), (x - 8 - width, y + 8)]
        boxes = [(left, top, left + width, top + 13) for left, top in corners]
        box = min(boxes, key=lambda b: sum(_overlap(b, other) for other in taken) + _outside(b))
        taken.append(box)
        drawn.append(drawing.words(box[0], box[3] - 2, name, class_=None))
    return drawn


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _outside(box: tuple[float, ...]) -> float:
    inside = box[0] >= drawing.LEFT and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT - BOTTOM
    return 0.0 if inside else 1000.0


# Fractions


def fractions(runs: Sequence[LoadedRun]) -> list[Html]:
    """A panel for each method with BulletTrain."""
    without = "No method of these runs recorded fractions: they are of BulletTrain, every ten iterations."
    return _of_methods(runs, "fractions", _fractions, without)


def _of_methods(
    runs: Sequence[LoadedRun], kind: str, chart: Callable[[LoadedRun, Result, list[Record]], Html], without: str
) -> list[Html]:
    """A panel for each method with records of that kind, up to DRAWN of a run, and a note on the others; or a remark.

    Args:
        without: the remark, where there is no such record.
    """
    panels, left = [], []
    for run in runs:
        recorded = [(result, records) for result in run.results if (records := run.of_kind(kind, result.name))]
        for result, records in recorded[:DRAWN]:
            panels.append(panel(f"{row_name(run, result)}: {result.label}", chart(run, result, records)))
        left += [row_name(run, result) for result, _ in recorded[DRAWN:]]
    if left:
        panels.append(note(f"Drawn are the first {DRAWN} of each run; not drawn: {', '.join(left)}."))
    return panels or [note(without)]


def _fractions(run: LoadedRun, result: Result, records: list[Record]) -> Html:
    drawn = thinned(records)
    series = {key: (style, key, _of(key)) for key, style in GROUP_STYLES.items()}
    series["robust_fraction"] = (_ROBUST_FRACTION, "F_R, moving robust accuracy", _of("robust_fraction"))
    name = f"{row_name(run, result)}, {result.label}"
    title = f"Shares of the groups in training, {name}"
    last = records[-1]
    ends = ", ".join(f"{group} {percent(last[group])}" for group in GROUP_STYLES)
    text = f"In the last minibatches: {ends}; F_R {percent(last['robust_fraction'])} (compare Fig. 3)."
    text += left_out(records, drawn)
    rows = [[str(r["iteration"]), *(percent(r[key]) for key in series)] for r in drawn]
    numbers = table(title, ["iteration", *GROUP_STYLES, "F_R"], rows)
    name = f"fractions-{row_name(run, result)}"
    y = drawing.y_scale(0, 100, TOP, HEIGHT - BOTTOM)
    return over_iterations(name, title, text, drawn, (y, SHARE), list(series.values()), numbers)


def _of(key: str) -> Callable[[Record], float | None]:
    return lambda record: 100 * record[key]


def thinned(records: list[Record]) -> list[Record]:
    """As many of the records as a chart shows, evenly spread, the last among them."""
    return records[-1 :: -math.ceil(len(records) / _RECORDS)][::-1]


def left_out(records: list[Record], drawn: list[Record]) -> str:
    """A sentence about the records that `thinned` has left out, where it has."""
    return f" {len(drawn)} of {len(records)} records are shown." if len(drawn) < len(records) else ""


def over_iterations(
    name: str,
    title: str,
    text: str,
    records: list[Record],
    vertical: tuple[drawing.Scale, str],
    series: list[tuple[Style, str, Callable[[Record], float | None]]],
    numbers: Html,
) -> Html:
    """A line over the iterations for each series.

    Args:
        name, title, text: as of `drawing.figure`.
        vertical: the axis and what it means.
        series: how each looks, its name, and its value in a record; None where it has none.
        numbers: the table.
    """
    y, meaning = vertical
    x = drawing.x_scale(0, max(max(r["iteration"] for r in records), 1))
    drawn, legend = [drawing.axes(x, y, "iteration", meaning)], []
    for style, label, value in series:
        known = [(r["iteration"], v) for r in records if (v := value(r)) is not None]
        drawn.append(drawing.line([(x(at), y(v)) for at, v in known], style, marks=8))
        legend.append(drawing.key(style, label))
    return drawing.figure(name, title, text, HEIGHT, drawn, legend, [numbers])


# Signed variances


def allocations(runs: Sequence[LoadedRun]) -> list[Html]:
    """A panel for each method whose runs recorded the steps of each sample."""
    without = "Not recorded: runs with BulletTrain of this version record it after each epoch."
    return _of_methods(runs, "allocation", _allocation, without)


def _allocation(run: LoadedRun, result: Result, records: list[Record]) -> Html:
    last = records[-1]
    svar, steps, threshold = last["svar"], last["steps"], last["threshold"]
    low, high = drawing.spread([*svar, 0.0, threshold], 0.001)
    x = drawing.x_scale(low, high)
    bins = _histogram(svar, steps, low, high)
    upper = drawing.y_scale(0, max(sum(b.values()) for b in bins) * 1.05, TOP, 150)
    lower = drawing.y_scale(-0.6, max(*steps, 1) + 0.6, 176, 360 - BOTTOM)
    width = (high - low) / _BINS
    drawn = [drawing.axes(x, upper, "", "samples")]
    for i, counted in enumerate(bins):
        left, right = x(low + i * width) + 0.5, x(low + (i + 1) * width) - 0.5
        drawn.append(drawing.bar(left, upper(sum(counted.values())), right, upper(0), "f1"))
    drawn.append(drawing.axes(x, lower, "signed prediction variance (SVar)", "attack steps"))
    drawn += [drawing.mark((x(v), lower(n)), Style(1, 0, hollow=True)) for v, n in zip(svar, steps, strict=True)]
    drawn += [drawing.guide(x(0.0), TOP, 360 - BOTTOM), drawing.words(x(0.0) - 4, TOP + 10, "0", "end", None)]
    if low <= threshold <= high:
        drawn += [drawing.guide(x(threshold), TOP, 360 - BOTTOM)]
        drawn += [drawing.words(x(threshold) + 4, TOP + 10, "T", class_=None)]
    name = f"{row_name(run, result)}, {result.label}"
    title = f"Signed variances and assigned steps, {name}"
    counts: collections.Counter[float] = collections.Counter(steps)
    told = ", ".join(f"{counts[n]} took {n:g} steps" for n in sorted(counts))
    text = (
        f"The minibatch of iteration {last['iteration']}: of {len(svar)} samples {told}; misclassified ones lie below "
    )
    text += f"0, robust ones above the threshold T = {plain(threshold)} (compare Fig. 5)."
    tables = [_bin_table(title, bins, low, width, sorted(counts)), _course_table(f"Over training, {name}", records)]
    return drawing.figure(f"svar-{row_name(run, result)}", title, text, 360, drawn, [], tables)


def _histogram(svar: list[float], steps: list[float], low: float, high: float) -> list[collections.Counter[float]]:
    """For each bin, samples by their steps."""
    bins: list[collections.Counter[float]] = [collections.Counter() for _ in range(_BINS)]
    for value, count in zip(svar, steps, strict=True):
        bins[min(int((value - low) / (high - low) * _BINS), _BINS - 1)][count] += 1
    return bins


def _bin_table(
    title: str, bins: list[collections.Counter[float]], low: float, width: float, steps: list[float]
) -> Html:
    rows = [
        [f"{low + i * width:.4f} to {low + (i + 1) * width:.4f}".replace("-", "−"), str(sum(counted.values()))]
        + [str(counted[n]) for n in steps]
        for i, counted in enumerate(bins)
        if counted
    ]
    return table(title, ["SVar", "samples", *(f"of {n:g} steps" for n in steps)], rows)


def _course_table(title: str, records: list[Record]) -> Html:
    steps = sorted({n for r in records for n in r["steps"]})
    rows = [
        [str(r["iteration"]), plain(r["threshold"]), plain(sum(r["svar"]) / len(r["svar"]))]
        + [str(r["steps"].count(n)) for n in steps]
        for r in records
    ]
    return table(title, ["iteration", "threshold T", "mean SVar", *(f"samples of {n:g} steps" for n in steps)], rows)
