"""Tables 1 to 4: accuracy and speedup of BulletTrain, and of the methods compared with it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from bt_fast.lab.report import GROUP_COLOURS, new_figure
from bt_fast.lab.studies.study import LAPTOP, PAPER, Findings, Study, mean

Row = tuple[float | None, float | None, str]  # clean, robust in percent; theory / wall clock
TRADES_METHODS: dict[str, Row] = {  # with the paper's results: CIFAR-10, WRN-34-10, PGD-20
    "reference": (84.92, 56.61, "1 / 1"),
    "fast": (93.94, 4.48, "5.5 / 3.7"),
    "yopo-2-5": (89.95, 46.60, "- / 3.1"),
    "bullet,robust-steps=0": (87.50, 52.10, "3.0 / 2.7"),
    "bullet": (85.89, 56.35, "2.3 / 2.2"),
    "optimised,beta=1": (88.64, 49.14, "1 / 1"),
    "yopo-2-5,beta=1": (88.47, 45.28, "- / 3.1"),
}
MART_METHODS: dict[str, Row] = {
    "reference": (84.17, 57.39, "1 / 1"),
    "fast": (93.95, 0.20, "5.5 / 4.0"),
    "bullet,robust-steps=1": (87.12, 58.11, "2.5 / 2.1"),
    "bullet": (86.60, 58.74, "2.2 / 1.9"),
}
AUGMIX_METHODS: dict[str, Row] = {  # WRN-40-2, CIFAR-10-C
    "optimised": (None, 88.8, "1 / 1"),
    "no-jsd": (None, 86.9, "3 / -"),
    "bullet": (None, 88.8, "1.8 / 1.7"),
}
FAST_METHODS: dict[str, Row] = {
    "fast-2": (85.43, 50.56, "3.7 / 3.0"),
    "fast-3": (84.47, 53.52, "2.8 / 2.5"),
    "fast-4": (84.23, 53.95, "2.2 / 2.2"),
    "fast-5": (84.12, 54.45, "1.8 / 1.8"),
}
BULLET_METHODS: dict[str, Row] = {
    "bullet,boundary-steps=3,gamma=0.75": (86.66, 55.93, "3.7 / 3.0"),
    "bullet,boundary-steps=4,gamma=0.75": (86.17, 55.77, "3.3 / 2.8"),
    "bullet,boundary-steps=5,gamma=0.75": (85.89, 56.17, "3.0 / 2.7"),
    "bullet,boundary-steps=6,gamma=0.75": (86.28, 56.0, "2.8 / 2.6"),
}


# The tables' answers


def _rows(findings: Findings, baseline: str, reported: Mapping[str, Row]) -> dict[str, Any]:
    """Compares each method with the baseline and the paper."""
    rows = []
    for method in findings.methods:
        theory, robust = findings.values(method, "theoretical_speedup"), findings.values(method, "robust")
        rows.append(
            {
                "method": method,
                "label": findings.label(method),
                "clean": findings.mean(method, "clean"),
                "robust": mean(robust),
                "robust of each seed": robust,
                "robust over the baseline": mean(robust) - findings.mean(baseline, "robust"),
                "theoretical speedup": None if None in theory else mean(theory),
                "wall-clock speedup": findings.clock(method, baseline),
                "paper": reported.get(method),
            }
        )
    return {"baseline": baseline, "rows": rows}


def _fast_against_bullet(findings: Findings) -> dict[str, Any]:
    """Lists for each step count of FAST the BulletTrain configurations that are no slower and no less robust."""
    dominated = {}
    for fast in FAST_METHODS:
        speed, robust = findings.mean(fast, "theoretical_speedup"), findings.mean(fast, "robust")
        dominated[findings.label(fast)] = [
            findings.label(bullet)
            for bullet in BULLET_METHODS
            if findings.mean(bullet, "theoretical_speedup") >= speed and findings.mean(bullet, "robust") >= robust
        ]
    rows = _rows(findings, "fast-5", FAST_METHODS | BULLET_METHODS)["rows"]
    return {"dominated by": dominated, "rows": rows}


# Pictures


def _draw_table(findings: Findings, baseline: str, reported: Mapping[str, Row]) -> Figure:
    cells = []
    for row in _rows(findings, baseline, reported)["rows"]:
        seeds = ", ".join(f"{100 * robust:.1f}" for robust in row["robust of each seed"])
        theory, (clean, robust, speedup) = row["theoretical speedup"], row["paper"]
        cells.append(
            [
                row["label"],
                f"{100 * row['clean']:.1f} %",
                f"{100 * row['robust']:.1f} % ({seeds})",
                _shares(findings.values(row["method"], "fractions")),
                "-" if theory is None else f"{theory:.2f}x",
                f"{row['wall-clock speedup']:.2f}x",
                f"{'' if clean is None else f'{clean:.1f} / '}{robust:.1f} %, {speedup}",
            ]
        )
    columns = ["", "clean", "robust (each seed)", "F_B / F_R / F_O", "theory", "clock"]
    columns.append("paper: clean / robust, speedup")
    figure, axes = plt.subplots(figsize=(12, 0.8 + 0.36 * len(cells)), layout="constrained")
    axes.axis("off")
    axes.set_title(_caption(findings), fontsize=10)
    drawn = axes.table(cells, colLabels=columns, loc="center", cellLoc="right", colLoc="right")
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(9)
    drawn.auto_set_column_width(range(len(columns)))
    drawn.scale(1, 1.4)
    return figure


def _shares(fractions: list[dict[str, float] | None]) -> str:
    """Returns the mean fractions of the groups over the seeds; None belongs to a method without BulletTrain."""
    if None in fractions:
        return "1 / 0 / 0"
    return " / ".join(f"{mean([f[group] for f in fractions if f]):.2f}".lstrip("0") for group in GROUP_COLOURS)


def _caption(findings: Findings) -> str:
    config, seeds = findings.config, len(findings.summaries)
    return (
        f"{findings.title}\n{config['data']}, {config['train_size'] or 'all'} images, {config['model']}, "
        f"{config['epochs']} epochs, {seeds} seed{'s' if seeds > 1 else ''} (scale: {findings.scale})"
    )


def _scatter(findings: Findings) -> Figure:
    figure, axes = new_figure(_caption(findings), height=4.8)
    for name, methods, colour in (
        ("multi-step FAST", FAST_METHODS, "#1f77b4"),
        ("BulletTrain", BULLET_METHODS, "#d62728"),
    ):
        speed = [findings.mean(m, "theoretical_speedup") for m in methods]
        for measure, line in (("robust", "o-"), ("clean", "o:")):
            percent = [100 * findings.mean(m, measure) for m in methods]
            axes.plot(speed, percent, line, color=colour, label=f"TRADES + {name}: {measure}")
    axes.set(xlabel="theoretical speedup over TRADES", ylabel="accuracy (%)")
    axes.legend(fontsize=8)
    return figure


def _table(
    name: str, title: str, baseline: str, reported: Mapping[str, Row], laptop: dict[str, Any], paper: dict[str, Any]
) -> Study:
    """Returns the study of a table: its methods, and the options that replace those of `LAPTOP` and `PAPER`."""
    methods = tuple(reported)
    return Study(
        name,
        title,
        dataclasses.replace(LAPTOP, methods=methods, **laptop),
        dataclasses.replace(PAPER, methods=methods, **paper),
        functools.partial(_draw_table, baseline=baseline, reported=reported),
        functools.partial(_rows, baseline=baseline, reported=reported),
    )


_AUGMIX: dict[str, Any] = {"loss": "augmix", "boundary_steps": 1, "robust_steps": 0, "outlier_steps": 0}
_AUGMIX_PAPER = {"model": "wrn-40-2", "epochs": 100, "decay_epochs": (50, 75), "weight_decay": 5e-4, **_AUGMIX}
_TITLE1 = "Table 1: AugMix, without its divergence, and with BulletTrain; accuracy under fifteen corruptions"
_TITLE2 = "Table 2: TRADES with FAST, YOPO and BulletTrain"
_TITLE3 = "Table 3: MART with FAST and BulletTrain"
_TITLE4 = "Table 4: TRADES with multi-step FAST (N = 2 to 5) against BulletTrain (N_B = 3 to 6, N_R = 2, γ = 0.75)"
_MART = {"loss": "mart", "lr": 0.02}  # at a learning rate of 0.03 one of four runs diverged
TABLES: Sequence[Study] = (
    dataclasses.replace(
        _table("table1", _TITLE1, "optimised", AUGMIX_METHODS, _AUGMIX, _AUGMIX_PAPER), corruptions=True
    ),
    _table("table2", _TITLE2, "reference", TRADES_METHODS, {}, {}),
    _table("table3", _TITLE3, "reference", MART_METHODS, _MART, {"loss": "mart"}),
    dataclasses.replace(
        _table("table4", _TITLE4, "fast-5", FAST_METHODS | BULLET_METHODS, {}, {}),
        picture=_scatter,
        answers=_fast_against_bullet,
    ),
)
