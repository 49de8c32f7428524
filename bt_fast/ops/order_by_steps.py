"""The order of a ragged attack, for any step counts: a fused kernel on CUDA, plain torch elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from bt_fast.ops.availability import kernels_run, or_plain
from bt_fast.ops.launch import define_op, run_kernel

ONE_LAUNCH = 8192  # the most samples whose pairs one launch compares
MOST_SAMPLES = 2**20
MOST_CELLS = 2**24  # in the table of counts, of every number of steps in every block
PAIRS = {"BLOCK_I": 32, "BLOCK_J": 128, "num_warps": 4}
COUNT = {"BLOCK": 256, "num_warps": 4}
PLACE = {"BLOCK": 256, "TILE": 32, "num_warps": 8}


def order_by_steps(steps: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Returns the stable order by descending step count, and how many samples are active at each step.

    On CUDA one launch up to m = 8192, and six up to 2^20 if (most + 1)·⌈m/256⌉ is at most 2^24; else plain torch.

    Args:
        steps: [m] integers in 0..most.
        most: an upper bound on `steps`, known to the host.

    Returns:
        order [m] int64, so that `steps[order]` never increases and equal counts keep their places, and active [most]
        int64, where `active[t]` counts the samples with more than t steps: the length of step t's prefix.

    Raises:
        TypeError or ValueError: a dtype, shape or value does not fit; the message names the argument.
    """
    ordered: tuple[Tensor, Tensor] = _order_by_steps(steps, most)
    return ordered


def _kernel_takes(steps: Tensor) -> bool:
    return steps.is_cuda and 0 < len(steps) <= MOST_SAMPLES and kernels_run(steps)


def order_reference(steps: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """`order_by_steps` in plain torch: the kernel's reference and fallback."""
    ordered, order = steps.sort(descending=True, stable=True)
    # how many come before a count of t; negated, since the search needs an ascending row
    return order, torch.searchsorted(-ordered, -torch.arange(most, dtype=steps.dtype, device=steps.device))


@or_plain(order_reference)
def launch_order(steps: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """`order_by_steps` as one launch, for 0 < m ≤ ONE_LAUNCH."""
    from bt_fast.kernels.order_by_steps import order_by_steps_fwd_kernel

    (order, active), m = _results(steps, most), len(steps)
    programs = -(-(m + most) // PAIRS["BLOCK_I"])
    run_kernel(order_by_steps_fwd_kernel, programs, steps.contiguous(), order, active, m, most, **PAIRS)
    return order, active


@or_plain(order_reference)
def launch_order_in_blocks(steps: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """`order_by_steps` for any 0 < m ≤ MOST_SAMPLES: counts in blocks, adds up, places."""
    from bt_fast.kernels.order_by_steps import count_steps_fwd_kernel, place_by_steps_fwd_kernel

    m, steps = len(steps), steps.contiguous()
    blocks = -(-m // COUNT["BLOCK"])
    order = torch.empty(m, dtype=torch.int64, device=steps.device)
    cells = torch.zeros((most + 1) * blocks + 1, dtype=torch.int32, device=steps.device)
    run_kernel(count_steps_fwd_kernel, blocks, steps, cells, m, most, blocks, **COUNT)
    starts = cells.cumsum(0)
    run_kernel(place_by_steps_fwd_kernel, blocks, steps, starts, order, m, most, blocks, **PLACE)
    # samples with t steps begin after all those with more
    return order, starts[blocks:-1:blocks].flip(0)


def _results(steps: Tensor, most: int) -> tuple[Tensor, Tensor]:
    order, active = (torch.empty(n, dtype=torch.int64, device=steps.device) for n in (len(steps), most))
    return order, active


def _check(steps: Tensor, most: int) -> None:
    if steps.is_floating_point() or steps.is_complex() or steps.dtype == torch.bool:
        raise TypeError(f"steps must be integers, got {steps.dtype}: write steps.long()")
    if steps.dim() != 1:
        raise ValueError(f"steps must have shape [m], got {list(steps.shape)}: write steps.flatten()")
    if most < 0:
        raise ValueError(f"most must be at least 0, got {most}: give the largest count of steps")


def _run(steps: Tensor, most: int) -> tuple[Tensor, Tensor]:
    steps = steps.long()
    if not _kernel_takes(steps):
        return order_reference(steps, most)
    if len(steps) <= ONE_LAUNCH and (most + 2) * ONE_LAUNCH < 2**31:
        return launch_order(steps, most)
    if (most + 1) * -(-len(steps) // COUNT["BLOCK"]) <= MOST_CELLS:
        return launch_order_in_blocks(steps, most)
    return order_reference(steps, most)


_order_by_steps = define_op(
    "order_by_steps(Tensor steps, SymInt most) -> (Tensor, Tensor)", check=_check, run=_run, results=_results
)
