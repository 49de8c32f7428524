"""The uncertainty by which samples are sorted into groups."""

from __future__ import annotations

import torch
from torch import Tensor

from bt_fast.ops.numeric import wide


def signed_variance(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Signed prediction variance (paper, section 3.2 and Eq. 4).

    `SVar_i = s_i · Var_k[softmax(z_i)]` with the biased variance over the K classes, whose mean is exactly 1/K, and
    `s_i = +1` where `argmax z_i = y_i` (the first maximum wins a tie), else -1.

    Args:
        logits: [m, K] floating point.
        labels: [m] int64. A label outside 0..K-1 counts as misclassified.

    Returns:
        SVar [m] and probabilities [m, K], float32 (float64 for float64 logits), and correct [m] bool, in the order
        (SVar, correct, probabilities). A row with NaN or +Inf has SVar NaN.
    """
    probabilities = wide(logits).softmax(dim=1)
    correct = logits.argmax(dim=1) == labels
    variance = (probabilities - 1.0 / logits.shape[1]).square().mean(dim=1)
    return torch.where(correct, variance, -variance), correct, probabilities
