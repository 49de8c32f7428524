"""The attack on a minibatch, with or without BulletTrain, and the update that may start beside it.

TRADES, MART and PGD adversarial training share all of it; only their losses differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from bt_fast import faults, ops
from bt_fast.allocation import Oracle, three_groups
from bt_fast.attack import by_sample
from bt_fast.attack.apgd import APGD
from bt_fast.attack.balanced import Balance, start_balanced_attack
from bt_fast.attack.batch import AttackBatch
from bt_fast.attack.by_sample import NOTHING, PerSample
from bt_fast.attack.dlr import with_goal
from bt_fast.attack.folded import attack_model, independent
from bt_fast.attack.forward import clean_logits, eval_mode
from bt_fast.attack.generate import COMPARED, StartedAttack, start_attack
from bt_fast.attack.graph_cache import GraphCache
from bt_fast.attack.inner import TARGETED, Inner, OfAPGD, by_label, check_enough_classes, of_clean
from bt_fast.attack.neighbours import warn_of_neighbours
from bt_fast.attack.pgd import PGD
from bt_fast.attack.pixels import on_pixels
from bt_fast.attack.start import Noise, random_state, state_of_seed
from bt_fast.attack.statistics import Statistics, attack_view, undone_by_errors
from bt_fast.attack.threat import ThreatModel
from bt_fast.attack.wrapped import unwrapped
from bt_fast.deciding import STEP_FACTOR
from bt_fast.engine import Engine
from bt_fast.faults import CheckedRead, Fault
from bt_fast.labels import check_classes, for_loss, is_soft, largest_part, target_of
from bt_fast.mining import BulletTrain
from bt_fast.objectives import arguments, starts
from bt_fast.objectives.execution import Execution
from bt_fast.objectives.forwards import Forwards
from bt_fast.objectives.passes import NEW_ONES, other_samples
from bt_fast.objectives.recomputed import update_modes
from bt_fast.objectives.repeated_forward import moves_batch_norm_alone
from bt_fast.objectives.training_outputs import check_training_outputs
from bt_fast.objectives.update import Terms, run_update
from bt_fast.placement import Placement
from bt_fast.plan import Plan
from bt_fast.ranges import MINING, UPDATE, range_
from bt_fast.recalled import Recalled, step_size
from bt_fast.units import warn_of_units

Unperturbed = Literal["keep", "skip"]


@dataclass(frozen=True, eq=False)
class Call:
    """The options of one call of a loss or of `perturb`."""

    execution: Execution
    indices: Tensor | None  # [m] integers: only these and the seed decide the random starts
    generator: torch.Generator | None  # for the start, and for the replacement of a zero ℓ2 gradient
    unperturbed: Unperturbed | None  # None for the default of N_R and N_O
    balance: Balance | None  # how the ranks of the mining's process group share the attack
    name: str = "x"  # of the images in messages
    kept: object = None  # without mining: the attack of the first pass over this minibatch, which this one reuses
    owner: object = None  # with mining: of that attack
    updates: bool = True  # the model is trained on x' next, and so returns logits in the update's modes too
    embeds: bool = False  # its outputs need not be logits of the labels' classes
    own: PerSample = NOTHING  # what samples have of their own, in the units of x
    clean: Callable[[nn.Module, Tensor], Tensor] | None = None  # the update's clean forward, where it comes first
    placement: Placement | None = None  # where x lies in the frames of what is remembered
    recalled: Recalled | None = None  # what is remembered of the samples: where they start, and their steps

    @classmethod
    def of(
        cls,
        engine: Engine,
        cache: GraphCache,
        x: Tensor,
        y: Tensor | None,
        mining: BulletTrain | None,
        indices: Tensor | None,
        generator: torch.Generator | None,
        *,
        updates: bool = True,
    ) -> Call:
        """A call on images and labels, all checked; without an update there may be no labels."""
        arguments.check_batch(x, y, "x", optional=not updates)
        arguments.check_draws(x, indices, generator, "indices")
        balance = None if mining is None else arguments.checked_balance(mining.balance, mining)
        unperturbed = None if mining is None else mining.unperturbed
        return cls(Execution.of(engine, cache, x), indices, generator, unperturbed, balance, updates=updates)

    def on_pixels(self, pixels: Callable[[Tensor], Tensor]) -> Call:
        """The same with starts that are made pixels."""
        start = self.own.start
        return self if start is None else replace(self, own=replace(self.own, start=pixels(start)))


@dataclass(frozen=True, eq=False)
class Adversary:
    """A `PGD` or an `APGD` with a start and an inner loss, and the call in which it attacks."""

    threat: ThreatModel
    step_size: float  # 0 for an `APGD`, which has one for each sample
    steps: int  # not used with BulletTrain, which has its own
    noise: Noise
    inner: OfAPGD
    call: Call
    statistics: Statistics

    @classmethod
    def of(cls, attack: PGD | APGD, noise: Noise, inner: Inner, call: Call) -> Adversary:
        """The attack; `noise` and `inner` where it names none."""
        if (recalled := call.recalled) is not None:
            steps, size = recalled.counts[0], step_size(recalled.counts[0], attack.epsilon)
            return cls(attack.threat, size, steps, "normal", attack.inner or inner, call, attack.statistics)
        noise, size = attack.start or noise, 0.0 if isinstance(attack, APGD) else attack.step_size
        if isinstance(attack, APGD) and noise == "uniform":
            noise = "surface"
        return cls(attack.threat, size, attack.steps, noise, attack.inner or inner, call, attack.statistics)

    def batch(self, plan: Plan, begin: Tensor, clean: Tensor, target: Tensor, y: Tensor | None) -> AttackBatch:
        """The samples, in the plan's sorted order as all of these are, at the start. Waits for the plan's counts."""
        labels = None
        if y is not None and by_label(self.inner):
            labels = largest_part(y) if isinstance(self.inner, str) else for_loss(y, target.dtype)
            if not self.call.embeds and not is_soft(labels):
                labels = labels.clamp(0, target.shape[1] - 1)  # one out of range is a fault later
        together, epsilon = self.statistics != "running", self.radii(clean)
        batch = replace(AttackBatch.of(plan, begin, clean, target), inner=self.inner, labels=labels, together=together)
        return batch if epsilon is None else replace(batch, epsilon=plan.sort(epsilon))

    @property
    def own(self) -> PerSample:
        """What samples have of their own."""
        return self.call.own

    @property
    def wrong(self) -> Sequence[Fault]:
        """What may be wrong with the samples' numbers and placements, as the device sees."""
        return () if self.call.recalled is None else self.call.recalled.wrong

    @property
    def asks_clean(self) -> bool:
        """Whether it needs the clean outputs of each sample."""
        return of_clean(self.inner) or self.inner == TARGETED

    @property
    def still(self) -> bool:
        """Whether no sample can move."""
        return by_sample.still(self.own, self.threat)

    def clean_before(self, model: nn.Module, x: Tensor) -> Tensor | None:
        """The logits of the update's clean forward on x, with gradient, if mining and attack take them too."""
        if self.call.clean is None:
            return None
        with self.call.execution.autocast_of_update(x):
            return self.call.clean(model, x)

    def radii(self, x: Tensor) -> Tensor | None:
        """Each sample's own ε, if it has one, for images like x."""
        return by_sample.radii(self.own, self.threat, x)

    @property
    def numbers(self) -> Tensor | None:
        """Returns the samples' numbers in the form for the ops."""
        return None if self.call.indices is None else self.call.indices.long()

    def random_state(self, x: Tensor, offset: int = 0) -> Tensor:
        """Returns seed and offset of a start: drawn, or for numbered samples the generator's own seed and `offset`."""
        generator = self.call.generator
        return random_state(x, generator) if self.call.indices is None else state_of_seed(x, generator, offset)

    def queue(self, view: Callable[[Tensor], Tensor], batch: AttackBatch) -> StartedAttack:
        """Starts the attack's steps."""
        return start_attack(view, batch, self.threat, self.call.generator, self.call.execution.runner)


