"""A run's result: a summary, a table and two plots."""

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
LABELS = {  # by algorithm; {} is replaced by the objective
    "reference": "{}, authors'",
    "optimised": "{}, ours",
    "bullet": "+ BulletTrain",
    "fast": "+ FAST",
    "yopo": "+ YOPO",
    "no-jsd": "{} - JSD",
}
SYMBOLS = {  # for a method's own options
    "step_size": "α",
    "beta": "β",
    "boundary_steps": "N_B",
    "robust_steps": "N_R",
    "outlier_steps": "N_O",
    "gamma": "γ",
    "fraction_momentum": "p",
    "grad_align": "GradAlign",
}
COLOURS = {  # by algorithm and engine; "exact" has the colour of no engine
    "reference": "#7a7a7a",
    "optimised": "#1f77b4",
    "optimised-fast": "#17becf",
    "optimised-bf16": "#9467bd",
    "bullet": "#d62728",
    "bullet-fast": "#ff7f0e",
    "bullet-bf16": "#e377c2",
}
GROUP_COLOURS = {"boundary": "#d62728", "robust": "#2ca02c", "outlier": "#7a7a7a"}


def label(method: str, loss: str) -> str:
    """Returns a method's name in tables and plots."""
    kind = Method.parse(method)
    name = LABELS[kind.algorithm].format(OBJECTIVE_NAMES[loss])
    if (loss, kind.algorithm) == ("pgd", "reference"):
        name = "PGD, plain"  # this form is not a single authors' code
    elif (loss, kind.algorithm) == ("augmix", "optimised"):
        name = "AugMix"
    elif kind.engine and kind.algorithm == "bullet":
        name = "+ BT"
    if kind.numbers not in ((), (1,)):
        name = "-".join([name, *map(str, kind.numbers)])
    own = [_own_option(*option) for option in kind.changes.items()]
    return ", ".join([name, *([kind.engine] if kind.engine else []), *own])


def _own_option(name: str, value: Any) -> str:
    if name == "memory":
        return "memory" if value else "no memory"
    return f"{SYMBOLS[name]}={value:g}" if name in SYMBOLS else str(value)


def summarise(run: Run, evaluated: Callable[[str], object]) -> dict[str, Any]:
    """Evaluates every method on all test images and writes `summary.json`; calls `evaluated` with each name."""
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
    others = [other for other in run.contestants if other is not contestant]
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
        "speedup": {other.method: median_speedup(other.seconds, contestant.seconds) for other in others},
    }
    if run.config.non_finite == "skip":
        entry["skipped"] = sum(r["kind"] == "skipped" and r["method"] == contestant.method for r in run.records())
    if contestant.memory is not None:
        entry["memory"] = contestant.memory.description()
    if contestant.bullet is not None:
        entry["fractions"] = dataclasses.asdict(contestant.bullet.fractions)
        contestant.bullet.finish()
        entry["robust_fraction"] = float(contestant.bullet.robust_fraction)
    return entry


def _theoretical_speedup(contestant: Contestant, steps: int) -> float | None:
    """Returns Eq. 7 or its AugMix form, over the objective itself; None for YOPO, which has no full attack steps.

    `steps` are those of the run, without BulletTrain and without a memory.
    """
    kind, bullet = contestant.kind, contestant.bullet
    if bullet is not None:
        augmix = contestant.config.loss == "augmix"
        return bullet.theoretical_speedup_augmix() if augmix else bullet.theoretical_speedup(steps)
    if contestant.memory is not None:
        return (steps + 1) / (contestant.config.steps + 1)
    if kind.algorithm == "fast":
        return (steps + 1) / (kind.numbers[0] + 1)
    return {"yopo": None, "no-jsd": 3.0}.get(kind.algorithm, 1.0)


def _cost(contestant: Contestant) -> float:
    """Returns the forward-pass equivalents of an iteration, by arithmetic, without GradAlign's."""
    config, kind, bullet = contestant.config, contestant.kind, contestant.bullet
    if kind.algorithm == "no-jsd":
        return 3.0
    if config.loss == "augmix":
        return augmix_cost(1.0 if bullet is None else bullet.fractions.boundary)
    if kind.algorithm == "yopo":
        return yopo_cost(kind.numbers[0], config.loss)
    if kind.algorithm == "reference" and config.loss == "trades":
        return trades_reference_cost(config.steps)
    mining, attacked = bullet is not None, 1.0
    mean_steps = float(kind.numbers[0] if kind.algorithm == "fast" else config.steps)
    if bullet is not None:
        mean_steps = bullet.mean_steps
        if not (config.robust_steps or config.outlier_steps):
            attacked = bullet.fractions.boundary if config.boundary_steps else 0.0
    if config.loss == "mart":
        return mart_cost(mean_steps, attacked, mining=mining)
    if config.loss == "pgd":
        return pgd_cost(mean_steps, mining=mining)
    return trades_cost(mean_steps, attacked, clean_forwards=1 if mining or _repeats_itself(contestant) else 2)


def _repeats_itself(contestant: Contestant) -> bool:
    """Whether a training forward can be replayed, which is impossible with dropout, for example."""
    model = copy.deepcopy(contestant.model).train()
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.eval()  # else it would wait for the other ranks
    x = torch.zeros(2, *contestant.image_shape, device=contestant.device)
    with torch.random.fork_rng([contestant.device] if contestant.device.type == "cuda" else []), torch.no_grad():
        repeat = RepeatedForward(model, contestant.device)
        with repeat.first():
            model(x)
    return repeat.replayable


