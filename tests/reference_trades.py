"""TRADES like its authors' code, written from spec.md section 3: slow, and the reference of the tests.

The only difference: the ℓ2 perturbation, which they draw and hold in the default dtype, has the images' dtype.
"""

import torch
import torch.nn.functional as F


def divergence(model, x_adv, x):
    return F.kl_div(F.log_softmax(model(x_adv), dim=1), F.softmax(model(x), dim=1), reduction="sum")


def linf_attack(model, x, start, step_size, epsilon, steps):
    x_adv = start
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        with torch.enable_grad():
            inner = divergence(model, x_adv, x)
        (grad,) = torch.autograd.grad(inner, x_adv)
        x_adv = x_adv.detach() + step_size * grad.sign()
        x_adv = torch.minimum(torch.maximum(x_adv, x - epsilon), x + epsilon).clamp(0.0, 1.0)
    return x_adv


def l2_attack(model, x, delta, epsilon, steps):
    """Minimises -KL by SGD with learning rate 2ε/N on a normalised gradient, like the authors."""
    for _ in range(steps):
        delta = delta.detach().requires_grad_()
        with torch.enable_grad():
            outer = -divergence(model, x + delta, x)
        (grad,) = torch.autograd.grad(outer, delta)
        norms = grad.flatten(1).norm(dim=1)
        descent = grad / norms.view(-1, 1, 1, 1)
        if (norms == 0).any():
            descent[norms == 0] = torch.randn(descent[norms == 0].shape).to(x.dtype)
        delta = delta.detach() - 2.0 * epsilon / steps * descent
        delta = ((x + delta).clamp(0.0, 1.0) - x).renorm(p=2, dim=0, maxnorm=epsilon)
    return (x + delta).clamp(0.0, 1.0)


def trades_loss(model, x, y, optimizer, step_size=0.003, epsilon=0.031, perturb_steps=10, beta=1.0, distance="l_inf"):
    model.eval()
    noise = 0.001 * torch.randn(x.shape)
    if distance == "l_inf":
        x_adv = linf_attack(model, x, x + noise, step_size, epsilon, perturb_steps)
    else:
        noise = 0.001 * torch.randn(x.shape)
        x_adv = l2_attack(model, x, noise.to(x.dtype), epsilon, perturb_steps)
    model.train()
    optimizer.zero_grad()
    natural = F.cross_entropy(model(x), y)
    return natural + beta * divergence(model, x_adv, x) / len(x)
