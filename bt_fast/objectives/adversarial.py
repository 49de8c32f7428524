"""The attack on a minibatch, with or without BulletTrain, and the update that may start beside it.

Everything that TRADES, MART and PGD adversarial training share: all but their losses.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bt_fast import faults, ops
from bt_fast.allocation import Oracle
from bt_fast.attack.balanced import Balance, start_balanced_attack
from bt_fast.attack.batch import AttackBatch
from bt_fast.attack.folded import Frozen, attack_model, independent
from bt_fast.attack.frozen import clean_logits, logits_of
from bt_fast.attack.generate import COMPARED, StartedAttack, start_attack
from bt_fast.attack.neighbours import warn_of_neighbours
from bt_fast.attack.runners import Runner
from bt_fast.attack.start import Noise, ball_start, normal_noise, random_state, sorted_start, state_of_seed
from bt_fast.attack.threat import ThreatModel
from bt_fast.attack.wrapped import unwrapped
from bt_fast.deciding import STEP_FACTOR
from bt_fast.faults import CheckedRead, Fault
from bt_fast.mining import BulletTrain
from bt_fast.objectives.again import NEW_ONES, check_alike, of_another
from bt_fast.objectives.recomputed import update_modes
from bt_fast.objectives.repeated_forward import moves_batch_norm_alone
from bt_fast.objectives.update import Computation, Terms, Update, run_update
from bt_fast.ops.numeric import computable, kind_of
from bt_fast.plan import Plan
from bt_fast.ranges import MINING, UPDATE, range_
from bt_fast.units import warn_of_units
from bt_fast.validation import check_choice, check_generator, check_kind, check_labels, positive, real, step_count

InnerLoss = Literal["kl", "cross_entropy"]
Unperturbed = Literal["keep", "skip"]


@dataclass(frozen=True, eq=False)
class Adversary:
    """How a minibatch is attacked.

    Attributes:
        threat: what a perturbation may be.
        step_size: α > 0, in pixel units; with BulletTrain of the boundary samples.
        steps: N ≥ 1; not used with BulletTrain, which has its own.
        noise: of the start: "normal" as TRADES, or "uniform" in the ball.
        inner: the loss that grows: "kl" away from the clean distribution, or "cross_entropy" away from the label.
        generator: on the images' device; for the start, and for the stand-in of a zero ℓ2 gradient.
        frozen: the view of the model that the attack sees; runner: how it is executed.
        samples: [m] integers, the samples' numbers, where their starts are to be decided by these and the seed alone.
        balance: how the ranks of BulletTrain's process group share the attack out, if they do.
    """

    threat: ThreatModel
    step_size: float
    steps: int
    noise: Noise
    inner: InnerLoss
    generator: torch.Generator | None
    frozen: Frozen | None
    runner: Runner
    samples: Tensor | None
    balance: Balance | None

    @property
    def numbers(self) -> Tensor | None:
        """The samples' numbers as the ops take them."""
        return None if self.samples is None else self.samples.long()

    @classmethod
    def of_trades(
        cls,
        threat: ThreatModel,
        step_size: float,
        steps: int,
        noise: Noise,
        inner: InnerLoss,
        bullet: BulletTrain | None,
        generator: torch.Generator | None,
        frozen: Frozen | None,
        runner: Runner,
        samples: Tensor | None,
        balance: Balance | None,
    ) -> Adversary:
        """The generator of the TRADES code, which MART took over: in ℓ2 its step is 2ε/N."""
        if threat.norm == "l_2":
            step_size = 2.0 * threat.epsilon / (steps if bullet is None else max(bullet.boundary_steps, 1))
        return cls(threat, step_size, steps, noise, inner, generator, frozen, runner, samples, balance)


