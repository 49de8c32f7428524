"""Counts the rows with their label as first maximum, and moves the moving average of their share, in one launch.

It counts in integers and averages in float64: the result does not depend on the order.
"""

import triton
import triton.language as tl


@triton.jit
def _move(robust_fraction, unreported_faults, hits, faults, m, MOMENTUM: tl.constexpr, WEIGHT: tl.constexpr):
    """Writes `F_R ← p·F_R + w·(hits / m)`, or counts a fault and does not move F_R."""
    before = tl.load(robust_fraction)
    count = tl.load(unreported_faults)
    tl.debug_barrier()  # every thread reads, one writes
    after = MOMENTUM * before + WEIGHT * (hits.to(tl.float64) / tl.cast(m, tl.float64))
    tl.store(robust_fraction, tl.where(faults > 0, before, after))
    tl.store(unreported_faults, count + (faults > 0).to(tl.int64))


@triton.jit(do_not_specialize=["m", "blocks"])
def update_fraction_fwd_kernel(
    robust_fraction,  # [] float64, F_R, changed in place
    unreported_faults,  # [] int64, changed in place
    logits,  # [m, K], rows `stride` apart
    labels,  # [m] int64
    tallies,  # [2, programs] int32: hits and faults of each; or None: there is one program, which moves F_R
    m,
    blocks,  # cdiv(m, ROWS)
    stride,  # elements from row to row; None for contiguous rows
    MOMENTUM: tl.constexpr,  # p
    WEIGHT: tl.constexpr,  # (1 - p)·γ
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts hits and faults (rows without a softmax, labels that are no class). Grid: the number of programs."""
    i_p = tl.program_id(0)
    programs = tl.num_programs(0)
    o_k = tl.arange(0, BLOCK)
    b_hits = tl.zeros([ROWS], tl.int32)
    b_faults = tl.zeros([ROWS], tl.int32)
    for i_b in range(i_p, blocks, programs):
        o_m = tl.cast(i_b, tl.int64) * ROWS + tl.arange(0, ROWS)
        m_m = o_m < m
        z = logits + (o_m * (K if stride is None else stride))[:, None]
        b_label = tl.load(labels + o_m, mask=m_m, other=0)

        # each lane keeps its largest logit and its first place
        b_lane_max = tl.full([ROWS, BLOCK], float("-inf"), tl.float32)
        b_lane_first = tl.full([ROWS, BLOCK], K, tl.int32)
        for o_b in range(0, K, BLOCK):
            m_x = m_m[:, None] & (o_b + o_k < K)[None, :]
            b_z = tl.load(z + (o_b + o_k)[None, :], mask=m_x, other=float("-inf")).to(tl.float32)
            b_z = tl.where(b_z != b_z, float("inf"), b_z)  # neither has a softmax, and +Inf is ordered
            b_lane_first = tl.where(b_z > b_lane_max, (o_b + o_k)[None, :], b_lane_first)
            b_lane_max = tl.maximum(b_lane_max, b_z)
        b_max = tl.max(b_lane_max, axis=1)
        b_first = tl.min(tl.where(b_lane_max == b_max[:, None], b_lane_first, K), axis=1)

        b_fit = (b_max > float("-inf")) & (b_max < float("inf")) & (b_label >= 0) & (b_label < K)
        b_hits += (m_m & b_fit & (b_first == b_label)).to(tl.int32)
        b_faults += (m_m & (b_fit == 0)).to(tl.int32)

    hits = tl.sum(b_hits, axis=0)
    faults = tl.sum(b_faults, axis=0)
    if tallies is None:
        _move(robust_fraction, unreported_faults, hits, faults, m, MOMENTUM, WEIGHT)
    else:
        tl.store(tallies + i_p, hits)
        tl.store(tallies + programs + i_p, faults)


@triton.jit(do_not_specialize=["m"])
def update_fraction_finish_kernel(
    robust_fraction, unreported_faults, tallies, m, MOMENTUM: tl.constexpr, WEIGHT: tl.constexpr, PROGRAMS: tl.constexpr
):
    """Moves F_R by the hits and faults of all programs, `tallies` [2, PROGRAMS]. Grid: 1."""
    o_p = tl.arange(0, PROGRAMS)
    hits = tl.sum(tl.load(tallies + o_p), axis=0)
    faults = tl.sum(tl.load(tallies + PROGRAMS + o_p), axis=0)
    _move(robust_fraction, unreported_faults, hits, faults, m, MOMENTUM, WEIGHT)
