"""AutoAttack's two APGDs as a plain loop over whole batches: a sample that is broken stays to the end of its attack."""

import torch
import torch.nn.functional as F

from bt_fast.attack.start import numbered_start

STOOD = -1


def cross_entropy(z, y, goal):
    return F.cross_entropy(z, y, reduction="none")


def dlr_targeted(z, y, goal):
    rows, ordered = torch.arange(len(z), device=z.device), z.sort(dim=1).values
    return -(z[rows, y] - z[rows, goal]) / (ordered[:, -1] - 0.5 * (ordered[:, -3] + ordered[:, -4]) + 1e-12)


def inside(z, x, threat):
    """Into ball and bounds."""
    if threat.norm == "l_inf":
        z = torch.minimum(torch.maximum(z, x - threat.epsilon), x + threat.epsilon)
    else:
        delta = z - x
        length = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        z = x + delta / (length + 1e-12) * length.clamp(max=threat.epsilon)
    return z.clamp(threat.lower, threat.upper)


def direction(grad, threat):
    if threat.norm == "l_inf":
        return grad.sign()
    return grad / (grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 1e-12)


def apgd(model, x, y, start, threat, steps, loss, goal=None, rho=0.75):
    """At which iterate each sample was misclassified first, `STOOD` for never: [n]."""

    def look(z):
        z = z.detach().requires_grad_()
        logits = model(z)
        values = loss(logits, y, goal)
        (grad,) = torch.autograd.grad(values.sum(), z)
        return logits.detach().argmax(dim=1) != y, values.detach(), grad

    fell = torch.full_like(y, STOOD)
    x_adv = before = start
    wrong, values, grad = look(x_adv)
    fell[wrong] = 0
    best, best_values, best_grad = x_adv.clone(), values.clone(), grad.clone()
    checked, halved = best_values.clone(), torch.ones_like(wrong)
    size = torch.full_like(values, 2 * threat.epsilon).view(-1, 1, 1, 1)
    history, since = torch.zeros(steps + 1, len(x), dtype=x.dtype, device=x.device), 0
    period, least, less = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    for t in range(1, steps + 1):
        share = 0.75 if t > 1 else 1.0
        moved = inside(x_adv + size * direction(grad, threat), x, threat)
        moved = inside(x_adv + (moved - x_adv) * share + (x_adv - before) * (1 - share), x, threat)
        x_adv, before = moved, x_adv
        wrong, values, grad = look(x_adv)
        fell[wrong & (fell == STOOD)] = t
        history[t] = values
        better = values > best_values
        best[better], best_values[better], best_grad[better] = x_adv[better], values[better], grad[better]
        since += 1
        if since == period:
            rises = (history[t - period + 1 : t + 1] > history[t - period : t]).sum(dim=0)
            halve = (rises <= rho * period) | (~halved & (checked >= best_values))
            size[halve] /= 2
            x_adv, grad = x_adv.clone(), grad.clone()
            x_adv[halve], grad[halve] = best[halve], best_grad[halve]
            checked, halved, since, period = best_values.clone(), halve, 0, max(period - less, least)
    return fell


def standard(model, batches, threat, steps, targets, seed, *, drop=True):
    """Restart and step in which each sample fell under APGD-CE and APGD-T: [2, total].

    With `drop`, as AutoAttack does it, what an attack broke is not given to the next one: APGD-T has new batches of
    those that stand, and loses the broken ones from target to target. Without, all go through everything.
    """
    batches = list(batches)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    width, numbers = len(batches[0][1]), torch.arange(len(x), device=x.device)
    fate = torch.full((2, len(x)), STOOD, device=x.device)
    with torch.no_grad():
        clean = torch.cat([model(some) for some, _ in batches])
    fate[:, clean.argmax(dim=1) != y] = 0
    goals = clean.scatter(1, y[:, None], -torch.inf).argsort(dim=1, descending=True)

    def attack(rows, restart, loss, goal=None):
        start = numbered_start(x[rows], "surface", numbers[rows], restart, threat, seed)
        fell = apgd(model, x[rows], y[rows], start, threat, steps, loss, goal)
        news = (fell != STOOD) & (fate[0, rows] == STOOD)
        fate[0, rows[news]], fate[1, rows[news]] = restart + 1, fell[news]

    def left(rows):
        return rows[fate[0, rows] == STOOD] if drop else rows

    for rows in left(numbers).split(width):
        attack(rows, 0, cross_entropy)
    for rows in left(numbers).split(width):
        for k in range(targets):
            rows = left(rows)
            if len(rows):
                attack(rows, 1 + k, dlr_targeted, goals[rows, k])
    return fate.cpu()
