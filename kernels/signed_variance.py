"""Computes the softmax of each row of logits, its signed variance, and the row's faults, in one launch.

Computed in float64, rounded once, on the store: for a nearly uniform row the variance is the square of a difference too
small for float32.
"""

import triton
import triton.language as tl

from bt_fast.kernels.shared import _exp, _load, _reciprocal


@triton.jit
def _store_row(svar, correct, unfit, o_m, m_m, b_variance, b_max, b_first, b_label, K: tl.constexpr):
    """Stores SVar, whether the label is the first maximum, and the flags, of the rows o_m: a scalar or a block."""
    b_fit = (b_max > float("-inf")) & (b_max < float("inf"))
    b_correct = b_fit & (b_first == b_label)
    b_stray = (b_label < 0) | (b_label >= K)
    b_sign = tl.where(b_correct, 1.0, -1.0).to(tl.float64)  # `-x` is 0 - x here, which has no -0
    tl.store(svar + o_m, (b_variance * b_sign).to(svar.dtype.element_ty), mask=m_m)
    tl.store(correct + o_m, b_correct.to(tl.uint8), mask=m_m)
    tl.store(unfit + o_m, tl.where(b_fit, 0, 1).to(tl.uint8) + tl.where(b_stray, 2, 0).to(tl.uint8), mask=m_m)


@triton.jit(do_not_specialize=["m"])
def signed_variance_fwd_kernel(
    logits,  # [m, K], rows `stride` apart
    labels,  # [m] int64
    svar,  # [m] float32
    correct,  # [m] uint8
    unfit,  # [m] uint8
    probabilities,  # [m, K] float32
    m,
    stride,  # elements from row to row; None for contiguous rows
    K: tl.constexpr,
    ROWS: tl.constexpr,  # of a program
    BLOCK: tl.constexpr,  # a power of two, at least K
):
    """Computes `SVar = ±mean_k (softmax(z)_k - 1/K)²`, for rows that fit a block. Grid: cdiv(m, ROWS)."""
    i_m = tl.program_id(0)
    o_m = tl.cast(i_m, tl.int64) * ROWS + tl.arange(0, ROWS)
    o_k = tl.arange(0, BLOCK)
    m_m = o_m < m
    m_k = (o_k < K)[None, :]
    m_x = m_m[:, None] & m_k
    o_z = (o_m * (K if stride is None else stride))[:, None] + o_k[None, :]
    b_label = tl.load(labels + o_m, mask=m_m, other=0)

    b_z = _load(logits + o_z, m_x)
    b_max = tl.max(b_z, axis=1)
    b_first = tl.min(tl.where(b_z == b_max[:, None], o_k[None, :], BLOCK), axis=1)
    b_e = _exp(b_z.to(tl.float64) - b_max.to(tl.float64)[:, None])
    b_p = b_e * _reciprocal(tl.sum(b_e, axis=1), b_max)[:, None]
    tl.store(probabilities + (o_m * K)[:, None] + o_k[None, :], b_p.to(tl.float32), mask=m_x)

    b_d = tl.where(m_k, b_p - 1.0 / K, 0.0)
    b_variance = tl.sum(b_d * b_d, axis=1) * (1.0 / K)
    _store_row(svar, correct, unfit, o_m, m_m, b_variance, b_max, b_first, b_label, K)


@triton.jit
def signed_variance_long_fwd_kernel(
    logits, labels, svar, correct, unfit, probabilities, stride, K: tl.constexpr, BLOCK: tl.constexpr
):
    """Computes the same for rows of several blocks, each read twice. Grid: m."""
    i_m = tl.program_id(0)
    o_m = tl.cast(i_m, tl.int64)
    z = logits + o_m * (K if stride is None else stride)
    p = probabilities + o_m * K
    o_k = tl.arange(0, BLOCK)
    b_label = tl.load(labels + o_m)

    # each lane keeps its largest logit and its first place; the sum of e^(z - max) is relative to the largest so far
    b_lane_max = tl.full([BLOCK], float("-inf"), tl.float32)
    b_lane_first = tl.full([BLOCK], K, tl.int32)
    b_sum = tl.zeros([BLOCK], tl.float64)
    b_max = tl.full([], float("-inf"), tl.float32)
    for o_b in range(0, K, BLOCK):
        b_z = _load(z + o_b + o_k, o_b + o_k < K)
        b_lane_first = tl.where(b_z > b_lane_max, o_b + o_k, b_lane_first)
        b_lane_max = tl.maximum(b_lane_max, b_z)
        b_new = tl.maximum(b_max, tl.max(b_z, axis=0))
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new).to(tl.float64)
        b_sum = b_sum * _exp(b_max.to(tl.float64) - b_base) + _exp(b_z.to(tl.float64) - b_base)
        b_max = b_new
    b_first = tl.min(tl.where(b_lane_max == b_max, b_lane_first, K), axis=0)
    b_reciprocal = _reciprocal(tl.sum(b_sum, axis=0), b_max)

    b_square = tl.zeros([BLOCK], tl.float64)
    for o_b in range(0, K, BLOCK):
        m_k = o_b + o_k < K
        b_z = _load(z + o_b + o_k, m_k)
        b_p = _exp(b_z.to(tl.float64) - b_max.to(tl.float64)) * b_reciprocal
        tl.store(p + o_b + o_k, b_p.to(tl.float32), mask=m_k)
        b_d = tl.where(m_k, b_p - 1.0 / K, 0.0)
        b_square += b_d * b_d
    b_variance = tl.sum(b_square, axis=0) * (1.0 / K)
    _store_row(svar, correct, unfit, o_m, o_m >= 0, b_variance, b_max, b_first, b_label, K)
