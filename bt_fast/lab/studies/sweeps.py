"""Figures 2, 6 and 7: what robust accuracy owes to each group's steps, to γ and to N_R."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from bt_fast.deciding import STEP_FACTOR
from bt_fast.lab.config import PRESETS, RunConfig
from bt_fast.lab.studies.study import LAPTOP, PAPER, Findings, Study

# Figure 2: with groups known from a ten-step attack, one group's steps are 0 and the other two vary

GROUPS = ("boundary", "outlier", "robust")  # in the order of the figure's panels
MOST_STEPS = 7
EPSILON = 0.3
PAPER_STEPS = tuple(range(MOST_STEPS + 1))
LAPTOP_STEPS = (0, MOST_STEPS)  # eight trainings of three attacks each


def steps_method(boundary: int, outlier: int, robust: int, epsilon: float) -> str:
    """PGD training with these steps for the groups that the oracle tells."""
    size = f",step-size={STEP_FACTOR * epsilon / boundary:.6g}" if boundary else ""
    steps = f"boundary-steps={boundary},robust-steps={robust},outlier-steps={outlier}"
    return f"bullet,policy=oracle,{steps}{size}"


def _leave_one_out(steps: Sequence[int]) -> tuple[str, ...]:
    """The methods of the three panels, each once, and the baseline, which spares no group."""
    methods = [steps_method(MOST_STEPS, MOST_STEPS, MOST_STEPS, EPSILON)]
    for without in GROUPS:
        methods += [steps_method(**_cell(without, a, b), epsilon=EPSILON) for a, b in itertools.product(steps, steps)]
    return tuple(dict.fromkeys(methods))


def _cell(without: str, a: int, b: int) -> dict[str, int]:
    """The steps of each group in a panel's cell."""
    one, other = (group for group in GROUPS if group != without)
    return {without: 0, one: a, other: b}


def _panel(found: Findings, without: str, steps: Sequence[int]) -> np.ndarray[Any, Any]:
    """Robust accuracy in percent, [steps of the second group, steps of the first]."""
    return np.array(
        [
            [100 * found.mean(steps_method(**_cell(without, a, b), epsilon=EPSILON), "robust") for a in steps]
            for b in steps
        ]
    )


def _steps_of(found: Findings) -> Sequence[int]:
    return LAPTOP_STEPS if found.scale == "laptop" else PAPER_STEPS


def _answer_fig2(found: Findings) -> dict[str, Any]:
    """The best that can be had without steps for a group."""
    best = {f"N_{group[0].upper()} = 0": float(_panel(found, group, _steps_of(found)).max()) for group in GROUPS}
    baseline = 100 * found.mean(found.methods[0], "robust")
    return {"baseline": baseline, "best robust accuracy": best, "most missed first": sorted(best, key=best.__getitem__)}


def _draw_fig2(found: Findings) -> Figure:
    steps = _steps_of(found)
    figure, panels = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    baseline = 100 * found.mean(found.methods[0], "robust")
    for axes, without in zip(panels, GROUPS, strict=True):
        values = _panel(found, without, steps)
        image = axes.imshow(values, origin="lower", vmin=0, vmax=100, cmap="viridis")
        for (row, column), value in np.ndenumerate(values):
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color="w" if value < 60 else "k")
        one, other = (group for group in GROUPS if group != without)
        axes.set_xticks(range(len(steps)), steps)
        axes.set_yticks(range(len(steps)), steps)
        axes.set(xlabel=f"N_{one[0].upper()}", ylabel=f"N_{other[0].upper()}", title=f"N_{without[0].upper()} = 0")
    figure.colorbar(image, ax=panels, label="robust accuracy (%)")
    figure.suptitle(f"{found.title}; N = {MOST_STEPS} for all: {baseline:.1f} %", fontsize=10)
    return figure


_MNIST = dataclasses.replace(PRESETS["mnist"], loss="pgd", epsilon=EPSILON, steps=MOST_STEPS)
_PGD = {"loss": "pgd", "epsilon": EPSILON, "steps": MOST_STEPS, "step_size": STEP_FACTOR * EPSILON / MOST_STEPS}

# Figures 6 and 7: TRADES with BulletTrain at several values of one option


def _sweep(option: str, values: Sequence[float]) -> tuple[str, ...]:
    return tuple(f"bullet,{option}={value:g}" for value in values)


def _answer_sweep(found: Findings) -> dict[str, Any]:
    """How far accuracy moves over the values."""
    robust = {found.label(m): found.mean(m, "robust") for m in found.methods}
    clean = {found.label(m): found.mean(m, "clean") for m in found.methods}
    speed = {found.label(m): found.mean(m, "theoretical_speedup") for m in found.methods}
    return {
        "robust": robust,
        "clean": clean,
        "theoretical speedup": speed,
        "range of robust": max(robust.values()) - min(robust.values()),
        "range of clean": max(clean.values()) - min(clean.values()),
    }


def _draw_sweep(symbol: str) -> Callable[[Findings], Figure]:
    def picture(found: Findings) -> Figure:
        figure, axes = plt.subplots(figsize=(7, 4.8), layout="constrained")
        speed = [found.mean(m, "theoretical_speedup") for m in found.methods]
        for measure, line in (("robust", "o-"), ("clean", "o--")):
            axes.plot(speed, [100 * found.mean(m, measure) for m in found.methods], line, label=measure)
        for method, x in zip(found.methods, speed, strict=True):
            value = found.label(method).rpartition("=")[2]
            above = (0, 7)
            at = (x, 100 * found.mean(method, "robust"))
            axes.annotate(f"{symbol}={value}", at, above, textcoords="offset points", ha="center", fontsize=8)
        axes.set(xlabel="theoretical speedup", ylabel="accuracy (%)")
        axes.set_title(found.title, fontsize=10)
        axes.margins(y=0.15)
        axes.grid(alpha=0.3)
        axes.legend()
        return figure

    return picture


def _of(base: RunConfig, methods: tuple[str, ...], **changes: Any) -> RunConfig:
    return dataclasses.replace(base, methods=methods, **changes)


_GAMMAS = _sweep("gamma", (0.65, 0.7, 0.75, 0.8, 0.85, 0.9))
_ROBUST_STEPS = _sweep("robust-steps", range(6))

FIG2 = Study(
    "fig2",
    "Figure 2: robust accuracy of PGD training without steps for one group",
    _of(LAPTOP, _leave_one_out(LAPTOP_STEPS), **_PGD),
    _of(_MNIST, _leave_one_out(PAPER_STEPS), step_size=_PGD["step_size"], eval_steps=100, eval_restarts=20),
    _draw_fig2,
    _answer_fig2,
)
FIG6 = Study(
    "fig6",
    "Figure 6: TRADES + BulletTrain, γ from 0.65 to 0.9",
    _of(LAPTOP, _GAMMAS),
    _of(PAPER, _GAMMAS),
    _draw_sweep("γ"),
    _answer_sweep,
)
FIG7 = Study(
    "fig7",
    "Figure 7: TRADES + BulletTrain, N_R from 0 to 5",
    _of(LAPTOP, _ROBUST_STEPS),
    _of(PAPER, _ROBUST_STEPS),
    _draw_sweep("$N_R$"),
    _answer_sweep,
)
SWEEPS: Sequence[Study] = (FIG2, FIG6, FIG7)
