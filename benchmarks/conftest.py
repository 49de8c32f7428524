"""What every benchmark shares: the machine in each result, and rounds in which the compared variants alternate.

`pytest benchmarks` takes 4 to 5 minutes on 2 cores: the cases that are not marked `full`, in at most
QUICK_ROUNDS rounds. `pytest benchmarks --full` takes all of them, in all their rounds, as the stored results were.
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
COLUMNS = ["min", "median", "rounds"]  # of the table at the end; not in pyproject.toml, for pytest without its plugins
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
    """Cases, or their names, as a test's parameters: those that are not quick only with --full."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.full) for case in cases]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def interleaved(
    benchmark: Any, device: torch.device, request: pytest.FixtureRequest
) -> Callable[..., dict[str, list[float]]]:
    """Time variants in alternation: one benchmark round runs each of them once, in rotating order, prepared by name.

    Returns each variant's seconds by round, so that ratios can be taken pair by pair. The result file has them as
    `seconds`, for `benchmarks.compare`, and the joules of an iteration of each.
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
    """The GPU's joules for each variant's iteration with its preparation; None, and why, where it does not report them.

    Apart from the timed rounds, which reading the GPU would disturb, and for long enough that its counter moves often.
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
    """Put the findings into the result file, and print them."""
    benchmark.extra_info.update(info)
    print(f"\n{title}, {benchmark.extra_info['processor']}")
    for key, value in info.items():
        print(f"  {key:<28} {value}")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """A result file says what it was measured on, not whose machine that was."""
    machine_info.pop("node", None)
