"""The shares of the groups that a `BulletTrain` has measured, and the speedups that follow from them by arithmetic."""

from __future__ import annotations

import math

from torch import Tensor, nn

from bt_fast.speedup import Fractions, theoretical_speedup_augmix
from bt_fast.validation import step_count


class MeasuredShares(nn.Module):
    """The counts of `BulletTrain` since its start or the last reset, and what is computed from them."""

    group_counts: Tensor
    steps_assigned: Tensor | None
    boundary_steps: int
    robust_steps: int
    outlier_steps: int

    @property
    def fractions(self) -> Fractions:
        """Returns the measured F_B, F_R and F_O over all observed samples since the start or `reset_fractions`."""
        outlier, boundary, robust = self.group_counts.tolist()
        total = max(outlier + boundary + robust, 1)
        return Fractions(boundary=boundary / total, robust=robust / total, outlier=outlier / total)

    def reset_fractions(self) -> None:
        """Restarts the measured fractions and `mean_steps`; F_R, which controls the assignment, stays."""
        self.group_counts.zero_()
        if self.steps_assigned is not None:
            self.steps_assigned.zero_()

    @property
    def mean_steps(self) -> float:
        """Attack steps per sample, over all observed samples since the start or `reset_fractions`; at first NaN."""
        total = int(self.group_counts.sum())
        if total == 0:
            return math.nan
        if self.steps_assigned is None:
            return self.fractions.mean_steps(self.boundary_steps, self.robust_steps, self.outlier_steps)
        return int(self.steps_assigned) / total

    def theoretical_speedup(self, baseline_steps: int | None = None) -> float:
        """Eq. 7, `(N + 1) / (mean_steps + 1)`, N = baseline_steps ≥ 0 (else an error), or N_B; at first NaN."""
        baseline = self.boundary_steps if baseline_steps is None else step_count("baseline_steps", baseline_steps)
        return (baseline + 1) / (self.mean_steps + 1)

    def theoretical_speedup_augmix(self) -> float:
        """`3 / (1 + 2·F)` for `augmix_loss`, with F = F_B, or `mean_steps` (at N_B = 1) with a policy; NaN at first."""
        if not self.group_counts.any():
            return math.nan
        share = self.fractions.boundary if self.steps_assigned is None else self.mean_steps
        return theoretical_speedup_augmix(share)
