"""Where today's view of each image lies in the image's own frame: a crop and a mirror, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bt_fast import faults
from bt_fast.faults import Fault
from bt_fast.ops.numeric import kind_of
from bt_fast.validation import check_device, check_kind, holds_integers

INSTEAD = "write Placement(top=top, left=left, mirrored=mirrored), a tensor [m] of each"


@dataclass(frozen=True, eq=False)
class Placement:
    """Where today's crop of each of m images lies in that image's own frame: it is cropped first, then mirrored.

    Row i and column j of an image of width w, as the model sees it, is row `top + i` of the image's own frame and
    column `left + j`, or `left + w - 1 - j` where it is mirrored. Where that lies outside of the frame, the crop shows
    padding.

    Attributes:
        top: [m] int64, the row of the own frame that the crop's first row shows; may be negative, at padding.
        left: [m] int64, likewise of its first column, before it is mirrored.
        mirrored: [m] bool, whether left and right are swapped.
    """

    top: Tensor
    left: Tensor
    mirrored: Tensor


def check_placement(
    placement: Placement, m: int, crop_shape: Sequence[int], own_shape: Sequence[int], device: torch.device
) -> Fault:
    """Raise TypeError or ValueError unless it is a placement of m crops in frames of images.

    On the CPU a crop that shows no pixel of its image is a ValueError, too. On a GPU, where that would wait for the
    device, it is counted in the fault that is returned.

    Args:
        crop_shape, own_shape: of one image as the model sees it, and of its own frame: [..., height, width].
        device: the images'.
    """
    check_form(placement, m, crop_shape, own_shape, device)
    outside = outside_frame(placement, crop_shape, own_shape)
    if device.type == "cpu":
        faults.read([outside]).wait()
    return outside


def check_form(
    placement: object, m: int, crop_shape: Sequence[int], own_shape: Sequence[int], device: torch.device
) -> None:
    """The part of `check_placement` that reads no values."""
    check_kind("placement", placement, Placement, INSTEAD)
    for name, kind in (("top", "integers"), ("left", "integers"), ("mirrored", "bools")):
        values = getattr(placement, name)
        fits = isinstance(values, Tensor) and (
            values.dtype == torch.bool if name == "mirrored" else holds_integers(values)
        )
        if not fits:
            instead = f"write torch.as_tensor({name}){'.bool()' if name == 'mirrored' else '.long()'}"
            raise TypeError(f"placement.{name} must be a tensor of {kind}, got {kind_of(values)}: {instead}")
        if values.shape != (m,):
            raise ValueError(
                f"placement.{name} must have shape [{m}], got {list(values.shape)}: give one for each image"
            )
        check_device(f"placement.{name}", values, device, "the images")
    crop, own = list(crop_shape), list(own_shape)
    if len(crop) < 2 or len(own) != len(crop) or own[:-2] != crop[:-2]:
        raise ValueError(
            f"placement must be of images [..., height, width] in frames of as many channels, got images {crop} in "
            f"frames {own}: leave placement out where an image is its own frame"
        )


def outside_frame(placement: Placement, crop_shape: Sequence[int], own_shape: Sequence[int]) -> Fault:
    """Counts the crops that show no pixel of their image."""
    (height, width), (own_height, own_width) = crop_shape[-2:], own_shape[-2:]
    top, left = placement.top, placement.left
    outside = (top != top.clamp(1 - height, own_height - 1)) | (left != left.clamp(1 - width, own_width - 1))
    message = (
        f"placement must show a part of each image, but {{count}} of {len(top)} crops of {height}x{width} lie outside "
        f"of their frames of {own_height}x{own_width}: give as top and left the crop's upper left corner in the "
        "image's own frame, in pixels"
    )
    return Fault(outside.sum(), message)
