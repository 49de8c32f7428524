"""One projected-gradient step in ℓ2, in place: fused kernels on CUDA, plain torch elsewhere."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bt_fast.ops.availability import no_way_back, or_plain
from bt_fast.ops.gather_start import philox
from bt_fast.ops.launch import check, contiguous, define_op, packed, rounded, run_kernel
from bt_fast.ops.numeric import per_sample, wide
from bt_fast.ops.pgd_step import (
    LONG_BLOCK,
    PART_WARPS,
    check_step,
    in_format,
    kernel_takes,
    mark_and_hold,
    part_block,
    rows_of,
    sample_block,
    sample_warps,
    split,
)

STAND_IN_BLOCK = 512  # one element a thread, since making random numbers takes registers


class L2Step(NamedTuple):
    """The arguments of `l2_step_`."""

    x_adv: Tensor
    grad: Tensor
    clean: Tensor
    step_size: Tensor
    epsilon: float
    lower: float
    upper: float
    stand_in: Tensor
    steps: Tensor | None = None
    step: Tensor | None = None
    faulty: Tensor | None = None
    epsilons: Tensor | None = None  # in place of epsilon


def l2_step_(
    x_adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    step_size: Tensor,
    epsilon: float | Tensor,
    lower: float,
    upper: float,
    stand_in: Tensor,
    *,
    steps: Tensor | None = None,
    step: Tensor | None = None,
    faulty: Tensor | None = None,
) -> None:
    """One projected step of steepest ascent in ℓ2, in place: `x' ← x + renorm(clip(x' + α_i·g/‖g‖, lower, upper) - x)`.

    The result is clamped to the bounds again, since rounding may leave them. Norms are over a whole sample, for
    gradients of any magnitude. A sample with NaN or Inf in its gradient has no direction: it does not move, and is
    marked in `faulty`.

    For dense images of up to 4096 elements one kernel reads each of the three tensors once and writes one; for others
    two make seven reads and one write. A last small launch, which reads one number of each sample, moves those with a
    zero gradient. A gradient in another memory format than the images' is copied first.

    Args:
        x_adv: [n, ...] floating point, at least two dimensions, changed in place.
        grad, clean, step_size, lower, upper, steps, step: as in `linf_step_`.
        epsilon: ε, the largest ℓ2 norm of a perturbation: a number, or [n] of each sample, in the images' dtype or
            float32.
        stand_in: the direction to take where a sample's gradient is exactly 0 (not normalised): [n, ...] of the same
            dtype; or a seed, 0-dim int64, for standard normal numbers, made for those samples alone, other ones for
            each, and the same ones by the kernel and without.
        faulty: [n] int32, set to 1 for each sample with steps left whose gradient holds NaN or Inf.

    Raises:
        TypeError or ValueError: a dtype, shape or device does not fit; the message names the argument.
    """
    epsilon, epsilons = split(epsilon)
    pgd_l2_step_(x_adv, grad, clean, step_size, epsilon, lower, upper, stand_in, steps, step, faulty, epsilons)


@packed(L2Step)
def l2_reference(s: L2Step) -> None:
    """`pgd_l2_step_` in plain torch: the kernel's reference and fallback."""
    if s.x_adv.numel() == 0:
        return
    wide_clean = wide(s.clean)
    direction, no_direction = _direction(wide(s.grad), s.stand_in, s.x_adv)
    unmoved = mark_and_hold(s, no_direction)
    low, high = (rounded(bound, direction.dtype) for bound in (s.lower, s.upper))
    moved = direction.mul_(per_sample(s.step_size, s.grad)).add_(s.x_adv).clamp_(low, high)
    moved = _shrunk(moved.sub_(wide_clean), s).add_(wide_clean).clamp_(low, high)
    s.x_adv.copy_(moved if unmoved is None else torch.where(per_sample(unmoved, s.x_adv), s.x_adv, moved))


def _shrunk(delta: Tensor, s: L2Step) -> Tensor:
    """Perturbations no longer than ε, in place."""
    if s.epsilons is None:
        return delta.renorm_(p=2, dim=0, maxnorm=s.epsilon)
    # to the bit as torch's renorm, whose sums are in the order of the memory format
    size = torch.linalg.vector_norm(delta, dim=tuple(range(1, delta.dim())), keepdim=True)
    epsilon = per_sample(s.epsilons.to(delta.dtype), delta)
    return delta.mul_(torch.where(size > epsilon, epsilon / (size + 1e-7), 1.0))


