"""AugMix (Hendrycks et al., 2020): chains of random operations, mixed with each other and with the clean image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bt_fast.augment.operations import LEAST_LEVEL, MOST_LEVEL, NONE, OPERATIONS, apply_operations
from bt_fast.validation import check_pixels, real, step_count

CHAINS, DEPTH = 3, 3  # number of chains, and the most operations of a chain
SEVERITY = 3.0


@dataclass(frozen=True, eq=False)
class Choices:
    """Everything that AugMix draws for n samples, as data: with it, `augment_and_mix` is deterministic.

    Attributes:
        operation: [n, 3, 3] int64, each chain's operations in order: indices into `OPERATIONS`, `NONE` from its end on.
        level: [n, 3, 3] float64 in [0.1, severity), the strength of each operation.
        negative: [n, 3, 3] bool, whether an affine map goes the other way.
        weights: [n, 3] float64, of the chains; they sum to 1.
        mixing: [n] float64 in [0, 1), the share of the chains; the rest is the clean image.
    """

    operation: Tensor
    level: Tensor
    negative: Tensor
    weights: Tensor
    mixing: Tensor


def draw_choices(
    n: int, device: torch.device, *, severity: float = SEVERITY, generator: torch.Generator | None = None
) -> Choices:
    """Draws like the authors' code: chains of 1 to 3 operations, Dirichlet(1, 1, 1) weights, Beta(1, 1) mixing.

    Args:
        n: the number of samples, at least 0.
        device: where the choices are drawn.
        severity: the greatest level of an operation, in (0.1, 10].
        generator: on the device; its default generator if not given.

    Raises:
        TypeError, ValueError: n is not an integer of at least 0, or severity not a number in range.
    """
    step_count("n", n)
    check_severity(severity)
    shape = (n, CHAINS, DEPTH)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=torch.float64, device=device, generator=generator)

    depth = torch.randint(1, DEPTH + 1, (n, CHAINS, 1), device=device, generator=generator)
    operation = torch.randint(len(OPERATIONS), shape, device=device, generator=generator)
    weights = torch.empty(n, CHAINS, dtype=torch.float64, device=device).exponential_(generator=generator)
    return Choices(
        operation=operation.where(torch.arange(DEPTH, device=device) < depth, NONE),
        level=LEAST_LEVEL + (severity - LEAST_LEVEL) * uniform(*shape),
        negative=uniform(*shape) > 0.5,
        weights=weights / weights.sum(dim=1, keepdim=True),  # exponential over their sum: Dirichlet(1, 1, 1)
        mixing=uniform(n),
    )


def augment_and_mix(x: Tensor, choices: Choices) -> Tensor:
    """`(1 - m)·x + m·Σ_i w_i·chain_i(x)` with each sample's own choices; the chains work on the bytes `round(255·x)`.

    Args:
        x: [n, C, H, W] floating point in [0, 1].
        choices: for n samples, on the images' device.

    Returns:
        [n, C, H, W] of x's dtype, in [0, 1] up to rounding.

    Raises:
        TypeError, ValueError: x is not floating point or has another shape, or the choices are not for n samples.
    """
    check_images(x, "x")
    n = len(x)
    if len(choices.operation) != n:
        raise ValueError(
            f"choices must be for {n} samples, one for each image, got {len(choices.operation)}: "
            f"write draw_choices({n}, ...)"
        )
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    images = (wide * 255).round().clamp(0, 255).to(torch.uint8).repeat_interleave(CHAINS, dim=0)
    steps = ((t.flatten(0, 1).unbind(dim=1)) for t in (choices.operation, choices.level, choices.negative))
    for operation, level, negative in zip(*steps, strict=True):
        images = apply_operations(images, operation, level, negative)
    chains = images.to(wide.dtype).div(255).view(n, CHAINS, *x.shape[1:])
    weights, mixing = choices.weights.to(wide.dtype), choices.mixing.to(wide.dtype)[:, None, None, None]
    mixed = torch.zeros_like(wide)
    for chain, weight in zip(chains.unbind(dim=1), weights.unbind(dim=1), strict=True):
        mixed = mixed + weight[:, None, None, None] * chain
    return ((1 - mixing) * wide + mixing * mixed).to(x.dtype)


def check_images(x: Tensor, name: str) -> None:
    """Raises TypeError or ValueError that names `name` unless x is floating-point images [n, C, H, W]."""
    check_pixels(x, name)
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(
            f"{name} must have shape [n, C, H, W] with C, H, W >= 1, got {list(x.shape)}: "
            f"of one image write {name}[None]"
        )


def check_severity(severity: float) -> None:
    """Raises TypeError or ValueError unless severity is a number in (0.1, 10]."""
    if not LEAST_LEVEL < real("severity", severity) <= MOST_LEVEL:
        raise ValueError(
            f"severity must lie in ({LEAST_LEVEL:g}, {MOST_LEVEL:g}], got {severity}: "
            "write severity=3, as AugMix's authors"
        )
