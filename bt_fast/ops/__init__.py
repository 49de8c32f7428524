"""Operations with fused kernels on CUDA, if triton is installed; elsewhere, and in float64, plain torch.

They stay on their tensors' device. None reads a value back to the host, so none waits for the device.
"""

from bt_fast.ops.ascent_direction import ascent_direction
from bt_fast.ops.assign_steps import (
    BOUNDARY,
    GROUPS,
    OUTLIER,
    ROBUST,
    assign_steps,
    robust_threshold,
)
from bt_fast.ops.divergence import js_divergence, mart_loss, trades_kl
from bt_fast.ops.gather_start import gather_start
from bt_fast.ops.numeric import wide
from bt_fast.ops.order_by_steps import order_by_steps
from bt_fast.ops.pgd_l2_step import l2_step_
from bt_fast.ops.pgd_step import linf_step_
from bt_fast.ops.recall import Limits, recall
from bt_fast.ops.remember import remember_
from bt_fast.ops.signed_variance import SignedVariance, signed_variance
from bt_fast.ops.update_fraction import adversarial_hits, move_fraction_, update_fraction_

__all__ = [
    "BOUNDARY",
    "GROUPS",
    "OUTLIER",
    "ROBUST",
    "Limits",
    "SignedVariance",
    "adversarial_hits",
    "ascent_direction",
    "assign_steps",
    "gather_start",
    "js_divergence",
    "l2_step_",
    "linf_step_",
    "mart_loss",
    "move_fraction_",
    "order_by_steps",
    "recall",
    "remember_",
    "robust_threshold",
    "signed_variance",
    "trades_kl",
    "update_fraction_",
    "wide",
]
