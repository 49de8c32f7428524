"""One training iteration of TRADES: its authors' computation, ours with the same result, and with BulletTrain.

At the paper's fractions (.28 / .54 / .18, with 10 / 2 / 0 steps). Speedups are medians of the ratios of interleaved
pairs; each is also given as a share of the FLOP limit, the ratio of the operations counted. "frozen" and "bf16" are the
engineering of fast-pytorch-adversarial-training (an attack on a folded, channels-last view without parameter gradients,
in half precision or not), here with and without BulletTrain. Peak memory is what an iteration holds at its worst beside
weights, momentum, images and the view's copy of the weights, as torch allocated it. To record:

python -m pytest benchmarks/test_training_iteration.py -s --benchmark-json benchmarks/results/training-iteration.json
"""

from __future__ import annotations

import copy
import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pytest
import torch
from conftest import median_ratio, report
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bt_fast import Frozen, Update, trades_loss
from bt_fast.baselines.trades_reference import trades_reference_loss
from bt_fast.lab import gpu_prediction

SETTING = {"step_size": 0.007, "epsilon": 0.031, "beta": 6.0}
BASELINES = ("reference", "optimised")
VIEWS = {"frozen": Frozen(), "bf16": Frozen(autocast=torch.bfloat16), "compiled": Frozen(compile=True)}


@dataclass(frozen=True)
class Case:
    """A network, the batch, and how often it is timed."""

    model: str
    batch: int
    rounds: int


CASES = {
    "small-cnn": Case("small-cnn", 128, 15),
    "wrn-16-2": Case("wrn-16-2", 128, 5),
    "wrn-28-4": Case("wrn-28-4", 64, 2),
}


class Workload(gpu_prediction.Workload):
    """A model and a minibatch whose groups have the paper's sizes at every call of `prepare`."""

    def __init__(self, case: Case, device: torch.device) -> None:
        torch.manual_seed(0)
        super().__init__(case.model, case.batch, device)
        _set_statistics(self.model, self.x)

    def variants(self) -> dict[str, Callable[[], None]]:
        skip = {"bullet": self.bullet, "unperturbed": "skip"}
        views = {name: {"frozen": view, "update": Update()} for name, view in VIEWS.items()}
        options = {
            "optimised": {},
            **{f"optimised, {name}": views[name] for name in ("frozen", "bf16")},
            "bullet, keep": {**skip, "unperturbed": "keep"},
            "bullet": skip,
            **{f"bullet, {name}": {**skip, **view} for name, view in views.items()},
        }
        ours = {name: functools.partial(self._iterate, trades_loss, **given) for name, given in options.items()}
        return {"reference": functools.partial(self._iterate, trades_reference_loss), **ours}

    def _iterate(self, loss_of: Callable[..., torch.Tensor], **options: Any) -> None:
        loss_of(self.model, self.x, self.y, self.optimizer, **SETTING, **options).backward()
        self.optimizer.step()


@torch.no_grad()
def _set_statistics(model: torch.nn.Module, x: torch.Tensor) -> None:
    """Batch norm's statistics as of these images: with the initial ones a deep network's logits are saturated."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(x)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum


def check_exactness(workload: Workload) -> None:
    """No speedup is reported of a path whose result differs from the reference's."""
    results = []
    for loss_of in (trades_reference_loss, trades_loss):
        model = copy.deepcopy(workload.model).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(1)
        loss = loss_of(model, workload.x[:4].double(), workload.y[:4], optimizer, **SETTING)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters()), *model.buffers()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


class FlopCounter(TorchDispatchMode):
    """torch's own formulas, without the module hooks of its FlopCounterMode, which break `autograd.grad` on a leaf."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def count_flops(work: Callable[[], None]) -> int:
    with FlopCounter() as counter:
        work()
    return counter.total


def peak_bytes(work: Callable[[], None]) -> int:
    """The most that `work` holds at a time of what torch allocates for it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@pytest.mark.parametrize("name", CASES)
def test_trades_iteration(name: str, interleaved: Any, benchmark: Any, device: torch.device) -> None:
    workload = Workload(CASES[name], device)
    workload.prepare()
    check_exactness(workload)
    variants = workload.variants()
    flops, peaks = {}, {}
    for variant, work in variants.items():
        workload.prepare()
        work()  # a view is traced, and compiled, at its first use
        workload.prepare()
        workload.optimizer.zero_grad()
        with FlopCounter() as counter:
            peaks[variant] = peak_bytes(work)
        # what is compiled hides its operations
        flops[variant] = counter.total if "compiled" not in variant else flops[variant.replace("compiled", "frozen")]
    workload.bullet.reset_fractions()
    seconds = interleaved(variants, lambda _: workload.prepare(), rounds=CASES[name].rounds)

    fractions = workload.bullet.fractions
    info = {"fractions (B/R/O)": f"{fractions.boundary:.3f} / {fractions.robust:.3f} / {fractions.outlier:.3f}"}
    for variant, times in seconds.items():
        ratios = []
        for slower in BASELINES:
            speedup, limit = median_ratio(seconds[slower], times), flops[slower] / flops[variant]
            ratios.append(f"{speedup:.2f}x over {slower} ({speedup / limit:.2f} of the FLOP limit {limit:.2f}x)")
        info[variant] = (
            f"{1e3 * statistics.median(times):.1f} ms, {flops[variant] / 1e9:.1f} GFLOP, "
            f"peak {peaks[variant] / 2**20:.0f} MiB; {', '.join(ratios)}"
        )
    report(benchmark, f"{name}, batch {CASES[name].batch}", info)
