"""The stable order by descending steps, for any step counts."""

import triton
import triton.language as tl

SPAN: tl.constexpr = tl.constexpr(8192)  # at least m, for a batch that is ordered in one launch


@triton.jit(do_not_specialize=["m", "most"])
def order_by_steps_fwd_kernel(
    steps,  # [m] int64 in 0..most
    order,  # [m] int64
    active,  # [most] int64
    m,
    most,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Puts sample i after as many samples as are before it, comparing all pairs. Grid: cdiv(m + most, BLOCK_I).

    With the key `(most - steps)·SPAN + i`, which no two samples share, "before" is one comparison; and the samples with
    more than t steps are those with a key below `(most - t)·SPAN`: rows from m on count these.
    """
    o_i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    m_i = o_i < m
    b_steps = tl.load(steps + o_i, mask=m_i, other=0).to(tl.int32)
    b_limit = tl.where(m_i, (most - b_steps) * SPAN + o_i, (most - (o_i - m)) * SPAN)
    b_sum = tl.zeros((BLOCK_I, BLOCK_J), tl.int32)
    for start in range(0, m, BLOCK_J):
        o_j = start + tl.arange(0, BLOCK_J)
        m_j = o_j < m
        b_key = (most - tl.load(steps + o_j, mask=m_j, other=0).to(tl.int32)) * SPAN + o_j
        b_key = tl.where(m_j, b_key, 0x7FFFFFFF)
        b_sum += (b_key[None, :] < b_limit[:, None]).to(tl.int32)
    b_at = tl.sum(b_sum, axis=1)
    tl.store(order + b_at, o_i.to(tl.int64), mask=m_i)
    tl.store(active + (o_i - m), b_at.to(tl.int64), mask=(o_i >= m) & (o_i - m < most))


@triton.jit
def _cells(steps, o_x, m_x, most, i_b, blocks):
    """Returns the cell that counts each sample of a block, in a table of counts by (steps descending, block)."""
    b_steps = tl.load(steps + o_x, mask=m_x, other=0).to(tl.int32)
    b_steps = tl.minimum(tl.maximum(b_steps, 0), most)
    return (most - b_steps) * blocks + i_b


@triton.jit(do_not_specialize=["m", "most", "blocks"])
def count_steps_fwd_kernel(
    steps,  # [m] int64 in 0..most
    cells,  # [(most + 1) · blocks + 1] int32, 0 before: from the second cell on, the table of counts
    m,
    most,
    blocks,
    BLOCK: tl.constexpr,
):
    """Counts the samples of each block by number of steps. Grid: blocks."""
    i_b = tl.program_id(0)
    o_x = i_b * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < m
    tl.atomic_add(cells + 1 + _cells(steps, o_x, m_x, most, i_b, blocks), 1, mask=m_x, sem="relaxed")


@triton.jit(do_not_specialize=["m", "most", "blocks"])
def place_by_steps_fwd_kernel(
    steps,  # [m] int64 in 0..most
    starts,  # [(most + 1) · blocks + 1] int64, the running sum of `cells`: where the samples of each cell begin
    order,  # [m] int64
    m,
    most,
    blocks,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Places each sample after those of its block with equally many steps that came before it. Grid: blocks."""
    i_b = tl.program_id(0)
    o_i = tl.arange(0, BLOCK)
    o_x = i_b * BLOCK + o_i
    m_x = o_x < m
    b_cell = _cells(steps, o_x, m_x, most, i_b, blocks)
    b_sum = tl.zeros((BLOCK, TILE), tl.int32)
    for start in range(0, BLOCK, TILE):
        o_j = start + tl.arange(0, TILE)
        o_y = i_b * BLOCK + o_j
        b_other = _cells(steps, o_y, o_y < m, most, i_b, blocks)
        b_sum += ((b_other[None, :] == b_cell[:, None]) & (o_j[None, :] < o_i[:, None])).to(tl.int32)
    b_at = tl.load(starts + b_cell, mask=m_x, other=0) + tl.sum(b_sum, axis=1)
    tl.store(order + b_at, o_x.to(tl.int64), mask=m_x)
