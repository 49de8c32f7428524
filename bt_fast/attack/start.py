"""Starting points of an attack: the clean image plus a little noise, or a point anywhere in the ball."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from bt_fast import ops
from bt_fast.attack.threat import ThreatModel
from bt_fast.ops.gather_start import unit_noise
from bt_fast.ops.numeric import per_sample

Noise = Literal["normal", "uniform", "clean", "surface"]  # the last is APGD's "uniform"
TRADES_NOISE = 0.001  # standard deviation of the normal start
AGAINST_ZERO = 1e-12  # added to norms, as AutoAttack does
_SURFACE: dict[str, Literal["normal", "uniform"]] = {"l_inf": "uniform", "l_2": "normal"}


def normal_noise(x: Tensor, generator: torch.Generator | None, *, on_cpu: bool = False) -> Tensor:
    """Returns the TRADES start's `0.001·N(0, 1)`, in the shape of `x`, drawn by a generator on its device.

    With `on_cpu` it is drawn like in the TRADES code, in the default dtype from the CPU's default generator, so that a
    seeded script repeats its numbers.
    """
    if on_cpu:
        return TRADES_NOISE * torch.randn(x.shape, device="cpu")
    return TRADES_NOISE * torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)


def ball_start(
    x: Tensor, threat: ThreatModel, generator: torch.Generator | None = None, epsilon: Tensor | None = None
) -> Tensor:
    """`x` [n, ...] moved to a point drawn uniformly from its ε-ball, then clamped to the pixel bounds.

    The generator is on the images' device; without it the device's default one draws. `epsilon` [n] is each sample's
    own, in place of the threat model's.
    """
    given: dict[str, Any] = {"dtype": x.dtype, "device": x.device, "generator": generator}
    if threat.norm == "l_inf":
        delta = 2.0 * torch.rand(x.shape, **given) - 1.0
        delta = delta * threat.epsilon if epsilon is None else ops.wide(delta) * radius_of(epsilon, x)
    else:
        direction = torch.randn(x.shape, **given)
        delta = _in_l2_ball(direction, torch.rand(len(x), **given), threat.epsilon if epsilon is None else epsilon)
    return _within_bounds(x + delta, x, threat)


def surface_start(
    x: Tensor, threat: ThreatModel, generator: torch.Generator | None = None, epsilon: Tensor | None = None
) -> Tensor:
    """`x` [n, ...] moved onto the ε-ball's surface, as AutoAttack starts, then clamped; drawn as for `ball_start`.

    `x + ε·t / ‖t‖`, in ℓ∞ with t uniform in [-1, 1] (its largest entry is moved by ε), in ℓ2 with t normal.
    """
    given: dict[str, Any] = {"dtype": x.dtype, "device": x.device, "generator": generator}
    direction = 2.0 * torch.rand(x.shape, **given) - 1.0 if threat.norm == "l_inf" else torch.randn(x.shape, **given)
    return _on_surface(x, direction, threat, epsilon)


def random_state(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Returns a seed and an offset for `sorted_start`, drawn on the images' device."""
    return torch.randint(torch.iinfo(torch.int64).max, (2,), device=x.device, generator=generator)


def state_of_seed(x: Tensor, generator: torch.Generator | None, offset: int = 0) -> Tensor:
    """Returns the generator's (or the device's) last seed, and an offset. Draws nothing."""
    if generator is not None:
        seed = generator.initial_seed()
    else:
        seed = torch.cuda.initial_seed() if x.is_cuda else torch.initial_seed()
    state = torch.full((2,), offset, dtype=torch.int64, device=x.device)
    state[0].fill_(seed - 2**64 if seed >= 2**63 else seed)
    return state


