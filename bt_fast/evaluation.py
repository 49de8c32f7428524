"""Clean accuracy, and accuracy under PGD or APGD with restarts, and under AutoAttack's standard version."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from bt_fast import faults
from bt_fast.accuracy import Accuracy, sound_logits
from bt_fast.attack.apgd import APGD
from bt_fast.attack.dlr import ranked_wrong
from bt_fast.attack.early_exit import STOOD, Samples, Verdicts, Waiting, clean_target
from bt_fast.attack.folded import Frozen, attack_model
from bt_fast.attack.forward import clean_logits
from bt_fast.attack.generate import COMPARED
from bt_fast.attack.graph_cache import view_of
from bt_fast.attack.inner import Inner
from bt_fast.attack.neighbours import warn_of_neighbours
from bt_fast.attack.packed_apgd import PackedAPGD
from bt_fast.attack.pgd import PGD
from bt_fast.attack.pixels import Normalization, on_pixels
from bt_fast.attack.threat import ThreatModel
from bt_fast.attack.wrapped import unwrapped
from bt_fast.autoattack import OTHERS
from bt_fast.course import OF_ATTACK, Course, course_of, run_others, standard_course
from bt_fast.deprecated import check_keywords
from bt_fast.engine import Engine
from bt_fast.units import warn_of_units
from bt_fast.validation import check_choice, check_floating, check_kind, check_labels, step_count

if TYPE_CHECKING:
    from typing_extensions import Unpack

_Batch = tuple[Tensor, Tensor]


class Deprecated(TypedDict, total=False):
    """The keywords of the first version."""

    steps: int
    step_size: float | None
    normalization: Normalization | None
    frozen: Frozen | None


NEW_LINES = {
    **dict.fromkeys(OF_ATTACK, "write evaluate(model, batches, PGD(epsilon, step_size, steps, ...))"),
    "frozen": "write engine='fast'",
}


@dataclass(frozen=True, eq=False)
class Evaluation(Accuracy):
    """An accuracy, and when each sample was first misclassified, in the order of the stream.

    Attributes:
        restart: [total] int64 on the host: 0 for the clean image, r in 1..restarts for the r-th restart, `STOOD` (-1)
            for a sample that stood them all. Of the standard version APGD-CE is 1, APGD-T towards the k-th likeliest
            wrong class 1 + k, and FAB-T and Square together the number behind these.
        step: [total] int64 on the host: the number of steps then, 0 at the start or clean, and for FAB-T and Square;
            `STOOD` likewise.
        attacks: the names of the attacks that ran, as AutoAttack calls them: "apgd-ce", "apgd-t", "fab-t", "square";
            "pgd" and "apgd-margin" are ours.
    """

    restart: Tensor = field(repr=False)
    step: Tensor = field(repr=False)
    attacks: tuple[str, ...] = ()

    @property
    def robust_samples(self) -> Tensor:
        """The places in the stream of the samples that stood, ascending: [robust_correct] int64."""
        return (self.restart == STOOD).nonzero().flatten()


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    attack: PGD | APGD | ThreatModel,
    *,
    restarts: int = 1,
    attacks: Literal["standard"] | None = None,
    loss: Inner | Literal["ce"] | None = None,
    generator: torch.Generator | None = None,
    engine: Engine | str = "exact",
    progress: Callable[[int], None] | None = None,
    first: int = 0,
    **deprecated: Unpack[Deprecated],
) -> Evaluation:
    """Returns clean accuracy, and that under PGD or APGD from each of `restarts` starts, or under AutoAttack's attacks.

    A sample is broken if the model misclassifies it clean, or at any iterate of any restart: the start (iterate 0) and
    the image after each of the N steps, projections included. PGD starts at a point drawn uniformly from the ε-ball and
    clamped to the pixel bounds; in it a sample with an input gradient of exactly 0 stays.

    A sample's result is that of the plain loop which attacks all of them to the end. But a broken sample leaves at once
    and another takes its place: the attack runs on full batches (of the first one's size), and at most two are held.
    Random starts depend on the generator's next number, the restart and the sample's number in the stream alone.

    `attacks="standard"` is AutoAttack's standard version (Croce and Hein, 2020): APGD-CE, APGD-T towards the nine
    likeliest wrong classes, 100 steps each, here; then FAB-T and Square by the `autoattack` package, on the samples
    that still stand, which are kept on the host for it. A verdict can differ from that of the package run whole in what
    is random (starts are of a counter; FAB-T's and Square's numbers depend on who stands) and by rounding. Without the
    package a warning says so, and the result's `attacks` which parts ran: robust accuracy is then an upper bound.

    Args:
        model: maps [n, ...] to logits [n, K]; it runs in eval mode and keeps its modes and gradients.
        batches: pairs of images [n, ...], floating point within bounds, all alike, and labels [n], integers.
        attack: a `PGD` (every iterate is judged, whatever it keeps) or an `APGD`, from the ball or x; or the threat
            model of `attacks`. A `ThreatModel` alone, as in the first version, is attacked by 20 steps of ε/10.
        restarts: ≥ 1; 1 from x, but for targeted DLR, which goes to the next wrong class in each, round and round.
        attacks: "standard", or None for the attack alone.
        loss: what is ascended, an inner loss as `PGD` has them, or "ce"; None: the attack's own, or "cross_entropy".
        generator: on the images' device; one number is drawn from it, the seed of all random starts.
        engine: how the model is run, by name or as an `Engine`. A folded view judges, too: its logits are the model's
            up to rounding, so there is no "bf16". Graphs and streams are not used; FAB-T and Square run the model.
        progress: called with the number of samples decided so far, whenever it grew.
        first: ≥ 0, the number of the stream's first sample, for an evaluation in parts: with its own `first` and a
            generator of the same state each gives the results of one evaluation.
        deprecated: keywords of the first version; each warns with the new line.

    Raises:
        TypeError or ValueError: an argument, the logits or a batch does not fit (shapes, types, devices, pixels out of
            bounds, labels out of range, too few classes, NaN in logits or an input gradient), or there are no samples.
    """
    check_keywords("evaluate", deprecated, NEW_LINES)
    step_count("restarts", restarts, least=1)
    step_count("first", first)
    check_choice("attacks", attacks, ("standard", None))
    course = (standard_course if attacks == "standard" else course_of)(attack, restarts, loss, deprecated)
    verdicts = Verdicts(progress, first)
    names = _judge(model, batches, course, _view(engine, deprecated), generator, verdicts)
    restart, step = verdicts.in_order()
    clean, robust = int((restart != 0).sum()), int((restart == STOOD).sum())
    return Evaluation(clean, robust, verdicts.seen, restart, step, names)


def _judge(
    model: nn.Module,
    batches: Iterable[_Batch],
    course: Course,
    frozen: Frozen | None,
    generator: torch.Generator | None,
    verdicts: Verdicts,
) -> tuple[str, ...]:
    """Record the verdict of each sample, and return the names of the attacks."""
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
    attack = course.attack
    threat, bounds = attack.threat, attack.bounds
    x, kind = begun[0].detach(), _kind(begun[0])
    warn_of_units(threat.epsilon, threat.norm, bounds, attack.step_size, x[0].numel())
    with (
        torch.inference_mode(False),
        on_pixels(model, x, attack.normalization, "the images", bounds) as (model, pixels),
        attack_model(model, frozen, pixels(x[:COMPARED].clone())) as view,
    ):
        warn_of_neighbours(unwrapped(model), pixels(x), threat, "compare evaluations with equal batches only")
        classes = clean_logits(view, pixels(x[:2])).shape[1] if course.needs_classes else 2
        course = course.of_classes(classes)
        seed = torch.randint(2**63 - 1, (), device=x.device, generator=generator)
        working = course.batch(seed, x, classes, channels_last=frozen is not None and frozen.channels_last)
        whole = _put_back([begun], stream)
        like = x.new_empty(()).expand(x.shape)
        del begun, x  # a batch is held no longer than until its samples are copied
        correct = map(lambda batch: _correct(view, batch, kind, pixels, course, verdicts, classes), whole)
        if threat.epsilon == 0:  # then every x' is x
            for samples in correct:
                verdicts.record(samples.number, *[torch.full_like(samples.number, STOOD)] * 2)
            return *course.names, *(OTHERS if course.standard else ())
        working.run(view, Waiting(correct), verdicts)
        if not (course.standard and isinstance(working, PackedAPGD)):
            return course.names
        names, broken = run_others(unwrapped(model), working.stood, like, threat, classes, int(seed))
        verdicts.overrule(broken, len(course.inner) + 1)
        return *course.names, *names


def _view(engine: Engine | str, deprecated: Deprecated) -> Frozen | None:
    frozen = deprecated["frozen"] if "frozen" in deprecated else view_of(Engine.of(engine))
    check_kind("frozen", frozen, Frozen, "write engine='fast'", optional=True)
    if frozen is not None and frozen.autocast is not None:
        raise ValueError(
            "engine must have the model's own precision, since the view judges too, got one in 16 bits: "
            "write engine='fast'"
        )
    return frozen


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
    """Yields the batches of both; each is released when it is read (`itertools.chain` keeps them)."""
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
    course: Course,
    verdicts: Verdicts,
    classes: int,
) -> Samples:
    """The samples of a batch that are classified correctly, with what the course needs to know of them.

    The others are recorded. Raises where a value is wrong.
    """
    _check_batch(batch)
    x, y = batch
    if _kind(x) != kind:
        raise ValueError(
            f"the images must be alike in all batches, got {_kind(x)} after {kind}: resize them, or evaluate them apart"
        )
    x, y, threat = pixels(x.detach()), y.long(), course.attack.threat
    outside = faults.pixels_outside(x, threat.lower, threat.upper, "the images")
    x = faults.onto_bounds(x, threat.lower, threat.upper)
    logits = sound_logits(model, x, y, "the labels", outside)
    on_host, target = (logits.argmax(dim=1) == y).cpu(), clean_target(course.inner[0], logits)
    numbers = verdicts.number(len(y))
    wrong = numbers[~on_host]
    verdicts.record(wrong, torch.zeros_like(wrong), torch.zeros_like(wrong))
    rows = on_host.nonzero().flatten().to(x.device)
    goals = course.goals(classes)
    ranked = ranked_wrong(logits[rows], y[rows], goals) if goals else None
    return Samples(x[rows], y[rows], numbers[on_host], None if target is None else target[rows], ranked)
