"""Figures 2, 6 and 7: robust accuracy by each group's steps, by γ and by N_R."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from bt_fast.deciding import STEP_FACTOR
from bt_fast.lab.config import PRESETS
from bt_fast.lab.report import new_figure
from bt_fast.lab.studies.study import EPSILON, LAPTOP, PAPER, PGD, Findings, Study
from bt_fast.lab.studies.study import STEPS as MOST_STEPS

# Figure 2: with groups known from a ten-step attack, one group's steps are 0 and the other two vary

GROUPS = ("boundary", "outlier", "robust")  # in the order of the figure's panels
PAPER_STEPS = tuple(range(MOST_STEPS + 1))
LAPTOP_STEPS = (0, MOST_STEPS)  # eight trainings with three attacks each


def steps_method(boundary: int, outlier: int, robust: int) -> str:
    """Returns PGD training with these steps for the oracle's groups."""
    size = f",step-size={STEP_FACTOR * EPSILON / boundary:.6g}" if boundary else ""
    steps = f"boundary-steps={boundary},robust-steps={robust},outlier-steps={outlier}"
    return f"bullet,policy=oracle,{steps}{size}"


_BASELINE = steps_method(MOST_STEPS, MOST_STEPS, MOST_STEPS)  # all groups are attacked


def _cell(without: str, a: int, b: int) -> str:
    """Returns the method of a panel's cell: a and b steps for the other two groups, in the order of `GROUPS`."""
    one, other = (group for group in GROUPS if group != without)
    return steps_method(**{without: 0, one: a, other: b})


def _leave_one_out(steps: Sequence[int]) -> tuple[str, ...]:
    """Returns the baseline and the methods of the three panels, each once."""
    cells = [_cell(without, a, b) for without in GROUPS for a, b in itertools.product(steps, steps)]
    return tuple(dict.fromkeys([_BASELINE, *cells]))


def _steps_of(findings: Findings) -> Sequence[int]:
    return LAPTOP_STEPS if findings.scale == "laptop" else PAPER_STEPS


def _panel(findings: Findings, without: str) -> np.ndarray[Any, Any]:
    """Returns robust accuracy in percent, [steps of the second group, steps of the first]."""
    steps = _steps_of(findings)
    return np.array([[100 * findings.mean(_cell(without, a, b), "robust") for a in steps] for b in steps])


def _answer_fig2(findings: Findings) -> dict[str, Any]:
    """Returns the best robust accuracy without steps for each group."""
    best = {f"N_{group[0].upper()} = 0": float(_panel(findings, group).max()) for group in GROUPS}
    baseline = 100 * findings.mean(_BASELINE, "robust")
    return {"baseline": baseline, "best robust accuracy": best, "most missed first": sorted(best, key=best.__getitem__)}


def _draw_fig2(findings: Findings) -> Figure:
    steps = _steps_of(findings)
    figure, panels = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    for axes, without in zip(panels, GROUPS, strict=True):
        values = _panel(findings, without)
        image = axes.imshow(values, origin="lower", vmin=0, vmax=100, cmap="viridis")
        for (row, column), value in np.ndenumerate(values):
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color="w" if value < 60 else "k")
        one, other = (group for group in GROUPS if group != without)
        axes.set_xticks(range(len(steps)), steps)
        axes.set_yticks(range(len(steps)), steps)
        axes.set(xlabel=f"N_{one[0].upper()}", ylabel=f"N_{other[0].upper()}", title=f"N_{without[0].upper()} = 0")
    figure.colorbar(image, ax=panels, label="robust accuracy (%)")
    baseline = 100 * findings.mean(_BASELINE, "robust")
    figure.suptitle(f"{findings.title}; N = {MOST_STEPS} for all: {baseline:.1f} %", fontsize=10)
    return figure


FIG2 = Study(
    "fig2",
    "Figure 2: robust accuracy of PGD training without steps for one group",
    dataclasses.replace(LAPTOP, methods=_leave_one_out(LAPTOP_STEPS), **PGD),
    dataclasses.replace(PRESETS["mnist"], methods=_leave_one_out(PAPER_STEPS), eval_steps=100, eval_restarts=20, **PGD),
    _draw_fig2,
    _answer_fig2,
)


# Figures 6 and 7: TRADES with BulletTrain at several values of one option


def _answer_sweep(findings: Findings) -> dict[str, Any]:
    """Returns how far accuracy moves over the values."""
    robust = {findings.label(m): findings.mean(m, "robust") for m in findings.methods}
    clean = {findings.label(m): findings.mean(m, "clean") for m in findings.methods}
    return {
        "robust": robust,
        "clean": clean,
        "theoretical speedup": {findings.label(m): findings.mean(m, "theoretical_speedup") for m in findings.methods},
        "range of robust": max(robust.values()) - min(robust.values()),
        "range of clean": max(clean.values()) - min(clean.values()),
    }


def _draw_sweep(findings: Findings, symbol: str) -> Figure:
    figure, axes = new_figure(findings.title, height=4.8)
    speed = [findings.mean(m, "theoretical_speedup") for m in findings.methods]
    for measure, line in (("robust", "o-"), ("clean", "o--")):
        axes.plot(speed, [100 * findings.mean(m, measure) for m in findings.methods], line, label=measure)
    for method, x in zip(findings.methods, speed, strict=True):
        value = findings.label(method).rpartition("=")[2]
        at, above = (x, 100 * findings.mean(method, "robust")), (0, 7)
        axes.annotate(f"{symbol}={value}", at, above, textcoords="offset points", ha="center", fontsize=8)
    axes.set(xlabel="theoretical speedup", ylabel="accuracy (%)")
    axes.margins(y=0.15)
    axes.legend()
    return figure


def _sweep(name: str, title: str, symbol: str, option: str, values: Iterable[float]) -> Study:
    methods = tuple(f"bullet,{option}={value:g}" for value in values)
    laptop, paper = (dataclasses.replace(base, methods=methods) for base in (LAPTOP, PAPER))
    return Study(name, title, laptop, paper, functools.partial(_draw_sweep, symbol=symbol), _answer_sweep)


_GAMMAS = (0.65, 0.7, 0.75, 0.8, 0.85, 0.9)
FIG6 = _sweep("fig6", "Figure 6: TRADES + BulletTrain, γ from 0.65 to 0.9", "γ", "gamma", _GAMMAS)
FIG7 = _sweep("fig7", "Figure 7: TRADES + BulletTrain, N_R from 0 to 5", "$N_R$", "robust-steps", range(6))
SWEEPS: Sequence[Study] = (FIG2, FIG6, FIG7)
