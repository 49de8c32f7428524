"""The waterfall from the authors' objective to ours: the time each optimisation takes off an iteration, and limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from bt_fast.lab.html_report import drawing
from bt_fast.lab.html_report.drawing import COLOURS, Columns, Panel, Style, Table
from bt_fast.lab.html_report.loading import LoadedRun, Result
from bt_fast.lab.html_report.numbers import duration, percent, points, times

_PARTS = {  # by (algorithm, engine): its optimisations
    ("reference", "exact"): (),
    ("optimised", "exact"): ("our code",),
    ("optimised", "fast"): ("our code", "fast engine"),
    ("optimised", "bf16"): ("our code", "fast engine", "16 bits"),
    ("bullet", "exact"): ("our code", "BulletTrain"),
    ("bullet", "fast"): ("our code", "BulletTrain", "fast engine"),
    ("bullet", "bf16"): ("our code", "BulletTrain", "fast engine", "16 bits"),
}
_BARS: dict[str, Style] = {
    "a whole iteration": {"facecolor": COLOURS["s0"]},
    "time saved": {"facecolor": COLOURS["gain"]},
    "time added (dashed)": {"facecolor": "none", "edgecolor": COLOURS["loss"], "linestyle": "--", "linewidth": 2},
}
_COLUMNS: Columns = {
    **{"method": str, "median iteration": duration, "time": percent, "change": points},
    **{"Eq. 7": percent, "forward passes": percent, "time / forward passes": times},
}
_LIMIT: Style = {"color": COLOURS["text"], "markerfacecolor": COLOURS["panel"], "linestyle": "none"}
_FORWARD_PASSES, _EQUATION_7 = _LIMIT | {"marker": "^"}, _LIMIT | {"marker": "D"}


@dataclass(frozen=True)
class Stage:
    """A stage of the waterfall: one method.

    Attributes:
        step: the optimisations that the previous stage lacks; "" for the first.
        time: of an iteration, relative to the first stage's: 1 over the median of the ratios of paired iterations.
        change: of the time from the previous stage; None for the first.
        equation_7, forward_passes: the share that only the theoretical speedup and only the forward passes would leave;
            None if the summary lacks them.
    """

    result: Result
    step: str
    time: float = 1.0
    change: float | None = None
    equation_7: float | None = 1.0
    forward_passes: float | None = 1.0


def stages(results: Sequence[Result]) -> list[Stage]:
    """Returns the run's methods in the order reference, ours, BulletTrain, fast engine, 16 bits, as far as it has them.

    Without BulletTrain, the engines are those of our own implementation. Methods with their own options, or without a
    ratio to the first, are left out. With fewer than two methods the list is empty.
    """
    by_form = {(r.method.algorithm, r.method.engine): r for r in reversed(results) if not r.method.changes}
    bullet = any(algorithm == "bullet" for algorithm, _ in by_form)
    way: list[Stage] = []
    before: tuple[str, ...] = ()
    for form, parts in _PARTS.items():
        if form not in by_form or (bullet and form in (("optimised", "fast"), ("optimised", "bf16"))):
            continue
        result, first = by_form[form], way[0].result if way else by_form[form]
        ratio = result.speedup.get(first.name)
        if not way:
            way.append(Stage(first, ""))
        elif not ratio or ratio < 0 or not drawing.drawable(ratio, 1 / ratio):
            continue
        else:
            step = " + ".join(part for part in parts if part not in before)
            equation_7 = _over(first.theoretical_speedup, result.theoretical_speedup)
            passes = _over(result.forward_passes, first.forward_passes)
            way.append(Stage(result, step, 1 / ratio, 1 / ratio - way[-1].time, equation_7, passes))
        before = parts
    return way if len(way) > 1 else []


def _over(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b and drawing.drawable(a, b, a / b) else None


def waterfall(run: LoadedRun) -> Panel:
    """Draws the run's stages as bars, each from the time of the previous stage to its own."""
    heading, way = f"{run.letter}: {run.title}", stages(run.results)
    if not way:
        remark = (
            "No steps to draw: it takes two or more of reference, optimised, bullet, bullet-fast and bullet-bf16 "
            f"without options of their own, and their paired speedups; this run has "
            f"{', '.join(r.name for r in run.results)}."
        )
        return Panel(remark, heading)
    first, last, height = way[0].result, way[-1], 0.8 * (len(way) + 1) + 0.6
    figure, axes = drawing.chart("time of an iteration (% of the first row's)", height=height)
    for i, stage in enumerate(way):
        median = stage.result.iteration_seconds
        text = "100 %" if stage.change is None else f"{points(stage.change)} of the first"
        text += "" if median is None else f"; {duration(median)} an iteration"
        _row(axes, i, stage, stage.change, f"+ {stage.step}" if i else first.label, text)
        axes.vlines(100 * stage.time, i + 0.1, i + 1.4, color=COLOURS["rule"], linewidth=1)
    whole = f"{percent(last.time)} of the first, {times(1 / last.time)} as fast"
    _row(axes, len(way), last, None, "In all", whole)
    axes.set(xlim=(0, axes.get_xlim()[1]), ylim=(len(way) + 0.5, -0.5), yticks=[])
    axes.grid(True, axis="x")
    keys: list[tuple[Artist, str]] = [(Patch(**style), name) for name, style in _BARS.items()]
    keys.append((Line2D([], [], **_EQUATION_7), "limit of Eq. 7"))
    keys.append((Line2D([], [], **_FORWARD_PASSES), "limit by forward passes (FLOP)"))
    drawing.legend(figure, keys)
    rows = []
    for s in way:
        limits = (s.equation_7, s.forward_passes, _over(s.time, s.forward_passes))
        rows.append((s.result.label, s.result.iteration_seconds, s.time, s.change, *limits))
    title = f"From {first.label} to {last.result.label}, run {run.letter}"
    numbers = Table(title, _COLUMNS, rows)
    return Panel(_summary(way), heading, f"waterfall-{run.letter}", title, figure, [numbers])


def _row(axes: Axes, row: int, stage: Stage, change: float | None, name: str, text: str) -> None:
    """Draws the bar of a change, or of a whole time, below two lines of text, and limits of stages after the first."""
    kind = "a whole iteration" if change is None else "time saved" if change <= 0 else "time added (dashed)"
    width = stage.time if change is None else change
    axes.barh(row + 0.25, 100 * width, 0.3, 100 * (stage.time - width), **_BARS[kind])
    axes.text(0, row + 0.04, f"{drawing.shortened(name)}\n{text}", va="bottom")
    for share, style in ((stage.forward_passes, _FORWARD_PASSES), (stage.equation_7, _EQUATION_7)):
        if row and share is not None:
            drawing.marks(axes, [(100 * share, row + 0.25)], style)


def _summary(way: list[Stage]) -> str:
    last = way[-1]
    steps = ", ".join(f"{stage.step} {points(stage.change)}" for stage in way[1:])
    text = f"100 % is {way[0].result.label}; {steps}. In all {times(1 / last.time)}"
    if last.equation_7:
        text += f"; Eq. 7 alone gives {times(1 / last.equation_7)}"
    if last.forward_passes:
        text += f"; the forward passes alone give {times(1 / last.forward_passes)}"
    return f"{text}. Times are medians of the ratios of paired iterations."
