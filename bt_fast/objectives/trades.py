"""TRADES (Zhang et al., 2019): the loss, and the drop-in for the authors' `trades_loss`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from bt_fast import ops
from bt_fast.attack.inner import InnerLoss
from bt_fast.engine import Engine
from bt_fast.memory import Memory
from bt_fast.mining import BulletTrain
from bt_fast.objectives import drop_in
from bt_fast.objectives.cross_entropy import CrossEntropy
from bt_fast.objectives.loss import RobustTermLoss
from bt_fast.placement import Placement

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from bt_fast.objectives.drop_in import Deprecated


class TRADESLoss(RobustTermLoss):
    """The TRADES loss `CE(h(x), y) + β/m · Σ KL(softmax h(x) ‖ softmax h(x'))`: `criterion(model, x, y).backward()`.

    Of Zhang et al. (2019). x' climbs the KL term from x plus a little noise. Without `mining` and with the engine
    "exact" it is the authors' result (loss, gradients, batch norm's buffers) at 27 forward-pass equivalents for ten
    steps instead of their 39.

    The authors' update runs the clean batch twice; the second forward only moves batch norm's buffers, which here move
    without it. A model that draws random numbers in its forward (dropout) runs it twice without `mining`, and once with
    it.

    Of a soft label the first term is `Σ_k -y_k log softmax(h(x))_k`: KL to the label, but for a constant. The attack
    sees the label as it is given, smoothing or not, and with the inner loss "kl" none at all; with "cross_entropy" and
    a soft label it climbs KL to the label.

    Args:
        attack: how images are attacked.
        beta: β ≥ 0, the weight of the robust term.
        mining: decides how many steps each sample gets; None for all alike.
        engine: how attack and update are executed, by name or as an `Engine`.
        label_smoothing: s in [0, 1), of the first term alone.
        smoothing: where s goes: "torch", to all classes alike, as in `F.cross_entropy`, or "others", to the K-1 other
            classes, so that the label keeps 1-s.
        clean_updates: how often the clean batch moves batch norm: "authors", as in the authors' code, which is 2, or 1.
            With 1 there is one clean forward in the update, whatever the model draws. "shared": 1, by a forward in
            train mode that comes before the attack, and whose logits mining and the attack's target take too
            (detached), in place of a forward in eval mode of their own. Mining then looks through the batch's
            statistics. What the forward has computed stays in memory during the attack; its update runs eagerly.
        extra: a further term, as for `AdversarialLoss`.
        logits: a function that takes the logits out of the model's output, where that is not they; as for `Logits`.
        memory: the perturbations of the data set's samples, where attacks start, see `Memory`; calls need `indices`.

    Raises:
        TypeError: an argument is not of its kind.
        ValueError: a number is out of range, a name not known, or attack and mining have different steps.
    """

    clean_forwards = 2
    default_inner: ClassVar[InnerLoss] = "kl"
    step_in_l2_is_its_own = True
    drop_in = "trades_loss"

    def graph_key(self) -> tuple[float, CrossEntropy]:
        """The numbers that a graph fixes: β, and how the labels are smoothed."""
        return self.beta, self.cross_entropy

    def objective(self, clean_logits: Tensor | None, adversarial_logits: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of clean_logits [m, K] and y, [m] or [m, K], and β times the KL term of adversarial_logits."""
        assert clean_logits is not None
        return self.objective_of_two(clean_logits, clean_logits, adversarial_logits, y)

    def weighted_objective(
        self, clean_logits: Tensor | None, adversarial_logits: Tensor, y: Tensor, weights: Tensor
    ) -> Tensor:
        """The `objective` of clean_logits, adversarial_logits and y; each row of KL has its weight of weights [m]."""
        assert clean_logits is not None
        robust = ops.trades_kl(adversarial_logits, clean_logits, weights.to(ops.wide(clean_logits).dtype))
        return self.cross_entropy(clean_logits, y) + self.beta / len(y) * robust

    def objective_of_two(self, first: Tensor, second: Tensor, adversarial_logits: Tensor, y: Tensor) -> Tensor:
        """Like `objective`: y is learnt from `first`, and `second` is the target of adversarial_logits."""
        robust = ops.trades_kl(adversarial_logits, second)
        return self.cross_entropy(first, y) + self.beta / len(y) * robust


def trades_loss(
    model: nn.Module,
    x_natural: Tensor,
    y: Tensor,
    optimizer: torch.optim.Optimizer | None,
    step_size: float = 0.003,
    epsilon: float = 0.031,
    perturb_steps: int = 10,
    beta: float = 1.0,
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
    """`TRADESLoss`, called like the authors' `trades_loss`.

    Args:
        model: maps [m, ...] to logits [m, K]; compiled by `torch.compile` or not.
        x_natural: [m, ...] floating point in [0, 1], m ≥ 1.
        y: [m] integers in 0..K-1, or [m, K] distributions, as for a call of `TRADESLoss`.
        optimizer: its `zero_grad()` is called, as the authors' code does; None leaves the gradients as they are, for
            gradient accumulation.
        step_size: α > 0 in ℓ∞ (with `bullet`: of the boundary samples), in pixel units. Not used in ℓ2, where the
            step is 2ε/N, and with `memory`, whose steps have sizes of their own.
        epsilon: ε ≥ 0, in pixel units; at 0 x' is x.
        perturb_steps: N ≥ 1. With `bullet` its own counts hold, and a value that is neither N_B nor the default is an
            error; with `memory` likewise those of the memory, also for `bullet`, which is given without counts.
        beta: β ≥ 0, the weight of the robust term.
        distance: "l_inf" or "l_2".
        bullet: the mining state, on the images' device. One minibatch moves it once: for another pass over the same
            one, at other weights, call this within `with bullet.again():`.
        engine: "exact", the authors' way, "fast", the same up to rounding, "bf16", or an `Engine`.
        generator: on the images' device, for the random start, as for a call of `TRADESLoss`.
        memory: the perturbations of the data set's samples, made once before the loop, see `Memory`: attacks start
            there, and x' - x is remembered. A further pass in `bullet.again()` remembers nothing.
        indices, placement: as for a call of `TRADESLoss`; `memory` needs `indices`.
        deprecated: keywords of the first version; each warns with the new line.

    Returns:
        0-dim loss with gradient to the model's parameters, ready for `backward()`.

    Raises:
        TypeError, ValueError: as for `TRADESLoss` and its call, with the names of these arguments.
    """
    given = drop_in.Given(
        model, x_natural, y, optimizer, step_size, epsilon, perturb_steps, distance, bullet, engine, generator,
        memory, indices, placement,
    )  # fmt: skip
    return drop_in.call(TRADESLoss, given, deprecated, beta=beta)
