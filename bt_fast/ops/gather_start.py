"""The sorted clean batch and the attack's random start: a fused kernel on CUDA, plain torch elsewhere."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

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
from bt_fast.ops.numeric import per_sample, wide

NOISES = ("normal", "uniform")
WARPS = 4
BLOCK = WARPS * 32 * 4  # a thread has the four elements of one Philox call: 128 bits in float32
PHILOX_MULTIPLIERS, PHILOX_KEYS, PHILOX_ROUNDS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 10
LOW = 0xFFFFFFFF
# polynomials of the kernel, from the highest power: -2·ln(1 + g) / g to 4e-7, cos(½πt) and sin(½πt) / t of z = t²
LOGARITHM = (0.3154916, -0.34222665, 0.3268116, -0.39590025, 0.5002408, -0.6667598, 0.99999756, -1.9999996)
COSINE = (8.5819064e-4, -0.020810628, 0.25365075, -1.2336982, 0.99999994)
SINE = (-0.0043331, 0.07943434, -0.64589286, 1.570791)


class Start(NamedTuple):
    """The arguments of `gather_start`."""

    x: Tensor
    order: Tensor | None
    steps: Tensor | None
    state: Tensor
    noise: str
    scale: float
    lower: float | None = None
    upper: float | None = None
    samples: Tensor | None = None


def gather_start(
    x: Tensor,
    order: Tensor | None,
    steps: Tensor | None,
    state: Tensor,
    noise: str,
    scale: float,
    lower: float | None = None,
    upper: float | None = None,
    samples: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the batch in sorted order, and the attack's start: `clip(x + scale·noise, lower, upper)`.

    Sorted row i is sample `order[i]`. A sample without steps starts exactly at x and is not clipped. For dense images a
    kernel reads each element once and writes two; a second launch of one number moves the offset. No gradient passes.

    The noise is counter-based, and the same bit for bit on every device and in every dtype: element e of sample s, in
    memory order, has output `e mod 4` of Philox4x32-10 with the counter `(e div 4, s, offset)` and the seed as key; s
    is the sample's place in the batch, or its number in `samples`. So it depends neither on `order` nor on the rest of
    the batch, but channels-last images have it at other places than contiguous ones. 32 bits make a number in [-1, 1],
    or, two by two, normal numbers of up to 6.8 (Box and Muller, 1958; logarithm, sine and cosine to 1e-6).

    Args:
        x: [m, ...] floating point.
        order: [m] int64, a permutation or any indices of samples, or None: the batch's own order. Its values are not
            checked, which would wait for the device; an index outside 0..m-1 reads foreign memory.
        steps: [m] int64 or int32, in the batch's own order: 0 if a sample does not move. None: all move.
        state: [2] int64, seed and offset. The offset is increased by one on the device, so that each replay of a CUDA
            graph with this op draws new noise.
        noise: "normal" (standard) or "uniform" (in [-1, 1]).
        scale: standard deviation, or ε (rounded to the images' dtype), in pixel units.
        lower: the least pixel value, upper: the greatest; None: no bound.
        samples: [m] int64 in 0..2^32-1, in the batch's own order: each sample's number for the noise. None: its place.

    Returns:
        clean and start, both new, of x's shape and dtype, dense in x's memory format.

    Raises:
        TypeError or ValueError: a dtype, shape, device or name does not fit; the message names the argument.
    """
    started: tuple[Tensor, Tensor] = _gather_start(x, order, steps, state, noise, scale, lower, upper, samples)
    return started


