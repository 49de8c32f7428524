"""MART (Wang et al., 2020): the loss, and the drop-in for the authors' `mart_loss`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bt_fast import ops
from bt_fast.engine import Engine
from bt_fast.labels import is_soft
from bt_fast.memory import Memory
from bt_fast.mining import BulletTrain
from bt_fast.objectives import drop_in
from bt_fast.objectives.cross_entropy import CrossEntropy, weighted
from bt_fast.objectives.loss import RobustTermLoss
from bt_fast.placement import Placement

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from bt_fast.objectives.drop_in import Deprecated


class MARTLoss(RobustTermLoss):
    """The MART loss `1/m Σ -log q_y - log(1.0001 - q_r + 1e-12) + β·KL(p ‖ q + 1e-12)·(1.0000001 - p_y)`.

    Of Wang et al. (2020), as their code has it. p = softmax h(x), q = softmax h(x'), and r is the largest wrong class
    of q. x' climbs the cross-entropy from x plus a little noise. Without `mining` and with the engine "exact" it is the
    authors' result (loss, gradients, batch norm's buffers, random numbers) at their 26 forward-pass equivalents for ten
    steps: nothing can be left out.

    The update runs the clean forward and then the adversarial one: batch norm sees each batch once. Without `mining`
    there is no clean forward before the attack: NaN in the first two samples' logits is raised as such, in another
    sample's as NaN in its input gradient. MART's authors have no ℓ2 attack (theirs stops at the random start): here it
    is the attack of the TRADES code on the cross-entropy.

    Of a soft label, or a smoothed one, it is the expectation of that loss over the label, `Σ_k t_k l(y=k)`, as Mixup's
    authors mix losses: MART's have none. The attack sees the label as it is given: of a soft one it climbs KL to it.

    Args:
        attack, beta, mining, engine, label_smoothing, smoothing, extra, logits, memory: as for `TRADESLoss`, with its
            errors; the smoothing is of the label of all of its terms.
        clean_updates: 1, as in the authors' code ("authors"), or "shared", as for `TRADESLoss`; that needs mining, or
            an inner loss of the clean logits.
    """

    step_in_l2_is_its_own = True
    drop_in = "mart_loss"

    def graph_key(self) -> tuple[float, CrossEntropy]:
        """The numbers that a graph fixes: β, and how the labels are smoothed."""
        return self.beta, self.cross_entropy

    def objective(self, clean_logits: Tensor | None, adversarial_logits: Tensor, y: Tensor) -> Tensor:
        """The loss of clean_logits and adversarial_logits [m, K], with gradient through both; y is [m] or [m, K]."""
        assert clean_logits is not None
        return self._of_rows(clean_logits, adversarial_logits, y, None)

    def weighted_objective(
        self, clean_logits: Tensor | None, adversarial_logits: Tensor, y: Tensor, weights: Tensor
    ) -> Tensor:
        """The `objective` of clean_logits, adversarial_logits and y with weights [m], which all of its terms have."""
        assert clean_logits is not None
        return self._of_rows(clean_logits, adversarial_logits, y, weights.to(ops.wide(clean_logits).dtype))

    def _of_rows(self, clean: Tensor, adversarial: Tensor, y: Tensor, weights: Tensor | None) -> Tensor:
        if not is_soft(y) and not self.cross_entropy.label_smoothing:
            return ops.mart_loss(clean, adversarial, y, self.beta, weights)
        rows = _expected(clean, adversarial, self.cross_entropy.target(y, ops.wide(clean)), self.beta)
        return (rows if weights is None else rows * weights).mean()


def _expected(clean_logits: Tensor, adversarial_logits: Tensor, target: Tensor, beta: float) -> Tensor:
    """For each row the mean over labels of MART's loss, where the labels have the distributions `target` [m, K].

    Of a label k the largest wrong class is the first by q, or the second where k is the first. Differences to 1 are
    computed as sums of the other probabilities, as in `ops.mart_loss`.
    """
    log_p, log_q = (F.log_softmax(ops.wide(z), dim=1) for z in (clean_logits, adversarial_logits))
    p, q = log_p.exp(), log_q.exp()
    first, second = log_q.detach().topk(2, dim=1).indices.split(1, dim=1)
    of_first, of_second = (((1e-4 + 1e-12) + _others(q, at)).log() for at in (first, second))
    margin = _others(target, first) * of_first + target.gather(1, first) * of_second
    surest = log_p.detach().argmax(dim=1, keepdim=True)
    wrong = (1.0 - p).scatter(1, surest, _others(p, surest))
    kl = weighted(p, log_p - (q + 1e-12).log())
    return beta * kl * (1e-7 + weighted(target, wrong)) - margin[:, 0] - weighted(target, log_q)


def _others(values: Tensor, at: Tensor) -> Tensor:
    """[m, 1], the sums of the rows of `values` [m, K] without the class `at` [m, 1]."""
    return values.scatter(1, at, 0.0).sum(dim=1, keepdim=True)


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
    memory: Memory | None = None,
    indices: Tensor | None = None,
    placement: Placement | None = None,
    **deprecated: Unpack[Deprecated],
) -> Tensor:
    """`MARTLoss`, called like the authors' `mart_loss`.

    Args:
        model, x_natural, y, optimizer, step_size, epsilon, perturb_steps, beta: as for `trades_loss`, with its result
            and its errors.
        distance, bullet, engine, generator, memory, indices, placement, deprecated: likewise.
    """
    given = drop_in.Given(
        model, x_natural, y, optimizer, step_size, epsilon, perturb_steps, distance, bullet, engine, generator,
        memory, indices, placement,
    )  # fmt: skip
    return drop_in.call(MARTLoss, given, deprecated, beta=beta)
