"""The course of an evaluation: which attack, with which inner loss in each restart, and what follows on survivors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bt_fast.attack.apgd import APGD
from bt_fast.attack.dlr import LEAST_CLASSES
from bt_fast.attack.early_exit import Attack, Samples, WorkingBatch
from bt_fast.attack.inner import SHORT, TARGETED, OfAPGD, check_enough_classes, check_inner, check_not_at_x
from bt_fast.attack.packed_apgd import PackedAPGD, Rounds
from bt_fast.attack.pgd import PGD, norm_of
from bt_fast.attack.start import Noise
from bt_fast.attack.statistics import check_statistics
from bt_fast.attack.threat import ThreatModel
from bt_fast.autoattack import OTHERS, TARGETS, stands_others, why_not
from bt_fast.validation import check_kind, step_count
from bt_fast.warning import warn_caller

OF_ATTACK = ("steps", "step_size", "normalization")  # keywords of the first version that a PGD has now
STANDARD_STEPS = 100
_NAMES = {"cross_entropy": "apgd-ce", TARGETED: "apgd-t"}  # as AutoAttack has them


@dataclass(frozen=True)
class Course:
    """An attack with an inner loss for each restart; `standard` where FAB-T and Square follow."""

    attack: PGD | APGD
    inner: tuple[OfAPGD, ...]
    standard: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Of the attacks, in the order in which they run."""
        return ("pgd",) if isinstance(self.attack, PGD) else tuple(dict.fromkeys(map(_name_of, self.inner)))

    @property
    def needs_classes(self) -> bool:
        """Whether it depends on the model's number of classes."""
        return any(isinstance(inner, str) and inner in LEAST_CLASSES for inner in self.inner)

    def of_classes(self, classes: int) -> Course:
        """The course on a model of so many classes. ValueError where an inner loss needs more."""
        if self.standard and classes < LEAST_CLASSES[TARGETED]:
            raise ValueError(
                f"attacks='standard' needs a model of at least {LEAST_CLASSES[TARGETED]} classes, got logits of "
                f"{classes}: write APGD({self.attack.epsilon:g}, {STANDARD_STEPS}) in place of it"
            )
        for inner in self.inner:
            check_enough_classes(inner, classes)
        return replace(self, inner=self.inner[:classes]) if self.standard else self

    def goals(self, classes: int) -> int:
        """To how many wrong classes of a model's `classes` it goes."""
        return min(self.inner.count(TARGETED), classes - 1)

    def batch(self, seed: Tensor, like: Tensor, classes: int, *, channels_last: bool) -> WorkingBatch:
        """Room for as many samples under attack as `like` has."""
        a, threat = self.attack, self.attack.threat
        start: Noise = "clean" if a.start == "clean" else "uniform"
        if isinstance(a, PGD):
            loss: Any = self.inner[0]
            attack = Attack(threat, loss, a.steps, a.step_size, len(self.inner), seed, start)
            return WorkingBatch(attack, like, channels_last=channels_last)
        start = "surface" if start == "uniform" else start
        attack = Attack(threat, "cross_entropy", a.steps, a.step_size, len(self.inner), seed, start)
        options: dict[str, Any] = {"channels_last": channels_last, "goals": self.goals(classes), "keep": self.standard}
        return PackedAPGD(attack, Rounds(self.inner, a.rho), like, **options)


