"""The forwards of an update, and the loss of their logits: the part that is run together, or captured as a graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bt_fast.attack.forward import logits_of
from bt_fast.attack.memory_format import formatted
from bt_fast.attack.wrapped import unwrapped
from bt_fast.objectives.repeated_forward import RepeatedForward, watched_forward
from bt_fast.objectives.update import Terms

if TYPE_CHECKING:
    from bt_fast.objectives.extra_term import ExtraTerm
    from bt_fast.objectives.loss import AdversarialLoss

Clean = tuple[Tensor, RepeatedForward | None]


@dataclass(frozen=True, eq=False)
class Forwards:
    """The update of a loss on m samples.

    Its terms are the loss, the adversarial logits [m, K] without gradient, and, with a clean forward, the clean logits
    [m, K] without gradient.
    """

    key: Hashable  # distinguishes this loss's updates from others; None if unknown
    of: AdversarialLoss
    rows: int  # the first `rows` run an adversarial forward; the x' of the others is x
    channels_last: bool
    rerun: bool  # a clean forward that cannot be replayed runs a second time, as in the authors' code
    extra: ExtraTerm | None = None  # a further term of the loss
    adversarial_first: bool = False  # before the clean forwards, as in TRADES-AWP
    of_moving: bool = False  # the samples are those of a minibatch that have steps: as many as there happen to be
    weights: Tensor | None = None  # [m], how often each counts in the adversarial term; None: each once
    on_gradient: Callable[[Tensor], None] | None = (
        None  # takes the loss's gradient by x' of the first rows, [rows, ...]
    )

    def steady(self, m: int) -> bool:
        """Whether every batch of m samples has the same shapes throughout."""
        return self.rows == m and not self.of_moving

    @property
    def identity(self) -> Hashable:
        """Equal to another's where both compute the same; None where that is not known."""
        if self.unknown is not None:
            return None
        return self.key, self.rows, self.channels_last, self.rerun, self.adversarial_first, self.of.clean_forwards

    @property
    def unknown(self) -> str | None:
        """Why there is no identity; None where there is one."""
        if self.extra is not None:
            return "extra is a function of your own, which a graph would not run again"
        if self.weights is not None:
            return "half of the robust samples stand for all, and are drawn anew for each minibatch"
        if self.on_gradient is not None:
            return "its backward hands the gradient by x' to on_input_gradient, which a graph would not call again"
        if self.key is None:
            return "the loss is one of your own, without a graph_key that says which numbers its objective reads"
        return None

    @property
    def clean_first(self) -> bool:
        """Whether there is a clean forward that comes first, and so may run beside the attack."""
        return self.of.clean_forwards > 0 and not self.adversarial_first

    def __call__(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, replayable: bool | None = None
    ) -> tuple[Terms, bool]:
        """As `Computation` says."""
        if self.of.clean_forwards == 0:
            logits = self._adversarial_logits(model, x_adv)
            assert logits is not None
            n = len(logits)  # the others have no part in this loss
            loss = self._with_extra(self._loss(None, logits, y[:n]), None, logits, x_adv[:n], y[:n])
            return (loss, logits.detach()), False
        if self.clean_first:
            return self.adversarial_half(unwrapped(model), self.clean(model, x, replayable), x, x_adv, y)
        adversarial = self._adversarial_logits(model, x_adv)
        clean = self.clean(model if adversarial is None else unwrapped(model), x, replayable)
        return self._terms(unwrapped(model), clean, adversarial, x, x_adv, y)

    def clean(self, model: nn.Module, x: Tensor, replayable: bool | None = None) -> Clean:
        """Runs the clean forward, and returns, if there are two, its effect on the buffers."""
        images = formatted(x, self.channels_last)
        if self.of.clean_forwards == 1:
            return watched_forward(model, images), None
        repeat = RepeatedForward(model, x.device, replayable)
        with repeat.first():
            logits = logits_of(model, images)
        return logits, repeat

    def adversarial_half(
        self, model: nn.Module, clean: Clean, x: Tensor, x_adv: Tensor, y: Tensor
    ) -> tuple[Terms, bool]:
        """All that follows the clean forward, and whether its repetition was replayed."""
        return self._terms(model, clean, self._adversarial_logits(model, x_adv), x, x_adv, y)

    def _terms(
        self, model: nn.Module, clean: Clean, adversarial: Tensor | None, x: Tensor, x_adv: Tensor, y: Tensor
    ) -> tuple[Terms, bool]:
        logits, repeat = clean
        if adversarial is None:
            adversarial = logits
        elif self.rows < len(logits):  # where that forward is left out, z' is z, with its gradient
            adversarial = torch.cat([adversarial, logits[self.rows :]])
        replayed = repeat is not None and repeat.replayable and not (self.rerun and repeat.recomputed)
        if repeat is not None and not replayed and self.rerun:
            second = logits_of(model, formatted(x, self.channels_last))
            pair = (second, logits) if self.adversarial_first else (logits, second)
            loss = self.of.objective_of_two(*pair, adversarial, y)
        else:
            if repeat is not None and replayed:
                repeat.replay()
            loss = self._loss(logits, adversarial, y)
        loss = self._with_extra(loss, logits, adversarial, x_adv, y)
        return (loss, adversarial.detach(), logits.detach()), replayed

    def _loss(self, clean: Tensor | None, adversarial: Tensor, y: Tensor) -> Tensor:
        if self.weights is None:
            return self.of.objective(clean, adversarial, y)
        return self.of.weighted_objective(clean, adversarial, y, self.weights[: len(y)])

    def _with_extra(self, loss: Tensor, clean: Tensor | None, adversarial: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        return loss if self.extra is None else self.extra.added(loss, clean, adversarial, x_adv, y)

    def _adversarial_logits(self, model: nn.Module, x_adv: Tensor) -> Tensor | None:
        """z' of the rows that run an adversarial forward; None where that is left out."""
        rows = self.rows
        together = any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
        if rows == 0 and not together:  # other ranks may have rows, and their norm waits for this one
            return None
        if rows == 1 and not together and any(isinstance(module, _BatchNorm) for module in model.modules()):
            rows = min(2, len(x_adv))  # batch norm cannot train on one row: an unperturbed one joins its statistics
        images = x_adv[:rows]
        if self.on_gradient is not None and torch.is_grad_enabled():
            hand, own = self.on_gradient, self.rows
            images = images.detach().requires_grad_()
            images.register_hook(lambda gradient: hand(gradient[:own].detach()))
        return logits_of(model, formatted(images, self.channels_last))[: self.rows]
