"""What every benchmark shares: the machine in each result, and rounds in which the compared variants alternate."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bt_fast import PowerMonitor
from bt_fast.device import synchronize
from bt_fast.lab.report import machine


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def interleaved(benchmark: Any, device: torch.device) -> Callable[..., dict[str, list[float]]]:
    """Time variants in alternation: one benchmark round runs each of them once, in rotating order, prepared by name.

    Returns each variant's seconds by round, so that ratios can be taken pair by pair.
    """

    def run(
        variants: dict[str, Callable[[], object]], prepare: Callable[[str], object], rounds: int
    ) -> dict[str, list[float]]:
        names = list(variants)
        seconds: dict[str, list[float]] = {name: [] for name in names}

        def one_round() -> None:
            turn = len(seconds[names[0]]) % len(names)
            for name in names[turn:] + names[:turn]:
                prepare(name)
                synchronize(device)
                start = time.perf_counter()
                variants[name]()
                synchronize(device)
                seconds[name].append(time.perf_counter() - start)

        gc.collect()
        benchmark.pedantic(one_round, rounds=rounds, iterations=1, warmup_rounds=1)
        benchmark.extra_info.update(machine(device))
        return {name: times[-rounds:] for name, times in seconds.items()}

    return run


@pytest.fixture
def power(benchmark: Any, device: torch.device) -> Iterator[PowerMonitor]:
    """Put the GPU's joules during the test, warm-up included, into its result: None, and why, where they are not told.

    A test that calls `power.mark(name)` has the joules of its spans there, too.
    """
    with PowerMonitor(device) as monitor:
        yield monitor
    benchmark.extra_info["joules"] = monitor.joules()
    benchmark.extra_info["joules_by_span"] = {name: monitor.joules(name) for name in monitor.labels}
    benchmark.extra_info["joules_over_seconds"] = monitor.seconds
    lost = [s.lost for s in monitor.summary() if s.lost]
    benchmark.extra_info["joules_reason"] = monitor.reason or ", ".join(lost) or None


def median_ratio(slower: list[float], faster: list[float]) -> float:
    """The median of the pairwise ratios."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


def report(benchmark: Any, title: str, info: dict[str, Any]) -> None:
    """Put the findings into the result file, and print them."""
    benchmark.extra_info.update(info)
    print(f"\n{title}, {benchmark.extra_info['processor']}")
    for key, value in info.items():
        print(f"  {key:<28} {value}")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """A result file says what it was measured on, not whose machine that was."""
    machine_info.pop("node", None)
