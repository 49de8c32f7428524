"""The loss of the update."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bt_fast.ops.numeric import wide


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
