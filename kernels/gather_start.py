"""Makes the sorted clean batch and the attack's random start, in one pass over the images.

Tensors of images are dense with the sample outermost, in any order of channels, height and width.

The noise uses only additions, multiplications and square roots, for which IEEE 754 determines the rounding, and no
library's logarithm or cosine: so it is the same bit for bit everywhere. (A library's cosine also needs local memory,
for arguments that do not occur here.) If a number of it in `shared.py` is changed, `bt_fast.ops.gather_start` must
change with it.
"""

import triton
import triton.language as tl

from bt_fast.kernels.shared import _clip, _noise


@triton.jit(do_not_specialize=["blocks"])
def gather_start_fwd_kernel(
    x,  # [m, length]
    clean,  # [m, length], x in sorted order
    start,  # [m, length], clean with noise
    order,  # [m] int64: sorted row i is sample order[i]; or None: i
    steps,  # [m] integers, of sample i: 0 means no noise; or None: every sample takes steps
    samples,  # [m] int64, the number of sample i for its noise; or None: i
    state,  # [2] int64: seed and offset
    length,  # elements of a row
    blocks,  # cdiv(length, BLOCK)
    scale,  # standard deviation of the noise, or half its range
    lower,
    upper,
    BLOCK: tl.constexpr,  # a multiple of 4
    NORMAL: tl.constexpr,  # else uniform
):
    """`clean ← x[order]`, `start ← clip(clean + scale·noise, lower, upper)`, or x without steps. Grid: m · blocks.

    The counter of an element's noise does not involve its sorted row or a program, so its noise does not depend on the
    order, the block or the dtype, nor, with `samples`, on the batch.
    """
    i_x = tl.program_id(0)
    i_n = i_x // blocks
    i_b = i_x % blocks
    i_s = tl.cast(i_n, tl.int64)  # a batch may hold more than 2^31 elements
    if order is not None:
        i_s = tl.load(order + i_n)
    moves = True
    if steps is not None:
        moves = tl.load(steps + i_s) > 0

    o_x = i_b * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < length
    row = tl.cast(i_n, tl.int64) * length
    b_x = tl.load(x + i_s * length + o_x, mask=m_x)
    tl.store(clean + row + o_x, b_x, mask=m_x)
    b_start = b_x
    if moves:
        i_c = i_s
        if samples is not None:
            i_c = tl.load(samples + i_s)
        b_noise = _noise(state, i_c, i_b, NORMAL, BLOCK)
        b_start = _clip(b_x.to(tl.float32) + b_noise * scale, lower, upper).to(b_x.dtype)
    tl.store(start + row + o_x, b_start, mask=m_x)
