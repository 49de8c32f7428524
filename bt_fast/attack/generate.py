"""Images, model and plan in; perturbed images out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor, nn

from bt_fast.attack.auto import runner_of
from bt_fast.attack.batch import AttackBatch
from bt_fast.attack.folded import Frozen, FrozenModel, attack_model
from bt_fast.attack.graph_cache import shared_cache, view_of
from bt_fast.attack.runners import Runner, joined, start_of
from bt_fast.attack.threat import ThreatModel, check_threat
from bt_fast.deprecated import check_keywords
from bt_fast.engine import Engine
from bt_fast.ops.numeric import computable, kind_of
from bt_fast.plan import Plan
from bt_fast.units import warn_of_units
from bt_fast.validation import check_kind

if TYPE_CHECKING:
    from typing_extensions import Unpack

COMPARED = 8  # samples on which a view of the model is held against it, once

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
    generator: torch.Generator | None = None,
    faulty: Tensor | None = None,
    engine: Engine | str = "exact",
    **deprecated: Unpack[Deprecated],
) -> Tensor:
    """Run the ragged attack: maximise the divergence of the model's output from `target`.

    The model runs in eval mode and comes back in the modes in which it was found; its parameters' gradients are not
    touched. Each sample's result depends on no other sample. A sample with 0 steps comes back as its `start`.

    Args:
        model: maps [n, ...] to logits [n, K].
        clean: [m, ...] floating point in the plan's sorted order, x.
        start: [m, ...] in the plan's sorted order, where the attack begins; not changed.
        target: [m, K] in the plan's sorted order: the clean probabilities for KL, a one-hot label for cross-entropy.
        plan: who takes how many steps of which size.
        threat: what a perturbation may be.
        generator: on the images' device; its numbers stand in for a direction where an ℓ2 gradient is 0.
        faulty: [m] int32 in the plan's sorted order, on the images' device, set to 1 for each sample that could not
            move in some step, since its input gradient held NaN (in ℓ2: or Inf).
            `faults.gradients_without_direction` makes an error of it.
        engine: how the attack is executed, by name or as an `Engine`.
        deprecated: keywords of the first version; each warns with the new line.

    Returns:
        [m, ...] in the plan's sorted order, without gradient.

    Raises:
        TypeError: the images are not floating point, or the model does not return such logits.
        ValueError: shapes do not fit together, or the model does not return logits [n, K]. Values are not checked
            here (that would mean to wait for the device): `trades_loss` and `evaluate` check them.
    """
    check_keywords("generate", deprecated, NEW_LINES)
    _check(clean, start, target, plan, faulty)
    check_threat(threat)
    chosen = Engine.of(engine)
    frozen, runner = view_of(chosen), shared_cache(chosen).runner(chosen, clean)
    if any(value is not None for value in deprecated.values()):
        if chosen != Engine():
            raise ValueError(
                f"engine={chosen.name!r} says already how it is executed, but frozen or runner does, too: "
                "leave these out"
            )
        frozen, runner = deprecated.get("frozen"), runner_of(deprecated.get("runner", "eager"))
    warn_of_units(threat.epsilon, threat.norm, (threat.lower, threat.upper), pixels=clean[:1].numel() or 1)
    with torch.inference_mode(False), attack_model(model, frozen, clean[:COMPARED].detach()) as view:
        batch = AttackBatch.of(plan, start, clean, target, faulty)
        return start_attack(view, batch, threat, generator, runner).finish()


class StartedAttack:
    """An attack whose steps are queued, perhaps on streams of its own. A `with` block leaves with it joined."""

    def __init__(self, x_adv: Tensor, join: Callable[[], None], contiguous: bool) -> None:
        self._x_adv, self._join, self._contiguous = x_adv, join, contiguous

    @property
    def beside(self) -> bool:
        """Whether what the caller queues now runs beside the attack."""
        return self._join is not joined

    def __enter__(self) -> StartedAttack:
        return self

    def __exit__(self, *error: object) -> None:
        self._join()

    def finish(self) -> Tensor:
        """x' [m, ...], once the caller's stream waits for the steps."""
        self._join()
        self._join = joined  # not once more at the end of the block
        if self._contiguous:
            self._x_adv, self._contiguous = self._x_adv.contiguous(), False
        return self._x_adv


def start_attack(
    view: Callable[[Tensor], Tensor],
    batch: AttackBatch,
    threat: ThreatModel,
    generator: torch.Generator | None,
    runner: Runner,
) -> StartedAttack:
    """Queue the attack on a view of the model, as `attack_model` gives it and inside its `with` block.

    Where the runner has streams of its own, what the caller queues before `finish` runs beside the attack.

    Args:
        batch: its `x_adv` is where the attack starts, and is not changed.
    """
    start = batch.x_adv
    if not batch.active or batch.active[0] == 0:
        return StartedAttack(start.detach().clone(memory_format=torch.preserve_format), joined, False)
    with torch.inference_mode(False):
        last = isinstance(view, FrozenModel) and view.channels_last and start.dim() == 4
        clean = batch.clean.detach()
        if last:
            x_adv = start.detach().clone(memory_format=torch.channels_last)
            clean = clean.contiguous(memory_format=torch.channels_last)
        else:
            x_adv = start.detach().clone(memory_format=torch.preserve_format)
        attacked = replace(batch, x_adv=x_adv, clean=clean, target=batch.target.detach())
        join = start_of(runner)(view, attacked, threat, generator)
        return StartedAttack(x_adv, join, last and start.is_contiguous())


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
    if clean.dim() == 0 or len(clean) != m:
        raise ValueError(
            f"clean must hold the plan's {m} samples, got shape {list(clean.shape)}: "
            "give the images that the plan was made for"
        )
    if start.shape != clean.shape:
        raise ValueError(
            f"start must have clean's shape {list(clean.shape)}, got {list(start.shape)}: give one start for each image"
        )
    if target.dim() != 2 or len(target) != m:
        raise ValueError(
            f"target must have shape [{m}, K], got {list(target.shape)}: "
            "give a row for each image, its softmax or its one-hot label"
        )
    if faulty is not None and faulty.shape != (m,):
        raise ValueError(
            f"faulty must have shape [{m}], got {list(faulty.shape)}: write torch.zeros({m}, dtype=torch.int32)"
        )
