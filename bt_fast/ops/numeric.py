"""What the ops share."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(values: Tensor) -> Tensor:
    """`values` in float32 at least: 16-bit numbers are only ever stored, never computed with."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """`values` [n] as [n, 1, ...], to broadcast against `like` [n, ...]."""
    return values.view(-1, *[1] * (like.dim() - 1))
