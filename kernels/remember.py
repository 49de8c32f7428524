"""Perturbations into the memory, quantised, each at its place in its own image's frame."""

import triton
import triton.language as tl

from bt_fast.kernels.shared import _clip

NEAREST = tl.constexpr(12582912.0)  # 1.5·2^23: the last bits of a sum with it are the nearest integer, or the even one


@triton.jit(do_not_specialize=["blocks"])
def remember_fwd_kernel(
    memory,  # [slots, CHANNELS, OWN_HEIGHT, OWN_WIDTH], fractions of ε; int8: of 127; written
    x_adv,  # [m, length], x' in sorted order
    clean,  # [m, length], x in sorted order
    slots,  # [m] int64, the row of the memory of sample i; all different
    order,  # [m] int64: sorted row i is sample order[i]; or None: i
    steps,  # [m] integers, of sample i: 0 means that its memory becomes 0; or None: every sample takes steps
    keep,  # [m] uint8: whether what is not shown of sample i stays, else it becomes 0; or None: it stays
    top,  # [m] int64, where the image's first row lies in the sample's own frame; or None: the image is the frame
    left,  # [m] int64
    mirrored,  # [m] uint8
    blocks,  # cdiv(CHANNELS · OWN_HEIGHT · OWN_WIDTH, BLOCK)
    epsilon,
    epsilons,  # [m], ε of sample i; or None: epsilon
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,  # of the images, whose length is CHANNELS · HEIGHT · WIDTH
    WIDTH: tl.constexpr,
    OWN_HEIGHT: tl.constexpr,
    OWN_WIDTH: tl.constexpr,
    LAST: tl.constexpr,  # the channel is the fastest index of the images, not of the memory
    BLOCK: tl.constexpr,
):
    """`memory[slots] ← (x' - x) / ε` where the images show their frames, rounded to the nearest. Grid: m · blocks."""
    i_x = tl.program_id(0)
    i_n = i_x // blocks
    i_s = tl.cast(i_n, tl.int64)  # a batch may hold more than 2^31 elements
    if order is not None:
        i_s = tl.load(order + i_n)
    if epsilons is not None:
        epsilon = tl.load(epsilons + i_s).to(tl.float32)

    o_q = (i_x % blocks) * BLOCK + tl.arange(0, BLOCK)
    m_q = o_q < CHANNELS * OWN_HEIGHT * OWN_WIDTH
    b_o = o_q
    m_x = m_q
    if top is not None or LAST:
        b_j = o_q % OWN_WIDTH
        b_i = o_q // OWN_WIDTH % OWN_HEIGHT
        b_c = o_q // (OWN_WIDTH * OWN_HEIGHT)
        if top is not None:
            b_i -= tl.load(top + i_s).to(tl.int32)
            b_j -= tl.load(left + i_s).to(tl.int32)
            b_j = tl.where(tl.load(mirrored + i_s) != 0, WIDTH - 1 - b_j, b_j)
        m_x = m_q & (b_i >= 0) & (b_i < HEIGHT) & (b_j >= 0) & (b_j < WIDTH)
        b_o = (b_i * WIDTH + b_j) * CHANNELS + b_c if LAST else (b_c * HEIGHT + b_i) * WIDTH + b_j
    b_written = m_x
    if steps is not None:
        moves = tl.load(steps + i_s) > 0
        m_x = tl.where(moves, m_x, False)
        b_written = tl.where(moves, b_written, True)
    if keep is not None:
        b_written = tl.where(tl.load(keep + i_s) == 0, True, b_written)
    row = tl.cast(i_n, tl.int64) * (CHANNELS * HEIGHT * WIDTH)
    b_x_adv = tl.load(x_adv + row + b_o, mask=m_x, other=0.0).to(tl.float32)
    b_x = tl.load(clean + row + b_o, mask=m_x, other=0.0).to(tl.float32)
    b_f = tl.div_rn(b_x_adv - b_x, tl.where(epsilon > 0, epsilon, 1.0))
    b_f = tl.where(epsilon > 0, tl.where(b_f == b_f, b_f, 0.0), 0.0)
    b_f = _clip(b_f, -1.0, 1.0)
    if memory.dtype.element_ty == tl.int8:
        b_f = b_f * 127.0 + NEAREST - NEAREST
    o_m = tl.load(slots + i_s) * (CHANNELS * OWN_HEIGHT * OWN_WIDTH) + o_q
    tl.store(memory + o_m, b_f.to(memory.dtype.element_ty), mask=m_q & b_written)