@packed(Start)
def gather_start_reference(s: Start) -> tuple[Tensor, Tensor]:
    """`gather_start` in plain torch, but without moving the offset."""
    x = s.x
    clean, start = _like(x), _like(x)
    dense = x if dense_format(x) else x.contiguous()
    rows = torch.arange(len(x), device=x.device) if s.order is None else s.order
    whole = torch.index_select(flat(dense), 0, rows, out=flat(clean))
    n = last_moving(s.steps, rows)
    rows, images = rows[:n], whole[:n]
    moved = unit_noise(rows if s.samples is None else s.samples[rows], images.shape[1], s.state, s.noise)
    moved = moved.to(torch.promote_types(x.dtype, moved.dtype)).mul_(_scale(s)).add_(wide(images))
    if s.lower is not None or s.upper is not None:
        moved.clamp_(s.lower, s.upper)
    fill_start(flat(start), moved, whole, s.steps, rows)
    return clean, start


def last_moving(steps: Tensor | None, rows: Tensor) -> int:
    """How many of the sorted rows, from the first, hold all samples with steps; on a GPU all: to count would wait."""
    if steps is None or steps.is_cuda:
        return len(rows)
    with_steps = (steps[rows] > 0).nonzero()
    return int(with_steps[-1]) + 1 if len(with_steps) else 0


def fill_start(start: Tensor, moved: Tensor, clean: Tensor, steps: Tensor | None, rows: Tensor) -> None:
    """Fills `start` with `moved` where the samples `rows`, the first of all, have steps, and else with `clean`."""
    n = len(rows)
    if steps is None:
        start.copy_(moved)
        return
    torch.where(per_sample(steps[rows] > 0, moved), moved.to(start.dtype), clean[:n], out=start[:n])
    start[n:] = clean[n:]


def unit_noise(samples: Tensor, length: int, state: Tensor, noise: str) -> Tensor:
    """`length` normal or uniform numbers for each of the samples [n], see `gather_start`: [n, length], float32."""
    calls = -(-length // 4)
    offset = state[1]
    call = torch.arange(calls, device=samples.device)
    bits = philox(state[0], (call, samples[:, None] & LOW, offset & LOW, (offset >> 32) & LOW))
    out = torch.empty(len(samples), calls, 4, device=samples.device)
    if noise == "normal":
        for pair, uniform, angle in ((out[..., :2], *bits[:2]), (out[..., 2:], *bits[2:])):
            _normal_pair(uniform, angle, pair)
    else:
        for i, number in enumerate(bits):
            out[..., i] = number.to(torch.int32)
        out.mul_(2.0**-31)
    return out.view(len(samples), 4 * calls)[:, :length]


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., 2011).

    Args:
        seed: 0-dim int64, the key's 64 bits.
        counter: four int64 tensors in 0..2^32-1, of shapes that broadcast.

    Returns:
        Four int64 tensors in 0..2^32-1.
    """
    c0, c1, c2, c3 = counter
    rounds = torch.arange(PHILOX_ROUNDS, device=seed.device)
    keys = [(part + rounds * key) & LOW for part, key in zip((seed, seed >> 32), PHILOX_KEYS, strict=True)]
    for k0, k1 in zip(*keys, strict=True):
        p0, p1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]  # 64 bits, for either sign
        c0, c1, c2, c3 = _mixed(p1, c1, k0), p1, _mixed(p0, c3, k1), p0
    return c0, c1 & LOW, c2, c3 & LOW


def _mixed(product: Tensor, other: Tensor, key: Tensor) -> Tensor:
    high = product >> 32
    high = high.bitwise_xor_(other) if high.shape == other.shape else high ^ other  # else they broadcast
    return high.bitwise_xor_(key).bitwise_and_(LOW)


def _normal_pair(uniform: Tensor, angle: Tensor, out: Tensor) -> None:
    """Writes two normal numbers [..., 2] from twice 32 random bits, with the kernel's operations."""
    mantissa = uniform.to(torch.float32).add_(0.5)
    bits = mantissa.view(torch.int32)
    exponent = (bits - 0x3F2AAAAB).bitwise_right_shift_(23)
    bits.sub_(exponent << 23)
    g = mantissa.sub_(1.0)
    squared = _polynomial(g, LOGARITHM).mul_(g).add_((32 - exponent).to(torch.float32).mul_(1.3862944))
    r = squared.double().sqrt_().float()  # torch's float32 root is not always correctly rounded
    angle = angle.to(torch.int32)
    r.view(torch.int32).bitwise_xor_(angle & -(2**31))
    t = (angle << 1).to(torch.float32).mul_(2.0**-31)
    z = t * t
    torch.mul(r, _polynomial(z, COSINE), out=out[..., 0])
    torch.mul(r, _polynomial(z, SINE).mul_(t), out=out[..., 1])


