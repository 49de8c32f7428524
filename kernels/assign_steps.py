"""Assigns groups, steps and an order by signed variances: Eq. 6 and a stable counting sort, exact to the last bit.

The order statistics come from integer keys that sort like the floats, so that they are exact and NaN comes last. The
three groups' counts are packed: one scan instead of three, and one number for a block.
"""

import triton
import triton.language as tl

OUTLIER: tl.constexpr = tl.constexpr(0)
BOUNDARY: tl.constexpr = tl.constexpr(1)
ROBUST: tl.constexpr = tl.constexpr(2)
FIELD: tl.constexpr = tl.constexpr(21)  # bits of a count in an int64: m ≤ 2^20
FIELD_MASK: tl.constexpr = tl.constexpr(2**21 - 1)
NARROW: tl.constexpr = tl.constexpr(15)  # bits of a count in an int32: a block holds no more than 2^14
NARROW_MASK: tl.constexpr = tl.constexpr(2**15 - 1)
LAST: tl.constexpr = tl.constexpr(0x7FFFFFFF)  # the largest key: NaN, and lanes beyond m
FIRST: tl.constexpr = tl.constexpr(-0x80000000)
BINS: tl.constexpr = tl.constexpr(256)  # a key is selected digit by digit, 8 bits each
# arguments whose values must not be compiled in
STEPS = ("steps_outlier", "steps_boundary", "steps_robust")
POLICY = (*STEPS, "size_outlier", "size_boundary", "size_robust")


@triton.jit
def _key(b_v, m_v):
    """Converts float32 to int32 in the same order: -0 equals +0, and any NaN becomes LAST."""
    b_bits = b_v.to(tl.int32, bitcast=True)
    b_key = b_bits ^ ((b_bits >> 31) & LAST)
    b_key = tl.where(b_v == 0, 0, b_key)
    return tl.where((b_v == b_v) & m_v, b_key, LAST)


@triton.jit
def _value(key):
    """Returns the float64 of a key."""
    bits = key ^ ((key >> 31) & LAST)
    return bits.to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def _rank(robust_fraction, m):
    """Returns the rank of the percentile, and the index of the order statistic at or below it."""
    last = tl.cast(m - 1, tl.float64)
    rank = (1.0 - tl.load(robust_fraction)) * last
    below = tl.minimum(tl.maximum(tl.floor(rank), 0.0), last)
    return rank, below


@triton.jit
def _threshold(low, high, t, m):
    """Returns `max(0, percentile)` between two order statistics, like numpy.quantile; 0 for an empty batch."""
    gap = high - low
    percentile = tl.where(t < 0.5, low + gap * t, high - gap * (1.0 - t))
    return tl.where((percentile <= 0) | (m == 0), 0.0, percentile)  # NaN stays NaN


@triton.jit
def _groups(svar, correct, robust_fraction, threshold, o_x, m_x):
    """Returns a block's groups."""
    least = tl.where(tl.load(robust_fraction) > 0, threshold, float("nan"))  # at F_R = 0 no sample reaches NaN
    b_robust = tl.load(svar + o_x, mask=m_x, other=0.0).to(tl.float64) >= least
    b_correct = tl.load(correct + o_x, mask=m_x, other=0) != 0
    return tl.where(b_correct, tl.where(b_robust, ROBUST, BOUNDARY), OUTLIER)


