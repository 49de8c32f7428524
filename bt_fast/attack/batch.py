"""The samples of an attack as one object, which every runner takes and slices as a whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bt_fast.attack.inner import OfAPGD
from bt_fast.attack.threat import ThreatModel
from bt_fast.ops.launch import rounded
from bt_fast.ops.rows import result_dtype
from bt_fast.plan import Plan

View = Callable[[Tensor], Tensor]  # a model in eval mode, or a folded view of it


@dataclass(frozen=True, eq=False)
class AttackBatch:
    """m samples by descending numbers of steps; each tensor has a row for each sample."""

    x_adv: Tensor  # [m, ...] floating point, x', changed in place by the attack's steps
    clean: Tensor  # [m, ...] of the same dtype, x
    target: Tensor  # [m, K], the distribution to move away from; the clean outputs for an inner loss of one's own
    step_size: Tensor  # [m] floating point, α in pixel units
    steps: Tensor  # [m] int64, never increasing
    active: tuple[int, ...]  # for each step, the number of rows that take it; never increasing
    faulty: Tensor  # [m] int32, 1 for a sample that stayed in some step, since its gradient held NaN (in ℓ2: or Inf)
    inner: OfAPGD = "kl"  # what is ascended
    labels: Tensor | None = None  # [m] int64, where the inner loss reads them
    together: bool = False  # a row's input gradient depends on the other rows
    epsilon: Tensor | None = None  # [m], each sample's own ε as the steps take it; None: the threat model's

    @classmethod
    def of(cls, plan: Plan, start: Tensor, clean: Tensor, target: Tensor, faulty: Tensor | None = None) -> AttackBatch:
        """Returns samples in the plan's sorted order, at the start of their attack. Waits for the plan's counts."""
        if faulty is None:
            faulty = torch.zeros(len(start), dtype=torch.int32, device=start.device)
        sizes, steps = plan.sort(plan.step_size), plan.sort(plan.steps)
        return cls(start, clean, target, sizes, steps, plan.active_counts, faulty)

    def with_radii(self, threat: ThreatModel) -> AttackBatch:
        """The same with an ε of each sample, also where all have the threat model's: a step's result is the same."""
        if self.epsilon is not None:
            return self
        dtype = dtype_of_radii(threat, self.x_adv)
        number = rounded(threat.epsilon, dtype)
        return replace(self, epsilon=torch.full((len(self),), number, dtype=dtype, device=self.x_adv.device))

    def __len__(self) -> int:
        return len(self.x_adv)

    def __getitem__(self, rows: slice) -> AttackBatch:
        """Returns a slice of rows, as views."""
        start, stop, _ = rows.indices(len(self))
        active = tuple(min(n, stop) - start for n in self.active if n > start)
        tensors: dict[str, Any] = {n: value[rows] for n, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, active=active, **tensors)


def dtype_of_radii(threat: ThreatModel, x: Tensor) -> torch.dtype:
    """The dtype in which the steps on images like x take each sample's ε."""
    return x.dtype if threat.norm == "l_inf" else result_dtype(x)
