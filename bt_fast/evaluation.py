"""Clean accuracy, and accuracy under projected gradient descent with restarts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from bt_fast import faults
from bt_fast.attack.early_exit import STOOD, Attack, Samples, Verdicts, Waiting, WorkingBatch, target_of
from bt_fast.attack.folded import Frozen, attack_model
from bt_fast.attack.forward import clean_logits
from bt_fast.attack.generate import COMPARED
from bt_fast.attack.graph_cache import view_of
from bt_fast.attack.inner import SHORT, Inner, check_inner
from bt_fast.attack.neighbours import warn_of_neighbours
from bt_fast.attack.pgd import PGD, norm_of
from bt_fast.attack.pixels import Normalization, on_pixels
from bt_fast.attack.statistics import check_statistics
from bt_fast.attack.threat import ThreatModel
from bt_fast.attack.wrapped import unwrapped
from bt_fast.deprecated import check_keywords
from bt_fast.engine import Engine
from bt_fast.faults import Fault
from bt_fast.units import warn_of_units
from bt_fast.validation import check_floating, check_kind, check_labels, step_count

if TYPE_CHECKING:
    from typing_extensions import Unpack

_Batch = tuple[Tensor, Tensor]


class Deprecated(TypedDict, total=False):
    """The keywords of the first version."""

    steps: int
    step_size: float | None
    normalization: Normalization | None
    frozen: Frozen | None


_OF_ATTACK = ("steps", "step_size", "normalization")
NEW_LINES = {
    **dict.fromkeys(_OF_ATTACK, "write evaluate(model, batches, PGD(epsilon, step_size, steps, ...))"),
    "frozen": "write engine='fast'",
}


@dataclass(frozen=True)
class Accuracy:
    """Of the total number of samples, those classified correctly: clean_correct, and robust_correct under attack."""

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
    """An accuracy, and when each sample was misclassified first, in the order of the stream.

    Attributes:
        restart: [total] int64 on the host: 0 for the clean image, r in 1..restarts for the r-th restart, `STOOD` (-1)
            for a sample that stood them all.
        step: [total] int64 on the host: the number of steps then, 0 at the random start or clean; `STOOD` likewise.
    """

    restart: Tensor = field(repr=False)
    step: Tensor = field(repr=False)

    @property
    def robust_samples(self) -> Tensor:
        """The places in the stream of the samples that stood, ascending: [robust_correct] int64."""
        return (self.restart == STOOD).nonzero().flatten()


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    attack: PGD | ThreatModel,
    *,
    restarts: int = 1,
    loss: Inner | Literal["ce"] | None = None,
    generator: torch.Generator | None = None,
    engine: Engine | str = "exact",
    progress: Callable[[int], None] | None = None,
    first: int = 0,
    **deprecated: Unpack[Deprecated],
) -> Evaluation:
    """Clean accuracy, and accuracy under PGD from each of `restarts` random starts.

    A sample is broken if the model misclassifies it clean, or at any iterate of any restart: the random start
    (iterate 0) and the image after each of the N steps, projections included. A restart begins at a point drawn
    uniformly from the ε-ball and clamped to the pixel bounds; a sample with an input gradient of exactly 0 stays.

    The result of a sample is that of the plain loop which attacks all of them to the end. But a broken sample leaves at
    once and another takes its place, so that the attack runs on full batches (of the first batch's size). At most two
    batches are held at a time. Random starts depend on the generator's next number, the restart and the sample's number
    in the stream, not on batch sizes or other samples.

    Args:
        model: maps [n, ...] to logits [n, K]. It runs in eval mode and keeps its modes and gradients.
        batches: pairs of images [n, ...], floating point in the attack's bounds, and labels [n], integers; all images
            of one size, dtype and device.
        attack: ε, step size, steps, norm, bounds and normalization; it starts uniformly in the ball. A `ThreatModel`,
            as in the first version, is attacked by 20 steps of ε/10.
        restarts: ≥ 1.
        loss: what the attack ascends, an inner loss as `PGD` has them, by name or a function; "ce" is short for
            "cross_entropy". None: the attack's own `inner`, or the cross-entropy.
        generator: on the images' device; one number is drawn from it, the seed of all random starts.
        engine: how the model is run, by name or as an `Engine`. A folded view judges, too: its logits are the model's
            own up to rounding, so there is no "bf16". Graphs and streams are not used.
        progress: called with the number of samples decided so far, whenever it grew.
        first: ≥ 0, the number of the stream's first sample, for an evaluation in parts: with its own `first` and a
            generator of the same state each gives the results of one evaluation.
        deprecated: keywords of the first version; each warns with the new line.

    Raises:
        TypeError or ValueError: an argument, the model's logits or a batch does not fit (shapes, types, devices, pixels
            out of bounds, labels out of range, NaN in logits or in an input gradient), or there are no samples.
    """
    check_keywords("evaluate", deprecated, NEW_LINES)
    step_count("restarts", restarts, least=1)
    step_count("first", first)
    given = _attack(attack, deprecated)
    inner = _inner(given, loss)
    verdicts = Verdicts(progress, first)
    _judge(model, batches, given, _view(engine, deprecated), restarts, inner, generator, verdicts)
    restart, step = verdicts.in_order()
    clean, robust = int((restart != 0).sum()), int((restart == STOOD).sum())
    return Evaluation(clean, robust, verdicts.seen, restart, step)


def _judge(
    model: nn.Module,
    batches: Iterable[_Batch],
    attack: PGD,
    frozen: Frozen | None,
    restarts: int,
    loss: Inner,
    generator: torch.Generator | None,
    verdicts: Verdicts,
) -> None:
    """Record the verdict of each sample."""
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
    threat, bounds = attack.threat, attack.bounds
    x, kind = begun[0].detach(), _kind(begun[0])
    warn_of_units(threat.epsilon, threat.norm, bounds, attack.step_size, x[0].numel())
    with (
        torch.inference_mode(False),
        on_pixels(model, x, attack.normalization, "the images", bounds) as (model, pixels),
        attack_model(model, frozen, pixels(x[:COMPARED].clone())) as view,
    ):
        warn_of_neighbours(unwrapped(model), pixels(x), threat, "compare evaluations with equal batches only")
        seed = torch.randint(2**63 - 1, (), device=x.device, generator=generator)
        at_work = Attack(threat, loss, attack.steps, attack.step_size, restarts, seed)
        working = WorkingBatch(at_work, x, channels_last=frozen is not None and frozen.channels_last)
        whole = _put_back([begun], stream)
        del begun, x  # a batch is held no longer than until its samples are copied
        correct = map(lambda batch: _correct(view, batch, kind, pixels, at_work, verdicts), whole)
        if threat.epsilon == 0:  # then every x' is x
            for samples in correct:
                verdicts.record(samples.number, *[torch.full_like(samples.number, STOOD)] * 2)
            return
        working.run(view, Waiting(correct), verdicts)


def _attack(attack: PGD | ThreatModel, deprecated: Deprecated) -> PGD:
    """The attack, also by the keywords of the first version."""
    if isinstance(attack, ThreatModel):
        steps = step_count("steps", deprecated.get("steps", 20), least=1)
        size, normalization = deprecated.get("step_size"), deprecated.get("normalization")
        size = 2.0 * attack.epsilon / steps if size is None else size
        bounds = attack.lower, attack.upper
        return PGD(attack.epsilon, size, steps, norm_of(attack.norm), bounds=bounds, normalization=normalization)
    check_kind("attack", attack, PGD, "write PGD(epsilon=8 / 255, step_size=2 / 255, steps=20)")
    changes: dict[str, Any] = {name: deprecated[name] for name in _OF_ATTACK if name in deprecated}  # type: ignore[literal-required]
    if changes:
        name = next(iter(changes))
        raise ValueError(
            f"{name} is an option of the attack where that is a PGD: write PGD(..., {name}={changes[name]!r})"
        )
    if attack.start in ("normal", "clean"):
        raise ValueError(f"attack must start anywhere in the ball, got start={attack.start!r}: leave start out")
    check_statistics(attack.statistics, "in an evaluation", "leave statistics out")
    return attack


def _inner(attack: PGD, loss: Inner | Literal["ce"] | None) -> Inner:
    """What the attack ascends."""
    named: Any = SHORT.get(loss, loss) if isinstance(loss, str) else loss
    check_inner("loss", named)
    if named is not None and attack.inner not in (None, named):
        raise ValueError(f"the attack ascends {attack.inner!r}, but loss is {loss!r}: leave one of the two out")
    inner: Inner = named or attack.inner or "cross_entropy"
    return inner


def _view(engine: Engine | str, deprecated: Deprecated) -> Frozen | None:
    frozen = deprecated["frozen"] if "frozen" in deprecated else view_of(Engine.of(engine))
    check_kind("frozen", frozen, Frozen, "write engine='fast'", optional=True)
    if frozen is not None and frozen.autocast is not None:
        raise ValueError(
            "engine must have the model's own precision, since the view judges too, got one in 16 bits: "
            "write engine='fast'"
        )
    return frozen


def classified_correctly(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, name: str, *more: Fault) -> Tensor:
    """Whether each image is classified as its label `y`: [n] bool. Raises `more`, and faults of labels and logits."""
    return sound_logits(model, x, y, name, *more).argmax(dim=1) == y


def sound_logits(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, name: str, *more: Fault) -> Tensor:
    """The model's logits [n, K] of images with labels `y`. Raises `more`, and faults of labels and logits."""
    logits = clean_logits(model, x)
    labels = faults.labels_outside(y, logits.shape[1], name)
    faults.read([*more, labels, faults.rows_without_number(logits, "the model's logits")]).wait()
    return logits


