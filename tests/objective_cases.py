"""The objectives, their references, and the differences between them."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import reference_mart
import reference_pgd
import reference_trades
import torch
import torch.nn.functional as F

from bt_fast import ThreatModel, mart_loss, pgd_loss, trades_loss
from bt_fast.attack.start import random_state, sorted_start

DISTANCES = ["l_inf", "l_2"]


@dataclass(frozen=True)
class Objective:
    """One loss.

    Attributes:
        reference: the authors' computation.
        noise: of the start.
        robust: it has a robust term beside the natural one: a clean forward in the update, β and `unperturbed`.
        forwards: (in eval mode, in train mode) of the whole batch for ten steps, and those of the reference.
        norm_updates: the number of batches that batch norm sees in one call.
        inner: the attack's loss at (model, x', x, y).
    """

    name: str
    loss: Callable
    reference: Callable
    noise: str
    robust: bool
    forwards: tuple
    reference_forwards: tuple
    norm_updates: int
    inner: Callable

    def __str__(self):
        return self.name

    @property
    def rows_seen_before(self):
        """Returns how many of the 8 rows of a batch are run before the attack without BulletTrain."""
        return 8 if self.name == "trades" else 2

    def options(self, distance):
        """Returns options with five or ten steps and fitting sizes."""
        result = {"epsilon": 0.031, "perturb_steps": 10, "step_size": 0.007}
        if distance == "l_2":
            result = {"epsilon": 0.3, "perturb_steps": 5, "step_size": 0.1}
        return result | {"distance": distance} | ({"beta": 6.0} if self.robust else {})

    def boundary_step(self, options, n):
        """Returns α of a boundary sample that takes n steps."""
        if options["distance"] == "l_2" and self.robust:
            return 2 * options["epsilon"] / max(n, 1)
        return options["step_size"]

    def starts(self, x, generator, options):
        """Returns each sample's start with BulletTrain and this generator, in the batch's own order."""
        threat = ThreatModel(options["epsilon"], options["distance"])
        return sorted_start(x, None, None, random_state(x, generator), self.noise, threat)[1]

    def update(self, model, x, x_adv, y, taken, beta):
        """Runs the update on x' [m, ...], with a corrupted forward of the rows `taken`; returns loss and z' [m, K]."""
        if not self.robust:
            z_adv = model(x_adv)
            return F.cross_entropy(z_adv, y), z_adv
        z = model(x)
        z_adv = z.clone()
        if taken:
            # a single row shares its batch statistics with the first unperturbed one, which has no other effect
            others = [i for i in range(len(x)) if i not in taken][: len(taken) == 1]
            z_adv[taken] = model(x_adv[taken + others])[: len(taken)]
        if self.name == "mart":
            return reference_mart.loss_of_logits(z, z_adv, y, beta), z_adv
        model(x)  # batch norm sees the clean batch twice, as in the authors' code
        robust = F.kl_div(z_adv[taken].log_softmax(1), z[taken].softmax(1), reduction="sum")
        return F.cross_entropy(z, y) + beta / len(x) * robust, z_adv


def cross_entropy(model, x_adv, x, y):
    return F.cross_entropy(model(x_adv), y)


def divergence(model, x_adv, x, y):
    return reference_trades.divergence(model, x_adv, x)


OBJECTIVES = [
    Objective("trades", trades_loss, reference_trades.trades_loss, "normal", True, (11, 2), (20, 3), 3, divergence),
    Objective("mart", mart_loss, reference_mart.mart_loss, "normal", True, (10, 2), (10, 2), 2, cross_entropy),
    Objective("pgd", pgd_loss, reference_pgd.pgd_loss, "uniform", False, (10, 1), (10, 1), 1, cross_entropy),
]
EACH = pytest.mark.parametrize("objective", OBJECTIVES, ids=str)


def moved_one_at_a_time(objective, model, x, y, start, steps, step_size, options):
    """Returns x' of one sample [1, ...] after the given steps, each written out."""
    epsilon = options["epsilon"]
    for _ in range(steps):
        probe = start.detach().requires_grad_()
        (g,) = torch.autograd.grad(objective.inner(model, probe, x, y), probe)
        if options["distance"] == "l_inf":
            start = start + step_size * g.sign()
            start = torch.minimum(torch.maximum(start, x - epsilon), x + epsilon).clamp(0, 1)
        else:
            start = x + ((start + step_size * g / g.norm()).clamp(0, 1) - x).renorm(2, 0, epsilon)
    return start
