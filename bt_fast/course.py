"""The course of an evaluation: which attack, with which inner loss in each restart, and what follows on survivors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bt_fast.attack.apgd import APGD
from bt_fast.attack.dlr import LEAST_CLASSES, check_classes
from bt_fast.attack.early_exit import Attack, Samples, WorkingBatch
from bt_fast.attack.losses import LOSSES
from bt_fast.attack.packed_apgd import TARGETED, PackedAPGD, Rounds
from bt_fast.attack.pgd import PGD, norm_of
from bt_fast.attack.start import Noise
from bt_fast.attack.threat import ThreatModel
from bt_fast.autoattack import OTHERS, TARGETS, stands_others, why_not
from bt_fast.validation import check_choice, check_kind, step_count
from bt_fast.warning import warn_caller

OF_ATTACK = ("steps", "step_size", "normalization")  # keywords of the first version that a PGD has now
STANDARD_STEPS = 100
_OF_PGD = {"cross_entropy": "ce", "margin": "margin", "dlr": "dlr"}  # what `direction_of` calls inner losses
_OF_LOSS = {"ce": "cross_entropy", "margin": "margin"}
_NAMES = {"cross_entropy": "apgd-ce", "margin": "apgd-margin", "dlr": "apgd-dlr", TARGETED: "apgd-t"}


@dataclass(frozen=True)
class Course:
    """An attack with an inner loss for each restart; `standard` where FAB-T and Square follow."""

    attack: PGD | APGD
    inner: tuple[str, ...]
    standard: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Of the attacks, in the order in which they run."""
        return ("pgd",) if isinstance(self.attack, PGD) else tuple(dict.fromkeys(_NAMES[i] for i in self.inner))

    @property
    def needs_classes(self) -> bool:
        """Whether it depends on the model's number of classes."""
        return any(inner in LEAST_CLASSES for inner in self.inner)

    def of_classes(self, classes: int) -> Course:
        """The course on a model of so many classes. ValueError where an inner loss needs more."""
        if self.standard and classes < LEAST_CLASSES[TARGETED]:
            raise ValueError(
                f"attacks='standard' needs a model of at least {LEAST_CLASSES[TARGETED]} classes, got logits of "
                f"{classes}: write APGD({self.attack.epsilon:g}, {STANDARD_STEPS}) in place of it"
            )
        for inner in self.inner:
            check_classes(inner, classes)
        return replace(self, inner=self.inner[:classes]) if self.standard else self

    def goals(self, classes: int) -> int:
        """To how many wrong classes of a model's `classes` it goes."""
        return min(self.inner.count(TARGETED), classes - 1)

    def batch(self, seed: Tensor, like: Tensor, classes: int, *, channels_last: bool) -> WorkingBatch:
        """Room for as many samples under attack as `like` has."""
        a, threat = self.attack, self.attack.threat
        start: Noise = "clean" if a.start == "clean" else "uniform"
        if isinstance(a, PGD):
            attack = Attack(threat, _OF_PGD[self.inner[0]], a.steps, a.step_size, len(self.inner), seed, start)
            return WorkingBatch(attack, like, channels_last=channels_last)
        start = "surface" if start == "uniform" else start
        attack = Attack(threat, "", a.steps, a.step_size, len(self.inner), seed, start)
        options: dict[str, Any] = {"channels_last": channels_last, "goals": self.goals(classes), "keep": self.standard}
        return PackedAPGD(attack, Rounds(self.inner, a.rho), like, **options)


def course_of(attack: object, restarts: int, old: Mapping[str, Any]) -> Course:
    """The course of evaluate's attack, also by the keywords `old` of the first version; TypeError or ValueError."""
    loss = old.get("loss")
    check_choice("loss", "ce" if loss is None else loss, LOSSES)
    if isinstance(attack, ThreatModel):
        steps = step_count("steps", old.get("steps", 20), least=1)
        size, normalization = old.get("step_size"), old.get("normalization")
        size = 2.0 * attack.epsilon / steps if size is None else size
        bounds = attack.lower, attack.upper
        attack = PGD(attack.epsilon, size, steps, norm_of(attack.norm), bounds=bounds, normalization=normalization)
        return Course(attack, (_OF_LOSS[loss or "ce"],) * restarts)
    if not isinstance(attack, APGD):
        check_kind("attack", attack, PGD, "write PGD(epsilon=8 / 255, step_size=2 / 255, steps=20)")
    assert isinstance(attack, (PGD, APGD))
    _check_old(old)
    if attack.start == "normal":
        raise ValueError("attack must start anywhere in the ball or at x, got start='normal': leave start out")
    if attack.inner == "kl":
        raise ValueError(
            "attack must have no inner loss of its own, got 'kl': leave inner out, or write inner='margin'"
        )
    if attack.inner is not None and loss is not None and _OF_LOSS[loss] != attack.inner:
        raise ValueError(f"attack has the inner loss {attack.inner!r}, but loss is {loss!r}: leave loss out")
    inner = attack.inner or _OF_LOSS[loss or "ce"]
    if attack.start == "clean" and restarts > 1 and inner != TARGETED:
        raise ValueError(
            f"restarts must be 1 for an attack that starts at x, since all are the same, got {restarts}: "
            "write start='uniform', or restarts=1"
        )
    return Course(attack, (inner,) * restarts)


def standard_course(threat: object, restarts: int, old: Mapping[str, Any]) -> Course:
    """The course of AutoAttack's standard version; TypeError or ValueError."""
    instead = "write evaluate(model, batches, ThreatModel(8 / 255), attacks='standard')"
    check_kind("attack", threat, ThreatModel, instead)
    assert isinstance(threat, ThreatModel)
    changed = [name for name, value in old.items() if value is not None and name != "frozen"]
    if restarts != 1:
        changed.insert(0, "restarts")
    if changed:
        raise ValueError(
            f"{changed[0]} must be left out with attacks='standard', whose attacks have numbers of their own: "
            "write PGD(...) or APGD(...) for others; images of a loader that normalises need "
            "nn.Sequential(Normalize(mean, std), model) and a loader without"
        )
    attack = APGD(threat.epsilon, STANDARD_STEPS, norm_of(threat.norm), "uniform", bounds=(threat.lower, threat.upper))
    return Course(attack, ("cross_entropy", *[TARGETED] * TARGETS), standard=True)


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