@dataclass(frozen=True, eq=False)
class Attack:
    """An attack at work.

    Attributes:
        x: [m, ...] and y: [m] int64, in the plan's sorted order.
        started: what gives x'.
        threat: what x' may be.
        moving: the number of samples with steps.
        independent: a training forward may run beside it.
        inputs: the read of what is wrong with the input, if it has not been waited for.
        faulty: [m] int32, samples whose input gradient held NaN, in `order`; None where there has been no attack now.
        observed: it is for the mining's `observe` to raise an error of these, not for `perturbed`.
        order: [m] int64, which sample of the minibatch each is; None where they are in its own order.
    """

    x: Tensor
    y: Tensor
    started: StartedAttack
    threat: ThreatModel
    moving: int
    independent: bool
    inputs: CheckedRead | None
    faulty: Tensor | None
    observed: bool = False
    order: Tensor | None = None

    def perturbed(self) -> tuple[Tensor, CheckedRead | None]:
        """x', and a read to be waited for when the device has work again. On the CPU faults are raised here."""
        x_adv = self.started.finish()
        if self.faulty is None or self.observed:
            return x_adv, None
        read = faults.read([faults.gradients_without_direction(self.faulty, self.order)])
        if x_adv.is_cuda:  # it has the update's forwards to do before
            return x_adv, read
        read.wait()
        return x_adv, None


def start(model: nn.Module, x_natural: Tensor, y: Tensor, adversary: Adversary, bullet: BulletTrain | None) -> Attack:
    """Start the attack on checked arguments. With `bullet` what is wrong with their values is raised here."""
    x = x_natural.detach()
    threat = adversary.threat
    bounds = threat.lower, threat.upper
    warn_of_units(threat.epsilon, threat.norm, bounds, adversary.step_size, x[0].numel())
    pixels = faults.pixels_outside(x, *bounds, "x_natural")
    x = faults.onto_bounds(x, *bounds)
    model = unwrapped(model)
    if bullet is None:
        return _start_uniform(model, x, y, adversary, pixels)
    if (kept := bullet.reused()) is not None:
        return _reused(kept, x, y, adversary.threat, bullet)
    return _start_ragged(model, x, y, adversary, bullet, pixels)


def _start_uniform(model: nn.Module, x: Tensor, y: Tensor, adversary: Adversary, pixels: Fault) -> Attack:
    """The authors' attack, in which every sample takes `steps` steps."""
    a = adversary
    begin = _uniform_start(x, a)
    with attack_model(model, a.frozen, x[:COMPARED]) as view:
        if a.inner == "kl":
            logits, whose = clean_logits(view, x), "the model's logits"
            target = logits.double().softmax(dim=1).to(ops.wide(logits).dtype)  # rounded once, as the ops' own softmax
        else:  # two rows of the model itself tell the number of classes: a view would be compiled anew for them
            logits, whose = clean_logits(model, x[:2]), "the model's logits of the first two samples"
            target = _one_hot(y, ops.wide(logits))
        found = [pixels, faults.labels_outside(y, logits.shape[1], "y"), faults.rows_without_number(logits, whose)]
        inputs = faults.read(found)
        plan = Plan.uniform(len(x), a.steps, a.step_size, x.device)
        batch = AttackBatch.of(plan, begin, x, target)
        started = start_attack(view, batch, a.threat, a.generator, a.runner)
    return Attack(x, y.long(), started, a.threat, len(x), independent(view), inputs, batch.faulty)


def _uniform_start(x: Tensor, adversary: Adversary) -> Tensor:
    if adversary.samples is not None:
        state = state_of_seed(x, adversary.generator)
        return sorted_start(x, None, None, state, adversary.noise, adversary.threat, adversary.numbers)[1]
    if adversary.noise == "uniform":
        return ball_start(x, adversary.threat, adversary.generator)
    as_authors = adversary.generator is None and not x.is_cuda
    noise = normal_noise(x, adversary.generator, on_cpu=as_authors)
    if as_authors and adversary.threat.norm == "l_2":  # the TRADES code draws once more and uses the second
        noise = normal_noise(x, None, on_cpu=True)
    return (x + noise).to(x.dtype)