def course_of(attack: object, restarts: int, loss: object, old: Mapping[str, Any]) -> Course:
    """The course of evaluate's attack, also by the keywords `old` of the first version; TypeError or ValueError."""
    if isinstance(attack, ThreatModel):
        steps = step_count("steps", old.get("steps", 20), least=1)
        size, normalization = old.get("step_size"), old.get("normalization")
        size = 2.0 * attack.epsilon / steps if size is None else size
        bounds = attack.lower, attack.upper
        attack = PGD(attack.epsilon, size, steps, norm_of(attack.norm), bounds=bounds, normalization=normalization)
        return Course(attack, (_inner(attack, loss),) * restarts)
    if not isinstance(attack, APGD):
        check_kind("attack", attack, PGD, "write PGD(epsilon=8 / 255, step_size=2 / 255, steps=20)")
    assert isinstance(attack, (PGD, APGD))
    _check_old(old)
    if attack.start == "normal":
        raise ValueError("attack must start anywhere in the ball or at x, got start='normal': leave start out")
    check_statistics(attack.statistics, "in an evaluation", "leave statistics out")
    inner = _inner(attack, loss)
    check_not_at_x(attack.start, inner)
    if attack.start == "clean" and restarts > 1 and inner != TARGETED:
        raise ValueError(
            f"restarts must be 1 for an attack that starts at x, since all are the same, got {restarts}: "
            "write start='uniform', or restarts=1"
        )
    return Course(attack, (inner,) * restarts)


def _inner(attack: PGD | APGD, loss: object) -> OfAPGD:
    """What the attack ascends, where `evaluate` has this `loss`."""
    named: Any = SHORT.get(loss, loss) if isinstance(loss, str) else loss
    check_inner("loss", named)
    if named is not None and attack.inner not in (None, named):
        raise ValueError(f"the attack ascends {attack.inner!r}, but loss is {loss!r}: leave one of the two out")
    inner: OfAPGD = named or attack.inner or "cross_entropy"
    return inner


def _name_of(inner: OfAPGD) -> str:
    return _NAMES.get(inner, f"apgd-{inner}") if isinstance(inner, str) else "apgd"


def standard_course(threat: object, restarts: int, loss: object, old: Mapping[str, Any]) -> Course:
    """The course of AutoAttack's standard version; TypeError or ValueError."""
    instead = "write evaluate(model, batches, ThreatModel(8 / 255), attacks='standard')"
    check_kind("attack", threat, ThreatModel, instead)
    assert isinstance(threat, ThreatModel)
    changed = [name for name, value in old.items() if value is not None and name != "frozen"]
    changed += [] if loss is None else ["loss"]
    if restarts != 1:
        changed.insert(0, "restarts")
    if changed:
        raise ValueError(
            f"{changed[0]} must be left out with attacks='standard', whose attacks have numbers of their own: "
            "write PGD(...) or APGD(...) for others; images of a loader that normalises need "
            "nn.Sequential(Normalize(mean, std), model) and a loader without"
        )
    attack = APGD(threat.epsilon, STANDARD_STEPS, norm_of(threat.norm), "uniform", bounds=(threat.lower, threat.upper))
    targeted: list[OfAPGD] = [TARGETED] * TARGETS
    return Course(attack, ("cross_entropy", *targeted), standard=True)


def run_others(
    model: nn.Module, survivors: Sequence[Samples], like: Tensor, threat: ThreatModel, classes: int, seed: int
) -> tuple[tuple[str, ...], Tensor]:
    """Run FAB-T and Square on those that stood APGD, and return their names and the numbers of the broken samples.

    A warning says why, where they cannot run.

    Args:
        like: [width, ...], a batch of images.
    """
    none = torch.zeros(0, dtype=torch.int64, device="cpu")
    if reason := why_not(threat, like):
        warn_caller(
            f"robust accuracy is that of APGD-CE and APGD-T alone, without FAB-T and Square of AutoAttack: {reason}"
        )
        return (), none
    if not survivors:
        return OTHERS, none
    number = torch.cat([s.number for s in survivors])
    order = number.argsort()
    x, y = (torch.cat(parts)[order].to(like.device) for parts in zip(*((s.x, s.y) for s in survivors), strict=True))
    stands = stands_others(model, x, y, threat, classes, len(like), seed % 2**32)
    return OTHERS, number[order][~stands.cpu()]


def _check_old(old: Mapping[str, Any]) -> None:
    for name in OF_ATTACK:
        if name in old:
            raise ValueError(
                f"{name} is an option of the attack where that is a PGD: write PGD(..., {name}={old[name]!r})"
            )
