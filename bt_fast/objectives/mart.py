"""MART (Wang et al., 2020), with or without BulletTrain: the drop-in for the authors' `mart_loss`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bt_fast import ops
from bt_fast.attack.auto import runner_of
from bt_fast.attack.balanced import Balance
from bt_fast.attack.folded import Frozen
from bt_fast.attack.pixels import Normalization, on_pixels
from bt_fast.attack.runners import Runner
from bt_fast.attack.start import Noise
from bt_fast.attack.threat import NORMS, ThreatModel
from bt_fast.mining import BulletTrain
from bt_fast.objectives import adversarial
from bt_fast.objectives.adversarial import Adversary, CleanFirst, Unperturbed
from bt_fast.objectives.repeated_forward import watched_forward
from bt_fast.objectives.update import Terms, Update
from bt_fast.validation import check_choice


def mart_loss(
    model: nn.Module,
    x_natural: Tensor,
    y: Tensor,
    optimizer: torch.optim.Optimizer | None,
    step_size: float = 0.007,
    epsilon: float = 0.031,
    perturb_steps: int = 10,
    beta: float = 6.0,
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
    """The MART loss `1/m Σ -log q_y - log(1.0001 - q_r + 1e-12) + β·KL(p ‖ q + 1e-12)·(1.0000001 - p_y)`.

    It is ready for `backward()`. p = softmax h(x), q = softmax h(x'), and r is the largest wrong class of q.

    Without `bullet` it is the authors' result (loss, gradients, batch-norm buffers, random numbers) at their 26
    forward-pass equivalents for ten steps: there is nothing to leave out. With `bullet` it is Algorithm 2 of the
    BulletTrain paper (Table 3): steps by group, the samples sorted by descending steps, F_R moved by the corrupted
    samples' accuracy.

    The attack, of the cross-entropy, runs in eval mode; modes are kept and restored as `trades_loss` does it. The
    update runs the clean forward and then the corrupted one: batch norm sees each batch once.

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
        beta: β ≥ 0, the weight of the robust term. A graph of `update` is captured for each β.
        distance: "l_inf" or "l_2". MART's authors have no attack in ℓ2 (theirs stops at the random start): it is that
            of the TRADES code, of the cross-entropy.
        bullet: the mining state, on the images' device.
        unperturbed: whether samples with 0 steps, whose x' is x, take part in the update's corrupted forward. "keep":
            they do. "skip": they do not, and their z' is their z: in all terms of the loss, with gradient through
            both (a single moving sample takes one along for batch norm's sake). The default is "skip" where
            N_R = N_O = 0 and "keep" elsewhere.
        start: where the attack begins: "normal", at x and 0.001·N(0, 1), as the authors' code does, the default; or
            "uniform", anywhere in the ε-ball, clamped to [0, 1].
        generator: on the images' device, for the random start. Without it and without `bullet`, images on the CPU
            draw as the authors' code does, so that a seeded script repeats its numbers. With `bullet`, only a seed is
            drawn, from this generator or the device's own.
        frozen: a faster view of the model for the attack; runner: how it is executed; update: how the update is
            executed; samples: their numbers; balance: how ranks share the attack out; all as for `trades_loss`.
        normalization: what the images' loader has done to the pixels, as for `trades_loss`.

    Returns:
        0-dim loss with gradient to the model's parameters.

    Raises:
        TypeError: images are not floating point, labels not integers, or the model does not return a tensor.
        ValueError: a shape, device, option or value does not fit (pixels outside [0, 1], labels out of range, NaN
            logits, NaN in the input gradient). What has changed then is said at `trades_loss`. Without `bullet` there
            is no clean forward before the attack: NaN in the first two samples' logits is told as such, in those of
            another as NaN in its input gradient.
    """
    check_choice("distance", distance, NORMS)
    threat = ThreatModel(epsilon, distance)
    adversarial.check(
        x_natural, y, optimizer, step_size, perturb_steps, bullet, generator, frozen, update, samples, balance
    )
    adversarial.check_robust_term(beta, unperturbed, bullet)
    noise = adversarial.noise_of(start, "normal")
    adversary = Adversary.of_trades(
        threat,
        step_size,
        perturb_steps,
        noise,
        "cross_entropy",
        bullet,
        generator,
        frozen,
        runner_of(runner),
        samples,
        balance,
    )
    with on_pixels(model, x_natural, normalization) as (model, pixels):
        attack = adversarial.start(model, pixels(x_natural), y, adversary, bullet)
        computation = _Computation(
            corrupted=adversarial.corrupted_rows(attack, bullet, unperturbed),
            channels_last=update is not None and update.channels_last,
            beta=float(beta),
        )
        loss, judged = adversarial.run(model, attack, computation, update)
    adversarial.conclude(optimizer, bullet, judged, attack)
    return loss


@dataclass(frozen=True)
class _Computation(CleanFirst[Tensor]):
    """The loss, and the logits of all corrupted samples.

    Attributes:
        beta: β.
    """

    beta: float

    def clean(self, model: nn.Module, x: Tensor, replayable: bool | None = None) -> Tensor:
        """The forward of x."""
        return watched_forward(model, adversarial.formatted(x, self.channels_last))

    def corrupted_half(
        self, model: nn.Module, clean: Tensor, x: Tensor, x_adv: Tensor, y: Tensor
    ) -> tuple[Terms, bool]:
        """All that follows it."""
        corrupted = adversarial.filled_up(self.corrupted_logits(model, x_adv, clean), clean)
        return (ops.mart_loss(clean, corrupted, y, self.beta), corrupted.detach()), False
