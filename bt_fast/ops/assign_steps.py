"""Assigns groups, steps and an order by signed variances: fused kernels on CUDA, plain torch elsewhere."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bt_fast.ops.availability import kernels_run, or_plain
from bt_fast.ops.launch import check, contiguous, define_op, packed, run_kernel
from bt_fast.ops.order_by_steps import order_reference

OUTLIER, BOUNDARY, ROBUST = 0, 1, 2
GROUPS = ("outlier", "boundary", "robust")

MOST_SAMPLES = 2**20  # in a batch for the kernels
WARPS = {1024: 4, 8192: 16}  # of the single program, by its block size
CHUNK = 1024  # of it at a time, after the threshold is known
BLOCK = 2048  # of each program for larger batches
BLOCKS = MOST_SAMPLES // BLOCK
BLOCK_WARPS = 8
BINS, DIGITS = 256, 4

Assigned = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Arguments(NamedTuple):
    """The arguments of `assign_steps`."""

    svar: Tensor
    correct: Tensor
    robust_fraction: Tensor
    group_steps: Sequence[int]
    group_step_sizes: Sequence[float]
    unfit: Tensor | None = None
    faults: Tensor | None = None
    group_counts: Tensor | None = None


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
    """Groups each sample by the classification rule of Eq. 6, gives each group its steps, and sorts by them.

    `T = max(0, Percentile(SVar, 1 - F_R))`, interpolated between order statistics like `numpy.quantile`; NaN is the
    largest SVar. An outlier is misclassified, a robust sample correct with `SVar ≥ T`, a boundary sample any other. At
    `F_R = 0` every correct sample is boundary, also that with the largest SVar (the limit of Eq. 6).

    On CUDA it is one launch up to m = 8192, and seven up to 2^20, except for SVar in float64.

    Args:
        svar: [m] float32 or float64, m ≥ 0.
        correct: [m] bool; the sign of SVar is not used, since it is lost where the variance is 0.
        robust_fraction: 0-dim float64, F_R in [0, 1].
        group_steps: (N_O, N_B, N_R), each at least 0.
        group_step_sizes: (α_O, α_B, α_R).
        unfit: [m] uint8, 0 for a valid sample; bit 0 and bit 1 are two kinds of fault.
        faults: [f] int64, the counts of other faults.
        group_counts: [3] int64, to which the group sizes are added unless a sample is unfit or a fault not 0.

    Returns:
        In this order
        threshold: 0-dim float64, T; 0 for an empty batch.
        group: [m] int64, one of OUTLIER, BOUNDARY, ROBUST.
        steps: [m] int64.
        step_size: [m] float64.
        order: [m] int64, so that `steps[order]` never increases; equal counts keep their order.
        counts: [n + 3 + f + 2] int64, which the host reads, n the largest of `group_steps`: how many samples have more
            than t steps for each t < n; the sizes of the groups; the faults; how many samples are unfit by bit 0, and
            how many by bit 1.

    Raises:
        TypeError or ValueError: a dtype, shape, device or value does not fit; the message names the argument.
    """
    assigned: Assigned = _assign_steps(
        svar, correct, robust_fraction, group_steps, group_step_sizes, unfit, faults, group_counts
    )
    return assigned


@packed(Arguments)
def assign_reference(a: Arguments) -> Assigned:
    """`assign_steps` in plain torch: the kernel's reference and fallback."""
    threshold = robust_threshold(a.svar, a.robust_fraction)
    robust = (a.svar.double() >= threshold) & (a.robust_fraction > 0)
    group = a.correct.long() + (a.correct & robust)

    steps = torch.full_like(group, a.group_steps[OUTLIER])
    step_size = torch.full_like(group, a.group_step_sizes[OUTLIER], dtype=torch.float64)
    for member in (BOUNDARY, ROBUST):  # scalars, since copying a table to the device would make the host wait
        inside = group == member
        steps.masked_fill_(inside, a.group_steps[member])
        step_size.masked_fill_(inside, a.group_step_sizes[member])
    order, active = order_reference(steps, max(a.group_steps))

    sizes = (group == torch.arange(3, device=group.device)[:, None]).sum(dim=1)
    wrong = torch.zeros(2, dtype=torch.int64, device=group.device)
    if a.unfit is not None:
        wrong = torch.stack([(a.unfit & bit > 0).sum() for bit in (1, 2)])
    if a.faults is not None:
        wrong = torch.cat([a.faults, wrong])
    if a.group_counts is not None:
        a.group_counts.add_(torch.where(wrong.any(), 0, sizes))
    return threshold, group, steps, step_size, order, torch.cat([active, sizes, wrong])


