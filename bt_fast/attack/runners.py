"""How a schedule is executed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from bt_fast import ops
from bt_fast.attack.frozen import gradient_of, in_float16, logits_of
from bt_fast.attack.schedule import Schedule
from bt_fast.attack.threat import ThreatModel
from bt_fast.ranges import ATTACK_STEP, range_


class Runner(Protocol):
    """How a schedule is executed: `run_eager` is one, and every other gives its result."""

    def __call__(
        self,
        model: Callable[[Tensor], Tensor],
        x_adv: Tensor,
        clean: Tensor,
        target: Tensor,
        schedule: Schedule,
        threat: ThreatModel,
        generator: torch.Generator | None,
        faulty: Tensor | None,
    ) -> None:
        """Change `x_adv` as `run_eager` does."""


class Start(Protocol):
    """A runner's `start`: it queues the attack, and what it returns makes the caller's stream wait for it.

    Until then nothing may be done with the attack's tensors. Calling it again does no harm.
    """

    def __call__(
        self,
        model: Callable[[Tensor], Tensor],
        x_adv: Tensor,
        clean: Tensor,
        target: Tensor,
        schedule: Schedule,
        threat: ThreatModel,
        generator: torch.Generator | None,
        faulty: Tensor | None,
    ) -> Callable[[], None]:
        """Change `x_adv` as `run_eager` does, at the latest when what is returned is called."""


def start_of(runner: Runner) -> Start:
    """The runner's own `start`, or its whole run."""
    start: Start | None = getattr(runner, "start", None)
    if start is not None:
        return start

    def run(
        model: Callable[[Tensor], Tensor],
        x_adv: Tensor,
        clean: Tensor,
        target: Tensor,
        schedule: Schedule,
        threat: ThreatModel,
        generator: torch.Generator | None,
        faulty: Tensor | None,
    ) -> Callable[[], None]:
        runner(model, x_adv, clean, target, schedule, threat, generator, faulty)
        return joined

    return run


def joined() -> None:
    """What ran on the caller's stream needs no waiting."""


def run_eager(
    model: Callable[[Tensor], Tensor],
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
    seeds = stand_in_seeds(x_adv, schedule, threat, generator)
    for t, n in enumerate(schedule.active):
        if n == 0:
            break
        seed = None if seeds is None else seeds[t]
        found = None if faulty is None else faulty[:n]
        with range_(ATTACK_STEP):
            take_step(model, x_adv[:n], clean[:n], target[:n], step_size[:n], threat, seed, found)


def take_step(
    model: Callable[[Tensor], Tensor],
    x_adv: Tensor,
    clean: Tensor,
    target: Tensor,
    step_size: Tensor,
    threat: ThreatModel,
    seed: Tensor | None,
    faulty: Tensor | None,
    steps: Tensor | None = None,
    step: Tensor | None = None,
) -> None:
    """One step of these samples: forward, input gradient, projected step in place.

    Args:
        seed: for the direction where an ℓ2 gradient is 0; without it, as the TRADES code draws it on the CPU.
        steps: [n] and step: 0-dim, the counter: only samples with more steps than it move.
    """
    grad = input_gradient(model, x_adv, target)
    box = (threat.epsilon, threat.lower, threat.upper)
    if threat.norm == "l_inf":
        ops.linf_step_(x_adv, grad, clean, step_size, *box, steps=steps, step=step, faulty=faulty)
    else:
        stand_in = _as_authors(grad) if seed is None else seed
        ops.l2_step_(x_adv, grad, clean, step_size, *box, stand_in, steps=steps, step=step, faulty=faulty)


def stand_in_seeds(
    x: Tensor, schedule: Schedule, threat: ThreatModel, generator: torch.Generator | None
) -> Tensor | None:
    """A seed for each step in ℓ2, drawn on the images' device; None where there is no need."""
    if threat.norm == "l_inf" or (x.is_cpu and generator is None):
        return None
    return torch.randint(2**63 - 1, (len(schedule.active),), device=x.device, generator=generator)


def input_gradient(model: Callable[[Tensor], Tensor], x: Tensor, target: Tensor) -> Tensor:
    """The inner loss's gradient with respect to `x` alone: no parameter's gradient is computed or touched."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = logits_of(model, x)
    return gradient_of(logits, x, ops.ascent_direction(logits.detach(), target, in_float16(model, x, logits)))


def _as_authors(grad: Tensor) -> Tensor:
    """Normal noise for the rows of `grad`, on the CPU, that are 0: drawn for those rows only and descended along.

    So the TRADES code does, whose random numbers a seeded script then repeats. To find the rows on a GPU would mean to
    wait: there the step itself makes them of a seed.
    """
    zero = ~grad.flatten(1).any(dim=1)
    stand_in = torch.zeros_like(grad)
    stand_in[zero] = -torch.randn(grad[zero].shape, device="cpu").to(grad.dtype)
    return stand_in
