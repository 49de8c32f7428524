"""MART (Wang et al., 2020): the loss, and the drop-in for the authors' `mart_loss`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bt_fast import ops
from bt_fast.engine import Engine
from bt_fast.mining import BulletTrain
from bt_fast.objectives import drop_in
from bt_fast.objectives.loss import RobustTermLoss

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from bt_fast.objectives.drop_in import Deprecated


class MARTLoss(RobustTermLoss):
    """The MART loss `1/m Σ -log q_y - log(1.0001 - q_r + 1e-12) + β·KL(p ‖ q + 1e-12)·(1.0000001 - p_y)`.

    p = softmax h(x), q = softmax h(x'), and r is the largest wrong class of q. x' climbs the cross-entropy from x plus
    a little noise. Without `mining` and with the engine "exact" it is the authors' result (loss, gradients, batch
    norm's buffers, random numbers) at their 26 forward-pass equivalents for ten steps: nothing can be left out.

    The update runs the clean forward and then the adversarial one: batch norm sees each batch once. Without `mining`
    there is no clean forward before the attack: NaN in the first two samples' logits is raised as such, in another
    sample's as NaN in its input gradient. MART's authors have no ℓ2 attack (theirs stops at the random start): here it
    is the attack of the TRADES code on the cross-entropy.

    Args:
        attack, beta, mining, engine: as for `TRADESLoss`, with its errors.
    """

    step_in_l2_is_its_own = True
    drop_in = "mart_loss"

    def graph_key(self) -> tuple[float]:
        """(β,)."""
        return (self.beta,)

    def objective(self, clean_logits: Tensor | None, adversarial_logits: Tensor, y: Tensor) -> Tensor:
        """The loss of clean_logits and adversarial_logits [m, K], with gradient through both; y is [m] int64."""
        assert clean_logits is not None
        return ops.mart_loss(clean_logits, adversarial_logits, y, self.beta)


def mart_loss(
    model: nn.Module,
    x_natural: Tensor,
    y: Tensor,
    optimizer: torch.optim.Optimizer | None,
    step_size: float = 0.007,
    epsilon: float = 0.031,
    perturb_steps: int = 10,
    beta: float = 6.0,
    distance: str = "l_inf",
    *,
    bullet: BulletTrain | None = None,
    engine: Engine | str = "exact",
    generator: torch.Generator | None = None,
    **deprecated: Unpack[Deprecated],
) -> Tensor:
    """`MARTLoss`, called like the authors' `mart_loss`.

    Args:
        model, x_natural, y, optimizer, step_size, epsilon, perturb_steps, beta, distance, bullet, engine, generator,
            deprecated: as for `trades_loss`, with its result and its errors.
    """
    given = drop_in.Given(
        model, x_natural, y, optimizer, step_size, epsilon, perturb_steps, distance, bullet, engine, generator
    )
    return drop_in.call(MARTLoss, given, deprecated, beta=beta)