@dataclass(frozen=True, eq=False)
class Attack:
    """An attack with queued steps. Rows are in the plan's sorted order."""

    x: Tensor  # [m, ...], clean
    y: Tensor | None  # [m] int64, or [m, K] distributions
    started: StartedAttack
    threat: ThreatModel
    moving: int  # the number of samples with steps
    independent: bool  # a training forward may run beside it
    inputs: CheckedRead | None  # of the input's faults, if nothing has waited for them yet
    faulty: Tensor | None  # [m] int32, samples with NaN in their input gradient; None for a further pass
    plan: Plan
    logits: Tensor | None  # [m, K], clean, in the minibatch's own order; None if the attack needed none
    observed: bool = False  # whether the mining's `observe` raises the error of `faulty`, instead of `perturbed`
    into: Tensor | None = None  # [m], which of the attack's rows each row is; None: the same
    shared: Tensor | None = None  # [m, K] with gradient, of the update's clean forward, where the attack has run it

    def ended(self) -> Attack:
        """Returns the attack without pending checks, for a further pass."""
        return replace(self, independent=False, inputs=None, faulty=None, shared=None)

    @property
    def unable(self) -> Tensor | None:
        """`faulty` in the order of these rows; to be read when the attack has ended."""
        return self.faulty if self.faulty is None or self.into is None else self.faulty[self.into]

    def of_moving(self) -> Attack:
        """The samples that have steps alone, for an update; all where there are fewer than batch norm can train on."""
        n, shared = self.moving, None if self.shared is None else self.shared[: self.moving]
        return self if n < 2 or self.y is None else replace(self, x=self.x[:n], y=self.y[:n], shared=shared)

    def of_all(self, logits: Tensor) -> Tensor:
        """z' [m, K] of z' of the first rows: that of the others, whose x' is x, is the z by which they were judged."""
        n = len(logits)
        return (
            logits if n == len(self.x) or self.logits is None else torch.cat([logits, self.plan.sort(self.logits)[n:]])
        )

    def perturbed(self) -> tuple[Tensor, CheckedRead | None]:
        """Returns x', and a read to wait for when the device has work again. On the CPU faults are raised here."""
        x_adv = self.started.finish()
        x_adv = x_adv if self.into is None else x_adv[self.into]
        unable = None if self.observed else self.unable
        if unable is None:
            return x_adv, None
        read = faults.read([faults.gradients_without_direction(unable, self.plan.order)])
        if x_adv.is_cuda:  # it first has the update's forwards to do
            return x_adv, read
        read.wait()
        return x_adv, None


