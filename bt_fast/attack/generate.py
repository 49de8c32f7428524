"""Images, model and schedule in; perturbed images out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bt_fast.attack.folded import Frozen, attack_model
from bt_fast.attack.runners import Runner, run_eager
from bt_fast.attack.schedule import Schedule
from bt_fast.attack.threat import ThreatModel

COMPARED = 8  # samples on which a view of the model is held against it, once
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
    faulty: Tensor | None = None,
    frozen: Frozen | None = None,
    runner: Runner = run_eager,
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
        faulty: [m] int32 in the schedule's order, on the images' device, set to 1 for each sample that could not move
            in some step, since its input gradient held NaN (in ℓ2: or Inf). `faults.gradients_without_direction` makes
            an error of it.
        frozen: a faster view of the model for the attack; without it the attack sees the model itself.
        runner: how the schedule is executed: step by step, or by a `GraphRunner` or `StreamRunner`.

    Returns:
        [m, ...] in the schedule's order, without gradient.

    Raises:
        TypeError: the images are not floating point, or the model does not return such logits.
        ValueError: shapes do not fit together, or the model does not return logits [n, K]. Values are not checked
            here (that would mean to wait for the device): `trades_loss` and `evaluate` check them.
    """
    _check(clean, start, target, schedule, faulty)
    if not schedule.active or schedule.active[0] == 0:
        return start.detach().clone(memory_format=torch.preserve_format)
    with torch.inference_mode(False), attack_model(model, frozen, clean[:COMPARED].detach()) as view:
        last = frozen is not None and frozen.channels_last and clean.dim() == 4
        memory_format = torch.channels_last if last else torch.preserve_format
        x_adv = start.detach().clone(memory_format=memory_format)
        x = clean.detach().contiguous(memory_format=memory_format) if last else clean.detach()
        runner(view, x_adv, x, target.detach(), schedule, threat, generator, faulty)
        return x_adv.contiguous() if last and start.is_contiguous() else x_adv


def _check(clean: Tensor, start: Tensor, target: Tensor, schedule: Schedule, faulty: Tensor | None) -> None:
    for name, images in (("clean", clean), ("start", start)):
        if not images.is_floating_point():
            raise TypeError(f"{name} must be floating-point images, got {images.dtype}")
    m = len(schedule.step_size)
    if len(clean) != m:
        raise ValueError(f"clean must hold the schedule's {m} samples, got shape {list(clean.shape)}")
    if start.shape != clean.shape:
        raise ValueError(f"start must have clean's shape {list(clean.shape)}, got {list(start.shape)}")
    if target.dim() != 2 or len(target) != m:
        raise ValueError(f"target must have shape [{m}, K], got {list(target.shape)}")
    if faulty is not None and faulty.shape != (m,):
        raise ValueError(f"faulty must have shape [{m}], got {list(faulty.shape)}")


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
