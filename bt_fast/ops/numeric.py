"""What the ops share."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # torch only stores those of 8 bits


def computable(values: Tensor) -> bool:
    """Whether torch computes with them on any device: dense numbers in one of `FLOATS`, which are there."""
    return values.dtype in FLOATS and values.layout == torch.strided and not values.is_meta


def kind_of(values: object) -> str:
    """What an error says was given in place of computable numbers."""
    if not isinstance(values, Tensor):
        return type(values).__name__
    layout = "" if values.layout == torch.strided else f", {values.layout}"
    return f"{values.dtype}{layout}{', on meta' if values.is_meta else ''}"


def wide(values: Tensor) -> Tensor:
    """`values` in float32 at least: 16-bit numbers are only ever stored, never computed with."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """`values` [n] as [n, 1, ...], to broadcast against `like` [n, ...]."""
    return values.view(-1, *[1] * (like.dim() - 1))
