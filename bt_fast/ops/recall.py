"""The sorted clean batch and the attack's start at remembered perturbations: a fused kernel on CUDA, else torch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bt_fast.ops.availability import or_plain
from bt_fast.ops.frames import (
    Layout,
    Placed,
    check_frames,
    dense,
    fraction,
    like,
    placed_arguments,
    placed_of,
    places,
    radii,
    radius,
    taken,
    zero_rows,
)
from bt_fast.ops.gather_start import BLOCK, WARPS, fill_start, flat, last_moving, unit_noise
from bt_fast.ops.launch import check, check_images, contiguous, define_op, packed, run_kernel, takes_images
from bt_fast.ops.numeric import per_sample, wide
from bt_fast.ops.rows import result_dtype

LONG_BLOCK, LONG_WARPS = 1024, 8  # of the elements that a program of the l2 kernel has at once


class Limits(NamedTuple):
    """What bounds a perturbation: its size and the values of a pixel.

    Attributes:
        epsilon: ε, a number, or [m] floating point of each sample in the batch's own order.
        lower: the least value of a pixel, upper: the greatest.
        l2: whether ε bounds the ℓ2 norm over an image instead of each pixel's change.
    """

    epsilon: float | Tensor
    lower: float = 0.0
    upper: float = 1.0
    l2: bool = False


class Recall(NamedTuple):
    """The arguments of `recall`."""

    x: Tensor
    memory: Tensor
    slots: Tensor
    state: Tensor
    epsilon: float
    lower: float
    upper: float
    l2: bool
    noise: float
    order: Tensor | None = None
    steps: Tensor | None = None
    samples: Tensor | None = None
    epsilons: Tensor | None = None  # in place of epsilon
    top: Tensor | None = None
    left: Tensor | None = None
    mirrored: Tensor | None = None


def recall(
    x: Tensor,
    memory: Tensor,
    slots: Tensor,
    state: Tensor,
    limits: Limits,
    *,
    noise: float = 0.001,
    order: Tensor | None = None,
    steps: Tensor | None = None,
    samples: Tensor | None = None,
    placed: Placed | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the batch in sorted order, and its start: `clip(x + P(ε·remembered + noise·N(0, 1)), lower, upper)`.

    P is the projection onto the ε-ball: each pixel's change is clipped to ±ε, or in ℓ2 the whole shortened to ε. A
    sample without steps starts exactly at x. In one launch for dense images; a second one moves the offset.

    Args:
        x: [m, ...] floating point.
        memory: [slots, ...], contiguous, of each sample's own shape: perturbations as fractions of ε; int8 holds 127
            times these. NaN counts as 0, and what is outside of [-1, 1] as the nearest of its ends.
        slots: [m] int64, the row of `memory` of each sample; below 0: nothing is remembered of it. The values are not
            checked, which would wait for the device; one that is too large reads foreign memory.
        state: [2] int64, seed and offset of the noise; the offset is increased by one on the device.
        limits: ε and the bounds of a pixel.
        noise: the standard deviation of normal noise, which is that of `gather_start` (5-d images: as if they were
            contiguous); 0 for none.
        order, steps, samples: as for `gather_start`.
        placed: (top, left, mirrored), where x lies in its own frame, see `bt_fast.Placement`. What lies outside of the
            frame starts at x and the noise. None: x is the frame.

    Returns:
        clean and start, both new, of x's shape and dtype.

    Raises:
        TypeError or ValueError: a dtype, shape or device does not fit; the message names the argument.
    """
    own, one = (limits.epsilon, 0.0) if isinstance(limits.epsilon, Tensor) else (None, float(limits.epsilon))
    numbers = one, float(limits.lower), float(limits.upper), limits.l2, float(noise)
    top, left, mirrored = (None, None, None) if placed is None else placed
    started: tuple[Tensor, Tensor] = _recall(
        x, memory, slots, state, *numbers, order, steps, samples, own, top, left, mirrored
    )
    return started


@packed(Recall)
def recall_reference(s: Recall) -> tuple[Tensor, Tensor]:
    """`recall` in plain torch, but without moving the offset."""
    x, placed = dense(s.x), placed_of(s.top, s.left, s.mirrored)
    clean, start, layout = _like(x), _like(x), Layout.of(x, s.memory, placed)
    rows = torch.arange(len(x), device=x.device) if s.order is None else s.order
    torch.index_select(flat(x), 0, rows, out=flat(clean))
    rows = rows[: last_moving(s.steps, rows)]
    delta = _remembered(s, layout, rows).mul_(radii(s.epsilon, s.epsilons, x, rows, s.l2))
    if s.noise:
        numbers = rows if s.samples is None else s.samples[rows]
        noise = unit_noise(numbers, layout.length, s.state, "normal").mul_(s.noise)
        if layout.LAST:
            noise = noise.view(len(rows), layout.HEIGHT, layout.WIDTH, layout.CHANNELS).movedim(-1, 1)
        delta.add_(noise.reshape(delta.shape))
    moved = _projected(delta, s, x, rows).add_(wide(clean[: len(rows)])).clamp_(s.lower, s.upper)
    fill_start(start, moved, clean, s.steps, rows)
    return clean, start


