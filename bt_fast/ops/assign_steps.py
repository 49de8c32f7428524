"""From signed variances to groups, and from step counts to an order."""

from __future__ import annotations

import torch
from torch import Tensor

OUTLIER, BOUNDARY, ROBUST = 0, 1, 2
GROUPS = ("outlier", "boundary", "robust")


def robust_threshold(svar: Tensor, robust_fraction: Tensor) -> Tensor:
    """`T = max(0, Percentile(SVar, 1 - F_R))` (Eq. 6), interpolated between order statistics as `numpy.quantile`.

    Args:
        svar: [m] floating point, m ≥ 0.
        robust_fraction: 0-dim, F_R in [0, 1].

    Returns:
        0-dim float64; 0 for an empty batch.
    """
    m = len(svar)
    if m == 0:
        return torch.zeros((), dtype=torch.float64, device=svar.device)
    ordered = svar.sort().values.double()
    rank = (1.0 - robust_fraction.double()) * (m - 1)
    below = rank.floor().clamp(0, m - 1)
    t = rank - below
    pair = torch.stack([below, (below + 1).clamp(max=m - 1)]).long()
    low, high = ordered[pair].unbind()
    # numpy's form: from the nearer end, so that the result is monotone and exact at both
    percentile = torch.where(t < 0.5, low + (high - low) * t, high - (high - low) * (1.0 - t))
    return percentile.clamp(min=0.0)


def three_groups(svar: Tensor, correct: Tensor, robust_fraction: Tensor) -> tuple[Tensor, Tensor]:
    """The classification rule of Eq. 6: outlier, boundary or robust.

    At `F_R = 0` every correctly classified sample is boundary, the largest too (the limit of Eq. 6).

    Args:
        svar: [m] floating point.
        correct: [m] bool; the sign of SVar is not used, since it is lost where the variance is 0.
        robust_fraction: 0-dim, F_R.

    Returns:
        group [m] int64, one of OUTLIER, BOUNDARY, ROBUST, and the threshold (0-dim float64).
    """
    threshold = robust_threshold(svar, robust_fraction)
    robust = (svar.double() >= threshold) & (robust_fraction > 0)
    return correct.long() + (correct & robust).long(), threshold


def order_by_steps(steps: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The stable order by descending step count, and how many samples are active at each step.

    Args:
        steps: [m] integers in 0..most.
        most: an upper bound on `steps`, known to the host.

    Returns:
        order [m] int64, so that `steps[order]` never increases and equal counts keep their places, and active [most]
        int64, where `active[t]` counts the samples with more than t steps: the length of step t's prefix.
    """
    order = steps.sort(descending=True, stable=True).indices
    active = (steps > torch.arange(most, device=steps.device)[:, None]).sum(dim=1)
    return order, active
