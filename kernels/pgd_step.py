"""One projected-gradient step of the ragged attack, in place: in ℓ∞ and in ℓ2.

Tensors of images are dense with the sample outermost, in any order of channels, height and width. Computed in float32,
rounded once, on the store.

Properties of a whole sample (NaN in its gradient, its length) must be known before any of it is written. So a short
sample is one program's block (`.._sample_..`), and for a long one a program first goes over the sample and passes the
result to the blocks of a second launch.
"""

import triton
import triton.language as tl

from bt_fast.kernels.shared import _clip

INFINITY = tl.constexpr(0x7F800000)  # the bits of +Inf in float32: those of NaN without its sign are larger


@triton.jit
def _has_steps_left(steps, step, i_n):
    """Whether sample i_n takes part in this step: always, if there are no counts."""
    taken = True
    if steps is not None:
        taken = tl.load(steps + i_n) > tl.load(step)
    return taken


@triton.jit
def _start(i_n, length):
    """Returns the offset of sample i_n: a batch may hold more than 2^31 elements."""
    return tl.cast(i_n, tl.int64) * length


@triton.jit
def _radius(epsilon, epsilons, i_n):
    """ε of sample i_n: its own, where each has one."""
    if epsilons is not None:
        epsilon = tl.load(epsilons + i_n).to(tl.float32)
    return epsilon


@triton.jit
def _magnitude(b_g):
    """The bits of |g|: integers in the order 0, finite numbers, Inf, NaN; a maximum of the floats may drop NaN."""
    return b_g.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _linf_moved(b_x, b_g, b_c, b_alpha, epsilon, lower, upper):
    b_step = tl.where(b_g > 0, b_alpha, tl.where(b_g < 0, -b_alpha, 0.0))
    return _clip(_clip(b_x + b_step, b_c - epsilon, b_c + epsilon), lower, upper)


