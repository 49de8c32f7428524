"""Bad values that only the device can see: counted there, raised on the host at the next read that happens anyway."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bt_fast.device import HostRead
from bt_fast.labels import class_of, is_soft
from bt_fast.ops.rows import has_softmax

MAX_LISTED = 8  # samples in a message
AGAINST_NAN = " (lower the learning rate, or look for a division by 0 in the model)"
IN_GRADIENTS = AGAINST_NAN.replace("in the model", "in the model, or in inner where that is a function")


class NonFiniteError(ValueError):
    """NaN or Inf in logits, an input gradient, the loss or a parameter's gradient; the message says which.

    A `ValueError`, so that code that catches that goes on as before.

    Args:
        message: the text.

    Attributes:
        samples: their indices in the minibatch; empty if they are unknown (the loss and the parameters' gradients come
            from all samples).
        earlier: whether it happened in the minibatch before that of the raising call, which is possible on a GPU.
    """

    def __init__(self, message: str, samples: Sequence[int] = (), *, earlier: bool = False) -> None:
        super().__init__(message)
        self.samples = tuple(samples)
        self.earlier = earlier


@dataclass(frozen=True, eq=False)
class Fault:
    """A possible error and how often it occurred.

    Attributes:
        count: 0-dim integer on the device, the number of occurrences.
        message: the error's text, in which `{count}` is replaced by the number.
        samples: returns the indices of the samples of a `NonFiniteError` (int64 [n], on the device); called only when
            the fault is raised. Without it the fault is a plain ValueError.
        earlier: see `NonFiniteError`.
        detail: returns the end of the message; also called only then, since it may wait for the device.
    """

    count: Tensor
    message: str
    samples: Callable[[], Tensor] | None = None
    earlier: bool = False
    detail: Callable[[], str] | None = None

    def error(self, count: int) -> ValueError:
        """Returns the error to raise after the host has read this count."""
        message = self.message.format(count=count) + (self.detail() if self.detail else "")
        if self.samples is None:
            return ValueError(message)
        samples = self.samples().tolist()
        return NonFiniteError(message + listed(samples), samples, earlier=self.earlier)


def listed(samples: Sequence[int], name: str = "samples") -> str:
    """Returns `: samples 3, 5`, at most the first few; empty without samples."""
    shown = ", ".join(map(str, samples[:MAX_LISTED])) + (", ..." if len(samples) > MAX_LISTED else "")
    return f": {name} {shown}" if shown else ""


# Pixels


def pixels_outside(x: Tensor, lower: float, upper: float, name: str) -> Fault:
    """Counts 1 if `x` (any shape, floating point) has NaN or values outside [lower, upper] beyond rounding, else 0.

    `onto_bounds` corrects values that are outside only by rounding.
    """
    x, room = x.detach(), rounding_of_pixels(x.dtype, lower, upper)
    least, greatest = torch.aminmax(x)
    inside = (least >= lower - room) & (greatest <= upper + room)  # False for NaN, which aminmax passes on
    message = f"{name} must lie in [{lower:g}, {upper:g}]"
    return Fault((~inside).long(), message, detail=lambda: ", but " + _of_pixels(x, lower, upper))


def rounding_of_pixels(dtype: torch.dtype, lower: float, upper: float) -> float:
    """Returns how far a pixel may be out of bounds by rounding: 4 units in the last place of the larger bound.

    For float64 it is that of float32, from which most images are converted.
    """
    return 4.0 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) * max(abs(lower), abs(upper))


def onto_bounds(x: Tensor, lower: float, upper: float) -> Tensor:
    """Returns a copy of `x` with each value in [lower, upper], after `pixels_outside`."""
    return x.clamp(lower, upper)


def _of_pixels(x: Tensor, lower: float, upper: float) -> str:
    """Returns the end of the message about pixels. Waits for the device."""
    for kind, count in (("NaN", int(x.isnan().sum())), ("infinite", int(x.isinf().sum()))):
        if count:
            return f"{count} of {x.numel()} pixels are {kind}: look for a division by 0 in what makes the images"
    least, greatest = (float(value) for value in torch.aminmax(x))
    values = f"its values are from {least:.6g} to {greatest:.6g}: "
    if least >= 0 and greatest > 2 * upper and greatest <= 255:
        return values + "bytes as floats? Divide them by 255"
    if least < lower and (lower, upper) == (0.0, 1.0):
        return values + (
            "if your loader normalises the images, say how with normalization=Normalization(mean, std), or leave that "
            "to the model: nn.Sequential(Normalize(mean, std), model)"
        )
    return values + f"if they are meant to, move them there with .clamp({lower:g}, {upper:g})"


# Rows of logits, labels, gradients


def labels_outside(labels: Tensor, classes: int, name: str) -> Fault:
    """The number of `labels` outside 0..classes-1, or, where they are [m, K], of those that are no distribution."""
    numbers = class_of(labels)  # int64: a narrow type cannot be compared with more classes than it counts
    outside = (numbers < 0) | (numbers >= classes)
    return Fault(outside.sum(), _outside_message(len(labels), classes, name, is_soft(labels)))


def rows_without_number(logits: Tensor, name: str, order: Tensor | None = None) -> Fault:
    """Counts the rows of `logits` [m, K] without a softmax. (-Inf next to a number is a class that is ruled out.)

    `order` [m] int64 is the sample of each row, here and below; None for the row's own place.
    """
    return marked_rows(~has_softmax(logits), name, order)


def marked_rows(unfit: Tensor, name: str, order: Tensor | None = None) -> Fault:
    """Counts the rows marked in `unfit` (bool [m]), in one forward or several, as rows without a softmax."""
    return Fault(unfit.sum(), _without_number_message(len(unfit), name), lambda: marked(unfit, order))


def gradients_without_direction(faulty: Tensor, order: Tensor | None = None) -> Fault:
    """Counts the samples marked in `faulty` [m] by an attack, as `generate` fills it.

    `order` [m] int64 is the sample of the minibatch for each of these; None for its own place.
    """
    message = f"the model's input gradient must be finite, but held NaN for {{count}} of {len(faulty)} samples"
    return Fault(faulty.sum(), message + IN_GRADIENTS, lambda: marked(faulty, order))


def marked(unfit: Tensor, order: Tensor | None = None) -> Tensor:
    """Returns the places where `unfit` [m] is not 0, or `order` [m] there, ascending. Waits for the device."""
    places = unfit.nonzero().flatten()
    return places if order is None else order[places.to(order.device)].unique()


def unfit_faults(
    unfit: Tensor, counts: Tensor, classes: int, names: tuple[str, str], soft: bool = False
) -> tuple[Fault, Fault]:
    """The faults in `unfit` [m] uint8 of `ops.signed_variance`, of these two counts; `names` of logits and labels.

    `soft`: the labels were distributions.
    """
    m = len(unfit)
    return (
        Fault(counts[0], _without_number_message(m, names[0]), lambda: marked(unfit & 1)),
        Fault(counts[1], _outside_message(m, classes, names[1], soft)),
    )


def unreported(updates: Tensor, gradients: Tensor, faulty: Tensor, order: Tensor | None) -> list[Fault]:
    """The faults of earlier minibatches, from the counts of bad updates and of samples with NaN in their gradient.

    `faulty` and `order` identify the samples, as in `gradients_without_direction`.
    """
    of_updates = "an earlier update met NaN logits or labels out of range: F_R was not moved by it"
    of_gradients = "the model's input gradient must be finite, but held NaN for {count} samples of earlier attacks"
    return [
        Fault(updates, of_updates + AGAINST_NAN, _no_samples, earlier=True),
        Fault(gradients, of_gradients + IN_GRADIENTS, lambda: marked(faulty, order), earlier=True),
    ]


def _outside_message(m: int, classes: int, name: str, soft: bool) -> str:
    if soft:
        return (
            f"{name} must hold distributions, rows of at least 0 with the sum 1, but {{count}} of {m} are not: "
            f"write {name} / {name}.sum(dim=1, keepdim=True), or {name}.softmax(dim=1) of logits"
        )
    return (
        f"{name} must lie in 0..{classes - 1}, but {{count}} of {m} do not: let them begin at 0, and the model have a "
        "logit for each class"
    )


def _without_number_message(m: int, name: str) -> str:
    return f"{name} must be finite, but {{count}} of {m} rows hold NaN or +Inf, or nothing but -Inf{AGAINST_NAN}"


def _no_samples() -> Tensor:
    return torch.empty(0, dtype=torch.int64, device="cpu")


# Reads


def counts_of(faults: Sequence[Fault]) -> Tensor:
    """Returns int64 [len(faults)], on the device. State changes are made conditional on it."""
    return torch.stack([fault.count.long() for fault in faults])


def read(faults: Sequence[Fault]) -> CheckedRead:
    """Starts a read of only the faults' counts."""
    return CheckedRead(counts_of(faults), faults)


