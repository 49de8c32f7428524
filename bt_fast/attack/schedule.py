"""Who is active when: samples sorted by descending steps, so that each step works on a prefix of one buffer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bt_fast import ops
from bt_fast.device import HostRead
from bt_fast.mining import Assignment


@dataclass(frozen=True, eq=False)
class Schedule:
    """A ragged attack on m samples.

    Attributes:
        order: [m] int64, or None where the batch already has the schedule's order: sorted row i is sample `order[i]`.
        step_size: [m] floating point in sorted order, α of each sample in pixel units.
        active: for each step, the number of rows at work: rows [0, active[t]) take step t. Never increases.
    """

    order: Tensor | None
    step_size: Tensor
    active: tuple[int, ...]

    @classmethod
    def uniform(cls, m: int, steps: int, step_size: float, device: torch.device) -> Schedule:
        """Every one of m samples takes the same steps, and nothing is reordered."""
        sizes = torch.full((m,), step_size, dtype=torch.float64, device=device)
        return cls(order=None, step_size=sizes, active=(m,) * steps)

    @classmethod
    def from_assignment(cls, assignment: Assignment) -> Schedule:
        """The schedule of an assignment. Waits for its counts.

        Raises:
            ValueError: a fault travelled with the counts.
        """
        return cls(
            order=assignment.order,
            step_size=assignment.step_size[assignment.order],
            active=assignment.active_counts,
        )

    @classmethod
    def from_steps(cls, steps: Tensor, step_size: Tensor) -> Schedule:
        """Any step counts of one's own. Reads the counts back: waits for the device once.

        Args:
            steps: [m] integers ≥ 0.
            step_size: [m] floating point > 0, in pixel units.

        Raises:
            TypeError: the steps are not integers.
            ValueError: shapes differ or a count is negative.
        """
        if steps.is_floating_point() or steps.is_complex() or steps.dtype == torch.bool:
            raise TypeError(f"steps must be integers, got {steps.dtype}")
        if steps.dim() != 1 or step_size.shape != steps.shape:
            raise ValueError(
                f"steps and step_size must both have shape [m], got {list(steps.shape)} and {list(step_size.shape)}"
            )
        counts = HostRead(steps.long()).wait()
        if any(n < 0 for n in counts):
            raise ValueError(f"steps must be at least 0, got {min(counts)}")
        most = max(counts, default=0)
        order, _ = ops.order_by_steps(steps, most)
        active = tuple(sum(n > t for n in counts) for t in range(most))
        return cls(order=order, step_size=step_size[order], active=active)

    def sort(self, values: Tensor) -> Tensor:
        """`values` [m, ...] in sorted order."""
        return values if self.order is None else values[self.order]
