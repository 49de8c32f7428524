"""AugMix (Hendrycks et al., 2020), with or without BulletTrain: robust training against common corruptions."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bt_fast import faults, ops
from bt_fast.allocation import Oracle
from bt_fast.attack.forward import checked_logits, logits_of
from bt_fast.attack.memory_format import formatted, takes_channels_last
from bt_fast.attack.pixels import Normalization, on_pixels
from bt_fast.attack.statistics import undone_by_errors
from bt_fast.attack.wrapped import unwrapped
from bt_fast.augment.mix import SEVERITY, augment_and_mix, check_images, check_severity, draw_choices
from bt_fast.engine import Engine
from bt_fast.faults import Fault
from bt_fast.labels import check_classes, check_either, check_without_gradient, for_loss, is_soft
from bt_fast.mining import BulletTrain
from bt_fast.objectives.cross_entropy import CrossEntropy, Smoothed, Smoothing
from bt_fast.objectives.execution import autocast, dtype_of, yes
from bt_fast.objectives.passes import Pass, Passes, check_moving, check_outside, other_samples, wanted
from bt_fast.objectives.recomputed import update_modes
from bt_fast.ranges import MINING, UPDATE, range_
from bt_fast.validation import check_generator, check_kind

JSD_WEIGHT = 12.0
BULLET_STEPS = (1, 0, 0)  # N_B, N_R, N_O (paper, section 4): a sample is augmented or it is not


class AugMixLoss(Smoothed, nn.Module):
    """The AugMix loss `CE(h(x), y) + 12/m · Σ JS(h(x), h(x'), h(x''))`: `criterion(model, x, y).backward()`.

    Of Hendrycks et al. (2020). x' and x'' are two AugMix views of each sample and JS is that of `ops.js_divergence`.
    Without `mining` it is the authors' loss, from one forward of the three views together: 9 forward-pass equivalents
    with backward. With `jsd` off it is their `--no-jsd`, the paper's "AugMix − JSD": `CE(h(x'), y)` on one view, at 3
    equivalents.

    With `mining` it is Algorithm 2 of the BulletTrain paper at N_B = 1, N_R = N_O = 0: a clean forward in train mode,
    with logits that both assign the groups and enter the loss, then one forward of the boundary samples' two views; JS
    is summed over these and divided by m: 3 + 6·F_B. F_R moves by the accuracy, over all m samples, on the first view
    x', as in Eq. 5; a sample without a view has its clean z as z'.

    Batch norm sees the three views as one batch without `mining`, and with it first the clean batch and then the views,
    so its buffers are moved twice. The forwards run in the modes of `AdversarialLoss`'s update.

    Args:
        mining: `BulletTrain(1, 0, 0)`, with any metric and any policy except the oracle: a sample with a step is
            augmented ("uniform" augments all). It is a submodule, and moves and saves with this module.
        jsd: whether there is a divergence term. If off, `mining` must be None, since there is nothing to leave out.
        severity: of the operations, in (0.1, 10]; 3 in the authors' code.
        normalization: the loader's normalisation of the images; the pixels are augmented.
        engine: how the forwards are executed, by name or as an `Engine`: its precision and channels_last.
        label_smoothing, smoothing: of the cross-entropy, as for `TRADESLoss`.

    Raises:
        TypeError, ValueError: an option does not fit; the message names it.
    """

    def __init__(
        self,
        mining: BulletTrain | None = None,
        *,
        jsd: bool = True,
        severity: float = SEVERITY,
        normalization: Normalization | None = None,
        engine: Engine | str = "fast",
        label_smoothing: float = 0.0,
        smoothing: Smoothing = "torch",
    ) -> None:
        super().__init__()
        _check_options(mining, jsd, severity, "mining")
        instead = "write normalization=Normalization(mean, std)"
        check_kind("normalization", normalization, Normalization, instead, optional=True)
        self.mining = mining
        self.jsd, self.severity = jsd, severity
        self.normalization = normalization
        self.engine = Engine.of(engine)
        self.cross_entropy = CrossEntropy(label_smoothing, smoothing)
        self._passes = Passes()

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a version without these too
        added = {"_passes": Passes(), "cross_entropy": CrossEntropy()}
        super().__setstate__(added | state)  # type: ignore[no-untyped-call]

    def objective(self, clean_logits: Tensor, y: Tensor, divergence: Tensor | None) -> Tensor:
        """Returns the loss of a minibatch of m samples, 0-dim.

        Args:
            clean_logits: [m, K]; of the one view x' with `jsd` off.
            y: [m] int64 in 0..K-1, or [m, K] distributions.
            divergence: 0-dim, Σ JS over the augmented samples; None with `jsd` off.
        """
        loss = self.cross_entropy(clean_logits, y)
        return loss if divergence is None else loss + JSD_WEIGHT / len(y) * divergence

    def forward(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Returns the loss of a minibatch, ready for `backward()`. Gradients are not zeroed.

        Args:
            model: maps [m, C, H, W] to logits [m, K].
            x: [m, C, H, W] floating point in [0, 1], m ≥ 1.
            y: [m] integers in 0..K-1, or [m, K] distributions, as for a call of `AdversarialLoss`.
            generator: on the images' device, for the augmentation; the device's default generator if not given. With
                `mining` it draws only for the augmented samples.

        Returns:
            0-dim loss with gradient to the model's parameters.

        Raises:
            TypeError: images are not floating point, labels of another kind, or the model does not return a tensor.
            ValueError: a shape, device or value does not fit (pixels outside [0, 1], labels out of range, NaN logits).
                Nothing has changed then. On a GPU with `mining`, NaN in the views' logits is raised by the next call.
        """
        _check_batch(x, y, generator)
        this = wanted() or Pass()
        check_moving(this.of_moving)
        with (  # the first forward moves batch norm's buffers, and only its logits tell whether the input was sound
            self.again() if this.further else nullcontext(),
            on_pixels(model, x, self.normalization, "x") as (model, pixels),
            autocast(dtype_of(self.engine.update_precision), x),
            undone_by_errors(model, x, generator, buffers=True),
        ):
            images = pixels(x).detach()
            outside = faults.pixels_outside(images, 0.0, 1.0, "x")
            images = faults.onto_bounds(images, 0.0, 1.0)
            with update_modes(model) as modes:
                loss_of = self._loss_of_all if self.mining is None else self._loss_of_boundary
                loss = loss_of(model, images, y, outside, generator)
                modes.again_in_backward([loss])
                return loss

    def again(self, *, reuse: bool = True) -> AbstractContextManager[None]:
        """A further pass over the last minibatch, as `AdversarialLoss.again`; `reuse` takes its views."""
        return self._passes.again(self.mining, reuse)

    def extra_repr(self) -> str:
        """The configuration, as it would be written."""
        options = self.cross_entropy.options()
        return f"jsd={self.jsd}, severity={self.severity:g}, engine={self.engine.name!r}{options}"

    def explain(self) -> str:
        """Describes in lines what is used of the engine."""
        engine, precision = self.engine, dtype_of(self.engine.update_precision)
        why = ", where the model's forward takes such images" if engine.channels_last else ""
        return (
            f"{type(self).__name__}, engine {engine.name!r}\n"
            f"channels last: {yes(engine.channels_last)}{why}\n"
            f"precision: {f'{precision}, under autocast' if precision else 'as the model and the caller'}\n"
            "there is no attack: folded view, graphs and streams are not used"
        )

    def _loss_of_all(
        self, model: nn.Module, x: Tensor, y: Tensor, outside: Fault, generator: torch.Generator | None
    ) -> Tensor:
        """The authors' loss. Its one read comes last, when all of the device's work is on its way."""
        kept, others = self._passes.begin(), list[Fault]()
        if isinstance(kept, _Views):
            views, others = kept.drawn, [other_samples(kept.x, kept.y, x, y)]
        else:
            views = _views(x, 2 if self.jsd else 1, self.severity, generator)
        inputs = torch.cat([x, *views]) if self.jsd else views[0]
        with range_(UPDATE):
            last = self.engine.channels_last and takes_channels_last(model, x)
            logits = checked_logits(model(formatted(inputs, last)), len(inputs))
            classes = logits.shape[1]
            indices = torch.arange(len(logits), device="cpu") % len(x)
            check_classes("y", y, classes)
            unfit = faults.rows_without_number(logits, "the model's logits", indices)
            read = faults.read([*others, outside, faults.labels_outside(y, classes, "y"), unfit])
            clean, *of_views = logits.split(len(x))
            labels = for_loss(y, ops.wide(logits).dtype)
            if not is_soft(labels):
                labels = labels.clamp(0, classes - 1)  # one out of range is a fault, not a crash
            loss = self.objective(clean, labels, ops.js_divergence(clean, *of_views) if self.jsd else None)
            read.wait()
            self._passes.keep(_Views(x, y.clone(), indices[: len(x)], views), None)
            return loss

    def _loss_of_boundary(
        self, model: nn.Module, x: Tensor, y: Tensor, outside: Fault, generator: torch.Generator | None
    ) -> Tensor:
        """The loss with BulletTrain. Its one read gives the number of samples to augment."""
        mining, last = self.mining, self.engine.channels_last and takes_channels_last(model, x)
        assert mining is not None
        with range_(MINING):
            kept = mining.reused(self._passes.owner)
            clean = logits_of(model, formatted(x, last))
            check_classes("y", y, clean.shape[1])
            if kept is None:
                plan = mining.start_plan(clean, y, inputs=[outside], names=("the model's logits", "y"))
                boundary = plan.order[: plan.active_counts[0]]
            else:
                views = _reused(kept, x, y, clean, mining)
                boundary = views.boundary
        if kept is None:
            drawn = _views(x[boundary], 2, self.severity, generator) if len(boundary) else (x[:0], x[:0])
            views = _Views(x, y.clone(), boundary, drawn)
        first = second = clean[:0]
        with range_(UPDATE):
            if len(boundary):
                given = formatted(torch.cat(views.drawn), last)
                first, second = checked_logits(unwrapped(model)(given), len(given)).chunk(2)
            mining.observe(clean.detach().index_copy(0, boundary, first.detach()), y)
            self._passes.keep(views, mining)
            labels = for_loss(y, ops.wide(clean).dtype)
            return self.objective(clean, labels, ops.js_divergence(clean[boundary], first, second))


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
    engine: Engine | str = "exact",
) -> Tensor:
    """The AugMix loss of a minibatch as a function: `AugMixLoss` made and called at once.

    Args:
        model, x, y, generator: as for a call of `AugMixLoss`.
        bullet: `BulletTrain(1, 0, 0)`, on the images' device.
        jsd, severity, normalization, engine: as for `AugMixLoss`.

    Returns:
        0-dim loss with gradient to the model's parameters, ready for `backward()`.

    Raises:
        TypeError, ValueError: as for `AugMixLoss` and its call, with the names of these arguments.
    """
    _check_batch(x, y, generator)
    _check_options(bullet, jsd, severity, "bullet")
    if bullet is None:
        check_outside("augmix_loss", "write criterion = AugMixLoss(...) before the loop")
    criterion = AugMixLoss(bullet, jsd=jsd, severity=severity, normalization=normalization, engine=engine)
    criterion._passes.owner = AugMixLoss, severity
    loss: Tensor = criterion(model, x, y, generator=generator)
    return loss


@dataclass(frozen=True, eq=False)
class _Views:
    """A minibatch x [m, C, H, W], y [m], and two views [b, C, H, W] of the samples `boundary` [b] int64."""

    x: Tensor
    y: Tensor
    boundary: Tensor
    drawn: tuple[Tensor, ...]


def _reused(kept: object, x: Tensor, y: Tensor, clean: Tensor, bullet: BulletTrain) -> _Views:
    """Returns the views of the first pass, after checking that it was over this minibatch."""
    assert isinstance(kept, _Views)
    others = other_samples(kept.x, kept.y, x, y)
    bullet.start_again([others, faults.rows_without_number(clean, "the model's logits")]).wait()
    return kept


def _views(x: Tensor, count: int, severity: float, generator: torch.Generator | None) -> tuple[Tensor, ...]:
    """Returns `count` AugMix views of each sample, drawn together."""
    choices = draw_choices(count * len(x), x.device, severity=severity, generator=generator)
    return augment_and_mix(x.repeat(count, 1, 1, 1), choices).chunk(count)


def _check_batch(x: Tensor, y: Tensor, generator: torch.Generator | None) -> None:
    check_images(x, "x")
    if len(x) == 0:
        raise ValueError(f"x must hold at least 1 image, got shape {list(x.shape)}: leave empty minibatches out")
    check_either(y, len(x), x.device, "y")
    check_without_gradient("y", y)
    check_generator(generator, x.device)


def _check_options(mining: BulletTrain | None, jsd: bool, severity: float, name: str) -> None:
    """Checks the options; `name` is that of the mining in messages."""
    check_severity(severity)
    if mining is None:
        return
    check_kind(name, mining, BulletTrain, f"write {name}=BulletTrain(1, 0, 0) once, before the loop", optional=True)
    steps = (mining.boundary_steps, mining.robust_steps, mining.outlier_steps)
    if steps != BULLET_STEPS:
        raise ValueError(
            f"{name} must be BulletTrain(1, 0, 0), boundary, robust and outlier steps: AugMix only turns the "
            f"augmentation of a sample on or off. Got {steps}: write BulletTrain(1, 0, 0)"
        )
    if mining.unperturbed is not None or mining.balance is not None:
        raise ValueError(
            f"{name}'s unperturbed and balance must be None: AugMix runs no attack and no adversarial forward: "
            "write BulletTrain(1, 0, 0)"
        )
    if mining.half_drawn is not None:
        raise ValueError(
            f"{name}'s robust_steps must be 0, got {mining.half_drawn}: AugMix augments no robust sample: "
            "write BulletTrain(1, 0, 0)"
        )
    if isinstance(mining.policy, Oracle):
        raise ValueError(
            f"{name}'s policy must not be an Oracle: AugMix runs no attack that could show it the groups: "
            "write BulletTrain(1, 0, 0)"
        )
    if not jsd:
        raise ValueError(
            f"jsd=False trains on one view of every sample: it leaves nothing for {name} to save: "
            "leave one of the two out"
        )
