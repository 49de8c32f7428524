"""One step of forks of TRADES and of PGD training, from what their code does: slow, and the standard to compare with.

Their attacks run in eval mode here. Each returns the loss; batch norm has moved as it moves there.
"""

import torch
import torch.nn.functional as F
from reference_pgd import uniform_start


def ascended(model, x, start, inner, step_size, epsilon, steps):
    """x' after so many steps along the sign of the gradient of `inner(logits)`."""
    x_adv = start
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        (grad,) = torch.autograd.grad(inner(model(x_adv)), x_adv)
        x_adv = x_adv.detach() + step_size * grad.sign()
        x_adv = torch.minimum(torch.maximum(x_adv, x - epsilon), x + epsilon).clamp(0.0, 1.0)
    return x_adv


def divergence(z_adv, z):
    return F.kl_div(F.log_softmax(z_adv, dim=1), F.softmax(z, dim=1), reduction="batchmean")


def spread_over_the_others(z, y, s):
    """Cross-entropy with 1-s on the label and s/(K-1) on each other class (Bag of Tricks; SCORE's targets)."""
    target = torch.full_like(z, s / (z.shape[1] - 1)).scatter_(1, y[:, None], 1.0 - s)
    return -(target * F.log_softmax(z, dim=1)).sum(dim=1).mean()


def spread_over_all(z, y, s):
    """Cross-entropy with s of it that of a uniform label (DM-Improves-AT's TRADES)."""
    log_q = F.log_softmax(z, dim=1)
    return -((1.0 - s) * log_q.gather(1, y[:, None])[:, 0] + s * log_q.mean(dim=1)).mean()


def dm_improves_at(model, x, y, *, epsilon, step_size, steps, beta, clean_term=None):
    """TRADES from a uniform start, in two moves of batch norm. CutMix' labels [m, K] are the attack's target too."""
    model.eval()
    start, soft = uniform_start(x, epsilon, "l_inf"), y.is_floating_point()
    target = y if soft else F.softmax(model(x), dim=1).detach()

    def inner(z_adv):
        return F.kl_div(F.log_softmax(z_adv, dim=1), target, reduction="batchmean")

    x_adv = ascended(model, x, start, inner, step_size, epsilon, steps)
    model.train()
    z, z_adv = model(x), model(x_adv)
    natural = F.kl_div(F.log_softmax(z, dim=1), y, reduction="batchmean") if soft else clean_term(z, y)
    return natural + beta * divergence(z_adv, z)


def trades_attack(model, x, epsilon, step_size, steps):
    model.eval()
    start = x + 0.001 * torch.randn(x.shape)
    clean = model(x).detach()
    return ascended(model, x, start, lambda z_adv: divergence(z_adv, clean), step_size, epsilon, steps)


def hat(model, helper, x, y, *, epsilon, step_size, steps, beta, gamma, h):
    """TRADES and helper samples x + h·(x' - x), with the labels that a standard network gives x'."""
    x_adv = trades_attack(model, x, epsilon, step_size, steps)
    model.train()
    with torch.no_grad():
        of_helper = helper(x_adv).argmax(dim=1)
    z, z_adv, z_help = model(x), model(x_adv), model(x + h * (x_adv - x))
    return F.cross_entropy(z, y) + beta * divergence(z_adv, z) + gamma * F.cross_entropy(z_help, of_helper)


def lbgat(model, teacher, x, y, *, epsilon, step_size, steps, beta):
    """The adversarial logits learn a teacher's clean ones, and the teacher the labels. (They run x' before x.)"""
    x_adv = trades_attack(model, x, epsilon, step_size, steps)
    model.train()
    z, z_adv = model(x), model(x_adv)
    of_teacher = teacher(x)
    return F.mse_loss(z_adv, of_teacher) + F.cross_entropy(of_teacher, y) + beta * divergence(z_adv, z)


def bag_of_tricks(model, x, labels, *, epsilon, step_size, steps, smoothing):
    """PGD training with smoothed labels. `labels`: ((y, share), ...), as Mixup mixes the losses of two labels.

    (Their forwards of the clean images, for the log, are left out.)
    """
    model.eval()

    def inner(z_adv):
        return sum(share * F.cross_entropy(z_adv, y) for y, share in labels)

    x_adv = ascended(model, x, uniform_start(x, epsilon, "l_inf"), inner, step_size, epsilon, steps)
    model.train()
    z_adv = model(x_adv)
    return sum(share * spread_over_the_others(z_adv, y, smoothing) for y, share in labels)
