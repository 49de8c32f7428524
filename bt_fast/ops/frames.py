"""Common code of the ops on remembered perturbations: images, and the frames in which each of them has its place."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bt_fast.ops.launch import check, contiguous, dense_format, rounded
from bt_fast.ops.numeric import per_sample
from bt_fast.ops.rows import result_dtype

STORED = (torch.int8, torch.float16, torch.float32, torch.float64)
INT8_UNIT = 127.0  # as which int8 stores a perturbation of ε


class Placed(NamedTuple):
    """Where images [m, ..., height, width] lie in their own frames, as `bt_fast.Placement` has it."""

    top: Tensor  # [m] int64
    left: Tensor  # [m] int64
    mirrored: Tensor  # [m] bool


class Layout(NamedTuple):
    """Sizes of images and of their own frames as the kernels take them: [CHANNELS, HEIGHT, WIDTH] each."""

    CHANNELS: int
    HEIGHT: int
    WIDTH: int
    OWN_HEIGHT: int
    OWN_WIDTH: int
    LAST: bool  # the channel is the fastest index of the images, not of the memory

    @classmethod
    def of(cls, x: Tensor, memory: Tensor, placed: Placed | None) -> Layout:
        """The layout of dense images x [m, ...] with a memory [slots, ...]."""
        last = not x.is_contiguous() and x.dim() == 4
        if placed is None and not last:
            length = math.prod(x.shape[1:])
            return cls(1, 1, length, 1, length, False)
        (height, width), (own_height, own_width) = x.shape[-2:], memory.shape[-2:]
        return cls(math.prod(x.shape[1:-2]), height, width, own_height, own_width, last)

    @property
    def length(self) -> int:
        """The number of elements of an image."""
        return self.CHANNELS * self.HEIGHT * self.WIDTH

    @property
    def own_length(self) -> int:
        """The number of elements of a frame."""
        return self.CHANNELS * self.OWN_HEIGHT * self.OWN_WIDTH


def dense(x: Tensor) -> Tensor:
    """Images as the layouts take them: contiguous, or 4-d with the channel as the fastest index; else copied."""
    if x.is_contiguous() or (x.dim() == 4 and dense_format(x) is not None):
        return x
    return x.contiguous()


def like(x: Tensor) -> Tensor:
    """Returns an empty tensor, dense in the memory format of `dense(x)`."""
    last = not x.is_contiguous() and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.empty_like(x, memory_format=torch.channels_last if last else torch.contiguous_format)


def radius(epsilon: float, dtype: torch.dtype, l2: bool) -> float:
    """ε as the steps on images of a dtype take it."""
    return float(epsilon) if l2 else rounded(epsilon, dtype)


def radii(epsilon: float, epsilons: Tensor | None, x: Tensor, rows: Tensor, l2: bool) -> Tensor | float:
    """ε to broadcast against images like x, of the samples `rows`."""
    if epsilons is None:
        return radius(epsilon, x.dtype, l2)
    own = epsilons[rows] if l2 else epsilons[rows].to(x.dtype)
    return per_sample(own.to(result_dtype(x)), x)


def places(placed: Placed, rows: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """For each pixel of images of the samples `rows`: where it lies in the frame, [n, pixels], and whether it does."""
    top, left, mirrored = (values[rows, None] for values in placed)
    i = top + torch.arange(layout.HEIGHT, device=top.device)
    j = torch.arange(layout.WIDTH, device=top.device)
    j = torch.where(mirrored, layout.WIDTH - 1 - j, j) + left
    return _of_both(i, j, layout.OWN_HEIGHT, layout.OWN_WIDTH)


def showing(placed: Placed, rows: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """For each pixel of the frames: where the images of the samples `rows` show it, [n, pixels], and if they do."""
    top, left, mirrored = (values[rows, None] for values in placed)
    i = torch.arange(layout.OWN_HEIGHT, device=top.device) - top
    j = torch.arange(layout.OWN_WIDTH, device=top.device) - left
    j = torch.where(mirrored, layout.WIDTH - 1 - j, j)
    return _of_both(i, j, layout.HEIGHT, layout.WIDTH)


def taken(values: Tensor, at: Tensor, there: Tensor) -> Tensor:
    """Values [n, channels, pixels] at places [n, pixels]; 0 where they are not `there`."""
    at, there = at[:, None], there[:, None]
    return values.gather(2, at.expand(-1, values.shape[1], -1)).masked_fill_(~there, 0)


def fraction(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """Stored numbers as fractions of ε in [-1, 1], in `dtype`."""
    values = stored.to(dtype)
    if stored.dtype == torch.int8:
        values = values.div_(INT8_UNIT)
    return values.nan_to_num(0.0, posinf=1.0, neginf=-1.0).clamp_(-1.0, 1.0)


def placed_arguments(placed: Placed | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The placement as the kernels take it."""
    if placed is None:
        return None, None, None
    return contiguous(placed.top), contiguous(placed.left), placed.mirrored.contiguous().view(torch.uint8)


def placed_of(top: Tensor | None, left: Tensor | None, mirrored: Tensor | None) -> Placed | None:
    """The placement of an op's arguments; None if one of them is."""
    return None if top is None or left is None or mirrored is None else Placed(top, left, mirrored)


def check_frames(x: Tensor, name: str, memory: Tensor, slots: Tensor, placed: tuple[Any, Any, Any]) -> None:
    """Raises TypeError or ValueError unless memory [slots, ...], slots [m] and a placement fit images `name`."""
    m, device = x.shape[:1], x.device
    if memory.dtype not in STORED:
        expected = " or ".join(map(str, STORED))
        raise TypeError(f"memory must be {expected}, got {memory.dtype}: write memory.to(torch.float16)")
    check("slots", slots, m, (torch.int64,), device)
    if any(values is None for values in placed) and any(values is not None for values in placed):
        raise ValueError("placed must have top, left and mirrored together: give all three of them, or none")
    for values, part, dtype in zip(placed, Placed._fields, (torch.int64, torch.int64, torch.bool), strict=True):
        check(part, values, m, (dtype,), device)
    fits = memory.shape[1:] == x.shape[1:]
    if placed[0] is not None:
        fits = memory.dim() == x.dim() >= 3 and memory.shape[1:-2] == x.shape[1:-2]
    if not fits:
        expected = "[slots, ..., height, width]" if placed[0] is not None else f"[slots, *{list(x.shape[1:])}]"
        raise ValueError(
            f"memory must have shape {expected} for {name} {list(x.shape)}, got {list(memory.shape)}: "
            "give it a row of each sample's own shape"
        )
    if memory.device != device:
        raise ValueError(
            f"memory must be on {device} like {name}, got {memory.device}: write memory.to({str(device)!r})"
        )
    if not memory.is_contiguous():
        raise ValueError("memory must be contiguous: write memory.contiguous()")


def _of_both(i: Tensor, j: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    there = ((i >= 0) & (i < height))[:, :, None] & ((j >= 0) & (j < width))[:, None, :]
    at = i.clamp(0, height - 1)[:, :, None] * width + j.clamp(0, width - 1)[:, None, :]
    return at.flatten(1), there.flatten(1)