def _direction(grad: Tensor, stand_in: Tensor, x_adv: Tensor) -> tuple[Tensor, Tensor | None]:
    """Returns each sample's direction in a new tensor, and which samples have none [n], or None if all have one."""
    norm = rows_of(grad).norm(dim=1)
    # on the CPU the norms show that no square overflowed or vanished; elsewhere reading them would wait
    if grad.is_cpu and ((norm > 1e-15) & (norm < 1e15)).all():
        return grad / per_sample(norm, grad), None
    top = torch.linalg.vector_norm(rows_of(grad), math.inf, dim=1)
    # a power of two that brings the greatest number near 1
    scale = (torch.frexp(top).mantissa / top).clamp(max=1 / torch.finfo(top.dtype).tiny)
    scaled = grad * per_sample(scale, grad)
    direction = scaled.div_(per_sample(rows_of(scaled).norm(dim=1), grad))
    flat = top == 0
    if not grad.is_cpu or flat.any():
        other = seeded_normal(stand_in, x_adv) if _is_seed(stand_in) else stand_in
        direction = torch.where(per_sample(flat, grad), other, direction)
    return direction, ~top.isfinite()


def seeded_normal(seed: Tensor, x: Tensor) -> Tensor:
    """Standard normal numbers in the shape of `x` [n, ...]: scaled, centred sums of the 16 bytes of Philox-4x32-10.

    The counter is (place in the sample's memory, sample, 0, 0) and the key the seed, as in the kernel.
    """
    like = torch.empty_like(x)
    place = torch.arange(x[0].numel(), device=x.device)
    zero = torch.zeros((), dtype=torch.int64, device=x.device)
    counter = (place.expand(len(x), -1), torch.arange(len(x), device=x.device)[:, None], zero, zero)
    words = torch.broadcast_tensors(*philox(seed, counter))
    bytes_of = ((word >> shift) & 0xFF for word in words for shift in (0, 8, 16, 24))
    total = sum(bytes_of, torch.zeros_like(words[0]))
    normal = (total - 2040).to(wide(like).dtype) * 0.003382939
    return normal.as_strided(like.shape, like.stride())


@or_plain(l2_reference)
@packed(L2Step)
def launch_l2(s: L2Step) -> None:
    """`pgd_l2_step_` as two launches, or three for long samples. The images are dense: `kernel_takes(x_adv)`."""
    from bt_fast.kernels import pgd_step as kernels

    if s.x_adv.numel() == 0:
        return
    n, length, x_adv = len(s.x_adv), s.x_adv[0].numel(), s.x_adv
    grad, clean = (in_format(t, x_adv) for t in (s.grad, s.clean))
    stand_in = s.stand_in if _is_seed(s.stand_in) else in_format(s.stand_in, x_adv)
    step_size, counts = s.step_size.contiguous(), (contiguous(s.steps), s.step)
    epsilon, bounds = (float(s.epsilon), contiguous(s.epsilons)), (float(s.lower), float(s.upper))
    flat = torch.empty(n, dtype=torch.int32, device=x_adv.device)
    long_warps = sample_warps(LONG_BLOCK)
    images = (x_adv, grad, clean)
    if (block := sample_block(length)) is not None:
        given = (*images, step_size, *counts, flat, s.faulty, length, *epsilon, *bounds)
        run_kernel(kernels.pgd_l2_sample_fwd_kernel, n, *given, BLOCK=block, num_warps=sample_warps(block))
    else:
        measured = torch.empty(3, n, dtype=torch.float32, device=x_adv.device)
        looked_at = (*images, step_size, *counts, measured, flat, s.faulty, n, length, *epsilon, *bounds)
        run_kernel(kernels.pgd_l2_measure_fwd_kernel, n, *looked_at, BLOCK=LONG_BLOCK, num_warps=long_warps)
        block = part_block(x_adv.dtype)
        blocks = -(-length // block)
        parts = (*images, *counts, measured, n, length, blocks, *bounds)
        run_kernel(kernels.pgd_l2_step_fwd_kernel, n * blocks, *parts, BLOCK=block, num_warps=PART_WARPS)
    stood_in = (x_adv, clean, step_size, *counts, stand_in, flat, length, *epsilon, *bounds)
    try:
        run_kernel(kernels.pgd_l2_stand_in_fwd_kernel, n, *stood_in, BLOCK=STAND_IN_BLOCK, num_warps=long_warps)
    except Exception as error:
        no_way_back(error)
        raise


def _is_seed(stand_in: Tensor) -> bool:
    return stand_in.dtype == torch.int64


def _check(s: L2Step) -> None:
    if s.x_adv.dim() < 2:
        raise ValueError(
            f"x_adv must have shape [n, ...] with at least two dimensions, got {list(s.x_adv.shape)}: "
            "of one sample write x_adv[None]"
        )
    check_step(s)
    shape = () if _is_seed(s.stand_in) else tuple(s.x_adv.shape)
    check("stand_in", s.stand_in, shape, (s.x_adv.dtype, torch.int64), s.x_adv.device)


pgd_l2_step_ = define_op(
    "pgd_l2_step_(Tensor(a0!) x_adv, Tensor grad, Tensor clean, Tensor step_size, float epsilon, float lower, "
    "float upper, Tensor stand_in, Tensor? steps, Tensor? step, Tensor(a10!)? faulty, Tensor? epsilons) -> ()",
    check=lambda *given: _check(L2Step(*given)),
    run=lambda *given: (launch_l2 if kernel_takes(given[0]) else l2_reference)(*given),
)
