"""Losses called like their authors' functions, and the keywords of the first version, which work with a warning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from bt_fast.attack.auto import runner_of
from bt_fast.attack.folded import Frozen
from bt_fast.attack.graph_cache import shared_cache
from bt_fast.attack.pgd import PGD, norm_of
from bt_fast.attack.pixels import Normalization
from bt_fast.attack.start import Noise
from bt_fast.attack.threat import NORMS, ThreatModel
from bt_fast.deprecated import check_keywords
from bt_fast.engine import Engine
from bt_fast.memory import Memory
from bt_fast.mining import BulletTrain
from bt_fast.objectives import arguments
from bt_fast.objectives.adversarial import Call, Unperturbed
from bt_fast.objectives.execution import Execution
from bt_fast.objectives.loss import AdversarialLoss
from bt_fast.objectives.passes import check_outside
from bt_fast.objectives.update import Update
from bt_fast.placement import Placement
from bt_fast.validation import check_choice, check_kind, size_of_step, step_count

if TYPE_CHECKING:
    from bt_fast.attack.balanced import Balance
    from bt_fast.attack.runners import Runner


class Deprecated(TypedDict, total=False):
    """The keywords of the first version."""

    unperturbed: Unperturbed | None
    start: Noise | None
    frozen: Frozen | None
    runner: Runner | str
    update: Update | None
    samples: Tensor | None
    balance: Balance | None
    normalization: Normalization | None


_ENGINE = "write engine='fast', or engine=Engine({option}=True) for this alone"
NEW_LINES = {
    "unperturbed": "write bullet=BulletTrain(..., unperturbed={value})",
    "start": "write criterion = {loss}(PGD(..., start={value}), ...), and criterion(model, x, y)",
    "frozen": _ENGINE.format(option="fold"),
    "runner": _ENGINE.format(option="graphs"),
    "update": _ENGINE.format(option="channels_last"),
    "samples": "write indices=, the same numbers",
    "balance": "write bullet=BulletTrain(..., balance=Balance())",
    "normalization": "write criterion = {loss}(PGD(..., normalization={value}), ...), and criterion(model, x, y)",
}


@dataclass(frozen=True, eq=False)
class Given:
    """The arguments common to all drop-ins, with their authors' names."""

    model: nn.Module
    x_natural: Tensor
    y: Tensor
    optimizer: torch.optim.Optimizer | None
    step_size: float
    epsilon: float
    perturb_steps: int
    distance: str
    bullet: BulletTrain | None
    engine: Engine | str
    generator: torch.Generator | None
    memory: Memory | None = None
    indices: Tensor | None = None
    placement: Placement | None = None

    def check(self) -> None:
        """Raises TypeError or ValueError, which names the argument, for errors that the host can see."""
        bullet, memory = self.bullet, self.memory
        check_choice("distance", self.distance, NORMS)
        ThreatModel(self.epsilon, self.distance)
        arguments.check_batch(self.x_natural, self.y, "x_natural")
        size_of_step("step_size", self.step_size, self.epsilon)
        arguments.check_optimizer(self.optimizer)
        check_kind("bullet", bullet, BulletTrain, "write bullet=BulletTrain() once, before the loop", optional=True)
        arguments.check_memory(memory)
        step_count("perturb_steps", self.perturb_steps, least=0 if bullet is not None and memory is None else 1)
        if memory is not None:
            self._check_memory(memory)
        elif bullet is not None and self.perturb_steps not in (10, bullet.boundary_steps):
            raise ValueError(
                f"perturb_steps is {self.perturb_steps}, but bullet takes {bullet.boundary_steps} boundary steps: "
                "leave perturb_steps out or make them equal"
            )

    def _check_memory(self, memory: Memory) -> None:
        if self.bullet is not None:
            arguments.check_counts(self.bullet, memory, "bullet")
        if self.perturb_steps not in (10, memory.steps[0]):
            raise ValueError(
                f"perturb_steps is {self.perturb_steps}, but memory takes {memory.steps[0]} (boundary) steps: "
                f"leave perturb_steps out, or write Memory(samples, steps=({self.perturb_steps}, 1, 0))"
            )
        if self.indices is None:
            raise ValueError(
                "indices must be given with a memory, got none: give each sample's number in its data set, as in "
                "indices=numbers"
            )

    @property
    def steps(self) -> int:
        """N, or with BulletTrain N_B, or those of the memory; at least 1."""
        if self.memory is not None:
            return self.memory.steps[0]
        return self.perturb_steps if self.bullet is None else max(self.bullet.boundary_steps, 1)


