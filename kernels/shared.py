"""Shared parts of the kernels: a float64 softmax, the same for all, and a clamp that keeps NaN."""

import triton
import triton.language as tl


@triton.jit
def _exp(b_x):
    """Returns e^x in float64 for x ≤ 0, to about 1e-15; at least e^-200, which is 0 in float32, also for NaN.

    Without a branch and in a third of the code of `tl.exp` in float64: x = n·ln2 + r, a Taylor polynomial in r, and n
    added to its exponent.
    """
    b_x = tl.maximum(b_x, -200.0)
    b_t = b_x * 1.4426950408889634 + 6755399441055744.0  # 1.5·2^52: the last bits of the sum are the nearest integer
    b_n = b_t - 6755399441055744.0
    b_r = b_x - b_n * 0.6931471805599453
    b_y = b_r * (1.0 / 39916800) + 1.0 / 3628800
    b_y = b_y * b_r + 1.0 / 362880
    b_y = b_y * b_r + 1.0 / 40320
    b_y = b_y * b_r + 1.0 / 5040
    b_y = b_y * b_r + 1.0 / 720
    b_y = b_y * b_r + 1.0 / 120
    b_y = b_y * b_r + 1.0 / 24
    b_y = b_y * b_r + 1.0 / 6
    b_y = b_y * b_r + 0.5
    b_y = b_y * b_r + 1.0
    b_y = b_y * b_r + 1.0
    b_exponent = b_t.to(tl.int64, bitcast=True) << 52
    return (b_y.to(tl.int64, bitcast=True) + b_exponent).to(tl.float64, bitcast=True)


@triton.jit
def _load(logits, m_x):
    """Loads logits in float32, -Inf outside the mask. NaN becomes +Inf: neither has a softmax, and +Inf is ordered."""
    b_z = tl.load(logits, mask=m_x, other=float("-inf")).to(tl.float32)
    return tl.where(b_z != b_z, float("inf"), b_z)


@triton.jit
def _reciprocal(b_sum, b_max):
    """Returns 1 / sum, or NaN if the row has no softmax."""
    b_fit = (b_max > float("-inf")) & (b_max < float("inf"))
    return tl.where(b_fit, 1.0 / b_sum, float("nan"))


@triton.jit
def _clip(b_v, b_low, b_high):
    """Returns `torch.clamp`: NaN stays NaN, and the upper bound wins."""
    b_v = tl.maximum(b_v, b_low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(b_v, b_high, propagate_nan=tl.PropagateNan.ALL)
