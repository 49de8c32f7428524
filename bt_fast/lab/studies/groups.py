"""Figures 3, 4 and 5: the groups over training, and how well the signed prediction variance separates them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from bt_fast import ops
from bt_fast.allocation import Oracle
from bt_fast.attack.forward import clean_logits, eval_mode
from bt_fast.attack.generate import generate
from bt_fast.attack.start import ball_start
from bt_fast.attack.threat import ThreatModel
from bt_fast.deciding import STEP_FACTOR
from bt_fast.lab.config import PRESETS
from bt_fast.lab.report import GROUP_COLOURS, new_figure
from bt_fast.lab.studies.study import LAPTOP, PGD, STEPS, Findings, Study
from bt_fast.lab.training import Run
from bt_fast.plan import Plan

ORACLE = Oracle()  # its ten-step attack determines the groups, as in section 3.1


def oracle_groups(run: Run, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the groups of Eq. 1 to 3 by a ten-step attack on the first method's model, and the signed variances.

    Args:
        x: [m, C, H, W] in [0, 1]; y: [m] int64.

    Returns:
        [m] int64 of `ops.OUTLIER`, `ops.BOUNDARY`, `ops.ROBUST`, and [m] SVar.
    """
    model, threat = run.contestants[0].model, ThreatModel(run.config.epsilon)
    generator = torch.Generator(run.device).manual_seed(run.iteration)
    with eval_mode(model):
        logits = clean_logits(model, x)
        svar, correct, _, _ = ops.signed_variance(logits, y)
        target = torch.nn.functional.one_hot(y, logits.shape[1]).to(logits.dtype)
        size = STEP_FACTOR * threat.epsilon / ORACLE.steps
        plan = Plan.uniform(len(x), ORACLE.steps, size, x.device)
        x_adv = generate(model, x, ball_start(x, threat, generator), target, plan, threat)
        stands = clean_logits(model, x_adv).argmax(dim=1) == y
    return ORACLE.groups(correct, stands), svar


def _observe(run: Run) -> None:
    """Records the groups of the last trained minibatch, and the mean SVar of each."""
    x, y = run.minibatch
    group, svar = oracle_groups(run, x, y)
    members = {name: svar[group == number] for number, name in enumerate(ops.GROUPS)}
    run.append(
        kind="groups",
        shares={name: len(values) / len(svar) for name, values in members.items()},
        svar={name: float(values.mean()) if len(values) else None for name, values in members.items()},
        boundary_below_robust=_chance_below(members["boundary"], members["robust"]),
    )


def _chance_below(low: Tensor, high: Tensor) -> float | None:
    """Returns the chance that a value of `low` is below one of `high`, ties by half: 1 if SVar separates perfectly."""
    if not len(low) or not len(high):
        return None
    difference = high[:, None] - low
    return float(((difference > 0).double() + 0.5 * (difference == 0)).mean())


def _of_kind(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record for record in records if record["kind"] == kind]


def _series(findings: Findings, key: str, group: str) -> np.ndarray[Any, Any]:
    """Returns [seeds, observations]; NaN if the group was empty."""
    rows = [[record[key][group] for record in _of_kind(records, "groups")] for records in findings.records]
    return np.array(rows, dtype=float)


def _epochs(findings: Findings) -> list[float]:
    """Returns the epoch of each observation, as a fraction."""
    records = findings.records[0]
    last = max(record["iteration"] for record in records)
    return [record["iteration"] / last * findings.config["epochs"] for record in _of_kind(records, "groups")]


# Figure 3


