"""Affine maps of images, one for each sample, with the arithmetic of Pillow's bilinear `Image.transform`.

A matrix (a, b, c, d, e, f) takes the output pixel with centre (x, y) from (ax + by + c, dx + ey + f) of the input.
Coordinates and weights are float64 and the result is truncated to uint8, in Pillow's order of operations: the bits are
the same, unless a compiler fuses multiplication and addition in one of the two. Nothing here waits for the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

DECIMALS = 1e15  # Pillow rounds sine and cosine to 15 decimals


def rotation(degrees: Tensor, height: int, width: int) -> Tensor:
    """Returns the matrices [n, 6] of `PIL.Image.rotate` by degrees [n] float64: counter-clockwise about the centre.

    Exactly the identity for 0°.
    """
    angle = -(degrees % 360.0 * (math.pi / 180.0))
    cosine, sine = ((t * DECIMALS).round() / DECIMALS for t in (angle.cos(), angle.sin()))
    x, y = width / 2, height / 2
    offsets = (cosine * -x + sine * -y + x, -sine * -x + cosine * -y + y)
    return torch.stack([cosine, sine, offsets[0], -sine, cosine, offsets[1]], dim=1)


def transform(images: Tensor, matrices: Tensor) -> Tensor:
    """Maps each of the uint8 images [n, C, H, W] by its matrix of [n, 6] float64.

    Bilinear within, the edge repeated half a pixel outwards, black beyond.
    """
    _, channels, height, width = images.shape
    x, y = (torch.arange(size, dtype=torch.float64, device=images.device) + 0.5 for size in (width, height))
    a, b, c, d, e, f = matrices[:, :, None, None].unbind(dim=1)
    x_in, y_in = a * x + b * y[:, None] + c, d * x + e * y[:, None] + f
    inside = (x_in >= 0) & (x_in < width) & (y_in >= 0) & (y_in < height)
    left, right, to_right = _neighbours(x_in, width)
    upper, lower, to_lower = _neighbours(y_in, height)
    pixels = images.flatten(2)

    def row(at: Tensor) -> Tensor:
        """Interpolates within the rows `at` [n, H, W]."""
        first, second = (
            pixels.gather(2, (at * width + column).flatten(1)[:, None].expand(-1, channels, -1)).double()
            for column in (left, right)
        )
        return first + (second - first) * to_right.flatten(1)[:, None]

    above, below = row(upper), row(lower)
    value = (above + (below - above) * to_lower.flatten(1)[:, None]).view(images.shape)
    return torch.where(inside[:, None], value, 0.0).to(torch.uint8)


def _neighbours(at: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the pixels before and after a coordinate, in 0..size-1, and its distance from the first's centre."""
    at = at - 0.5
    before = at.floor()
    first, second = (before + step for step in (0, 1))
    return first.clamp(0, size - 1).long(), second.clamp(0, size - 1).long(), at - before
