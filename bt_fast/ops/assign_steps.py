"""From signed variances to groups, steps and an order: fused kernels on CUDA, plain torch elsewhere."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from bt_fast.ops.availability import kernels_run, or_plain
from bt_fast.ops.launch import check, contiguous
from bt_fast.ops.order_by_steps import order_reference

OUTLIER, BOUNDARY, ROBUST = 0, 1, 2
GROUPS = ("outlier", "boundary", "robust")

MOST_SAMPLES = 2**20  # of a batch for the kernels
WARPS = {1024: 4, 8192: 16}  # of the one program, by the size of its block
CHUNK = 1024  # of it at a time, once the threshold is known
BLOCK = 2048  # of each program of a batch beyond that
BLOCKS = MOST_SAMPLES // BLOCK
BLOCK_WARPS = 8
BINS, DIGITS = 256, 4

Assigned = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def assign_steps(
    svar: Tensor,
    correct: Tensor,
    robust_fraction: Tensor,
    group_steps: Sequence[int],
    group_step_sizes: Sequence[float],
    unfit: Tensor | None = None,
    faults: Tensor | None = None,
    group_counts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Group each sample by the classification rule of Eq. 6, give each group its steps, and sort by them.

    `T = max(0, Percentile(SVar, 1 - F_R))`, interpolated between order statistics as `numpy.quantile`; NaN is the
    largest SVar. An outlier is misclassified, a robust sample correct with `SVar ≥ T`, a boundary sample any other. At
    `F_R = 0` every correct sample is boundary, the largest too (the limit of Eq. 6).

    On CUDA one launch up to m = 8192, and seven up to 2^20 (where triton is installed, and SVar is not float64). Never
    waits for the device.

    Args:
        svar: [m] float32 or float64, m ≥ 0.
        correct: [m] bool; the sign of SVar is not used, since it is lost where the variance is 0.
        robust_fraction: 0-dim float64, F_R in [0, 1].
        group_steps: (N_O, N_B, N_R), each at least 0.
        group_step_sizes: (α_O, α_B, α_R).
        unfit: [m] uint8, 0 for a sound sample; bit 0 and bit 1 are two kinds of fault.
        faults: [f] int64, how often anything else was wrong.
        group_counts: [3] int64, to which the group sizes are added unless a sample is unfit or a fault not 0.

    Returns:
        In this order
        threshold: 0-dim float64, T; 0 for an empty batch.
        group: [m] int64, one of OUTLIER, BOUNDARY, ROBUST.
        steps: [m] int64.
        step_size: [m] float64.
        order: [m] int64, so that `steps[order]` never increases and equal counts keep their places.
        counts: [n + 3 + f + 2] int64, what the host needs, n the largest of `group_steps`: how many samples have more
            than t steps for each t < n; the sizes of the groups; the faults; how many samples are unfit by bit 0, and
            how many by bit 1.

    Raises:
        TypeError or ValueError: a dtype, shape, device or value does not fit; the message names the argument.
    """
    assigned: Assigned = _assign_steps(
        svar, correct, robust_fraction, group_steps, group_step_sizes, unfit, faults, group_counts
    )
    return assigned