def _start_ragged(
    model: nn.Module, x: Tensor, y: Tensor, adversary: Adversary, bullet: BulletTrain, pixels: Fault
) -> Attack:
    """Algorithm 2's attack. Waits for the counts: what is wrong with the input is raised here."""
    a = adversary
    names = ("the model's logits", "y")
    with attack_model(model, a.frozen, x[:COMPARED]) as view:
        with range_(MINING):  # to the end of the wait for the counts
            logits = clean_logits(view, x)
            warn_of_neighbours(model, x, a.threat, "leave bullet out")
            state = random_state(x, a.generator) if a.samples is None else state_of_seed(x, a.generator)
            attacked, of_attack = None, []
            if isinstance(bullet.policy, Oracle):
                attacked, gradients = _attacked_logits(view, x, y, logits, a, bullet.policy.steps)
                of_attack = [gradients]
            plan = bullet.start_plan(
                logits,
                y,
                epsilon=a.threat.epsilon,
                step_size=a.step_size,
                inputs=[pixels],
                names=names,
                attacked_logits=attacked,
                of_attack=of_attack,
                state=state,
            )
            samples = a.numbers
            if plan.ranks is not None:
                state, first = plan.ranks.state, plan.ranks.first
                samples = torch.arange(len(x), device=x.device) + first if samples is None else samples
            clean, begin = sorted_start(x, plan.order, plan.steps, state, a.noise, a.threat, samples)
            labels = plan.sort(y).long()
            target = plan.sort(plan.probabilities) if a.inner == "kl" else _one_hot(labels, plan.probabilities)
            batch = AttackBatch.of(plan, begin, clean, target)
        how = (batch, a.threat, a.generator, a.runner)
        if a.balance is None or bullet.process_group is None:
            started = start_attack(view, *how)
        else:
            started = start_balanced_attack(view, *how, a.balance, plan.steps_of_ranks, bullet.process_group)
    moving = batch.active[0] if batch.active else 0
    later = x.is_cuda or bullet.process_group is not None
    return Attack(clean, labels, started, a.threat, moving, independent(view), None, batch.faulty, later, plan.order)


def _reused(kept: object, x: Tensor, y: Tensor, threat: ThreatModel, bullet: BulletTrain) -> Attack:
    """The attack of the first pass over this minibatch, which has ended; its read tells whether it is this one."""
    if not isinstance(kept, Attack) or kept.threat != threat:
        made = f"with {kept.threat}" if isinstance(kept, Attack) else "by augmix_loss"
        raise ValueError(f"again(reuse=True) has the x' made {made}, but this loss attacks with {threat}: {NEW_ONES}")
    order = slice(None) if kept.order is None else kept.order
    check_alike(kept.x, x)
    return replace(kept, inputs=bullet.start_again([of_another(kept.x, x[order], kept.y, y.long()[order])]))


def _attacked_logits(
    view: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, logits: Tensor, adversary: Adversary, steps: int
) -> tuple[Tensor, Fault]:
    """What the oracle's groups are told by: logits [m, K] after uniform steps of 1.7·ε/steps, and the attack's fault.

    It is the objective's own attack but for its steps. Its random numbers are drawn after the training start's state.
    """
    a = adversary
    # offsets 0 and 1 are those of the training start
    state = random_state(x, a.generator) if a.samples is None else state_of_seed(x, a.generator, offset=2)
    clean, begin = sorted_start(x, None, None, state, a.noise, a.threat, a.numbers)
    probabilities = logits.double().softmax(dim=1).to(ops.wide(logits).dtype)
    target = probabilities if a.inner == "kl" else _one_hot(y, probabilities)
    plan = Plan.uniform(len(x), steps, STEP_FACTOR * a.threat.epsilon / steps, x.device)
    batch = AttackBatch.of(plan, begin, clean, target)
    attack = start_attack(view, batch, a.threat, a.generator, a.runner)
    attacked = clean_logits(view, attack.finish())
    return attacked, faults.gradients_without_direction(batch.faulty)


