"""Runners execute an attack: their protocol, and the eager runner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from bt_fast import ops
from bt_fast.attack.batch import AttackBatch, View
from bt_fast.attack.forward import gradient_of, in_float16, logits_of
from bt_fast.attack.inner import OfAPGD, direction_of
from bt_fast.attack.threat import ThreatModel
from bt_fast.ranges import ATTACK_STEP, range_


class Runner(Protocol):
    """The way an attack is executed: `run_eager` is one runner, and every other runner gives its result."""

    def __call__(
        self,
        model: Callable[[Tensor], Tensor],
        batch: AttackBatch,
        threat: ThreatModel,
        generator: torch.Generator | None,
    ) -> None:
        """Changes the batch's `x_adv` like `run_eager`."""


Join = Callable[[], None]  # makes the caller's stream wait for an attack; may be called repeatedly
Start = Callable[[View, AttackBatch, ThreatModel, "torch.Generator | None"], Join]


class Queued(Protocol):
    """A runner that can queue an attack beside its caller's next work.

    Until the function that `start` returns is called, nothing may be done with the attack's tensors.
    """

    def start(self, model: View, batch: AttackBatch, threat: ThreatModel, generator: torch.Generator | None, /) -> Join:
        """Changes the batch's `x_adv` like `run_eager`, at the latest when the returned function is called."""


def run_queued(
    self: Queued,
    model: Callable[[Tensor], Tensor],
    batch: AttackBatch,
    threat: ThreatModel,
    generator: torch.Generator | None,
) -> None:
    """Runs the attack like `run_eager`: the `__call__` of runners that have a `start`."""
    self.start(model, batch, threat, generator)()


def start_of(runner: Runner) -> Start:
    """Returns the runner's own `start`, or its whole run."""

    def run(model: View, batch: AttackBatch, threat: ThreatModel, generator: torch.Generator | None) -> Join:
        runner(model, batch, threat, generator)
        return joined

    return getattr(runner, "start", run)


def joined() -> None:
    """Does nothing: work on the caller's stream needs no waiting."""


def run_eager(
    model: Callable[[Tensor], Tensor],
    batch: AttackBatch,
    threat: ThreatModel,
    generator: torch.Generator | None,
) -> None:
    """Runs the attack eagerly: forward, input gradient and projected step on the prefix of samples with steps left.

    Groups with different counts advance together, so there are as many launch sequences as the largest count. The
    generator is on the images' device, for the replacement of a zero ℓ2 gradient.
    """
    batch = replace(batch, step_size=batch.step_size.to(batch.x_adv.dtype))
    seeds = stand_in_seeds(batch, threat, generator)
    for t, n in enumerate(batch.active):
        if n == 0:
            break
        with range_(ATTACK_STEP):
            take_step(model, batch[:n], threat, None if seeds is None else seeds[t])


def take_step(
    model: View, batch: AttackBatch, threat: ThreatModel, seed: Tensor | None, step: Tensor | None = None
) -> None:
    """Takes one step of these samples: forward, input gradient, projected step in place.

    Args:
        seed: for the direction if an ℓ2 gradient is 0; without it, drawn on the CPU like in the TRADES code.
        step: 0-dim integer, the counter: only samples with more steps than this move. Without it, all move.
    """
    grad = input_gradient(model, batch.x_adv, batch.target, batch.inner, batch.labels, together=batch.together)
    move(batch, grad, threat, seed, step)


def move(
    batch: AttackBatch, grad: Tensor, threat: ThreatModel, seed: Tensor | None, step: Tensor | None = None
) -> None:
    """The projected step of `take_step` along a gradient [n, ...], in place."""
    epsilon = threat.epsilon if batch.epsilon is None else batch.epsilon
    images = (batch.x_adv, grad, batch.clean, batch.step_size, epsilon, threat.lower, threat.upper)
    steps = None if step is None else batch.steps
    if threat.norm == "l_inf":
        ops.linf_step_(*images, steps=steps, step=step, faulty=batch.faulty)
    else:
        stand_in = _as_authors(grad) if seed is None else seed
        ops.l2_step_(*images, stand_in, steps=steps, step=step, faulty=batch.faulty)


def stand_in_seeds(batch: AttackBatch, threat: ThreatModel, generator: torch.Generator | None) -> Tensor | None:
    """Draws a seed for each ℓ2 step on the images' device; returns None if none is needed."""
    x = batch.x_adv
    if threat.norm == "l_inf" or (x.is_cpu and generator is None):
        return None
    return torch.randint(2**63 - 1, (len(batch.active),), device=x.device, generator=generator)


def input_gradient(
    model: View,
    x: Tensor,
    target: Tensor,
    inner: OfAPGD = "kl",
    labels: Tensor | None = None,
    *,
    together: bool = False,
) -> Tensor:
    """The inner loss's gradient with respect to `x` alone: no parameter's gradient is computed or touched."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        outputs = logits_of(model, x, least=2 if isinstance(inner, str) else 1)
    scaled = in_float16(model, x, outputs)
    direction = direction_of(inner, outputs.detach(), target, labels, scaled=scaled, together=together)
    return gradient_of(outputs, x, direction)


def _as_authors(grad: Tensor) -> Tensor:
    """Fills the zero rows of `grad`, on the CPU, with normal noise to descend along, drawn for those rows only.

    This repeats the random numbers of the TRADES code in a seeded script. On a GPU, finding the rows would wait for the
    device: there the step itself makes noise from a seed.
    """
    zero = ~grad.flatten(1).any(dim=1)
    stand_in = torch.zeros_like(grad)
    stand_in[zero] = -torch.randn(grad[zero].shape, device="cpu").to(grad.dtype)
    return stand_in
