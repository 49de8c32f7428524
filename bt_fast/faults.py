"""Bad values that only the device can see: counted there, raised on the host with the read that happens anyway."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bt_fast.device import HostRead
from bt_fast.ops.rows import has_softmax


@dataclass(frozen=True, eq=False)
class Fault:
    """Something that may be wrong.

    Attributes:
        count: 0-dim integer on the device, how often it is.
        message: the sentence that says what; `{count}` in it stands for the number.
    """

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
    return Fault(outside.sum(), _outside_message(len(labels), classes, name))


def rows_without_number(logits: Tensor, name: str) -> Fault:
    """The number of rows of `logits` [m, K] without a softmax. (-Inf beside a number is a class that is ruled out.)"""
    return marked_rows(~has_softmax(logits), name)


def marked_rows(unfit: Tensor, name: str) -> Fault:
    """The number of rows marked in `unfit` (bool [m]), in one forward or several, as rows without a softmax."""
    return Fault(unfit.sum(), _without_number_message(len(unfit), name))


def gradients_without_direction(faulty: Tensor) -> Fault:
    """The number of samples marked in `faulty` [m] by an attack, as `generate` fills it."""
    return Fault(
        faulty.sum(), f"the model's input gradient must be finite, but held NaN for {{count}} of {len(faulty)} samples"
    )


def unfit_messages(logits: Tensor, names: tuple[str, str]) -> tuple[str, str]:
    """What to say of `ops.assign_steps`' two counts of unfit rows; `names` of the logits and the labels."""
    m, classes = logits.shape
    return _without_number_message(m, names[0]), _outside_message(m, classes, names[1])


def _outside_message(m: int, classes: int, name: str) -> str:
    return f"{name} must lie in 0..{classes - 1}, but {{count}} of {m} do not"


def _without_number_message(m: int, name: str) -> str:
    return f"{name} must be finite, but {{count}} of {m} rows hold NaN or +Inf, or nothing but -Inf"


def counts_of(faults: Sequence[Fault]) -> Tensor:
    """Int64 [len(faults)], on the device. State changes are made conditional on it."""
    return torch.stack([fault.count.long() for fault in faults])


def read(faults: Sequence[Fault]) -> CheckedRead:
    """A read of the faults' counts alone."""
    return CheckedRead(counts_of(faults), [fault.message for fault in faults])


class CheckedRead:
    """One read of `numbers` (int64 [n + f]): n values, and behind them how often each of f faults occurred.

    `wait` returns the values, or raises ValueError with the first fault's message.
    """

    def __init__(self, numbers: Tensor, messages: Sequence[str]) -> None:
        self._messages = messages
        self._read = HostRead(numbers)

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
