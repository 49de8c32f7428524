"""Evaluation at 50 % robust accuracy: ours against the plain loop, which attacks every sample to the end.

The network is a SmallCNN trained briefly on the embedded digits, at the ε that half of the test images withstand. There
are two plain loops: that of the TRADES authors' evaluation, where `backward` also computes the gradients of the
weights, and one with the gradient of the images alone. The limit is the ratio of the passes over the second: the half
that withstands goes through everything in ours too, so it is below 2, and even lower with a single start.
To record:

python -m pytest benchmarks/test_evaluation.py --full -s --benchmark-json benchmarks/results/evaluation.json
"""

from __future__ import annotations

import copy
import functools
import statistics
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from plain_pgd import by_input, plain_loop
from torch import Tensor, nn

from benchmarks.work_ratio import median_ratio, work_ratio
from bt_fast import PGD, BulletTrain, ThreatModel, trades_loss
from bt_fast.evaluation import Evaluation, evaluate
from bt_fast.lab.data import images, load_dataset
from bt_fast.lab.models import build_model

BATCH, IMAGES, CHECKED, TRAINED = 64, 512, 64, 2000
LEAST_SPEEDUP = 2.0
ROUNDS = {(20, 1): 3, (20, 5): 2}


class Trained:
    """A moderately robust network, test images, and the ε that half of them withstand."""

    def __init__(self, device: torch.device, name: str = "small-cnn") -> None:
        torch.manual_seed(0)
        data, width = load_dataset("digits"), 16 if name == "small-cnn" else None
        self.model = build_model(name, in_channels=1, image_size=28, num_classes=10, width=width).to(device)
        self.x, self.y = images(data.x_test[:IMAGES], device), data.y_test[:IMAGES].to(device)
        self._train(images(data.x_train[:TRAINED], device), data.y_train[:TRAINED].to(device))
        self.model.eval()
        self.threat = self._half_standing()

    def _train(self, x: Tensor, y: Tensor) -> None:
        bullet = BulletTrain(5, 1, 0).to(x.device)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        for rows in (torch.randperm(len(x), device=x.device) for _ in range(2)):
            for some in rows.split(50):
                setting = {"step_size": 0.05, "epsilon": 0.15, "perturb_steps": 5, "beta": 3.0}
                trades_loss(self.model, x[some], y[some], optimizer, **setting, bullet=bullet).backward()
                optimizer.step()
        optimizer.zero_grad()

    def _half_standing(self) -> ThreatModel:
        low, high = 0.0, 0.5
        for _ in range(8):
            threat = ThreatModel((low + high) / 2)
            result = evaluate(
                self.model, self.batches(), PGD(threat.epsilon, threat.epsilon / 10, 20), generator=self.generator()
            )
            low, high = (threat.epsilon, high) if result.robust > 0.5 else (low, threat.epsilon)
        return threat

    def batches(self, x: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        x = self.x if x is None else x
        return zip(x.split(BATCH), self.y[: len(x)].split(BATCH), strict=True)

    def generator(self) -> torch.Generator:
        return torch.Generator(self.x.device).manual_seed(0)

    def plain(self, steps: int, restarts: int, gradient: Any, model: nn.Module | None = None, x: Any = None) -> Tensor:
        """Returns the restart and step in which each sample was first misclassified: [2, n]."""
        model, x = model or self.model, self.x if x is None else x
        seed = torch.randint(2**63 - 1, (), device=x.device, generator=self.generator())
        result = [
            plain_loop(
                model,
                *batch,
                self.threat,
                steps=steps,
                step_size=2 * self.threat.epsilon / steps,
                restarts=restarts,
                loss="ce",
                seed=seed,
                first=BATCH * i,
                gradient=gradient,
            )
            for i, batch in enumerate(self.batches(x))
        ]
        return torch.cat([torch.stack(f) for f in result], dim=1).cpu()

    def attack(self, steps: int) -> PGD:
        return PGD(self.threat.epsilon, 2 * self.threat.epsilon / steps, steps)

    def ours(self, steps: int, restarts: int, engine: str = "exact") -> Evaluation:
        options: dict[str, Any] = {"restarts": restarts, "engine": engine, "generator": self.generator()}
        return evaluate(self.model, self.batches(), self.attack(steps), **options)

    def check_exactness(self, steps: int, restarts: int) -> None:
        """Checks before a speedup is reported that our evaluation equals the plain loop by sample, in float64."""
        model, x = copy.deepcopy(self.model).double(), self.x[:CHECKED].double()
        expected = self.plain(steps, restarts, by_input, model, x)
        for engine in ("exact", "fast"):
            options: dict[str, Any] = {"restarts": restarts, "engine": engine, "generator": self.generator()}
            result = evaluate(model, self.batches(x), self.attack(steps), **options)
            assert torch.equal(torch.stack([result.restart, result.step]), expected), f"{engine} differs"


def by_backward(loss: Tensor, x: Tensor) -> Tensor | None:
    """Computes the gradient like the TRADES authors' evaluation: through the weights too."""
    loss.backward()
    return x.grad


@pytest.fixture(scope="module")
def trained(device: torch.device) -> Trained:
    return Trained(device)


@pytest.mark.parametrize(("steps", "restarts"), [(20, 1), pytest.param(20, 5, marks=pytest.mark.full)])
def test_evaluation(trained: Trained, steps: int, restarts: int, interleaved: Any, benchmark: Any) -> None:
    trained.check_exactness(steps, restarts)
    variants = {
        "plain, as the authors": functools.partial(trained.plain, steps, restarts, by_backward),
        "plain": functools.partial(trained.plain, steps, restarts, by_input),
        "ours": functools.partial(trained.ours, steps, restarts),
        "ours, fast": functools.partial(trained.ours, steps, restarts, "fast"),
    }

    def prepare(_: str) -> None:
        trained.model.zero_grad()

    seconds = interleaved(variants, prepare, ROUNDS[steps, restarts])
    result, expected = trained.ours(steps, restarts), trained.plain(steps, restarts, by_input)
    info: dict[str, Any] = {f"{name}: s": round(statistics.median(times), 2) for name, times in seconds.items()}
    for name in ("ours", "ours, fast"):
        for other in ("plain, as the authors", "plain"):
            info[f"{name} over {other}"] = round(median_ratio(seconds[other], seconds[name]), 2)
    info["limit over plain"] = round(IMAGES * _passes(steps, restarts) / _passes_of(result, steps, restarts), 2)
    info["clean, robust"] = f"{result.clean:.1%}, {result.robust:.1%} at eps = {trained.threat.epsilon:.3f}"
    info["fates that differ in float32"] = int((torch.stack([result.restart, result.step]) != expected).any(0).sum())
    benchmark.extra_info.update(info)
    print(f"\nPGD-{steps} x {restarts}, {IMAGES} images, {benchmark.extra_info['processor']}")
    for key, value in info.items():
        print(f"  {key:<40} {value}")
    if benchmark.enabled and restarts > 1:
        compared = ("plain, as the authors", "ours, fast")
        assert work_ratio(compared, variants, prepare, seconds, trained.x.device) >= LEAST_SPEEDUP


def _passes(steps: int, restarts: int) -> int:
    """Returns the forward and backward passes of a sample that goes through everything."""
    return 1 + restarts * (2 * steps + 1)


def _passes_of(evaluation: Evaluation, steps: int, restarts: int) -> int:
    """Returns the passes of all samples: a sample's last pass, in which it is misclassified, has no backward."""
    total = 0
    for restart, step in zip(evaluation.restart.tolist(), evaluation.step.tolist(), strict=True):
        if restart > 0:
            total += (restart - 1) * (2 * steps + 1) + 2 * step + 1
        total += _passes(steps, restarts) if restart < 0 else 1
    return total