def _check_batch(batch: _Batch) -> None:
    pair: Any = batch
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(
            f"batches must hold pairs of images and labels, got {type(batch).__name__}: of others write "
            "((b['image'], b['label']) for b in loader), and of one pair [(x, y)]"
        )
    x, y = batch
    check_floating("the images", x, "of bytes write x.float() / 255")
    if x.dim() == 0 or x.numel() == 0:
        raise ValueError(
            f"the images must be at least 1 in each batch, got shape {list(x.shape)}: leave empty batches out"
        )
    check_labels(y, len(x), x.device, "the labels")


def _put_back(read: list[_Batch], stream: Iterator[_Batch]) -> Iterator[_Batch]:
    """The batches of both; each is released when it is read (`itertools.chain` keeps them)."""
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
    attack: Attack,
    verdicts: Verdicts,
) -> Samples:
    """The samples of a batch that are classified correctly; the others are recorded. Raises where a value is wrong."""
    _check_batch(batch)
    x, y = batch
    if _kind(x) != kind:
        raise ValueError(
            f"the images must be alike in all batches, got {_kind(x)} after {kind}: resize them, or evaluate them apart"
        )
    x, y, threat = pixels(x.detach()), y.long(), attack.threat
    outside = faults.pixels_outside(x, threat.lower, threat.upper, "the images")
    x = faults.onto_bounds(x, threat.lower, threat.upper)
    logits = sound_logits(model, x, y, "the labels", outside)
    on_host, target = (logits.argmax(dim=1) == y).cpu(), target_of(attack.loss, logits)
    numbers = verdicts.number(len(y))
    wrong = numbers[~on_host]
    verdicts.record(wrong, torch.zeros_like(wrong), torch.zeros_like(wrong))
    rows = on_host.nonzero().flatten().to(x.device)
    return Samples(x[rows], y[rows], numbers[on_host], None if target is None else target[rows])