@contextmanager
def attacking(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None,
    pgd: PGD | APGD,
    defaults: tuple[Noise, Inner],
    bullet: BulletTrain | None,
    call: Call,
) -> Iterator[tuple[nn.Module, Attack]]:
    """Yields the model on pixels, and the attack on it, joined at the end; the block is under the engine's autocast.

    Args:
        defaults: start and inner loss for a `pgd` that names none.
    """
    images = on_pixels(model, x, pgd.normalization, call.name, pgd.bounds)
    moves = pgd.statistics == "tracked" or call.clean is not None  # by a forward before the input is known to be sound
    undone = undone_by_errors(model, x, call.generator, buffers=moves)
    with images as (model, pixels), call.execution.autocast(x), undone:
        if call.updates:
            check_training_outputs(model, x, pixels)
        attack = start(model, pixels(x), y, Adversary.of(pgd, *defaults, call.on_pixels(pixels)), bullet)
        with attack.started:
            if attack.inputs is not None:
                attack.inputs.wait()
            yield model, attack


def start(model: nn.Module, x: Tensor, y: Tensor | None, adversary: Adversary, bullet: BulletTrain | None) -> Attack:
    """Start the attack on checked arguments. With `bullet` what is wrong with their values is raised here."""
    x = x.detach()
    threat = adversary.threat
    bounds = threat.lower, threat.upper
    if adversary.own.epsilon is None and adversary.own.step_size is None:
        warn_of_units(threat.epsilon, threat.norm, bounds, adversary.step_size, x[0].numel())
    pixels = faults.pixels_outside(x, *bounds, adversary.call.name)
    x = faults.onto_bounds(x, *bounds)
    wrapped, model = model, unwrapped(model)
    execution = adversary.call.execution
    if bullet is None and adversary.call.kept is None:
        shared = adversary.clean_before(wrapped, x)
        with execution.autocast_of_attack(x):
            return _start_uniform(model, x, y, adversary, pixels, shared)
    assert y is not None
    if adversary.call.kept is not None or (bullet is not None and bullet._reuse):
        by_sample.check_made_anew(adversary.own)
    if (kept := adversary.call.kept if bullet is None else bullet.reused(adversary.call.owner)) is not None:
        return _reused(kept, x, y, threat, bullet)
    assert bullet is not None
    shared = adversary.clean_before(wrapped, x)
    with execution.autocast_of_attack(x):
        return _start_ragged(model, x, y, adversary, bullet, pixels, shared)