def plain_table(title: str | None, first: str, *columns: str) -> Table:
    """Returns a table for the terminal without rows: texts in the first column, numbers in the others."""
    view = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    view.add_column(first, no_wrap=True)
    for column in columns:
        view.add_column(column, justify="right", no_wrap=True)
    return view


def table(summary: dict[str, Any]) -> Table:
    """Returns the comparison as a table for the terminal."""
    config, methods = summary["config"], summary["methods"]
    first = next(iter(methods))
    title = config["data"]
    if config["loss"] != "augmix":
        title += f", eps = {config['epsilon']:g}, {methods[first]['attack'].removesuffix(' x 1')}"
    energy = ["energy"] if any(entry.get("joules") is not None for entry in methods.values()) else []
    columns = ("clean", "robust", "F_B/F_R/F_O", "theory", "passes", "clock", "time", *energy)
    view = plain_table(title, "", *columns)
    view.columns[0].no_wrap = False  # methods with their own options have long names
    for method, entry in methods.items():
        fractions = entry.get("fractions")
        view.add_row(
            label(method, config["loss"]),
            f"{100 * entry['clean']:.1f}%",
            "-" if entry["robust"] is None else f"{100 * entry['robust']:.1f}%",
            "/".join(f"{fractions[g]:.2f}".lstrip("0") for g in GROUP_COLOURS) if fractions else "1/0/0",
            "-" if entry["theoretical_speedup"] is None else f"{entry['theoretical_speedup']:.2f}x",
            f"{entry['forward_passes']:.1f}F",
            f"{entry['speedup'].get(first, 1.0):.2f}x",
            f"{entry['seconds']:.0f} s",
            *(f"{entry['joules'] / 1000:.3g} kJ" for _ in energy),
        )
    return view


def corruption_table(name: str, errors: dict[str, list[float]]) -> Table:
    """Returns the errors of one network by corruption and severity, for the terminal."""
    title = f"{name}: mean corruption error {100 * mean_corruption_error(errors):.2f}%"
    view = plain_table(title, "error at severity", *map(str, SEVERITIES), "mean")
    for corruption, of_severities in errors.items():
        mean = sum(of_severities) / len(of_severities)
        view.add_row(corruption, *(f"{100 * error:.1f}%" for error in (*of_severities, mean)))
    return view


def plot(run: Run) -> list[Path]:
    """Writes the plots that the run's records permit; returns their paths."""
    records = run.records()
    paths = [_plot_accuracy(run, [r for r in records if r["kind"] == "epoch"])]
    fractions = [r for r in records if r["kind"] == "fractions"]
    if fractions:  # of one method: the others' differ only by their attack's rounding
        paths.append(_plot_fractions(run, [r for r in fractions if r["method"] == fractions[0]["method"]]))
    return paths


def _plot_accuracy(run: Run, records: list[dict[str, Any]]) -> Path:
    config = run.config
    measures = {"clean": "o:"} if config.loss == "augmix" else {"robust": "o-", "clean": "o:"}
    attack = "" if config.loss == "augmix" else f"PGD-{config.eval_steps}, "
    figure, axes = new_figure(f"Accuracy against time ({attack}{config.curve_size} test images)", size=12)
    spare = itertools.cycle(plt.colormaps["tab20"](range(20)))
    for method in config.methods:
        colour = COLOURS.get(method.removesuffix("-exact").replace("-frozen", "-fast")) or next(spare)
        mine = [r for r in records if r["method"] == method]
        for measure, line in measures.items():
            percent = [100 * r[measure] for r in mine]
            name = f"{label(method, config.loss)}: {measure}"
            axes.plot([r["seconds"] for r in mine], percent, line, color=colour, markersize=3, label=name)
    axes.set(xlabel="training time (s)", ylabel="accuracy (%)")
    axes.legend(fontsize=8)
    return save_figure(figure, run.folder / "accuracy.png")


def _plot_fractions(run: Run, records: list[dict[str, Any]]) -> Path:
    figure, axes = new_figure("Assigned groups (compare Fig. 3)", size=12)
    iterations = [r["iteration"] for r in records]
    for group, colour in GROUP_COLOURS.items():
        axes.plot(iterations, [100 * r[group] for r in records], color=colour, label=group)
    axes.plot(iterations, [100 * r["robust_fraction"] for r in records], "k:", label="$F_R$ (moving average)")
    axes.set(xlabel="iteration", ylabel="share of the minibatch (%)", ylim=(0, 100))
    axes.legend(fontsize=8)
    return save_figure(figure, run.folder / "fractions.png")


def new_figure(title: str, *, height: float = 4.5, size: float = 10) -> tuple[Figure, Any]:
    """Returns a figure of this height in inches, and its axes with a grid and the title in this size."""
    figure, axes = plt.subplots(figsize=(7, height), layout="constrained")
    axes.set_title(title, fontsize=size)
    axes.grid(alpha=0.3)
    return figure, axes


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes a PNG, replacing the file atomically."""
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=130)
    plt.close(figure)
    return path
