"""How a schedule is executed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bt_fast import ops
from bt_fast.attack.frozen import logits_of
from bt_fast.attack.schedule import Schedule
from bt_fast.attack.threat import ThreatModel


def run_eager(
    model: Callable[[Tensor], Tensor],
    x_adv: Tensor,
    clean: Tensor,
    target: Tensor,
    schedule: Schedule,
    threat: ThreatModel,
    generator: torch.Generator | None,
) -> None:
    """Step t runs forward, input gradient and projected step on the prefix of the samples that still have steps left.

    Groups with different counts advance together, so there are as many launch sequences as the largest count.

    Args:
        x_adv: [m, ...] in sorted order, the starting points; changed in place.
        clean: [m, ...] in sorted order.
        target: [m, K] in sorted order, the distribution to move away from.
        generator: on the images' device; for the stand-in of a zero ℓ2 gradient.
    """
    step_size = schedule.step_size.to(x_adv.dtype)
    for n in schedule.active:
        if n == 0:
            break
        grad = input_gradient(model, x_adv[:n], target[:n])
        box = (threat.epsilon, threat.lower, threat.upper)
        if threat.norm == "l_inf":
            ops.linf_step_(x_adv[:n], grad, clean[:n], step_size[:n], *box)
        else:
            stand_in = _stand_in(grad, generator)
            ops.l2_step_(x_adv[:n], grad, clean[:n], step_size[:n], *box, stand_in)


def input_gradient(model: Callable[[Tensor], Tensor], x: Tensor, target: Tensor) -> Tensor:
    """The inner loss's gradient with respect to `x` alone: no parameter's gradient is computed or touched."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = logits_of(model, x)
    (grad,) = torch.autograd.grad(logits, x, ops.ascent_direction(logits.detach(), target))
    return grad


def _stand_in(grad: Tensor, generator: torch.Generator | None) -> Tensor:
    """Normal noise for the rows of `grad` whose gradient is 0.

    On the CPU numbers are drawn for those rows only and descended along, as the TRADES code does; to find the rows on a
    GPU would mean to wait.
    """
    if grad.is_cuda or generator is not None:
        return torch.randn(grad.shape, dtype=grad.dtype, device=grad.device, generator=generator)
    zero = grad.flatten(1).norm(dim=1) == 0
    stand_in = torch.zeros_like(grad)
    stand_in[zero] = -torch.randn(grad[zero].shape).to(grad.dtype)
    return stand_in
