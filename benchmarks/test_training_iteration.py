"""Measures one training iteration: the authors' computation, ours with the same result, and with BulletTrain.

The objectives are TRADES, MART and PGD at the paper's fractions for TRADES (.28 / .54 / .18, with 10 / 2 / 0 steps),
and AugMix at its .35 boundary samples; for AugMix the authors' computation is left out, since ours is the same at the
same cost. Speedups are medians of the ratios of interleaved pairs; each is also given as a share of the FLOP limit, the
ratio of the operations counted. The rows of the engines "fast" and "bf16" without BulletTrain are the engineering of
fast-pytorch-adversarial-training (an attack on a folded, channels-last view without parameter gradients). Peak memory
is the most that torch has allocated in an iteration besides weights, momentum, images and the view's copy of the
weights. On CUDA the engines run without graphs, with graphs, and with streams. Inexact variants are not timed: ours
must give the reference's loss and gradients in float64, and with BulletTrain the engine "fast" the result of the exact
one. To record:

pytest benchmarks/test_training_iteration.py --full -s --benchmark-json benchmarks/results/training-iteration.json
"""

from __future__ import annotations

import copy
import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from conftest import quick_and_full, report
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks import gpu_prediction
from benchmarks.exactness import check_same
from benchmarks.gpu_prediction import STEPS
from benchmarks.work_ratio import median_ratio
from bt_fast import BulletTrain, Engine, augmix_loss, mart_loss, pgd_loss, trades_loss
from bt_fast.augment.mix import SEVERITY, augment_and_mix, draw_choices
from bt_fast.baselines.mart_reference import mart_reference_loss
from bt_fast.baselines.pgd_reference import pgd_reference_loss
from bt_fast.baselines.trades_reference import trades_reference_loss

SETTING = {"step_size": 0.007, "epsilon": 0.031}
AUGMIX_BOUNDARY = 0.35  # the paper's F_B for CIFAR-10
BASELINES = ("reference", "optimised")
LAUNCHES = {  # graphs exist only on CUDA
    "eager": {"graphs": False, "streams": False},
    **({"graphs": {"graphs": True, "streams": False}} if torch.cuda.is_available() else {}),
    **({"streams": {"graphs": True, "streams": True}} if torch.cuda.is_available() else {}),
}


@dataclass(frozen=True)
class Case:
    """A network, the batch size, and the number of timings."""

    model: str
    batch: int
    rounds: int


@dataclass(frozen=True)
class Objective:
    """The authors' loss, ours, and their arguments; and whether samples without steps can be left out."""

    reference: Callable[..., torch.Tensor]
    ours: Callable[..., torch.Tensor]
    options: dict[str, Any]
    robust_term: bool


TRADES = Objective(trades_reference_loss, trades_loss, {**SETTING, "beta": 6.0}, True)
OBJECTIVES = {
    "trades": TRADES,
    "mart": Objective(mart_reference_loss, mart_loss, {**SETTING, "beta": 6.0}, True),
    "pgd": Objective(pgd_reference_loss, pgd_loss, SETTING, False),
}
CASES = {
    "small-cnn": Case("small-cnn", 128, 15),
    "wrn-16-2": Case("wrn-16-2", 128, 5),
    "wrn-28-4": Case("wrn-28-4", 64, 2),
}


