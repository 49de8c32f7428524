"""The attack on a minibatch, with or without BulletTrain, and the update that may start beside it.

Everything that TRADES, MART and PGD adversarial training share: all but their losses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bt_fast import faults, ops
from bt_fast.allocation import Oracle
from bt_fast.attack.balanced import Balance, start_balanced_attack
from bt_fast.attack.batch import AttackBatch
from bt_fast.attack.folded import Frozen, attack_model, independent
from bt_fast.attack.forward import clean_logits
from bt_fast.attack.generate import COMPARED, StartedAttack, start_attack
from bt_fast.attack.graph_cache import GraphCache
from bt_fast.attack.neighbours import warn_of_neighbours
from bt_fast.attack.pgd import PGD, InnerLoss
from bt_fast.attack.runners import Runner
from bt_fast.attack.start import Noise, ball_start, normal_noise, random_state, sorted_start, state_of_seed
from bt_fast.attack.threat import ThreatModel
from bt_fast.attack.wrapped import unwrapped
from bt_fast.deciding import STEP_FACTOR
from bt_fast.faults import CheckedRead, Fault
from bt_fast.mining import BulletTrain
from bt_fast.objectives.again import NEW_ONES, check_alike, of_another
from bt_fast.objectives.forwards import Forwards
from bt_fast.objectives.recomputed import update_modes
from bt_fast.objectives.repeated_forward import moves_batch_norm_alone
from bt_fast.objectives.update import Terms, Update, run_update
from bt_fast.ops.numeric import computable, kind_of
from bt_fast.plan import Plan
from bt_fast.ranges import MINING, UPDATE, range_
from bt_fast.units import warn_of_units
from bt_fast.validation import check_generator, check_labels


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
        plan: who takes how many steps.
        logits: [m, K], the clean ones of the attack's view in the minibatch's own order; None where it needed none.
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
    plan: Plan
    logits: Tensor | None
    observed: bool = False
    order: Tensor | None = None

    def ended(self) -> Attack:
        """The same with nothing left to be checked, for a further pass and for who asks for x'."""
        return replace(self, independent=False, inputs=None, faulty=None)

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


def start(
    model: nn.Module, x: Tensor, y: Tensor, adversary: Adversary, bullet: BulletTrain | None, name: str
) -> Attack:
    """Start the attack on checked arguments. With `bullet` what is wrong with their values is raised here.

    Args:
        name: of x in messages.
    """
    x = x.detach()
    threat = adversary.threat
    bounds = threat.lower, threat.upper
    warn_of_units(threat.epsilon, threat.norm, bounds, adversary.step_size, x[0].numel())
    pixels = faults.pixels_outside(x, *bounds, name)
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
    clean = logits if a.inner == "kl" else None
    return Attack(x, y.long(), started, a.threat, len(x), independent(view), inputs, batch.faulty, plan, clean)


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
            warn_of_neighbours(model, x, a.threat, "leave BulletTrain out")
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
    found = (started, a.threat, moving, independent(view), None, batch.faulty, plan, logits)
    return Attack(clean, labels, *found, observed=later, order=plan.order)


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


@dataclass(frozen=True, eq=False)
class Ran:
    """An update that has run.

    Attributes:
        terms: as `Forwards` gives them.
        x_adv: [m, ...], x', in the attack's order.
        beside: whether its clean forward ran beside the attack.
    """

    terms: Terms
    x_adv: Tensor
    beside: bool


def run(model: nn.Module, attack: Attack, forwards: Forwards, update: Update | None, cache: GraphCache | None) -> Ran:
    """Run the update, its clean forward beside the attack where that is the same."""
    with attack.started:
        if attack.inputs is not None:
            attack.inputs.wait()
        with range_(UPDATE), update_modes(model) as modes:
            alone = attack.started.beside and attack.independent and not (update is not None and update.graphs)
            beside = alone and forwards.clean_first and moves_batch_norm_alone(model)
            if beside:
                clean = forwards.clean(model, attack.x)
                x_adv, late = attack.perturbed()
                terms, _ = forwards.adversarial_half(unwrapped(model), clean, attack.x, x_adv, attack.y)
            else:
                x_adv, late = attack.perturbed()
                terms = run_update(update, model, forwards, attack.x, x_adv, attack.y, cache)
            modes.again_in_backward(terms)
    if late is not None:
        late.wait()
    return Ran(terms, x_adv, beside)


# Arguments

AS_FLOATS = "of bytes write x.float() / 255"


def check_batch(x: Tensor, y: Tensor, name: str) -> None:
    """Raise TypeError or ValueError for images or labels that the host can see to be none; `name` is that of x."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of images, got {type(x).__name__}: write torch.as_tensor({name})")
    if not computable(x):
        raise TypeError(f"{name} must be floating-point images, got {kind_of(x)}: {AS_FLOATS}")
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(
            f"{name} must have shape [m, ...] with m >= 1, got {list(x.shape)}: of one image write x[None], and "
            "leave empty minibatches out"
        )
    check_labels(y, len(x), x.device, "y")


def check_optimizer(optimizer: object) -> None:
    """Raise TypeError unless it is an optimizer or None."""
    if optimizer is not None and not hasattr(optimizer, "zero_grad"):
        raise TypeError(
            f"optimizer must be an optimizer or None, got {type(optimizer).__name__}: "
            "give the one of the model's parameters"
        )


def check_steps(attack: PGD, mining: BulletTrain | None) -> None:
    """Raise ValueError unless attack and mining agree on the steps of a boundary sample."""
    if mining is not None and mining.boundary_steps not in (0, attack.steps):
        raise ValueError(
            f"attack takes {attack.steps} steps, but mining {mining.boundary_steps} boundary steps: "
            f"write BulletTrain({attack.steps}, ...), or the same number for both"
        )


def check_draws(x: Tensor, indices: Tensor | None, generator: torch.Generator | None, name: str) -> None:
    """Raise TypeError or ValueError for what decides the random start; `name` is that of the indices."""
    if indices is not None:
        check_labels(indices, len(x), x.device, name)
    check_generator(generator, x.device)


def checked_balance(balance: object, mining: BulletTrain | None) -> Balance | None:
    """The balance; TypeError or ValueError unless there are ranks that could share an attack out so."""
    if balance is None:
        return None
    if not isinstance(balance, Balance):
        raise TypeError(f"balance must be a Balance or None, got {type(balance).__name__}: write balance=Balance()")
    if mining is None or mining.process_group is None:
        raise ValueError(
            "balance shares an attack out over ranks: it needs a BulletTrain with process_group=...: "
            "give that, or leave balance out"
        )
    return balance
