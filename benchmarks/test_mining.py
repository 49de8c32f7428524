"""Measures mining: from clean logits to an order and its counts.

Its time against the batch m and against the classes K, its launches, and its share of a training iteration of the
SmallCNN at batch 128. To record:

python -m pytest benchmarks/test_mining.py --full --benchmark-json benchmarks/results/mining.json
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from conftest import quick_and_full, report
from launches import launches
from test_training_iteration import CASES, Workload

from benchmarks.work_ratio import work_ratio
from bt_fast import BulletTrain, ops
from bt_fast.ops.assign_steps import assign_reference

SIZES = [128, 2**10, 2**14, 2**17, 2**20]
CLASSES = [10, 100, 1000]
MOST_LOGITS = 2**24  # of a batch: 64 MiB
MOST_SHARE = 0.01  # of a training iteration


class Batch:
    """Clean logits and labels at the paper's F_R, and their mining."""

    def __init__(self, m: int, device: torch.device, classes: int = 10) -> None:
        torch.manual_seed(0)
        self.logits = torch.randn(m, classes, device=device)
        self.labels = self.logits.argmax(dim=1)
        self.labels[: m // 5] = 0
        self.bullet = BulletTrain(10, 2, 0).to(device)
        self.bullet.robust_fraction.fill_(0.54)

    def mine(self) -> None:
        self.bullet.plan(self.logits, self.labels)

    def eager(self) -> None:
        """Runs the assignment in plain torch, after the signed variance."""
        svar, correct, *_ = ops.signed_variance(self.logits, self.labels)
        assign_reference(svar, correct, self.bullet.robust_fraction, (0, 10, 2), (0.0, 0.007, 0.02))


@pytest.mark.parametrize("classes", quick_and_full([10], CLASSES))
def test_time_against_m(classes: int, interleaved: Any, benchmark: Any, device: torch.device) -> None:
    batches = {m: Batch(m, device, classes) for m in SIZES if m * classes <= MOST_LOGITS}
    seconds = interleaved({str(m): batch.mine for m, batch in batches.items()}, lambda _: None, rounds=9)
    first, last = min(batches), max(batches)
    allowed = last * math.log(last) / (first * math.log(first))
    info, growth = grown(seconds, "m")
    info["growth"] = f"{growth:.0f}x from {first} to {last}; m log m grows {allowed:.0f}x"
    names = launches(batches[first].mine)
    info |= {"launched": ", ".join(names), "launches": len(names)}
    info["launches in plain torch"] = len(launches(batches[first].eager))
    report(benchmark, f"mining, K = {classes}", info)
    if benchmark.enabled:
        assert growth <= allowed


@pytest.mark.parametrize("m", quick_and_full([128], [128, 2**14]))
def test_time_against_classes(m: int, interleaved: Any, benchmark: Any, device: torch.device) -> None:
    batches = {classes: Batch(m, device, classes) for classes in CLASSES}
    seconds = interleaved({str(k): batch.mine for k, batch in batches.items()}, lambda _: None, rounds=25)
    allowed = CLASSES[-1] / CLASSES[0]
    info, growth = grown(seconds, "K")
    info["growth"] = f"{growth:.1f}x from {CLASSES[0]} to {CLASSES[-1]}; K grows {allowed:.0f}x"
    report(benchmark, f"mining, m = {m}", info)
    if benchmark.enabled:
        assert growth <= allowed


def grown(seconds: dict[str, list[float]], what: str) -> tuple[dict[str, Any], float]:
    """Returns the medians in ms, by the size in a variant's name, and the last over the first."""
    medians = {size: statistics.median(times) for size, times in seconds.items()}
    first, *_, last = medians.values()
    return {f"{what} = {size}: ms": round(1e3 * t, 3) for size, t in medians.items()}, last / first


@pytest.mark.parametrize("name", ["small-cnn"])
def test_share_of_an_iteration(name: str, interleaved: Any, benchmark: Any, device: torch.device) -> None:
    workload, batch = Workload(CASES[name], device), Batch(CASES[name].batch, device)
    work = {"mining": batch.mine, "iteration": workload.variants()["bullet"]}
    seconds = interleaved(work, lambda _: workload.prepare(), rounds=15)
    share = work_ratio(("mining", "iteration"), work, lambda _: workload.prepare(), seconds, device)
    info = {f"{variant}: ms": round(1e3 * statistics.median(times), 3) for variant, times in seconds.items()}
    report(benchmark, f"{name}, batch {CASES[name].batch}", info | {"share": f"{100 * share:.2f} %"})
    if benchmark.enabled:
        assert share <= MOST_SHARE
