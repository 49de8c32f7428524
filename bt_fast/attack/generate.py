"""The ragged attack as a function: images, model and plan in; perturbed images out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor, nn

from bt_fast.attack.auto import runner_of
from bt_fast.attack.batch import AttackBatch, View
from bt_fast.attack.folded import FoldedModel, Frozen, attack_model
from bt_fast.attack.graph_cache import shared_cache, view_of
from bt_fast.attack.inner import Inner, by_label, check_enough_classes, check_inner
from bt_fast.attack.runners import Join, Runner, joined, start_of
from bt_fast.attack.threat import ThreatModel, check_threat
from bt_fast.deprecated import check_keywords
from bt_fast.engine import Engine
from bt_fast.ops.numeric import computable, kind_of, wide
from bt_fast.plan import Plan
from bt_fast.units import warn_of_units
from bt_fast.validation import check_floating, check_kind

if TYPE_CHECKING:
    from typing_extensions import Unpack

COMPARED = 8  # number of samples on which a view is compared with the model, once

NEW_LINES = {
    "frozen": "write engine='fast', or engine=Engine(fold=True) for this alone",
    "runner": "write engine='fast', or engine=Engine(graphs=True) for this alone",
}


class Deprecated(TypedDict, total=False):
    """The keywords of the first version."""

    frozen: Frozen | None
    runner: Runner | str


def generate(
    model: nn.Module,
    clean: Tensor,
    start: Tensor,
    target: Tensor,
    plan: Plan,
    threat: ThreatModel,
    *,
    inner: Inner = "kl",
    generator: torch.Generator | None = None,
    faulty: Tensor | None = None,
    engine: Engine | str = "exact",
    **deprecated: Unpack[Deprecated],
) -> Tensor:
    """Runs the ragged attack on images in a plan's sorted order: the inner loss of the model's outputs grows.

    `perturb` in parts of one's own: what is given is in sorted order (`plan.sort(x)`), and so is what comes back
    (`plan.unsort(x_adv)` is in the batch's own). The model runs in eval mode and its modes are restored; no parameter's
    gradient is touched. No sample's result depends on other samples. A sample with 0 steps is returned as its `start`.

    Args:
        model: maps [n, ...] to logits [n, K]; for a function as inner loss to any outputs [n, d].
        clean: [m, ...] floating point, x.
        start: [m, ...], where the attack begins; not changed. At x itself "kl" and "lse" have no gradient.
        target: [m, K] floating point: for "kl" and "lse" the clean probabilities, for the others the labels, one-hot or
            soft; "margin" and "dlr" take a row's largest entry for the label. For a function [m, d], its
            `rows.clean_outputs`.
        plan: the number and the size of each sample's steps.
        threat: the ball and the pixel bounds of a perturbation.
        inner: what is ascended, as for `PGD`. "kl" and "cross_entropy" are both KL(target ‖ softmax(z')) here. A
            function is given no labels (`rows.labels` is None): one that reads them is for `perturb`.
        generator: on the images' device; its numbers replace the direction of an ℓ2 gradient that is 0.
        faulty: [m] int32 on the images' device, set to 1 for each sample that could not move in some step because its
            input gradient held NaN (in ℓ2: or Inf). `faults.gradients_without_direction` turns it into an error.
        engine: how the attack is executed, by name or as an `Engine`.
        deprecated: keywords of the first version; each warns with the new line.

    Returns:
        [m, ...] in the plan's sorted order, without gradient.

    Raises:
        TypeError: the images or the target are not floating point, or the model does not return such logits.
        ValueError: shapes do not fit together, the inner loss is unknown or needs more classes ("dlr" 3), or the model
            does not return logits [n, K]. Values are not checked here, which would wait for the device: `trades_loss`
            and `evaluate` check them.
    """
    _check(clean, start, target, plan, faulty)
    check_threat(threat)
    check_inner("inner", inner, optional=False)
    check_enough_classes(inner, target.shape[1])
    recipe, runner = _executed(engine, clean, deprecated)
    warn_of_units(threat.epsilon, threat.norm, (threat.lower, threat.upper), pixels=clean[:1].numel() or 1)
    with torch.inference_mode(False), attack_model(model, recipe, clean[:COMPARED].detach()) as view:
        target = target.detach() if isinstance(inner, str) else wide(target.detach())
        labels = target.argmax(dim=1) if isinstance(inner, str) and by_label(inner) else None
        batch = replace(AttackBatch.of(plan, start, clean, target, faulty), inner=inner, labels=labels)
        return start_attack(view, batch, threat, generator, runner).finish()


def _executed(engine: Engine | str, clean: Tensor, deprecated: Deprecated) -> tuple[Frozen | None, Runner]:
    """The view's recipe and the runner of an engine, or of the first version's keywords."""
    check_keywords("generate", deprecated, NEW_LINES)
    chosen = Engine.of(engine)
    if all(value is None for value in deprecated.values()):
        return view_of(chosen), shared_cache(chosen).runner(chosen, clean)
    if chosen != Engine():
        raise ValueError(
            f"engine={chosen.name!r} says already how it is executed, but frozen or runner does, too: leave these out"
        )
    return deprecated.get("frozen"), runner_of(deprecated.get("runner", "eager"))


@dataclass(eq=False)
class StartedAttack:
    """An attack with its steps queued, perhaps on separate streams. A `with` block joins it at its end."""

    join: Join
    result: Callable[[], Tensor]  # returns x' [m, ...], after the join

    @property
    def beside(self) -> bool:
        """Whether the caller's later work runs beside the attack."""
        return self.join is not joined

    def __enter__(self) -> StartedAttack:
        return self

    def __exit__(self, *error: object) -> None:
        self.join()

    def finish(self) -> Tensor:
        """Makes the caller's stream wait for the steps and returns x' [m, ...]."""
        self.join()
        self.join = joined  # so that the end of the block does not join again
        x_adv = self.result()
        self.result = lambda: x_adv  # keeps no batch in another memory format alive
        return x_adv


def start_attack(
    view: View, batch: AttackBatch, threat: ThreatModel, generator: torch.Generator | None, runner: Runner
) -> StartedAttack:
    """Queues the attack on a view of the model from `attack_model`, inside its `with` block.

    If the runner has its own streams, the caller's work before `finish` runs beside the attack. The batch's `x_adv` is
    the attack's start, and is not changed.
    """
    start = batch.x_adv
    with torch.inference_mode(False):
        idle = not batch.active or batch.active[0] == 0
        last = not idle and isinstance(view, FoldedModel) and view.channels_last and start.dim() == 4
        x_adv = start.detach().clone(memory_format=torch.channels_last if last else torch.preserve_format)
        if idle:
            return StartedAttack(joined, lambda: x_adv)
        clean = batch.clean.detach()
        clean = clean.contiguous(memory_format=torch.channels_last) if last else clean
        attacked = replace(batch, x_adv=x_adv, clean=clean, target=batch.target.detach())
        join = start_of(runner)(view, attacked, threat, generator)
    restored = last and start.is_contiguous()
    return StartedAttack(join, lambda: x_adv.contiguous() if restored else x_adv)


def _check(clean: Tensor, start: Tensor, target: Tensor, plan: Plan, faulty: Tensor | None) -> None:
    check_kind("plan", plan, Plan, "write Plan.uniform(m, steps, step_size, device)")
    for name, values in (("clean", clean), ("start", start), ("target", target)):
        if not isinstance(values, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(values).__name__}: write torch.as_tensor({name})")
    for name, images in (("clean", clean), ("start", start)):
        if not computable(images):
            raise TypeError(
                f"{name} must be floating-point images, got {kind_of(images)}: of bytes write {name}.float() / 255"
            )
    m = len(plan.step_size)
    if clean.shape[:1] != (m,):
        raise _misfit("clean", clean, f"hold the plan's {m} samples", "give the images that the plan was made for")
    if start.shape != clean.shape:
        raise _misfit("start", start, f"have clean's shape {list(clean.shape)}", "give one start for each image")
    if target.dim() != 2 or len(target) != m:
        instead = "give a row for each image, its softmax or its one-hot label"
        raise _misfit("target", target, f"have shape [{m}, K]", instead)
    check_floating("target", target, "write target.float(), or of labels one_hot(y, K).float()")
    if faulty is not None and faulty.shape != (m,):
        raise _misfit("faulty", faulty, f"have shape [{m}]", f"write torch.zeros({m}, dtype=torch.int32)")


def _misfit(name: str, given: Tensor, expected: str, instead: str) -> ValueError:
    return ValueError(f"{name} must {expected}, got {list(given.shape)}: {instead}")
