"""One projected-gradient step in ℓ2, in place: fused kernels on CUDA, plain torch elsewhere."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bt_fast.ops.availability import no_way_back, or_plain
from bt_fast.ops.gather_start import philox
from bt_fast.ops.launch import check, contiguous, rounded
from bt_fast.ops.numeric import per_sample, wide
from bt_fast.ops.pgd_step import (
    LONG_BLOCK,
    PART_WARPS,
    check_step,
    hold,
    inner_format,
    kernel_takes,
    part_block,
    rows_of,
    sample_block,
    sample_warps,
)

STAND_IN_BLOCK = 512  # one element a thread: making random numbers takes registers


def l2_step_(
    x_adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    step_size: Tensor,
    epsilon: float,
    lower: float,
    upper: float,
    stand_in: Tensor,
    *,
    steps: Tensor | None = None,
    step: Tensor | None = None,
    faulty: Tensor | None = None,
) -> None:
    """One projected step of steepest ascent in ℓ2, in place: `x' ← x + renorm(clip(x' + α_i·g/‖g‖, lower, upper) - x)`.

    Clamped to the bounds once more, since rounding may leave them. Norms are those of a whole sample, of gradients of
    any magnitude. A sample whose gradient holds NaN or Inf has no direction: it stays, and is marked in `faulty`.

    On CUDA kernels (where triton is installed, the images are dense, and not float64). Samples of up to 4096 elements:
    each of the three tensors is read once and one is written. Others: seven reads and one write, in a launch more. A
    last small launch, which reads one number of each sample, moves those whose gradient is 0. Never waits for the
    device. A gradient in another memory format than the images' is copied first.

    Args:
        x_adv: [n, ...] floating point, at least two dimensions, changed in place.
        grad: [n, ...] of the same dtype.
        clean: [n, ...] of the same dtype, x.
        step_size: [n], α of each sample, in the images' dtype or float32.
        epsilon: ε, the largest ℓ2 norm of a perturbation.
        lower: the least pixel value, upper: the greatest.
        stand_in: the direction to take where a sample's gradient is exactly 0 (not normalised): [n, ...] of the same
            dtype; or a seed, 0-dim int64, of which standard normal numbers are made for those samples alone, other
            ones for each sample, and the same ones by the kernel and without.
        steps: [n] integers: only samples with `steps[i] > step` move. Without it, all do.
        step: 0-dim integer on the device, t.
        faulty: [n] int32, set to 1 for each sample with steps left whose gradient holds NaN or Inf.

    Raises:
        TypeError or ValueError: a dtype, shape or device does not fit; the message names the argument.
    """
    pgd_l2_step_(x_adv, grad, clean, step_size, epsilon, lower, upper, stand_in, steps, step, faulty)


@torch.library.custom_op("bt_fast::pgd_l2_step_", mutates_args=("x_adv", "faulty"))
def pgd_l2_step_(
    x_adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    step_size: Tensor,
    epsilon: float,
    lower: float,
    upper: float,
    stand_in: Tensor,
    steps: Tensor | None,
    step: Tensor | None,
    faulty: Tensor | None,
) -> None:
    """`l2_step_` as one op."""
    _check(x_adv, grad, clean, step_size, stand_in, steps, step, faulty)
    run = launch_l2 if kernel_takes(x_adv) else l2_reference
    run(x_adv, grad, clean, step_size, epsilon, lower, upper, stand_in, steps, step, faulty)


@pgd_l2_step_.register_fake
def _(
    x_adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    step_size: Tensor,
    epsilon: float,
    lower: float,
    upper: float,
    stand_in: Tensor,
    steps: Tensor | None,
    step: Tensor | None,
    faulty: Tensor | None,
) -> None:
    _check(x_adv, grad, clean, step_size, stand_in, steps, step, faulty)


def l2_reference(
    x_adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    step_size: Tensor,
    epsilon: float,
    lower: float,
    upper: float,
    stand_in: Tensor,
    steps: Tensor | None = None,
    step: Tensor | None = None,
    faulty: Tensor | None = None,
) -> None:
    """`pgd_l2_step_` in plain torch: what the kernels are held against, and what runs where there are none."""
    if x_adv.numel() == 0:
        return
    wide_clean = wide(clean)
    direction, held = _direction(wide(grad), stand_in, x_adv)
    unmoved = hold(held, steps, step, faulty)
    low, high = (rounded(bound, direction.dtype) for bound in (lower, upper))
    moved = direction.mul_(per_sample(step_size, grad)).add_(x_adv).clamp_(low, high)
    moved = moved.sub_(wide_clean).renorm_(p=2, dim=0, maxnorm=epsilon).add_(wide_clean).clamp_(low, high)
    x_adv.copy_(moved if unmoved is None else torch.where(per_sample(unmoved, x_adv), x_adv, moved))


def _direction(grad: Tensor, stand_in: Tensor, x_adv: Tensor) -> tuple[Tensor, Tensor | None]:
    """The direction of each sample's step, in a new tensor, and whether it has none [n]; None where all have."""
    norm = rows_of(grad).norm(dim=1)
    # on the CPU a look tells that no square overflowed or vanished; elsewhere to look would mean to wait
    if grad.is_cpu and ((norm > 1e-15) & (norm < 1e15)).all():
        return grad / per_sample(norm, grad), None
    top = torch.linalg.vector_norm(rows_of(grad), math.inf, dim=1)
    # a power of two, which brings the greatest number near 1
    scale = (torch.frexp(top).mantissa / top).clamp(max=1 / torch.finfo(top.dtype).tiny)
    scaled = grad * per_sample(scale, grad)
    direction = scaled.div_(per_sample(rows_of(scaled).norm(dim=1), grad))
    flat = top == 0
    if not grad.is_cpu or flat.any():
        other = seeded_normal(stand_in, x_adv) if _is_seed(stand_in) else stand_in
        direction = torch.where(per_sample(flat, grad), other, direction)
    return direction, ~top.isfinite()


