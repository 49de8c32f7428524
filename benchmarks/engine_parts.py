"""Runs TRADES with single parts of an engine, for example the attack from graphs without a captured update."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bt_fast import PGD, BulletTrain, Frozen, TRADESLoss, Update
from bt_fast.attack.runners import Runner, run_eager
from bt_fast.objectives.adversarial import Call
from bt_fast.objectives.execution import Execution


def trades_by(
    runner: Runner = run_eager,
    *,
    view: Frozen | None = None,
    update: Update | None = None,
    bullet: BulletTrain | None = None,
) -> Callable[..., Tensor]:
    """Returns a function with the arguments of `trades_loss` that runs attack and update in this way."""
    execution = Execution(view, runner, update)
    call = Call(execution, None, None, None if bullet is None else bullet.unperturbed, None)

    def loss_of(
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        optimizer: torch.optim.Optimizer,
        *,
        step_size: float,
        epsilon: float,
        beta: float,
        perturb_steps: int = 10,
    ) -> Tensor:
        criterion = TRADESLoss(PGD(epsilon, step_size, perturb_steps), beta, mining=bullet, engine="exact")
        loss = criterion.of_call(model, x, y, call)
        optimizer.zero_grad()
        return loss

    return loss_of
