"""Normalised images: a loader has subtracted a mean from each channel and divided it by a standard deviation.

An attack's ε, steps and bounds refer to pixels in [0, 1]. So the images are converted back to pixels first, and the
normalisation becomes a part of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bt_fast.attack.wrapped import Lent, unwrapped
from bt_fast.faults import rounding_of_pixels
from bt_fast.ops import wide
from bt_fast.untraced import untraced
from bt_fast.validation import check_kind, check_model, real


@dataclass(frozen=True)
class Normalization:
    """`(pixel - mean) / std` of each channel, as a loader has applied it to its images.

    `PGD(..., normalization=Normalization(mean, std))` takes that loader's images. The result is that for
    `nn.Sequential(Normalize(mean, std), model)` and the pixels, up to their rounding: ε and step sizes are in pixel
    units of [0, 1]. Instances with the same numbers are equal, so it may be rebuilt for each call.

    Attributes:
        mean: [C], std: [C] > 0, in pixel units; kept as tuples.

    Raises:
        TypeError: they are not sequences of numbers.
        ValueError: their lengths differ or are 0, a number is not finite, or a deviation not above 0.
    """

    mean: Sequence[float]
    std: Sequence[float]

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, _numbers(name, getattr(self, name)))
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError(
                f"mean and std must have one number for each channel, got {self.mean} and {self.std}: "
                "give as many as the images have channels"
            )
        if not all(s > 0 for s in self.std):
            raise ValueError(
                f"std must hold numbers above 0, got {self.std}: "
                "give the deviations, not their negatives; of a constant channel write 1"
            )


class Normalize(nn.Module):
    """`(x - mean) / std` of each channel, as a layer in front of a model: `nn.Sequential(Normalize(mean, std), model)`.

    It has no parameters and saves no buffers.

    Args:
        mean: [C], std: [C] > 0.
        dims: the dimensions of a batch: 4 for images [n, C, H, W].

    Raises:
        TypeError or ValueError: see `Normalization`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], dims: int = 4) -> None:
        super().__init__()
        self._values, self._shape = Normalization(mean, std), (-1, *[1] * (dims - 2))
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(self._values, name)).view(self._shape), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Normalize:
        """Moves and casts the numbers as originally given: casting a cast would accumulate rounding."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in ("mean", "std"):
            buffer = getattr(self, name)
            setattr(self, name, buffer.new_tensor(getattr(self._values, name)).view(self._shape))
        return self

    def extra_repr(self) -> str:
        """The numbers."""
        return f"mean={self._values.mean}, std={self._values.std}"

    def forward(self, x: Tensor) -> Tensor:
        """Returns x [n, C, ...] without mean and deviation."""
        return (x - self.mean) / self.std

    def pixels(self, x: Tensor, lower: float, upper: float) -> Tensor:
        """Returns the pixels of normalised images x [n, C, ...], in their dtype. Never waits for the device.

        Pixels outside the bounds [lower, upper] by no more than rounding are moved onto them. The check of the bounds
        refuses others.
        """
        values = wide(x) * self.std + self.mean
        inside = values.clamp(lower, upper)
        room = rounding_of_pixels(x.dtype, lower, upper)
        return torch.where((values - inside).abs() <= room, inside, values).to(x.dtype)


class OnPixels(Lent):
    """A model behind `Normalize`; there is one for each model and normalization."""

    def __init__(self, normalization: Normalization, dims: int) -> None:
        super().__init__()
        self.normalize = Normalize(normalization.mean, normalization.std, dims)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the model's output for pixels x [n, C, ...]."""
        return cast(Tensor, self.model(self.normalize(x)))


_kept: WeakKeyDictionary[nn.Module, dict[tuple[Normalization, int], OnPixels]] = WeakKeyDictionary()


@contextmanager
def on_pixels(
    model: nn.Module,
    x: Tensor,
    normalization: Normalization | None,
    name: str = "x_natural",
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Iterator[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    """Yields the model as a function of pixels, and a function that turns images like x [n, C, ...] into pixels.

    Without a normalization these are the model itself and the identity. `name` is the name of x in messages.
    TypeError or ValueError if normalization, model or the number of channels do not fit.
    """
    if normalization is None:
        del x  # this suspended frame would keep it alive
        yield model, lambda images: images
        return
    check_model(model)
    check_kind("normalization", normalization, Normalization, "write Normalization(mean, std)", optional=True)
    channels = len(normalization.mean)
    if x.dim() < 2 or x.shape[1] != channels:
        raise ValueError(
            f"{name} must have {channels} channels as normalization has, got shape {list(x.shape)}: "
            "give mean and std as many numbers as the images have channels"
        )
    front, inside = (_front(m, x, normalization) for m in (model, unwrapped(model)))
    del x

    def restored(images: Tensor) -> Tensor:
        return front.normalize.pixels(images.detach(), *bounds)

    with inside.holding(unwrapped(model), inside), front.holding(model, inside):
        yield front, restored


@untraced
def _front(model: nn.Module, x: Tensor, normalization: Normalization) -> OnPixels:
    """Returns the front that is kept for this model, on the device and in the dtype of x."""
    kept = _kept.setdefault(model, {})
    with torch.inference_mode(False):
        front = kept.get((normalization, x.dim()))
        if front is None:
            with torch.device("cpu"):  # not the caller's default device
                front = kept[normalization, x.dim()] = OnPixels(normalization, x.dim())
        if (front.normalize.mean.dtype, front.normalize.mean.device) != (x.dtype, x.device):
            front.normalize.to(x.device, x.dtype)
    return front


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        raise TypeError(
            f"{name} must be a sequence of numbers, one for each channel, got {values!r}: "
            f"write {name}=(0.5,), if there is one channel"
        )
    reals = tuple(real(name, value.item() if isinstance(value, Tensor) else value) for value in values)
    if not all(map(math.isfinite, reals)):
        raise ValueError(f"{name} must hold finite numbers, got {reals}: look for a division by 0 in what gave them")
    return reals
