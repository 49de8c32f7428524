"""The gradient of the attack's loss with respect to the logits: a fused kernel on CUDA, plain torch elsewhere."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bt_fast.ops import rows
from bt_fast.ops.availability import or_plain
from bt_fast.ops.launch import check, define_op


def ascent_direction(logits: Tensor, target: Tensor, scaled: bool = True) -> Tensor:
    """Returns the inner loss's gradient by the logits: `softmax(z') - target`, or a multiple of each row of it.

    It is the gradient of `KL(target ‖ softmax(z'))` (TRADES: the target is the clean distribution) and of the
    cross-entropy (MART, PGD: the target is one-hot), finite however saturated either is. The softmax is computed in
    float64 and rounded to float32, as in `signed_variance`: with those probabilities as target, a row of the same
    logits is exactly 0. A row without a softmax (NaN, +Inf, or only -Inf) is NaN, and, if scaled, so is a row with a
    target that is not finite.

    The kernel is compiled separately for every K. Up to K = 8192 it reads logits and target once and writes once;
    beyond, it reads the logits three times and the target twice (not scaled, twice and once). Logits with classes that
    are not contiguous are copied first.

    Args:
        logits: [n, K] floating point, K ≥ 2, rows any stride apart. n may be 0.
        target: [n, K] floating point, probabilities; used in float32 (float64 for float64 logits).
        scaled: whether each row is multiplied by the power of two, at most 2^126, that brings its largest entry to
            [1, 2): near the clean point the difference would underflow in float16, in which the model may compute.
            Signs and normalised directions of an image's gradient stay the same, unless the model's outputs for it
            depend on other images.

    Returns:
        [n, K] in the logits' dtype.

    Raises:
        TypeError or ValueError: a dtype, shape or device does not fit; the message names the argument.
    """
    if not target.is_floating_point():
        raise TypeError(f"target must be floating point, got {target.dtype}: write target.float()")
    direction: Tensor = _ascent_direction(logits, target.to(rows.result_dtype(logits)), scaled)
    return direction


def ascent_direction_reference(logits: Tensor, target: Tensor, scaled: bool = True) -> Tensor:
    """`ascent_direction` in plain torch: the kernel's reference and fallback."""
    gap = rows.softmax(logits).to(target.dtype) - target
    if not scaled:
        return gap.to(logits.dtype)
    largest = gap.abs().amax(dim=1, keepdim=True)
    exponent = (1 - torch.frexp(largest).exponent).clamp(-126, 126)
    return torch.where(largest.isfinite(), torch.ldexp(gap, exponent), math.nan).to(logits.dtype)


@or_plain(ascent_direction_reference)
def launch_ascent_direction(logits: Tensor, target: Tensor, scaled: bool = True) -> Tensor:
    """`ascent_direction` as one launch, for logits that `rows.kernel_takes`."""
    from bt_fast.kernels.ascent_direction import ascent_direction_fwd_kernel, ascent_direction_long_fwd_kernel

    kernels = ascent_direction_fwd_kernel, ascent_direction_long_fwd_kernel
    direction = logits.new_empty(logits.shape)
    rows.launch(*kernels, logits, target.contiguous(), direction, SCALED=scaled)
    return direction


def _check(logits: Tensor, target: Tensor, _: bool) -> None:
    rows.check_logits("logits", logits)
    check("target", target, logits.shape, (rows.result_dtype(logits),), logits.device)


_ascent_direction = define_op(
    "ascent_direction(Tensor logits, Tensor target, bool scaled) -> Tensor",
    check=_check,
    run=lambda z, *rest: (launch_ascent_direction if rows.kernel_takes(z) else ascent_direction_reference)(z, *rest),
    results=lambda logits, *_: logits.new_empty(logits.shape),
)
