"""What a run came to: a summary, a table and two plots."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from torch import nn

from bt_fast.lab.corruptions import SEVERITIES, mean_corruption_error
from bt_fast.lab.files import replacing, write_text
from bt_fast.lab.methods import Method
from bt_fast.lab.provenance import data_summary, machine
from bt_fast.lab.training import WARM_UP, Contestant, Run, median_speedup
from bt_fast.objectives.repeated_forward import RepeatedForward
from bt_fast.speedup import augmix_cost, mart_cost, pgd_cost, trades_cost, trades_reference_cost, yopo_cost

OBJECTIVE_NAMES = {"trades": "TRADES", "mart": "MART", "pgd": "PGD", "augmix": "AugMix"}
LABELS = {  # by algorithm; {} is the objective
    "reference": "{}, authors'",
    "optimised": "{}, ours",
    "bullet": "+ BulletTrain",
    "fast": "+ FAST",
    "yopo": "+ YOPO",
    "no-jsd": "{} - JSD",
}
SYMBOLS = {  # of what a method has for itself
    "step_size": "α",
    "beta": "β",
    "boundary_steps": "N_B",
    "robust_steps": "N_R",
    "outlier_steps": "N_O",
    "gamma": "γ",
    "fraction_momentum": "p",
    "grad_align": "GradAlign",
}
COLOURS = {
    "reference": "#7a7a7a",
    "optimised": "#1f77b4",
    "bullet": "#d62728",
    "optimised-exact": "#1f77b4",
    "optimised-fast": "#17becf",
    "optimised-frozen": "#17becf",
    "optimised-bf16": "#9467bd",
    "bullet-exact": "#d62728",
    "bullet-fast": "#ff7f0e",
    "bullet-frozen": "#ff7f0e",
    "bullet-bf16": "#e377c2",
}
GROUP_COLOURS = {"boundary": "#d62728", "robust": "#2ca02c", "outlier": "#7a7a7a"}


def label(method: str, loss: str) -> str:
    """A method's name in tables and plots."""
    kind = Method.parse(method)
    name = LABELS[kind.algorithm].format(OBJECTIVE_NAMES[loss])
    if (loss, kind.algorithm) == ("pgd", "reference"):
        name = "PGD, plain"  # there is no one code of its authors in this form
    if (loss, kind.algorithm) == ("augmix", "optimised"):
        name = "AugMix"
    if kind.engine and kind.algorithm == "bullet":
        name = "+ BT"
    if kind.numbers not in ((), (1,)):
        name += "-" + "-".join(map(str, kind.numbers))
    own = [f"{SYMBOLS[k]}={v:g}" if k in SYMBOLS else str(v) for k, v in kind.changes.items()]
    return ", ".join([name, *([kind.engine] if kind.engine else []), *own])


