"""Shared parts of the benchmarks: a description of the machine in each result, and alternating rounds of the variants.

`pytest benchmarks` takes 4 to 5 minutes on 2 cores: it runs the cases that are not marked `full`, in at most
QUICK_ROUNDS rounds. `pytest benchmarks --full` runs all cases in all rounds, like the stored results.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest
import torch

from bt_fast import PowerMonitor
from bt_fast.device import synchronize
from bt_fast.lab.report import machine

QUICK_ROUNDS = 5
COLUMNS = ["min", "median", "rounds"]  # of the final table; not in pyproject.toml, since pytest may lack the plugin
ENERGY_SECONDS = 2.0  # for each variant


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="all benchmarks, in all their rounds: takes hours on a CPU")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: only with --full")
    if not any(argument.startswith("--benchmark-columns") for argument in config.invocation_params.args):
        config.option.benchmark_columns = COLUMNS


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def quick_and_full(quick: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """Returns cases, or their names, as a test's parameters: those that are not quick run only with --full."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.full) for case in cases]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def interleaved(
    benchmark: Any, device: torch.device, request: pytest.FixtureRequest
) -> Callable[..., dict[str, list[float]]]:
    """Times variants in alternation: one benchmark round prepares and runs each of them once, in rotating order.

    Returns each variant's seconds by round, so that ratios can be taken pair by pair. The result file holds them as
    `seconds`, for `benchmarks.compare`, and the joules of an iteration of each variant.
    """

    def run(
        variants: dict[str, Callable[[], object]], prepare: Callable[[str], object], rounds: int
    ) -> dict[str, list[float]]:
        names = list(variants)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        if not request.config.getoption("--full"):
            rounds = min(rounds, QUICK_ROUNDS)

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
        taken = {name: times[-rounds:] for name, times in seconds.items()}
        benchmark.extra_info.update(machine(device), seconds=taken)
        if benchmark.enabled:
            benchmark.extra_info.update(energy(variants, prepare, device))
        return taken

    return run


def energy(
    variants: dict[str, Callable[[], object]], prepare: Callable[[str], object], device: torch.device
) -> dict[str, Any]:
    """Returns the GPU's joules for a prepared iteration of each variant, or None with the reason if it reports none.

    Measures outside the timed rounds, which reading the GPU would disturb, and long enough for many ticks of its
    counter.
    """
    calls = dict.fromkeys(variants, 0)
    with PowerMonitor(device) as monitor:
        for name in variants if monitor.available else ():
            monitor.mark(name)
            end = time.monotonic() + ENERGY_SECONDS
            while not calls[name] or time.monotonic() < end:
                prepare(name)
                variants[name]()
                synchronize(device)
                calls[name] += 1
    joules = {name: monitor.joules_per_sample(calls[name], name) for name in monitor.labels}
    lost = [s.lost for s in monitor.summary() if s.lost]
    return {"joules": joules or None, "joules_reason": monitor.reason or ", ".join(lost) or None}


def report(benchmark: Any, title: str, info: dict[str, Any]) -> None:
    """Writes the results into the result file and prints them."""
    benchmark.extra_info.update(info)
    print(f"\n{title}, {benchmark.extra_info['processor']}")
    for key, value in info.items():
        print(f"  {key:<28} {value}")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Records the kind of machine in the result file, without its owner's names."""
    machine_info.pop("node", None)
