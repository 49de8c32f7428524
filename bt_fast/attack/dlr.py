"""The difference of logits ratio (Croce and Hein, 2020), plain and targeted: values and gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from bt_fast.ops.numeric import wide

LEAST_CLASSES = {"dlr": 3, "dlr_targeted": 4}
AGAINST_ZERO = 1e-12  # added to the denominator, as AutoAttack does


def dlr(logits: Tensor, labels: Tensor, goals: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`-(z_y - z_w) / (z_(1) - z_(3))`, the loss DLR of each row, and its gradient with respect to the logits.

    w is the largest wrong class and z_(i) the i-th largest logit. With `goals` it is the targeted loss
    `-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2)` with t the row's goal. Both are invariant to shift and scale of the
    logits. Where logits are equal, the order in which `topk` gives them decides.

    Args:
        logits: [n, K] floating point, K ≥ 3, or 4 with goals.
        labels: [n] int64, y.
        goals: [n] int64, t.

    Returns:
        values [n], float32 (float64 for float64 logits), and [n, K] in the logits' dtype.
    """
    z, at = wide(logits), labels[:, None]
    top, order = z.topk(3 if goals is None else 4, dim=1)
    if goals is None:
        towards = torch.where(order[:, :1] == at, order[:, 1:2], order[:, :1])
        scale = top[:, :1] - top[:, 2:3] + AGAINST_ZERO
    else:
        towards = goals[:, None]
        scale = top[:, :1] - (top[:, 2:3] + top[:, 3:4]) / 2 + AGAINST_ZERO
    value = -(z.gather(1, at) - z.gather(1, towards)) / scale
    below = [value] if goals is None else [value / 2, value / 2]
    of_scale = torch.cat([-value, torch.zeros_like(value), *below], dim=1)
    gradient = torch.zeros_like(z).scatter_(1, towards, 1.0).scatter_(1, at, -1.0)
    gradient += torch.zeros_like(z).scatter_(1, order, of_scale)
    return value[:, 0], (gradient / scale).to(logits.dtype)


def ranked_wrong(scores: Tensor, labels: Tensor, most: int) -> Tensor:
    """The `most` likeliest wrong classes by the scores [n, K], the likeliest first: [n, most] int64."""
    return scores.scatter(1, labels[:, None], -torch.inf).topk(most, dim=1).indices


def with_goal(target: Tensor, scores: Tensor) -> Tensor:
    """Distributions [n, K] of labels, with -1 at the likeliest wrong class by the clean image's scores [n, K]."""
    return target.scatter(1, ranked_wrong(scores, target.argmax(dim=1), 1), -1.0)