@triton.jit
def _real(bits):
    """Returns the float64 with these bits."""
    return tl.cast(bits, tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _allot(
    b_group, m_x, o_x, group, steps, step_size,
    steps_outlier, steps_boundary, steps_robust, size_outlier, size_boundary, size_robust, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes a block's groups, steps and step sizes; returns the steps."""
    b_steps = tl.where(b_group == BOUNDARY, steps_boundary, steps_outlier)
    b_steps = tl.where(b_group == ROBUST, steps_robust, b_steps)
    b_size = tl.full((BLOCK,), _real(size_outlier), tl.float64)
    b_size = tl.where(b_group == BOUNDARY, tl.full((BLOCK,), _real(size_boundary), tl.float64), b_size)
    b_size = tl.where(b_group == ROBUST, tl.full((BLOCK,), _real(size_robust), tl.float64), b_size)
    tl.store(group + o_x, b_group.to(tl.int64), mask=m_x)
    tl.store(steps + o_x, b_steps.to(tl.int64), mask=m_x)
    tl.store(step_size + o_x, b_size, mask=m_x)
    return b_steps


@triton.jit
def _narrow(b_group):
    """Returns 1 in the field of each sample's group, in 32 bits; robust samples count in neither field."""
    return tl.where(b_group == OUTLIER, 1, tl.where(b_group == BOUNDARY, NARROW_MASK + 1, 0))


@triton.jit
def _sizes(b_group, m_x):
    """Returns the sizes of a block's groups, packed into an int64."""
    total = tl.sum(tl.where(m_x, _narrow(b_group), 0), axis=0).to(tl.int64)
    outlier = total & NARROW_MASK
    boundary = total >> NARROW
    robust = tl.sum(m_x.to(tl.int32), axis=0).to(tl.int64) - outlier - boundary
    return outlier | (boundary << FIELD) | (robust << (2 * FIELD))


@triton.jit
def _count(packed, GROUP: tl.constexpr):
    """Returns the count of one group."""
    return (packed >> (GROUP * FIELD)) & FIELD_MASK


@triton.jit
def _positions(b_group, b_steps, before, sizes, steps_outlier, steps_boundary, steps_robust, BLOCK: tl.constexpr):
    """Returns each sample's position: after all with more steps, and after earlier ones with equally many.

    before: packed counts of the blocks before; sizes: of all. Lanes beyond m come last and do not affect others.
    """
    b_one = _narrow(b_group)
    b_scan = tl.cumsum(b_one, axis=0) - b_one
    b_outlier = b_scan & NARROW_MASK
    b_boundary = b_scan >> NARROW
    b_robust = tl.arange(0, BLOCK) - b_outlier - b_boundary
    b_at = tl.where(steps_outlier > b_steps, _count(sizes, OUTLIER).to(tl.int32), 0)
    b_at += tl.where(steps_boundary > b_steps, _count(sizes, BOUNDARY).to(tl.int32), 0)
    b_at += tl.where(steps_robust > b_steps, _count(sizes, ROBUST).to(tl.int32), 0)
    b_at += tl.where(steps_outlier == b_steps, b_outlier + _count(before, OUTLIER).to(tl.int32), 0)
    b_at += tl.where(steps_boundary == b_steps, b_boundary + _count(before, BOUNDARY).to(tl.int32), 0)
    b_at += tl.where(steps_robust == b_steps, b_robust + _count(before, ROBUST).to(tl.int32), 0)
    return b_at


@triton.jit
def _unfit(unfit, o_x, m_x):
    """Counts a block's rows, packed into an int64: with bit 0 set in the low half, with bit 1 set in the high one."""
    total = tl.full((), 0, tl.int64)
    if unfit is not None:
        b_unfit = tl.load(unfit + o_x, mask=m_x, other=0).to(tl.int64)
        total = tl.sum((b_unfit & 1) | ((b_unfit & 2) << 31), axis=0)
    return total


@triton.jit
def _report(
    counts, sizes, unfit, faults, group_counts, most, n_faults, steps_outlier, steps_boundary, steps_robust,
    COUNTS: tl.constexpr = 128,
):  # fmt: skip
    """Writes the numbers for the host, and counts the groups unless there is a fault. For one program."""
    for start in range(0, most, COUNTS):
        o_t = start + tl.arange(0, COUNTS)
        b_active = tl.where(steps_outlier > o_t, _count(sizes, OUTLIER), 0)
        b_active += tl.where(steps_boundary > o_t, _count(sizes, BOUNDARY), 0)
        b_active += tl.where(steps_robust > o_t, _count(sizes, ROBUST), 0)
        tl.store(counts + o_t, b_active, mask=o_t < most)
    tl.store(counts + most, _count(sizes, OUTLIER))
    tl.store(counts + most + 1, _count(sizes, BOUNDARY))
    tl.store(counts + most + 2, _count(sizes, ROBUST))
    faulty = unfit
    if faults is not None:
        for start in range(0, n_faults, COUNTS):
            o_f = start + tl.arange(0, COUNTS)
            b_fault = tl.load(faults + o_f, mask=o_f < n_faults, other=0)
            tl.store(counts + most + 3 + o_f, b_fault, mask=o_f < n_faults)
            faulty += tl.sum((b_fault != 0).to(tl.int64), axis=0)
    tl.store(counts + most + 3 + n_faults, unfit & LAST)
    tl.store(counts + most + 4 + n_faults, unfit >> 32)
    if group_counts is not None:
        sound = faulty == 0
        tl.atomic_add(group_counts + OUTLIER, _count(sizes, OUTLIER), mask=sound, sem="relaxed")
        tl.atomic_add(group_counts + BOUNDARY, _count(sizes, BOUNDARY), mask=sound, sem="relaxed")
        tl.atomic_add(group_counts + ROBUST, _count(sizes, ROBUST), mask=sound, sem="relaxed")


@triton.jit(do_not_specialize=["m", "most", "n_faults", *POLICY])
def assign_steps_fwd_kernel(
    svar,  # [m] float32
    correct,  # [m] uint8, 0 or 1
    robust_fraction,  # [] float64, F_R
    unfit,  # [m] uint8: bit 0 and bit 1 are two kinds of fault; or None
    faults,  # [n_faults] int64, counts of other faults; or None
    threshold,  # [] float64
    group,  # [m] int64
    steps,  # [m] int64
    step_size,  # [m] float64
    order,  # [m] int64
    counts,  # [most + 3 + n_faults + 2] int64: active at each step, group sizes, faults, unfit of either kind
    group_counts,  # [3] int64, += the group sizes where there is no fault; or None
    m,
    most,
    n_faults,
    steps_outlier,
    steps_boundary,
    steps_robust,
    size_outlier: tl.int64,  # the bits of a float64: triton 3.2 rounds numbers to float32
    size_boundary: tl.int64,
    size_robust: tl.int64,
    BLOCK: tl.constexpr,  # at least m
    CHUNK: tl.constexpr,
):
    """Computes the whole assignment in one program."""
    o_x = tl.arange(0, BLOCK)
    m_x = o_x < m
    b_key = _key(tl.load(svar + o_x, mask=m_x, other=0.0), m_x)

    # finds the largest key with at most `k` keys below it, from the highest bit down
    rank, below = _rank(robust_fraction, m)
    k = below.to(tl.int32)
    low = tl.full((), FIRST, tl.int32)
    for i in range(32):
        candidate = low ^ (tl.full((), 1, tl.int32) << (31 - i))
        fewer = tl.sum((b_key < candidate).to(tl.int32), axis=0)
        low = tl.where(fewer <= k, candidate, low)
    up_to_low = tl.sum((b_key <= low).to(tl.int32), axis=0)
    above = tl.min(tl.where(b_key > low, b_key, LAST), axis=0)
    high = tl.where(up_to_low > tl.minimum(k + 1, m - 1), low, above)
    cut = _threshold(_value(low), _value(high), rank - below, m)
    tl.store(threshold, cut)

    # from here on one chunk at a time: reading twice is cheaper than the registers to keep the values
    sizes = tl.full((), 0, tl.int64)
    unfit_rows = tl.full((), 0, tl.int64)
    for start in range(0, m, CHUNK):
        o_c = start + tl.arange(0, CHUNK)
        m_c = o_c < m
        sizes += _sizes(_groups(svar, correct, robust_fraction, cut, o_c, m_c), m_c)
        unfit_rows += _unfit(unfit, o_c, m_c)
    before = tl.full((), 0, tl.int64)
    for start in range(0, m, CHUNK):
        o_c = start + tl.arange(0, CHUNK)
        m_c = o_c < m
        b_group = _groups(svar, correct, robust_fraction, cut, o_c, m_c)
        b_steps = _allot(
            b_group, m_c, o_c, group, steps, step_size,
            steps_outlier, steps_boundary, steps_robust, size_outlier, size_boundary, size_robust, CHUNK,
        )  # fmt: skip
        b_at = _positions(b_group, b_steps, before, sizes, steps_outlier, steps_boundary, steps_robust, CHUNK)
        tl.store(order + b_at, o_c.to(tl.int64), mask=m_c)
        before += _sizes(b_group, m_c)
    _report(
        counts, sizes, unfit_rows, faults, group_counts, most, n_faults, steps_outlier, steps_boundary, steps_robust
    )


@triton.jit
def _selected(histograms, k, digits):
    """Returns the first digits of the k-th smallest key, its sign bit flipped, and k among the keys with them.

    histograms: [digits, BINS] int32, each of one digit of the keys with the selected digits before it.
    """
    o_b = tl.arange(0, BINS)
    prefix = tl.full((), 0, tl.int32)
    for digit in range(digits):
        b_bin = tl.load(histograms + digit * BINS + o_b)
        chosen = tl.sum((tl.cumsum(b_bin, axis=0) <= k).to(tl.int32), axis=0)
        k -= tl.sum(tl.where(o_b < chosen, b_bin, 0), axis=0)
        prefix |= chosen << (24 - 8 * digit)
    return prefix, k


@triton.jit(do_not_specialize=["m", "digit"])
def select_digit_fwd_kernel(
    svar,  # [m] float32
    robust_fraction,  # [] float64, F_R
    histograms,  # [4, BINS] int32; row `digit` is 0 before
    above,  # [grid] int64: at the last digit, each block's least key above those with the first three digits
    m,
    digit,  # 0 the highest, 3 the lowest
    BLOCK: tl.constexpr,
):
    """Counts one digit of the radix select among the keys with the digits selected so far. Grid: blocks."""
    i_b = tl.program_id(0)
    o_x = i_b * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < m
    b_key = _key(tl.load(svar + o_x, mask=m_x, other=0.0), m_x)
    b_bits = b_key ^ FIRST
    _, below = _rank(robust_fraction, m)
    prefix, _ = _selected(histograms, below.to(tl.int32), digit)
    shift = 24 - 8 * digit
    # in two steps, since a shift by 32 is undefined
    m_same = m_x & (((b_bits ^ prefix).to(tl.uint32, bitcast=True) >> shift) >> 8 == 0)
    if digit == 3:
        m_above = m_x & ((b_key >> 8) > ((prefix ^ FIRST) >> 8))
        tl.store(above + i_b, tl.min(tl.where(m_above, b_key, LAST), axis=0).to(tl.int64))
    # other keys are counted as 0 and subtracted again: the effect of values beyond the bins depends on the version
    b_digit = tl.where(m_same, (b_bits >> shift) & (BINS - 1), 0)
    o_b = tl.arange(0, BINS)
    others = BLOCK - tl.sum(m_same.to(tl.int32), axis=0)
    b_bin = tl.histogram(b_digit, BINS) - tl.where(o_b == 0, others, 0)
    tl.atomic_add(histograms + digit * BINS + o_b, b_bin, mask=b_bin > 0, sem="relaxed")


@triton.jit(do_not_specialize=["m", "blocks", *POLICY])
def group_blocks_fwd_kernel(
    svar,  # [m] float32
    correct,  # [m] uint8
    robust_fraction,  # [] float64
    unfit,  # [m] uint8, or None
    histograms,  # [4, BINS] int32
    above,  # [blocks] int64
    threshold,  # [] float64
    group,  # [m] int64
    steps,  # [m] int64
    step_size,  # [m] float64
    block_sizes,  # [blocks] int64, packed
    block_unfit,  # [blocks] int64, packed
    m,
    blocks,
    steps_outlier,
    steps_boundary,
    steps_robust,
    size_outlier: tl.int64,  # the bits of a float64: triton 3.2 rounds numbers to float32
    size_boundary: tl.int64,
    size_robust: tl.int64,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # at least `blocks`
):
    """Computes threshold, groups, steps and step sizes, and each block's counts. Grid: blocks."""
    i_b = tl.program_id(0)
    rank, below = _rank(robust_fraction, m)
    k = below.to(tl.int32)
    prefix, among_equal = _selected(histograms, k, 4)
    o_b = tl.arange(0, BINS)
    b_bin = tl.load(histograms + 3 * BINS + o_b)  # histogram of the last digit
    digit = prefix & (BINS - 1)
    equal = tl.sum(tl.where(o_b == digit, b_bin, 0), axis=0)
    next_digit = tl.min(tl.where((o_b > digit) & (b_bin > 0), o_b, BINS), axis=0)
    o_k = tl.arange(0, BLOCKS)
    beyond = tl.min(tl.load(above + o_k, mask=o_k < blocks, other=LAST), axis=0).to(tl.int32)
    low = prefix ^ FIRST
    beyond = tl.where(next_digit < BINS, low - digit + next_digit, beyond)
    high = tl.where((among_equal + 1 < equal) | (k + 1 >= m), low, beyond)
    cut = _threshold(_value(low), _value(high), rank - below, m)
    if i_b == 0:
        tl.store(threshold, cut)

    o_x = i_b * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < m
    b_group = _groups(svar, correct, robust_fraction, cut, o_x, m_x)
    _allot(
        b_group, m_x, o_x, group, steps, step_size,
        steps_outlier, steps_boundary, steps_robust, size_outlier, size_boundary, size_robust, BLOCK,
    )  # fmt: skip
    tl.store(block_sizes + i_b, _sizes(b_group, m_x))
    tl.store(block_unfit + i_b, _unfit(unfit, o_x, m_x))


@triton.jit(do_not_specialize=["m", "blocks", "most", "n_faults", *STEPS])
def order_blocks_fwd_kernel(
    group,  # [m] int64
    steps,  # [m] int64
    block_sizes,  # [blocks] int64, packed
    block_unfit,  # [blocks] int64, packed
    faults,  # [n_faults] int64, or None
    order,  # [m] int64
    counts,  # [most + 3 + n_faults + 2] int64
    group_counts,  # [3] int64, or None
    m,
    blocks,
    most,
    n_faults,
    steps_outlier,
    steps_boundary,
    steps_robust,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # at least `blocks`
):
    """Writes the stable order, and in the first program the numbers for the host. Grid: blocks."""
    i_b = tl.program_id(0)
    o_k = tl.arange(0, BLOCKS)
    b_sizes = tl.load(block_sizes + o_k, mask=o_k < blocks, other=0)
    sizes = tl.sum(b_sizes, axis=0)
    before = tl.sum(tl.where(o_k < i_b, b_sizes, 0), axis=0)

    o_x = i_b * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < m
    b_group = tl.load(group + o_x, mask=m_x, other=0).to(tl.int32)
    b_steps = tl.load(steps + o_x, mask=m_x, other=0).to(tl.int32)
    b_at = _positions(b_group, b_steps, before, sizes, steps_outlier, steps_boundary, steps_robust, BLOCK)
    tl.store(order + b_at, o_x.to(tl.int64), mask=m_x)
    if i_b == 0:
        unfit = tl.sum(tl.load(block_unfit + o_k, mask=o_k < blocks, other=0), axis=0)
        _report(counts, sizes, unfit, faults, group_counts, most, n_faults, steps_outlier, steps_boundary, steps_robust)
