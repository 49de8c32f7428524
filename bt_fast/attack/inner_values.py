"""The inner losses of attacks that look at their values: for each sample the value, and its gradient to the logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bt_fast import ops
from bt_fast.attack.batch import AttackBatch
from bt_fast.attack.dlr import dlr
from bt_fast.attack.losses import direction_of


@dataclass(frozen=True, eq=False)
class Aim:
    """What the inner loss of n samples is away from, or towards."""

    target: Tensor | None  # [n, K], a distribution; None for that of the labels
    labels: Tensor | None  # [n] int64; None where the loss needs none
    goals: Tensor | None = None  # [n] int64, the classes that a targeted loss goes to

    @classmethod
    def of(cls, inner: str, batch: AttackBatch) -> Aim:
        """That of a batch, by its target [n, K]: a distribution, or labels (1) and goals (-1)."""
        target = batch.target
        goals = target.argmin(dim=1) if inner == "dlr_targeted" else None
        return cls(target, None if inner == "kl" else target.argmax(dim=1), goals)

    def __getitem__(self, rows: slice) -> Aim:
        """Some rows that lie side by side, as views."""
        return Aim(*(None if values is None else values[rows] for values in (self.target, self.labels, self.goals)))


def values_and_directions(inner: str, logits: Tensor, aim: Aim, scaled: bool = False) -> tuple[Tensor, Tensor]:
    """The inner loss of each row of logits, and its gradient with respect to them.

    Args:
        logits: [n, K] without gradient.
        scaled: whether each row of the gradient may be times a positive factor, against underflow in float16.

    Returns:
        [n], float32 (float64 for float64 logits), and [n, K] in the logits' dtype.
    """
    if inner in ("kl", "cross_entropy"):
        target = _one_hot(aim, logits) if aim.target is None else aim.target
        return _values(inner, logits, target), ops.ascent_direction(logits, target, scaled)
    assert aim.labels is not None
    if inner == "margin":
        at = aim.labels[:, None]
        z = ops.wide(logits)
        wrong = z.scatter(1, at, -math.inf).amax(dim=1)
        return wrong - z.gather(1, at)[:, 0], direction_of("margin", logits, aim.labels, scaled)
    return dlr(logits, aim.labels, aim.goals if inner == "dlr_targeted" else None)


def _values(inner: str, logits: Tensor, target: Tensor) -> Tensor:
    """The cross-entropy; KL in float64, since it is the small difference of large numbers."""
    z = logits.double() if inner == "kl" else ops.wide(logits)
    log_q, p = z.log_softmax(dim=1), target.to(z.dtype)
    gap = p.log() - log_q if inner == "kl" else -log_q
    return torch.where(p > 0, p * gap, 0.0).sum(dim=1).to(ops.wide(logits).dtype)


def _one_hot(aim: Aim, logits: Tensor) -> Tensor:
    assert aim.labels is not None
    return torch.zeros_like(logits).scatter_(1, aim.labels[:, None], 1.0)
