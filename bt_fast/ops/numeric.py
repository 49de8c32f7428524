"""The number types of the ops, and their precision."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # torch only stores 8-bit types


def computable(values: Tensor) -> bool:
    """Whether torch computes with them: dense numbers in one of `FLOATS`."""
    return values.dtype in FLOATS and values.layout == torch.strided


def kind_of(values: object) -> str:
    """Describes a value, for an error that expected computable numbers."""
    if not isinstance(values, Tensor):
        return type(values).__name__
    return str(values.dtype) if values.layout == torch.strided else f"{values.dtype}, {values.layout}"


def wide(values: Tensor) -> Tensor:
    """Returns `values` in float32 at least: 16-bit numbers are only stored, never computed with."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Returns `values` [n] as [n, 1, ...], to broadcast against `like` [n, ...]."""
    return values.view(-1, *[1] * (like.dim() - 1))
