"""Operations that map grey values, as in Pillow: each is a table [n, C, 256] uint8 for images [n, C, H, W] uint8.

Nothing here waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

VALUES = 256


def apply_tables(images: Tensor, tables: Tensor) -> Tensor:
    """Replaces each grey value by its entry in the table."""
    return tables.gather(2, images.flatten(2).long()).view(images.shape)


def unchanged(images: Tensor) -> Tensor:
    """Returns the table of no change, [256] int64, on the images' device."""
    return torch.arange(VALUES, device=images.device)


def autocontrast(images: Tensor) -> Tensor:
    """Stretches each channel's grey values over 0..255 (`PIL.ImageOps.autocontrast`); a flat channel stays."""
    values = unchanged(images)
    least, greatest = (extreme[:, :, None].double() for extreme in (images.amin((2, 3)), images.amax((2, 3))))
    span = (greatest - least).clamp(min=1.0)
    scale = torch.full_like(span, 255.0) / span  # dividing a number by a tensor would take the reciprocal first
    stretched = (values * scale + -least * scale).trunc().clamp(0, VALUES - 1)
    return torch.where(greatest > least, stretched, values.double()).to(torch.uint8)


def equalize(images: Tensor) -> Tensor:
    """Spreads each channel's grey values evenly (`PIL.ImageOps.equalize`); not if it has too few distinct pixels."""
    values, pixels = unchanged(images), images.flatten(2).long()
    histogram = torch.zeros(*pixels.shape[:2], VALUES, dtype=torch.int64, device=images.device)
    histogram.scatter_add_(2, pixels, torch.ones_like(pixels))
    of_greatest = histogram.gather(2, pixels.amax(dim=2, keepdim=True))
    step = (pixels.shape[2] - of_greatest) // 255
    below = histogram.cumsum(dim=2) - histogram
    spread = (step // 2 + below) // step.clamp(min=1)
    return torch.where(step > 0, spread.clamp(max=VALUES - 1), values).to(torch.uint8)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keeps the upper bits [n] in 0..8 of each grey value (`PIL.ImageOps.posterize`, which refuses 0: none)."""
    values, dropped = unchanged(images), 2 ** (8 - bits)[:, None, None]
    return _for_each_channel(values - values % dropped, images)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Inverts the grey values from a threshold [n] in 0..256 on (`PIL.ImageOps.solarize`)."""
    values = unchanged(images)
    return _for_each_channel(torch.where(values < threshold[:, None, None], values, 255 - values), images)


def _for_each_channel(table: Tensor, images: Tensor) -> Tensor:
    return table.to(torch.uint8).expand(-1, images.shape[1], -1)