def _polynomial(z: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Evaluates by Horner's scheme, from the highest power."""
    total = z * coefficients[0]
    for coefficient in coefficients[1:-1]:
        total.add_(coefficient).mul_(z)
    return total.add_(coefficients[-1])


@or_plain(gather_start_reference)
@packed(Start)
def launch_gather_start(s: Start) -> tuple[Tensor, Tensor]:
    """`gather_start` as one launch, but without moving the offset. The images are dense: `_kernel_takes(x)`."""
    from bt_fast.kernels.gather_start import gather_start_fwd_kernel

    clean, start = _like(s.x), _like(s.x)
    if s.x.numel() == 0:
        return clean, start
    blocks = _blocks(s.x)
    places = (contiguous(s.order), contiguous(s.steps), contiguous(s.samples), s.state)
    lower = -math.inf if s.lower is None else float(s.lower)
    upper = math.inf if s.upper is None else float(s.upper)
    given = (s.x, clean, start, *places, s.x[0].numel(), blocks, _scale(s), lower, upper)
    constants = {"BLOCK": BLOCK, "NORMAL": s.noise == "normal", "num_warps": WARPS}
    run_kernel(gather_start_fwd_kernel, len(s.x) * blocks, *given, **constants)
    return clean, start


def _kernel_takes(x: Tensor) -> bool:
    return takes_images(x, len(x) * _blocks(x))


def _blocks(x: Tensor) -> int:
    """Returns the number of programs for each sample."""
    return -(-math.prod(x.shape[1:]) // BLOCK)


def _scale(s: Start) -> float:
    """Returns ε in the form of the projection, so that no start lies outside."""
    return rounded(s.scale, s.x.dtype) if s.noise == "uniform" else float(s.scale)


def _like(x: Tensor) -> Tensor:
    """Returns an empty tensor, dense in the memory format of `x`, or contiguous if `x` has none."""
    return torch.empty_like(x, memory_format=dense_format(x) or torch.contiguous_format)


def flat(x: Tensor) -> Tensor:
    """Returns a dense tensor as [m, length], in memory order."""
    lies = x if x.is_contiguous() else x.movedim(1, -1)
    return lies.view(len(x), math.prod(x.shape[1:]))


def _check(s: Start) -> None:
    check_images("x", s.x)
    m, device = s.x.shape[:1], s.x.device
    check("order", s.order, m, (torch.int64,), device)
    check("steps", s.steps, m, (torch.int64, torch.int32), device)
    check("samples", s.samples, m, (torch.int64,), device)
    check("state", s.state, (2,), (torch.int64,), device, changed=True)
    if s.noise not in NOISES:
        listed = ", ".join(map(repr, NOISES))
        raise ValueError(f"noise must be one of {listed}, got {s.noise!r}: write noise={NOISES[0]!r}")


def _run(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    started = (launch_gather_start if _kernel_takes(x) else gather_start_reference)(x, *others)
    state: Tensor = others[2]
    state[1].add_(1)  # a separate launch: while the other runs, all of it must see the old offset
    return started


_gather_start = define_op(
    "gather_start(Tensor x, Tensor? order, Tensor? steps, Tensor(a3!) state, str noise, float scale, float? lower, "
    "float? upper, Tensor? samples) -> (Tensor, Tensor)",
    check=lambda *given: _check(Start(*given)),
    run=_run,
    results=lambda x, *_: (_like(x), _like(x)),
)