def summarise(run: Run, evaluated: Callable[[str], None]) -> dict[str, Any]:
    """Evaluate every method on all test images and write `summary.json`; `evaluated` is told each method done."""
    methods = {}
    for contestant in run.contestants:
        methods[contestant.method] = _method_summary(run, contestant)
        evaluated(contestant.method)
    summary = {
        "config": dataclasses.asdict(run.config),
        "data": data_summary(run.dataset, run.fingerprint),
        "machine": machine(run.device),
        "methods": methods,
    }
    write_text(run.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def _method_summary(run: Run, contestant: Contestant) -> dict[str, Any]:
    final = run.final(contestant)
    entry: dict[str, Any] = {
        "label": label(contestant.method, run.config.loss),
        "clean": final["clean"],
        "robust": final["robust"],
        "images": final["images"],
        "attack": f"PGD-{run.config.eval_steps} x {run.config.eval_restarts}",
        "seconds": sum(contestant.seconds),
        "joules": run.energy.joules(contestant.method),
        "joules_reason": run.energy.reason,
        "iteration_seconds": statistics.median(contestant.seconds[WARM_UP:] or contestant.seconds),
        "forward_passes": _cost(contestant),
        "theoretical_speedup": _theoretical_speedup(contestant, run.config.steps),
        "speedup": {
            other.method: median_speedup(other.seconds, contestant.seconds)
            for other in run.contestants
            if other is not contestant
        },
    }
    if run.config.non_finite == "skip":
        entry["skipped"] = sum(r["kind"] == "skipped" and r["method"] == contestant.method for r in run.records())
    if contestant.bullet is not None:
        entry["fractions"] = dataclasses.asdict(contestant.bullet.fractions)
        contestant.bullet.finish()
        entry["robust_fraction"] = float(contestant.bullet.robust_fraction)
    return entry


def _theoretical_speedup(contestant: Contestant, steps: int) -> float | None:
    """Eq. 7 or its AugMix form, over the objective itself; None for YOPO, which has no attack steps of full cost."""
    kind, bullet = contestant.kind, contestant.bullet
    if contestant.config.loss == "augmix":
        return (
            {"optimised": 1.0, "no-jsd": 3.0}[kind.algorithm] if bullet is None else bullet.theoretical_speedup_augmix()
        )
    if kind.algorithm == "yopo":
        return None
    if bullet is not None:
        return bullet.theoretical_speedup(steps)
    return (steps + 1) / (kind.numbers[0] + 1) if kind.algorithm == "fast" else 1.0


def _cost(contestant: Contestant) -> float:
    """Forward-pass equivalents of an iteration, by arithmetic; GradAlign's are not among them."""
    config, kind, bullet = contestant.config, contestant.kind, contestant.bullet
    if config.loss == "augmix":
        if kind.algorithm == "no-jsd":
            return 3.0
        return augmix_cost(1.0 if bullet is None else bullet.fractions.boundary)
    if kind.algorithm == "yopo":
        return yopo_cost(kind.numbers[0], config.loss)
    if kind.algorithm == "reference" and config.loss == "trades":
        return trades_reference_cost(config.steps)
    mean_steps, corrupted = float(kind.numbers[0] if kind.algorithm == "fast" else config.steps), 1.0
    if bullet is not None:
        mean_steps = bullet.mean_steps
        if not (config.robust_steps or config.outlier_steps):
            corrupted = bullet.fractions.boundary if config.boundary_steps else 0.0
    mining = bullet is not None
    if config.loss == "mart":
        return mart_cost(mean_steps, corrupted, mining=mining)
    if config.loss == "pgd":
        return pgd_cost(mean_steps, mining=mining)
    return trades_cost(mean_steps, corrupted, clean_forwards=1 if mining or _repeats_itself(contestant) else 2)


def _repeats_itself(contestant: Contestant) -> bool:
    """Whether a training forward can be replayed; not with dropout, say."""
    model = copy.deepcopy(contestant.model).train()
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.eval()  # else it waits for other ranks, which are not asked
    x = torch.zeros(2, *contestant.image_shape, device=contestant.device)
    with torch.random.fork_rng([contestant.device] if contestant.device.type == "cuda" else []), torch.no_grad():
        repeat = RepeatedForward(model, contestant.device)
        with repeat.first():
            model(x)
    return repeat.replayable


def table(summary: dict[str, Any]) -> Table:
    """The comparison as a table for the terminal."""
    methods: dict[str, Any] = summary["methods"]
    first = next(iter(methods))
    attack = methods[first]["attack"].removesuffix(" x 1")
    title = summary["config"]["data"]
    if summary["config"]["loss"] != "augmix":
        title += f", eps = {summary['config']['epsilon']:g}, {attack}"
    view = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    view.add_column("")  # the only one that may wrap: methods with options of their own have long names
    energy = ["energy"] if any(entry.get("joules") is not None for entry in methods.values()) else []
    for name in ("clean", "robust", "F_B/F_R/F_O", "theory", "passes", "clock", "time", *energy):
        view.add_column(name, justify="right", no_wrap=True)
    for method, entry in methods.items():
        fractions = entry.get("fractions")
        view.add_row(
            label(method, summary["config"]["loss"]),
            f"{100 * entry['clean']:.1f}%",
            "-" if entry["robust"] is None else f"{100 * entry['robust']:.1f}%",
            "/".join(f"{fractions[g]:.2f}".lstrip("0") for g in GROUP_COLOURS) if fractions else "1/0/0",
            "-" if entry["theoretical_speedup"] is None else f"{entry['theoretical_speedup']:.2f}x",
            f"{entry['forward_passes']:.1f}F",
            f"{entry['speedup'][first]:.2f}x" if method != first else "1.00x",
            f"{entry['seconds']:.0f} s",
            *(f"{entry['joules'] / 1000:.3g} kJ" for _ in energy),
        )
    return view


def corruption_table(name: str, errors: dict[str, list[float]]) -> Table:
    """The errors of one network by corruption and severity, for the terminal."""
    title = f"{name}: mean corruption error {100 * mean_corruption_error(errors):.2f}%"
    view = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for column in ("error at severity", *map(str, SEVERITIES), "mean"):
        view.add_column(column, justify="left" if column == "error at severity" else "right", no_wrap=True)
    for corruption, of_severities in errors.items():
        mean = sum(of_severities) / len(of_severities)
        view.add_row(corruption, *(f"{100 * error:.1f}%" for error in (*of_severities, mean)))
    return view


def plot(run: Run) -> list[Path]:
    """Write the plots that the run's records allow; returns their paths."""
    records = run.records()
    paths = [_plot_accuracy(run, [r for r in records if r["kind"] == "epoch"])]
    fractions = [r for r in records if r["kind"] == "fractions"]
    if fractions:  # of one method: what the others' attack rounds away does not show
        paths.append(_plot_fractions(run, [r for r in fractions if r["method"] == fractions[0]["method"]]))
    return paths


def _plot_accuracy(run: Run, records: list[dict[str, Any]]) -> Path:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    measures = {"clean": "o:"} if run.config.loss == "augmix" else {"robust": "o-", "clean": "o:"}
    spare = itertools.cycle(plt.colormaps["tab20"](range(20)))  # for methods with options of their own
    for method in run.config.methods:
        colour = COLOURS.get(method) or next(spare)
        mine = [r for r in records if r["method"] == method]
        seconds = [r["seconds"] for r in mine]
        for accuracy, line in measures.items():
            percent = [100 * r[accuracy] for r in mine]
            name = f"{label(method, run.config.loss)}: {accuracy}"
            axes.plot(seconds, percent, line, color=colour, markersize=3, label=name)
    attack = "" if run.config.loss == "augmix" else f"PGD-{run.config.eval_steps}, "
    title = f"Accuracy against time ({attack}{run.config.curve_size} test images)"
    axes.set(xlabel="training time (s)", ylabel="accuracy (%)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return save_figure(figure, run.folder / "accuracy.png")


def _plot_fractions(run: Run, records: list[dict[str, Any]]) -> Path:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    iterations = np.array([r["iteration"] for r in records])
    for group, colour in GROUP_COLOURS.items():
        axes.plot(iterations, [100 * r[group] for r in records], color=colour, label=group)
    axes.plot(iterations, [100 * r["robust_fraction"] for r in records], "k:", label="$F_R$ (moving average)")
    axes.set(xlabel="iteration", ylabel="share of the minibatch (%)", title="Assigned groups (compare Fig. 3)")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return save_figure(figure, run.folder / "fractions.png")


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a PNG, replacing the file as a whole."""
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=130)
    plt.close(figure)
    return path