def _start_uniform(
    model: nn.Module, x: Tensor, y: Tensor | None, a: Adversary, pixels: Fault, shared: Tensor | None
) -> Attack:
    """The authors' attack, in which every sample takes `steps` steps, or its own number of them."""
    begin = starts.in_order(x, a)
    with attack_view(model, a.call.execution.view, x[:COMPARED], a.statistics) as view:
        if shared is not None:
            logits, name = shared.detach(), "the model's logits"
        elif a.asks_clean:
            logits, name = clean_logits(view, x, least=1 if a.call.embeds else 2), "the model's logits"
        else:  # two rows of the model itself tell the number of classes: a view would be compiled anew for them
            with nullcontext() if a.statistics == "running" else eval_mode(model):
                logits, name = clean_logits(model, x[:2]), "the model's logits of the first two samples"
        check_enough_classes(a.inner, logits.shape[1])
        wrong = [pixels, faults.rows_without_number(logits, name), *a.wrong]
        if y is not None and not a.call.embeds:
            check_classes("y", y, logits.shape[1])
            wrong.insert(1, faults.labels_outside(y, logits.shape[1], "y"))
        plan, inputs = by_sample.planned(a.own, a.threat, a.steps, a.step_size, x, wrong)
        if plan.order is not None:
            warn_of_neighbours(model, x, a.threat, "leave steps and epsilon of per_sample out")
        begin = by_sample.begun(a.own, a.threat, begin, x, plan.steps)
        x, begin = plan.sort(x), plan.sort(begin)
        labels = None if y is None else plan.sort(for_loss(y, ops.wide(logits).dtype))
        target = _target(a.inner, plan, labels, logits, _probabilities if a.asks_clean else ops.wide)
        batch = a.batch(plan, begin, x, target, labels)
        started = a.queue(view, batch)
    clean = logits if a.asks_clean else None
    attack = Attack(x, labels, started, a.threat, len(x), independent(view), inputs, batch.faulty, plan, clean)
    return attack if shared is None else replace(attack, shared=plan.sort(shared))


def _target(
    inner: OfAPGD, plan: Plan, y: Tensor | None, logits: Tensor, probabilities: Callable[[Tensor], Tensor]
) -> Tensor:
    """[m, K] in the plan's sorted order, as y is: what the attack moves away from. The logits are in their own."""
    if not isinstance(inner, str):
        return plan.sort(ops.wide(logits))
    of_logits = probabilities(logits)
    if of_clean(inner):
        return plan.sort(of_logits)
    assert y is not None
    target = target_of(y, of_logits)
    return with_goal(target, plan.sort(of_logits)) if inner == TARGETED else target


def _start_ragged(
    model: nn.Module, x: Tensor, y: Tensor, a: Adversary, bullet: BulletTrain, pixels: Fault, shared: Tensor | None
) -> Attack:
    """Starts Algorithm 2's attack. Waits for the counts: errors in the input are raised here."""
    with attack_model(model, a.call.execution.view, x[:COMPARED]) as view:
        with range_(MINING):  # until the counts have arrived
            logits = clean_logits(view, x) if shared is None else shared.detach()
            check_classes("y", y, logits.shape[1])
            check_enough_classes(a.inner, logits.shape[1])
            warn_of_neighbours(model, x, a.threat, "leave BulletTrain out")
            state, own = a.random_state(x), a.own
            sizes = by_sample.sizes_of(own, a.threat, a.step_size, x)
            attacked, of_attack = None, []
            if isinstance(bullet.policy, Oracle):
                attacked, gradients = _attacked_logits(view, x, y, logits, a, bullet.policy.steps)
                of_attack = [gradients]
            plan = bullet.start_plan(
                logits,
                y,
                epsilon=a.threat.epsilon if own.epsilon is None else 1.0,
                step_size=a.step_size or None,
                inputs=[pixels, *by_sample.wrong_values(own), *a.wrong],
                names=("the model's logits", "y"),
                attacked_logits=attacked,
                of_attack=of_attack,
                state=state,
                generator=a.call.generator,
            )
            numbers = a.numbers
            if plan.ranks is not None:
                state, first = plan.ranks.state, plan.ranks.first
                numbers = torch.arange(len(x), device=x.device) + first if numbers is None else numbers
            at_boundary = None if bullet.policy is three_groups else bullet.boundary_steps
            plan = by_sample.mined(own, a.threat, plan, at_boundary, a.step_size)
            if (recalled := a.call.recalled) is None:
                clean, begin = starts.sorted_by(x, plan.order, plan.steps, state, a, numbers)
            else:
                plan = recalled.sized(plan, a.threat.epsilon)
                clean, begin = recalled.starts(x, a.threat, state, numbers, plan.order, plan.steps)
            labels = for_loss(plan.sort(y), plan.probabilities.dtype)
            target = _target(a.inner, plan, labels, logits, lambda _: plan.probabilities)
            batch = a.batch(plan, begin, clean, target, labels)
            by_sample.warn_of(sizes)
        group, call = bullet.process_group, a.call
        if call.balance is None or group is None:
            started = a.queue(view, batch)
        else:
            how = (a.threat, call.generator, call.execution.runner, call.balance)
            started = start_balanced_attack(view, batch, *how, plan.steps_of_ranks, group)
    moving = batch.active[0] if batch.active else 0
    later = x.is_cuda or group is not None
    made = (clean, labels, started, a.threat, moving, independent(view), None, batch.faulty, plan, logits, later)
    return Attack(*made, shared=None if shared is None else plan.sort(shared))