@torch.library.custom_op("bt_fast::assign_steps", mutates_args=("group_counts",))
def _assign_steps(
    svar: Tensor,
    correct: Tensor,
    robust_fraction: Tensor,
    group_steps: Sequence[int],
    group_step_sizes: Sequence[float],
    unfit: Tensor | None,
    faults: Tensor | None,
    group_counts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check(svar, correct, robust_fraction, group_steps, group_step_sizes, unfit, faults, group_counts)
    run = assign_reference
    if _kernel_takes(svar):
        run = launch_assign if len(svar) <= max(WARPS) else launch_assign_in_blocks
    return run(svar, correct, robust_fraction, group_steps, group_step_sizes, unfit, faults, group_counts)


@_assign_steps.register_fake
def _(
    svar: Tensor,
    correct: Tensor,
    robust_fraction: Tensor,
    group_steps: Sequence[int],
    group_step_sizes: Sequence[float],
    unfit: Tensor | None,
    faults: Tensor | None,
    group_counts: Tensor | None,
) -> Assigned:
    _check(svar, correct, robust_fraction, group_steps, group_step_sizes, unfit, faults, group_counts)
    return _results(svar, group_steps, faults)


def assign_reference(
    svar: Tensor,
    correct: Tensor,
    robust_fraction: Tensor,
    group_steps: Sequence[int],
    group_step_sizes: Sequence[float],
    unfit: Tensor | None = None,
    faults: Tensor | None = None,
    group_counts: Tensor | None = None,
) -> Assigned:
    """`assign_steps` in plain torch: what the kernels are held against, and what runs where there is none."""
    threshold = robust_threshold(svar, robust_fraction)
    robust = (svar.double() >= threshold) & (robust_fraction > 0)
    group = correct.long() + (correct & robust)

    steps = torch.full_like(group, group_steps[OUTLIER])
    step_size = torch.full_like(group, group_step_sizes[OUTLIER], dtype=torch.float64)
    for member in (BOUNDARY, ROBUST):  # by scalars: a table copied to the device would make the host wait
        inside = group == member
        steps.masked_fill_(inside, group_steps[member])
        step_size.masked_fill_(inside, group_step_sizes[member])
    order, active = order_reference(steps, max(group_steps))

    sizes = (group == torch.arange(3, device=group.device)[:, None]).sum(dim=1)
    wrong = torch.zeros(2, dtype=torch.int64, device=svar.device)
    if unfit is not None:
        wrong = torch.stack([(unfit & bit > 0).sum() for bit in (1, 2)])
    if faults is not None:
        wrong = torch.cat([faults, wrong])
    if group_counts is not None:
        group_counts += torch.where(wrong.any(), 0, sizes)
    return threshold, group, steps, step_size, order, torch.cat([active, sizes, wrong])


def robust_threshold(svar: Tensor, robust_fraction: Tensor, count: Tensor | None = None) -> Tensor:
    """`T = max(0, Percentile(SVar, 1 - F_R))` (Eq. 6), interpolated between order statistics as `numpy.quantile`.

    Args:
        svar: [m] floating point, m ≥ 0; NaN is the largest.
        robust_fraction: 0-dim, F_R in [0, 1].
        count: 0-dim int64 in 1..m, how many of these are samples; the others are NaN. None: all.

    Returns:
        0-dim float64; 0 for an empty batch.
    """
    m = len(svar)
    if m == 0:
        return torch.zeros((), dtype=torch.float64, device=svar.device)
    ordered = svar.sort().values.double()
    last = torch.full((), m, dtype=torch.int64, device=svar.device) - 1 if count is None else count - 1
    rank = (1.0 - robust_fraction.double()) * last
    below = rank.floor().clamp(0, m - 1).nan_to_num()  # no index is out of range, whatever F_R was loaded
    t = rank - below
    pair = torch.stack([below, torch.minimum(below + 1, last)]).long()
    low, high = ordered[pair].unbind()
    # numpy's form: from the nearer end, so that the result is monotone and exact at both
    percentile = torch.where(t < 0.5, low + (high - low) * t, high - (high - low) * (1.0 - t))
    return torch.where(percentile <= 0, 0.0, percentile)  # one zero, whichever the sort put first


@or_plain(assign_reference)
def launch_assign(
    svar: Tensor,
    correct: Tensor,
    robust_fraction: Tensor,
    group_steps: Sequence[int],
    group_step_sizes: Sequence[float],
    unfit: Tensor | None = None,
    faults: Tensor | None = None,
    group_counts: Tensor | None = None,
) -> Assigned:
    """`assign_steps` as one launch, for m ≤ 8192."""
    from bt_fast.kernels.assign_steps import assign_steps_fwd_kernel

    m = len(svar)
    block = next(size for size in WARPS if m <= size)
    results = _results(svar, group_steps, faults)
    with torch.cuda.device_of(svar):
        assign_steps_fwd_kernel[(1,)](
            svar.contiguous(),
            correct.contiguous().view(torch.uint8),
            robust_fraction,
            contiguous(unfit),
            contiguous(faults),
            *results,
            group_counts,
            m,
            max(group_steps),
            0 if faults is None else len(faults),
            *group_steps,
            *map(_bits, group_step_sizes),
            BLOCK=block,
            CHUNK=CHUNK,
            num_warps=WARPS[block],
            enable_fp_fusion=False,
        )
    return results


@or_plain(assign_reference)
def launch_assign_in_blocks(
    svar: Tensor,
    correct: Tensor,
    robust_fraction: Tensor,
    group_steps: Sequence[int],
    group_step_sizes: Sequence[float],
    unfit: Tensor | None = None,
    faults: Tensor | None = None,
    group_counts: Tensor | None = None,
) -> Assigned:
    """`assign_steps` for any 0 < m ≤ MOST_SAMPLES: a radix select of the threshold, the groups, the order."""
    from bt_fast.kernels.assign_steps import (
        group_blocks_fwd_kernel,
        order_blocks_fwd_kernel,
        select_digit_fwd_kernel,
    )

    m = len(svar)
    blocks = -(-m // BLOCK)
    svar, correct = svar.contiguous(), correct.contiguous().view(torch.uint8)
    results = _results(svar, group_steps, faults)
    threshold, group, steps, step_size, order, counts = results
    histograms = torch.zeros(DIGITS, BINS, dtype=torch.int32, device=svar.device)
    above, sizes, unfit_rows = torch.empty(3, blocks, dtype=torch.int64, device=svar.device)
    options = {"BLOCK": BLOCK, "num_warps": BLOCK_WARPS, "enable_fp_fusion": False}
    with torch.cuda.device_of(svar):
        for digit in range(DIGITS):
            select_digit_fwd_kernel[(blocks,)](svar, robust_fraction, histograms, above, m, digit, **options)
        group_blocks_fwd_kernel[(blocks,)](
            svar,
            correct,
            robust_fraction,
            contiguous(unfit),
            histograms,
            above,
            threshold,
            group,
            steps,
            step_size,
            sizes,
            unfit_rows,
            m,
            blocks,
            *group_steps,
            *map(_bits, group_step_sizes),
            **options,
            BLOCKS=BLOCKS,
        )
        order_blocks_fwd_kernel[(blocks,)](
            group,
            steps,
            sizes,
            unfit_rows,
            contiguous(faults),
            order,
            counts,
            group_counts,
            m,
            blocks,
            max(group_steps),
            0 if faults is None else len(faults),
            *group_steps,
            **options,
            BLOCKS=BLOCKS,
        )
    return results


def _bits(number: float) -> int:
    """The 64 bits of a float, as a kernel takes it."""
    (bits,) = struct.unpack("<q", struct.pack("<d", number))
    return int(bits)


def _kernel_takes(svar: Tensor) -> bool:
    return svar.is_cuda and svar.dtype == torch.float32 and len(svar) <= MOST_SAMPLES and kernels_run(svar)


def _results(svar: Tensor, group_steps: Sequence[int], faults: Tensor | None) -> Assigned:
    """Room for what is returned."""
    m, device = len(svar), svar.device
    numbers = max(group_steps) + 3 + (0 if faults is None else len(faults)) + 2
    threshold = torch.empty((), dtype=torch.float64, device=device)
    step_size = torch.empty(m, dtype=torch.float64, device=device)
    group, steps, order = (torch.empty(m, dtype=torch.int64, device=device) for _ in range(3))
    return threshold, group, steps, step_size, order, torch.empty(numbers, dtype=torch.int64, device=device)


def _check(
    svar: Tensor,
    correct: Tensor,
    robust_fraction: Tensor,
    group_steps: Sequence[int],
    group_step_sizes: Sequence[float],
    unfit: Tensor | None,
    faults: Tensor | None,
    group_counts: Tensor | None,
) -> None:
    if svar.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"svar must be torch.float32 or torch.float64, got {svar.dtype}: write svar.float()")
    if svar.dim() != 1:
        raise ValueError(f"svar must have shape [m], got {list(svar.shape)}: give one number for each sample")
    check("correct", correct, svar.shape, (torch.bool,), svar.device)
    check("robust_fraction", robust_fraction, (), (torch.float64,), svar.device)
    check("unfit", unfit, svar.shape, (torch.uint8,), svar.device)
    check(
        "faults", faults, (len(faults),) if faults is not None and faults.dim() else (1,), (torch.int64,), svar.device
    )
    check("group_counts", group_counts, (3,), (torch.int64,), svar.device)
    if group_counts is not None and not group_counts.is_contiguous():
        raise ValueError("group_counts must be contiguous: write group_counts.contiguous()")
    for name, values in (("group_steps", group_steps), ("group_step_sizes", group_step_sizes)):
        if len(values) != 3:
            raise ValueError(
                f"{name} must hold 3 numbers (outlier, boundary, robust), got {list(values)}: give one for each group"
            )
    if not all(0 <= n < 2**31 for n in group_steps):
        raise ValueError(
            f"group_steps must be at least 0, and fit into 32 bits, got {list(group_steps)}: "
            "give counts of steps, as (0, 10, 2)"
        )
