"""Clean and robust accuracy as counts, and which images a model classifies correctly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from bt_fast import faults
from bt_fast.attack.forward import clean_logits
from bt_fast.faults import Fault


@dataclass(frozen=True)
class Accuracy:
    """Of the total number of samples, those classified correctly: clean_correct, and robust_correct under attack."""

    clean_correct: int
    robust_correct: int
    total: int

    @property
    def clean(self) -> float:
        """Clean accuracy in [0, 1]."""
        return self.clean_correct / self.total

    @property
    def robust(self) -> float:
        """Robust accuracy in [0, 1]."""
        return self.robust_correct / self.total


def classified_correctly(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, name: str) -> Tensor:
    """Whether each image is classified as its label `y`: [n] bool. Raises faults of labels and logits."""
    return sound_logits(model, x, y, name).argmax(dim=1) == y


def sound_logits(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, name: str, *more: Fault) -> Tensor:
    """The logits [n, K] of images with labels `y`, without gradient. Raises `more`, and faults of labels and logits."""
    logits = clean_logits(model, x)
    labels = faults.labels_outside(y, logits.shape[1], name)
    faults.read([*more, labels, faults.rows_without_number(logits, "the model's logits")]).wait()
    return logits
