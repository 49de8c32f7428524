"""Perturbed images as they go back to a caller: in the order and in the units of the images that came."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bt_fast.attack.pixels import Normalize
from bt_fast.ops.numeric import per_sample
from bt_fast.plan import Plan


def given_back(x_adv: Tensor, x: Tensor, plan: Plan, normalize: Normalize | None) -> Callable[[], Tensor]:
    """What gives x' [m, ...] in the order of x and in its units: a sample without steps is x itself, to the bit.

    Args:
        x_adv: [m, ...] pixels in the plan's sorted order.
        x: [m, ...] as the caller gave it.
        normalize: what makes images like x of pixels; None where they are pixels.
    """
    return partial(_given_back, x_adv, x.detach(), plan, normalize)


def _given_back(x_adv: Tensor, x: Tensor, plan: Plan, normalize: Normalize | None) -> Tensor:
    x_adv = plan.unsort(x_adv)
    if normalize is None:
        return x_adv
    return torch.where(per_sample(plan.steps > 0, x), normalize(x_adv), x)
