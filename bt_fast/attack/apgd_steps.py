"""What APGD remembers of each sample, and its step: Algorithm 1 of Croce and Hein (2020), as AutoAttack runs it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bt_fast import ops
from bt_fast.attack.start import AGAINST_ZERO, radius_of
from bt_fast.attack.threat import ThreatModel
from bt_fast.ops.numeric import per_sample

NEW_SHARE = 0.75  # of a step; the rest is that of the step before
BEGIN = -math.inf, math.inf, -math.inf  # a new attack's greatest inner loss, last one, and one at the last checkpoint


@dataclass(frozen=True, eq=False)
class Trail:
    """The progress of n samples. Each tensor has a row for each, and is changed in place."""

    before: Tensor  # [n, ...], the iterate before x'
    best: Tensor  # [n, ...], the iterate of the greatest inner loss so far
    gradient: Tensor  # [n, ...], there
    value: Tensor  # [n], the inner loss there
    last: Tensor  # [n], the inner loss of the iterate that was looked at last
    checked: Tensor  # [n], `value` at the last checkpoint
    step_size: Tensor  # [n]
    rises: Tensor  # [n] int64, in how many steps since the last checkpoint the inner loss rose
    halved: Tensor  # [n] bool, whether the step size halved at the last checkpoint; as if so before the first

    @classmethod
    def of(cls, start: Tensor, epsilon: float | Tensor) -> Trail:
        """At the start [n, ...] of an attack; `epsilon` is of all, or [n]."""
        n, device = len(start), start.device
        value, last, checked, step_size = (
            torch.full((n,), number, dtype=ops.wide(start).dtype, device=device) for number in (*BEGIN, 2.0)
        )
        step_size *= epsilon
        rises = torch.zeros(n, dtype=torch.int64, device=device)
        halved = torch.ones(n, dtype=torch.bool, device=device)
        images = start.clone(), start.clone(), torch.zeros_like(start)
        return cls(*images, value, last, checked, step_size, rises, halved)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return tuple(vars(self).values())

    def __getitem__(self, rows: slice) -> Trail:
        """Some rows that lie side by side, as views."""
        return Trail(*(values[rows] for values in self.tensors))

    def begin(self, at: Tensor, start: Tensor, epsilon: float) -> None:
        """Put the rows `at` [k] int64 to their starts [k, ...]."""
        self.before[at], self.best[at], self.gradient[at] = start, start, 0.0
        self.value[at], self.last[at], self.checked[at] = BEGIN
        self.step_size[at] = 2.0 * epsilon
        self.rises[at], self.halved[at] = 0, True

    def look(self, x: Tensor, values: Tensor, gradient: Tensor | None, first: bool | Tensor) -> None:
        """Take notice of iterates x [n, ...] with these inner losses [n].

        Args:
            gradient: [n, ...], of the inner losses; None for the last iterates, from which no step starts.
            first: whether it is a sample's start; a bool for all, or [n].
        """
        better = values > self.value
        images = per_sample(better, x)
        torch.where(images, x, self.best, out=self.best)
        torch.where(better, values, self.value, out=self.value)
        if gradient is None:
            return
        torch.where(images, gradient, self.gradient, out=self.gradient)
        self.rises.add_(values > self.last)
        if isinstance(first, bool):
            self.last.zero_() if first else self.last.copy_(values)
        else:
            self.last.copy_(values.masked_fill(first, 0.0))

    def check(self, x: Tensor, gradient: Tensor, rho: float, period: int | Tensor) -> None:
        """Halve step sizes where the attack stands still, and go back to the best iterate there.

        Args:
            x: [n, ...] and gradient: [n, ...] of it; both are changed in place.
            period: the number of steps since the checkpoint before: of all, or [n] int64, 0 for samples that are not
                at one.
        """
        halve = (self.rises <= rho * period) | (~self.halved & (self.checked >= self.value))
        if isinstance(period, int):
            self.halved.copy_(halve)
            self.checked.copy_(self.value)
            self.rises.zero_()
        else:
            here = period > 0
            halve &= here
            torch.where(here, halve, self.halved, out=self.halved)
            torch.where(here, self.value, self.checked, out=self.checked)
            self.rises.masked_fill_(here, 0)
        self.step_size.copy_(torch.where(halve, self.step_size / 2, self.step_size))
        images = per_sample(halve, x)
        x.copy_(torch.where(images, self.best, x))
        gradient.copy_(torch.where(images, self.gradient, gradient))

    def step(
        self,
        x: Tensor,
        clean: Tensor,
        gradient: Tensor,
        threat: ThreatModel,
        epsilon: float | Tensor,
        first: bool | Tensor,
    ) -> None:
        """Move x [n, ...] in place: a step along the gradient, and from the second on a share of the step before.

        `epsilon` is of all, or [n]; that of the threat model is not used.
        """
        inside = (_box if threat.norm == "l_inf" else _ball)(clean, threat, radius_of(epsilon, x))
        now, size = ops.wide(x), per_sample(self.step_size, x)
        direction = gradient.sign() if threat.norm == "l_inf" else _normalised(ops.wide(gradient))
        moved = inside(now + size * direction)
        share: float | Tensor = 1.0 if first is True else NEW_SHARE
        if isinstance(first, Tensor):
            share = per_sample(torch.where(first, 1.0, NEW_SHARE).to(now.dtype), x)
        moved = inside(now + (moved - now) * share + (now - self.before) * (1 - share))
        self.before.copy_(x)
        x.copy_(moved)


def _box(clean: Tensor, threat: ThreatModel, radius: float | Tensor) -> Callable[[Tensor], Tensor]:
    low, high = clean - radius, clean + radius
    return lambda x: torch.minimum(torch.maximum(x, low), high).clamp_(threat.lower, threat.upper)


def _ball(clean: Tensor, threat: ThreatModel, radius: float | Tensor) -> Callable[[Tensor], Tensor]:
    clean = ops.wide(clean)

    def inside(x: Tensor) -> Tensor:
        delta = x - clean
        length = per_sample(_norms(delta), x)
        delta = delta / (length + AGAINST_ZERO) * length.clamp(max=radius)
        return delta.add_(clean).clamp_(threat.lower, threat.upper)

    return inside


def _normalised(gradient: Tensor) -> Tensor:
    return gradient / per_sample(_norms(gradient) + AGAINST_ZERO, gradient)


def _norms(x: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1)
    return norms


def with_direction(gradient: Tensor, faulty: Tensor, norm: str, moving: Tensor | None = None) -> Tensor:
    """The gradient [n, ...] with 0 for samples that have no direction, which are marked in `faulty` [n] int32.

    These are samples with NaN in it, in ℓ2 with Inf too; of those that are not `moving` [n] none is marked.
    """
    # on the CPU a sum shows at a tenth of the cost that there is none; elsewhere to read it would mean to wait
    if gradient.is_cpu and gradient.sum().isfinite():
        return gradient
    unfit = (gradient.isnan() if norm == "l_inf" else ~gradient.isfinite()).flatten(1).any(dim=1)
    faulty.masked_fill_(unfit if moving is None else unfit & moving, 1)
    return gradient.masked_fill(per_sample(unfit, gradient), 0.0)
