"""AutoAttack's APGD-CE and APGD-T at about 50 % robust accuracy: ours against plain loops over whole batches.

The networks are that of `test_evaluation.py`, in which there is nothing to fold, and a small residual one with batch
norm, each at the ε where half of the test images stand these attacks. The plain loop is taken twice: as AutoAttack has
it, which gives what one attack broke to no other, and over all samples to the end. The limit is the ratio of the
passes: those that stand go through all ten attacks in ours too, so that at 50 % it is near 1.1 over the first and below
2 over the second; what goes beyond it is folding. To record:

python -m pytest benchmarks/test_apgd_evaluation.py --full -s --benchmark-json benchmarks/results/apgd-evaluation.json
"""

from __future__ import annotations

import copy
import functools
import statistics
from typing import Any
from unittest import mock

import pytest
import torch
from plain_apgd import STOOD, standard
from torch import Tensor, nn

from benchmarks.test_evaluation import BATCH, CHECKED, Trained
from benchmarks.work_ratio import median_ratio
from bt_fast import ThreatModel, course, evaluate
from bt_fast.evaluation import Evaluation

TARGETS = 9
IMAGES = {"small-cnn": 512, "wrn-10-1": 256}
ROUNDS = {10: 3, 100: 2}
CASES = [("small-cnn", 10), ("small-cnn", 100), ("wrn-10-1", 10), ("wrn-10-1", 100)]
ALONE = "ignore:robust accuracy is that of APGD-CE and APGD-T alone"  # whether the package is installed or not


class Standard(Trained):
    """The trained network, at the ε where half of the test images stand both APGDs."""

    def _half_standing(self) -> ThreatModel:
        low, high = 0.0, 0.5
        for _ in range(7):
            self.threat = ThreatModel((low + high) / 2)
            low, high = (
                (self.threat.epsilon, high) if self.standard(10, 128).robust > 0.5 else (low, self.threat.epsilon)
            )
        return self.threat

    def standard(self, steps: int, images: int, engine: str = "exact", model: nn.Module | None = None) -> Evaluation:
        """Ours, without the package."""
        x = self.x[:images] if model is None else self.x[:images].double()
        with (
            mock.patch.object(course, "STANDARD_STEPS", steps),
            mock.patch.object(course, "why_not", return_value="left out"),
        ):
            options: dict[str, Any] = {"attacks": "standard", "engine": engine, "generator": self.generator()}
            return evaluate(model or self.model, self.batches(x), self.threat, **options)

    def plainly(self, steps: int, images: int, drop: bool, model: nn.Module | None = None) -> Tensor:
        """Restart and step in which each sample fell: [2, n]."""
        x = self.x[:images] if model is None else self.x[:images].double()
        seed = torch.randint(2**63 - 1, (), device=x.device, generator=self.generator())
        return standard(model or self.model, self.batches(x), self.threat, steps, TARGETS, seed, drop=drop)

    def check_exactness(self, steps: int, restarts: int = 1) -> None:
        """No speedup is reported of an evaluation that differs from the plain loop, sample by sample, in float64."""
        model = copy.deepcopy(self.model).double()
        expected = self.plainly(steps, CHECKED, True, model)
        assert torch.equal(self.plainly(steps, CHECKED, False, model), expected)
        for engine in ("exact", "fast"):
            result = self.standard(steps, CHECKED, engine, model)
            assert torch.equal(torch.stack([result.restart, result.step]), expected), f"{engine} differs"


@functools.cache
def trained_network(name: str, device: torch.device) -> Standard:
    return Standard(device, name)


@pytest.mark.filterwarnings(ALONE)
@pytest.mark.full
@pytest.mark.parametrize(("name", "steps"), CASES)
def test_apgd_evaluation(name: str, steps: int, interleaved: Any, benchmark: Any, device: torch.device) -> None:
    trained = trained_network(name, device)
    trained.check_exactness(10)
    n = IMAGES[name]
    variants = {
        "plain, all samples": functools.partial(trained.plainly, steps, n, False),
        "plain, as AutoAttack": functools.partial(trained.plainly, steps, n, True),
        "ours": functools.partial(trained.standard, steps, n),
        "ours, fast": functools.partial(trained.standard, steps, n, "fast"),
    }
    seconds = interleaved(variants, lambda _: trained.model.zero_grad(), ROUNDS[steps])
    result, expected = trained.standard(steps, n), trained.plainly(steps, n, True)
    ours = torch.stack([result.restart, result.step])
    info: dict[str, Any] = {f"{one}: s": round(statistics.median(times), 2) for one, times in seconds.items()}
    for other in ("plain, all samples", "plain, as AutoAttack"):
        for one in ("ours", "ours, fast"):
            info[f"{one} over {other}"] = round(median_ratio(seconds[other], seconds[one]), 2)
        passes = _passes_plainly(expected, steps, drop=other != "plain, all samples")
        info[f"limit over {other}"] = round(passes / _passes(ours, steps), 2)
    info["clean, robust"] = f"{result.clean:.1%}, {result.robust:.1%} at eps = {trained.threat.epsilon:.3f}"
    info["fates that differ in float32"] = int((ours != expected).any(0).sum())
    benchmark.extra_info.update(info)
    print(f"\nAPGD-CE and APGD-T on {name}, {steps} steps, {n} images in {BATCH}s, {benchmark.extra_info['processor']}")
    for key, value in info.items():
        print(f"  {key:<40} {value}")


def _passes_plainly(fate: Tensor, steps: int, *, drop: bool) -> int:
    """Forwards and backwards of the plain loop: in each attack that a sample is given to, all of them."""
    attacks = torch.where((fate[0] == STOOD) | torch.tensor(not drop), 1 + TARGETS, fate[0])
    return int((1 + attacks * 2 * (steps + 1)).sum())


def _passes(fate: Tensor, steps: int) -> int:
    """Those of ours: the pass in which a sample falls is its last but for its backward, and the last iterate has none.

    (On full batches the last iterates of some run a backward beside the others', which is left out here.)
    """
    whole = 2 * steps + 1
    fell = (fate[0] - 1) * whole + 2 * fate[1] + 1
    return int((1 + torch.where(fate[0] == STOOD, (1 + TARGETS) * whole, torch.where(fate[0] == 0, 0, fell))).sum())
