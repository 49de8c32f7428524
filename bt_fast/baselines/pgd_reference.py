"""Adversarial training as Madry et al. (2018) describe it: a baseline of speedups, not for use in training.

It runs 23 forward-pass equivalents for ten steps, like ours without BulletTrain.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bt_fast.ranges import ATTACK_STEP, UPDATE, range_


def pgd_reference_loss(
    model: nn.Module,
    x_natural: Tensor,
    y: Tensor,
    optimizer: torch.optim.Optimizer,
    step_size: float = 0.007,
    epsilon: float = 0.031,
    perturb_steps: int = 10,
) -> Tensor:
    """Computes the ℓ∞ loss; arguments and result as for `bt_fast.pgd_loss`, unchecked."""
    model.eval()
    noise = torch.rand(x_natural.shape, dtype=x_natural.dtype, device=x_natural.device)
    start = (x_natural + epsilon * (2.0 * noise - 1.0)).clamp(0.0, 1.0)
    x_adv = cross_entropy_attack(model, x_natural, y, start, step_size, epsilon, perturb_steps)
    model.train()
    optimizer.zero_grad()
    with range_(UPDATE):
        return F.cross_entropy(model(x_adv), y)


def cross_entropy_attack(
    model: nn.Module, x: Tensor, y: Tensor, start: Tensor, step_size: float, epsilon: float, steps: int
) -> Tensor:
    """Climbs the cross-entropy in ℓ∞ from `start`, projected; the model is in eval mode."""
    x_adv = start
    for _ in range(steps):
        with range_(ATTACK_STEP):
            x_adv.requires_grad_()
            with torch.enable_grad():
                inner = F.cross_entropy(model(x_adv), y)
            (grad,) = torch.autograd.grad(inner, [x_adv])
            x_adv = x_adv.detach() + step_size * grad.sign()
            x_adv = torch.min(torch.max(x_adv, x - epsilon), x + epsilon).clamp(0.0, 1.0)
    return x_adv
