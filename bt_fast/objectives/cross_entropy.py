"""The cross-entropy of the losses: of classes or distributions, with or without label smoothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bt_fast import ops
from bt_fast.labels import is_soft, target_of
from bt_fast.validation import check_choice, real

Smoothing = Literal["torch", "others"]


@dataclass(frozen=True)
class CrossEntropy:
    """The mean cross-entropy of logits and labels, `1/m Σ_i Σ_k -t_ik log softmax(z_i)_k`.

    Of a distribution p the target is `t = (1-s)·p + s/K` ("torch"), or `(1-s)·p + s/(K-1)·(1-p)` ("others"). A class
    with t = 0 adds 0, also where the logits rule it out by -Inf.

    Attributes:
        label_smoothing: s in [0, 1).
        smoothing: where s goes: "torch", to all K classes alike, as `F.cross_entropy` has it, or "others", to the K-1
            other classes, so that a label keeps 1-s.

    Raises:
        TypeError: label_smoothing is no number. ValueError: it is out of range, or smoothing is not known.
    """

    label_smoothing: float = 0.0
    smoothing: Smoothing = "torch"

    def __post_init__(self) -> None:
        amount = real("label_smoothing", self.label_smoothing)
        if not 0.0 <= amount < 1.0:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {amount}: write label_smoothing=0.1")
        check_choice("smoothing", self.smoothing, ("torch", "others"))
        vars(self).update(label_smoothing=amount)

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        """The mean, 0-dim, of logits [m, K] and y, integers [m] or distributions [m, K]; in float32 at least."""
        z = ops.wide(logits)
        if not is_soft(y) and (self.smoothing == "torch" or not self.label_smoothing):
            return F.cross_entropy(z, y, label_smoothing=self.label_smoothing)
        target = self.target(y, z)
        return -weighted(target, F.log_softmax(z, dim=1)).mean()

    def of_rows(self, logits: Tensor, y: Tensor) -> Tensor:
        """The cross-entropy of each row, [m]."""
        z = ops.wide(logits)
        return -weighted(self.target(y, z), F.log_softmax(z, dim=1))

    def target(self, y: Tensor, like: Tensor) -> Tensor:
        """t [m, K] of these labels, with the columns and dtype of `like`."""
        p, s, classes = target_of(y, like), self.label_smoothing, like.shape[1]
        if not s:
            return p
        return (1.0 - s) * p + (s / classes if self.smoothing == "torch" else s / (classes - 1) * (1.0 - p))

    def options(self) -> str:
        """What is not the default, as it would be written behind other arguments."""
        if not self.label_smoothing:
            return ""
        return f", label_smoothing={self.label_smoothing:g}, smoothing={self.smoothing!r}"


class Smoothed:
    """The label smoothing of a loss, which may be read and set, as its β may."""

    cross_entropy: CrossEntropy

    @property
    def label_smoothing(self) -> float:
        """The amount s in [0, 1) of the term that learns the labels; may be set, with the errors of `CrossEntropy`."""
        return self.cross_entropy.label_smoothing

    @label_smoothing.setter
    def label_smoothing(self, amount: float) -> None:
        self.cross_entropy = replace(self.cross_entropy, label_smoothing=amount)

    @property
    def smoothing(self) -> Smoothing:
        """Where s goes: "torch" or "others"; may be set, with the errors of `CrossEntropy`."""
        return self.cross_entropy.smoothing

    @smoothing.setter
    def smoothing(self, smoothing: Smoothing) -> None:
        self.cross_entropy = replace(self.cross_entropy, smoothing=smoothing)


def weighted(weights: Tensor, values: Tensor) -> Tensor:
    """`Σ_k w_ik v_ik` [m]; 0 where w is, also of an infinite value."""
    return (weights * torch.where(weights > 0, values, 0.0)).sum(dim=1)