def robust_threshold(svar: Tensor, robust_fraction: Tensor, count: Tensor | None = None) -> Tensor:
    """Returns `T = max(0, Percentile(SVar, 1 - F_R))` (Eq. 6), interpolated like `numpy.quantile`.

    Args:
        svar: [m] floating point, m ≥ 0; NaN is the largest.
        robust_fraction: 0-dim, F_R in [0, 1].
        count: 0-dim int64 in 1..m, the number of samples among these; the others are NaN. None: all.

    Returns:
        0-dim float64; 0 for an empty batch.
    """
    m = len(svar)
    if m == 0:
        return torch.zeros((), dtype=torch.float64, device=svar.device)
    ordered = svar.sort().values.double()
    last = torch.full((), m, dtype=torch.int64, device=svar.device) - 1 if count is None else count - 1
    rank = (1.0 - robust_fraction.double()) * last
    below = rank.floor().clamp(0, m - 1).nan_to_num()  # keeps every index in range, for any loaded F_R
    t = rank - below
    pair = torch.stack([below, torch.minimum(below + 1, last)]).long()
    low, high = ordered[pair].unbind()
    # numpy's form: from the nearer end, so that the result is monotone, and exact at both ends
    percentile = torch.where(t < 0.5, low + (high - low) * t, high - (high - low) * (1.0 - t))
    return torch.where(percentile <= 0, 0.0, percentile)  # a single zero, whichever one the sort put first


@or_plain(assign_reference)
@packed(Arguments)
def launch_assign(a: Arguments) -> Assigned:
    """`assign_steps` as one launch, for m ≤ 8192."""
    from bt_fast.kernels.assign_steps import assign_steps_fwd_kernel

    m, results = len(a.svar), _results(a)
    block = next(size for size in WARPS if m <= size)
    samples = (a.svar.contiguous(), a.correct.contiguous().view(torch.uint8), a.robust_fraction, contiguous(a.unfit))
    numbers = (m, max(a.group_steps), _faults(a), *a.group_steps, *map(_bits, a.group_step_sizes))
    given = (*samples, contiguous(a.faults), *results, a.group_counts, *numbers)
    run_kernel(assign_steps_fwd_kernel, 1, *given, BLOCK=block, CHUNK=CHUNK, num_warps=WARPS[block])
    return results


