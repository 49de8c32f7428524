"""Images, model and schedule in; perturbed images out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bt_fast.attack.frozen import eval_mode
from bt_fast.attack.runners import run_eager
from bt_fast.attack.schedule import Schedule
from bt_fast.attack.threat import ThreatModel

TRADES_NOISE = 0.001  # standard deviation of the random start


def generate(
    model: nn.Module,
    clean: Tensor,
    start: Tensor,
    target: Tensor,
    schedule: Schedule,
    threat: ThreatModel,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Run the ragged attack: maximise the divergence of the model's output from `target`.

    The model runs in eval mode and comes back in the modes in which it was found; its parameters' gradients are not
    touched. Each sample's result depends on no other sample. A sample with 0 steps comes back as its `start`.

    Args:
        model: maps [n, ...] to logits [n, K].
        clean: [m, ...] floating point in the schedule's order, x.
        start: [m, ...] in the schedule's order, where the attack begins; not changed.
        target: [m, K] in the schedule's order: the clean probabilities for KL, a one-hot label for cross-entropy.
        schedule: who takes how many steps of which size.
        threat: what a perturbation may be.
        generator: on the images' device; its numbers stand in for a direction where an ℓ2 gradient is 0.

    Returns:
        [m, ...] in the schedule's order, without gradient.

    Raises:
        TypeError or ValueError: the model does not return logits [n, K].
    """
    x_adv = start.detach().clone(memory_format=torch.preserve_format)
    with eval_mode(model):
        run_eager(model, x_adv, clean.detach(), target.detach(), schedule, threat, generator)
    return x_adv


def normal_noise(x: Tensor, generator: torch.Generator | None, *, on_cpu: bool = False) -> Tensor:
    """The TRADES start's `0.001·N(0, 1)`, in the shape of `x`.

    Args:
        generator: on the images' device.
        on_cpu: draw as the TRADES code does, in the default dtype from the CPU's default generator, so that a seeded
            script repeats its own numbers.
    """
    if on_cpu:
        return TRADES_NOISE * torch.randn(x.shape)
    return TRADES_NOISE * torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
