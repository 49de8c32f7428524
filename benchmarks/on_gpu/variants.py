"""One TRADES iteration on a network and a minibatch: the authors', ours and BulletTrain, each executed in several ways.

The groups have the paper's sizes (gpu_prediction). A captured update has the memory format of the plain one, so that
the effect of the capture alone is seen; "fast" combines all that the package offers: a folded, channels-last view for
the attack, streams, and a captured channels-last update.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from test_training_iteration import Case, FlopCounter, Workload
from torch import Tensor

from benchmarks.engine_parts import trades_by
from benchmarks.exactness import ITERATIONS, same_noise
from bt_fast import BulletTrain, Frozen, GraphRunner, StreamRunner, Update
from bt_fast.attack.runners import run_eager
from bt_fast.baselines.trades_reference import trades_reference_loss

SETTING: dict[str, Any] = {"step_size": 0.007, "epsilon": 0.031, "beta": 6.0}
TOLERANCE = 1e-6  # of a float64 update, relative to the largest entry of each tensor or 1
CHECKED = 4  # images
FEW = (3, 1, 0)  # steps in a check and in a rehearsal: a graph is captured in the second and replayed in the third
RUNNERS: dict[str, Callable[[], Any]] = {"eager": lambda: run_eager, "graphs": GraphRunner, "streams": StreamRunner}


@dataclass(frozen=True)
class Variant:
    """A method ("reference", "optimised" or "bullet", as in gpu_prediction) and the way it is executed."""

    method: str
    runner: str = "eager"
    captured: bool = False
    fast: bool = False

    @property
    def name(self) -> str:
        """The name; without captures that of `gpu_prediction.LABELS`."""
        if self.fast:
            return f"{self.method}, fast"
        parts = [self.method, *([self.runner] if self.runner != "eager" else []), *(["captured"] * self.captured)]
        return ", ".join(parts)

    @property
    def parts(self) -> frozenset[str]:
        """The parts of the engine it uses beyond the eager loop; one of `VARIANTS` first uses each part alone."""
        if self.fast:
            return frozenset({"streams", "captured", "fast"})
        return frozenset({self.runner, *(["captured"] * self.captured)} - {"eager"})

    def loss_of(self, bullet: BulletTrain) -> Callable[..., Tensor]:
        """Returns the loss, with the authors' arguments and new runners."""
        if self.method == "reference":
            return trades_reference_loss
        mining = bullet if self.method == "bullet" else None
        if self.fast:
            return trades_by(StreamRunner(), view=Frozen(), update=Update(graphs=True), bullet=mining)
        update = Update(channels_last=False, graphs=True) if self.captured else None
        return trades_by(RUNNERS[self.runner](), update=update, bullet=mining)


# the most wanted first; without BulletTrain all samples are one chain, so streams equal graphs
VARIANTS = (
    Variant("reference"),
    Variant("optimised"),
    Variant("bullet"),
    Variant("bullet", "graphs"),
    Variant("bullet", "streams"),
    Variant("bullet", captured=True),
    Variant("bullet", "graphs", captured=True),
    Variant("bullet", "streams", captured=True),
    Variant("bullet", fast=True),
    Variant("optimised", "graphs"),
    Variant("optimised", captured=True),
    Variant("optimised", "graphs", captured=True),
    Variant("optimised", fast=True),
)
BY_NAME = {variant.name: variant for variant in VARIANTS}


def without(broken: Iterable[str]) -> list[Variant]:
    """Returns the variants except those with these names and those that use the same single part of the engine."""
    named = [BY_NAME[name] for name in broken]
    parts = [variant.parts for variant in named if len(variant.parts) == 1]
    return [v for v in VARIANTS if v not in named and not any(part <= v.parts for part in parts)]


def set_precision(precision: str) -> None:
    """Sets the precision of float32 products in this process: "tf32", or "float32" in full."""
    allowed = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


