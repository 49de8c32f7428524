"""The attack by projected gradient ascent, as plain data for losses, `perturb` and `evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from bt_fast.attack.inner import Inner, check_inner
from bt_fast.attack.pixels import Normalization
from bt_fast.attack.start import Noise
from bt_fast.attack.statistics import STATISTICS, Statistics
from bt_fast.attack.threat import ThreatModel
from bt_fast.validation import check_choice, check_kind, real, size, size_of_step, step_count

Norm = Literal["linf", "l2"]
NORMS: dict[str, str] = {"linf": "l_inf", "l2": "l_2"}  # as the threat model, and the authors' `distance`, call them
STARTS = ("normal", "uniform", "clean", None)


@dataclass(frozen=True)
class PGD:
    """Projected gradient ascent: `steps` steps of `step_size` from a random start in the ε-ball around each image.

    Attributes:
        epsilon: ε ≥ 0, in pixel units. At 0, where schedules begin, x' is x and no step is run.
        step_size: α > 0, in pixel units; with BulletTrain of the boundary samples. It may be 0 where ε is.
        steps: N ≥ 1; with BulletTrain its N_B.
        norm: "linf" or "l2" (over all pixels of one image).
        start: "normal", at x and 0.001·N(0, 1), "uniform" in the ε-ball, clamped to the bounds, or "clean", at x (not
            with "kl" and "lse", which have no gradient there). None: the loss's own, "uniform" for `PGDLoss` and
            "normal" for all others.
        inner: the inner loss. Away from the clean distribution: "kl", or "lse", the squared error of the probabilities
            (SCORE). Away from the label: "cross_entropy"; "margin", the largest wrong logit minus the true one; "dlr",
            that divided by the gap of the first and the third logit (AutoAttack's; K ≥ 3). Or a function
            `(outputs, rows) -> [n]`, the loss of each of n outputs [n, d], with gradient to them; `rows.clean_outputs`
            [n, d] and `rows.labels` ([n] or None) are in the order of the outputs, which is not the caller's; it runs
            eagerly. None: the loss's own, "kl" for `TRADESLoss` and `perturb`, "cross_entropy" for the others.
        keep: x' is the "last" iterate, or the "best": of start and all iterates that of the greatest inner loss (the
            earliest of equals), as in MadryLab's robustness library. That takes one forward more, runs eagerly, and
            begins at the start's projection onto ball and bounds. An evaluation judges every iterate anyway.
        bounds: the least and the greatest value of a pixel.
        normalization: of the images by their loader; without it they are pixels. ε, step sizes and bounds are in
            pixel units with it too.
        statistics: by which batch norm normalises in the attack. "running": its running ones (eval mode), so that a
            sample's result does not depend on its neighbours. Without mining also the batch's, as some scripts have
            it: the attack runs in the modes of the update, dropout included, eagerly and not folded. "batch" puts all
            buffers back after it; with "tracked" each forward of the attack moves them, the clean one of "kl", "lse"
            and functions too. With `SyncBatchNorm` the batch is that of all ranks, which must attack at the same time.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: a value is out of range or unknown.
    """

    epsilon: float
    step_size: float
    steps: int
    norm: Norm = "linf"
    start: Noise | None = None
    inner: Inner | None = None
    keep: Literal["last", "best"] = "last"
    bounds: tuple[float, float] = (0.0, 1.0)
    normalization: Normalization | None = None
    statistics: Statistics = "running"

    def __post_init__(self) -> None:
        epsilon = size("epsilon", self.epsilon)
        sizes = {"epsilon": epsilon, "step_size": size_of_step("step_size", self.step_size, epsilon)}
        vars(self).update(sizes, steps=step_count("steps", self.steps, least=1), bounds=checked_bounds(self.bounds))
        check_choice("norm", self.norm, NORMS)
        check_start(self.start)
        check_inner("inner", self.inner)
        check_choice("keep", self.keep, ("last", "best"))
        check_choice("statistics", self.statistics, STATISTICS)
        instead = "write normalization=Normalization(mean, std)"
        check_kind("normalization", self.normalization, Normalization, instead, optional=True)

    @property
    def threat(self) -> ThreatModel:
        """The perturbations that the attack may make."""
        return ThreatModel(self.epsilon, NORMS[self.norm], *self.bounds)


def check_start(start: object) -> None:
    """Raise TypeError or ValueError unless it is the name of a start, or None."""
    if isinstance(start, Tensor):
        raise TypeError(
            f"start must be one of {', '.join(map(repr, STARTS))}, got a tensor: "
            "write perturb(..., per_sample=PerSample(start=...))"
        )
    check_choice("start", start, STARTS)


def norm_of(distance: str) -> Norm:
    """Returns the norm for the authors' `distance`: "l_inf" or "l_2"."""
    return "linf" if distance == "l_inf" else "l2"


def checked_bounds(bounds: tuple[float, float]) -> tuple[float, float]:
    """The bounds as two floats; TypeError or ValueError unless they are a smaller and a greater number."""
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise TypeError(f"bounds must be two numbers, got {bounds!r}: write bounds=(0, 1)")
    lower, upper = (real("bounds", value) for value in bounds)
    if not lower < upper:
        raise ValueError(
            f"bounds must be a smaller and a greater number, got {bounds}: "
            "write the least and the greatest value of a pixel, as in bounds=(0, 1)"
        )
    return lower, upper