def seeded_normal(seed: Tensor, x: Tensor) -> Tensor:
    """Standard normal numbers in the shape of `x` [n, ...]: sums of the 16 bytes of Philox-4x32-10, centred and scaled.

    The counter is (place in the sample's memory, sample, 0, 0) and the key the seed: the kernel makes the same ones.
    """
    like = torch.empty_like(x)
    place = torch.arange(x[0].numel(), device=x.device)
    counter = [place.expand(len(x), -1), torch.arange(len(x), device=x.device)[:, None]]
    zero = torch.zeros((), dtype=torch.int64, device=x.device)
    words = torch.broadcast_tensors(*philox(seed, (counter[0], counter[1], zero, zero)))
    bytes_of = ((c >> shift) & 0xFF for c in words for shift in (0, 8, 16, 24))
    total = sum(bytes_of, torch.zeros_like(words[0]))
    normal = (total - 2040).to(wide(like).dtype) * 0.003382939
    return normal.as_strided(like.shape, like.stride())


@or_plain(l2_reference)
def launch_l2(
    x_adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    step_size: Tensor,
    epsilon: float,
    lower: float,
    upper: float,
    stand_in: Tensor,
    steps: Tensor | None = None,
    step: Tensor | None = None,
    faulty: Tensor | None = None,
) -> None:
    """`pgd_l2_step_` as two launches, or for long samples three. The images are dense: `kernel_takes(x_adv)`."""
    from bt_fast.kernels import pgd_step as kernels

    if x_adv.numel() == 0:
        return
    n, length, memory_format = len(x_adv), x_adv[0].numel(), inner_format(x_adv)
    grad, clean = (t.contiguous(memory_format=memory_format) for t in (grad, clean))
    if not _is_seed(stand_in):
        stand_in = stand_in.contiguous(memory_format=memory_format)
    step_size, steps = step_size.contiguous(), contiguous(steps)
    images, counts = (x_adv, grad, clean), (steps, step)
    epsilon, bounds = float(epsilon), (float(lower), float(upper))
    flat = torch.empty(n, dtype=torch.int32, device=x_adv.device)
    long_warps = sample_warps(LONG_BLOCK)
    with torch.cuda.device_of(x_adv):
        if (block := sample_block(length)) is not None:
            kernels.pgd_l2_sample_fwd_kernel[(n,)](
                *images,
                step_size,
                *counts,
                flat,
                faulty,
                length,
                epsilon,
                *bounds,
                BLOCK=block,
                num_warps=sample_warps(block),
                enable_fp_fusion=False,
            )
        else:
            measured = torch.empty(3, n, dtype=torch.float32, device=x_adv.device)
            kernels.pgd_l2_measure_fwd_kernel[(n,)](
                *images,
                step_size,
                *counts,
                measured,
                flat,
                faulty,
                n,
                length,
                epsilon,
                *bounds,
                BLOCK=LONG_BLOCK,
                num_warps=long_warps,
                enable_fp_fusion=False,
            )
            block = part_block(x_adv.dtype)
            blocks = -(-length // block)
            kernels.pgd_l2_step_fwd_kernel[(n * blocks,)](
                *images,
                *counts,
                measured,
                n,
                length,
                blocks,
                *bounds,
                BLOCK=block,
                num_warps=PART_WARPS,
                enable_fp_fusion=False,
            )
        try:
            kernels.pgd_l2_stand_in_fwd_kernel[(n,)](
                x_adv,
                clean,
                step_size,
                *counts,
                stand_in,
                flat,
                length,
                epsilon,
                *bounds,
                BLOCK=STAND_IN_BLOCK,
                num_warps=long_warps,
                enable_fp_fusion=False,
            )
        except Exception as error:
            no_way_back(error)
            raise


def _is_seed(stand_in: Tensor) -> bool:
    return stand_in.dtype == torch.int64


def _check(
    x_adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    step_size: Tensor,
    stand_in: Tensor,
    steps: Tensor | None,
    step: Tensor | None,
    faulty: Tensor | None,
) -> None:
    if x_adv.dim() < 2:
        raise ValueError(
            f"x_adv must have shape [n, ...] with at least two dimensions, got {list(x_adv.shape)}: "
            "of one sample write x_adv[None]"
        )
    check_step(x_adv, grad, clean, step_size, steps, step, faulty)
    shape = () if _is_seed(stand_in) else tuple(x_adv.shape)
    check("stand_in", stand_in, shape, (x_adv.dtype, torch.int64), x_adv.device)
