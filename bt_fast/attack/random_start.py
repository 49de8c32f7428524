"""Where a restart of an evaluation's attack begins: a sample's own random point, whatever it is batched with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bt_fast.attack.threat import ThreatModel
from bt_fast.ops.gather_start import unit_noise


def uniform_start(x: Tensor, samples: Tensor, restart: int, threat: ThreatModel, seed: Tensor) -> Tensor:
    """`x` [n, ...], each moved to a point drawn uniformly from its ε-ball, then clamped to the pixel bounds.

    The noise is that of a counter (`ops.gather_start`'s Philox): it depends on the seed, the restart, the sample's
    number and the pixel, and neither on what else is in the batch nor on how the images lie in memory.

    Args:
        x: [n, ...] floating point.
        samples: [n] int64 in 0..2^32-1, on the images' device, the number of each sample.
        restart: ≥ 0.
        seed: 0-dim int64, on the images' device.
    """
    length, dtype = math.prod(x.shape[1:]), torch.promote_types(x.dtype, torch.float32)
    if threat.norm == "l_inf":
        delta = _noise(samples, length, seed, 2 * restart, "uniform").to(dtype) * threat.epsilon
    else:
        direction = _noise(samples, length, seed, 2 * restart, "normal").to(dtype)
        uniform = (_noise(samples, 1, seed, 2 * restart + 1, "uniform") + 1) / 2
        norm = direction.norm(dim=1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
        # a ball's volume grows with the radius to the power of its dimension
        delta = direction * (threat.epsilon * uniform.to(dtype) ** (1.0 / length) / norm)
    return (x + delta.view(x.shape)).clamp(threat.lower, threat.upper).to(x.dtype)


def _noise(samples: Tensor, length: int, seed: Tensor, offset: int, noise: str) -> Tensor:
    return unit_noise(samples, length, torch.stack([seed, torch.full_like(seed, offset)]), noise)