class Bench:
    """A network and a minibatch in one precision, and the iterations on them.

    Args:
        precision: "float32", "tf32" or "bfloat16" (autocast around the loss).
        tiny: three steps instead of ten, for a rehearsal.
    """

    def __init__(self, model: str, precision: str, batch: int, device: torch.device, *, tiny: bool = False) -> None:
        set_precision(precision)
        self.device, self.precision = device, precision
        self.setting = SETTING | {"perturb_steps": FEW[0]} if tiny else SETTING
        self.workload = Workload(Case(model, batch, 0), device)
        if tiny:
            self.workload.bullet = BulletTrain(*FEW).to(device)
        with self._autocast():  # the groups depend on labels that equal the loss's logits bit for bit
            self.workload.prepare()
        self._buffers = list(self.workload.model.buffers())
        self._kept = [buffer.clone() for buffer in self._buffers]
        self._fraction = self.workload.bullet.robust_fraction.clone()

    def ready(self) -> None:
        """Restores the initial state, which keeps the sizes of the groups. Never waits for the device."""
        torch._foreach_copy_(self._buffers, self._kept)
        self.workload.bullet.robust_fraction.copy_(self._fraction)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def groups(self) -> list[int]:
        """Returns BulletTrain's samples in all iterations so far: outlier, boundary, robust. Waits for the device."""
        result: list[int] = self.workload.bullet.group_counts.tolist()
        return result

    def iteration(self, variant: Variant) -> Callable[[], None]:
        """Returns one iteration: loss, backward and the optimizer's step."""
        w = self.workload
        loss_of = variant.loss_of(w.bullet)

        def run() -> None:
            with self._autocast():
                loss = loss_of(w.model, w.x, w.y, w.optimizer, **self.setting)
            loss.backward()
            w.optimizer.step()

        return run

    def flops(self, variant: Variant) -> int:
        """Returns the floating-point operations of a method's iteration, counted in an eager run."""
        work = self.iteration(Variant(variant.method))
        self.ready()
        with FlopCounter() as counter:
            work()
        return counter.total


BASES = ("reference", "bullet")


class Exactness:
    """Compares some float64 updates of a variant on some images with its model's: loss, gradients and buffers.

    "optimised" is compared with the authors' code, "bullet" with itself step by step: `BASES`.
    """

    def __init__(self, bench: Bench) -> None:
        w, self._setting = bench.workload, SETTING | {"perturb_steps": FEW[0]}
        self._model = copy.deepcopy(w.model).double()
        rows = torch.linspace(0, len(w.y) - 1, CHECKED).long().to(w.y.device)
        self._x, self._y = w.x[rows].double(), w.y[rows]
        self._bullet = BulletTrain(*FEW).to(bench.device)
        self._bullet.robust_fraction.copy_(w.bullet.robust_fraction)
        self._expected: dict[str, list[Tensor]] = {}

    def difference(self, variant: Variant) -> float:
        """Returns the largest difference, relative to the largest entry of its tensor or 1; NaN if there is any."""
        method = "bullet" if variant.method == "bullet" else "reference"
        if method not in self._expected:
            self._expected[method] = self._updates(Variant(method))
        pairs = zip(self._updates(variant), self._expected[method], strict=True)
        gaps = [float((a - b).abs().max() / b.abs().max().clamp_min(1.0)) for a, b in pairs]
        return math.nan if any(map(math.isnan, gaps)) else max(gaps)

    def _updates(self, variant: Variant) -> list[Tensor]:
        model, bullet = copy.deepcopy(self._model), copy.deepcopy(self._bullet)
        loss_of = variant.loss_of(bullet)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        result = []
        torch.manual_seed(1)
        with same_noise():
            for _ in range(ITERATIONS):
                loss = loss_of(model, self._x, self._y, optimizer, **self._setting)
                loss.backward()
                result += [loss.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
                result += [b.double().clone() for b in model.buffers()]
        return result


PLAIN = "in plain torch"  # all of our ops, if no kernel can run
FALLBACKS = ("without graphs", "no more graphs", "not folded", PLAIN)


@contextmanager
def fallbacks() -> Iterator[list[str]]:
    """Yields the warnings of work that should have run from graphs, on a folded view or in kernels, and did not."""
    fell_back: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield fell_back
        finally:
            messages = dict.fromkeys(str(w.message) for w in caught)
            fell_back += [text for text in messages if any(words in text for words in FALLBACKS)]
            print(*(text for text in messages if text not in fell_back), sep="\n")
