"""PGD adversarial training (Madry et al., 2018): the loss, and the same as a function."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from bt_fast.attack.apgd import APGD
from bt_fast.attack.logits import Select
from bt_fast.attack.pgd import PGD
from bt_fast.attack.start import Noise
from bt_fast.engine import Engine
from bt_fast.memory import Memory
from bt_fast.mining import BulletTrain
from bt_fast.objectives import drop_in
from bt_fast.objectives.cross_entropy import CrossEntropy, Smoothed, Smoothing
from bt_fast.objectives.extra_term import Extra
from bt_fast.objectives.loss import AdversarialLoss
from bt_fast.placement import Placement

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from bt_fast.objectives.drop_in import Deprecated


class PGDLoss(Smoothed, AdversarialLoss):
    """The cross-entropy `CE(h(x'), y)` of adversarial training: `criterion(model, x, y).backward()`.

    Of Madry et al. (2018). x' climbs the cross-entropy from a point drawn uniformly from the ε-ball. It takes 23
    forward-pass equivalents for ten steps. Batch norm sees only x', once. With `mining` a sample with 0 steps has no
    random start either: its x' is x, and takes part in the update's only forward; robust samples for which others stand
    (`HalfDrawn`) do not. Without `mining` there is no clean forward before the attack: NaN in the first two samples'
    logits is raised as such, in another sample's as NaN in its input gradient.

    Args:
        attack, mining, engine, label_smoothing, smoothing, extra, logits, memory: as for `TRADESLoss`, with its
            errors; a batch of the further term has no `logits`.
    """

    clean_forwards = 0
    default_start: ClassVar[Noise] = "uniform"
    drop_in = "pgd_loss"

    def __init__(
        self,
        attack: PGD | APGD,
        *,
        mining: BulletTrain | None = None,
        engine: Engine | str = "fast",
        label_smoothing: float = 0.0,
        smoothing: Smoothing = "torch",
        extra: Extra | None = None,
        logits: Select | None = None,
        memory: Memory | None = None,
    ) -> None:
        super().__init__(attack, mining=mining, engine=engine, extra=extra, logits=logits, memory=memory)
        self.cross_entropy = CrossEntropy(label_smoothing, smoothing)

    def graph_key(self) -> CrossEntropy:
        """How the labels are smoothed."""
        return self.cross_entropy

    def objective(self, clean_logits: Tensor | None, adversarial_logits: Tensor, y: Tensor) -> Tensor:
        """The cross-entropy of adversarial_logits [m, K] and y, [m] or [m, K]; there are no clean_logits."""
        return self.cross_entropy(adversarial_logits, y)

    def weighted_objective(
        self, clean_logits: Tensor | None, adversarial_logits: Tensor, y: Tensor, weights: Tensor
    ) -> Tensor:
        """The `objective` of adversarial_logits and y with weights, [n] of rows above 0; there are no clean_logits."""
        rows = self.cross_entropy.of_rows(adversarial_logits, y)
        weights = weights.to(rows.dtype)
        return (rows * weights).sum() / weights.sum()

    def extra_repr(self) -> str:
        """The configuration, as it would be written."""
        return super().extra_repr() + self.cross_entropy.options()


def pgd_loss(
    model: nn.Module,
    x_natural: Tensor,
    y: Tensor,
    optimizer: torch.optim.Optimizer | None,
    step_size: float = 0.007,
    epsilon: float = 0.031,
    perturb_steps: int = 10,
    distance: str = "l_inf",
    *,
    bullet: BulletTrain | None = None,
    engine: Engine | str = "exact",
    generator: torch.Generator | None = None,
    memory: Memory | None = None,
    indices: Tensor | None = None,
    placement: Placement | None = None,
    **deprecated: Unpack[Deprecated],
) -> Tensor:
    """`PGDLoss` as a function, with arguments like those of `trades_loss`.

    Args:
        model, x_natural, y, optimizer, epsilon, perturb_steps, distance: as for `trades_loss`, with its result and
            its errors.
        bullet, engine, generator, memory, indices, placement, deprecated: likewise.
        step_size: α > 0 (with `bullet`: of the boundary samples), in pixel units; in ℓ2 the length of a step. Not used
            with `memory`.
    """
    given = drop_in.Given(
        model, x_natural, y, optimizer, step_size, epsilon, perturb_steps, distance, bullet, engine, generator,
        memory, indices, placement,
    )  # fmt: skip
    return drop_in.call(PGDLoss, given, deprecated)
