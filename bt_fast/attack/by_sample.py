"""What differs from sample to sample in an attack: steps, ε, step size and start, as arguments of a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bt_fast import faults, ops
from bt_fast.attack.apgd import APGD
from bt_fast.attack.batch import dtype_of_radii
from bt_fast.attack.pgd import PGD
from bt_fast.attack.threat import ThreatModel
from bt_fast.deciding import STEP_FACTOR
from bt_fast.faults import CheckedRead, Fault
from bt_fast.ops.numeric import computable, kind_of, per_sample
from bt_fast.plan import Known, MinedPlan, Plan
from bt_fast.units import warn_of_units
from bt_fast.validation import check_device, check_kind, holds_integers


def _given(own: PerSample) -> list[tuple[str, Tensor]]:
    return [(name, values) for name, values in vars(own).items() if values is not None]


@dataclass(frozen=True, eq=False)
class PerSample:
    """What each of m samples has of its own in an attack by `perturb`, in the caller's order.

    A field that is None is what the attack's `PGD` says, for all samples. Values are checked with the one read of the
    device that `perturb` waits for anyway.

    Attributes:
        steps: [m] integers of at least 0, in any order: each step runs on the samples that still have steps left. x' of
            a sample without steps is x. Not with mining, which decides about them.
        epsilon: [m] floating point of at least 0, in pixel units. x' of a sample with 0 is x; without mining it takes
            no step.
        step_size: [m] floating point of at least 0, in pixel units. With mining it is that of the sample should it be a
            boundary one; all others have `1.7·ε_i/n`, of their own ε. Not with an `APGD`, which chooses them.
        start: [m, ...] floating point in the shape and the units of x, where each attack begins: moved into the
            sample's ball and the pixel bounds, if it lies outside. Nothing is drawn for it. Without mining, x' of a
            sample without steps is this point. At x itself "kl" has no gradient, and a sample stays there.

    Raises:
        TypeError: a field is not a tensor of its kind.
    """

    steps: Tensor | None = None
    epsilon: Tensor | None = None
    step_size: Tensor | None = None
    start: Tensor | None = None

    def __post_init__(self) -> None:
        for name, values in _given(self):
            integers = name == "steps"
            if not isinstance(values, Tensor) or not (holds_integers(values) if integers else computable(values)):
                kind = "integers" if integers else "floating-point numbers"
                raise TypeError(
                    f"{name} must be a tensor of {kind}, got {kind_of(values)}: give one of these for each image"
                )


NOTHING = PerSample()


def own_of(given: PerSample | None, x: Tensor, attack: PGD | APGD, *, mined: bool) -> PerSample:
    """What images x [m, ...] have of their own; TypeError or ValueError unless it fits them and the attack."""
    check_kind("per_sample", given, PerSample, "write PerSample(steps=..., epsilon=...)", optional=True)
    if given is None:
        return NOTHING
    if mined and given.steps is not None:
        raise ValueError(
            "per_sample must have no steps with mining, which decides about them: "
            "leave mining out, or write BulletTrain(policy=...) with a policy of your own"
        )
    if isinstance(attack, APGD):
        if given.step_size is not None:
            raise ValueError(
                "per_sample must have no step_size with an APGD, whose step sizes are its own, got one: "
                "leave it out, or write PGD(epsilon, step_size, steps)"
            )
    elif attack.step_size == 0 and given.epsilon is not None and given.step_size is None:
        raise ValueError(
            "per_sample must have a step_size where it has an epsilon and the attack's own step_size is 0: "
            "write PerSample(epsilon=epsilon, step_size=epsilon / 4), or PGD(step_size=2 / 255, ...)"
        )
    for name, values in _given(given):
        shape = x.shape if name == "start" else x.shape[:1]
        if values.shape != shape:
            raise ValueError(
                f"per_sample.{name} must have shape {list(shape)}, got {list(values.shape)}: give one for each image"
            )
        check_device(f"per_sample.{name}", values, x.device, "the images")
    return replace(given, **{name: values.detach() for name, values in _given(given)})


def check_made_anew(own: PerSample) -> None:
    """Raise ValueError where there is something of its own for an x' that is not made, but kept."""
    if _given(own):
        raise ValueError(
            "per_sample says how x' is made, but again(reuse=True) has the x' of the first pass: "
            "write `with bullet.again(reuse=False):` to make new ones, or leave per_sample out"
        )


def wrong_values(own: PerSample) -> list[Fault]:
    """Values that are negative, NaN or infinite."""
    wrong = []
    for name, values in _given(own):
        if name == "steps":
            bad, must, instead = values.long() < 0, "be at least 0", "write steps.clamp(min=0)"
        elif name == "start":
            bad, must = ~values.flatten(1).isfinite().all(dim=1), "be finite"
            instead = "look for a division by 0 in what made it"
        else:
            bad, must = ~((values >= 0) & values.isfinite()), "be finite and at least 0"
            instead = f"write {name}.clamp(min=0), and look for NaN in what made it"
        wrong.append(Fault(bad.sum(), f"per_sample.{name} must {must}, but {{count}} of {len(bad)} are not: {instead}"))
    return wrong


def still(own: PerSample, threat: ThreatModel) -> bool:
    """Whether ε is 0 for all samples, as the host knows: then no step is run."""
    return threat.epsilon == 0 and own.epsilon is None


def radii(own: PerSample, threat: ThreatModel, x: Tensor) -> Tensor | None:
    """Each sample's own ε [m] as the steps on images x take it; None where it is the threat model's."""
    if own.epsilon is None:
        return None
    return own.epsilon.to(dtype_of_radii(threat, x))


