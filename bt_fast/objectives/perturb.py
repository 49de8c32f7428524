"""The fused attack for any script: images and labels in, perturbed images out, in the caller's order."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, overload

import torch
from torch import Tensor, nn

from bt_fast.attack import by_sample
from bt_fast.attack.apgd import APGD
from bt_fast.attack.by_sample import NOTHING, PerSample
from bt_fast.attack.graph_cache import shared_cache
from bt_fast.attack.inner import InnerLoss
from bt_fast.attack.pgd import PGD
from bt_fast.attack.pixels import OnPixels
from bt_fast.attack.start import Noise
from bt_fast.engine import Engine
from bt_fast.mining import BulletTrain
from bt_fast.objectives import adversarial, arguments
from bt_fast.objectives.adversarial import Call
from bt_fast.objectives.passes import check_outside
from bt_fast.objectives.update_order import in_callers_order
from bt_fast.robust_half import check_all_count
from bt_fast.warning import warn_caller

DEFAULTS: tuple[Noise, InnerLoss] = ("normal", "kl")  # TRADES'


@dataclass(frozen=True, eq=False)
class Perturbed:
    """m perturbed samples, in the caller's order.

    Attributes:
        x_adv: [m, ...], x'.
        logits: [m, K], the clean outputs, of the model in the attack's mode; None where the attack needed none.
        steps: [m] int64, attack steps.
        group: [m] int64, one of `ops.OUTLIER`, `ops.BOUNDARY`, `ops.ROBUST`; None without mining.
        weights: [m] float64, how often the script's loss is to count each sample's adversarial term, where the mining
            lets half of the robust samples stand for all; None: each once.
    """

    x_adv: Tensor
    logits: Tensor | None
    steps: Tensor
    group: Tensor | None
    weights: Tensor | None = None


@overload
def perturb(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None,
    attack: PGD | APGD,
    mining: BulletTrain | None = ...,
    *,
    engine: Engine | str = ...,
    per_sample: PerSample | None = ...,
    indices: Tensor | None = ...,
    generator: torch.Generator | None = ...,
    return_details: Literal[False] = ...,
) -> Tensor: ...


@overload
def perturb(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None,
    attack: PGD | APGD,
    mining: BulletTrain | None = ...,
    *,
    engine: Engine | str = ...,
    per_sample: PerSample | None = ...,
    indices: Tensor | None = ...,
    generator: torch.Generator | None = ...,
    return_details: Literal[True],
) -> Perturbed: ...


def perturb(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None,
    attack: PGD | APGD,
    mining: BulletTrain | None = None,
    *,
    engine: Engine | str = "exact",
    per_sample: PerSample | None = None,
    indices: Tensor | None = None,
    generator: torch.Generator | None = None,
    return_details: bool = False,
) -> Tensor | Perturbed:
    """Returns x' of a minibatch, for a script with its own loss: `x_adv = perturb(model, x, y, attack, mining)`.

    The model runs in eval mode and its modes are restored; no parameter's gradient is touched. An attack that names no
    inner loss and no start has TRADES': "kl" and "normal". With mining the script must end each minibatch itself, by
    `mining.observe(adversarial_logits, y)`; otherwise F_R does not move, and a warning says so.

    Args:
        model, indices, generator: as for a call of an `AdversarialLoss`.
        x: [m, ...] floating point within the attack's bounds, m ≥ 1; not changed.
        y: [m] integers in 0..K-1, or [m, K] distributions, as for a call of `AdversarialLoss`. May be None without
            mining where `attack.inner` is a function: the model's outputs may then be any [m, d], embeddings say, and
            labels, if given, any, which only that function reads.
        attack: how images are attacked, a `PGD` or an `APGD`.
        mining, engine: who gets how many steps, and how the attack is executed, as for `AdversarialLoss`.
        per_sample: step counts, ε, step sizes and starts of the samples' own. Where steps or ε are, the attack waits
            for its one read of the device before its first step, as with mining; samples without steps left leave it.
        return_details: whether to return a `Perturbed`.

    Returns:
        [m, ...] without gradient, in the dtype and order of x; or a `Perturbed` with it.

    Raises:
        TypeError, ValueError: as for an `AdversarialLoss` and its calls, and where labels are missing or per_sample
            does not fit. F_R has not changed then.
    """
    check_outside("perturb", "call it before the block, and give its x' to the loss")
    arguments.check_attack(attack, mining, DEFAULTS, per_sample if isinstance(per_sample, PerSample) else NOTHING)
    _check_goes_together(y, attack, mining, return_details)
    chosen = Engine.of(engine)
    call = Call.of(chosen, shared_cache(chosen), x, y, mining, indices, generator, updates=False)
    embeds = mining is None and attack.inner is not None and not isinstance(attack.inner, str)
    own = by_sample.own_of(per_sample, x, attack, mined=mining is not None)
    call = replace(call, execution=call.execution.fitting(attack), embeds=embeds, own=own)
    _warn_if_unobserved(mining)
    with adversarial.attacking(model, x, y, attack, DEFAULTS, mining, call) as (model, queued):
        x_adv, late = queued.perturbed()
        if late is not None:
            late.wait()
    plan = queued.plan
    if mining is not None and queued.faulty is not None and plan.order is not None:
        mining.attacked(queued.faulty, plan.order)
    normalize = model.normalize if isinstance(model, OnPixels) else None
    moved = by_sample.moved(own, attack.threat, plan.steps, mined=mining is not None)
    x_adv = in_callers_order(x_adv, x.detach(), plan, normalize, moved)
    if not return_details:
        return x_adv
    return Perturbed(x_adv, queued.logits, plan.steps, getattr(plan, "group", None), getattr(plan, "weights", None))


def _warn_if_unobserved(mining: BulletTrain | None) -> None:
    if mining is not None and mining.unobserved:
        warn_caller(
            "the last minibatch was not observed, so F_R stays where it is: "
            "call mining.observe(adversarial_logits, y) once for each minibatch"
        )


def _check_goes_together(y: Tensor | None, attack: PGD | APGD, mining: BulletTrain | None, details: bool) -> None:
    """Raise ValueError where weights would be lost; TypeError where mining, or an inner loss with a name, needs y."""
    if mining is not None and not details:
        check_all_count(mining.half_drawn, "for x' alone", "write return_details=True and weigh the loss by .weights")
    if y is not None or (mining is None and callable(attack.inner)):
        return
    by, instead = "mining", "leave mining out"
    if mining is None:
        by = f"the inner loss {attack.inner or 'kl'!r}"
        instead = "write PGD(..., inner=function) with a function of (outputs, rows)"
    raise TypeError(f"y must be the labels [m], which {by} needs, got None: give them, or {instead}")
