"""The nine operations of AugMix (Hendrycks et al., 2020), with a separate operation and strength for each sample.

Four change grey values and five are affine maps. So a batch of mixed operations applies one table and one map to every
sample, of which the unused one is the identity: nothing is sorted by operation, and nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bt_fast.augment import affine, tables

OPERATIONS = (
    *("autocontrast", "equalize", "posterize", "rotate", "solarize"),
    *("shear_x", "shear_y", "translate_x", "translate_y"),
)
NONE = -1  # in place of an operation: the image stays
LEAST_LEVEL, MOST_LEVEL = 0.1, 10.0  # of an operation's strength


def apply_operations(images: Tensor, operation: Tensor, level: Tensor, negative: Tensor) -> Tensor:
    """Applies one operation to each image [n, C, H, W] uint8, as Pillow computes it, at the AugMix authors' strength.

    At level l: posterize keeps `4 - int(4l/10)` bits, rotate turns by `int(30l/10)` degrees, solarize inverts from
    `256 - int(256l/10)` on, shear is by `0.3l/10`, and translate by `int(l/10 · size/3)` pixels (the authors' code has
    size 32). Autocontrast and equalize have no strength.

    Args:
        operation: [n] int64, indices into `OPERATIONS`, or `NONE`.
        level: [n] float64 in [0, 10].
        negative: [n] bool: whether an affine map goes the other way.
    """
    mapped = affine.transform(images, _matrices(images, operation, level, negative))
    return tables.apply_tables(mapped, _tables(images, operation, level))


def _tables(images: Tensor, operation: Tensor, level: Tensor) -> Tensor:
    """Returns each sample's table of grey values, [n, C, 256]; no change if its operation is an affine map."""
    chosen = tables.unchanged(images).to(torch.uint8).expand(*images.shape[:2], -1)
    for name, of_operation in (
        ("autocontrast", tables.autocontrast(images)),
        ("equalize", tables.equalize(images)),
        ("posterize", tables.posterize(images, 4 - _whole(level, 4))),
        ("solarize", tables.solarize(images, 256 - _whole(level, 256))),
    ):
        chosen = torch.where(_is(operation, name)[:, None, None], of_operation, chosen)
    return chosen


def _matrices(images: Tensor, operation: Tensor, level: Tensor, negative: Tensor) -> Tensor:
    """Returns each sample's matrix, [n, 6]; the identity if its operation changes grey values."""
    height, width = images.shape[2:]
    sign = torch.where(negative, -1.0, 1.0)

    def only(name: str, strength: Tensor) -> Tensor:
        return torch.where(_is(operation, name), strength * sign, 0.0)

    turn = affine.rotation(only("rotate", _whole(level, 30).double()), height, width)
    shear, none = _scaled(level, 0.3), torch.zeros_like(level)
    shift_x, shift_y = (_whole(level, size / 3).double() for size in (width, height))
    x_row = [none, only("shear_x", shear), only("translate_x", shift_x)]
    y_row = [only("shear_y", shear), none, only("translate_y", shift_y)]
    # a sample has one operation, so one of the two summands is the identity or 0
    return turn + torch.stack(x_row + y_row, dim=1)


def _is(operation: Tensor, name: str) -> Tensor:
    return operation == OPERATIONS.index(name)


def _scaled(level: Tensor, most: float) -> Tensor:
    return level * most / MOST_LEVEL


def _whole(level: Tensor, most: float) -> Tensor:
    """Returns the authors' `int_parameter`, int64."""
    return _scaled(level, most).long()
