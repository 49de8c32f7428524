"""Runners that look at the inner loss of each iterate: PGD that keeps the best one, and APGD. Both are eager."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bt_fast.attack.apgd import APGD, checkpoints
from bt_fast.attack.apgd_steps import Trail, with_direction
from bt_fast.attack.batch import AttackBatch, View
from bt_fast.attack.forward import clean_logits, gradient_of, in_float16, logits_of
from bt_fast.attack.inner_values import Aim, values_and_directions
from bt_fast.attack.pgd import PGD
from bt_fast.attack.runners import Runner, move, stand_in_seeds
from bt_fast.attack.start import into_ball
from bt_fast.attack.threat import ThreatModel
from bt_fast.ops.numeric import per_sample, wide
from bt_fast.ranges import ATTACK_STEP, range_


def runner_for(attack: PGD | APGD) -> Runner | None:
    """The runner that the attack needs in place of the engine's; None where it needs none."""
    if isinstance(attack, APGD):
        return APGDRunner(attack.rho)
    return PGDRunner() if attack.keep == "best" else None


@dataclass(frozen=True)
class PGDRunner:
    """PGD in which each sample ends at its iterate of the greatest inner loss."""

    def explain(self, _: object) -> str:
        """How the attack runs, in words."""
        return "eagerly, without graphs and streams, since each sample keeps its best iterate"

    def __call__(self, model: View, batch: AttackBatch, threat: ThreatModel, generator: torch.Generator | None) -> None:
        """Change the batch's `x_adv` to the iterates that are kept."""
        batch = replace(batch, step_size=batch.step_size.to(batch.x_adv.dtype))
        seeds = stand_in_seeds(batch, threat, generator)
        moving = batch[: batch.active[0]]
        project(moving.x_adv, moving.clean, threat, _radii(moving, threat))
        best = moving.x_adv.clone()
        value = torch.full((len(best),), -math.inf, dtype=wide(best).dtype, device=best.device)
        for t, rows, values, grad in _iterates(model, moving):
            x = moving.x_adv[rows]
            better = values > value[rows]
            torch.where(per_sample(better, x), x, best[rows], out=best[rows])
            torch.where(better, values.to(value.dtype), value[rows], out=value[rows])
            if grad is not None:
                move(moving[rows], grad, threat, None if seeds is None else seeds[t])
        moving.x_adv.copy_(best)


@dataclass(frozen=True)
class APGDRunner:
    """APGD of an inner loss; each sample has the checkpoints of its own number of steps."""

    rho: float

    def explain(self, _: object) -> str:
        """How the attack runs, in words."""
        return "eagerly, without graphs and streams, since APGD chooses each sample's step size from its inner loss"

    def __call__(self, model: View, batch: AttackBatch, threat: ThreatModel, generator: torch.Generator | None) -> None:
        """Change the batch's `x_adv` to the iterates of the greatest inner loss. No random number is drawn."""
        moving = batch[: batch.active[0]]
        epsilon = _radii(moving, threat)
        project(moving.x_adv, moving.clean, threat, epsilon)
        trail = Trail.of(moving.x_adv, epsilon)
        periods = _periods(moving.active)
        for t, rows, values, grad in _iterates(model, moving):
            x, clean, of_rows, first = moving.x_adv[rows], moving.clean[rows], trail[rows], t == 0
            if grad is not None:
                grad = with_direction(grad, moving.faulty[rows], threat.norm)
            of_rows.look(x, values.to(trail.value.dtype), grad, first)
            if grad is None:
                continue
            if t in periods:
                grad = grad.clone()  # a model's gradient may be one number, expanded
            for some, period in periods.get(t, ()):
                trail[some].check(moving.x_adv[some], grad[some], self.rho, period)
            of_rows.step(x, clean, grad, threat, epsilon[rows] if isinstance(epsilon, Tensor) else epsilon, first)
        moving.x_adv.copy_(trail.best)


def _periods(active: tuple[int, ...]) -> dict[int, list[tuple[slice, int]]]:
    """By iterate: the rows that are at a checkpoint and have a step to go, and the length of the period that ends."""
    result: dict[int, list[tuple[slice, int]]] = {}
    ends = [*active, 0]
    for steps in range(1, len(ends)):  # which the rows from ends[steps] to ends[steps - 1] take
        if ends[steps] < ends[steps - 1]:
            for t, period in checkpoints(steps).items():
                if t < steps:
                    result.setdefault(t, []).append((slice(ends[steps], ends[steps - 1]), period))
    return result


Iterate = tuple[int, slice, Tensor, "Tensor | None"]


def _iterates(model: View, batch: AttackBatch) -> Iterator[Iterate]:
    """All iterates of all samples: (their number, rows, inner losses, gradients), before the caller moves these rows.

    The last iterates of samples come alone and with None: they need no backward.
    """
    aim, ends = Aim.of(batch), [*batch.active, 0]
    before = ends[0]
    for t, n in enumerate(ends):
        if n < before:
            rows = slice(n, before)
            with range_(ATTACK_STEP):
                outputs = clean_logits(model, batch.x_adv[rows], least=_least(batch))
                yield t, rows, values_and_directions(batch.inner, outputs, aim[rows])[0], None
        if n == 0:
            return
        rows, before = slice(0, n), n
        with range_(ATTACK_STEP):
            yield t, rows, *_value_and_gradient(model, batch[rows], aim[rows])


def _value_and_gradient(model: View, batch: AttackBatch, aim: Aim) -> tuple[Tensor, Tensor]:
    """The inner loss of each x', and its gradient with respect to these images alone."""
    x = batch.x_adv.detach().requires_grad_()
    with torch.enable_grad():
        outputs = logits_of(model, x, least=_least(batch))
    how = {"scaled": in_float16(model, x, outputs), "together": batch.together}
    values, direction = values_and_directions(batch.inner, outputs.detach(), aim, **how)
    return values, gradient_of(outputs, x, direction)


def _least(batch: AttackBatch) -> int:
    return 2 if isinstance(batch.inner, str) else 1


def _radii(batch: AttackBatch, threat: ThreatModel) -> float | Tensor:
    """ε of all, or each sample's own [n]."""
    return threat.epsilon if batch.epsilon is None else batch.epsilon


def project(x: Tensor, clean: Tensor, threat: ThreatModel, epsilon: float | Tensor) -> None:
    """Move those of x [n, ...] that are outside ball or bounds onto them, in place; to the bit, none else.

    `epsilon` is of all, or [n].
    """
    # onto the bounds first, as a step in l2 does; `given_start` goes into the ball first, which is another point there
    inside = x.clamp(threat.lower, threat.upper)
    if threat.norm == "l_2":
        inside, clean = wide(inside), wide(clean)
    inside = into_ball(inside, clean, threat, epsilon)
    x.copy_(inside.clamp_(threat.lower, threat.upper))