def _one_hot(y: Tensor, like: Tensor) -> Tensor:
    """[m, K] with the columns and dtype of `like`; no row has a 1 for a label out of range, which is told later."""
    return (torch.arange(like.shape[1], device=y.device) == y.long()[:, None]).to(like.dtype)


# The update


_Clean = TypeVar("_Clean")


@dataclass(frozen=True)
class CleanFirst(ABC, Generic[_Clean]):
    """An update whose clean forward comes first, and may run beside the attack.

    Attributes:
        corrupted: the number of rows that run a corrupted forward.
        channels_last: the format of 4-d images.
    """

    corrupted: int
    channels_last: bool

    def steady(self, m: int) -> bool:
        """Whether every batch of m samples has the same shapes throughout."""
        return self.corrupted == m

    def __call__(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, replayable: bool | None = None
    ) -> tuple[Terms, bool]:
        """As `Computation` says."""
        return self.corrupted_half(unwrapped(model), self.clean(model, x, replayable), x, x_adv, y)

    @abstractmethod
    def clean(self, model: nn.Module, x: Tensor, replayable: bool | None = None) -> _Clean:
        """The forward of x."""

    @abstractmethod
    def corrupted_half(
        self, model: nn.Module, clean: _Clean, x: Tensor, x_adv: Tensor, y: Tensor
    ) -> tuple[Terms, bool]:
        """All that follows it."""

    def corrupted_logits(self, model: nn.Module, x_adv: Tensor, clean: Tensor) -> Tensor:
        """z' [corrupted, K]; like the clean logits where no row is corrupted."""
        rows = self.corrupted
        together = any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
        if rows == 0 and not together:  # other ranks may have rows, and their norm waits for this one
            return clean[:0]
        if rows == 1 and not together and any(isinstance(module, _BatchNorm) for module in model.modules()):
            rows = min(2, len(x_adv))  # batch norm cannot train on one row: an unperturbed one joins its statistics
        return logits_of(model, formatted(x_adv[:rows], self.channels_last))[: self.corrupted]


def formatted(x: Tensor, channels_last: bool) -> Tensor:
    """4-d images with the channel as the fastest index, if so."""
    return x.contiguous(memory_format=torch.channels_last) if channels_last and x.dim() == 4 else x


def filled_up(adversarial: Tensor, clean: Tensor) -> Tensor:
    """z' [m, K] of all samples: where a corrupted forward was left out, it is z."""
    left_out = clean[len(adversarial) :]
    return torch.cat([adversarial, left_out]) if len(left_out) else adversarial


def run(model: nn.Module, attack: Attack, computation: Computation, update: Update | None) -> Terms:
    """The update's terms, its clean forward beside the attack where that is the same."""
    with attack.started:
        if attack.inputs is not None:
            attack.inputs.wait()
        with range_(UPDATE), update_modes(model) as modes:
            beside = attack.started.beside and attack.independent and not (update is not None and update.graphs)
            if beside and isinstance(computation, CleanFirst) and moves_batch_norm_alone(model):
                clean = computation.clean(model, attack.x)
                x_adv, late = attack.perturbed()
                terms, _ = computation.corrupted_half(unwrapped(model), clean, attack.x, x_adv, attack.y)
            else:
                x_adv, late = attack.perturbed()
                terms = run_update(update, model, computation, attack.x, x_adv, attack.y)
            modes.again_in_backward(terms)
    if late is not None:
        late.wait()
    return terms


