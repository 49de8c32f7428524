"""Charts of the groups that an attack tells, which the studies of Figures 3 to 5 record in training."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from bt_fast.lab.html_report import drawing
from bt_fast.lab.html_report.charts import GROUP_STYLES, HEIGHT, SHARE, left_out, over_iterations, thinned
from bt_fast.lab.html_report.drawing import BOTTOM, TOP
from bt_fast.lab.html_report.loading import LoadedRun, Record
from bt_fast.lab.html_report.markup import Html, panel, table
from bt_fast.lab.html_report.numbers import percent, plain

ABOUT_GROUPS = (
    "Which samples of a minibatch are boundary, robust and outlier, as a ten-step attack on the run's first method "
    "tells (Eq. 1 to 3), beside any that training makes. A study records it every ten iterations."
)


def attacked_groups(runs: Sequence[LoadedRun]) -> list[Html]:
    """Two panels for each run that recorded such groups: their shares, and their mean signed variances."""
    found = []
    for run in runs:
        if records := [r for r in run.records if r["kind"] == "groups"]:
            heading = f"{run.letter}: {run.results[0].label}"
            found += [panel(f"{heading}, shares", _shares(run, records))]
            found += [panel(f"{heading}, signed variances", _variances(run, records))]
    return found


def _shares(run: LoadedRun, records: list[Record]) -> Html:
    drawn = thinned(records)
    title = f"Shares of the groups as an attack tells them, run {run.letter}"
    means = ", ".join(f"{g} {percent(statistics.fmean(r['shares'][g] for r in records))}" for g in GROUP_STYLES)
    text = f"In mean over training: {means} (compare Fig. 3).{left_out(records, drawn)}"
    rows = [[str(r["iteration"]), *(percent(r["shares"][g]) for g in GROUP_STYLES)] for r in drawn]
    numbers = table(title, ["iteration", *GROUP_STYLES], rows)
    series = [(style, group, _share(group)) for group, style in GROUP_STYLES.items()]
    y = drawing.y_scale(0, 100, TOP, HEIGHT - BOTTOM)
    return over_iterations(f"groups-{run.letter}", title, text, drawn, (y, SHARE), series, numbers)


def _share(group: str) -> Callable[[Record], float | None]:
    return lambda record: 100 * record["shares"][group]


def _variances(run: LoadedRun, records: list[Record]) -> Html:
    drawn = thinned(records)
    title = f"Mean signed prediction variance of the groups as an attack tells them, run {run.letter}"
    known = [value for r in records for g in GROUP_STYLES if (value := r["svar"].get(g)) is not None]
    chances = [c for r in records if (c := r.get("boundary_below_robust")) is not None]
    text = "A group without samples in a minibatch has no mean there (compare Fig. 4)."
    if chances:
        text += " The chance that a boundary sample's SVar lies below a robust one's: "
        text += f"{percent(statistics.fmean(chances))} in mean over {len(chances)} minibatches with both."
    rows = [
        [str(r["iteration"]), *(plain(r["svar"].get(g)) for g in GROUP_STYLES), percent(r.get("boundary_below_robust"))]
        for r in drawn
    ]
    numbers = table(title, ["iteration", *GROUP_STYLES, "boundary below robust"], rows)
    series = [(style, group, _variance(group)) for group, style in GROUP_STYLES.items()]
    y = drawing.y_scale(*drawing.spread(known, 0.001), TOP, HEIGHT - BOTTOM)
    name, meaning = f"groups-svar-{run.letter}", "mean signed prediction variance (SVar)"
    return over_iterations(name, title, text + left_out(records, drawn), drawn, (y, meaning), series, numbers)


def _variance(group: str) -> Callable[[Record], float | None]:
    return lambda record: record["svar"].get(group)
