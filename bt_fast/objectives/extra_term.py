"""A further term of a loss, by a function of the user's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from bt_fast.attack.pixels import Normalize
from bt_fast.objectives.update_order import in_callers_order
from bt_fast.ops.numeric import kind_of
from bt_fast.plan import MinedPlan, Plan
from bt_fast.validation import check_device


@dataclass(frozen=True, eq=False)
class UpdateBatch:
    """A minibatch of m samples in a loss's update, for its further term. All rows are in the caller's order.

    In the proxy's pass of `AWP(samples="moved")` it holds the samples that moved alone, by descending steps; of
    `PGDLoss` those that have weights above 0 alone, where others do not.

    Attributes:
        logits: [m, K] with gradient, of the update's clean forward; None for a loss that has none.
        adversarial_logits: [m, K] with gradient, of its adversarial forward; the clean ones for samples it leaves out.
        y: [m] int64, or [m, K] distributions in the width of the logits (float32 at least).
        x: [m, ...], as given. x_adv: [m, ...], x', in the units of x.
        weights: [m] float64, how often each sample counts in the adversarial term; None: each once.
    """

    logits: Tensor | None
    adversarial_logits: Tensor
    y: Tensor
    x: Tensor
    x_adv: Tensor
    weights: Tensor | None = None


Extra = Callable[[UpdateBatch], Tensor]


def check_extra(extra: Extra | None) -> None:
    """Raise TypeError unless it is a function, or None."""
    if extra is not None and not callable(extra):
        raise TypeError(
            f"extra must be a function of an UpdateBatch, got {type(extra).__name__}: write extra=lambda batch: ..."
        )


@dataclass(frozen=True, eq=False)
class ExtraTerm:
    """The further term of one minibatch."""

    function: Extra
    x: Tensor  # [m, ...], as the caller gave it
    plan: Plan
    normalize: Normalize | None  # makes images like x of pixels; None where they are pixels

    def added(self, loss: Tensor, clean: Tensor | None, adversarial_logits: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """The loss with the term, in the loss's dtype. All rows given are the first in the plan's sorted order.

        Raises:
            TypeError, ValueError: the function returned no floating-point number, 0-dim, on the device of the loss.
        """
        term = self.function(self._batch(clean, adversarial_logits, x_adv, y))
        if not isinstance(term, Tensor) or not term.is_floating_point():
            raise TypeError(
                f"extra must return a floating-point tensor, got {kind_of(term)}: let it end with .mean() of a tensor"
            )
        if term.dim() != 0:
            raise ValueError(
                f"extra must return one number, 0-dim, got shape {list(term.shape)}: let it end with .mean()"
            )
        total = loss + term.to(loss.dtype)
        check_device("extra's result", total, loss.device, "the loss")  # a number on the CPU goes with any
        return total

    def _batch(self, clean: Tensor | None, adversarial_logits: Tensor, x_adv: Tensor, y: Tensor) -> UpdateBatch:
        n, order, unsort = len(y), self.plan.order, self.plan.unsort
        weights = self.plan.weights if isinstance(self.plan, MinedPlan) else None
        if n < len(self.x) and order is not None:  # those that moved
            images = self.x[order[:n]], x_adv if self.normalize is None else self.normalize(x_adv)
            return UpdateBatch(clean, adversarial_logits, y, *images, None if weights is None else weights[order[:n]])
        x_adv = in_callers_order(x_adv, self.x, self.plan, self.normalize)
        logits = None if clean is None else unsort(clean)
        return UpdateBatch(logits, unsort(adversarial_logits), unsort(y), self.x, x_adv, weights)