class Workload(gpu_prediction.Workload):
    """A model and a minibatch; every call of `prepare` gives its groups the paper's sizes.

    Attributes:
        bullet: BulletTrain that leaves samples without steps out of the adversarial forward.
        keeping: BulletTrain that does not.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        torch.manual_seed(0)
        super().__init__(case.model, case.batch, device)
        self.bullet = BulletTrain(*STEPS, unperturbed="skip").to(device)
        self.keeping = BulletTrain(*STEPS, unperturbed="keep").to(device)
        _set_statistics(self.model, self.x)

    def prepare(self) -> None:
        super().prepare()
        self.keeping.robust_fraction.copy_(self.bullet.robust_fraction)

    def mining(self, objective: Objective) -> BulletTrain:
        """Returns the fastest BulletTrain that the objective accepts."""
        return self.bullet if objective.robust_term else self.keeping

    def variants(self, objective: Objective = TRADES, launch: str = "eager") -> dict[str, Callable[[], None]]:
        bullet = self.mining(objective)
        exact, fast, bf16 = (engine_of(name, launch) for name in ("exact", "fast", "bf16"))
        options: dict[str, dict[str, Any]] = {
            "optimised": {"engine": exact},
            "optimised, fast": {"engine": fast},
            "optimised, bf16": {"engine": bf16},
            **({"bullet, keep": {"bullet": self.keeping, "engine": exact}} if objective.robust_term else {}),
            "bullet": {"bullet": bullet, "engine": exact},
            "bullet, fast": {"bullet": bullet, "engine": fast},
            "bullet, bf16": {"bullet": bullet, "engine": bf16},
        }
        if objective is TRADES:  # compiling takes longer than all else, and gains the same for every objective
            options["bullet, fast, compiled"] = {"bullet": bullet, "engine": replace(fast, compile=True)}
        run = functools.partial(functools.partial, self._iterate)
        ours = {name: run(objective.ours, **objective.options, **chosen) for name, chosen in options.items()}
        return {"reference": run(objective.reference, **objective.options), **ours}

    def _iterate(self, loss_of: Callable[..., torch.Tensor], **options: Any) -> None:
        loss_of(self.model, self.x, self.y, self.optimizer, **options).backward()
        self.optimizer.step()


def engine_of(name: str, launch: str) -> Engine:
    """Returns the engine of this name, with graphs and streams as in `LAUNCHES`."""
    return replace(Engine.of(name), **LAUNCHES[launch])


@torch.no_grad()
def _set_statistics(model: torch.nn.Module, x: torch.Tensor) -> None:
    """Sets batch norm's statistics from these images: with the initial ones a deep network's logits are saturated."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(x)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum


def check_exactness(workload: Workload, objective: Objective = TRADES, launch: str = "eager") -> None:
    """Checks that a path gives the reference's result; otherwise no speedup is reported.

    With BulletTrain, which draws differently, the reference is the engine "exact", step by step.
    """
    ours = functools.partial(objective.ours, engine=engine_of("exact", launch))
    faster = functools.partial(objective.ours, engine=engine_of("fast", launch))
    batch = workload.model, workload.x[:4], workload.y[:4]
    check_same(*batch, [objective.reference, ours, faster], objective.options)
    check_same(*batch, [objective.ours, ours, faster], {**objective.options, "bullet": workload.mining(objective)})


