"""GradAlign (Andriushchenko and Flammarion, 2020): a term that keeps input gradients aligned within the ball."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bt_fast import faults, ops
from bt_fast.attack.forward import gradient_of, logits_of
from bt_fast.attack.pixels import Normalization, on_pixels
from bt_fast.attack.threat import ThreatModel
from bt_fast.attack.wrapped import unwrapped
from bt_fast.baselines.values import SCALE, check_values
from bt_fast.objectives import arguments
from bt_fast.objectives.recomputed import update_modes
from bt_fast.units import warn_of_units
from bt_fast.validation import check_generator, check_labels


def grad_align(
    model: nn.Module,
    x_natural: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    generator: torch.Generator | None = None,
    normalization: Normalization | None = None,
) -> Tensor:
    """The ℓ∞ term `1 - mean cos(∇ₓ CE(x), ∇ₓ CE(x + η))`, added to a loss: `fast_loss(...) + 0.2 * grad_align(...)`.

    As in the authors' code: η is uniform in [-ε, ε] and x + η is not clamped to the pixel bounds; the gradient at x is
    a constant, and that at x + η is differentiated once more, to the parameters; samples with a gradient of exactly 0
    are left out of the mean. (If all are, the term is 0 and so is its gradient; theirs is NaN.) The authors take
    weights from 0.03 to 2, growing with ε: 0.2 for ε = 8/255. Both forwards run in train mode like the update of
    `trades_loss`, and batch norm sees both batches. (In the authors' code the first is the attack's own.)

    Args:
        model: maps [m, ...] to logits [m, K]; twice differentiable.
        x_natural: [m, ...] floating point in [0, 1], m ≥ 1. y: [m] integers in 0..K-1.
        epsilon: ε ≥ 0, in pixel units.
        generator: on the images' device, for η; without it the device's own.
        normalization: the loader's normalisation of the images, as for `trades_loss`.

    Returns:
        0-dim term in 0..2 with gradient to the model's parameters, in the images' dtype or float32, whichever is wider.

    Raises:
        TypeError, ValueError: as for `trades_loss`, before anything has changed. Of the model's values only the first
            two samples' logits are checked: NaN elsewhere, or in a gradient, makes the term NaN.
    """
    epsilon = ThreatModel(epsilon).epsilon
    arguments.check_batch(x_natural, y, "x_natural")
    check_labels(y, len(x_natural), x_natural.device, "y")
    check_generator(generator, x_natural.device)
    warn_of_units(epsilon)
    labels = y.long()
    with on_pixels(unwrapped(model), x_natural, normalization) as (model, pixels):
        x = pixels(x_natural).detach()
        check_values(model, x, labels)
        x = faults.onto_bounds(x, 0.0, 1.0)
        with update_modes(model) as modes:
            fixed = _input_gradient(model, x, labels, differentiable=False)
            noise = torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator)
            moved = _input_gradient(model, x + (2.0 * noise - 1.0) * epsilon, labels, differentiable=True)
            term = _misalignment(ops.wide(fixed).flatten(1), ops.wide(moved).flatten(1))
            modes.again_in_backward([term])
            return term


def _input_gradient(model: nn.Module, x: Tensor, y: Tensor, *, differentiable: bool) -> Tensor:
    """Returns the gradient [m, ...] of the mean cross-entropy by x, times `SCALE`, which does not change a cosine."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        loss = SCALE * F.cross_entropy(ops.wide(logits_of(model, x)), y)
        return gradient_of(loss, x, create_graph=differentiable)


def _misalignment(fixed: Tensor, moved: Tensor) -> Tensor:
    """Returns 1 minus the mean cosine of the rows [m, d], without rows that are 0."""
    counts = (fixed != 0).any(dim=1) & (moved != 0).any(dim=1)
    # a norm's derivative at 0 is NaN, even times 0: those rows become 1 before the norm is taken
    ones = torch.ones_like(fixed)
    a, b = (torch.where(counts[:, None], g / _scale(g), ones) for g in (fixed, moved))
    cosines = (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1))
    return torch.where(counts, 1.0 - cosines, 0.0).sum() / counts.sum().clamp_min(1)


def _scale(gradients: Tensor) -> Tensor:
    """Returns each row's largest entry, or 1: squares of a mean loss's gradients would underflow in float32."""
    largest = gradients.detach().abs().amax(dim=1, keepdim=True)
    return torch.where(largest > 0, largest, 1.0)
