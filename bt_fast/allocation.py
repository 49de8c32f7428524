"""Metrics and policies (section 3.2): how certain the model is of a sample, and how many attack steps the sample gets.

A metric is a function of (logits [m, K], labels [m]) that returns a certainty [m]. A policy is a function of `Judged`,
the values known of a minibatch, that returns steps [m]. Your own can be any such callable:
`BulletTrain(metric=lambda z, y: ..., policy=lambda judged: ...)`. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from bt_fast import ops
from bt_fast.ops import BOUNDARY, OUTLIER, ROBUST
from bt_fast.ops.numeric import kind_of
from bt_fast.ops.rows import result_dtype
from bt_fast.validation import check_floating, holds_integers, positive, step_count

LARGEST = torch.finfo(torch.float32).max  # replaces an infinite certainty, since the percentile interpolates

# Metrics: correct samples are at or above 0, since Eq. 6 has T = max(0, percentile), and misclassified ones below

Metric = Callable[[Tensor, Tensor], Tensor]


def signed_variance(logits: Tensor, labels: Tensor) -> Tensor:
    """SVar, the paper's metric (Eq. 4): `±Var_k[softmax(z)]`. The default, computed by the fused op."""
    return ops.signed_variance(logits, labels).svar


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """`exp(-CE) = p_y` of a correct sample, in [1/K, 1]; `p_y - 1` of a misclassified one, in [-1, -1/2]."""
    p = _of_label(logits.softmax(dim=1), labels)
    return torch.where(_correct(logits, labels), p, p - 1.0)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The true logit minus the largest wrong one, in any range. For a tie it is 0, misclassified or not."""
    wrong = logits.scatter(1, labels[:, None], -math.inf).amax(dim=1)
    return _of_label(logits, labels) - wrong


def gradient_norm(logits: Tensor, labels: Tensor) -> Tensor:
    """A certainty from `g = ‖softmax(z) - onehot(y)‖₂`, the norm of the cross-entropy's gradient at the last layer.

    Katharopoulos and Fleuret (2018) use it as an upper bound of a sample's gradient. g lies in [0, √2] and is large
    where the model is unsure or wrong: a correct sample has `√2 - g`, a misclassified one `-g`.
    """
    p, at = logits.softmax(dim=1), labels[:, None]
    g = p.scatter(1, at, p.gather(1, at) - 1.0).norm(dim=1)
    return torch.where(_correct(logits, labels), math.sqrt(2.0) - g, -g)


METRICS: dict[str, Metric] = {
    metric.__name__: metric for metric in (signed_variance, cross_entropy, margin, gradient_norm)
}


def _of_label(values: Tensor, labels: Tensor) -> Tensor:
    return values.gather(1, labels[:, None])[:, 0]


def _correct(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(dim=1) == labels  # the first maximum counts


# Policies


@dataclass(frozen=True, eq=False)
class Judged:
    """What a policy of your own, `BulletTrain(policy=...)`, is given of m samples to decide their steps.

    All tensors are on the logits' device.

    Attributes:
        certainty: [m] float32 (float64 for float64 logits), the metric's values.
        correct: [m] bool, whether the clean sample is classified correctly.
        group: [m] int64, one of `ops.OUTLIER`, `ops.BOUNDARY`, `ops.ROBUST`: by Eq. 6, or the oracle's.
        threshold: 0-dim float64, T of Eq. 6.
        robust_fraction: 0-dim float64, F_R; the module's own buffer, which must not be changed.
        group_steps: (N_O, N_B, N_R). Steps may lie in 0..max(group_steps).
    """

    certainty: Tensor
    correct: Tensor
    group: Tensor
    threshold: Tensor
    robust_fraction: Tensor
    group_steps: tuple[int, int, int]


Policy = Callable[[Judged], Tensor]


def three_groups(judged: Judged) -> Tensor:
    """The paper's policy: N_O, N_B or N_R by the sample's group. The default, computed by the fused op."""
    return by_group(judged.group, judged.group_steps)


def by_group(group: Tensor, values: Sequence[float], dtype: torch.dtype = torch.int64) -> Tensor:
    """Returns each sample's value by `group` [m], from the `values` of (outlier, boundary, robust)."""
    result = torch.full_like(group, values[OUTLIER], dtype=dtype)
    for member in (BOUNDARY, ROBUST):
        result.masked_fill_(group == member, values[member])
    return result


def uniform(judged: Judged) -> Tensor:
    """N_B for every sample: the baseline without BulletTrain."""
    return torch.full_like(judged.group, judged.group_steps[BOUNDARY])


