"""Perturbations into a memory, quantised and at their places: a fused kernel on CUDA, plain torch elsewhere."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bt_fast.ops.availability import or_plain
from bt_fast.ops.frames import (
    INT8_UNIT,
    Layout,
    Placed,
    check_frames,
    dense,
    placed_arguments,
    placed_of,
    places,
    put,
    radii,
    radius,
    zero_rows,
)
from bt_fast.ops.launch import check, check_images, contiguous, define_op, packed, run_kernel, takes_images
from bt_fast.ops.numeric import wide
from bt_fast.ops.rows import result_dtype

WARPS = 4
BLOCK = WARPS * 32 * 4  # a thread has 128 bits of images in float32, 32 bits of int8


class Remember(NamedTuple):
    """The arguments of `remember_`."""

    memory: Tensor
    x_adv: Tensor
    clean: Tensor
    slots: Tensor
    epsilon: float
    l2: bool
    order: Tensor | None = None
    steps: Tensor | None = None
    keep: Tensor | None = None
    epsilons: Tensor | None = None  # in place of epsilon
    top: Tensor | None = None
    left: Tensor | None = None
    mirrored: Tensor | None = None


def remember_(
    memory: Tensor,
    x_adv: Tensor,
    clean: Tensor,
    slots: Tensor,
    epsilon: float | Tensor,
    *,
    l2: bool = False,
    order: Tensor | None = None,
    steps: Tensor | None = None,
    keep: Tensor | None = None,
    placed: Placed | None = None,
) -> None:
    """Writes perturbations into a memory: `memory[slots] ← (x' - x) / ε`, clipped to [-1, 1], in one launch.

    int8 holds 127 times this, rounded to the nearest integer, of two to the even one. Where an image shows a part of
    its own frame the rest keeps its memory; a sample without steps has 0 everywhere. NaN becomes 0, and so does all at
    ε = 0.

    Args:
        memory: [slots, ...], contiguous, of each sample's own shape; changed in place.
        x_adv: [m, ...] floating point, x', in the order of `order`.
        clean: [m, ...] of the same dtype, x, in that order too.
        slots: [m] int64 ≥ 0, the row of `memory` of each sample, all different, in the batch's own order as all below.
            The values are not checked, which would wait for the device.
        epsilon: ε, a number, or [m] floating point of each sample. l2: whether it is a bound of the ℓ2 norm, and not
            rounded to the images' dtype.
        order: [m] int64, which sample each row of the images is; None: the batch's own order.
        steps: [m] int64 or int32, 0 for a sample whose memory becomes 0; None: all have steps.
        keep: [m] bool, whether what is not shown of the sample keeps its memory; else it becomes 0. None: it does.
        placed: (top, left, mirrored), where x lies in its own frame, see `bt_fast.Placement`. None: x is the frame.

    Raises:
        TypeError or ValueError: a dtype, shape or device does not fit; the message names the argument.
    """
    own, one = (epsilon, 0.0) if isinstance(epsilon, Tensor) else (None, float(epsilon))
    _remember(memory, x_adv, clean, slots, one, l2, order, steps, keep, own, *(placed or (None, None, None)))


@packed(Remember)
def remember_reference(s: Remember) -> None:
    """`remember_` in plain torch."""
    if s.x_adv.numel() == 0 or s.memory.numel() == 0:
        return
    placed = placed_of(s.top, s.left, s.mirrored)
    rows = torch.arange(len(s.x_adv), device=s.x_adv.device) if s.order is None else s.order
    slots, stay = s.slots[rows], None if s.steps is None else s.steps[rows] <= 0
    epsilon = radii(s.epsilon, s.epsilons, s.x_adv, rows, s.l2)
    new = _stored(wide(s.x_adv) - wide(s.clean), epsilon, s.memory.dtype)
    if stay is not None:
        zero_rows(new, stay)
    frames = s.memory.view(len(s.memory), -1)
    if placed is not None:
        layout = Layout.of(s.x_adv.contiguous(), s.memory, placed)
        old = frames.index_select(0, slots)
        for forgotten in (stay, None if s.keep is None else ~s.keep[rows]):
            if forgotten is not None:
                zero_rows(old, forgotten)
        old, new = (values.view(len(rows), layout.CHANNELS, -1) for values in (old, new))
        new = put(old, places(placed, rows, layout), new)
    frames.index_copy_(0, slots, new.reshape(len(rows), -1))


def _stored(delta: Tensor, epsilon: Tensor | float, dtype: torch.dtype) -> Tensor:
    """Perturbations [m, ...], which it changes, as they are stored: contiguous."""
    if isinstance(epsilon, Tensor):
        fractions = delta.div_(torch.where(epsilon > 0, epsilon, 1.0))
        zero_rows(fractions, ~(epsilon > 0).flatten())
    else:
        fractions = delta.div_(epsilon) if epsilon > 0 else delta.zero_()
    fractions.nan_to_num_(0.0, posinf=1.0, neginf=-1.0).clamp_(-1.0, 1.0)
    fractions = fractions.mul_(INT8_UNIT).round_() if dtype == torch.int8 else fractions
    return fractions.to(dtype).contiguous()


@or_plain(remember_reference)
@packed(Remember)
def launch_remember(s: Remember) -> None:
    """`remember_` as one launch. The images are dense: `_kernel_takes(memory, x_adv)`."""
    from bt_fast.kernels import remember as kernels

    if s.x_adv.numel() == 0 or s.memory.numel() == 0:
        return
    x_adv, placed = dense(s.x_adv), placed_of(s.top, s.left, s.mirrored)
    layout = Layout.of(x_adv, s.memory, placed)
    clean = s.clean.contiguous(memory_format=torch.channels_last if layout.LAST else torch.contiguous_format)
    keep = None if s.keep is None else s.keep.contiguous().view(torch.uint8)
    own = None if s.epsilons is None else (s.epsilons.float() if s.l2 else s.epsilons.to(x_adv.dtype)).contiguous()
    blocks = -(-layout.own_length // BLOCK)
    of_samples = (contiguous(s.slots), contiguous(s.order), contiguous(s.steps), keep, *placed_arguments(placed))
    given = (s.memory, x_adv, clean, *of_samples, blocks, radius(s.epsilon, x_adv.dtype, s.l2), own)
    constants: dict[str, Any] = {**layout._asdict(), "BLOCK": BLOCK, "num_warps": WARPS}
    run_kernel(kernels.remember_fwd_kernel, len(x_adv) * blocks, *given, **constants)


def _kernel_takes(memory: Tensor, x_adv: Tensor) -> bool:
    programs = len(x_adv) * -(-memory[:1].numel() // BLOCK)
    return memory.dtype != torch.float64 and dense(x_adv) is x_adv and takes_images(x_adv, programs)


def _check(s: Remember) -> None:
    check_images("x_adv", s.x_adv)
    m, device = s.x_adv.shape[:1], s.x_adv.device
    check("clean", s.clean, s.x_adv.shape, (s.x_adv.dtype,), device)
    check_frames(s.x_adv, "x_adv", s.memory, s.slots, (s.top, s.left, s.mirrored))
    check("order", s.order, m, (torch.int64,), device)
    check("steps", s.steps, m, (torch.int64, torch.int32), device)
    check("keep", s.keep, m, (torch.bool,), device)
    check("epsilon", s.epsilons, m, (s.x_adv.dtype, result_dtype(s.x_adv)), device)


def _run(memory: Tensor, x_adv: Tensor, *others: Any) -> None:
    (launch_remember if _kernel_takes(memory, x_adv) else remember_reference)(memory, x_adv, *others)


_remember = define_op(
    "remember_(Tensor(a0!) memory, Tensor x_adv, Tensor clean, Tensor slots, float epsilon, bool l2, Tensor? order, "
    "Tensor? steps, Tensor? keep, Tensor? epsilons, Tensor? top, Tensor? left, Tensor? mirrored) -> ()",
    check=lambda *given: _check(Remember(*given)),
    run=_run,
)
