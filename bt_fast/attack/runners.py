"""How a schedule is executed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bt_fast import ops
from bt_fast.attack.frozen import logits_of
from bt_fast.attack.schedule import Schedule
from bt_fast.attack.threat import ThreatModel


def run_eager(
    model: nn.Module,
    x_adv: Tensor,
    clean: Tensor,
    target: Tensor,
    schedule: Schedule,
    threat: ThreatModel,
    generator: torch.Generator | None,
    faulty: Tensor | None,
) -> None:
    """Step t runs forward, input gradient and projected step on the prefix of the samples that still have steps left.

    Groups with different counts advance together, so there are as many launch sequences as the largest count.

    Args:
        x_adv: [m, ...] in sorted order, the starting points; changed in place.
        clean: [m, ...] in sorted order.
        target: [m, K] in sorted order, the distribution to move away from.
        generator: on the images' device; for the stand-in of a zero ℓ2 gradient.
        faulty: [m] int32, set to 1 for samples that stayed in some step, since their gradient held NaN (in ℓ2: or Inf).
    """
    step_size = schedule.step_size.to(x_adv.dtype)
    box = (threat.epsilon, threat.lower, threat.upper)
    seeds = None
    if threat.norm == "l_2" and (x_adv.is_cuda or generator is not None):
        seeds = torch.randint(2**63 - 1, (len(schedule.active),), device=x_adv.device, generator=generator)
    for t, n in enumerate(schedule.active):
        if n == 0:
            break
        grad = input_gradient(model, x_adv[:n], target[:n])
        found = None if faulty is None else faulty[:n]
        if threat.norm == "l_inf":
            ops.linf_step_(x_adv[:n], grad, clean[:n], step_size[:n], *box, faulty=found)
        else:
            stand_in = _as_authors(grad) if seeds is None else seeds[t]
            ops.l2_step_(x_adv[:n], grad, clean[:n], step_size[:n], *box, stand_in, faulty=found)


def input_gradient(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """The inner loss's gradient with respect to `x` alone: no parameter's gradient is computed or touched."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = logits_of(model, x)
    (grad,) = torch.autograd.grad(logits, x, ops.ascent_direction(logits.detach(), target))
    return grad


def _as_authors(grad: Tensor) -> Tensor:
    """Normal noise for the rows of `grad`, on the CPU, that are 0: drawn for those rows only and descended along.

    So the TRADES code does, whose random numbers a seeded script then repeats. To find the rows on a GPU would mean to
    wait: there the step itself makes them of a seed.
    """
    zero = ~grad.flatten(1).any(dim=1)
    stand_in = torch.zeros_like(grad)
    stand_in[zero] = -torch.randn(grad[zero].shape).to(grad.dtype)
    return stand_in
