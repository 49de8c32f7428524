"""The orders of a minibatch: an update's, in which samples that others stand for come last, and the caller's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bt_fast.attack.pixels import Normalize
from bt_fast.ops.numeric import per_sample
from bt_fast.plan import MinedPlan, Plan

if TYPE_CHECKING:
    from bt_fast.objectives.adversarial import Attack


def in_update_order(attack: Attack) -> Attack:
    """The attack with the samples for which others stand last. Where these have no steps they are so anyway."""
    plan, idle = attack.plan, left_out(attack.plan)[1]
    if attack.into is not None or idle == 0 or not isinstance(plan, MinedPlan) or attack.y is None:
        return attack
    assert plan.weights is not None
    into = (plan.sort(plan.weights) == 0).long().argsort(stable=True)
    plan, moving = replace(plan, order=plan.order[into]), attack.moving - idle
    shared = None if attack.shared is None else attack.shared[into]
    return replace(attack, x=attack.x[into], y=attack.y[into], plan=plan, into=into, moving=moving, shared=shared)


def in_callers_rows(take: Callable[[Tensor], None], plan: Plan) -> Callable[[Tensor], None]:
    """A function that takes the gradient of the first rows in the plan's sorted order, and gives `take` all."""

    def hand(gradient: Tensor) -> None:
        whole = gradient.new_zeros(len(plan.steps), *gradient.shape[1:])
        whole[: len(gradient)] = gradient
        take(plan.unsort(whole))

    return hand


def left_out(plan: Plan) -> tuple[int, int]:
    """How many robust samples others stand for, and how many of those have attack steps."""
    return plan.left_out if isinstance(plan, MinedPlan) else (0, 0)


def weights_of(plan: Plan) -> Tensor | None:
    """How often each sample counts in the adversarial term, [m] in the plan's sorted order; None: each once."""
    weights = plan.weights if isinstance(plan, MinedPlan) else None
    return None if weights is None else plan.sort(weights)


def in_callers_order(
    x_adv: Tensor, x: Tensor, plan: Plan, normalize: Normalize | None, moved: Tensor | None = None
) -> Tensor:
    """x' [m, ...] in the order and the units of the caller's x: a sample that has not moved is x itself, to the bit.

    Args:
        x_adv: [m, ...] pixels in the plan's sorted order.
        normalize: makes images like x of pixels; None where they are pixels.
        moved: [m] bool, the samples that may have; None: those with steps.
    """
    x_adv = plan.unsort(x_adv)
    if normalize is None:
        return x_adv
    return torch.where(per_sample(plan.steps > 0 if moved is None else moved, x), normalize(x_adv), x)
