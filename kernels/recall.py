"""The start of an attack at a remembered perturbation: images in sorted order, and moved by what is remembered."""

import triton
import triton.language as tl

from bt_fast.kernels.shared import _clip, _noise


@triton.jit
def _start(i_n, length):
    """Returns the offset of row i_n: a batch may hold more than 2^31 elements."""
    return tl.cast(i_n, tl.int64) * length


@triton.jit
def _sample(order, i_n):
    """Returns which sample the sorted row i_n is."""
    i_s = tl.cast(i_n, tl.int64)
    if order is not None:
        i_s = tl.load(order + i_n)
    return i_s


@triton.jit
def _fraction(b_q):
    """Returns stored numbers as fractions of ε in [-1, 1]; NaN, of a file that is torn, is 0."""
    b_f = b_q.to(tl.float32)
    if b_q.dtype == tl.int8:
        b_f = tl.div_rn(b_f, 127.0)
    b_f = tl.where(b_f == b_f, b_f, 0.0)
    return _clip(b_f, -1.0, 1.0)


@triton.jit
def _own_offset(
    o_x, i_s, top, left, mirrored, CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    OWN_HEIGHT: tl.constexpr, OWN_WIDTH: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Returns where elements of an image lie in its own frame, and which of them lie in it."""
    if top is None and not LAST:
        return o_x, o_x >= 0
    if LAST:
        b_c = o_x % CHANNELS
        b_j = o_x // CHANNELS % WIDTH
        b_i = o_x // (CHANNELS * WIDTH)
    else:
        b_j = o_x % WIDTH
        b_i = o_x // WIDTH % HEIGHT
        b_c = o_x // (WIDTH * HEIGHT)
    if top is not None:
        b_j = tl.where(tl.load(mirrored + i_s) != 0, WIDTH - 1 - b_j, b_j) + tl.load(left + i_s).to(tl.int32)
        b_i += tl.load(top + i_s).to(tl.int32)
    inside = (b_i >= 0) & (b_i < OWN_HEIGHT) & (b_j >= 0) & (b_j < OWN_WIDTH)
    return (b_c * OWN_HEIGHT + b_i) * OWN_WIDTH + b_j, inside


@triton.jit
def _delta(
    memory, state, top, left, mirrored, i_s, i_c, slot, i_b, epsilon, noise, CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, OWN_HEIGHT: tl.constexpr, OWN_WIDTH: tl.constexpr, LAST: tl.constexpr,
    NOISY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Returns block i_b of the remembered perturbation of sample i_s with noise, not yet projected."""
    o_x = i_b * BLOCK + tl.arange(0, BLOCK)
    b_o, m_q = _own_offset(o_x, i_s, top, left, mirrored, CHANNELS, HEIGHT, WIDTH, OWN_HEIGHT, OWN_WIDTH, LAST)
    m_q = tl.where(slot >= 0, m_q & (o_x < CHANNELS * HEIGHT * WIDTH), False)
    b_q = tl.load(memory + slot * (CHANNELS * OWN_HEIGHT * OWN_WIDTH) + b_o, mask=m_q, other=0.0)
    b_delta = _fraction(b_q) * epsilon
    if NOISY:
        b_delta += _noise(state, i_c, i_b, True, BLOCK) * noise
    return b_delta


@triton.jit(do_not_specialize=["blocks"])
def recall_linf_fwd_kernel(
    x,  # [m, length]
    clean,  # [m, length], x in sorted order
    start,  # [m, length], clean with what is remembered
    memory,  # [slots, CHANNELS, OWN_HEIGHT, OWN_WIDTH], fractions of ε; int8: of 127
    slots,  # [m] int64, the row of the memory of sample i; below 0: nothing is remembered of it
    state,  # [2] int64: seed and offset
    order,  # [m] int64: sorted row i is sample order[i]; or None: i
    steps,  # [m] integers, of sample i: 0 means that it stays at x; or None: every sample takes steps
    samples,  # [m] int64, the number of sample i for its noise; or None: i
    top,  # [m] int64, where the image's first row lies in the sample's own frame; or None: the image is the frame
    left,  # [m] int64
    mirrored,  # [m] uint8
    blocks,  # cdiv(length, BLOCK)
    epsilon,
    epsilons,  # [m], ε of sample i; or None: epsilon
    noise,  # standard deviation
    lower,
    upper,
    CHANNELS: tl.constexpr,  # length is CHANNELS · HEIGHT · WIDTH
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    OWN_HEIGHT: tl.constexpr,
    OWN_WIDTH: tl.constexpr,
    LAST: tl.constexpr,  # the channel is the fastest index of the images, not of the memory
    NOISY: tl.constexpr,  # whether there is noise
    BLOCK: tl.constexpr,  # a multiple of 4
):
    """`start ← clip(x + clip(ε·remembered + noise·N(0, 1), ±ε), lower, upper)` of x in sorted order. Grid: m · blocks.

    The noise of an element is that of `gather_start_fwd_kernel`.
    """
    i_x = tl.program_id(0)
    i_n = i_x // blocks
    i_b = i_x % blocks
    i_s = _sample(order, i_n)
    moves = True
    if steps is not None:
        moves = tl.load(steps + i_s) > 0

    o_x = i_b * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < CHANNELS * HEIGHT * WIDTH
    row = _start(i_n, CHANNELS * HEIGHT * WIDTH)
    b_x = tl.load(x + i_s * (CHANNELS * HEIGHT * WIDTH) + o_x, mask=m_x)
    tl.store(clean + row + o_x, b_x, mask=m_x)
    b_start = b_x
    if moves:
        if epsilons is not None:
            epsilon = tl.load(epsilons + i_s).to(tl.float32)
        i_c = i_s
        if samples is not None:
            i_c = tl.load(samples + i_s)
        b_delta = _delta(
            memory, state, top, left, mirrored, i_s, i_c, tl.load(slots + i_s), i_b, epsilon, noise,
            CHANNELS, HEIGHT, WIDTH, OWN_HEIGHT, OWN_WIDTH, LAST, NOISY, BLOCK,
        )  # fmt: skip
        b_delta = _clip(b_delta, -epsilon, epsilon)
        b_start = _clip(b_x.to(tl.float32) + b_delta, lower, upper).to(b_x.dtype)
    tl.store(start + row + o_x, b_start, mask=m_x)


@triton.jit
def recall_l2_fwd_kernel(
    x, clean, start, memory, slots, state, order, steps, samples, top, left, mirrored, epsilon, epsilons, noise, lower,
    upper, CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, OWN_HEIGHT: tl.constexpr,
    OWN_WIDTH: tl.constexpr, LAST: tl.constexpr, NOISY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `recall_linf_fwd_kernel`, but the perturbation is shortened to ‖·‖₂ ≤ ε. Grid: m."""
    i_n = tl.program_id(0)
    i_s = _sample(order, i_n)
    moves = True
    if steps is not None:
        moves = tl.load(steps + i_s) > 0
    if epsilons is not None:
        epsilon = tl.load(epsilons + i_s).to(tl.float32)
    i_c = i_s
    if samples is not None:
        i_c = tl.load(samples + i_s)
    slot = tl.load(slots + i_s)

    length: tl.constexpr = CHANNELS * HEIGHT * WIDTH
    blocks: tl.constexpr = (length + BLOCK - 1) // BLOCK
    shrink = 0.0
    if moves:
        b_sum = tl.zeros([BLOCK], tl.float32)
        for i_b in range(0, blocks):
            b_delta = _delta(
                memory, state, top, left, mirrored, i_s, i_c, slot, i_b, epsilon, noise,
                CHANNELS, HEIGHT, WIDTH, OWN_HEIGHT, OWN_WIDTH, LAST, NOISY, BLOCK,
            )  # fmt: skip
            b_delta = tl.where(i_b * BLOCK + tl.arange(0, BLOCK) < length, b_delta, 0.0)
            b_sum += b_delta * b_delta
        size = tl.sqrt_rn(tl.sum(b_sum, axis=0))
        shrink = tl.where(size > epsilon, epsilon / size, 1.0)
    for i_b in range(0, blocks):
        o_x = i_b * BLOCK + tl.arange(0, BLOCK)
        m_x = o_x < length
        row = _start(i_n, length)
        b_x = tl.load(x + i_s * length + o_x, mask=m_x)
        tl.store(clean + row + o_x, b_x, mask=m_x)
        b_start = b_x
        if moves:
            b_delta = _delta(
                memory, state, top, left, mirrored, i_s, i_c, slot, i_b, epsilon, noise,
                CHANNELS, HEIGHT, WIDTH, OWN_HEIGHT, OWN_WIDTH, LAST, NOISY, BLOCK,
            )  # fmt: skip
            b_start = _clip(b_x.to(tl.float32) + b_delta * shrink, lower, upper).to(b_x.dtype)
        tl.store(start + row + o_x, b_start, mask=m_x)
