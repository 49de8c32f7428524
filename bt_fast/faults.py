"""Bad values that only the device can see: counted there, raised on the host with the read that happens anyway."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bt_fast.device import HostRead


@dataclass(frozen=True, eq=False)
class Fault:
    """How often something is wrong (int64, 0-dim, on the device) and the sentence that says what."""

    count: Tensor
    message: str


def pixels_outside(x: Tensor, lower: float, upper: float, name: str) -> Fault:
    """1 where `x` (any shape, floating point) has a value outside [lower, upper], or NaN; else 0."""
    least, greatest = torch.aminmax(x.detach())
    inside = (least >= lower) & (greatest <= upper)  # False for NaN, which aminmax passes on
    return Fault((~inside).long(), f"{name} must lie in [{lower:g}, {upper:g}], but has pixels outside it or NaN")


def labels_outside(labels: Tensor, classes: int, name: str) -> Fault:
    """The number of `labels` (integers [m]) outside 0..classes-1."""
    labels = labels.long()  # a narrow type cannot be compared with more classes than it counts
    outside = (labels < 0) | (labels >= classes)
    return Fault(outside.sum(), f"{name} must lie in 0..{classes - 1}, but {{count}} of {len(labels)} do not")


def rows_without_number(logits: Tensor, name: str) -> Fault:
    """The number of rows of `logits` [m, K] that hold NaN or +Inf. (-Inf is a class that is ruled out.)"""
    bad = (logits.isnan() | logits.isposinf()).any(dim=1)
    return Fault(bad.sum(), f"{name} must be finite, but {{count}} of {len(logits)} rows hold NaN or +Inf")


def gradients_without_direction(faulty: Tensor) -> Fault:
    """The number of samples marked in `faulty` [m] by an attack, as `generate` fills it."""
    return Fault(
        faulty.sum(), f"the model's input gradient must be finite, but held NaN for {{count}} of {len(faulty)} samples"
    )


def any_of(faults: Sequence[Fault]) -> Tensor:
    """Bool, 0-dim, on the device: whether any fault occurred. State changes are made conditional on it."""
    return torch.stack([fault.count for fault in faults]).any()


class CheckedRead:
    """One read of `values` (int64 [n]) and of the faults' counts.

    `wait` returns the values, or raises ValueError with the first fault's message.
    """

    def __init__(self, values: Tensor, faults: Sequence[Fault]) -> None:
        self._messages = [fault.message for fault in faults]
        counts = [fault.count.reshape(1).long() for fault in faults]
        self._read = HostRead(torch.cat([values, *counts]))

    def wait(self) -> list[int]:
        """The values as Python integers.

        Raises:
            ValueError: a fault was counted.
        """
        numbers = self._read.wait()
        split = len(numbers) - len(self._messages)
        for count, message in zip(numbers[split:], self._messages, strict=True):
            if count:
                raise ValueError(message.format(count=count))
        return numbers[:split]
