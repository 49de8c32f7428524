"""PGD adversarial training (Madry et al., 2018), with or without BulletTrain."""

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
from bt_fast.objectives.adversarial import Adversary
from bt_fast.objectives.update import Terms, Update
from bt_fast.validation import check_choice


def pgd_loss(
    model: nn.Module,
    x_natural: Tensor,
    y: Tensor,
    optimizer: torch.optim.Optimizer | None,
    step_size: float = 0.007,
    epsilon: float = 0.031,
    perturb_steps: int = 10,
    distance: str = "l_inf",
    *,
    bullet: BulletTrain | None = None,
    start: Noise | None = None,
    generator: torch.Generator | None = None,
    frozen: Frozen | None = None,
    runner: Runner | str = "eager",
    update: Update | None = None,
    samples: Tensor | None = None,
    balance: Balance | None = None,
    normalization: Normalization | None = None,
) -> Tensor:
    """The cross-entropy `CE(h(x'), y)` of adversarial training, ready for `backward()`.

    x' is found by projected gradient ascent on the cross-entropy from a point drawn uniformly from the ε-ball, clamped
    to [0, 1]. It takes 23 forward-pass equivalents for ten steps. With `bullet` it is Algorithm 2 of the BulletTrain
    paper: steps by group, F_R moved by the corrupted samples' accuracy. A sample with 0 steps has no random start
    either: its x' is x, and takes part in the update's only forward.

    The attack runs in eval mode; modes are kept and restored as `trades_loss` does it. Batch norm sees x' alone, once.

    Args:
        model: maps [m, ...] to logits [m, K].
        x_natural: [m, ...] floating point in [0, 1], m ≥ 1.
        y: [m] integers in 0..K-1.
        optimizer: its `zero_grad()` is called; None leaves the gradients as they are, for gradient accumulation.
        step_size: α > 0 (with `bullet`: of the boundary samples), in pixel units; in ℓ2 the length of a step.
        epsilon: ε > 0, in pixel units.
        perturb_steps: N ≥ 1. With `bullet` its own counts hold, and a value that is neither N_B nor the default is an
            error.
        distance: "l_inf" or "l_2".
        bullet: the mining state, on the images' device.
        start: where the attack begins: "uniform", anywhere in the ε-ball, clamped to [0, 1], the default; or "normal",
            at x and 0.001·N(0, 1), as TRADES does.
        generator: on the images' device, for the random start; without it the device's own. With `bullet`, only a
            seed is drawn: a sample's start is that of a counter.
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
    noise, run = adversarial.noise_of(start, "uniform"), runner_of(runner)
    adversary = Adversary(
        threat, step_size, perturb_steps, noise, "cross_entropy", generator, frozen, run, samples, balance
    )
    with on_pixels(model, x_natural, normalization) as (model, pixels):
        attack = adversarial.start(model, pixels(x_natural), y, adversary, bullet)
        computation = _Computation(update is not None and update.channels_last)
        loss, judged = adversarial.run(model, attack, computation, update)
    adversarial.conclude(optimizer, bullet, judged, attack)
    return loss


@dataclass(frozen=True)
class _Computation:
    """The loss, and the logits of all corrupted samples.

    Attributes:
        channels_last: the format of 4-d images.
    """

    channels_last: bool

    def steady(self, m: int) -> bool:
        """Every batch of m samples has the same shapes throughout."""
        return True

    def __call__(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, replayable: bool | None = None
    ) -> tuple[Terms, bool]:
        """As `Computation` says."""
        logits = logits_of(model, adversarial.formatted(x_adv, self.channels_last))
        return (F.cross_entropy(ops.wide(logits), y), logits.detach()), False
