"""Adversarial training as in Madry et al., in ℓ2 along the normalised gradient: the reference of the tests.

The start is drawn in the images' dtype.
"""

import torch
import torch.nn.functional as F
from reference_mart import l2_attack, linf_attack


def uniform_start(x, epsilon, distance):
    if distance == "l_inf":
        noise = epsilon * (2 * torch.rand(x.shape, dtype=x.dtype) - 1)
    else:
        direction = torch.randn(x.shape, dtype=x.dtype).flatten(1)
        radius = epsilon * torch.rand(len(x), 1, dtype=x.dtype) ** (1 / direction.shape[1])
        noise = (radius * direction / direction.norm(dim=1, keepdim=True)).view(x.shape)
    return (x + noise).clamp(0.0, 1.0)


def pgd_loss(model, x, y, optimizer, step_size=0.007, epsilon=0.031, perturb_steps=10, distance="l_inf"):
    model.eval()
    start = uniform_start(x, epsilon, distance)
    if distance == "l_inf":
        x_adv = linf_attack(model, x, y, start, step_size, epsilon, perturb_steps)
    else:
        x_adv = l2_attack(model, x, y, start - x, step_size, epsilon, perturb_steps)
    model.train()
    optimizer.zero_grad()
    return F.cross_entropy(model(x_adv), y)
