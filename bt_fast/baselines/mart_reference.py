"""MART with its authors' computation, step by step: the baseline of every speedup, not for use in training.

It runs 26 forward-pass equivalents for ten steps, like ours without BulletTrain.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bt_fast.baselines.pgd_reference import cross_entropy_attack
from bt_fast.ranges import UPDATE, range_


def mart_reference_loss(
    model: nn.Module,
    x_natural: Tensor,
    y: Tensor,
    optimizer: torch.optim.Optimizer,
    step_size: float = 0.007,
    epsilon: float = 0.031,
    perturb_steps: int = 10,
    beta: float = 6.0,
) -> Tensor:
    """Computes the ℓ∞ MART loss at its authors' cost; arguments and result as for `bt_fast.mart_loss`, unchecked."""
    model.eval()
    start = x_natural.detach() + 0.001 * torch.randn(x_natural.shape, device="cpu").to(x_natural.device)
    x_adv = cross_entropy_attack(model, x_natural, y, start, step_size, epsilon, perturb_steps)
    model.train()
    optimizer.zero_grad()
    with range_(UPDATE):
        logits = model(x_natural)
        logits_adv = model(x_adv)
        adv_probs = F.softmax(logits_adv, dim=1)
        largest = torch.argsort(adv_probs, dim=1)[:, -2:]
        runner_up = torch.where(largest[:, -1] == y, largest[:, -2], largest[:, -1])
        adversarial = F.cross_entropy(logits_adv, y) + F.nll_loss(torch.log(1.0001 - adv_probs + 1e-12), runner_up)
        nat_probs = F.softmax(logits, dim=1)
        true_probs = torch.gather(nat_probs, 1, y.unsqueeze(1)).squeeze(1)
        kl = F.kl_div(torch.log(adv_probs + 1e-12), nat_probs, reduction="none").sum(dim=1)
        return adversarial + beta * (kl * (1.0000001 - true_probs)).sum() / len(x_natural)
