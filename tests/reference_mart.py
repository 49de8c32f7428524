"""MART like its authors' code, written from spec.md section 3: slow, and the reference of the tests.

Their generator has no ℓ2 attack. Here it is the attack of TRADES' code on the cross-entropy.
"""

import torch
import torch.nn.functional as F


def linf_attack(model, x, y, start, step_size, epsilon, steps):
    x_adv = start
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        with torch.enable_grad():
            inner = F.cross_entropy(model(x_adv), y)
        (grad,) = torch.autograd.grad(inner, x_adv)
        x_adv = x_adv.detach() + step_size * grad.sign()
        x_adv = torch.minimum(torch.maximum(x_adv, x - epsilon), x + epsilon).clamp(0.0, 1.0)
    return x_adv


def l2_attack(model, x, y, delta, step_size, epsilon, steps):
    for _ in range(steps):
        delta = delta.detach().requires_grad_()
        with torch.enable_grad():
            outer = -F.cross_entropy(model(x + delta), y)
        (grad,) = torch.autograd.grad(outer, delta)
        norms = grad.flatten(1).norm(dim=1)
        descent = grad / norms.view(-1, 1, 1, 1)
        if (norms == 0).any():
            descent[norms == 0] = torch.randn(descent[norms == 0].shape).to(x.dtype)
        delta = delta.detach() - step_size * descent
        delta = ((x + delta).clamp(0.0, 1.0) - x).renorm(p=2, dim=0, maxnorm=epsilon)
    return (x + delta).clamp(0.0, 1.0)


def loss_of_logits(logits, logits_adv, y, beta):
    """The authors' own lines."""
    kl = torch.nn.KLDivLoss(reduction="none")
    adv_probs = F.softmax(logits_adv, dim=1)
    tmp1 = torch.argsort(adv_probs, dim=1)[:, -2:]
    new_y = torch.where(tmp1[:, -1] == y, tmp1[:, -2], tmp1[:, -1])
    loss_adv = F.cross_entropy(logits_adv, y) + F.nll_loss(torch.log(1.0001 - adv_probs + 1e-12), new_y)
    nat_probs = F.softmax(logits, dim=1)
    true_probs = torch.gather(nat_probs, 1, y.unsqueeze(1)).squeeze(1)
    weighted = torch.sum(kl(torch.log(adv_probs + 1e-12), nat_probs), dim=1) * (1.0000001 - true_probs)
    return loss_adv + beta * (1.0 / len(y)) * torch.sum(weighted)


def mart_loss(model, x, y, optimizer, step_size=0.007, epsilon=0.031, perturb_steps=10, beta=6.0, distance="l_inf"):
    model.eval()
    noise = 0.001 * torch.randn(x.shape)
    if distance == "l_inf":
        x_adv = linf_attack(model, x, y, x + noise, step_size, epsilon, perturb_steps)
    else:
        noise = 0.001 * torch.randn(x.shape)
        x_adv = l2_attack(model, x, y, noise.to(x.dtype), 2.0 * epsilon / perturb_steps, epsilon, perturb_steps)
    model.train()
    optimizer.zero_grad()
    logits = model(x)
    return loss_of_logits(logits, model(x_adv), y, beta)
