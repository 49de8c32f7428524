"""Random crops and flips of whole minibatches on their own device, with the placement of each crop in its image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bt_fast.ops.frames import Layout, Placed, places, taken
from bt_fast.ops.numeric import kind_of
from bt_fast.placement import Placement, check_placement
from bt_fast.validation import check_generator, check_kind, step_count


def crop(x: Tensor, placement: Placement) -> Tensor:
    """The crops of images at a placement, as large as the images: 0 where a crop shows padding, mirrored at the end.

    Row i and column j of a crop of width W is the image's pixel in row `top + i` and column `left + j`, or
    `left + W - 1 - j` where it is mirrored. One gather; on a GPU nothing waits for the device.

    Args:
        x: [m, C, H, W] of any dtype.
        placement: of the m crops, on the images' device.

    Returns:
        [m, C, H, W] of x's dtype, contiguous.

    Raises:
        TypeError, ValueError: x is not such a tensor, or the placement not one of m crops; on the CPU also where a crop
            lies outside of its image.
    """
    _check(x)
    check_placement(placement, len(x), x.shape[1:], x.shape[1:], x.device)
    return cut(x, placement)


@dataclass(frozen=True)
class CropAndFlip:
    """Random crops after zero padding, then mirror images of half of them: `x, placement = CropAndFlip()(x)`.

    The augmentation of CIFAR training, for a whole minibatch at once, and where it put each image: what keeps numbers
    for each pixel of an image from epoch to epoch can follow it. Each corner is drawn uniformly in
    -padding..padding, for rows and columns, as by torchvision's `RandomCrop`.

    Args:
        padding: pixels of black on each side, at least 0; 0 crops nothing. Less than the images' height and width.
        flip: whether each crop is mirrored with probability 1/2. False for digits and letters.

    Raises:
        TypeError, ValueError: padding is not such an integer, or flip not a bool.
    """

    padding: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        step_count("padding", self.padding)
        check_kind("flip", self.flip, bool, "write flip=True or flip=False")

    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Placement]:
        """Returns the augmented images and the placement that made them, `crop(x, placement)`.

        Draws on the images' device, in three small draws, one gather, and without waiting for it.

        Args:
            x: [m, C, H, W] of any dtype; 0 must be black, so normalise afterwards.
            generator: on the images' device; its default generator if not given.

        Raises:
            TypeError, ValueError: x is not such a tensor, or not larger than the padding; the generator is on another
                device.
        """
        _check(x)
        if self.padding >= min(x.shape[2:]):
            raise ValueError(
                f"padding must be less than the height and width of the images, got {self.padding} for images of "
                f"{x.shape[2]}x{x.shape[3]}: a crop could show nothing of its image; write padding=4, or less"
            )
        check_generator(generator, x.device)
        placement = self.draw(len(x), x.device, generator)
        return cut(x, placement), placement

    def draw(self, m: int, device: torch.device, generator: torch.Generator | None = None) -> Placement:
        """Draws the placement of m images on a device, from the generator there or the device's default one."""
        m = step_count("m", m)
        drawn: dict[str, Any] = {"device": device, "generator": generator}
        top = torch.randint(-self.padding, self.padding + 1, (m,), **drawn)
        left = torch.randint(-self.padding, self.padding + 1, (m,), **drawn)
        if not self.flip:
            return Placement(top, left, torch.zeros(m, dtype=torch.bool, device=device))
        return Placement(top, left, torch.rand(m, dtype=torch.float32, **drawn) < 0.5)


def cut(x: Tensor, placement: Placement) -> Tensor:
    """`crop` without its checks."""
    channels, height, width = x.shape[1:]
    layout = Layout(channels, height, width, height, width, False)
    placed = Placed(placement.top, placement.left, placement.mirrored)
    return taken(x.flatten(2), places(placed, torch.arange(len(x), device=x.device), layout)).view(x.shape)


def _check(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor of images, got {type(x).__name__}: write torch.as_tensor(x)")
    if x.layout != torch.strided or x.is_quantized:
        raise TypeError(f"x must be a dense tensor of images, got {kind_of(x)}: write x.to_dense()")
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(
            f"x must have shape [m, C, H, W] with C, H, W >= 1, got {list(x.shape)}: of one image write x[None]"
        )