def corrupted_rows(attack: Attack, bullet: BulletTrain | None, unperturbed: Unperturbed | None) -> int:
    """How many rows, from the first, run a corrupted forward.

    The default of `unperturbed` is that of N_R and N_O for every policy, whatever counts it gives.
    """
    if bullet is None:
        return len(attack.x)
    keep = unperturbed == "keep" if unperturbed else (bullet.robust_steps or bullet.outlier_steps)
    return len(attack.x) if keep else attack.moving


def conclude(
    optimizer: torch.optim.Optimizer | None, bullet: BulletTrain | None, judged: Tensor, attack: Attack
) -> None:
    """What follows the forwards: F_R moves by z' of all samples, and the optimizer's gradients are zeroed."""
    if bullet is not None:
        bullet.observe(judged, attack.y, order=attack.order, faulty=attack.faulty)
        bullet.keep(replace(attack, independent=False, inputs=None, faulty=None))
    if optimizer is not None:
        optimizer.zero_grad()


# Arguments

AS_FLOATS = "of bytes write x.float() / 255"


def check(
    x: Tensor,
    y: Tensor,
    optimizer: torch.optim.Optimizer | None,
    step_size: float,
    perturb_steps: int,
    bullet: BulletTrain | None,
    generator: torch.Generator | None,
    frozen: Frozen | None,
    update: Update | None,
    samples: Tensor | None = None,
    balance: Balance | None = None,
) -> None:
    """Raise TypeError or ValueError, which names the argument, for what the host can see of the objectives' own."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"x_natural must be a tensor of images, got {type(x).__name__}: write torch.as_tensor(x_natural)"
        )
    if not computable(x):
        raise TypeError(f"x_natural must be floating-point images, got {kind_of(x)}: {AS_FLOATS}")
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(
            f"x_natural must have shape [m, ...] with m >= 1, got {list(x.shape)}: of one image write x[None], and "
            "leave empty minibatches out"
        )
    check_labels(y, len(x), x.device, "y")
    if samples is not None:
        check_labels(samples, len(x), x.device, "samples")
    positive("step_size", step_size)
    if optimizer is not None and not hasattr(optimizer, "zero_grad"):
        raise TypeError(
            f"optimizer must be an optimizer or None, got {type(optimizer).__name__}: "
            "give the one of the model's parameters"
        )
    check_kind("bullet", bullet, BulletTrain, "write bullet=BulletTrain() once, before the loop", optional=True)
    check_generator(generator, x.device)
    check_kind("frozen", frozen, Frozen, "write frozen=Frozen()", optional=True)
    check_kind("update", update, Update, "write update=Update()", optional=True)
    check_kind("balance", balance, Balance, "write balance=Balance()", optional=True)
    if balance is not None and (bullet is None or bullet.process_group is None):
        raise ValueError(
            "balance shares an attack out over ranks: it needs bullet=BulletTrain(process_group=...): "
            "give that, or leave balance out"
        )
    step_count("perturb_steps", perturb_steps, least=1 if bullet is None else 0)
    if bullet is not None and perturb_steps not in (10, bullet.boundary_steps):
        raise ValueError(
            f"perturb_steps is {perturb_steps}, but bullet takes {bullet.boundary_steps} boundary steps: "
            "leave perturb_steps out or make them equal"
        )


def noise_of(start: Noise | None, default: Noise) -> Noise:
    """The noise of the option `start`, or ValueError."""
    check_choice("start", start, ("normal", "uniform", None))
    return start or default


def check_robust_term(beta: float, unperturbed: Unperturbed | None, bullet: BulletTrain | None) -> None:
    """Raise TypeError or ValueError unless the options of a loss with a robust term fit."""
    if not (real("beta", beta) >= 0 and math.isfinite(beta)):
        raise ValueError(f"beta must be a finite number of at least 0, got {beta}: write beta=6.0")
    check_choice("unperturbed", unperturbed, ("keep", "skip", None))
    if unperturbed is not None and bullet is None:
        raise ValueError(
            "unperturbed is an option of BulletTrain: it needs bullet=: give that, or leave unperturbed out"
        )
