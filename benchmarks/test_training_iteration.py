"""One training iteration of TRADES: its authors' computation, ours with the same result, and with BulletTrain.

At the paper's fractions (.28 / .54 / .18, with 10 / 2 / 0 steps) and batch 128. Speedups are medians of the ratios of
interleaved pairs; each is also given as a share of the FLOP limit, the ratio of the operations counted.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import median_ratio
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bt_fast import BulletTrain, Frozen, trades_loss
from bt_fast.attack.frozen import clean_logits, eval_mode
from bt_fast.baselines.trades_reference import trades_reference_loss
from bt_fast.lab.models import build_model

BATCH = 128
OUTLIERS, ROBUST_FRACTION = round(0.18 * BATCH), 0.54
SETTING = {"step_size": 0.007, "epsilon": 0.031, "beta": 6.0}
MODELS = {"small-cnn": (1, 28), "wrn-16-2": (3, 32)}  # channels and size of the images
ROUNDS = {"small-cnn": 15, "wrn-16-2": 5}


class Workload:
    """A model and a minibatch whose groups have the paper's sizes at every call of `prepare`."""

    def __init__(self, name: str, device: torch.device) -> None:
        torch.manual_seed(0)
        channels, size = MODELS[name]
        self.model = build_model(name, in_channels=channels, image_size=size, num_classes=10).to(device)
        last = list(self.model.modules())[-1]
        torch.nn.init.normal_(last.weight, std=0.3)  # SmallCNN starts with logits that are all 0
        self.x = torch.rand(BATCH, channels, size, size, device=device)
        self.y = torch.zeros(BATCH, dtype=torch.int64, device=device)
        # lr = 0: the optimiser's work is timed, the weights stay
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0, momentum=0.9, weight_decay=2e-4)
        self.bullet = BulletTrain(10, 2, 0).to(device)

    def prepare(self) -> None:
        with eval_mode(self.model):
            self.y = clean_logits(self.model, self.x).argmax(dim=1)
        self.y[:OUTLIERS] = (self.y[:OUTLIERS] + 1) % 10
        self.bullet.robust_fraction.fill_(ROBUST_FRACTION)

    def variants(self) -> dict[str, Callable[[], None]]:
        return {
            "reference": lambda: self._finish(trades_reference_loss(*self._arguments(), **SETTING)),
            "optimised": lambda: self._finish(trades_loss(*self._arguments(), **SETTING)),
            "bullet, keep": lambda: self._finish(self._bullet("keep")),
            "bullet, skip": lambda: self._finish(self._bullet("skip")),
            "bullet, skip, frozen": lambda: self._finish(self._bullet("skip", Frozen())),
        }

    def _arguments(self) -> tuple[Any, ...]:
        return self.model, self.x, self.y, self.optimizer

    def _bullet(self, unperturbed: Any, frozen: Frozen | None = None) -> torch.Tensor:
        mode = {"bullet": self.bullet, "unperturbed": unperturbed, "frozen": frozen}
        return trades_loss(*self._arguments(), **SETTING, **mode)

    def _finish(self, loss: torch.Tensor) -> None:
        loss.backward()
        self.optimizer.step()


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


@pytest.mark.parametrize("name", MODELS)
def test_trades_iteration(name: str, interleaved: Any, benchmark: Any, device: torch.device) -> None:
    workload = Workload(name, device)
    workload.prepare()
    check_exactness(workload)
    variants = workload.variants()
    flops = {}
    for variant, work in variants.items():
        workload.prepare()
        flops[variant] = count_flops(work)
    workload.bullet.reset_fractions()
    seconds = interleaved(variants, workload.prepare, rounds=ROUNDS[name])

    fractions = workload.bullet.fractions
    info = {"fractions (B/R/O)": f"{fractions.boundary:.3f} / {fractions.robust:.3f} / {fractions.outlier:.3f}"}
    for variant, times in seconds.items():
        info[f"{variant}: ms"] = round(1e3 * statistics.median(times), 1)
        info[f"{variant}: GFLOP"] = round(flops[variant] / 1e9, 1)
    for slower, faster in (
        ("reference", "optimised"),
        *(
            (slower, f"bullet, {mode}")
            for slower in ("reference", "optimised")
            for mode in ("keep", "skip", "skip, frozen")
        ),
    ):
        speedup, limit = median_ratio(seconds[slower], seconds[faster]), flops[slower] / flops[faster]
        info[f"{faster} over {slower}"] = f"{speedup:.2f}x, {speedup / limit:.2f} of the FLOP limit {limit:.2f}x"
    benchmark.extra_info.update(info)
    print(f"\n{name}, batch {BATCH}, {benchmark.extra_info['processor']}")
    for key, value in info.items():
        print(f"  {key:<28} {value}")
