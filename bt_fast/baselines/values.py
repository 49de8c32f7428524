"""Checks a batch's values before anything has changed."""

from __future__ import annotations

from torch import Tensor, nn

from bt_fast import faults
from bt_fast.attack.forward import clean_logits, eval_mode

# for a mean loss with a gradient taken within a call, out of reach of a gradient scaler: a power of 2, so that in
# higher precision nothing changes, below those at which scalers settle (tens of thousands)
SCALE = 1024.0


def check_values(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Runs the model, in eval mode, on two rows (some norms refuse one) and waits for the device.

    Raises:
        TypeError, ValueError: the logits do not fit or are not finite, or pixels or labels are out of range.
    """
    with eval_mode(model):
        logits = clean_logits(model, x[:2])
    pixels, labels = faults.pixels_outside(x, 0.0, 1.0, "x_natural"), faults.labels_outside(y, logits.shape[1], "y")
    unfit = faults.rows_without_number(logits, "the model's logits of the first two samples")
    faults.read([pixels, labels, unfit]).wait()