def _remembered(s: Recall, layout: Layout, rows: Tensor) -> Tensor:
    """The fractions of ε of the samples `rows`, in the shape of the images and a new tensor."""
    slots, shape = s.slots[rows], (len(rows), *s.x.shape[1:])
    if not len(s.memory):
        return torch.zeros(shape, dtype=result_dtype(s.x), device=s.x.device)
    # as they are stored, they are the least to move
    stored = s.memory.view(len(s.memory), layout.own_length).index_select(0, slots.clamp(min=0))
    zero_rows(stored, slots < 0)
    placed = placed_of(s.top, s.left, s.mirrored)
    if placed is not None:
        frames = stored.view(len(rows), layout.CHANNELS, layout.own_pixels)
        stored = taken(frames, places(placed, rows, layout))
    return fraction(stored.view(shape), result_dtype(s.x))


def _projected(delta: Tensor, s: Recall, x: Tensor, rows: Tensor) -> Tensor:
    """The perturbations in the ε-ball; of the same tensor."""
    epsilon = radii(s.epsilon, s.epsilons, x, rows, s.l2)
    if not s.l2:
        own = epsilon if isinstance(epsilon, Tensor) else delta.new_full((), epsilon)
        return delta.clamp_(-own, own)
    size = per_sample(delta.flatten(1).norm(dim=1), delta)
    return delta.mul_(torch.where(size > epsilon, epsilon / size, 1.0))


@or_plain(recall_reference)
@packed(Recall)
def launch_recall(s: Recall) -> tuple[Tensor, Tensor]:
    """`recall` as one launch, but without moving the offset. The images are dense: `_kernel_takes(x, memory)`."""
    from bt_fast.kernels import recall as kernels

    x, placed = dense(s.x), placed_of(s.top, s.left, s.mirrored)
    clean, start = _like(x), _like(x)
    if x.numel() == 0:
        return clean, start
    layout = Layout.of(x, s.memory, placed)
    places = (contiguous(s.order), contiguous(s.steps), contiguous(s.samples), *placed_arguments(placed))
    given = (x, clean, start, s.memory, contiguous(s.slots), s.state, *places)
    own = None if s.epsilons is None else (s.epsilons.float() if s.l2 else s.epsilons.to(x.dtype)).contiguous()
    numbers = (radius(s.epsilon, x.dtype, s.l2), own, s.noise, s.lower, s.upper)
    constants: dict[str, Any] = {**layout._asdict(), "NOISY": s.noise > 0}
    if s.l2:
        constants |= {"BLOCK": LONG_BLOCK, "num_warps": LONG_WARPS}
        run_kernel(kernels.recall_l2_fwd_kernel, len(x), *given, *numbers, **constants)
    else:
        blocks = -(-layout.length // BLOCK)
        constants |= {"BLOCK": BLOCK, "num_warps": WARPS}
        run_kernel(kernels.recall_linf_fwd_kernel, len(x) * blocks, *given, blocks, *numbers, **constants)
    return clean, start


def _like(x: Tensor) -> Tensor:
    return like(x)


def _kernel_takes(x: Tensor, memory: Tensor) -> bool:
    return memory.dtype != torch.float64 and dense(x) is x and takes_images(x, len(x) * -(-x[:1].numel() // BLOCK))


def _check(s: Recall) -> None:
    check_images("x", s.x)
    m, device = s.x.shape[:1], s.x.device
    check_frames(s.x, "x", s.memory, s.slots, (s.top, s.left, s.mirrored))
    check("state", s.state, (2,), (torch.int64,), device, changed=True)
    check("order", s.order, m, (torch.int64,), device)
    check("steps", s.steps, m, (torch.int64, torch.int32), device)
    check("samples", s.samples, m, (torch.int64,), device)
    check("epsilon", s.epsilons, m, (s.x.dtype, result_dtype(s.x)), device)


def _run(x: Tensor, memory: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    started = (launch_recall if _kernel_takes(x, memory) else recall_reference)(x, memory, *others)
    state: Tensor = others[1]
    state[1].add_(1)  # a separate launch: while the other runs, all of it must see the old offset
    return started


_recall = define_op(
    "recall(Tensor x, Tensor memory, Tensor slots, Tensor(a3!) state, float epsilon, float lower, float upper, bool "
    "l2, float noise, Tensor? order, Tensor? steps, Tensor? samples, Tensor? epsilons, Tensor? top, Tensor? left, "
    "Tensor? mirrored) -> (Tensor, Tensor)",
    check=lambda *given: _check(Recall(*given)),
    run=_run,
    results=lambda x, *_: (_like(x), _like(x)),
)
