"""Who is active when: samples sorted by descending steps, so that each step works on a prefix of one buffer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bt_fast import ops
from bt_fast.device import HostRead
from bt_fast.mining import Assignment
from bt_fast.ops.numeric import computable, kind_of
from bt_fast.validation import positive, step_count


@dataclass(frozen=True, eq=False)
class Schedule:
    """A ragged attack on m samples.

    Attributes:
        order: [m] int64, or None where the batch already has the schedule's order: sorted row i is sample `order[i]`.
        steps: [m] int64 in sorted order, never increasing.
        step_size: [m] floating point in sorted order, α of each sample in pixel units.
        active: for each step, the number of rows at work: rows [0, active[t]) take step t. Never increases.
    """

    order: Tensor | None
    steps: Tensor
    step_size: Tensor
    active: tuple[int, ...]

    @classmethod
    def uniform(cls, m: int, steps: int, step_size: float, device: torch.device) -> Schedule:
        """Every one of m samples takes the same steps, and nothing is reordered.

        Args:
            m: ≥ 0. steps: N ≥ 0, of each sample.
            step_size: α > 0, in pixel units.
            device: of the schedule's tensors.

        Raises:
            TypeError or ValueError: m or steps is no integer of at least 0, or step_size no finite number above 0.
        """
        m, steps = step_count("m", m), step_count("steps", steps)
        sizes = torch.full((m,), positive("step_size", step_size), dtype=torch.float64, device=device)
        counts = torch.full((m,), steps, dtype=torch.int64, device=device)
        return cls(order=None, steps=counts, step_size=sizes, active=(m,) * steps)

    @classmethod
    def from_assignment(cls, assignment: Assignment) -> Schedule:
        """The schedule of an assignment. Waits for its counts.

        Raises:
            ValueError: a fault travelled with the counts.
        """
        return cls(
            order=assignment.order,
            steps=assignment.steps[assignment.order],
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
            TypeError: the steps are not integers, or the step sizes not floating point.
            ValueError: shapes or devices differ, a count is negative, or a size is not a finite number above 0.
        """
        if not isinstance(steps, Tensor) or not isinstance(step_size, Tensor):
            raise TypeError(
                f"steps and step_size must be tensors, got {type(steps).__name__}, {type(step_size).__name__}: "
                "write torch.as_tensor(...)"
            )
        if steps.is_floating_point() or steps.is_complex() or steps.dtype == torch.bool:
            raise TypeError(f"steps must be integers, got {steps.dtype}: write steps.long()")
        if steps.dim() != 1 or step_size.shape != steps.shape:
            raise ValueError(
                f"steps and step_size must both have shape [m], got {list(steps.shape)} and {list(step_size.shape)}: "
                "give one of each for each sample"
            )
        if not computable(step_size):
            raise TypeError(f"step_size must be floating point, got {kind_of(step_size)}: write step_size.float()")
        if step_size.device != steps.device:
            raise ValueError(
                f"step_size must be on {steps.device} like the steps, but is on {step_size.device}: "
                f"write step_size.to({str(steps.device)!r})"
            )
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
        return cls(order=order, steps=steps.long()[order], step_size=step_size[order], active=active)

    def sort(self, values: Tensor) -> Tensor:
        """`values` [m, ...] in sorted order."""
        return values if self.order is None else values[self.order]
