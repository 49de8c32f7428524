"""A further pass over a minibatch that takes what the first pass made: whether it is the same minibatch."""

from __future__ import annotations

from torch import Tensor

from bt_fast.faults import Fault

NEW_ONES = "write `with bullet.again(reuse=False):` to make new ones"


def check_alike(kept: Tensor, given: Tensor) -> None:
    """Raise ValueError unless the images given are of the shape, dtype and device of those kept."""
    if (kept.shape, kept.dtype, kept.device) != (given.shape, given.dtype, given.device):
        first, now = (f"{list(t.shape)} {t.dtype} on {t.device}" for t in (kept, given))
        raise ValueError(
            f"again(reuse=True) needs the images and labels of the last call outside of its block, {first}, got {now}: "
            f"call the loss on these once before, or {NEW_ONES}"
        )


def of_another(kept_x: Tensor, x: Tensor, kept_y: Tensor, y: Tensor) -> Fault:
    """The number of samples of which the image or the label is not the one of the first pass.

    Args:
        kept_x, x: [m, ...], kept_y, y: [m]; of one shape and in one order.
    """
    differs = (kept_x != x).flatten(1).any(dim=1) | (kept_y != y)
    return Fault(
        differs.sum(),
        "again(reuse=True) needs the images and labels of the last call outside of its block, but {count} of "
        f"{len(kept_y)} samples are others: call the loss on these once before, or {NEW_ONES}",
    )
