"""AugMix (Hendrycks et al., 2020), with or without BulletTrain: robust training against common corruptions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bt_fast import faults, ops
from bt_fast.allocation import Oracle
from bt_fast.attack.frozen import checked_logits, logits_of
from bt_fast.attack.pixels import Normalization, on_pixels
from bt_fast.attack.wrapped import unwrapped
from bt_fast.augment.mix import SEVERITY, augment_and_mix, check_images, check_severity, draw_choices
from bt_fast.faults import Fault
from bt_fast.mining import BulletTrain
from bt_fast.objectives.again import NEW_ONES, check_alike, of_another
from bt_fast.objectives.recomputed import update_modes
from bt_fast.ranges import MINING, UPDATE, range_
from bt_fast.validation import check_generator, check_kind, check_labels

JSD_WEIGHT = 12.0
BULLET_STEPS = (1, 0, 0)  # N_B, N_R, N_O (paper, section 4): a sample is augmented or it is not


def augmix_loss(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    bullet: BulletTrain | None = None,
    jsd: bool = True,
    severity: float = SEVERITY,
    generator: torch.Generator | None = None,
    normalization: Normalization | None = None,
) -> Tensor:
    """The AugMix loss `CE(h(x), y) + 12/m · Σ JS(h(x), h(x'), h(x''))`, ready for `backward()`.

    x' and x'' are two AugMix views of each sample and JS is that of `ops.js_divergence`. Without `bullet` it is the
    authors' loss, from one forward of the three views together: 9 forward-pass equivalents with backward. With `jsd`
    off it is their `--no-jsd`, the paper's "AugMix − JSD": `CE(h(x'), y)` on one view, at 3.

    With `bullet` it is Algorithm 2 of the BulletTrain paper at N_B = 1, N_R = N_O = 0: a clean forward, whose logits
    both assign the groups and enter the loss (so it runs in train mode: a forward of its own would cost one more), then
    only the boundary samples are augmented and run one forward of their two views, and JS is summed over them and
    divided by m: 3 + 6·F_B. F_R moves by the accuracy, over all m samples, on the first view x', as in Eq. 5; where a
    sample has no view, its z' is its clean z.

    Batch norm sees the three views as one batch without `bullet`, and with it first the clean batch and then the views,
    so its buffers are moved twice. The forwards run in the modes in which the model was found, module by module; a
    model found in eval mode as a whole runs them in train mode, as the authors' code does. The modes are restored.

    Args:
        model: maps [m, C, H, W] to logits [m, K].
        x: [m, C, H, W] floating point in [0, 1], m ≥ 1.
        y: [m] integers in 0..K-1.
        bullet: `BulletTrain(1, 0, 0)`, on the images' device, with any metric and any policy but the oracle: a sample
            with a step is augmented ("uniform" augments all).
        jsd: whether there is a divergence term. Off, there is nothing for `bullet` to leave out, and it must be None.
        severity: of the operations, in (0.1, 10]; 3 in the authors' code.
        generator: on the images' device, for the augmentation; the device's default generator if not given. The number
            of samples that are augmented with `bullet` decides how much is drawn.
        normalization: what the images' loader has done to the pixels, as for `trades_loss`: it is the pixels that are
            augmented.

    Returns:
        0-dim loss with gradient to the model's parameters. Gradients are not zeroed.

    Raises:
        TypeError: images are not floating point, labels not integers, or the model does not return a tensor.
        ValueError: a shape, device, option or value does not fit (pixels outside [0, 1], labels out of range, NaN
            logits). Nothing has been changed then: no buffer, no F_R, no count. On a GPU with `bullet`, NaN in the
            views' logits is raised by the next call.
    """
    _check(x, y, bullet, jsd, severity, generator)
    with on_pixels(model, x, normalization, "x") as (model, pixels):
        return _loss(model, pixels(x).detach(), y, bullet, jsd, severity, generator)


def _loss(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    bullet: BulletTrain | None,
    jsd: bool,
    severity: float,
    generator: torch.Generator | None,
) -> Tensor:
    pixels = faults.pixels_outside(x, 0.0, 1.0, "x")
    x = faults.onto_bounds(x, 0.0, 1.0)
    with update_modes(model) as modes, _unchanged_by_errors(model):
        if bullet is not None:
            loss = _loss_of_boundary(model, x, y, pixels, bullet, severity, generator)
        else:
            loss = _loss_of_all(model, x, y, pixels, jsd, severity, generator)
        modes.again_in_backward([loss])
        return loss


def _loss_of_all(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    pixels: Fault,
    jsd: bool,
    severity: float,
    generator: torch.Generator | None,
) -> Tensor:
    """The authors' loss. Its one read comes last, when all of the device's work is on its way."""
    inputs = torch.cat([x, *_views(x, 2, severity, generator)]) if jsd else _views(x, 1, severity, generator)[0]
    with range_(UPDATE):
        logits = checked_logits(model(inputs), len(inputs))
        classes = logits.shape[1]
        samples = torch.arange(len(logits), device="cpu") % len(x)
        unfit = faults.rows_without_number(logits, "the model's logits", samples)
        read = faults.read([pixels, faults.labels_outside(y, classes, "y"), unfit])
        clean, *views = logits.split(len(x))
        labels = y.long().clamp(0, classes - 1)  # one out of range is a fault, not a crash
        loss = F.cross_entropy(ops.wide(clean), labels)
        if jsd:
            loss = loss + JSD_WEIGHT / len(x) * ops.js_divergence(clean, *views)
        read.wait()
        return loss


def _loss_of_boundary(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    pixels: Fault,
    bullet: BulletTrain,
    severity: float,
    generator: torch.Generator | None,
) -> Tensor:
    """The loss with BulletTrain. Its one read tells how many samples to augment."""
    with range_(MINING):
        kept = bullet.reused()
        clean = logits_of(model, x)
        if kept is None:
            plan = bullet.start_plan(clean, y, inputs=[pixels], names=("the model's logits", "y"))
            boundary = plan.order[: plan.active_counts[0]]
        else:
            views = _reused(kept, x, y, clean, bullet)
            boundary = views.boundary
    if kept is None:
        drawn = _views(x[boundary], 2, severity, generator) if len(boundary) else (x[:0], x[:0])
        views = _Views(x, y.clone(), boundary, drawn)
    first = second = clean[:0]
    with range_(UPDATE):
        if len(boundary):
            given = torch.cat(views.drawn)
            first, second = checked_logits(unwrapped(model)(given), len(given)).chunk(2)
        bullet.observe(clean.detach().index_copy(0, boundary, first.detach()), y)
        bullet.keep(views)
        divergence = ops.js_divergence(clean[boundary], first, second)
        return F.cross_entropy(ops.wide(clean), y.long()) + JSD_WEIGHT / len(x) * divergence


@dataclass(frozen=True, eq=False)
class _Views:
    """A minibatch and its views.

    Attributes:
        x: [m, C, H, W], y: [m]; the minibatch.
        boundary: [b] int64, the samples that are augmented.
        drawn: two views [b, C, H, W] of them.
    """

    x: Tensor
    y: Tensor
    boundary: Tensor
    drawn: tuple[Tensor, ...]


def _reused(kept: object, x: Tensor, y: Tensor, clean: Tensor, bullet: BulletTrain) -> _Views:
    """The views of the first pass over this minibatch, once it is known that it is this one."""
    if not isinstance(kept, _Views):
        raise ValueError(f"again(reuse=True) has the x' of another loss, but augmix_loss needs views: {NEW_ONES}")
    check_alike(kept.x, x)
    unfit = faults.rows_without_number(clean, "the model's logits")
    bullet.start_again([of_another(kept.x, x, kept.y, y), unfit]).wait()
    return kept


def _views(x: Tensor, count: int, severity: float, generator: torch.Generator | None) -> tuple[Tensor, ...]:
    """`count` AugMix views of each sample, drawn together."""
    choices = draw_choices(count * len(x), x.device, severity=severity, generator=generator)
    return augment_and_mix(x.repeat(count, 1, 1, 1), choices).chunk(count)


@contextmanager
def _unchanged_by_errors(model: nn.Module) -> Iterator[None]:
    """Give the model's buffers their values back if an error leaves the block.

    The first forward moves batch norm's buffers, and only its logits tell whether the input was sound.
    """
    found = [(m, name, b, b.clone()) for m in model.modules() for name, b in m.named_buffers(recurse=False)]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for module, name, buffer, value in found:
                setattr(module, name, buffer.copy_(value))  # some modules put a new tensor in its place
        raise


def _check(
    x: Tensor,
    y: Tensor,
    bullet: BulletTrain | None,
    jsd: bool,
    severity: float,
    generator: torch.Generator | None,
) -> None:
    check_images(x, "x")
    if len(x) == 0:
        raise ValueError(f"x must hold at least 1 image, got shape {list(x.shape)}: leave empty minibatches out")
    check_labels(y, len(x), x.device, "y")
    check_severity(severity)
    check_generator(generator, x.device)
    if bullet is None:
        return
    check_kind("bullet", bullet, BulletTrain, "write bullet=BulletTrain(1, 0, 0) once, before the loop", optional=True)
    steps = (bullet.boundary_steps, bullet.robust_steps, bullet.outlier_steps)
    if steps != BULLET_STEPS:
        raise ValueError(
            "bullet must be BulletTrain(1, 0, 0), boundary, robust and outlier steps: AugMix only turns the "
            f"augmentation of a sample on or off. Got {steps}: write BulletTrain(1, 0, 0)"
        )
    if isinstance(bullet.policy, Oracle):
        raise ValueError(
            "bullet's policy must not be an Oracle: AugMix runs no attack that could tell it the groups: "
            "write BulletTrain(1, 0, 0)"
        )
    if not jsd:
        raise ValueError(
            "jsd=False trains on one view of every sample: it leaves nothing for bullet to save: "
            "leave one of the two out"
        )
