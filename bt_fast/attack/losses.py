"""The losses that an evaluation's PGD maximises, given by their gradients with respect to the logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bt_fast import ops

LOSSES = ("ce", "margin")


def direction_of(loss: str, logits: Tensor, labels: Tensor, scaled: bool) -> Tensor:
    """Returns the loss's gradient by the logits [n, K], K ≥ 2; if `scaled`, each row up to a positive factor.

    "ce" is the cross-entropy. "margin" is the largest wrong logit minus the true one (Carlini and Wagner's f_6 without
    confidence): 1 at the first largest wrong logit and -1 at the label.
    """
    at = labels[:, None]
    if loss == "ce":
        return ops.ascent_direction(logits, torch.zeros_like(logits).scatter_(1, at, 1.0), scaled)
    wrong = logits.scatter(1, at, -math.inf).argmax(dim=1, keepdim=True)
    return torch.zeros_like(logits).scatter_(1, wrong, 1.0).scatter_(1, at, -1.0)
