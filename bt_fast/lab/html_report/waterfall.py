"""From the objective as its authors wrote it to ours: what each optimisation takes off an iteration, and the limits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from bt_fast.lab.html_report import drawing
from bt_fast.lab.html_report.loading import LoadedRun, Result
from bt_fast.lab.html_report.markup import Html, element, note, panel, table
from bt_fast.lab.html_report.numbers import UNKNOWN, duration, percent, times

_ROW, _BAR, _ABOVE = 72, 20, 42  # heights: of a row, of its bar, and of the two lines of text above the bar
_PARTS = {  # by (algorithm, engine): what is in it, each an optimisation of its own
    ("reference", "exact"): (),
    ("optimised", "exact"): ("ours",),
    ("optimised", "fast"): ("ours", "fast engine"),
    ("optimised", "bf16"): ("ours", "fast engine", "16 bits"),
    ("bullet", "exact"): ("ours", "BulletTrain"),
    ("bullet", "fast"): ("ours", "BulletTrain", "fast engine"),
    ("bullet", "bf16"): ("ours", "BulletTrain", "fast engine", "16 bits"),
}
_NAMES = {"ours": "our code"}
_LONGEST = 48  # characters that fit into a line


@dataclass(frozen=True)
class Stage:
    """A method on the way from the first to the last.

    Attributes:
        step: what it has that the one before has not; "" of the first.
        time: of an iteration, as a share of the first stage's: 1 over the median of the ratios of paired iterations.
        equation_7, forward_passes: the share that the theoretical speedup and the forward passes alone would leave;
            None where the summary does not tell.
    """

    result: Result
    step: str
    time: float
    equation_7: float | None
    forward_passes: float | None


def stages(results: Sequence[Result]) -> list[Stage]:
    """The run's methods in the order reference, ours, BulletTrain, fast engine, 16 bits, as far as it has them.

    Without BulletTrain the engines of our implementation itself. A method with options of its own is none of them, nor
    is one without a ratio to the first. Fewer than two methods are no way: the list is empty then.
    """
    by_form = {(r.algorithm, r.engine): r for r in reversed(results) if not r.own}
    bullet = any(algorithm == "bullet" for algorithm, _ in by_form)
    chain = [
        (by_form[form], parts)
        for form, parts in _PARTS.items()
        if form in by_form and not (bullet and form[0] == "optimised" and form[1] != "exact")
    ]
    if not chain:
        return []
    first, before = chain[0]
    found = [Stage(first, "", 1.0, 1.0, 1.0)]
    for result, parts in chain[1:]:
        ratio = result.speedup.get(first.name)
        if ratio is None or not math.isfinite(ratio) or ratio <= 0:
            continue
        step = " + ".join(_NAMES.get(part, part) for part in parts if part not in before)
        before = parts
        equation_7 = _over(first.theoretical_speedup, result.theoretical_speedup)
        found.append(Stage(result, step, 1 / ratio, equation_7, _over(result.forward_passes, first.forward_passes)))
    return found if len(found) > 1 else []


def _over(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b and math.isfinite(a) and math.isfinite(b) else None


def waterfalls(runs: Sequence[LoadedRun]) -> list[Html]:
    """A panel for each run."""
    return [panel(f"{run.letter}: {run.title}", _waterfall(run)) for run in runs]


def _waterfall(run: LoadedRun) -> Html:
    found = stages(run.results)
    if not found:
        return note(
            "No steps to draw: it takes two or more of reference, optimised, bullet, bullet-fast and bullet-bf16 "
            f"without options of their own, and their paired speedups; this run has "
            f"{', '.join(r.name for r in run.results)}."
        )
    longest = max(max(s.time, s.equation_7 or 0, s.forward_passes or 0) for s in found)
    x = drawing.Scale(0, 100 * longest * 1.04, 8, drawing.WIDTH - drawing.RIGHT)
    height = _ROW * (len(found) + 1) + drawing.BOTTOM
    rows = [_row(i, stage, found[i - 1].time if i else 0.0, x) for i, stage in enumerate(found)]
    grid = drawing.upright_grid(x, height - drawing.BOTTOM, "time of an iteration (% of the first row's)")
    drawn = [grid, *itertools.chain(*rows), *_whole(len(found), found[-1], x)]
    title = f"From {found[0].result.label} to {found[-1].result.label}, run {run.letter}"
    legend = [
        _swatch("whole", "a whole iteration"),
        _swatch("gain", "time saved"),
        _swatch("loss", "time added (dashed)"),
        element("li", "◇ limit of Eq. 7"),
        element("li", "△ limit by forward passes (FLOP)"),
    ]
    return drawing.figure(f"waterfall-{run.letter}", title, _told(found), height, drawn, legend, [_table(title, found)])


def _row(index: int, stage: Stage, before: float, x: drawing.Scale) -> list[Html]:
    """What a stage takes off, or adds: a bar between the time before and its own."""
    top = index * _ROW
    name = f"+ {stage.step}" if index else stage.result.label
    kind = "whole" if not index else "gain" if stage.time <= before else "loss"
    change = f"{_points(stage.time - before)} of the first" if index else "100 %"
    median = stage.result.iteration_seconds
    measured = f"; {duration(median)} an iteration" if median is not None else ""
    end, upper, lower = x(100 * stage.time), top + _ABOVE, top + _ABOVE + _BAR
    drawn = [
        drawing.bar(x(100 * before), upper, end, lower, kind),
        element("line", x1=end, y1=upper, x2=end, y2=lower + _ROW, class_="axis"),
        *_two_lines(top, name, f"{change}{measured}"),
    ]
    return drawn + (_limits(stage, (upper + lower) / 2, x) if index else [])


def _two_lines(top: float, name: str, told: str) -> list[Html]:
    short = name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
    return [drawing.words(8, top + 17, short, class_=None), drawing.words(8, top + 35, told)]


def _points(change: float) -> str:
    return f"{100 * change:+.1f} points".replace("-", "−")


def _limits(stage: Stage, y: float, x: drawing.Scale) -> list[Html]:
    """Where Eq. 7 and the forward passes alone would have it."""
    drawn = []
    if stage.forward_passes is not None:
        drawn.append(_shape("M0 -7L7 6H-7Z", x(100 * stage.forward_passes), y))
    if stage.equation_7 is not None:
        drawn.append(_shape("M0 -8L6 0L0 8L-6 0Z", x(100 * stage.equation_7), y))
    return drawn


def _shape(path: str, x: float, y: float) -> Html:
    return element("path", d=path, class_="limit", transform=f"translate({x:.1f} {y:.1f})")


def _whole(index: int, last: Stage, x: drawing.Scale) -> list[Html]:
    top = index * _ROW
    told = f"{percent(last.time)} of the first, {times(1 / last.time)} as fast"
    bar = drawing.bar(x(0), top + _ABOVE, x(100 * last.time), top + _ABOVE + _BAR, "whole")
    return [bar, *_two_lines(top, "In all", told), *_limits(last, top + _ABOVE + _BAR / 2, x)]


def _swatch(kind: str, text: str) -> Html:
    box = drawing.bar(3, 3, 31, 13, kind)
    return element("li", element("svg", box, viewBox="0 0 34 16", aria_hidden="true", focusable="false"), text)


def _told(found: list[Stage]) -> str:
    steps = [f"{s.step} {_points(s.time - b.time)}" for b, s in itertools.pairwise(found)]
    last = found[-1]
    text = f"100 % is {found[0].result.label}; {', '.join(steps)}. In all {times(1 / last.time)}"
    limits = [
        f"{name} {times(1 / share)}"
        for name, share in (
            ("Eq. 7 alone gives", last.equation_7),
            ("the forward passes alone give", last.forward_passes),
        )
        if share
    ]
    return f"{text}{'; ' if limits else ''}{', '.join(limits)}. Times are medians of the ratios of paired iterations."


def _table(title: str, found: list[Stage]) -> Html:
    header = ["method", "median iteration", "time", "change", "Eq. 7", "forward passes", "time / forward passes"]
    rows = []
    for i, stage in enumerate(found):
        change = _points(stage.time - found[i - 1].time) if i else UNKNOWN
        over = _over(stage.time, stage.forward_passes)
        shares = (percent(stage.time), change, percent(stage.equation_7), percent(stage.forward_passes), times(over))
        rows.append([stage.result.label, duration(stage.result.iteration_seconds), *shares])
    return table(title, header, rows)
