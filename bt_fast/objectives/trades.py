"""TRADES (Zhang et al., 2019), with or without BulletTrain: the drop-in for the authors' `trades_loss`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bt_fast import ops
from bt_fast.attack.auto import runner_of
from bt_fast.attack.balanced import Balance
from bt_fast.attack.folded import Frozen
from bt_fast.attack.frozen import logits_of
from bt_fast.attack.pixels import Normalization, on_pixels
from bt_fast.attack.runners import Runner
from bt_fast.attack.start import Noise
from bt_fast.attack.threat import NORMS, ThreatModel
from bt_fast.mining import BulletTrain
from bt_fast.objectives import adversarial
from bt_fast.objectives.adversarial import Adversary, CleanFirst, Unperturbed
from bt_fast.objectives.repeated_forward import RepeatedForward
from bt_fast.objectives.update import Terms, Update
from bt_fast.validation import check_choice


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
    start: Noise | None = None,
    generator: torch.Generator | None = None,
    frozen: Frozen | None = None,
    runner: Runner | str = "eager",
    update: Update | None = None,
    samples: Tensor | None = None,
    balance: Balance | None = None,
    normalization: Normalization | None = None,
) -> Tensor:
    """The TRADES loss `CE(h(x), y) + β/m · Σ KL(softmax h(x) ‖ softmax h(x'))`, ready for `backward()`.

    Without `bullet` it is the authors' result (loss, gradients, batch-norm buffers) at 27 forward-pass equivalents
    for ten steps instead of their 39. With `bullet` it is Algorithm 2 of the BulletTrain paper: steps by group, the
    samples sorted by descending steps, F_R moved by the corrupted samples' accuracy.

    The attack runs in eval mode. The update's forwards run in the modes in which the model was found, module by
    module; a model found in eval mode as a whole runs them in train mode, as the authors' code makes it. The modes are
    restored. A model that draws random numbers in its forward (dropout) runs the clean forward of the update twice
    without `bullet`, as the authors' code does, and once with it.

    Under `torch.autocast` the attack runs in 16 bits too, with input gradients scaled row by row so that none is lost
    in float16, and the loss is in single precision. A step that a `GradScaler` leaves out moves no weight, but F_R, its
    counts and batch norm's buffers have moved by then, as they move in the forwards. Compile the model, not this
    function: compiled it gives the same result, but in parts, since it reads counts on the host and differentiates
    within (some 20 graph breaks). With several micro-batches for a step (`optimizer=None`) F_R moves in each, and T is
    that of each.

    Args:
        model: maps [m, ...] to logits [m, K]; compiled by `torch.compile` or not.
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
        bullet: the mining state, on the images' device. One minibatch moves it once: for another pass over the same
            one, at other weights, call this within `with bullet.again():`.
        unperturbed: whether samples with 0 steps, whose x' is x, take part in the update's corrupted forward. "keep":
            they do, and in train mode with batch norm their KL is small but not 0, since the two forwards have
            different batch statistics. "skip": they do not, and their KL is 0 (a single moving sample takes one along
            for batch norm's sake). The default is "skip" where N_R = N_O = 0 and "keep" elsewhere (Algorithm 2 and
            section 3.2 of the paper differ here).
        start: where the attack begins: "normal", at x and 0.001·N(0, 1), as the authors' code does, the default; or
            "uniform", anywhere in the ε-ball, clamped to [0, 1].
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
        samples: [m] integers in 0..2^32-1, each sample's number, in its data set say. Its start is then that of this
            number and of the seed that `generator` (or the device's own) was given last, from which nothing is drawn:
            the same in whatever batch and on whatever rank it is. Give the generator a new seed in each epoch.
        balance: how the ranks of `bullet`'s process group share the attack out, `Balance()`: those with many boundary
            samples hand some to those with few, where that is the shorter way. Without it each attacks its own.
        normalization: what the images' loader has done to the pixels; without it they are pixels in [0, 1]. ε and step
            sizes are in pixel units with it too, and pixels that it gives outside [0, 1] by rounding are moved onto it.

    Returns:
        0-dim loss with gradient to the model's parameters.

    Raises:
        TypeError: images are not floating point, labels not integers, or the model does not return a tensor.
        ValueError: a shape, device, option or value does not fit (pixels outside [0, 1], labels out of range, NaN
            logits, NaN in the input gradient). Nothing has been changed then: no buffer, no gradient, no F_R. Only what
            goes wrong in the update's own forwards, after a sound attack, leaves batch-norm buffers moved and the
            batch counted in `bullet.group_counts`. On a GPU NaN in an input gradient is known after those forwards, and
            with `bullet` raised by the next call. What the attack itself raises (the model's own exceptions, out of
            memory) comes before them, beside it or not.
    """
    check_choice("distance", distance, NORMS)
    threat = ThreatModel(epsilon, distance)
    adversarial.check(
        x_natural, y, optimizer, step_size, perturb_steps, bullet, generator, frozen, update, samples, balance
    )
    adversarial.check_robust_term(beta, unperturbed, bullet)
    noise = adversarial.noise_of(start, "normal")
    adversary = Adversary.of_trades(
        threat, step_size, perturb_steps, noise, "kl", bullet, generator, frozen, runner_of(runner), samples, balance
    )
    with on_pixels(model, x_natural, normalization) as (model, pixels):
        attack = adversarial.start(model, pixels(x_natural), y, adversary, bullet)
        computation = _Computation(
            corrupted=adversarial.corrupted_rows(attack, bullet, unperturbed),
            channels_last=update is not None and update.channels_last,
            rerun=bullet is None,
        )
        natural, robust, judged = adversarial.run(model, attack, computation, update)
    adversarial.conclude(optimizer, bullet, judged, attack)
    return natural + beta / len(attack.x) * robust


@dataclass(frozen=True)
class _Computation(CleanFirst[tuple[Tensor, RepeatedForward]]):
    """The natural and the robust term, and the logits of all corrupted samples.

    Attributes:
        rerun: a clean forward that cannot be replayed runs again and gives the target, as in the authors' code.
    """

    rerun: bool

    def clean(self, model: nn.Module, x: Tensor, replayable: bool | None = None) -> tuple[Tensor, RepeatedForward]:
        """The forward of x, and what it did to the buffers."""
        repeat = RepeatedForward(model, x.device, replayable)
        with repeat.first():
            logits = logits_of(model, adversarial.formatted(x, self.channels_last))
        return logits, repeat

    def corrupted_half(
        self, model: nn.Module, clean: tuple[Tensor, RepeatedForward], x: Tensor, x_adv: Tensor, y: Tensor
    ) -> tuple[Terms, bool]:
        """All that follows it."""
        logits, repeat = clean
        corrupted = self.corrupted_logits(model, x_adv, logits)
        target = logits[: self.corrupted]
        replayed = repeat.replayable and not (self.rerun and repeat.recomputed)
        if replayed:
            repeat.replay()
        elif self.rerun:
            target = logits_of(model, adversarial.formatted(x, self.channels_last))
        judged = adversarial.filled_up(corrupted.detach(), logits.detach())
        return (F.cross_entropy(ops.wide(logits), y), ops.trades_kl(corrupted, target), judged), replayed
