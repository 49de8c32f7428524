"""The losses that an evaluation's PGD ascends, by their gradients with respect to the logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bt_fast import ops
from bt_fast.attack.dlr import dlr

LOSSES = ("ce", "margin")


def direction_of(loss: str, logits: Tensor, labels: Tensor, scaled: bool) -> Tensor:
    """The loss's gradient with respect to the logits [n, K], K ≥ 2; if `scaled` each row up to a positive factor.

    "ce" is the cross-entropy. "margin" is the largest wrong logit minus the true one (Carlini and Wagner's f_6 without
    confidence): 1 at the first largest wrong logit and -1 at the label. "dlr" is that of `attack.dlr`.
    """
    if loss == "dlr":
        return dlr(logits, labels)[1]
    at = labels[:, None]
    if loss == "ce":
        return ops.ascent_direction(logits, torch.zeros_like(logits).scatter_(1, at, 1.0), scaled)
    wrong = logits.scatter(1, at, -math.inf).argmax(dim=1, keepdim=True)
    return torch.zeros_like(logits).scatter_(1, wrong, 1.0).scatter_(1, at, -1.0)
