"""Measures the data path before an iteration's forward against the iteration, and the loading of the digits.

pytest benchmarks/test_data_path.py --full -s --benchmark-json benchmarks/results/data-path.json
"""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from conftest import quick_and_full, report
from test_training_iteration import CASES, Workload

from benchmarks.work_ratio import median_ratio
from bt_fast.lab.augment import crop_and_flip
from bt_fast.lab.data import images, load_dataset, minibatches
from bt_fast.lab.report import machine

EPOCH = 50_000  # images: as many as CIFAR's


class Batches:
    """Images in host memory and the batches of an epoch, as in the lab's training loop."""

    def __init__(self, shape: tuple[int, ...], size: int, device: torch.device) -> None:
        self.x = torch.randint(256, (EPOCH, *shape), dtype=torch.uint8)
        self.y = torch.randint(10, (EPOCH,))
        self.size, self.device, self.taken = size, device, 0
        self.rows = next(self.order())

    def order(self) -> Any:
        return minibatches(EPOCH, self.size, seed=0, epoch=self.taken)

    def floats(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns a batch on the device."""
        return images(self.x[self.rows], self.device), self.y[self.rows].to(self.device)

    def augmented(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the batch after cropping and flipping."""
        self.taken += 1
        x, y = self.floats()
        x, _ = crop_and_flip(x, seed=0, iteration=self.taken)
        return x, y


@pytest.mark.parametrize("name", quick_and_full(["small-cnn"], CASES))
def test_share_of_an_iteration(name: str, interleaved: Any, benchmark: Any, device: torch.device) -> None:
    workload = Workload(CASES[name], device)
    batches = Batches(tuple(workload.x.shape[1:]), CASES[name].batch, device)
    work = {
        "permutation of an epoch": lambda: next(batches.order()),
        "batch": batches.floats,
        "batch, cropped and flipped": batches.augmented,
        "iteration": workload.variants()["bullet"],
    }
    seconds = interleaved(work, lambda _: workload.prepare(), rounds=15)
    each = {variant: statistics.median(times) for variant, times in seconds.items()}
    info: dict[str, Any] = {f"{variant}: ms": round(1e3 * median, 3) for variant, median in each.items()}
    share = median_ratio(seconds["batch, cropped and flipped"], seconds["iteration"])
    share += each["permutation of an epoch"] / (EPOCH / CASES[name].batch) / each["iteration"]
    info["share of an iteration"] = f"{100 * share:.2f} %"
    report(benchmark, f"data of {name}, batch {CASES[name].batch}", info)


def test_loading_the_digits(benchmark: Any, device: torch.device) -> None:
    benchmark.pedantic(lambda: load_dataset("digits"), rounds=10, warmup_rounds=1)
    benchmark.extra_info.update(machine(device))