@dataclass(frozen=True)
class Gaussian:
    """A policy of `BulletTrain`: steps by a quantised Gaussian over the certainty (closing remark of section 3.2).

    `n_i = max(least_i, round(N_B · exp(-(c_i - μ)² / (2·(w·σ)²))))` with the width w > 0. μ and σ are the mean and the
    (biased) standard deviation of the boundary samples' certainties c; halves round to even. `least_i` is N_R for a
    correct sample and N_O for a misclassified one; all samples get it if none is boundary. σ is at least 1e-6·|μ|, the
    size of rounding: a single boundary sample takes N_B. Boundary samples that spread evenly over [0, T) take 0.22·N_B
    steps at either end, at w = 1.

    Attributes:
        width: w > 0.

    Raises:
        TypeError or ValueError: the width is not a finite number above 0.
    """

    width: float = 1.0

    def __post_init__(self) -> None:
        positive("width", self.width, "write Gaussian(width=1.0)")

    def __call__(self, judged: Judged) -> Tensor:
        """Steps [m] int64."""
        outlier_steps, boundary_steps, robust_steps = judged.group_steps
        boundary, certainty = judged.group == BOUNDARY, judged.certainty.double()
        count = boundary.sum().clamp(min=1)
        centre = torch.where(boundary, certainty, 0.0).sum() / count
        variance = torch.where(boundary, certainty - centre, 0.0).square().sum() / count
        sigma = self.width * torch.maximum(variance.sqrt(), 1e-6 * centre.abs())
        away = (certainty - centre) / sigma.clamp_min(torch.finfo(torch.float64).tiny)  # 0 at the centre: avoids 0/0
        steps = (boundary_steps * (-away.square() / 2.0).exp()).round().long()
        least = torch.where(judged.correct, robust_steps, outlier_steps)
        return torch.where(boundary.any(), torch.maximum(steps, least), least)


@dataclass(frozen=True)
class Oracle:
    """A policy of `BulletTrain`: groups come from an attack made first, not from the certainty (Fig. 2 of the paper).

    An outlier is misclassified before the attack, a boundary sample after it, a robust sample neither. The objectives
    run their own attack with `steps` ≥ 1 uniform steps of 1.7·ε/steps. It costs as much as the allocation saves: an
    upper bound for metrics, not a method. They draw the training start's seed first, then the oracle's, from the same
    generator.

    Attributes:
        steps: of that attack, at least 1.

    Raises:
        TypeError or ValueError: steps is not an integer of at least 1.
    """

    steps: int = 10

    def __post_init__(self) -> None:
        step_count("steps", self.steps, least=1)

    def groups(self, correct: Tensor, attacked_correct: Tensor) -> Tensor:
        """Returns the group [m] int64, from [m] bool: correct before the attack, and after it (attacked_correct)."""
        return correct.long() + (correct & attacked_correct)  # OUTLIER, BOUNDARY, ROBUST are 0, 1, 2

    def __call__(self, judged: Judged) -> Tensor:
        """Steps [m] int64."""
        return three_groups(judged)


POLICIES: dict[str, Policy] = {
    "three_groups": three_groups,
    "uniform": uniform,
    "gaussian": Gaussian(),
    "oracle": Oracle(),
}


# Rules by name, or custom ones

_Rule = TypeVar("_Rule", bound=Callable[..., Tensor])


def rule_of(name: str, given: str | _Rule, known: Mapping[str, _Rule]) -> _Rule:
    """Returns the metric or policy that an argument `name` gives by name or as a callable; ValueError or TypeError."""
    if isinstance(given, str) and given in known:
        return known[given]
    if isinstance(given, (str, type)) or not callable(given):
        raise (ValueError if isinstance(given, str) else TypeError)(
            f"{name} must be one of {', '.join(map(repr, known))} or a function, got {given!r}: "
            f"write {name}={next(iter(known))!r}"
        )
    return given


def name_of(rule: _Rule, known: Mapping[str, _Rule]) -> str:
    """Returns the rule as it would be written in code."""
    for name, other in known.items():
        if rule == other:
            return repr(name)
    return getattr(rule, "__name__", repr(rule))


def certainty_of(metric: Metric, logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the metric's checked values [m] in SVar's dtype; NaN stays, ±Inf becomes the largest finite float32.

    The metric gets 16-bit logits in float32, and a label outside 0..K-1 as the nearest class, so that it may index with
    it.
    """
    copied = logits.to(result_dtype(logits), copy=True)  # the metric may change its arguments
    values = metric(copied, labels.clamp(0, logits.shape[1] - 1))
    check_floating("metric", values, "let it return one number for each sample", "must return a floating-point tensor")
    _check_placed("metric", values, len(logits), logits.device)
    return values.detach().to(result_dtype(logits)).clamp(-LARGEST, LARGEST)


def steps_of(policy: Policy, judged: Judged) -> Tensor:
    """Returns the policy's steps [m] int64, checked except for their values. Else TypeError or ValueError."""
    steps = policy(judged)
    if not isinstance(steps, Tensor) or not holds_integers(steps):
        raise TypeError(
            f"policy must return a tensor of integers, got {kind_of(steps)}: "
            "let it return one count of steps for each sample, with .long()"
        )
    _check_placed("policy", steps, len(judged.group), judged.group.device)
    return steps.long()


def _check_placed(name: str, values: Tensor, m: int, device: torch.device) -> None:
    if values.shape != (m,):
        raise ValueError(
            f"{name} must return shape [{m}], one for each sample, got {list(values.shape)}: "
            "let it return one value for each of its rows"
        )
    if values.device != device:
        raise ValueError(
            f"{name} must return a tensor on {device} like the samples, but it is on {values.device}: "
            f"let it make its tensors with device={str(device)!r}"
        )
