"""TRADES with its authors' computation, step by step: the baseline of every speedup, not for use in training.

It runs 39 forward-pass equivalents for ten steps: the clean forward again in each step, three forwards in the loss, and
batch norm frozen by switching the whole model to eval mode and then to train mode.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bt_fast.ranges import ATTACK_STEP, UPDATE, range_


def trades_reference_loss(
    model: nn.Module,
    x_natural: Tensor,
    y: Tensor,
    optimizer: torch.optim.Optimizer,
    step_size: float = 0.003,
    epsilon: float = 0.031,
    perturb_steps: int = 10,
    beta: float = 1.0,
) -> Tensor:
    """The ℓ∞ TRADES loss at its authors' cost; arguments and result as for `bt_fast.trades_loss`, unchecked."""
    model.eval()
    x_adv = x_natural.detach() + 0.001 * torch.randn(x_natural.shape, device="cpu").to(x_natural.device)
    for _ in range(perturb_steps):
        with range_(ATTACK_STEP):
            x_adv.requires_grad_()
            with torch.enable_grad():
                inner = _kl_sum(model(x_adv), model(x_natural))
            (grad,) = torch.autograd.grad(inner, [x_adv])
            x_adv = x_adv.detach() + step_size * grad.sign()
            x_adv = torch.min(torch.max(x_adv, x_natural - epsilon), x_natural + epsilon).clamp(0.0, 1.0)
    model.train()
    optimizer.zero_grad()
    with range_(UPDATE):
        natural = F.cross_entropy(model(x_natural), y)
        robust = _kl_sum(model(x_adv), model(x_natural)) / len(x_natural)
        return natural + beta * robust


def _kl_sum(logits: Tensor, target_logits: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(logits, dim=1), F.softmax(target_logits, dim=1), reduction="sum")
