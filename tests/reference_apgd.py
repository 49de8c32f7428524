"""APGD (Croce and Hein, 2020, Algorithm 1) for one sample at a time: slow, and the standard to be compared with.

Written from the paper. Where AutoAttack's code is another one, it is as in that code: `periods`, the comparison of the
first iterate with 0, "at most" instead of "less than" ρ, and the norms plus 1e-12.
"""

from dataclasses import dataclass, field
from itertools import pairwise

import torch


@dataclass
class Run:
    """The attack on one sample."""

    iterates: list = field(default_factory=list)  # N + 1 images [1, ...], before any return to the best one
    values: list = field(default_factory=list)  # the inner loss of each
    sizes: list = field(default_factory=list)  # of each step
    best: torch.Tensor = None
    best_value: float = -float("inf")


def cross_entropy(z, y, goal=None):
    return -z.log_softmax(dim=0)[y]


def margin(z, y, goal=None):
    return max(z[k] for k in range(len(z)) if k != y) - z[y]


def dlr(z, y, goal=None):
    first, second, third = sorted(range(len(z)), key=lambda k: -z[k])[:3]
    wrong = second if first == y else first
    return -(z[y] - z[wrong]) / (z[first] - z[third] + 1e-12)


def dlr_targeted(z, y, goal):
    first, _, third, fourth = sorted(range(len(z)), key=lambda k: -z[k])[:4]
    return -(z[y] - z[goal]) / (z[first] - (z[third] + z[fourth]) / 2 + 1e-12)


LOSSES = {"cross_entropy": cross_entropy, "margin": margin, "dlr": dlr, "dlr_targeted": dlr_targeted}


def kl_from(clean_logits):
    """The KL divergence from a sample's clean distribution."""
    log_p = clean_logits.detach().log_softmax(dim=0)

    def kl(z, y, goal=None):
        return (log_p.exp() * (log_p - z.log_softmax(dim=0))).sum()

    return kl


def periods(steps):
    """The lengths of the periods between checkpoints, which lie at their sums."""
    length, least, less = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    while True:
        yield length
        length = max(length - less, least)


def into(z, x, epsilon, norm, bounds=(0.0, 1.0)):
    """The projection onto ball and bounds, as in AutoAttack: one after the other."""
    delta = z - x
    if norm == "linf":
        delta = delta.clamp(-epsilon, epsilon)
    else:
        length = delta.norm()
        delta = delta / (length + 1e-12) * min(epsilon, length)
    return (x + delta).clamp(*bounds)


def apgd(model, x, y, start, epsilon, steps, norm, loss, *, rho=0.75, goal=None):
    """The attack on an image x [1, ...] of the class y from `start` [1, ...]."""

    def look(z):
        z = z.detach().requires_grad_()
        value = loss(model(z)[0], y, goal)
        (grad,) = torch.autograd.grad(value, z)
        run.iterates.append(z.detach())
        run.values.append(float(value.detach()))
        return run.values[-1], grad

    run = Run()
    here, before, size = start, start, 2.0 * epsilon
    value, grad = look(here)
    run.best, run.best_value, best_grad = here, value, grad
    history, checked, halved_before = [0.0], None, True  # 0 stands where the paper has the start's own
    lengths = periods(steps)
    length = next(lengths)
    for t in range(1, steps + 1):
        run.sizes.append(size)
        direction = grad.sign() if norm == "linf" else grad / (grad.norm() + 1e-12)
        step = into(here + size * direction, x, epsilon, norm)
        share = 0.75 if t > 1 else 1.0
        moved = into(here + share * (step - here) + (1 - share) * (here - before), x, epsilon, norm)
        here, before = moved, here
        value, grad = look(here)
        history.append(value)
        if value > run.best_value:
            run.best, run.best_value, best_grad = here, value, grad
        if len(history) - 1 == length:
            rises = sum(b > a for a, b in pairwise(history))
            halve = rises <= rho * length or (not halved_before and checked == run.best_value)
            if halve:
                size, here, grad = size / 2, run.best, best_grad
            checked, halved_before = run.best_value, halve
            history, length = [value], next(lengths)
    return run


def ranked(logits, y):
    """The wrong classes of one row of clean logits, the likeliest first."""
    return sorted((k for k in range(len(logits)) if k != y), key=lambda k: -logits[k])