def call(
    kind: type[AdversarialLoss],
    given: Given,
    deprecated: Mapping[str, Any],
    *,
    start: Noise | None = None,
    function: str = "",
    **of_loss: Any,
) -> Tensor:
    """Calls the loss `kind` with a drop-in's arguments, and the attack's start and the function's name if not its own.

    `of_loss` are further arguments of the loss, for example `beta`.
    """
    known = NEW_LINES if kind.clean_forwards else {k: v for k, v in NEW_LINES.items() if k != "unperturbed"}
    check_keywords(function or kind.drop_in, deprecated, known, loss=kind.__name__)
    given.check()
    if given.bullet is None:
        check_outside(function or kind.drop_in, f"write criterion = {kind.__name__}(PGD(...), ...) before the loop")
    _check_old(deprecated, given.bullet)
    bullet, old = given.bullet, deprecated.get
    unperturbed, balance = old("unperturbed"), old("balance")
    if bullet is not None:
        unperturbed, balance = unperturbed or bullet.unperturbed, balance or bullet.balance
    balance = arguments.checked_balance(balance, bullet)
    indices = _indices(given, old("samples"))
    authors_l2 = given.distance == "l_2" and kind.step_in_l2_is_its_own
    attack = PGD(
        given.epsilon,
        2.0 * float(given.epsilon) / given.steps if authors_l2 else given.step_size,
        given.steps,
        norm_of(given.distance),
        start=start or old("start"),
        normalization=old("normalization"),
    )
    with _counts_kept_by_errors(bullet):
        loss = kind(attack, mining=bullet, engine=given.engine, memory=given.memory, **of_loss)
        loss._passes.owner = kind, attack
        execution = _execution(loss.engine, deprecated, given.x_natural)
        how = Call(execution, indices, given.generator, unperturbed, balance, "x_natural", placement=given.placement)
        value = loss.of_call(given.model, given.x_natural, given.y, how)
    if given.optimizer is not None:
        given.optimizer.zero_grad()
    return value


@contextmanager
def _counts_kept_by_errors(bullet: BulletTrain | None) -> Iterator[None]:
    """Takes back the counts that a memory gave the mining, if its first call fails."""
    counts = None if bullet is None else (bullet.boundary_steps, bullet.robust_steps, bullet.outlier_steps)
    try:
        yield
    except BaseException:
        if bullet is not None and counts is not None:
            bullet.boundary_steps, bullet.robust_steps, bullet.outlier_steps = counts
        raise


def _indices(given: Given, samples: Tensor | None) -> Tensor | None:
    """The samples' numbers, perhaps by the keyword of the first version; TypeError or ValueError unless they fit."""
    if given.indices is not None and samples is not None:
        raise ValueError("indices and samples are the same numbers, got both: leave samples out")
    name = "indices" if samples is None else "samples"
    indices = given.indices if samples is None else samples
    arguments.check_draws(given.x_natural, indices, given.generator, name)
    return indices


def _check_old(deprecated: Mapping[str, Any], bullet: BulletTrain | None) -> None:
    """Raises TypeError or ValueError for invalid values of old keywords."""
    for name, kind in (("frozen", Frozen), ("update", Update)):
        check_kind(name, deprecated.get(name), kind, "write engine='fast'", optional=True)
    if "runner" in deprecated:
        runner_of(deprecated["runner"])
    check_choice("start", deprecated.get("start"), ("normal", "uniform", None))
    check_choice("unperturbed", deprecated.get("unperturbed"), ("keep", "skip", None))
    if deprecated.get("unperturbed") is not None and bullet is None:
        raise ValueError(
            "unperturbed is an option of BulletTrain: it needs bullet=: give that, or leave unperturbed out"
        )


def _execution(engine: Engine, deprecated: Mapping[str, Any], x: Tensor) -> Execution:
    """Returns the execution for the engine, or for the old keywords that replace it."""
    frozen, runner, update = (deprecated.get(name) for name in ("frozen", "runner", "update"))
    if frozen is None and runner is None and update is None:
        return Execution.of(engine, shared_cache(engine), x)
    if engine != Engine():
        raise ValueError(
            f"engine={engine.name!r} says already how it is executed, but frozen, runner or update does, too: "
            "leave these out"
        )
    return Execution(frozen, runner_of(runner or "eager"), update)
