"""Clean accuracy, and accuracy under projected gradient descent with restarts: who falls, and when."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bt_fast import faults
from bt_fast.attack.early_exit import STOOD, Attack, Samples, Verdicts, Waiting, WorkingBatch
from bt_fast.attack.folded import Frozen, attack_model
from bt_fast.attack.frozen import clean_logits
from bt_fast.attack.generate import COMPARED
from bt_fast.attack.losses import LOSSES
from bt_fast.attack.neighbours import warn_of_neighbours
from bt_fast.attack.pixels import Normalization, on_pixels
from bt_fast.attack.threat import ThreatModel, check_threat
from bt_fast.attack.wrapped import unwrapped
from bt_fast.ops.numeric import computable, kind_of
from bt_fast.units import warn_of_units
from bt_fast.validation import check_choice, check_kind, check_labels, positive, step_count

_Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Accuracy:
    """How many samples are classified correctly.

    Attributes:
        clean_correct: without an attack. robust_correct: under every attack tried, too.
        total: the number of samples.
    """

    clean_correct: int
    robust_correct: int
    total: int

    @property
    def clean(self) -> float:
        """Clean accuracy in [0, 1]."""
        return self.clean_correct / self.total

    @property
    def robust(self) -> float:
        """Robust accuracy in [0, 1]."""
        return self.robust_correct / self.total


@dataclass(frozen=True, eq=False)
class Evaluation(Accuracy):
    """An accuracy, and what became of each sample, in the order of the stream.

    Attributes:
        restart: [total] int64 on the host: 0 where the clean image is misclassified, r in 1..restarts where the sample
            fell in the r-th, `STOOD` (-1) where it never fell.
        step: [total] int64 on the host: the number of steps after which it fell, 0 at the random start or clean, and
            `STOOD` where it never fell.
    """

    restart: Tensor = field(repr=False)
    step: Tensor = field(repr=False)

    @property
    def robust_samples(self) -> Tensor:
        """The places in the stream of the samples that never fell, ascending: [robust_correct] int64."""
        return (self.restart == STOOD).nonzero().flatten()


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    threat: ThreatModel,
    *,
    steps: int = 20,
    step_size: float | None = None,
    restarts: int = 1,
    loss: str = "ce",
    generator: torch.Generator | None = None,
    frozen: Frozen | None = None,
    normalization: Normalization | None = None,
    progress: Callable[[int], None] | None = None,
    first: int = 0,
) -> Evaluation:
    """Clean accuracy, and accuracy under PGD-`steps` from each of `restarts` random starts.

    A sample is broken if the model misclassifies it clean, or at any iterate of any restart: the random start
    (iterate 0) and the image after each of the `steps` steps, projections included. Iterates 0 to `steps - 1` are
    judged by the logits of the forward pass that the next step needs anyway, the last one by a forward of its own.
    A restart begins at a point drawn uniformly from the ε-ball and clamped to the pixel bounds; a sample whose input
    gradient is exactly 0 stays where it is.

    So the result of a sample is that of the plain loop which attacks all of them to the end. What a sample's own
    result has settled is left out: it leaves as soon as it is broken, and one that waits takes its place, so that the
    attack runs on full batches (of the first batch's size) wherever its samples come from. At most two batches are held
    at a time; the stream is read as places become free. Random starts depend on the generator's next number, the
    restart and the sample's number in the stream, and not on batch sizes or on who else stands.

    Args:
        model: maps [n, ...] to logits [n, K]. It runs in eval mode and keeps its modes and gradients.
        batches: pairs of images [n, ...], floating point in the threat model's bounds, and labels [n], integers; all
            images of one size, dtype and device.
        threat: what a perturbation may be.
        steps: ≥ 1. step_size: > 0, in pixel units; `2ε/steps` if not given.
        restarts: ≥ 1.
        loss: "ce", the cross-entropy, or "margin", the largest wrong logit minus the true one (Carlini and Wagner).
        generator: on the images' device; one number is drawn from it, the seed of all random starts.
        frozen: attack a faster view of the model, which also judges: its logits are the model's own up to rounding.
        normalization: what the images' loader has done to the pixels, as for `trades_loss`; ε, the step size and the
            threat model's bounds are those of pixels.
        progress: told the number of samples decided so far, whenever it grew.
        first: ≥ 0, the number of the stream's first sample: evaluated in parts, each with its own `first` and a
            generator of the same state, samples become of what they do in one evaluation.

    Raises:
        TypeError: images are not floating point, labels not integers, or the model does not return such logits.
        ValueError: an argument is out of range, there are no samples, or a batch does not fit (shapes, devices, pixels
            outside the threat model's bounds, labels out of range, NaN logits, or an input gradient with NaN of a
            sample that still stood).
    """
    step_count("steps", steps, least=1)
    step_count("restarts", restarts, least=1)
    step_count("first", first)
    check_threat(threat)
    size = 2.0 * threat.epsilon / steps if step_size is None else step_size
    size = positive("step_size", size)
    check_choice("loss", loss, LOSSES)
    check_kind("frozen", frozen, Frozen, "write frozen=Frozen()", optional=True)
    if frozen is not None and frozen.autocast is not None:
        raise ValueError(
            f"frozen.autocast must be None, since the view judges too, got {frozen.autocast}: write frozen=Frozen()"
        )
    if not isinstance(batches, Iterable):
        raise TypeError(
            f"batches must be iterable, got {type(batches).__name__}: give a DataLoader, or [(x, y)] for one batch"
        )
    stream = iter(batches)
    begun = next(stream, None)
    if begun is None:
        raise ValueError(
            "batches must hold at least 1 sample, got none: "
            "give a DataLoader with samples, not an iterator that has ended"
        )
    _check_batch(begun)
    x, kind, verdicts = begun[0].detach(), _kind(begun[0]), Verdicts(progress, first)
    bounds = (threat.lower, threat.upper)
    warn_of_units(threat.epsilon, threat.norm, bounds, size, x[0].numel())
    with (
        torch.inference_mode(False),
        on_pixels(model, x, normalization, "the images", bounds) as (model, pixels),
        attack_model(model, frozen, pixels(x[:COMPARED].clone())) as view,
    ):
        warn_of_neighbours(unwrapped(model), pixels(x), threat, "compare evaluations with equal batches only")
        seed = torch.randint(2**63 - 1, (), device=x.device, generator=generator)
        attack = Attack(threat, loss, steps, size, restarts, seed)
        working = WorkingBatch(attack, x, channels_last=frozen is not None and frozen.channels_last)
        whole = _put_back([begun], stream)
        del begun, x  # a batch is held no longer than until its samples are copied
        correct = map(lambda batch: _correct(view, batch, kind, pixels, threat, verdicts), whole)
        working.run(view, Waiting(correct), verdicts)
    restart, step = verdicts.in_order()
    clean, robust = int((restart != 0).sum()), int((restart == STOOD).sum())
    return Evaluation(clean, robust, verdicts.seen, restart, step)


def _check_batch(batch: _Batch) -> None:
    pair: Any = batch
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(
            f"batches must hold pairs of images and labels, got {type(batch).__name__}: of others write "
            "((b['image'], b['label']) for b in loader), and of one pair [(x, y)]"
        )
    x, y = batch
    if not isinstance(x, Tensor) or not computable(x):
        raise TypeError(f"the images must be floating point, got {kind_of(x)}: of bytes write x.float() / 255")
    if x.dim() == 0 or x.numel() == 0:
        raise ValueError(
            f"the images must be at least 1 in each batch, got shape {list(x.shape)}: leave empty batches out"
        )
    check_labels(y, len(x), x.device, "the labels")


def _put_back(read: list[_Batch], stream: Iterator[_Batch]) -> Iterator[_Batch]:
    """What was read, and what is still to come; lets go of each batch (`itertools.chain` does not)."""
    while read:
        yield read.pop(0)
    yield from stream


def _kind(x: Tensor) -> str:
    return f"{list(x.shape[1:])} {x.dtype} on {x.device}"


def _correct(
    model: Callable[[Tensor], Tensor],
    batch: _Batch,
    kind: str,
    pixels: Callable[[Tensor], Tensor],
    threat: ThreatModel,
    verdicts: Verdicts,
) -> Samples:
    """The samples of a batch that are classified correctly; the others are recorded. Raises for all that is amiss."""
    _check_batch(batch)
    x, y = batch
    if _kind(x) != kind:
        raise ValueError(
            f"the images must be alike in all batches, got {_kind(x)} after {kind}: resize them, or evaluate them apart"
        )
    x, y = pixels(x.detach()), y.long()
    outside = faults.pixels_outside(x, threat.lower, threat.upper, "the images")
    x = faults.onto_bounds(x, threat.lower, threat.upper)
    logits = clean_logits(model, x)
    found = [
        outside,
        faults.labels_outside(y, logits.shape[1], "the labels"),
        faults.rows_without_number(logits, "the model's logits"),
    ]
    faults.read(found).wait()
    correct = logits.argmax(dim=1) == y
    on_host = correct.cpu()
    numbers = verdicts.number(len(y))
    wrong = numbers[~on_host]
    verdicts.record(wrong, torch.zeros_like(wrong), torch.zeros_like(wrong))
    rows = on_host.nonzero().flatten().to(x.device)
    return Samples(x[rows], y[rows], numbers[on_host])
