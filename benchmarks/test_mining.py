"""Mining: from clean logits to an order and its counts.

Its time against m, its launches, and its share of a training iteration of the SmallCNN at batch 128. To record:

python -m pytest benchmarks/test_mining.py --full --benchmark-json benchmarks/results/mining.json
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from conftest import median_ratio, report
from launches import launches
from test_training_iteration import CASES, Workload

from bt_fast import BulletTrain, ops
from bt_fast.ops.assign_steps import assign_reference

CLASSES = 10
SIZES = [128, 2**10, 2**14, 2**17, 2**20]
MOST_SHARE = 0.01  # of a training iteration


class Batch:
    """Clean logits and labels at the paper's F_R, and the mining of them."""

    def __init__(self, m: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.logits = torch.randn(m, CLASSES, device=device)
        self.labels = self.logits.argmax(dim=1)
        self.labels[: m // 5] = 0
        self.bullet = BulletTrain(10, 2, 0).to(device)
        self.bullet.robust_fraction.fill_(0.54)

    def mine(self) -> None:
        self.bullet.assign(self.logits, self.labels)

    def eager(self) -> None:
        """The assignment in plain torch, after the signed variance."""
        svar, correct, *_ = ops.signed_variance(self.logits, self.labels)
        assign_reference(svar, correct, self.bullet.robust_fraction, (0, 10, 2), (0.0, 0.007, 0.02))


def test_time_against_m(interleaved: Any, benchmark: Any, device: torch.device) -> None:
    batches = {m: Batch(m, device) for m in SIZES}
    seconds = interleaved({str(m): batch.mine for m, batch in batches.items()}, lambda _: None, rounds=9)
    median = {m: statistics.median(seconds[str(m)]) for m in SIZES}
    first, last = SIZES[0], SIZES[-1]
    allowed = last * math.log(last) / (first * math.log(first))
    info = {f"m = {m}: ms": round(1e3 * t, 3) for m, t in median.items()}
    info["growth"] = f"{median[last] / median[first]:.0f}x from {first} to {last}; m log m grows {allowed:.0f}x"
    names = launches(batches[first].mine)
    info |= {"launched": ", ".join(names), "launches": len(names)}
    info["launches in plain torch"] = len(launches(batches[first].eager))
    report(benchmark, "mining", info)
    if benchmark.enabled:
        assert median[last] / median[first] <= allowed


@pytest.mark.parametrize("name", ["small-cnn"])
def test_share_of_an_iteration(name: str, interleaved: Any, benchmark: Any, device: torch.device) -> None:
    workload, batch = Workload(CASES[name], device), Batch(CASES[name].batch, device)
    work = {"mining": batch.mine, "iteration": workload.variants()["bullet"]}
    seconds = interleaved(work, lambda _: workload.prepare(), rounds=15)
    share = median_ratio(seconds["mining"], seconds["iteration"])
    info = {f"{variant}: ms": round(1e3 * statistics.median(times), 3) for variant, times in seconds.items()}
    report(benchmark, f"{name}, batch {CASES[name].batch}", info | {"share": f"{100 * share:.2f} %"})
    if benchmark.enabled:
        assert share <= MOST_SHARE
