"""Robust accuracy by projected gradient descent with restarts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bt_fast import faults
from bt_fast.attack.frozen import clean_logits, eval_mode
from bt_fast.attack.generate import generate
from bt_fast.attack.schedule import Schedule
from bt_fast.attack.threat import ThreatModel
from bt_fast.faults import Fault
from bt_fast.mining import check_labels, positive, step_count


@dataclass(frozen=True)
class Accuracy:
    """Counts over `total` samples: classified correctly clean, and under every attack tried."""

    clean_correct: int
    robust_correct: int
    total: int

    @property
    def clean(self) -> float:
        """Clean accuracy in [0, 1]."""
        return self.clean_correct / self.total

    @property
    def robust(self) -> float:
        """Robust accuracy in [0, 1]."""
        return self.robust_correct / self.total


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    threat: ThreatModel,
    *,
    steps: int = 20,
    step_size: float | None = None,
    restarts: int = 1,
    generator: torch.Generator | None = None,
) -> Accuracy:
    """Clean accuracy, and accuracy under PGD-`steps` on the cross-entropy from `restarts` random starts.

    A sample counts as robust if it is classified correctly clean and after every attack. Samples that fell are not
    attacked again. The model runs in eval mode and keeps its modes and gradients.

    Args:
        model: maps [n, ...] to logits [n, K].
        batches: pairs of images [n, ...], floating point in the threat model's bounds, and labels [n], integers.
        threat: what a perturbation may be.
        steps: ≥ 1. step_size: > 0, in pixel units; `2ε/steps` if not given.
        restarts: ≥ 1.
        generator: on the images' device, for the random starts (uniform in the ball).

    Raises:
        TypeError: images are not floating point, labels not integers, or the model does not return such logits.
        ValueError: an argument is out of range, there are no samples, or a batch does not fit (shapes, devices, pixels
            outside the threat model's bounds, labels out of range, NaN logits or input gradients).
    """
    step_count("steps", steps, least=1)
    step_count("restarts", restarts, least=1)
    size = 2.0 * threat.epsilon / steps if step_size is None else step_size
    positive("step_size", size)
    clean = robust = total = 0
    for x, y in batches:
        _check_batch(x, y)
        with eval_mode(model):
            logits = clean_logits(model, x)
            pixels = faults.pixels_outside(x, threat.lower, threat.upper, "the images")
            standing = _correct(logits, y, [pixels, faults.labels_outside(y, logits.shape[1], "the labels")])
            clean += len(standing)
            target = F.one_hot(y.long(), logits.shape[1]).to(logits.dtype)
            for _ in range(restarts):
                if len(standing) == 0:
                    break
                faulty = torch.zeros(len(standing), dtype=torch.int32, device=x.device)
                x_adv = _attack(model, x[standing], target[standing], threat, steps, size, generator, faulty)
                found = [faults.gradients_without_direction(faulty)]
                standing = standing[_correct(clean_logits(model, x_adv), y[standing], found)]
        robust += len(standing)
        total += len(y)
    if total == 0:
        raise ValueError("batches must hold at least 1 sample, got none")
    return Accuracy(clean, robust, total)


def _check_batch(x: Tensor, y: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"the images must be floating point, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.numel() == 0:
        raise ValueError(f"the images must be at least 1 in each batch, got shape {list(x.shape)}")
    check_labels(y, len(x), x.device, "the labels")


def _correct(logits: Tensor, y: Tensor, earlier: list[Fault]) -> Tensor:
    """The indices of the rows that are classified as `y` [n]; raises for earlier faults and those of the logits."""
    found = [*earlier, faults.rows_without_number(logits, "the model's logits")]
    faults.read(found).wait()
    return (logits.argmax(dim=1) == y.long()).nonzero().flatten()


def _attack(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    threat: ThreatModel,
    steps: int,
    step_size: float,
    generator: torch.Generator | None,
    faulty: Tensor,
) -> Tensor:
    """One attack from a random start."""
    schedule = Schedule.uniform(len(x), steps, step_size, x.device)
    start = uniform_start(x, threat, generator)
    return generate(model, x, start, target, schedule, threat, generator=generator, faulty=faulty)


def uniform_start(x: Tensor, threat: ThreatModel, generator: torch.Generator | None = None) -> Tensor:
    """`x` [n, ...] moved to a point drawn uniformly from its ε-ball, then clamped to the pixel bounds."""
    if threat.norm == "l_inf":
        noise = torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        delta = (2.0 * noise - 1.0) * threat.epsilon
    else:
        direction = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        norm = direction.flatten(1).norm(dim=1)
        radius = torch.rand(len(x), dtype=x.dtype, device=x.device, generator=generator)
        radius = threat.epsilon * radius ** (1.0 / x[0].numel())
        delta = direction * (radius / norm).view(-1, *[1] * (x.dim() - 1))
    return (x + delta).clamp(threat.lower, threat.upper)