class CheckedRead:
    """One read of `numbers` (int64 [n + f]): n values, followed by the number of occurrences of each of f faults."""

    def __init__(self, numbers: Tensor, faults: Sequence[Fault]) -> None:
        self._faults = faults
        self._read = HostRead(numbers)
        self._values: list[int] | None = None  # once they have been waited for, and none was a fault

    def wait(self) -> list[int]:
        """Returns the values as Python integers; raises the error of the first fault that occurred."""
        if self._values is not None:
            return self._values
        numbers = self._read.wait()
        split = len(numbers) - len(self._faults)
        for count, fault in zip(numbers[split:], self._faults, strict=True):
            if count:
                raise fault.error(count)
        self._values = numbers[:split]
        return self._values


class OfRanks(Sequence[Fault]):
    """The `own` faults of each of `count` ranks, rank by rank, then those of all; each is made when it is raised.

    Every rank raises the same error, but only the rank of the minibatch can name the samples.
    """

    def __init__(self, own: Sequence[Fault], rank: int, count: int, of_all: Sequence[Fault]) -> None:
        self._own, self._rank, self._count, self._of_all = own, rank, count, of_all

    def __len__(self) -> int:
        return self._count * len(self._own) + len(self._of_all)

    def __getitem__(self, i: Any) -> Any:
        each = len(self._own)
        if i >= self._count * each:
            return self._of_all[i - self._count * each]
        rank, fault = i // each, self._own[i % each]
        if rank != self._rank:
            fault = replace(fault, samples=fault.samples and _no_samples, detail=None)
        return replace(fault, message=f"rank {rank}: {fault.message}")
