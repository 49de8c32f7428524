"""Common code of the ops on remembered perturbations: images, and the frames in which each of them has its place."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

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
    def own_pixels(self) -> int:
        """The number of places of a frame."""
        return self.OWN_HEIGHT * self.OWN_WIDTH

    @property
    def own_length(self) -> int:
        """The number of elements of a frame."""
        return self.CHANNELS * self.own_pixels


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


def places(placed: Placed, rows: Tensor, layout: Layout) -> Tensor:
    """Where each pixel of images of the samples `rows` lies in its frame, [n, pixels]; past its end where outside."""
    top, left, mirrored = (values[rows, None] for values in placed)
    outside = layout.own_pixels
    i = top + torch.arange(layout.HEIGHT, device=top.device)
    j = torch.arange(layout.WIDTH, device=top.device)
    j = torch.where(mirrored, layout.WIDTH - 1 - j, j) + left
    i = torch.where((i >= 0) & (i < layout.OWN_HEIGHT), i * layout.OWN_WIDTH, outside)
    j = torch.where((j >= 0) & (j < layout.OWN_WIDTH), j, outside)
    return (i[:, :, None] + j[:, None, :]).clamp_(max=outside).flatten(1)


def taken(frames: Tensor, at: Tensor) -> Tensor:
    """Values of frames [n, channels, pixels] at places [n, pixels]; 0 past their end."""
    return pad(frames, (0, 1)).gather(2, at[:, None].expand(-1, frames.shape[1], -1))


def put(frames: Tensor, at: Tensor, values: Tensor) -> Tensor:
    """Frames [n, channels, pixels] with values [n, channels, shown] at places [n, shown]; lost past their end."""
    room = pad(frames, (0, 1)).scatter_(2, at[:, None].expand_as(values), values)
    return room[..., :-1]


def zero_rows(values: Tensor, marked: Tensor) -> None:
    """Sets the rows of values [n, ...] that are `marked` to 0."""
    if values.is_cuda:
        values.masked_fill_(per_sample(marked, values), 0)
    else:  # few or none, and on the CPU nothing waits for their numbers
        values.index_fill_(0, marked.nonzero().flatten(), 0)


def fraction(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """Stored numbers as fractions of ε in [-1, 1], in `dtype`: a new tensor."""
    values = stored.to(dtype, copy=True)
    values = values.div_(INT8_UNIT) if stored.dtype == torch.int8 else values.nan_to_num_(0.0, posinf=1.0, neginf=-1.0)
    return values.clamp_(-1.0, 1.0)


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
