"""The operations that a fused kernel can take over, in plain torch: every one stays on its tensors' device.

No function here reads a value back to the host, so none of them waits for the device.
"""

from bt_fast.ops.assign_steps import (
    BOUNDARY,
    GROUPS,
    OUTLIER,
    ROBUST,
    order_by_steps,
    robust_threshold,
    three_groups,
)
from bt_fast.ops.divergence import ascent_direction, trades_kl
from bt_fast.ops.numeric import wide
from bt_fast.ops.pgd_l2_step import l2_step_
from bt_fast.ops.pgd_step import linf_step_
from bt_fast.ops.signed_variance import signed_variance
from bt_fast.ops.update_fraction import update_fraction

__all__ = [
    "BOUNDARY",
    "GROUPS",
    "OUTLIER",
    "ROBUST",
    "ascent_direction",
    "l2_step_",
    "linf_step_",
    "order_by_steps",
    "robust_threshold",
    "signed_variance",
    "three_groups",
    "trades_kl",
    "update_fraction",
    "wide",
]
