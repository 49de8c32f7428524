"""One projected-gradient step, in place: a fused kernel on CUDA, plain torch elsewhere."""

from __future__ import annotations

import math

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
    epsilon: float,
    lower: float,
    upper: float,
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
        epsilon: ε, rounded to the images' dtype.
        lower: the least pixel value, upper: the greatest.
        steps: [n] integers: only samples with `steps[i] > step` move. Without it, all do.
        step: 0-dim integer on the device, t.
        faulty: [n] int32, set to 1 for each sample with steps left whose gradient holds NaN; its sum counts those.

    Raises:
        TypeError or ValueError: a dtype, shape or device does not fit; the message names the argument.
    """
    pgd_linf_step_(x_adv, grad, clean, step_size, epsilon, lower, upper, steps, step, faulty)


@torch.library.custom_op("bt_fast::pgd_linf_step_", mutates_args=("x_adv", "faulty"))
def pgd_linf_step_(
    x_adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    step_size: Tensor,
    epsilon: float,
    lower: float,
    upper: float,
    steps: Tensor | None,
    step: Tensor | None,
    faulty: Tensor | None,
) -> None:
    """`linf_step_` as one op."""
    check_step(x_adv, grad, clean, step_size, steps, step, faulty)
    run = launch_linf if kernel_takes(x_adv) else linf_reference
    run(x_adv, grad, clean, step_size, epsilon, lower, upper, steps, step, faulty)


@pgd_linf_step_.register_fake
def _(
    x_adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    step_size: Tensor,
    epsilon: float,
    lower: float,
    upper: float,
    steps: Tensor | None,
    step: Tensor | None,
    faulty: Tensor | None,
) -> None:
    check_step(x_adv, grad, clean, step_size, steps, step, faulty)


def linf_reference(
    x_adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    step_size: Tensor,
    epsilon: float,
    lower: float,
    upper: float,
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
    epsilon, lower, upper = (rounded(number, clean.dtype) for number in (epsilon, lower, upper))
    moved = _step_in_box(x_adv, grad, clean, step_size, epsilon).clamp_(lower, upper)
    x_adv.copy_(moved if unmoved is None else torch.where(per_sample(unmoved, x_adv), x_adv, moved))


def hold(held: Tensor | None, steps: Tensor | None, step: Tensor | None, faulty: Tensor | None) -> Tensor | None:
    """The samples [n] that stay: those `held`, which are marked as faulty, and those with no steps left."""
    active = None if steps is None or step is None else steps > step
    if held is not None and faulty is not None:
        faulty.masked_fill_(held if active is None else held & active, 1)
    if active is None or held is None:
        return held if active is None else ~active
    return held | ~active


def _step_in_box(x_adv: Tensor, grad: Tensor, clean: Tensor, step_size: Tensor, epsilon: float) -> Tensor:
    """`clip(x' + α·sign(g), x ± ε)`, in two new tensors: on the CPU one more costs as much as the arithmetic on it."""
    alpha = per_sample(step_size, grad)
    moved = grad.sign().to(torch.promote_types(grad.dtype, alpha.dtype)).mul_(alpha).add_(x_adv)
    bound = clean - epsilon
    moved = moved.to(bound.dtype) if bound.dtype.itemsize > moved.dtype.itemsize else moved
    torch.maximum(moved, bound, out=moved)
    torch.add(clean, epsilon, out=bound)
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
    steps: Tensor | None = None,
    step: Tensor | None = None,
    faulty: Tensor | None = None,
) -> None:
    """`pgd_linf_step_` as one launch, or for long samples two. The images are dense: `kernel_takes(x_adv)`."""
    from bt_fast.kernels import pgd_step as kernels

    if x_adv.numel() == 0:
        return
    n, length, memory_format = len(x_adv), x_adv[0].numel(), inner_format(x_adv)
    grad, clean = (t.contiguous(memory_format=memory_format) for t in (grad, clean))
    images = (x_adv, grad, clean, step_size.contiguous())
    counts = (contiguous(steps), step)
    numbers = (rounded(epsilon, x_adv.dtype), float(lower), float(upper))
    with torch.cuda.device_of(x_adv):
        if (block := sample_block(length)) is not None:
            kernels.pgd_linf_sample_fwd_kernel[(n,)](
                *images,
                *counts,
                faulty,
                length,
                *numbers,
                BLOCK=block,
                num_warps=sample_warps(block),
                enable_fp_fusion=False,
            )
            return
        held = torch.empty(n, dtype=torch.int32, device=x_adv.device)
        kernels.pgd_held_fwd_kernel[(n,)](
            grad,
            *counts,
            held,
            faulty,
            length,
            BLOCK=LONG_BLOCK,
            num_warps=sample_warps(LONG_BLOCK),
            enable_fp_fusion=False,
        )
        block = part_block(x_adv.dtype)
        blocks = -(-length // block)
        kernels.pgd_linf_step_fwd_kernel[(n * blocks,)](
            *images,
            *counts,
            held,
            length,
            blocks,
            *numbers,
            BLOCK=block,
            num_warps=PART_WARPS,
            enable_fp_fusion=False,
        )


def sample_block(length: int) -> int | None:
    """The elements of a block that holds a whole sample of `length`, None where none does.

    A thread has 8 elements of each tensor at the most, 4 where accesses are narrow: more would take registers from
    a quarter of the threads.
    """
    sizes = (1024, 4096 if length % 16 == 0 else 2048)
    return next((size for size in sizes if length <= size), None)


def inner_format(x: Tensor) -> torch.memory_format:
    """The order of the dimensions inside a sample, in which its gradient and its clean image must lie too."""
    return dense_format(x) or torch.contiguous_format


def sample_warps(block: int) -> int:
    """At least one 128-bit access of float32 a thread, at most 16 warps."""
    return min(block // 128, 16)


def part_block(dtype: torch.dtype) -> int:
    """One 128-bit access a thread and tensor."""
    return PART_WARPS * 32 * (4 if dtype == torch.float32 else 8)


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
    steps: Tensor | None,
    step: Tensor | None,
    faulty: Tensor | None,
) -> None:
    """Raise TypeError or ValueError unless everything fits `x_adv`."""
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
