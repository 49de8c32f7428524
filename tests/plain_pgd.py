"""A plain loop to compare an evaluation with: every sample takes all steps of all restarts."""

import torch
import torch.nn.functional as F

from bt_fast.attack.start import uniform_start

STOOD = -1


def loss_of(loss, logits, labels, target=None):
    """An inner loss as its paper has it, summed over the samples; `target` is the clean distribution."""
    if loss in ("ce", "cross_entropy"):
        return F.cross_entropy(logits, labels, reduction="sum")
    if loss == "kl":
        return F.kl_div(logits.log_softmax(dim=1), target, reduction="sum")
    if loss == "lse":
        return (logits.softmax(dim=1) - target).square().sum()
    wrong = logits.scatter(1, labels[:, None], -torch.inf).max(dim=1).values
    margin = wrong - logits.gather(1, labels[:, None]).squeeze(1)
    if loss == "dlr":
        ordered = logits.sort(dim=1, descending=True).values
        margin = margin / (ordered[:, 0] - ordered[:, 2] + 1e-12)
    return margin.sum()


def projected_step(x_adv, grad, x, threat, size):
    if threat.norm == "l_inf":
        moved = x_adv + size * grad.sign()
        moved = torch.minimum(torch.maximum(moved, x - threat.epsilon), x + threat.epsilon)
    else:
        norm = grad.flatten(1).norm(dim=1).clamp(min=1e-300).view(-1, 1, 1, 1)
        moved = (x_adv + size * (grad / norm)).clamp(threat.lower, threat.upper)
        moved = x + (moved - x).renorm(p=2, dim=0, maxnorm=threat.epsilon)
    return moved.clamp(threat.lower, threat.upper)


def by_input(loss, x):
    """Returns the gradient with respect to the images alone."""
    return torch.autograd.grad(loss, x)[0]


def plain_loop(model, x, y, threat, *, steps, step_size, restarts, loss, seed, first=0, gradient=by_input):
    """Returns the restart and the step at which each sample was first misclassified: 0, 0 if clean, `STOOD` if never.

    The model is in eval mode; the samples have the numbers `first` and up among those that share the seed.
    """
    numbers = torch.arange(first, first + len(y), device=x.device)
    with torch.no_grad():
        clean = model(x)
        wrong, target = clean.argmax(dim=1) != y, clean.softmax(dim=1)
    restart, step = (torch.where(wrong, 0, STOOD) for _ in range(2))
    for r in range(restarts):
        x_adv = uniform_start(x, numbers, r, threat, seed)
        for t in range(steps + 1):
            x_adv.requires_grad_(t < steps)
            with torch.set_grad_enabled(t < steps):
                logits = model(x_adv)
            falls = (restart == STOOD) & (logits.detach().argmax(dim=1) != y)
            restart[falls], step[falls] = r + 1, t
            if t < steps:
                grad = gradient(loss_of(loss, logits, y, target), x_adv)
                x_adv = projected_step(x_adv.detach(), grad, x, threat, step_size)
    return restart, step