def _answer_fig3(findings: Findings) -> dict[str, Any]:
    """Returns each group's share in the first and in the last fifth of training."""
    answers: dict[str, Any] = {}
    for group in GROUP_COLOURS:
        series = _series(findings, "shares", group)
        fifth = max(1, series.shape[1] // 5)
        first, last = float(series[:, :fifth].mean()), float(series[:, -fifth:].mean())
        answers[group] = {"first fifth": first, "last fifth": last, "rises": last > first}
    return answers


def _draw_fig3(findings: Findings) -> Figure:
    figure, axes = new_figure(findings.title)
    for group, colour in GROUP_COLOURS.items():
        axes.plot(_epochs(findings), 100 * _series(findings, "shares", group).mean(axis=0), color=colour, label=group)
    axes.set(xlabel="epoch", ylabel="share of the minibatch (%)", ylim=(0, 100))
    axes.legend()
    return figure


# Figure 4


def _answer_fig4(findings: Findings) -> dict[str, Any]:
    """How often the groups' mean SVar have the paper's order, and how well SVar separates boundary from robust."""
    outlier, boundary, robust = (_series(findings, "svar", group) for group in ops.GROUPS)
    whole = ~np.isnan(outlier + boundary + robust)
    ordered = (outlier <= boundary) & (boundary <= robust)
    groups = [record for records in findings.records for record in _of_kind(records, "groups")]
    chances = [r["boundary_below_robust"] for r in groups if r["boundary_below_robust"] is not None]
    return {
        "observations with all three groups": int(whole.sum()),
        "share in the order outlier <= boundary <= robust": float(ordered[whole].mean()) if whole.any() else None,
        "chance that a boundary sample's SVar is below a robust one's": float(np.mean(chances)) if chances else None,
    }


def _draw_fig4(findings: Findings) -> Figure:
    figure, axes = new_figure(findings.title)
    for group, colour in GROUP_COLOURS.items():
        axes.plot(_epochs(findings), _series(findings, "svar", group)[0], ".", color=colour, label=group, markersize=4)
    axes.set(xlabel="epoch", ylabel="mean signed prediction variance")
    axes.legend()
    return figure


# Figure 5


def _answer_fig5(findings: Findings) -> dict[str, Any]:
    """Returns the last minibatch's threshold, and how many samples took how many steps."""
    answers = []
    for records in findings.records:
        last = _of_kind(records, "allocation")[-1]
        counts = {str(n): last["steps"].count(n) for n in sorted(set(last["steps"]))}
        answers.append({"threshold": last["threshold"], "samples by steps": counts})
    return {"of each seed": answers}


def _draw_fig5(findings: Findings) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    allocations = [_of_kind(records, "allocation")[-1] for records in findings.records]
    last = allocations[-1]
    left.hist(np.concatenate([record["svar"] for record in allocations]), bins=40, color="#1f77b4")
    left.axvline(0, color="#7a7a7a")
    left.axvline(last["threshold"], color="#2ca02c", label="threshold T")
    left.set(xlabel="signed prediction variance", ylabel="samples", title="(a) distribution")
    left.legend()
    order = np.argsort(last["svar"])
    svar, steps = np.array(last["svar"])[order], np.array(last["steps"])[order]
    right.step(svar, steps, where="mid", color="#7a7a7a")
    right.plot(svar, steps, ".", color="#1f77b4")
    right.set(xlabel="signed prediction variance", ylabel="attack steps", title="(b) steps assigned")
    figure.suptitle(findings.title, fontsize=10)
    return figure


def _study(
    name: str,
    title: str,
    method: str,
    picture: Callable[[Findings], Figure],
    answers: Callable[[Findings], dict[str, Any]],
) -> Study:
    """Returns a study of PGD training by one method, with observations of its groups."""
    laptop, paper = (
        dataclasses.replace(base, methods=(method,), boundary_steps=STEPS, **PGD) for base in (LAPTOP, PRESETS["mnist"])
    )
    return Study(name, title, laptop, paper, picture, answers, observe=_observe)


_TITLE3 = "Figure 3: shares of boundary, robust and outlier samples over PGD training"
_TITLE4 = "Figure 4: mean signed prediction variance of each group over PGD training"
_TITLE5 = "Figure 5: signed prediction variance in the last minibatches of PGD + BulletTrain, and the steps assigned"
GROUP_STUDIES: Sequence[Study] = (
    _study("fig3", _TITLE3, "optimised", _draw_fig3, _answer_fig3),
    _study("fig4", _TITLE4, "optimised", _draw_fig4, _answer_fig4),
    _study("fig5", _TITLE5, "bullet", _draw_fig5, _answer_fig5),
)
