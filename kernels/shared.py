"""Shared parts of the kernels: a float64 softmax, the same for all, a clamp that keeps NaN, and random numbers."""

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


@triton.jit
def _signed(b_u):
    """Converts 32 random bits to a number in [-1, 1]."""
    return b_u.to(tl.int32, bitcast=True).to(tl.float32) * 4.656612873077393e-10  # 2^-31


@triton.jit
def _normal_pair(b_u, b_v):
    """Returns two normal numbers from twice 32 random bits, by Box and Muller, with the angle in half turns."""
    # r² = -2·ln((u + ½) / 2^32): the mantissa is brought to [⅔, 4/3), where a polynomial gives the logarithm
    b_f = b_u.to(tl.float32) + 0.5
    b_bits = b_f.to(tl.int32, bitcast=True)
    b_exponent = (b_bits - 0x3F2AAAAB) >> 23
    b_g = (b_bits - (b_exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    b_p = b_g * 0.3154916 - 0.34222665
    b_p = b_p * b_g + 0.3268116
    b_p = b_p * b_g - 0.39590025
    b_p = b_p * b_g + 0.5002408
    b_p = b_p * b_g - 0.6667598
    b_p = b_p * b_g + 0.99999756
    b_p = b_p * b_g - 1.9999996
    b_r = tl.sqrt_rn(b_p * b_g + (32 - b_exponent).to(tl.float32) * 1.3862944)
    # the angle: the highest bit is a half turn, a sign, and the other bits are t, between a quarter turn each way
    b_r = (b_r.to(tl.int32, bitcast=True) ^ (b_v.to(tl.int32, bitcast=True) & -0x80000000)).to(tl.float32, bitcast=True)
    b_t = _signed(b_v << 1)
    b_z = b_t * b_t
    b_cos = b_z * 8.5819064e-4 - 0.020810628
    b_cos = b_cos * b_z + 0.25365075
    b_cos = b_cos * b_z - 1.2336982
    b_cos = b_cos * b_z + 0.99999994
    b_sin = b_z * -0.0043331 + 0.07943434
    b_sin = b_sin * b_z - 0.64589286
    b_sin = b_sin * b_z + 1.570791
    return b_r * b_cos, b_r * (b_sin * b_t)


@triton.jit
def _noise(state, i_c, i_b, NORMAL: tl.constexpr, BLOCK: tl.constexpr):
    """Returns block i_b of the noise of sample i_c, normal or in [-1, 1].

    Element e has output e mod 4 of Philox for the counter (e div 4, i_c, offset).
    """
    offset = tl.load(state + 1)
    o_g = i_b * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    b_0, b_1, b_2, b_3 = tl.philox(
        tl.load(state), o_g, i_c.to(tl.int32), offset.to(tl.int32), (offset >> 32).to(tl.int32)
    )
    if NORMAL:
        b_0, b_1 = _normal_pair(b_0, b_1)
        b_2, b_3 = _normal_pair(b_2, b_3)
    else:
        b_0, b_1, b_2, b_3 = _signed(b_0), _signed(b_1), _signed(b_2), _signed(b_3)
    # [BLOCK / 4, 2, 2], in which the last index is the lowest bit of an element's number
    return tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3)).reshape(BLOCK)
