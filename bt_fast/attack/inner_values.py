"""The inner losses of attacks that look at their values: for each sample the value, and its gradient to the outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bt_fast.attack.batch import AttackBatch
from bt_fast.attack.dlr import dlr
from bt_fast.attack.inner import TARGETED, OfAPGD, Rows, direction_of, fitted, of_function
from bt_fast.labels import target_of
from bt_fast.ops import rows as logit_rows


@dataclass(frozen=True, eq=False)
class Aim:
    """What the inner loss of n samples is away from, or towards."""

    target: Tensor | None  # [n, K], a distribution; the clean outputs for a function; None for that of the labels
    labels: Tensor | None  # [n] int64; for a function as they are; None where the loss needs none
    goals: Tensor | None = None  # [n] int64, the classes that a targeted loss goes to

    @classmethod
    def of(cls, batch: AttackBatch) -> Aim:
        """That of a batch. Goals are where its target [n, K] is -1, as `dlr.with_goal` puts it."""
        goals = batch.target.argmin(dim=1) if batch.inner == TARGETED else None
        return cls(batch.target, batch.labels, goals)

    def __getitem__(self, rows: slice) -> Aim:
        """Some rows that lie side by side, as views."""
        return Aim(*(None if values is None else values[rows] for values in (self.target, self.labels, self.goals)))


def values_and_directions(
    inner: OfAPGD, outputs: Tensor, aim: Aim, *, scaled: bool = False, together: bool = False
) -> tuple[Tensor, Tensor]:
    """The inner loss of each row of outputs, and its gradient with respect to them, as `direction_of` gives it.

    Args:
        outputs: [n, d] without gradient, logits but for a function.
        scaled, together: as for `direction_of`.

    Returns:
        [n], float32 (float64 for float64 outputs), and [n, d] in the outputs' dtype.
    """
    z = outputs.to(logit_rows.result_dtype(outputs))
    target = aim.target
    if target is None:
        assert aim.labels is not None
        target = target_of(aim.labels, z)
    if not isinstance(inner, str):
        values, direction = of_function(inner, z, Rows(target, aim.labels))
        return values, fitted(direction, outputs, z.isnan().any(dim=1), scaled, together)
    if inner in ("dlr", TARGETED):
        assert aim.labels is not None
        values, direction = dlr(z, aim.labels, aim.goals if inner == TARGETED else None)
        return values, fitted(direction, outputs, ~logit_rows.has_softmax(z), scaled, together)
    direction = direction_of(inner, outputs, target, aim.labels, scaled=scaled, together=together)
    return _values(inner, z, target, aim.labels).to(z.dtype), direction


def _values(inner: str, z: Tensor, target: Tensor, labels: Tensor | None) -> Tensor:
    """KL and the squared error are in float64: they are small differences of large numbers."""
    if inner == "margin":
        assert labels is not None
        at = labels[:, None]
        return z.scatter(1, at, -math.inf).amax(dim=1) - z.gather(1, at)[:, 0]
    z = z if inner == "cross_entropy" else z.double()
    log_q, p = z.log_softmax(dim=1), target.to(z.dtype)
    if inner == "lse":
        return (log_q.exp() - p).square().sum(dim=1)
    gap = p.log() - log_q if inner == "kl" else -log_q
    return torch.where(p > 0, p * gap, 0.0).sum(dim=1)
