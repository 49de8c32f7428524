"""The losses of the attack and of the update."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bt_fast.ops.numeric import wide


def ascent_direction(logits: Tensor, target: Tensor) -> Tensor:
    """The inner loss's gradient with respect to the logits: `softmax(z') - target`, up to a power of two for each row.

    It is the gradient of `KL(target ‖ softmax(z'))` (TRADES: the target is the clean distribution) and of the
    cross-entropy (MART, PGD: the target is one-hot), finite however saturated either is. Each row is scaled so that its
    largest entry is in [1, 2): near the clean point the difference is smaller than the smallest number of 16 bits, in
    which the model may compute, and neither the sign nor the normalised direction of the image gradient cares.

    Args:
        logits: [n, K] floating point.
        target: [n, K] probabilities.

    Returns:
        [n, K] in the logits' dtype.
    """
    gap = wide(logits).softmax(dim=1) - target
    exponent = torch.frexp(gap.abs().amax(dim=1, keepdim=True)).exponent
    return torch.ldexp(gap, (1 - exponent).clamp(max=126)).to(logits.dtype)  # 2^127 is float32's largest power


def trades_kl(adversarial_logits: Tensor, clean_logits: Tensor) -> Tensor:
    """`Σ_i KL(softmax(z_i) ‖ softmax(z'_i))`, differentiable in both, with finite gradients for saturated rows.

    Args:
        adversarial_logits: [n, K] floating point, z'.
        clean_logits: [n, K] floating point, z; the gradient flows through this target too.

    Returns:
        0-dim, float32 (float64 for float64 logits); 0 for n = 0.
    """
    log_p = F.log_softmax(wide(clean_logits), dim=1)
    log_q = F.log_softmax(wide(adversarial_logits), dim=1)
    p = log_p.exp()
    # where p is 0 its term is 0, even against log(0) on both sides
    return (p * torch.where(p > 0, log_p - log_q, 0.0)).sum()
