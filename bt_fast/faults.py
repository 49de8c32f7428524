"""Bad values that only the device can see: counted there, raised on the host with the read that happens anyway."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bt_fast.device import HostRead
from bt_fast.ops.rows import has_softmax

SHOWN = 8  # samples that a message lists
AGAINST_NAN = " (lower the learning rate, or look for a division by 0 in the model)"


class NonFiniteError(ValueError):
    """NaN or Inf in logits, an input gradient, the loss or a parameter's gradient.

    Args:
        message: the sentence that says what.

    Attributes:
        samples: which samples of the minibatch, as indices into it; empty where that cannot be told (the loss and the
            parameters' gradients are of all of them).
        earlier: it happened in the minibatch before the one of the call that raises: on a GPU some are told so late.
    """

    def __init__(self, message: str, samples: Sequence[int] = (), *, earlier: bool = False) -> None:
        super().__init__(message)
        self.samples = tuple(samples)
        self.earlier = earlier


@dataclass(frozen=True, eq=False)
class Fault:
    """Something that may be wrong.

    Attributes:
        count: 0-dim integer on the device, how often it is.
        message: the sentence that says what; `{count}` in it stands for the number.
        samples: gives the indices of the samples of a `NonFiniteError` (int64 [n], on the device), and is asked only
            when the fault is told. Without it the fault is a plain ValueError.
        earlier: as in `NonFiniteError`.
        detail: gives the end of the sentence, and is asked only then too: it may wait for the device.
    """

    count: Tensor
    message: str
    samples: Callable[[], Tensor] | None = None
    earlier: bool = False
    detail: Callable[[], str] | None = None

    def error(self, count: int) -> ValueError:
        """What to raise.

        Args:
            count: how often it was, as the host has read it.
        """
        message = self.message.format(count=count) + (self.detail() if self.detail else "")
        if self.samples is None:
            return ValueError(message)
        samples = self.samples().tolist()
        return NonFiniteError(message + told(samples), samples, earlier=self.earlier)


def told(samples: Sequence[int], name: str = "samples") -> str:
    """`: samples 3, 5`, at most the first few; nothing where there are none."""
    shown = ", ".join(map(str, samples[:SHOWN])) + (", ..." if len(samples) > SHOWN else "")
    return f": {name} {shown}" if shown else ""


def pixels_outside(x: Tensor, lower: float, upper: float, name: str) -> Fault:
    """1 where `x` (any shape, floating point) has a value outside [lower, upper] by more than rounding, or NaN; else 0.

    What is outside by rounding alone, `onto_bounds` puts right.
    """
    x, room = x.detach(), rounding_of_pixels(x.dtype, lower, upper)
    least, greatest = torch.aminmax(x)
    inside = (least >= lower - room) & (greatest <= upper + room)  # False for NaN, which aminmax passes on
    return Fault(
        (~inside).long(),
        f"{name} must lie in [{lower:g}, {upper:g}]",
        detail=lambda: ", but " + _of_pixels(x, lower, upper),
    )


def rounding_of_pixels(dtype: torch.dtype, lower: float, upper: float) -> float:
    """How far outside its bounds a pixel may be by rounding: 4 units in the last place of the larger bound.

    Of float32 in float64 too, through which most images have come.
    """
    return 4.0 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) * max(abs(lower), abs(upper))


def onto_bounds(x: Tensor, lower: float, upper: float) -> Tensor:
    """A copy of `x` with each value in [lower, upper], for what `pixels_outside` takes for rounding."""
    return x.clamp(lower, upper)


def _of_pixels(x: Tensor, lower: float, upper: float) -> str:
    """What is wrong with pixels, and what to do. Waits for the device."""
    for kind, count in (("NaN", int(x.isnan().sum())), ("infinite", int(x.isinf().sum()))):
        if count:
            return f"{count} of {x.numel()} pixels are {kind}: look for a division by 0 in what makes the images"
    least, greatest = (float(value) for value in torch.aminmax(x))
    found = f"its values are from {least:.6g} to {greatest:.6g}: "
    if least >= 0 and greatest > 2 * upper and greatest <= 255:
        return found + "bytes as floats? Divide them by 255"
    if least < lower and (lower, upper) == (0.0, 1.0):
        return found + (
            "if your loader normalises the images, say how with normalization=Normalization(mean, std), or leave that "
            "to the model: nn.Sequential(Normalize(mean, std), model)"
        )
    return found + f"if they are meant to, move them there with .clamp({lower:g}, {upper:g})"


def labels_outside(labels: Tensor, classes: int, name: str) -> Fault:
    """The number of `labels` (integers [m]) outside 0..classes-1."""
    labels = labels.long()  # a narrow type cannot be compared with more classes than it counts
    outside = (labels < 0) | (labels >= classes)
    return Fault(outside.sum(), _outside_message(len(labels), classes, name))


def rows_without_number(logits: Tensor, name: str, order: Tensor | None = None) -> Fault:
    """The number of rows of `logits` [m, K] without a softmax. (-Inf beside a number is a class that is ruled out.)

    Args:
        order: [m] int64, which sample each row is of; its own place if not given.
    """
    return marked_rows(~has_softmax(logits), name, order)


def marked_rows(unfit: Tensor, name: str, order: Tensor | None = None) -> Fault:
    """The number of rows marked in `unfit` (bool [m]), in one forward or several, as rows without a softmax.

    Args:
        order: [m] int64, which sample each row is of; its own place if not given.
    """
    return Fault(unfit.sum(), _without_number_message(len(unfit), name), lambda: marked(unfit, order))


def gradients_without_direction(faulty: Tensor, order: Tensor | None = None) -> Fault:
    """The number of samples marked in `faulty` [m] by an attack, as `generate` fills it.

    Args:
        order: [m] int64, which sample of the minibatch each of these is; their own places if not given.
    """
    return Fault(
        faulty.sum(),
        f"the model's input gradient must be finite, but held NaN for {{count}} of {len(faulty)} samples{AGAINST_NAN}",
        lambda: marked(faulty, order),
    )


def marked(unfit: Tensor, order: Tensor | None = None) -> Tensor:
    """The places of what is not 0 in `unfit` [m], or what `order` [m] has there, ascending. Waits for the device."""
    places = unfit.nonzero().flatten()
    return places if order is None else order[places.to(order.device)].unique()


def unfit_faults(unfit: Tensor, counts: Tensor, classes: int, names: tuple[str, str]) -> tuple[Fault, Fault]:
    """What is wrong with the rows of `ops.assign_steps`.

    Args:
        unfit: [m] uint8, as `ops.signed_variance` returns it; counts: the op's two counts of it.
        names: of the logits and the labels.
    """
    m = len(unfit)
    return (
        Fault(counts[0], _without_number_message(m, names[0]), lambda: marked(unfit & 1)),
        Fault(counts[1], _outside_message(m, classes, names[1])),
    )


def _outside_message(m: int, classes: int, name: str) -> str:
    return (
        f"{name} must lie in 0..{classes - 1}, but {{count}} of {m} do not: let them begin at 0, and the model have a "
        "logit for each class"
    )


def _without_number_message(m: int, name: str) -> str:
    return f"{name} must be finite, but {{count}} of {m} rows hold NaN or +Inf, or nothing but -Inf{AGAINST_NAN}"


def counts_of(faults: Sequence[Fault]) -> Tensor:
    """Int64 [len(faults)], on the device. State changes are made conditional on it."""
    return torch.stack([fault.count.long() for fault in faults])


def read(faults: Sequence[Fault]) -> CheckedRead:
    """A read of the faults' counts alone."""
    return CheckedRead(counts_of(faults), faults)


class CheckedRead:
    """One read of `numbers` (int64 [n + f]): n values, and behind them how often each of f faults occurred.

    `wait` returns the values, or raises the first fault's error.
    """

    def __init__(self, numbers: Tensor, faults: Sequence[Fault]) -> None:
        self._faults = faults
        self._read = HostRead(numbers)

    def wait(self) -> list[int]:
        """The values as Python integers.

        Raises:
            ValueError: a fault was counted; a `NonFiniteError` with the samples, if it is one.
        """
        numbers = self._read.wait()
        split = len(numbers) - len(self._faults)
        for count, fault in zip(numbers[split:], self._faults, strict=True):
            if count:
                raise fault.error(count)
        return numbers[:split]


class OfRanks(Sequence[Fault]):
    """`own` faults as each of `count` ranks may have them, rank by rank, then those of all; made when one is told.

    Every rank raises the same, but only the one whose minibatch it is can name the samples.
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
        own = rank == self._rank
        samples = fault.samples if own or fault.samples is None else no_samples
        return Fault(
            fault.count, f"rank {rank}: {fault.message}", samples, fault.earlier, fault.detail if own else None
        )


def unreported(updates: Tensor, gradients: Tensor, samples: Callable[[], Tensor]) -> list[Fault]:
    """The faults of earlier minibatches, from the counts of bad updates and of samples with NaN in their gradient."""
    of_updates = "an earlier update met NaN logits or labels out of range: F_R was not moved by it"
    of_gradients = "the model's input gradient must be finite, but held NaN for {count} samples of earlier attacks"
    return [
        Fault(updates, of_updates + AGAINST_NAN, no_samples, earlier=True),
        Fault(gradients, of_gradients + AGAINST_NAN, samples, earlier=True),
    ]


def no_samples() -> Tensor:
    """The indices of a fault that cannot name its samples."""
    return torch.empty(0, dtype=torch.int64, device="cpu")
