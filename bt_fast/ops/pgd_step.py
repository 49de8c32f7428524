"""One projected-gradient step, in place: a fused kernel on CUDA, plain torch elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bt_fast.ops.availability import kernels_run, or_plain
from bt_fast.ops.launch import KERNEL_DTYPES, MOST_INT32, check, contiguous, dense_format, rounded
from bt_fast.ops.numeric import per_sample

PART_WARPS = 4  # of a program that works on a part of a long sample
LONG_BLOCK = 2048  # what a program that goes over a long sample takes at once


def linf_step_(
    x_adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    step_size: Tensor,
    epsilon: float | Tensor,
    lower: float | Tensor,
    upper: float | Tensor,
    *,
    steps: Tensor | None = None,
    step: Tensor | None = None,
    faulty: Tensor | None = None,
) -> None:
    """One projected step of steepest ascent in ℓ∞, in place: `x' ← clip(clip(x' + α_i·sign(g), x ± ε), lower, upper)`.

    A sample whose gradient holds NaN stays as it is and is marked in `faulty`. ±Inf is a direction like any other.

    On CUDA a kernel (where triton is installed, the images are dense, and not float64): samples of up to 4096 elements
    take one launch, which reads each of the three tensors once and writes one. Longer ones (and a few others: see
    `sample_block`) take a launch more, which reads the gradient to find NaN: four reads and one write. Never waits for
    the device. A gradient in another memory format than the images' is copied first.

    Args:
        x_adv: [n, ...] floating point, changed in place.
        grad: [n, ...] of the same dtype.
        clean: [n, ...] of the same dtype, x.
        step_size: [n], α ≥ 0 of each sample, in the images' dtype or float32.
        epsilon: ε, a number (rounded to the images' dtype) or a tensor with one for each channel, [C].
        lower: the least pixel value, upper: the greatest; both as ε. A tensor among the three costs some small
            launches; `pgd_linf_step_` takes them ready.
        steps: [n] integers: only samples with `steps[i] > step` move. Without it, all do.
        step: 0-dim integer on the device, t.
        faulty: [n] int32, set to 1 for each sample with steps left whose gradient holds NaN; its sum counts those.

    Raises:
        TypeError or ValueError: a dtype, shape or device does not fit; the message names the argument.
    """
    if any(isinstance(limit, Tensor) for limit in (epsilon, lower, upper)):
        limits = stack_limits(x_adv, epsilon, lower, upper)
        pgd_linf_step_(x_adv, grad, clean, step_size, 0.0, 0.0, 0.0, limits, steps, step, faulty)
    else:
        pgd_linf_step_(x_adv, grad, clean, step_size, epsilon, lower, upper, None, steps, step, faulty)


def stack_limits(x: Tensor, *limits: float | Tensor) -> Tensor:
    """Limits of each channel as `pgd_linf_step_` takes them, [len(limits), C] in float32 (float64 for such images).

    Args:
        x: [n, C, ...].
        limits: each a number or [C].

    Raises:
        ValueError: a tensor's shape is not [C].
    """
    if x.dim() < 2:
        raise ValueError(
            f"limits for each channel need x_adv of shape [n, C, ...], got {list(x.shape)}: "
            "leave them plain numbers, or give the images their channels"
        )
    stacked = torch.empty(len(limits), x.shape[1], dtype=_compute_dtype(x), device=x.device)
    for row, limit in zip(stacked, limits, strict=True):
        if isinstance(limit, Tensor):
            if limit.shape != row.shape or limit.device != x.device:
                raise ValueError(
                    f"a limit for each channel must have shape {list(row.shape)} on {x.device}, "
                    f"got {list(limit.shape)} on {limit.device}: "
                    "give one number for each channel, on the images' device"
                )
            row.copy_(limit)
        else:
            row.fill_(limit)
    return stacked


@torch.library.custom_op("bt_fast::pgd_linf_step_", mutates_args=("x_adv", "faulty"))
def pgd_linf_step_(
    x_adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    step_size: Tensor,
    epsilon: float,
    lower: float,
    upper: float,
    limits: Tensor | None,
    steps: Tensor | None,
    step: Tensor | None,
    faulty: Tensor | None,
) -> None:
    """`linf_step_` as one op. `limits` [3, C], if given, holds ε, lower and upper of each channel in their place."""
    check_step(x_adv, grad, clean, step_size, limits, 3, steps, step, faulty)
    run = launch_linf if kernel_takes(x_adv) else linf_reference
    run(x_adv, grad, clean, step_size, epsilon, lower, upper, limits, steps, step, faulty)


@pgd_linf_step_.register_fake
def _(
    x_adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    step_size: Tensor,
    epsilon: float,
    lower: float,
    upper: float,
    limits: Tensor | None,
    steps: Tensor | None,
    step: Tensor | None,
    faulty: Tensor | None,
) -> None:
    check_step(x_adv, grad, clean, step_size, limits, 3, steps, step, faulty)


def linf_reference(
    x_adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    step_size: Tensor,
    epsilon: float,
    lower: float,
    upper: float,
    limits: Tensor | None = None,
    steps: Tensor | None = None,
    step: Tensor | None = None,
    faulty: Tensor | None = None,
) -> None:
    """`pgd_linf_step_` in plain torch: what the kernel is held against, and what runs where there is none.

    In 16 bits it rounds after every operation and the kernel once. The results are the same, because rounding keeps
    order: to clip rounded values at rounded limits is to round the clipped value.
    """
    held = None
    # on the CPU a sum tells at a tenth of the cost that there is no NaN; elsewhere to ask would mean to wait
    if not grad.is_cpu or grad.sum().isnan():
        held = rows_of(grad).isnan().any(dim=1)
    unmoved = hold(held, steps, step, faulty)
    if limits is None:
        epsilon, lower, upper = (rounded(limit, clean.dtype) for limit in (epsilon, lower, upper))
        moved = _step_in_box(x_adv, grad, clean, step_size, epsilon).clamp_(lower, upper)
    else:
        width, low, high = limits.view(3, -1, *[1] * (x_adv.dim() - 2)).unbind()
        moved = _step_in_box(x_adv, grad, clean, step_size, width).clamp_(low, high)
    x_adv.copy_(moved if unmoved is None else torch.where(per_sample(unmoved, x_adv), x_adv, moved))


def hold(held: Tensor | None, steps: Tensor | None, step: Tensor | None, faulty: Tensor | None) -> Tensor | None:
    """The samples [n] that stay: those `held`, which are marked as faulty, and those with no steps left."""
    active = None if steps is None or step is None else steps > step
    if held is not None and faulty is not None:
        faulty.masked_fill_(held if active is None else held & active, 1)
    if active is None or held is None:
        return held if active is None else ~active
    return held | ~active


def _step_in_box(x_adv: Tensor, grad: Tensor, clean: Tensor, step_size: Tensor, width: float | Tensor) -> Tensor:
    """`clip(x' + α·sign(g), x ± ε)`, in two new tensors: on the CPU one more costs as much as the arithmetic on it."""
    alpha = per_sample(step_size, grad)
    moved = grad.sign().to(torch.promote_types(grad.dtype, alpha.dtype)).mul_(alpha).add_(x_adv)
    bound = clean - width
    moved = moved.to(bound.dtype) if bound.dtype.itemsize > moved.dtype.itemsize else moved
    torch.maximum(moved, bound, out=moved)
    torch.add(clean, width, out=bound)
    return torch.minimum(moved, bound, out=moved)


@or_plain(linf_reference)
def launch_linf(
    x_adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    step_size: Tensor,
    epsilon: float,
    lower: float,
    upper: float,
    limits: Tensor | None = None,
    steps: Tensor | None = None,
    step: Tensor | None = None,
    faulty: Tensor | None = None,
) -> None:
    """`pgd_linf_step_` as one launch, or for long samples two. The images are dense: `kernel_takes(x_adv)`."""
    from bt_fast.kernels import pgd_step as kernels

    if x_adv.numel() == 0:
        return
    at = Layout.of(x_adv, limits)
    grad, clean = (t.contiguous(memory_format=at.memory_format) for t in (grad, clean))
    images = (x_adv, grad, clean, step_size.contiguous())
    counts = (contiguous(steps), step)
    numbers = (rounded(epsilon, x_adv.dtype), float(lower), float(upper), at.channels, at.rows)
    limits = contiguous(limits)
    with torch.cuda.device_of(x_adv):
        if (block := at.sample_block()) is not None:
            kernels.pgd_linf_sample_fwd_kernel[(len(x_adv),)](
                *images,
                *counts,
                limits,
                faulty,
                at.length,
                *numbers,
                ROWS=at.padded_rows,
                BLOCK=block // at.padded_rows,
                num_warps=sample_warps(block),
                enable_fp_fusion=False,
            )
            return
        held = torch.empty(len(x_adv), dtype=torch.int32, device=x_adv.device)
        kernels.pgd_held_fwd_kernel[(len(x_adv),)](
            grad,
            *counts,
            held,
            faulty,
            at.rows * at.length,
            BLOCK=LONG_BLOCK,
            num_warps=sample_warps(LONG_BLOCK),
            enable_fp_fusion=False,
        )
        block = part_block(x_adv.dtype, limits is not None)
        blocks = -(-at.length // block)
        kernels.pgd_linf_step_fwd_kernel[(len(x_adv) * at.rows * blocks,)](
            *images,
            *counts,
            limits,
            held,
            at.length,
            blocks,
            *numbers,
            BLOCK=block,
            INTERLEAVED=at.interleaved,
            num_warps=PART_WARPS,
            enable_fp_fusion=False,
        )


@dataclass(frozen=True)
class Layout:
    """How dense images lie: `rows` a sample, each `length` elements; a row is a channel where limits need it so."""

    memory_format: torch.memory_format
    interleaved: bool  # limits of each channel, and the channel is the fastest index
    channels: int
    rows: int
    length: int

    @classmethod
    def of(cls, x: Tensor, limits: Tensor | None) -> Layout:
        """The layout of images [n, C, ...] with `limits` [..., C] or without."""
        memory_format = dense_format(x) or torch.contiguous_format
        interleaved = limits is not None and memory_format != torch.contiguous_format
        channels = 1 if limits is None else limits.shape[1]
        rows = 1 if interleaved else channels
        return cls(memory_format, interleaved, channels, rows, x[0].numel() // rows)

    @property
    def padded_rows(self) -> int:
        """The rows of a sample's block."""
        return 1 if self.rows == 1 else 4

    def sample_block(self) -> int | None:
        """The elements of a block that holds a whole sample, None where none does.

        A thread has 8 elements of each tensor at the most, 4 where accesses are narrow: more would take registers from
        a quarter of the threads, and so would each element's own limits.
        """
        if self.interleaved or self.rows > self.padded_rows:
            return None
        sizes = (1024, 4096 if self.length % 16 == 0 else 2048)
        return next((size for size in sizes if self.length * self.padded_rows <= size), None)


def sample_warps(block: int) -> int:
    """At least one 128-bit access of float32 a thread, at most 16 warps."""
    return min(block // 128, 16)


def part_block(dtype: torch.dtype, limits: bool) -> int:
    """One 128-bit access a thread and tensor; half that in 16 bits with limits, whose values need registers too."""
    return PART_WARPS * 32 * (4 if dtype == torch.float32 or limits else 8)


def kernel_takes(x_adv: Tensor) -> bool:
    """Whether there is a kernel for these images."""
    return (
        x_adv.is_cuda
        and x_adv.dtype in KERNEL_DTYPES
        and dense_format(x_adv) is not None
        and 0 < x_adv[:1].numel() < MOST_INT32
        and x_adv.numel() // 128 < MOST_INT32
        and kernels_run(x_adv)
    )


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rows_of(x: Tensor) -> Tensor:
    """[n, ...] as [n, elements], also where n is 0."""
    return x.reshape(len(x), math.prod(x.shape[1:]))


def check_step(
    x_adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    step_size: Tensor,
    limits: Tensor | None,
    limit_rows: int,
    steps: Tensor | None,
    step: Tensor | None,
    faulty: Tensor | None,
) -> None:
    """Raise TypeError or ValueError unless everything fits `x_adv`; the limits have so many rows."""
    if not x_adv.is_floating_point():
        raise TypeError(f"x_adv must be floating point, got {x_adv.dtype}: write x_adv.float()")
    if x_adv.dim() < 1:
        raise ValueError("x_adv must have shape [n, ...], got a 0-dim tensor: of one sample write x_adv[None]")
    n, numbers = x_adv.shape[:1], (_compute_dtype(x_adv),)
    check("grad", grad, x_adv.shape, (x_adv.dtype,), x_adv.device)
    check("clean", clean, x_adv.shape, (x_adv.dtype,), x_adv.device)
    check("step_size", step_size, n, (x_adv.dtype, *numbers), x_adv.device)
    if (steps is None) != (step is None):
        raise ValueError("steps and step must be given together: give both, or none of them")
    counts = (torch.int32, torch.int64)
    check("steps", steps, n, counts, x_adv.device)
    check("step", step, (), counts, x_adv.device)
    check("faulty", faulty, n, (torch.int32,), x_adv.device)
    if faulty is not None and not faulty.is_contiguous():
        raise ValueError("faulty must be contiguous: write faulty.contiguous()")
    if limits is not None:
        if x_adv.dim() < 2:
            raise ValueError(
                f"limits need x_adv of shape [n, C, ...], got {list(x_adv.shape)}: "
                "leave limits out, or give the images their channels"
            )
        check("limits", limits, (limit_rows, x_adv.shape[1]), numbers, x_adv.device)
