"""One projected-gradient step, in place: a fused kernel on CUDA, plain torch elsewhere."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from bt_fast.ops.numeric import per_sample, wide

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WARPS = 4
# a launch counts programs and the offsets within a sample in int32; the spare covers the last block's tail
MOST_INT32 = 2**31 - 2**16


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

    On CUDA one kernel, which reads each of the three tensors once and writes one (where triton is installed, the images
    are dense, and not float64). Never waits for the device. A gradient in another memory format than the images' is
    copied first.

    NaN in the gradient leaves exactly the elements unchanged at which it stands: to spare the rest of the sample too,
    every program would have to read the whole sample before any writes. ±Inf is a direction like any other.

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
        faulty: [n] int32, set to 1 for each moving sample whose gradient holds NaN; its sum counts those samples.

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
        raise ValueError(f"limits for each channel need x_adv of shape [n, C, ...], got {list(x.shape)}")
    stacked = torch.empty(len(limits), x.shape[1], dtype=_compute_dtype(x), device=x.device)
    for row, limit in zip(stacked, limits, strict=True):
        if isinstance(limit, Tensor):
            if limit.shape != row.shape or limit.device != x.device:
                raise ValueError(
                    f"a limit for each channel must have shape {list(row.shape)} on {x.device}, "
                    f"got {list(limit.shape)} on {limit.device}"
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
    limits: Tensor | None = None,
    steps: Tensor | None = None,
    step: Tensor | None = None,
    faulty: Tensor | None = None,
) -> None:
    """`linf_step_` as one op. `limits` [3, C], if given, holds ε, lower and upper of each channel in their place."""
    _check(x_adv, grad, clean, step_size, limits, 3, steps, step, faulty)
    run = launch_linf if _kernel_takes(x_adv) else linf_reference
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
    limits: Tensor | None = None,
    steps: Tensor | None = None,
    step: Tensor | None = None,
    faulty: Tensor | None = None,
) -> None:
    _check(x_adv, grad, clean, step_size, limits, 3, steps, step, faulty)


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
    active = _active(steps, step)
    unmoved = None if active is None else ~per_sample(active, grad)
    # on the CPU a sum tells at a tenth of the cost that there is no NaN; elsewhere to ask would mean to wait
    if not grad.is_cpu or grad.sum().isnan():
        nan = grad.isnan()
        if faulty is not None:
            _mark(faulty, nan.flatten(1).any(dim=1), active)
        unmoved = nan if unmoved is None else nan | unmoved
    if limits is None:
        moved = _step_in_box(x_adv, grad, clean, step_size, _rounded(epsilon, clean.dtype)).clamp_(lower, upper)
    else:
        width, low, high = limits.view(3, -1, *[1] * (x_adv.dim() - 2)).unbind()
        moved = _step_in_box(x_adv, grad, clean, step_size, width).clamp_(low, high)
    x_adv.copy_(moved if unmoved is None else torch.where(unmoved, x_adv, moved))


def _step_in_box(x_adv: Tensor, grad: Tensor, clean: Tensor, step_size: Tensor, width: float | Tensor) -> Tensor:
    """`clip(x' + α·sign(g), x ± ε)`, in two new tensors: on the CPU one more costs as much as the arithmetic on it."""
    alpha = per_sample(step_size, grad)
    moved = grad.sign().to(torch.promote_types(grad.dtype, alpha.dtype)).mul_(alpha).add_(x_adv)
    bound = clean - width
    moved = moved.to(bound.dtype) if bound.dtype.itemsize > moved.dtype.itemsize else moved
    torch.maximum(moved, bound, out=moved)
    torch.add(clean, width, out=bound)
    return torch.minimum(moved, bound, out=moved)


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
    """`pgd_linf_step_` as one launch. The images are dense: `_kernel_takes(x_adv)`."""
    from bt_fast.kernels.pgd_step import pgd_linf_step_fwd_kernel

    if x_adv.numel() == 0:
        return
    memory_format = _memory_format(x_adv) or torch.contiguous_format
    grad, clean = (t.contiguous(memory_format=memory_format) for t in (grad, clean))
    interleaved = limits is not None and memory_format != torch.contiguous_format
    channels = 1 if limits is None else limits.shape[1]
    rows = 1 if interleaved else channels
    length = x_adv[0].numel() // rows
    block = linf_block(x_adv.dtype, limits is not None)
    blocks = -(-length // block)
    with torch.cuda.device_of(x_adv):
        pgd_linf_step_fwd_kernel[(len(x_adv) * rows * blocks,)](
            x_adv,
            grad,
            clean,
            step_size.contiguous(),
            _contiguous(steps),
            step,
            _contiguous(limits),
            faulty,
            length,
            blocks,
            _rounded(epsilon, x_adv.dtype),
            float(lower),
            float(upper),
            channels,
            rows,
            BLOCK=block,
            INTERLEAVED=interleaved,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )


def linf_block(dtype: torch.dtype, limits: bool) -> int:
    """One 128-bit access a thread and tensor; half that in 16 bits with limits, whose values need registers too."""
    return WARPS * 32 * (4 if dtype == torch.float32 or limits else 8)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _kernel_takes(x_adv: Tensor) -> bool:
    return (
        x_adv.is_cuda
        and x_adv.dtype in KERNEL_DTYPES
        and _memory_format(x_adv) is not None
        and 0 < x_adv[:1].numel() < MOST_INT32
        and x_adv.numel() // 128 < MOST_INT32
        and _has_triton()
    )


def _memory_format(x: Tensor) -> torch.memory_format | None:
    """The dense format of `x` with the sample outermost; None where it is not dense, or permuted in another way."""
    formats = [torch.contiguous_format]
    formats += {4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(x.dim(), [])
    return next((f for f in formats if x.is_contiguous(memory_format=f)), None)


def _contiguous(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def _rounded(value: float, dtype: torch.dtype) -> float:
    """A number as it is in `dtype`: torch subtracts it so from 16-bit tensors on the CPU, but not on CUDA."""
    return torch.tensor(value, dtype=dtype).item() if dtype.itemsize == 2 else float(value)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _active(steps: Tensor | None, step: Tensor | None) -> Tensor | None:
    return None if steps is None or step is None else steps > step


def _mark(faulty: Tensor, found: Tensor, active: Tensor | None) -> None:
    faulty.copy_(torch.where(found if active is None else found & active, 1, faulty))


def _check(
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
    if not x_adv.is_floating_point():
        raise TypeError(f"x_adv must be floating point, got {x_adv.dtype}")
    if x_adv.dim() < 1:
        raise ValueError("x_adv must have shape [n, ...], got a 0-dim tensor")
    n, numbers = x_adv.shape[:1], (_compute_dtype(x_adv),)
    _fits("grad", grad, x_adv, x_adv.shape, (x_adv.dtype,))
    _fits("clean", clean, x_adv, x_adv.shape, (x_adv.dtype,))
    _fits("step_size", step_size, x_adv, n, (x_adv.dtype, *numbers))
    if (steps is None) != (step is None):
        raise ValueError("steps and step must be given together")
    counts = (torch.int32, torch.int64)
    _fits("steps", steps, x_adv, n, counts)
    _fits("step", step, x_adv, (), counts)
    _fits("faulty", faulty, x_adv, n, (torch.int32,))
    if faulty is not None and not faulty.is_contiguous():
        raise ValueError("faulty must be contiguous")
    if limits is not None:
        if x_adv.dim() < 2:
            raise ValueError(f"limits need x_adv of shape [n, C, ...], got {list(x_adv.shape)}")
        _fits("limits", limits, x_adv, (limit_rows, x_adv.shape[1]), numbers)


def _fits(name: str, values: Tensor | None, x: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if values is None:
        return
    if values.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(str(d) for d in dict.fromkeys(dtypes))}, got {values.dtype}")
    if values.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(values.shape)}")
    if values.device != x.device:
        raise ValueError(f"{name} must be on {x.device} as x_adv, got {values.device}")


def l2_step_(
    x_adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    step_size: Tensor,
    epsilon: float,
    lower: float,
    upper: float,
    stand_in: Tensor,
) -> None:
    """One projected step of steepest ascent in ℓ2, in place: `x' ← x + renorm(clip(x' + α_i·g/‖g‖, lower, upper) - x)`.

    Args:
        x_adv: [n, ...] floating point, changed in place.
        grad: [n, ...].
        clean: [n, ...], x.
        step_size: [n], α of each sample, in the images' dtype.
        epsilon: ε, the largest ℓ2 norm of a perturbation.
        lower: the least pixel value, upper: the greatest.
        stand_in: [n, ...], the direction to take where a sample's gradient is exactly 0 (not normalised).
    """
    wide_grad, wide_clean = wide(grad), wide(clean)
    norm = per_sample(wide_grad.flatten(1).norm(dim=1), grad)
    direction = torch.where(norm == 0, wide(stand_in), wide_grad / norm)
    moved = (wide(x_adv) + direction * per_sample(step_size, grad)).clamp_(lower, upper)
    delta = (moved - wide_clean).renorm_(p=2, dim=0, maxnorm=epsilon)
    x_adv.copy_((wide_clean + delta).clamp_(lower, upper))