class FlopCounter(TorchDispatchMode):
    """Counts FLOPs by torch's formulas; FlopCounterMode's module hooks would break `autograd.grad` on a leaf."""

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
    """Returns the most memory that torch holds at a time for `work`."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("loss", OBJECTIVES)
@pytest.mark.parametrize("name", quick_and_full(["small-cnn"], CASES))
def test_iteration(name: str, loss: str, launch: str, interleaved: Any, benchmark: Any, device: torch.device) -> None:
    workload = Workload(CASES[name], device)
    workload.prepare()
    check_exactness(workload, OBJECTIVES[loss], launch)
    variants = workload.variants(OBJECTIVES[loss], launch)
    flops, peaks = costs(variants, workload.variants(OBJECTIVES[loss]), workload, workload.prepare)
    bullet = workload.mining(OBJECTIVES[loss])
    bullet.reset_fractions()
    seconds = interleaved(variants, lambda _: workload.prepare(), rounds=CASES[name].rounds)
    fractions = bullet.fractions
    info = {"fractions (B/R/O)": f"{fractions.boundary:.3f} / {fractions.robust:.3f} / {fractions.outlier:.3f}"}
    info |= compared(seconds, flops, peaks, BASELINES)
    benchmark.extra_info.update({"flops": flops, "peak bytes": peaks})
    report(benchmark, f"{loss}, {name}, batch {CASES[name].batch}, {launch}", info)


def check_augmix(workload: Workload) -> None:
    """Checks that the loss without BulletTrain equals the authors' on the same views."""
    model, x, y = copy.deepcopy(workload.model).double(), workload.x[:4].double(), workload.y[:4]
    first, second = (torch.Generator(x.device).manual_seed(1) for _ in range(2))
    result = augmix_loss(copy.deepcopy(model), x, y, generator=first)
    views = augment_and_mix(x.repeat(2, 1, 1, 1), draw_choices(8, x.device, severity=SEVERITY, generator=second))
    torch.manual_seed(0)
    logits = model.train()(torch.cat([x, views]))
    clean, *others = logits.softmax(dim=1).split(4)
    mixture = ((clean + sum(others)) / 3).clamp(1e-7, 1).log()
    kl = functools.partial(torch.nn.functional.kl_div, mixture, reduction="batchmean")
    expected = torch.nn.functional.cross_entropy(logits[:4], y) + 12 * sum(map(kl, (clean, *others))) / 3
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", quick_and_full(["small-cnn"], CASES))
def test_augmix_iteration(name: str, interleaved: Any, benchmark: Any, device: torch.device) -> None:
    workload = Workload(CASES[name], device)
    for module in workload.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # the check compares two forwards
    bullet = BulletTrain(1, 0, 0).to(device)

    def prepare() -> None:
        workload.prepare()
        bullet.robust_fraction.fill_(1.0 - AUGMIX_BOUNDARY - workload.outliers / len(workload.y))

    def iterate(**options: Any) -> Callable[[], None]:
        def run() -> None:
            workload.optimizer.zero_grad()
            augmix_loss(workload.model, workload.x, workload.y, **options).backward()
            workload.optimizer.step()

        return run

    prepare()
    check_augmix(workload)
    variants = {"optimised": iterate(), "no-jsd": iterate(jsd=False), "bullet": iterate(bullet=bullet)}
    flops, peaks = costs(variants, variants, workload, prepare)
    bullet.reset_fractions()
    seconds = interleaved(variants, lambda _: prepare(), rounds=CASES[name].rounds)
    info = {"boundary": f"{bullet.fractions.boundary:.3f}", "theory": f"{bullet.theoretical_speedup_augmix():.2f}x"}
    info |= compared(seconds, flops, peaks, ("optimised",))
    benchmark.extra_info.update({"flops": flops, "peak bytes": peaks})
    report(benchmark, f"augmix, {name}, batch {CASES[name].batch}", info)


def costs(
    variants: dict[str, Callable[[], None]],
    eager: dict[str, Callable[[], None]],
    workload: Workload,
    prepare: Callable[[], None],
) -> tuple[dict[str, int], dict[str, int]]:
    """Returns each variant's FLOPs, run step by step (graphs hide their operations), and its peak bytes as it is."""
    flops, peaks = {}, {}
    for variant, work in variants.items():
        prepare()
        work()  # a view is traced and compiled at its first use
        prepare()
        workload.optimizer.zero_grad()
        peaks[variant] = peak_bytes(work)
        prepare()
        # compiled code also hides its operations
        flops[variant] = count_flops(eager[variant.removesuffix(", compiled")])
    return flops, peaks


def compared(
    seconds: dict[str, list[float]], flops: dict[str, int], peaks: dict[str, int], baselines: tuple[str, ...]
) -> dict[str, str]:
    """Compares each variant with the baselines, also as a share of the FLOP limit."""
    result = {}
    for variant, times in seconds.items():
        ratios = []
        for slower in baselines:
            speedup, limit = median_ratio(seconds[slower], times), flops[slower] / flops[variant]
            ratios.append(f"{speedup:.2f}x over {slower} ({speedup / limit:.2f} of the FLOP limit {limit:.2f}x)")
        result[variant] = (
            f"{1e3 * statistics.median(times):.1f} ms, {flops[variant] / 1e9:.1f} GFLOP, "
            f"peak {peaks[variant] / 2**20:.0f} MiB; {', '.join(ratios)}"
        )
    return result
