"""Computes the gradient of the attack's loss with respect to the logits, optionally scaled by row, in one launch.

The softmax is computed in float64 and rounded to float32, as in kernels/signed_variance.py, which makes the target: at
the clean point the difference is exactly 0.
"""

import triton
import triton.language as tl

from bt_fast.kernels.shared import _exp, _load, _reciprocal


@triton.jit
def _gap(b_e, b_reciprocal, target, m_x):
    """Returns `softmax(z) - target` in float32, 0 outside the mask."""
    b_p = (b_e * b_reciprocal).to(tl.float32)
    return tl.where(m_x, b_p - tl.load(target, mask=m_x, other=0.0), 0.0)


@triton.jit
def _magnitude(b_gap):
    """Returns the bits of |gap|: integers in the order of the numbers, with Inf and NaN above all."""
    return b_gap.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _power_of_two(b_largest):
    """Returns the power that brings a float32 with these bits to [1, 2), in 2^±126; NaN for Inf and NaN."""
    b_biased = b_largest >> 23  # 0 for 0 and subnormal numbers, 255 for Inf and NaN
    b_power = (tl.minimum(tl.maximum(127 - b_biased, -126), 126) + 127) << 23
    return tl.where(b_biased == 255, 0x7FC00000, b_power).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["n"])
def ascent_direction_fwd_kernel(
    logits,  # [n, K], rows `stride` apart
    target,  # [n, K] float32
    direction,  # [n, K]
    n,
    stride,  # elements from row to row; None for contiguous rows
    K: tl.constexpr,
    ROWS: tl.constexpr,  # of a program
    BLOCK: tl.constexpr,  # a power of two, at least K
    SCALED: tl.constexpr = True,
):
    """Writes `softmax(z) - target`, if SCALED times a 2^k for each row; rows fit a block. Grid: cdiv(n, ROWS)."""
    i_n = tl.program_id(0)
    o_n = tl.cast(i_n, tl.int64) * ROWS + tl.arange(0, ROWS)
    o_k = tl.arange(0, BLOCK)
    m_x = (o_n < n)[:, None] & (o_k < K)[None, :]
    o_z = (o_n * (K if stride is None else stride))[:, None] + o_k[None, :]
    o_x = (o_n * K)[:, None] + o_k[None, :]

    b_z = _load(logits + o_z, m_x)
    b_max = tl.max(b_z, axis=1)
    b_e = _exp(b_z.to(tl.float64) - b_max.to(tl.float64)[:, None])
    b_gap = _gap(b_e, _reciprocal(tl.sum(b_e, axis=1), b_max)[:, None], target + o_x, m_x)
    if SCALED:
        b_gap *= _power_of_two(tl.max(_magnitude(b_gap), axis=1))[:, None]
    tl.store(direction + o_x, b_gap.to(direction.dtype.element_ty), mask=m_x)


@triton.jit
def ascent_direction_long_fwd_kernel(
    logits, target, direction, stride, K: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr = True
):
    """Writes the same for rows of several blocks: a pass for the sum, if SCALED one for the largest gap, one to write.

    Grid: n.
    """
    i_n = tl.program_id(0)
    o_n = tl.cast(i_n, tl.int64)
    z = logits + o_n * (K if stride is None else stride)
    p = target + o_n * K
    o_k = tl.arange(0, BLOCK)

    b_sum = tl.zeros([BLOCK], tl.float64)  # of e^(z - max), relative to the largest of all blocks so far
    b_max = tl.full([], float("-inf"), tl.float32)
    for o_b in range(0, K, BLOCK):
        b_z = _load(z + o_b + o_k, o_b + o_k < K)
        b_new = tl.maximum(b_max, tl.max(b_z, axis=0))
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new).to(tl.float64)
        b_sum = b_sum * _exp(b_max.to(tl.float64) - b_base) + _exp(b_z.to(tl.float64) - b_base)
        b_max = b_new
    b_reciprocal = _reciprocal(tl.sum(b_sum, axis=0), b_max)

    if SCALED:
        b_largest = tl.zeros([BLOCK], tl.int32)
        for o_b in range(0, K, BLOCK):
            m_k = o_b + o_k < K
            b_e = _exp(_load(z + o_b + o_k, m_k).to(tl.float64) - b_max.to(tl.float64))
            b_largest = tl.maximum(b_largest, _magnitude(_gap(b_e, b_reciprocal, p + o_b + o_k, m_k)))
        b_power = _power_of_two(tl.max(b_largest, axis=0))

    for o_b in range(0, K, BLOCK):
        m_k = o_b + o_k < K
        b_e = _exp(_load(z + o_b + o_k, m_k).to(tl.float64) - b_max.to(tl.float64))
        b_gap = _gap(b_e, b_reciprocal, p + o_b + o_k, m_k)
        if SCALED:
            b_gap *= b_power
        tl.store(direction + o_n * K + o_b + o_k, b_gap.to(direction.dtype.element_ty), mask=m_k)
