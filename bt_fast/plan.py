"""The plan of an attack: the number, size and order of each sample's steps in a minibatch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bt_fast import ops
from bt_fast.device import HostRead
from bt_fast.ranks import Together
from bt_fast.validation import check_device, check_floating, holds_integers, positive, step_count
from bt_fast.warning import warn_deprecated


class Counts(Protocol):
    """Numbers for the host, perhaps still being copied from the device."""

    def wait(self) -> list[int]:
        """Waits for the numbers and returns them."""


@dataclass(frozen=True)
class Known:
    """Numbers already on the host."""

    numbers: tuple[int, ...]

    def wait(self) -> list[int]:
        """Returns the numbers."""
        return list(self.numbers)


@dataclass(frozen=True, eq=False)
class Plan:
    """How many attack steps of which size each of m samples takes, and in which order they are worked on.

    All tensors are in the batch's own order, on one device.

    Attributes:
        steps: [m] int64.
        step_size: [m] floating point, α in pixel units; unused if `steps` is 0.
        order: [m] int64, the stable order by descending steps, in which the attack works: its row i is sample
            `order[i]`. None if the batch already has this order.
        counts: the numbers behind `active_counts`.
        most_steps: no sample has more.
    """

    steps: Tensor
    step_size: Tensor
    order: Tensor | None
    counts: Counts
    most_steps: int

    @property
    def active_counts(self) -> tuple[int, ...]:
        """The number of samples with more than t steps, for each step t: step t works on `order[:active_counts[t]]`."""
        return tuple(self.counts.wait()[: self.most_steps])

    @classmethod
    def uniform(cls, m: int, steps: int, step_size: float, device: torch.device) -> Plan:
        """Returns a plan with the same steps of the same size α = step_size for each of m samples, without reordering.

        The tensors are on the device. TypeError or ValueError unless m and steps are integers of at least 0 and
        step_size is a finite number above 0.
        """
        m, steps = step_count("m", m), step_count("steps", steps)
        sizes = torch.full((m,), positive("step_size", step_size), dtype=torch.float64, device=device)
        counts = torch.full((m,), steps, dtype=torch.int64, device=device)
        return Plan(counts, sizes, None, Known((m,) * steps), steps)

    @classmethod
    def from_steps(cls, steps: Tensor, step_size: Tensor) -> Plan:
        """Returns a custom plan: steps [m] integers ≥ 0, step_size [m] floating point > 0 in pixel units.

        It waits for the device once. TypeError or ValueError unless types, shapes, devices and values fit.
        """
        _check(steps, step_size)
        bad_sizes = ~((step_size > 0) & step_size.isfinite())
        *counts, bad = HostRead(torch.cat([steps.long(), bad_sizes.sum().reshape(1)])).wait()
        if bad:
            raise ValueError(
                f"step_size must hold finite numbers above 0, but {bad} of {len(steps)} are not: "
                "give samples without steps any size above 0"
            )
        if any(n < 0 for n in counts):
            raise ValueError(f"steps must be at least 0, got {min(counts)}: write steps.clamp(min=0)")
        most = max(counts, default=0)
        order, _ = ops.order_by_steps(steps, most)
        active = tuple(sum(n > t for n in counts) for t in range(most))
        return Plan(steps.long(), step_size, order, Known(active), most)

    @classmethod
    def from_assignment(cls, assignment: Plan) -> Plan:
        """Deprecated: returns the assignment, since an assignment of BulletTrain is already a plan."""
        warn_deprecated("Schedule.from_assignment", "give generate what bullet.plan returns")
        return assignment

    def sort(self, values: Tensor) -> Tensor:
        """Returns `values` [m, ...] in the attack's order."""
        return values if self.order is None else values[self.order]

    def unsort(self, values: Tensor) -> Tensor:
        """Returns `values` [m, ...], given in the attack's order, in the batch's own order."""
        return values if self.order is None else torch.empty_like(values).index_copy_(0, self.order, values)


@dataclass(frozen=True, eq=False)
class MinedPlan(Plan):
    """BulletTrain's plan of a minibatch: the groups, and the numbers that decided them.

    Attributes:
        group: [m] int64, one of `ops.OUTLIER`, `ops.BOUNDARY`, `ops.ROBUST`.
        threshold: 0-dim float64, T of Eq. 6.
        svar: [m] float32 (float64 for float64 logits), signed prediction variance.
        certainty: [m] of the same dtype, the metric's values; `svar` itself by default.
        probabilities: [m, K] of the same dtype, softmax of the clean logits.
        counted_groups: [3] int64, the sizes of (outlier, boundary, robust) that `observe` counts, of all ranks
            together; 0 if the minibatch had a fault.
        counted_steps: 0-dim int64, the steps that `observe` counts; None if the groups' sizes give them.
        ranks: the samples of all ranks of a process group, or None.
        weights: [m] float64, how often each sample counts in the update's adversarial term, where half of the robust
            ones stand for all: n/⌈n/2⌉ for those that are drawn, 0 for the others, else 1. None: each once.
    """

    order: Tensor
    group: Tensor
    threshold: Tensor
    svar: Tensor
    certainty: Tensor
    probabilities: Tensor
    counted_groups: Tensor
    counted_steps: Tensor | None
    ranks: Together | None
    weights: Tensor | None = None

    @property
    def group_sizes(self) -> tuple[int, int, int]:
        """The numbers of samples in (outlier, boundary, robust)."""
        outlier, boundary, robust = self.counts.wait()[self.most_steps : self.most_steps + 3]
        return outlier, boundary, robust

    @property
    def left_out(self) -> tuple[int, int]:
        """How many robust samples are left out of the update's adversarial forward, and how many of those have steps.

        The left-out samples are those of weight 0.
        """
        if self.weights is None:
            return 0, 0
        return self.group_sizes[2] // 2, self.counts.wait()[self.most_steps + 3]

    @property
    def steps_of_ranks(self) -> Tensor:
        """[N, most_steps + 1] int64 on the host: how many samples of each rank have 0, 1, ... steps."""
        spread = self.counts.wait()[self.most_steps + 3 + (self.weights is not None) :]
        return torch.tensor(spread, dtype=torch.int64, device="cpu").view(-1, self.most_steps + 1)


def _check(steps: Tensor, step_size: Tensor) -> None:
    if not isinstance(steps, Tensor) or not isinstance(step_size, Tensor):
        raise TypeError(
            f"steps and step_size must be tensors, got {type(steps).__name__}, {type(step_size).__name__}: "
            "write torch.as_tensor(...)"
        )
    if not holds_integers(steps):
        raise TypeError(f"steps must be integers, got {steps.dtype}: write steps.long()")
    if steps.dim() != 1 or step_size.shape != steps.shape:
        raise ValueError(
            f"steps and step_size must both have shape [m], got {list(steps.shape)} and {list(step_size.shape)}: "
            "give one of each for each sample"
        )
    check_floating("step_size", step_size, "write step_size.float()")
    check_device("step_size", step_size, steps.device, "the steps")
