"""One projected-gradient step of the ragged attack, in place.

Names as in flash-linear-attention: tensors `x`, block values `b_x`, masks `m_x`, offsets `o_x`, ids `i_x`. Tensors of
images are dense with the sample outermost, whatever the order of channels, height and width inside. Computed in
float32, rounded once, on the store.
"""

import triton
import triton.language as tl


@triton.jit
def _has_steps_left(steps, step, i_n):
    """Whether sample i_n takes part in this step: always, where there are no counts."""
    taken = True
    if steps is not None:
        taken = tl.load(steps + i_n) > tl.load(step)
    return taken


@triton.jit
def _clip(b_v, b_low, b_high):
    """`torch.clamp`: NaN stays NaN, and the upper bound wins."""
    b_v = tl.maximum(b_v, b_low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(b_v, b_high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["blocks", "channels", "rows"])
def pgd_linf_step_fwd_kernel(
    x_adv,  # [n, length], changed in place
    grad,  # [n, length]
    clean,  # [n, length]
    step_size,  # [n], α
    steps,  # [n] integers, or None: every sample takes part
    step,  # [], the step counter t, or None
    limits,  # [3, channels] float32: ε, lower, upper; or None: the three scalars hold
    faulty,  # [n] int32, set to 1 where a sample's gradient holds NaN; or None
    length,  # elements of a row
    blocks,  # cdiv(length, BLOCK)
    epsilon,
    lower,
    upper,
    channels,
    rows,  # rows of a sample: 1, or with limits and INTERLEAVED unset `channels`
    BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,  # channels-last: a row is a sample, and the channel is the fastest index in it
):
    """`x' ← clip(clip(x' + α·sign(g), x ± ε), lower, upper)`; where g is NaN, x' stays. Grid: n · rows · blocks.

    A row is a whole sample, or one of its channels where limits differ by channel and a channel is contiguous: then a
    program has one limit of each kind, and neither divides nor gathers.
    """
    i_x = tl.program_id(0)
    i_r = i_x // blocks
    i_b = i_x % blocks
    i_n = i_r // rows
    if not _has_steps_left(steps, step, i_n):
        return

    o_x = i_b * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < length
    start = tl.cast(i_r, tl.int64) * length  # a batch may hold more than 2^31 elements
    b_g = tl.load(grad + start + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_x = tl.load(x_adv + start + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_c = tl.load(clean + start + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_alpha = tl.load(step_size + i_n).to(tl.float32)

    if limits is not None:
        o_c = (o_x % channels) if INTERLEAVED else (i_r % channels)
        b_epsilon = tl.load(limits + o_c)
        b_lower = tl.load(limits + channels + o_c)
        b_upper = tl.load(limits + 2 * channels + o_c)
    else:
        b_epsilon = epsilon
        b_lower = lower
        b_upper = upper

    b_step = tl.where(b_g > 0, b_alpha, tl.where(b_g < 0, -b_alpha, 0.0))
    b_moved = _clip(b_x + b_step, b_c - b_epsilon, b_c + b_epsilon)
    b_moved = _clip(b_moved, b_lower, b_upper)
    b_nan = b_g != b_g
    b_moved = tl.where(b_nan, b_x, b_moved)
    tl.store(x_adv + start + o_x, b_moved.to(x_adv.dtype.element_ty), mask=m_x)
    if faulty is not None:
        # a maximum, since several blocks of one sample may find NaN; no block touches memory where there is none
        nan_seen = tl.max(b_nan.to(tl.int32), axis=0)
        tl.atomic_max(faulty + i_n, nan_seen, mask=nan_seen > 0, sem="relaxed")
