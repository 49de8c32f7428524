"""TRADES (Zhang et al., 2019), with or without BulletTrain: the drop-in for the authors' `trades_loss`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bt_fast import faults, ops
from bt_fast.attack.auto import runner_of
from bt_fast.attack.folded import Frozen, attack_model, independent
from bt_fast.attack.frozen import clean_logits, logits_of, modes_restored
from bt_fast.attack.generate import COMPARED, TRADES_NOISE, StartedAttack, normal_noise, start_attack
from bt_fast.attack.runners import Runner
from bt_fast.attack.schedule import Schedule
from bt_fast.attack.threat import ThreatModel
from bt_fast.faults import CheckedRead, Fault
from bt_fast.mining import BulletTrain, check_labels, positive, real, step_count
from bt_fast.objectives.repeated_forward import RepeatedForward, moves_batch_norm_alone
from bt_fast.objectives.update import Terms, Update, run_update

Unperturbed = Literal["keep", "skip"]


def trades_loss(
    model: nn.Module,
    x_natural: Tensor,
    y: Tensor,
    optimizer: torch.optim.Optimizer | None,
    step_size: float = 0.003,
    epsilon: float = 0.031,
    perturb_steps: int = 10,
    beta: float = 1.0,
    distance: str = "l_inf",
    *,
    bullet: BulletTrain | None = None,
    unperturbed: Unperturbed | None = None,
    generator: torch.Generator | None = None,
    frozen: Frozen | None = None,
    runner: Runner | str = "eager",
    update: Update | None = None,
) -> Tensor:
    """The TRADES loss `CE(h(x), y) + β/m · Σ KL(softmax h(x) ‖ softmax h(x'))`, ready for `backward()`.

    Without `bullet` it is the authors' result (loss, gradients, batch-norm buffers) at 27 forward-pass equivalents
    for ten steps instead of their 39. With `bullet` it is Algorithm 2 of the BulletTrain paper: steps by group, the
    samples sorted by descending steps, F_R moved by the corrupted samples' accuracy.

    The attack runs in eval mode. The update's forwards run in the modes in which the model was found, module by
    module; a model found in eval mode as a whole runs them in train mode, as the authors' code makes it. The modes are
    restored. A model that draws random numbers in its forward (dropout) runs the clean forward of the update twice
    without `bullet`, as the authors' code does, and once with it.

    Args:
        model: maps [m, ...] to logits [m, K].
        x_natural: [m, ...] floating point in [0, 1], m ≥ 1.
        y: [m] integers in 0..K-1.
        optimizer: its `zero_grad()` is called, as the authors' code does; None leaves the gradients as they are, for
            gradient accumulation.
        step_size: α > 0 in ℓ∞ (with `bullet`: of the boundary samples), in pixel units. Not used in ℓ2, where the
            step is 2ε/N.
        epsilon: ε > 0, in pixel units.
        perturb_steps: N ≥ 1. With `bullet` its own counts hold, and a value that is neither N_B nor the default is an
            error.
        beta: β ≥ 0, the weight of the robust term.
        distance: "l_inf" or "l_2".
        bullet: the mining state, on the images' device.
        unperturbed: whether samples with 0 steps, whose x' is x, take part in the update's corrupted forward. "keep":
            they do, and in train mode with batch norm their KL is small but not 0, since the two forwards have
            different batch statistics. "skip": they do not, and their KL is 0 (a single moving sample takes one along
            for batch norm's sake). The default is "skip" where N_R = N_O = 0 and "keep" elsewhere (Algorithm 2 and
            section 3.2 of the paper differ here).
        generator: on the images' device, for the random start. Without it and without `bullet`, images on the CPU
            draw as the authors' code does, so that a seeded script repeats its numbers. With `bullet`, only a seed is
            drawn, from this generator or the device's own: a sample's noise is that of `ops.gather_start`.
        frozen: a faster view of the model for the attack, `Frozen()`: the same up to rounding. Without it the attack
            sees the model itself.
        runner: how the attack is executed: "eager", step by step; from CUDA "graphs"; on "streams"; "auto", the fastest
            of these, tried once (`RUNNERS["auto"].reasons` says why); or a runner of one's own, such as
            `GraphRunner(bucket=16)`. Graphs and streams queue it on streams of their own; the update's clean forward
            then runs beside it where that changes nothing: with a `frozen` view that reads no statistics of the model's
            norms, and where a forward is known to move no buffers but those of batch norm.
        update: how the update is executed, `Update()`: the same up to rounding. Without it as the authors' code does.

    Returns:
        0-dim loss with gradient to the model's parameters.

    Raises:
        TypeError: images are not floating point, labels not integers, or the model does not return a tensor.
        ValueError: a shape, device, option or value does not fit (pixels outside [0, 1], labels out of range, NaN
            logits, NaN in the input gradient). Nothing has been changed then: no buffer, no gradient, no F_R. Only what
            goes wrong in the update's own forwards, after a sound attack, leaves batch-norm buffers moved. On a GPU NaN
            in an input gradient is known after those forwards, and with `bullet` raised by the next call. What the
            attack itself raises (the model's own exceptions, out of memory) comes before them, beside it or not.
    """
    threat = ThreatModel(epsilon, distance)
    _check(x_natural, y, optimizer, step_size, perturb_steps, beta, bullet, unperturbed, generator, frozen, update)
    run = runner_of(runner)
    x = x_natural.detach()
    pixels = faults.pixels_outside(x, threat.lower, threat.upper, "x_natural")
    options = (threat, generator, frozen, run, pixels)
    if bullet is None:
        attack = _start_uniform(model, x, y, step_size, perturb_steps, *options)
        corrupted = len(x)
    else:
        attack = _start_ragged(model, x, y, step_size, bullet, *options)
        keep = unperturbed == "keep" if unperturbed else (bullet.robust_steps or bullet.outlier_steps)
        corrupted = len(x) if keep else attack.moving
    computation = _Computation(corrupted, bullet is None, update is not None and update.channels_last)
    natural, robust, judged = _update(model, attack, computation, update)
    if bullet is not None:
        bullet.update(judged, attack.y)
    _zero_grad(optimizer)
    return natural + beta / len(x) * robust


@dataclass(frozen=True, eq=False)
class _Attack:
    """An attack at work.

    Attributes:
        x: [m, ...] and y: [m] int64, in the schedule's order.
        started: what gives x'.
        moving: the number of samples with steps.
        independent: a training forward may run beside it.
        inputs: the read of what is wrong with the input, if it has not been waited for.
        report: to be called when it has finished; a read to be waited for when the device has work again.
    """

    x: Tensor
    y: Tensor
    started: StartedAttack
    moving: int
    independent: bool
    inputs: CheckedRead | None
    report: Callable[[], CheckedRead | None]


def _start_uniform(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    step_size: float,
    steps: int,
    threat: ThreatModel,
    generator: torch.Generator | None,
    frozen: Frozen | None,
    runner: Runner,
    pixels: Fault,
) -> _Attack:
    """The authors' attack, in which every sample takes `steps` steps."""
    as_authors = generator is None and not x.is_cuda
    start = x + normal_noise(x, generator, on_cpu=as_authors)
    if threat.norm == "l_2":
        if as_authors:  # the TRADES code draws once more and uses the second
            start = x + normal_noise(x, generator, on_cpu=True)
        step_size = 2.0 * threat.epsilon / steps
    with attack_model(model, frozen, x[:COMPARED]) as view:
        logits = clean_logits(view, x)
        target = logits.double().softmax(dim=1).to(ops.wide(logits).dtype)  # rounded once, as the ops' own softmax
        found = [
            pixels,
            faults.labels_outside(y, logits.shape[1], "y"),
            faults.rows_without_number(logits, "the model's logits"),
        ]
        inputs = faults.read(found)
        schedule = Schedule.uniform(len(x), steps, step_size, x.device)
        faulty = _none_faulty(x)
        start = start.to(x.dtype)
        started = start_attack(view, x, start, target, schedule, threat, generator, faulty, runner)

    def report() -> CheckedRead | None:
        gradients = faults.read([faults.gradients_without_direction(faulty)])
        if x.is_cuda:  # the device has the update's forwards to do before
            return gradients
        gradients.wait()
        return None

    return _Attack(x, y.long(), started, len(x), independent(view), inputs, report)


def _start_ragged(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    step_size: float,
    bullet: BulletTrain,
    threat: ThreatModel,
    generator: torch.Generator | None,
    frozen: Frozen | None,
    runner: Runner,
    pixels: Fault,
) -> _Attack:
    """Algorithm 2's attack. Waits for the counts: what is wrong with the input is raised here."""
    if threat.norm == "l_2":
        step_size = 2.0 * threat.epsilon / max(bullet.boundary_steps, 1)
    with attack_model(model, frozen, x[:COMPARED]) as view:
        logits = clean_logits(view, x)
        assignment = bullet.start_assignment(
            logits, y, epsilon=threat.epsilon, step_size=step_size, inputs=[pixels], names=("the model's logits", "y")
        )
        state = random_state(x, generator)
        clean, start = ops.gather_start(x, assignment.order, assignment.steps, state, "normal", TRADES_NOISE)
        schedule = Schedule.from_assignment(assignment)
        target = schedule.sort(assignment.probabilities)
        faulty = _none_faulty(x)
        started = start_attack(view, clean, start, target, schedule, threat, generator, faulty, runner)

    def report() -> None:
        bullet.report_attack(assignment, faulty)

    moving = schedule.active[0] if schedule.active else 0
    return _Attack(clean, schedule.sort(y).long(), started, moving, independent(view), None, report)


def _update(model: nn.Module, attack: _Attack, computation: _Computation, update: Update | None) -> Terms:
    """The update's terms, its clean forward beside the attack where that is the same."""
    with attack.started as started:
        if attack.inputs is not None:
            attack.inputs.wait()
        with _update_modes(model):
            clean = None
            graphs = update is not None and update.graphs
            if started.beside and attack.independent and not graphs and moves_batch_norm_alone(model):
                clean = computation.clean(model, attack.x)
            x_adv = started.finish()
            late = attack.report()
            if clean is None:
                terms = run_update(update, model, computation, attack.x, x_adv, attack.y)
            else:
                terms, _ = computation.corrupted_half(model, clean, attack.x, x_adv, attack.y)
    if late is not None:
        late.wait()
    return terms


@dataclass(frozen=True)
class _Computation:
    """The update's forwards and the terms of its loss.

    Attributes:
        corrupted: the number of rows that run a corrupted forward.
        rerun: a clean forward that cannot be replayed runs again and gives the target, as in the authors' code.
        channels_last: the format of 4-d images.
    """

    corrupted: int
    rerun: bool
    channels_last: bool

    def steady(self, m: int) -> bool:
        """Whether every batch of m samples has the same shapes throughout."""
        return self.corrupted == m

    def __call__(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, replayable: bool | None = None
    ) -> tuple[Terms, bool]:
        """The natural and the robust term, the logits of all corrupted samples, and whether x's forward repeats."""
        return self.corrupted_half(model, self.clean(model, x, replayable), x, x_adv, y)

    def clean(self, model: nn.Module, x: Tensor, replayable: bool | None = None) -> tuple[Tensor, RepeatedForward]:
        """The forward of x, and what it did to the buffers."""
        repeat = RepeatedForward(model, x.device, replayable)
        logits = logits_of(model, self._formatted(x))
        repeat.first_done()
        return logits, repeat

    def corrupted_half(
        self, model: nn.Module, clean: tuple[Tensor, RepeatedForward], x: Tensor, x_adv: Tensor, y: Tensor
    ) -> tuple[Terms, bool]:
        """All that follows it."""
        logits, repeat = clean
        rows = self.corrupted
        if rows == 1 and any(isinstance(module, _BatchNorm) for module in model.modules()):
            rows = min(2, len(x))  # batch norm cannot train on one row: an unperturbed one joins its statistics
        adversarial = logits[:0]
        if rows:
            adversarial = logits_of(model, self._formatted(x_adv[:rows]))[: self.corrupted]
        target = logits[: self.corrupted]
        if repeat.replayable:
            repeat.replay()
        elif self.rerun:
            target = logits_of(model, self._formatted(x))
        judged = adversarial.detach()
        if self.corrupted < len(x):
            judged = torch.cat([judged, logits[self.corrupted :].detach()])
        return (F.cross_entropy(logits, y), ops.trades_kl(adversarial, target), judged), repeat.replayable

    def _formatted(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last and x.dim() == 4 else x


def _none_faulty(x: Tensor) -> Tensor:
    return torch.zeros(len(x), dtype=torch.int32, device=x.device)


def random_state(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """A seed and an offset for `ops.gather_start`, drawn where the images are."""
    return torch.randint(torch.iinfo(torch.int64).max, (2,), device=x.device, generator=generator)


@contextmanager
def _update_modes(model: nn.Module) -> Iterator[None]:
    with modes_restored(model):
        if not model.training:
            model.train()
        yield


def _zero_grad(optimizer: torch.optim.Optimizer | None) -> None:
    if optimizer is not None:
        optimizer.zero_grad()


def _check(
    x: Tensor,
    y: Tensor,
    optimizer: torch.optim.Optimizer | None,
    step_size: float,
    perturb_steps: int,
    beta: float,
    bullet: BulletTrain | None,
    unperturbed: Unperturbed | None,
    generator: torch.Generator | None,
    frozen: Frozen | None,
    update: Update | None,
) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x_natural must be a tensor of images, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x_natural must be floating-point images, got {x.dtype}")
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"x_natural must have shape [m, ...] with m >= 1, got {list(x.shape)}")
    check_labels(y, len(x), x.device, "y")
    positive("step_size", step_size)
    if not (real("beta", beta) >= 0 and math.isfinite(beta)):
        raise ValueError(f"beta must be a finite number of at least 0, got {beta}")
    if optimizer is not None and not hasattr(optimizer, "zero_grad"):
        raise TypeError(f"optimizer must be an optimizer or None, got {type(optimizer).__name__}")
    if bullet is not None and not isinstance(bullet, BulletTrain):
        raise TypeError(f"bullet must be a BulletTrain or None, got {type(bullet).__name__}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
    if generator is not None and generator.device.type != x.device.type:
        raise ValueError(f"generator must be on {x.device} like the images, but is on {generator.device}")
    if frozen is not None and not isinstance(frozen, Frozen):
        raise TypeError(f"frozen must be a Frozen or None, got {type(frozen).__name__}")
    if update is not None and not isinstance(update, Update):
        raise TypeError(f"update must be an Update or None, got {type(update).__name__}")
    if unperturbed not in (None, "keep", "skip"):
        raise ValueError(f"unperturbed must be 'keep', 'skip' or None, got {unperturbed!r}")
    step_count("perturb_steps", perturb_steps, least=1 if bullet is None else 0)
    if bullet is None:
        if unperturbed is not None:
            raise ValueError("unperturbed is an option of BulletTrain: it needs bullet=")
    elif perturb_steps not in (10, bullet.boundary_steps):
        raise ValueError(
            f"perturb_steps is {perturb_steps}, but bullet takes {bullet.boundary_steps} boundary steps: "
            "leave perturb_steps out or make them equal"
        )
