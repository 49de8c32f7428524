"""Measures the time per sample of a TRADES iteration with BulletTrain against the batch size.

python -m pytest benchmarks/test_batch_size.py --full -s --benchmark-json benchmarks/results/batch-size.json
"""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import pytest
import torch
from conftest import quick_and_full, report
from test_training_iteration import CASES, Workload

SIZES = (32, 64, 128, 256, 512)
ROUNDS = {"small-cnn": 15, "wrn-16-2": 5}


@pytest.mark.parametrize("variant", ["bullet", "bullet, bf16"])
@pytest.mark.parametrize("name", quick_and_full(["small-cnn"], ROUNDS))
def test_time_per_sample(name: str, variant: str, interleaved: Any, benchmark: Any, device: torch.device) -> None:
    workloads = {m: Workload(dataclasses.replace(CASES[name], batch=m), device) for m in SIZES}
    work = {str(m): workload.variants()[variant] for m, workload in workloads.items()}

    seconds = interleaved(work, lambda m: workloads[int(m)].prepare(), rounds=ROUNDS[name])
    each = {m: 1e3 * statistics.median(seconds[str(m)]) / m for m in SIZES}
    middle = statistics.median(each.values())
    info = {
        f"m = {m}": f"{ms:.3f} ms a sample, {100 * (ms / middle - 1):+.0f} % of the median" for m, ms in each.items()
    }
    report(benchmark, f"{name}, {variant}", info)