def sorted_start(
    x: Tensor,
    order: Tensor | None,
    steps: Tensor | None,
    state: Tensor,
    noise: Noise,
    threat: ThreatModel,
    samples: Tensor | None = None,
    epsilon: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the batch in sorted order, and its starts of the attack with counter-based noise.

    The noise of a sample depends neither on the order nor on its neighbours in the batch. A sample without steps starts
    exactly at x. Never waits for the device.

    Args:
        x: [m, ...], order: [m], steps: [m], state: [2], samples: [m]; as `ops.gather_start`, which makes the noise.
        noise: "normal" as TRADES, without a bound, or "uniform" in the ε-ball and clamped to the pixel bounds; in ℓ2
            from a normal direction and a radius, which is drawn at the next offset (`state` moves on by two). "clean"
            is x, and `state` stays; "surface" as `surface_start`.
        epsilon: [m], of each sample in place of the threat model's.

    Returns:
        clean and start, both new, of x's shape and dtype.
    """
    if noise == "normal":
        return ops.gather_start(x, order, steps, state, "normal", TRADES_NOISE, samples=samples)
    if noise == "uniform" and threat.norm == "l_inf" and epsilon is None:
        box = (threat.lower, threat.upper)
        return ops.gather_start(x, order, steps, state, "uniform", threat.epsilon, *box, samples)
    clean = x.clone() if order is None else x[order]
    if noise == "clean":
        return clean, clean.clone()
    rows = torch.arange(len(x), device=x.device) if order is None else order
    own = threat.epsilon if epsilon is None else epsilon[rows]
    _, delta = ops.gather_start(torch.zeros_like(x), order, None, state, _SURFACE[threat.norm], 1.0, samples=samples)
    if noise == "surface":
        delta = _of_length_one(delta, threat) * radius_of(own, x)
    elif threat.norm == "l_inf":
        delta = ops.wide(delta) * radius_of(own, x)
    else:
        share = unit_noise(rows if samples is None else samples[rows], 1, state, "uniform")[:, 0].abs()
        state[1].add_(1)
        delta = _in_l2_ball(delta, share, own)
    moved = _within_bounds(ops.wide(clean) + delta, x, threat)
    return clean, moved if steps is None else torch.where(per_sample(steps[rows] > 0, x), moved, clean)


def uniform_start(x: Tensor, samples: Tensor, restart: int, threat: ThreatModel, seed: Tensor) -> Tensor:
    """Returns `ball_start` of x [n, ...] with counter-based noise (`ops.gather_start`'s Philox), for evaluation.

    The noise depends on the seed (0-dim int64), the restart, the sample's number (`samples`, [n] int64 in 0..2^32-1)
    and the pixel alone.
    """
    length, dtype = math.prod(x.shape[1:]), torch.promote_types(x.dtype, torch.float32)
    if threat.norm == "l_inf":
        delta = _noise(samples, length, seed, 2 * restart, "uniform").to(dtype) * threat.epsilon
    else:
        direction = _noise(samples, length, seed, 2 * restart, "normal").to(dtype)
        uniform = (_noise(samples, 1, seed, 2 * restart + 1, "uniform")[:, 0] + 1) / 2
        delta = _in_l2_ball(direction, uniform, threat.epsilon)
    return _within_bounds(x + delta.view(x.shape), x, threat)


def numbered_start(x: Tensor, noise: Noise, samples: Tensor, restart: int, threat: ThreatModel, seed: Tensor) -> Tensor:
    """Starts of x [n, ...], x itself for "clean", with the noise of a counter as `uniform_start`."""
    if noise == "clean":
        return x
    if noise == "uniform":
        return uniform_start(x, samples, restart, threat, seed)
    numbers = _noise(samples, math.prod(x.shape[1:]), seed, 2 * restart, _SURFACE[threat.norm])
    return _on_surface(x, numbers.view(x.shape), threat)


def given_start(start: Tensor, x: Tensor, threat: ThreatModel, epsilon: Tensor | None = None) -> Tensor:
    """`start` [n, ...], or where it is outside of the ε-ball of x and the pixel bounds the nearest point to it inside.

    In ℓ2 it is moved into the ball and then onto the bounds. `epsilon` [n] is each sample's own.
    """
    radius = threat.epsilon if epsilon is None else epsilon
    return _within_bounds(into_ball(ops.wide(start.to(x.dtype)), ops.wide(x), threat, radius), x, threat)


def into_ball(points: Tensor, clean: Tensor, threat: ThreatModel, epsilon: float | Tensor) -> Tensor:
    """Each point [n, ...], or the nearest one to it in the ε-ball of its clean image; one in the ball stays as it is.

    `epsilon` is of all, or [n]. It computes in the dtype of points and clean images, in ℓ2 not in 16 bits.
    """
    radius = radius_of(epsilon, clean)
    if threat.norm == "l_inf":
        return points.clamp(clean - radius, clean + radius)
    delta = points - clean
    length = per_sample(delta.flatten(1).norm(dim=1), clean)
    return torch.where(length > radius, clean + delta * (radius / length), points)


def radius_of(epsilon: float | Tensor, x: Tensor) -> float | Tensor:
    """ε of all, or [n], to broadcast against images like x."""
    return per_sample(epsilon, x) if isinstance(epsilon, Tensor) else epsilon


def _within_bounds(moved: Tensor, x: Tensor, threat: ThreatModel) -> Tensor:
    return moved.clamp(threat.lower, threat.upper).to(x.dtype)


def _on_surface(x: Tensor, direction: Tensor, threat: ThreatModel, epsilon: Tensor | None = None) -> Tensor:
    """x [n, ...] moved by ε along each direction, in the norm of the threat, and clamped."""
    delta = _of_length_one(direction, threat) * radius_of(threat.epsilon if epsilon is None else epsilon, x)
    return _within_bounds(ops.wide(x) + delta, x, threat)


def _of_length_one(direction: Tensor, threat: ThreatModel) -> Tensor:
    """Each direction [n, ...] with the length 1 in the norm of the threat."""
    order = math.inf if threat.norm == "l_inf" else 2
    direction = ops.wide(direction)
    norms = torch.linalg.vector_norm(direction.flatten(1), order, dim=1) + AGAINST_ZERO
    return direction / per_sample(norms, direction)


def _noise(samples: Tensor, length: int, seed: Tensor, offset: int, noise: Noise) -> Tensor:
    return unit_noise(samples, length, torch.stack([seed, torch.full_like(seed, offset)]), noise)


def _in_l2_ball(direction: Tensor, share: Tensor, epsilon: float | Tensor) -> Tensor:
    """A uniform point of the ball of d dimensions: along a normal `direction` [n, ...], at radius ε·share^(1/d)."""
    direction = ops.wide(direction)
    radius = epsilon * ops.wide(share).to(direction.dtype) ** (1.0 / direction[0].numel())
    norms = direction.flatten(1).norm(dim=1).clamp_min(torch.finfo(direction.dtype).tiny)
    return direction * per_sample(radius / norms, direction)
