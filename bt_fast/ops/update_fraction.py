"""The moving fraction of robust samples."""

from __future__ import annotations

from torch import Tensor


def update_fraction(robust_fraction: Tensor, logits: Tensor, labels: Tensor, gamma: float, momentum: float) -> Tensor:
    """`F_R ← p·F_R + (1-p)·γ·mean_i[argmax z'_i = y_i]` (Eq. 5).

    Args:
        robust_fraction: 0-dim floating point, F_R.
        logits: [m, K], m ≥ 1, of the corrupted samples.
        labels: [m] int64.
        gamma: γ, momentum: p.

    Returns:
        The new F_R, 0-dim, of F_R's dtype.
    """
    hits = (logits.argmax(dim=1) == labels).sum().to(robust_fraction.dtype)
    return momentum * robust_fraction + (1.0 - momentum) * gamma * (hits / len(labels))
