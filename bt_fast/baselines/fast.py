"""FAST (Wong et al., 2020) and its multi-step form: few steps for every sample, from a uniform random start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bt_fast.deciding import STEP_FACTOR
from bt_fast.objectives import drop_in
from bt_fast.objectives.loss import AdversarialLoss
from bt_fast.objectives.mart import MARTLoss, mart_loss
from bt_fast.objectives.pgd import PGDLoss, pgd_loss
from bt_fast.objectives.trades import TRADESLoss, trades_loss
from bt_fast.validation import size, step_count

SINGLE_STEP_FACTOR = 1.25  # α/ε of Wong et al.

# the class of each loss, and the authors' β
_OBJECTIVES: dict[Callable[..., Tensor], tuple[type[AdversarialLoss], dict[str, float]]] = {
    trades_loss: (TRADESLoss, {"beta": 1.0}),
    mart_loss: (MARTLoss, {"beta": 6.0}),
    pgd_loss: (PGDLoss, {}),
}


def fast_loss(
    objective: Callable[..., Tensor],
    model: nn.Module,
    x_natural: Tensor,
    y: Tensor,
    optimizer: torch.optim.Optimizer | None,
    *,
    epsilon: float,
    steps: int = 1,
    step_size: float | None = None,
    **options: Any,
) -> Tensor:
    """Returns the objective's loss on FAST's images: a uniform start in the ε-ball, then `steps` equal steps.

    `fast_loss(pgd_loss, ...)` is the method of Wong et al.; with `trades_loss` and `mart_loss` it gives the rows "+
    FAST" of the BulletTrain paper's Tables 2 and 3, with `steps` > 1 the multi-step variant of its Table 4. The attack
    runs in eval mode, as everywhere here. (The authors' attack runs in train mode and moves batch-norm buffers too.)

    Args:
        objective: `trades_loss`, `mart_loss` or `pgd_loss`.
        model, x_natural, y, optimizer: as for the objective.
        epsilon: ε ≥ 0, in pixel units.
        steps: N ≥ 1.
        step_size: α > 0, in pixel units. By default 1.25·ε for one step, and 1.7·ε/N for more: the paper gives no size
            for Table 4, but this one for all its other attacks. In ℓ2 it is the length of a step of `pgd_loss`; the
            other two always step by 2ε/N.
        options: the objective's other keywords, such as `beta`, `distance` or `generator`.

    Returns:
        0-dim loss with gradient to the model's parameters.

    Raises:
        TypeError, ValueError: as for the objective; or it is not one of the three, or an option contradicts FAST
            (`bullet`, `start`, `memory`, `perturb_steps`, or a `step_size` that the objective would not use).
    """
    if not any(objective is known for known in _OBJECTIVES):
        raise ValueError(
            f"objective must be trades_loss, mart_loss or pgd_loss of bt_fast, got {objective!r}: "
            "write fast_loss(trades_loss, model, ...)"
        )
    epsilon, steps = size("epsilon", epsilon), step_count("steps", steps, least=1)
    _check(options)
    if step_size is None:
        step_size = epsilon * (SINGLE_STEP_FACTOR if steps == 1 else STEP_FACTOR / steps)
    elif options.get("distance") == "l_2" and objective is not pgd_loss:
        raise ValueError("step_size is not used by this objective in l_2, where the step is 2ε/N: leave it out")
    kind, of_loss = _OBJECTIVES[objective]
    defaults = {**of_loss, "distance": "l_inf", "engine": "exact", "generator": None, "bullet": None, "indices": None}
    own = {name: options.pop(name, default) for name, default in defaults.items()}
    beta = {name: own.pop(name) for name in of_loss}
    given = drop_in.Given(
        model, x_natural, y, optimizer, step_size=step_size, epsilon=epsilon, perturb_steps=steps, **own
    )
    return drop_in.call(kind, given, options, start="uniform", function="fast_loss", **beta)


def _check(options: dict[str, Any]) -> None:
    """Raises TypeError or ValueError for options that contradict FAST."""
    if options.get("bullet") is not None:
        raise ValueError(
            "bullet cannot be combined with fast_loss, which spends equal steps on all samples: for BulletTrain from "
            "FAST's start write TRADESLoss(PGD(..., start='uniform'), mining=bullet), or another loss so"
        )
    other = {
        "start": "which is 'uniform' here",
        "perturb_steps": "whose name is steps here",
        "memory": "which says itself where attacks start: give it to the objective",
    }
    for name, instead in other.items():
        if name in options:
            raise TypeError(f"{name} is no option of fast_loss, {instead}")