def _attacked_logits(
    view: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, logits: Tensor, a: Adversary, steps: int
) -> tuple[Tensor, Fault]:
    """Returns logits [m, K] for the oracle's groups, after uniform steps of 1.7·ε/steps, and the attack's fault.

    It is the objective's own attack with other steps. Its random numbers are drawn after the training start's state.
    """
    state = a.random_state(x, offset=2)  # offsets 0 and 1 are those of the training start
    clean, begin = starts.sorted_by(x, None, None, state, a, a.numbers)
    sizes = STEP_FACTOR * by_sample.filled(a.own.epsilon, a.threat.epsilon, x) / steps
    plan = replace(Plan.uniform(len(x), 0 if a.still else steps, 1.0, x.device), step_size=sizes)
    target = _target(a.inner, plan, y, logits, _probabilities)
    batch = a.batch(plan, clean if a.still else begin, clean, target, y)
    attack = a.queue(view, batch)
    attacked = clean_logits(view, attack.finish())
    return attacked, faults.gradients_without_direction(batch.faulty)


def _probabilities(logits: Tensor) -> Tensor:
    """Returns the softmax of logits [m, K], rounded once, like that of the ops."""
    return logits.double().softmax(dim=1).to(ops.wide(logits).dtype)


def _reused(kept: object, x: Tensor, y: Tensor, threat: ThreatModel, bullet: BulletTrain | None) -> Attack:
    """The attack of the first pass over this minibatch, which has ended; its read checks that the minibatch is this."""
    if not isinstance(kept, Attack) or kept.threat != threat:
        made = f"with {kept.threat}" if isinstance(kept, Attack) else "by a script"
        raise ValueError(f"again(reuse=True) has the x' made {made}, but this loss attacks with {threat}: {NEW_ONES}")
    assert kept.y is not None
    others = [other_samples(kept.x, kept.y, x, y, kept.plan)]
    return replace(kept, inputs=faults.read(others) if bullet is None else bullet.start_again(others))


def run(model: nn.Module, attack: Attack, forwards: Forwards, execution: Execution) -> tuple[Terms, Tensor, bool]:
    """Runs the update, with its clean forward beside the attack if the result is the same.

    Returns the terms of `forwards`, x' in the plan's sorted order, and whether the clean forward ran beside.
    """
    assert attack.y is not None
    update, rows = execution.update, len(attack.x)
    with range_(UPDATE), execution.autocast_of_update(attack.x), update_modes(model) as modes:
        alone = attack.started.beside and attack.independent and not (update is not None and update.graphs)
        beside = alone and attack.shared is None and forwards.clean_first and moves_batch_norm_alone(model)
        clean = forwards.clean(model, attack.x) if beside else None
        if attack.shared is not None:
            clean = attack.shared, None
        x_adv, late = attack.perturbed()
        if clean is None:
            terms = run_update(update, model, forwards, attack.x, x_adv[:rows], attack.y, execution.cache)
        else:
            terms, _ = forwards.adversarial_half(unwrapped(model), clean, attack.x, x_adv[:rows], attack.y)
        modes.again_in_backward(terms)
    if late is not None:
        late.wait()
    return terms, x_adv, beside