def moved(own: PerSample, threat: ThreatModel, steps: Tensor, mined: bool) -> Tensor:
    """[m] bool: which samples' x' may be another image than x."""
    at_start = own.start is not None and not (mined or still(own, threat))
    result = torch.ones_like(steps, dtype=torch.bool) if at_start else steps > 0
    return result if own.epsilon is None else result & (own.epsilon > 0)


def begun(own: PerSample, threat: ThreatModel, start: Tensor, x: Tensor, steps: Tensor) -> Tensor:
    """`start` [m, ...] of the samples that may move, and x of the others. All in one order, and without mining."""
    if own.start is not None or (own.steps is None and own.epsilon is None and not still(own, threat)):
        return start
    return torch.where(per_sample(steps > 0, x), start, x)


# Plans


class SizedRead(CheckedRead):
    """A checked read, which also warns of sizes in other units than those of pixels, and gives samples' step counts."""

    def __init__(
        self,
        own: PerSample,
        threat: ThreatModel,
        step_size: float,
        x: Tensor,
        counts: Tensor | None = None,
        wrong: Sequence[Fault] = (),
    ) -> None:
        self._threat, self._pixels = threat, x[0].numel()
        self._warns = own.epsilon is not None or own.step_size is not None
        epsilon, size = filled(own.epsilon, threat.epsilon, x), filled(own.step_size, step_size, x)
        # where ε differ, a step may well cross the smaller balls: a mistake of units is one that crosses all of them
        crossing = torch.where((epsilon > 0) & (size > 2 * epsilon.max()), size, 0.0)
        rows = torch.stack([epsilon.argmax(), crossing.argmax()])
        sizes = torch.stack([size, crossing]).gather(1, rows[:, None])[:, 0]
        numbers = [torch.cat([epsilon[rows], sizes]).view(torch.int64)]  # the bits of float64
        numbers += [] if counts is None else [counts]
        super().__init__(torch.cat([*numbers, *([faults.counts_of(wrong)] if wrong else [])]), wrong)

    def wait(self) -> list[int]:
        """The counts; raises the error of the first fault that occurred."""
        numbers = super().wait()
        sizes = torch.tensor(numbers[:4], dtype=torch.int64, device="cpu").view(torch.float64).view(2, 2)
        bounds = self._threat.lower, self._threat.upper
        for epsilon, size in sizes.T.tolist() if self._warns else ():
            warn_of_units(epsilon, self._threat.norm, bounds, size, self._pixels, of="per_sample")
        return numbers[4:]


def sizes_of(own: PerSample, threat: ThreatModel, step_size: float, x: Tensor) -> SizedRead | None:
    """The read of samples' own sizes, if they have some, which `warn_of` waits for."""
    return None if own.epsilon is None and own.step_size is None else SizedRead(own, threat, step_size, x)


def warn_of(sizes: SizedRead | None) -> None:
    """Warn of sizes that are probably in other units. Nothing is waited for where a later read has arrived."""
    if sizes is not None:
        sizes.wait()


def planned(
    own: PerSample, threat: ThreatModel, steps: int, step_size: float, x: Tensor, wrong: Sequence[Fault]
) -> tuple[Plan, CheckedRead | None]:
    """The plan of an attack without mining, and the read of what may be `wrong`, unless it has been waited for.

    It is waited for where samples have steps or an ε of their own: the host needs the counts.

    Args:
        steps, step_size: of samples that have none of their own. x: [m, ...], the images.
    """
    m, most, sizes = len(x), 0 if still(own, threat) else steps, filled(own.step_size, step_size, x)
    counts = torch.full((m,), most, dtype=torch.int64, device=x.device)
    if not _given(own):
        return Plan(counts, sizes, None, Known((m,) * most), most), faults.read(wrong)
    wrong = [*wrong, *wrong_values(own)]
    if own.steps is not None and not still(own, threat):
        counts = own.steps.to(torch.int64, copy=True)
    if own.epsilon is not None:
        counts = counts * (own.epsilon > 0)
    read = SizedRead(own, threat, step_size, x, counts, wrong)
    if own.steps is None and own.epsilon is None:
        return Plan(counts, sizes, None, Known((m,) * most), most), read
    active = _active(read.wait())
    order, _ = ops.order_by_steps(counts, len(active))
    return Plan(counts, sizes, order, Known(active), len(active)), None


def mined(
    own: PerSample, threat: ThreatModel, plan: MinedPlan, boundary_steps: int | None, step_size: float
) -> MinedPlan:
    """BulletTrain's plan with each sample's own sizes: 1.7·ε_i/n, and of boundary samples their own step size.

    Args:
        boundary_steps: the count by which a policy's boundary samples are known; None: they are so by their group.
        step_size: of boundary samples that have none of their own.
    """
    if own.epsilon is None and own.step_size is None:
        return plan
    boundary = plan.group == ops.BOUNDARY if boundary_steps is None else plan.steps == boundary_steps
    travel = STEP_FACTOR * filled(own.epsilon, threat.epsilon, plan.steps)
    sizes = torch.where(boundary, filled(own.step_size, step_size, plan.steps), travel / plan.steps.clamp(min=1))
    return replace(plan, step_size=sizes.masked_fill(plan.steps == 0, 0.0))


def filled(values: Tensor | None, number: float, like: Tensor) -> Tensor:
    """Each sample's own value [m] in float64, or the number for all of them."""
    if values is not None:
        return values.double()
    return torch.full((len(like),), number, dtype=torch.float64, device=like.device)


def _active(counts: list[int]) -> tuple[int, ...]:
    """For each step t, how many of these counts are above t."""
    at_most = torch.tensor(counts, device="cpu").bincount().cumsum(0)
    return tuple((len(counts) - at_most[:-1]).tolist())