@or_plain(assign_reference)
@packed(Arguments)
def launch_assign_in_blocks(a: Arguments) -> Assigned:
    """`assign_steps` for any 0 < m ≤ MOST_SAMPLES: a radix select of the threshold, the groups, the order."""
    from bt_fast.kernels import assign_steps as kernels

    m, results = len(a.svar), _results(a)
    blocks = -(-m // BLOCK)
    svar, correct = a.svar.contiguous(), a.correct.contiguous().view(torch.uint8)
    threshold, group, steps, step_size, order, counts = results
    histograms = torch.zeros(DIGITS, BINS, dtype=torch.int32, device=svar.device)
    above, sizes, unfit_rows = torch.empty(3, blocks, dtype=torch.int64, device=svar.device)
    options = {"BLOCK": BLOCK, "num_warps": BLOCK_WARPS}
    for digit in range(DIGITS):
        selected = (svar, a.robust_fraction, histograms, above, m, digit)
        run_kernel(kernels.select_digit_fwd_kernel, blocks, *selected, **options)
    samples = (svar, correct, a.robust_fraction, contiguous(a.unfit), histograms, above)
    numbers = (m, blocks, *a.group_steps, *map(_bits, a.group_step_sizes))
    grouped = (*samples, threshold, group, steps, step_size, sizes, unfit_rows, *numbers)
    run_kernel(kernels.group_blocks_fwd_kernel, blocks, *grouped, **options, BLOCKS=BLOCKS)
    numbers = (m, blocks, max(a.group_steps), _faults(a), *a.group_steps)
    ordered = (group, steps, sizes, unfit_rows, contiguous(a.faults), order, counts, a.group_counts, *numbers)
    run_kernel(kernels.order_blocks_fwd_kernel, blocks, *ordered, **options, BLOCKS=BLOCKS)
    return results


def _bits(number: float) -> int:
    """Returns the 64 bits of a float, the form for a kernel."""
    return int.from_bytes(struct.pack("<d", number), "little", signed=True)


def _faults(a: Arguments) -> int:
    return 0 if a.faults is None else len(a.faults)


def _kernel_takes(svar: Tensor) -> bool:
    return svar.is_cuda and svar.dtype == torch.float32 and len(svar) <= MOST_SAMPLES and kernels_run(svar)


def _results(a: Arguments) -> Assigned:
    """Returns the results, not yet filled."""
    m, device = len(a.svar), a.svar.device
    numbers = max(a.group_steps) + 3 + _faults(a) + 2
    group, steps, order, counts = (torch.empty(n, dtype=torch.int64, device=device) for n in (m, m, m, numbers))
    threshold = torch.empty((), dtype=torch.float64, device=device)
    return threshold, group, steps, torch.empty(m, dtype=torch.float64, device=device), order, counts


def _check(a: Arguments) -> None:
    if a.svar.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"svar must be torch.float32 or torch.float64, got {a.svar.dtype}: write svar.float()")
    if a.svar.dim() != 1:
        raise ValueError(f"svar must have shape [m], got {list(a.svar.shape)}: give one number for each sample")
    m, device, integers = a.svar.shape, a.svar.device, (torch.int64,)
    check("correct", a.correct, m, (torch.bool,), device)
    check("robust_fraction", a.robust_fraction, (), (torch.float64,), device)
    check("unfit", a.unfit, m, (torch.uint8,), device)
    check("faults", a.faults, (1 if a.faults is None else a.faults.numel(),), integers, device)
    check("group_counts", a.group_counts, (3,), integers, device, changed=True)
    for name, values in (("group_steps", a.group_steps), ("group_step_sizes", a.group_step_sizes)):
        if len(values) != 3:
            raise ValueError(
                f"{name} must hold 3 numbers (outlier, boundary, robust), got {list(values)}: give one for each group"
            )
    if not all(0 <= n < 2**31 for n in a.group_steps):
        raise ValueError(
            f"group_steps must be at least 0, and fit into 32 bits, got {list(a.group_steps)}: "
            "give counts of steps, as (0, 10, 2)"
        )


def _run(svar: Tensor, *others: Any) -> Assigned:
    run = assign_reference
    if _kernel_takes(svar):
        run = launch_assign if len(svar) <= max(WARPS) else launch_assign_in_blocks
    return run(svar, *others)


_assign_steps = define_op(
    "assign_steps(Tensor svar, Tensor correct, Tensor robust_fraction, SymInt[] group_steps, "
    "float[] group_step_sizes, Tensor? unfit, Tensor? faults, Tensor(a7!)? group_counts) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    check=lambda *given: _check(Arguments(*given)),
    run=_run,
    results=lambda *given: _results(Arguments(*given)),
)
