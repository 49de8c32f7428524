"""Tables 1 to 4: accuracy and speedup of BulletTrain, and of what it is compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from bt_fast.lab.config import RunConfig
from bt_fast.lab.studies.study import LAPTOP, PAPER, Findings, Study

Row = tuple[float | None, float | None, str]  # clean, robust in percent; theory / wall clock
TRADES_METHODS: dict[str, Row] = {  # and what the paper reports of them: CIFAR-10, WRN-34-10, PGD-20
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


# What the tables say


def _against(baseline: str, reported: Mapping[str, Row]) -> Callable[[Findings], dict[str, Any]]:
    def answers(found: Findings) -> dict[str, Any]:
        rows = []
        for method in found.methods:
            theory = found.values(method, "theoretical_speedup")
            rows.append(
                {
                    "method": method,
                    "label": found.label(method),
                    "clean": found.mean(method, "clean"),
                    "robust": found.mean(method, "robust"),
                    "robust of each seed": found.values(method, "robust"),
                    "robust over the baseline": found.mean(method, "robust") - found.mean(baseline, "robust"),
                    "theoretical speedup": None if None in theory else sum(theory) / len(theory),
                    "wall-clock speedup": found.clock(method, baseline),
                    "paper": reported.get(method),
                }
            )
        return {"baseline": baseline, "rows": rows}

    return answers


def _fast_against_bullet(found: Findings) -> dict[str, Any]:
    """For each number of steps of FAST, the configurations of BulletTrain that are no slower and no less robust."""
    dominated = {}
    for fast in FAST_METHODS:
        speed, robust = found.mean(fast, "theoretical_speedup"), found.mean(fast, "robust")
        dominated[found.label(fast)] = [
            found.label(bullet)
            for bullet in BULLET_METHODS
            if found.mean(bullet, "theoretical_speedup") >= speed and found.mean(bullet, "robust") >= robust
        ]
    rows = _against("fast-5", FAST_METHODS | BULLET_METHODS)(found)["rows"]
    return {"dominated by": dominated, "rows": rows}


# Pictures


def _as_table(baseline: str, reported: Mapping[str, Row]) -> Callable[[Findings], Figure]:
    def picture(found: Findings) -> Figure:
        cells = [_cells(found, method, baseline, reported[method]) for method in found.methods]
        figure, axes = plt.subplots(figsize=(12, 0.8 + 0.36 * len(cells)), layout="constrained")
        axes.axis("off")
        axes.set_title(_caption(found), fontsize=10)
        columns = [
            "",
            "clean",
            "robust (each seed)",
            "F_B / F_R / F_O",
            "theory",
            "clock",
            "paper: clean / robust, speedup",
        ]
        drawn = axes.table(cells, colLabels=columns, loc="center", cellLoc="right", colLoc="right")
        drawn.auto_set_font_size(False)
        drawn.set_fontsize(9)
        drawn.auto_set_column_width(range(len(columns)))
        drawn.scale(1, 1.4)
        return figure

    return picture


def _cells(found: Findings, method: str, baseline: str, paper: Row) -> list[str]:
    robust = found.values(method, "robust")
    theory = found.values(method, "theoretical_speedup")
    fractions = [entry.get("fractions") for entry in (s["methods"][method] for s in found.summaries)]
    shares = "1 / 0 / 0"
    if fractions[0]:
        means = (sum(f[g] for f in fractions) / len(fractions) for g in ("boundary", "robust", "outlier"))
        shares = " / ".join(f"{share:.2f}".lstrip("0") for share in means)
    clean, reported, speedup = paper
    return [
        found.label(method),
        f"{100 * found.mean(method, 'clean'):.1f} %",
        f"{100 * found.mean(method, 'robust'):.1f} % ({', '.join(f'{100 * r:.1f}' for r in robust)})",
        shares,
        "-" if None in theory else f"{sum(theory) / len(theory):.2f}x",
        f"{found.clock(method, baseline):.2f}x",
        f"{'' if clean is None else f'{clean:.1f} / '}{reported:.1f} %, {speedup}",
    ]


def _caption(found: Findings) -> str:
    config = found.config
    images = config["train_size"] or "all"
    seeds = len(found.summaries)
    return (
        f"{found.title}\n{config['data']}, {images} images, {config['model']}, {config['epochs']} epochs, "
        f"{seeds} seed{'s' if seeds > 1 else ''} (scale: {found.scale})"
    )


def _scatter(found: Findings) -> Figure:
    figure, axes = plt.subplots(figsize=(7, 4.8), layout="constrained")
    for name, methods, colour in (
        ("multi-step FAST", FAST_METHODS, "#1f77b4"),
        ("BulletTrain", BULLET_METHODS, "#d62728"),
    ):
        speed = [found.mean(m, "theoretical_speedup") for m in methods]
        for measure, line in (("robust", "o-"), ("clean", "o:")):
            percent = [100 * found.mean(m, measure) for m in methods]
            axes.plot(speed, percent, line, color=colour, label=f"TRADES + {name}: {measure}")
    axes.set(xlabel="theoretical speedup over TRADES", ylabel="accuracy (%)")
    axes.set_title(_caption(found), fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _of(base: RunConfig, reported: Mapping[str, Row], **changes: Any) -> RunConfig:
    return dataclasses.replace(base, methods=tuple(reported), **changes)


_AUGMIX: dict[str, Any] = {"loss": "augmix", "boundary_steps": 1, "robust_steps": 0, "outlier_steps": 0}

TABLE1 = Study(
    "table1",
    "Table 1: AugMix, without its divergence, and with BulletTrain; accuracy under fifteen corruptions",
    _of(LAPTOP, AUGMIX_METHODS, **_AUGMIX),
    _of(PAPER, AUGMIX_METHODS, **_AUGMIX, model="wrn-40-2", epochs=100, decay_epochs=(50, 75), weight_decay=5e-4),
    _as_table("optimised", AUGMIX_METHODS),
    _against("optimised", AUGMIX_METHODS),
    corruptions=True,
)
TABLE2 = Study(
    "table2",
    "Table 2: TRADES with FAST, YOPO and BulletTrain",
    _of(LAPTOP, TRADES_METHODS),
    _of(PAPER, TRADES_METHODS),
    _as_table("reference", TRADES_METHODS),
    _against("reference", TRADES_METHODS),
)
TABLE3 = Study(
    "table3",
    "Table 3: MART with FAST and BulletTrain",
    _of(LAPTOP, MART_METHODS, loss="mart", lr=0.02),  # at 0.03 one of four diverged
    _of(PAPER, MART_METHODS, loss="mart"),
    _as_table("reference", MART_METHODS),
    _against("reference", MART_METHODS),
)
TABLE4 = Study(
    "table4",
    "Table 4: TRADES with multi-step FAST (N = 2 to 5) against BulletTrain (N_B = 3 to 6, N_R = 2, γ = 0.75)",
    _of(LAPTOP, FAST_METHODS | BULLET_METHODS),
    _of(PAPER, FAST_METHODS | BULLET_METHODS),
    _scatter,
    _fast_against_bullet,
)
TABLES: Sequence[Study] = (TABLE1, TABLE2, TABLE3, TABLE4)
