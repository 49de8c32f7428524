"""One projected-gradient step, in place: a fused kernel on CUDA, plain torch elsewhere."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from bt_fast.ops.availability import or_plain
from bt_fast.ops.launch import (
    check,
    check_images,
    contiguous,
    define_op,
    dense_format,
    packed,
    rounded,
    run_kernel,
    takes_images,
)
from bt_fast.ops.numeric import per_sample
from bt_fast.ops.rows import result_dtype

if TYPE_CHECKING:
    from bt_fast.ops.pgd_l2_step import L2Step

PART_WARPS = 4  # of a program for a part of a long sample
LONG_BLOCK = 2048  # elements at a time, for a program that goes over a long sample


class Step(NamedTuple):
    """The arguments of `linf_step_`."""

    x_adv: Tensor
    grad: Tensor
    clean: Tensor
    step_size: Tensor
    epsilon: float
    lower: float
    upper: float
    steps: Tensor | None = None
    step: Tensor | None = None
    faulty: Tensor | None = None
    epsilons: Tensor | None = None  # in place of epsilon


def linf_step_(
    x_adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    step_size: Tensor,
    epsilon: float | Tensor,
    lower: float,
    upper: float,
    *,
    steps: Tensor | None = None,
    step: Tensor | None = None,
    faulty: Tensor | None = None,
) -> None:
    """One projected step of steepest ascent in ℓ∞, in place: `x' ← clip(clip(x' + α_i·sign(g), x ± ε), lower, upper)`.

    A sample with NaN in its gradient does not move and is marked in `faulty`. ±Inf is a direction like any other.

    For dense images of up to 4096 elements one kernel reads each of the three tensors once and writes one; for longer
    ones (and a few others: see `sample_block`) one more reads the gradient to find NaN. A gradient in another memory
    format than the images' is copied first.

    Args:
        x_adv: [n, ...] floating point, changed in place.
        grad: [n, ...] of the same dtype.
        clean: [n, ...] of the same dtype, x.
        step_size: [n], α ≥ 0 of each sample, in the images' dtype or float32.
        epsilon: ε, rounded to the images' dtype: a number, or [n] of each sample, in the images' dtype or float32.
        lower: the least pixel value, upper: the greatest.
        steps: [n] integers: only samples with `steps[i] > step` move. Without it, all do.
        step: 0-dim integer on the device, t.
        faulty: [n] int32, set to 1 for each sample with steps left and NaN in its gradient; its sum counts those.

    Raises:
        TypeError or ValueError: a dtype, shape or device does not fit; the message names the argument.
    """
    epsilon, epsilons = split(epsilon)
    pgd_linf_step_(x_adv, grad, clean, step_size, epsilon, lower, upper, steps, step, faulty, epsilons)


def split(epsilon: float | Tensor) -> tuple[float, Tensor | None]:
    """ε as the ops take it: one for all, and one of each sample."""
    return (0.0, epsilon) if isinstance(epsilon, Tensor) else (epsilon, None)


@packed(Step)
def linf_reference(s: Step) -> None:
    """`pgd_linf_step_` in plain torch: the kernel's reference and fallback.

    In 16 bits it rounds after every operation, and the kernel once. The results are the same, because rounding is
    monotone: clipping rounded values at rounded limits equals rounding the clipped value.
    """
    no_direction = None
    # on the CPU a sum shows at a tenth of the cost that there is no NaN; elsewhere reading it would wait
    if not s.grad.is_cpu or s.grad.sum().isnan():
        no_direction = rows_of(s.grad).isnan().any(dim=1)
    unmoved = mark_and_hold(s, no_direction)
    epsilon, lower, upper = (rounded(number, s.clean.dtype) for number in (s.epsilon, s.lower, s.upper))
    own = None if s.epsilons is None else per_sample(s.epsilons.to(s.clean.dtype), s.clean)
    moved = _step_in_box(s, epsilon if own is None else own).clamp_(lower, upper)
    s.x_adv.copy_(moved if unmoved is None else torch.where(per_sample(unmoved, s.x_adv), s.x_adv, moved))


def mark_and_hold(s: Step | L2Step, no_direction: Tensor | None) -> Tensor | None:
    """The samples [n] that do not move: those without direction, marked as faulty, and those without steps left."""
    active = None if s.steps is None or s.step is None else s.steps > s.step
    if no_direction is not None and s.faulty is not None:
        s.faulty.masked_fill_(no_direction if active is None else no_direction & active, 1)
    if active is None or no_direction is None:
        return no_direction if active is None else ~active
    return no_direction | ~active


def _step_in_box(s: Step, epsilon: float | Tensor) -> Tensor:
    """`clip(x' + α·sign(g), x ± ε)`, in two new tensors: on the CPU one more costs as much as the arithmetic on it."""
    alpha = per_sample(s.step_size, s.grad)
    moved = s.grad.sign().to(torch.promote_types(s.grad.dtype, alpha.dtype)).mul_(alpha).add_(s.x_adv)
    bound = s.clean - epsilon
    moved = moved.to(bound.dtype) if bound.dtype.itemsize > moved.dtype.itemsize else moved
    torch.maximum(moved, bound, out=moved)
    torch.add(s.clean, epsilon, out=bound)
    return torch.minimum(moved, bound, out=moved)


@or_plain(linf_reference)
@packed(Step)
def launch_linf(s: Step) -> None:
    """`pgd_linf_step_` as one launch, or two for long samples. The images are dense: `kernel_takes(x_adv)`."""
    from bt_fast.kernels import pgd_step as kernels

    if s.x_adv.numel() == 0:
        return
    n, length, dtype = len(s.x_adv), s.x_adv[0].numel(), s.x_adv.dtype
    grad, clean = (in_format(t, s.x_adv) for t in (s.grad, s.clean))
    images, counts = (s.x_adv, grad, clean, s.step_size.contiguous()), (contiguous(s.steps), s.step)
    epsilons = None if s.epsilons is None else s.epsilons.to(dtype).contiguous()
    numbers = (rounded(s.epsilon, dtype), epsilons, float(s.lower), float(s.upper))
    if (block := sample_block(length)) is not None:
        given = (*images, *counts, s.faulty, length, *numbers)
        run_kernel(kernels.pgd_linf_sample_fwd_kernel, n, *given, BLOCK=block, num_warps=sample_warps(block))
        return
    held = torch.empty(n, dtype=torch.int32, device=grad.device)
    looked_at = (grad, *counts, held, s.faulty, length)
    run_kernel(kernels.pgd_held_fwd_kernel, n, *looked_at, BLOCK=LONG_BLOCK, num_warps=sample_warps(LONG_BLOCK))
    block = part_block(dtype)
    blocks = -(-length // block)
    parts = (*images, *counts, held, length, blocks, *numbers)
    run_kernel(kernels.pgd_linf_step_fwd_kernel, n * blocks, *parts, BLOCK=block, num_warps=PART_WARPS)


def sample_block(length: int) -> int | None:
    """Returns the elements of a block that holds a whole sample of `length`, or None.

    A thread has at most 8 elements of each tensor, or 4 with narrow accesses: more would take registers from a quarter
    of the threads.
    """
    sizes = (1024, 4096 if length % 16 == 0 else 2048)
    return next((size for size in sizes if length <= size), None)


def sample_warps(block: int) -> int:
    """Returns warps for at least one 128-bit access of float32 a thread, at most 16."""
    return min(block // 128, 16)


def part_block(dtype: torch.dtype) -> int:
    """Returns a block with one 128-bit access for each thread and tensor."""
    return PART_WARPS * 32 * (4 if dtype == torch.float32 else 8)


def in_format(images: Tensor, x_adv: Tensor) -> Tensor:
    """Returns `images` with the inner dimensions in the order of `x_adv`, copied if necessary."""
    return images.contiguous(memory_format=dense_format(x_adv) or torch.contiguous_format)


def kernel_takes(x_adv: Tensor) -> bool:
    """Whether a kernel supports these images."""
    return x_adv.numel() > 0 and takes_images(x_adv, x_adv.numel() // 128)


def rows_of(x: Tensor) -> Tensor:
    """Returns [n, ...] as [n, elements], also if n is 0."""
    return x.reshape(len(x), math.prod(x.shape[1:]))


def check_step(s: Step | L2Step) -> None:
    """Raises TypeError or ValueError unless everything fits `x_adv`."""
    check_images("x_adv", s.x_adv)
    n, dtype, device = s.x_adv.shape[:1], s.x_adv.dtype, s.x_adv.device
    check("grad", s.grad, s.x_adv.shape, (dtype,), device)
    check("clean", s.clean, s.x_adv.shape, (dtype,), device)
    check("step_size", s.step_size, n, (dtype, result_dtype(s.x_adv)), device)
    check("epsilon", s.epsilons, n, (dtype, result_dtype(s.x_adv)), device)
    if (s.steps is None) != (s.step is None):
        raise ValueError("steps and step must be given together: give both, or none of them")
    check("steps", s.steps, n, (torch.int32, torch.int64), device)
    check("step", s.step, (), (torch.int32, torch.int64), device)
    check("faulty", s.faulty, n, (torch.int32,), device, changed=True)


pgd_linf_step_ = define_op(
    "pgd_linf_step_(Tensor(a0!) x_adv, Tensor grad, Tensor clean, Tensor step_size, float epsilon, float lower, "
    "float upper, Tensor? steps, Tensor? step, Tensor(a9!)? faulty, Tensor? epsilons) -> ()",
    check=lambda *given: check_step(Step(*given)),
    run=lambda *given: (launch_linf if kernel_takes(given[0]) else linf_reference)(*given),
)