@triton.jit
def pgd_linf_sample_fwd_kernel(
    x_adv,  # [n, length], changed in place
    grad,  # [n, length]
    clean,  # [n, length]
    step_size,  # [n], α
    steps,  # [n] integers, or None: every sample takes part
    step,  # [], the step counter t, or None
    faulty,  # [n] int32, set to 1 if a sample's gradient holds NaN; or None
    length,
    epsilon,
    epsilons,  # [n], in place of epsilon; or None: that of every sample
    lower,
    upper,
    BLOCK: tl.constexpr,  # at least length
):
    """Writes `x' ← clip(clip(x' + α·sign(g), x ± ε), lower, upper)`; a sample with NaN in g does not move. Grid: n."""
    i_n = tl.program_id(0)
    if not _has_steps_left(steps, step, i_n):
        return

    o_x = tl.arange(0, BLOCK)
    m_x = o_x < length
    start = _start(i_n, length)
    b_g = tl.load(grad + start + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_x = tl.load(x_adv + start + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_c = tl.load(clean + start + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_alpha = tl.load(step_size + i_n).to(tl.float32)
    b_moved = _linf_moved(b_x, b_g, b_c, b_alpha, _radius(epsilon, epsilons, i_n), lower, upper)
    top = tl.max(_magnitude(b_g), axis=0)
    # a mask takes fewer registers than a branch here
    m_x = tl.where(top > INFINITY, False, m_x)
    tl.store(x_adv + start + o_x, b_moved.to(x_adv.dtype.element_ty), mask=m_x)
    if faulty is not None:
        tl.store(faulty + i_n, 1, mask=top > INFINITY)


@triton.jit
def pgd_held_fwd_kernel(
    grad,  # [n, length]
    steps,  # [n] integers, or None
    step,  # [], or None
    held,  # [n] int32, written: 1 if a sample's gradient holds NaN, but not if it has no steps left
    faulty,  # [n] int32, set to 1 likewise; or None
    length,
    BLOCK: tl.constexpr,
):
    """Finds the long samples that do not move. Grid: n."""
    i_n = tl.program_id(0)
    if not _has_steps_left(steps, step, i_n):
        return

    start = _start(i_n, length)
    b_top = tl.zeros([BLOCK], tl.int32)
    for o in range(0, length, BLOCK):
        o_x = o + tl.arange(0, BLOCK)
        b_g = tl.load(grad + start + o_x, mask=o_x < length, other=0.0)
        b_top = tl.maximum(b_top, _magnitude(b_g))
    top = tl.max(b_top, axis=0)
    tl.store(held + i_n, (top > INFINITY).to(tl.int32))
    if faulty is not None:
        tl.store(faulty + i_n, 1, mask=top > INFINITY)


@triton.jit(do_not_specialize=["blocks"])
def pgd_linf_step_fwd_kernel(
    x_adv, grad, clean, step_size, steps, step, held, length, blocks, epsilon, epsilons, lower, upper,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The step of `pgd_linf_sample_fwd_kernel` on samples of any length, which stay where `held` [n] is not 0.

    blocks: cdiv(length, BLOCK). Grid: n · blocks.
    """
    i_x = tl.program_id(0)
    i_n = i_x // blocks
    if not _has_steps_left(steps, step, i_n):
        return
    if tl.load(held + i_n) != 0:
        return

    o_x = (i_x % blocks) * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < length
    start = _start(i_n, length)
    b_g = tl.load(grad + start + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_x = tl.load(x_adv + start + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_c = tl.load(clean + start + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_alpha = tl.load(step_size + i_n).to(tl.float32)
    b_moved = _linf_moved(b_x, b_g, b_c, b_alpha, _radius(epsilon, epsilons, i_n), lower, upper)
    tl.store(x_adv + start + o_x, b_moved.to(x_adv.dtype.element_ty), mask=m_x)


@triton.jit
def _exponent(b_top):
    """Returns k, |k| ≤ 126, for which numbers up to that with the bits b_top are below 4 after division by 2^k."""
    return tl.minimum(tl.maximum((b_top >> 23) - 127, -126), 126)


@triton.jit
def _power_of_two(b_k):
    """Returns 2^k exactly; 2^-126 for smaller k, which acts like 0 where it is used."""
    return ((tl.maximum(b_k, -126) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _shrinking(squares, epsilon):
    """Returns the factor for a perturbation with this sum of squares, as in `torch.renorm`."""
    size = tl.sqrt(squares)
    return tl.where(size > epsilon, epsilon / (size + 1e-7), 1.0)


@triton.jit
def pgd_l2_sample_fwd_kernel(
    x_adv, grad, clean, step_size, steps, step, flat, faulty, length, epsilon, epsilons, lower, upper,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`x' ← clip(x + renorm(clip(x' + α·g/‖g‖, lower, upper) - x), lower, upper)`. Grid: n.

    flat: [n] int32, written: 1 if the gradient is 0, and the sample waits for another direction. A sample with NaN or
    Inf in its gradient is `faulty`. Other arguments as in `pgd_linf_sample_fwd_kernel`, here and below.
    """
    i_n = tl.program_id(0)
    if not _has_steps_left(steps, step, i_n):
        return

    o_x = tl.arange(0, BLOCK)
    m_x = o_x < length
    start = _start(i_n, length)
    b_g = tl.load(grad + start + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_x = tl.load(x_adv + start + o_x, mask=m_x, other=0.0).to(tl.float32)
    alpha = tl.load(step_size + i_n).to(tl.float32)

    top = tl.max(_magnitude(b_g), axis=0)
    b_scaled = b_g * _power_of_two(-_exponent(top))
    norm = tl.sqrt(tl.sum(b_scaled * b_scaled, axis=0))
    b_c = tl.load(clean + start + o_x, mask=m_x, other=0.0).to(tl.float32)  # loaded only now, to save registers
    b_delta = _clip(b_x + b_scaled * (alpha / norm), lower, upper) - b_c
    b_delta = tl.where(m_x, b_delta, 0.0)
    shrink = _shrinking(tl.sum(b_delta * b_delta, axis=0), _radius(epsilon, epsilons, i_n))
    b_moved = _clip(b_c + b_delta * shrink, lower, upper)
    m_x = tl.where((top > 0) & (top < INFINITY), m_x, False)
    tl.store(x_adv + start + o_x, b_moved.to(x_adv.dtype.element_ty), mask=m_x)
    tl.store(flat + i_n, (top == 0).to(tl.int32))
    if faulty is not None:
        tl.store(faulty + i_n, 1, mask=top >= INFINITY)


@triton.jit(do_not_specialize=["n"])
def pgd_l2_measure_fwd_kernel(
    x_adv, grad, clean, step_size, steps, step, measured, flat, faulty, n, length, epsilon, epsilons, lower, upper,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Measures the lengths that the step of a long sample needs. Grid: n.

    measured: [3, n] float32, written: scale and factor of the gradient, and the factor of the perturbation, which is -1
    if the sample does not move.
    """
    i_n = tl.program_id(0)
    if not _has_steps_left(steps, step, i_n):
        return

    start = _start(i_n, length)
    # each lane sums squares, divided by the square of the power of two of its greatest number so far
    b_top = tl.zeros([BLOCK], tl.int32)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for o in range(0, length, BLOCK):
        o_x = o + tl.arange(0, BLOCK)
        b_g = tl.load(grad + start + o_x, mask=o_x < length, other=0.0).to(tl.float32)
        b_greater = tl.maximum(b_top, _magnitude(b_g))
        b_ratio = _power_of_two(_exponent(b_top) - _exponent(b_greater))
        b_scaled = b_g * _power_of_two(-_exponent(b_greater))
        b_sum = b_sum * b_ratio * b_ratio + b_scaled * b_scaled
        b_top = b_greater
    top = tl.max(b_top, axis=0)
    tl.store(flat + i_n, (top == 0).to(tl.int32))
    if faulty is not None:
        tl.store(faulty + i_n, 1, mask=top >= INFINITY)
    if (top == 0) | (top >= INFINITY):
        tl.store(measured + 2 * n + i_n, -1.0)
        return

    b_ratio = _power_of_two(_exponent(b_top) - _exponent(top))
    norm = tl.sqrt(tl.sum(b_sum * b_ratio * b_ratio, axis=0))
    scale = _power_of_two(-_exponent(top))
    factor = tl.load(step_size + i_n).to(tl.float32) / norm
    b_sum = tl.zeros([BLOCK], tl.float32)
    for o in range(0, length, BLOCK):
        o_x = o + tl.arange(0, BLOCK)
        m_x = o_x < length
        b_g = tl.load(grad + start + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_x = tl.load(x_adv + start + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_c = tl.load(clean + start + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_delta = _clip(b_x + b_g * scale * factor, lower, upper) - b_c
        b_delta = tl.where(m_x, b_delta, 0.0)
        b_sum += b_delta * b_delta
    tl.store(measured + i_n, scale)
    tl.store(measured + n + i_n, factor)
    tl.store(measured + 2 * n + i_n, _shrinking(tl.sum(b_sum, axis=0), _radius(epsilon, epsilons, i_n)))


@triton.jit(do_not_specialize=["n", "blocks"])
def pgd_l2_step_fwd_kernel(
    x_adv, grad, clean, steps, step, measured, n, length, blocks, lower, upper, BLOCK: tl.constexpr
):
    """Takes the step of `pgd_l2_sample_fwd_kernel` on measured samples of any length. Grid: n · blocks."""
    i_x = tl.program_id(0)
    i_n = i_x // blocks
    if not _has_steps_left(steps, step, i_n):
        return
    shrink = tl.load(measured + 2 * n + i_n)
    if shrink < 0:
        return

    o_x = (i_x % blocks) * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < length
    start = _start(i_n, length)
    b_g = tl.load(grad + start + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_x = tl.load(x_adv + start + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_c = tl.load(clean + start + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_step = b_g * tl.load(measured + i_n) * tl.load(measured + n + i_n)
    b_delta = _clip(b_x + b_step, lower, upper) - b_c
    b_moved = _clip(b_c + b_delta * shrink, lower, upper)
    tl.store(x_adv + start + o_x, b_moved.to(x_adv.dtype.element_ty), mask=m_x)


@triton.jit
def _bytes(b_word):
    """Returns the sums of the bytes 0 and 2, and of 1 and 3, in the halves of a word."""
    return (b_word & 0x00FF00FF) + ((b_word >> 8) & 0x00FF00FF)


@triton.jit
def _direction(stand_in, start, i_n, o_x, m_x):
    """Returns the given numbers, or if `stand_in` is a seed standard normal ones: scaled, centred sums of 16 bytes.

    All except the last multiplication is in integers, so that the numbers are the same on every device.
    """
    if stand_in.dtype.element_ty == tl.int64:
        b_1, b_2, b_3, b_4 = tl.philox(tl.load(stand_in), o_x, i_n, 0, 0)
        b_sum = _bytes(b_1) + _bytes(b_2) + _bytes(b_3) + _bytes(b_4)
        b_sum = (b_sum & 0xFFFF) + (b_sum >> 16)
        b_direction = (b_sum.to(tl.int32) - 2040).to(tl.float32) * 0.003382939
    else:
        b_direction = tl.load(stand_in + start + o_x, mask=m_x, other=0.0).to(tl.float32)
    return b_direction


@triton.jit
def _stood_in(x_adv, clean, stand_in, start, i_n, o_x, m_x, alpha, lower, upper):
    """Returns x, and the perturbation after the step along the stand-in, before it shrinks."""
    b_x = tl.load(x_adv + start + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_c = tl.load(clean + start + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_step = _direction(stand_in, start, i_n, o_x, m_x) * alpha
    return b_c, _clip(b_x + b_step, lower, upper) - b_c


@triton.jit
def pgd_l2_stand_in_fwd_kernel(
    x_adv, clean, step_size, steps, step, stand_in, flat, length, epsilon, epsilons, lower, upper, BLOCK: tl.constexpr
):
    """The step of `pgd_l2_sample_fwd_kernel` along another direction, not normalised, for zero gradients. Grid: n.

    stand_in: [n, length], or a seed [] int64. These samples are rare: other samples' programs only read two numbers.
    """
    i_n = tl.program_id(0)
    if not _has_steps_left(steps, step, i_n):
        return
    if tl.load(flat + i_n) == 0:
        return

    start = _start(i_n, length)
    alpha = tl.load(step_size + i_n).to(tl.float32)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for o in range(0, length, BLOCK):
        o_x = o + tl.arange(0, BLOCK)
        m_x = o_x < length
        _, b_delta = _stood_in(x_adv, clean, stand_in, start, i_n, o_x, m_x, alpha, lower, upper)
        b_delta = tl.where(m_x, b_delta, 0.0)
        b_sum += b_delta * b_delta
    shrink = _shrinking(tl.sum(b_sum, axis=0), _radius(epsilon, epsilons, i_n))
    for o in range(0, length, BLOCK):
        o_x = o + tl.arange(0, BLOCK)
        m_x = o_x < length
        b_c, b_delta = _stood_in(x_adv, clean, stand_in, start, i_n, o_x, m_x, alpha, lower, upper)
        b_moved = _clip(b_c + b_delta * shrink, lower, upper)
        tl.store(x_adv + start + o_x, b_moved.to(x_adv.dtype.element_ty), mask=m_x)
