"""APGD (Croce and Hein, 2020), the attack without a step size, as plain data; and when it looks at its progress."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bt_fast.attack.inner import NAMES, TARGETED, OfAPGD, check_inner, check_not_at_x
from bt_fast.attack.pgd import NORMS, Norm, check_start, checked_bounds
from bt_fast.attack.pixels import Normalization
from bt_fast.attack.start import Noise
from bt_fast.attack.statistics import Statistics
from bt_fast.attack.threat import ThreatModel
from bt_fast.validation import check_choice, check_kind, real, size, step_count


@dataclass(frozen=True)
class APGD:
    """APGD, projected gradient ascent whose step size halves by itself (Croce and Hein, 2020, Algorithm 1).

    The first steps are of 2ε, with a momentum of 1/4 of the step before. At checkpoints a sample's step halves, and the
    sample goes back to its best iterate, where the inner loss rose in at most ρ of the steps since the checkpoint
    before, or where neither step size nor best loss changed since then. x' is the iterate of the greatest inner loss.
    For losses, `perturb` and `evaluate`, wherever a `PGD` is taken; of each sample's own number of steps.

    It is AutoAttack's code where that differs from the paper: the periods between checkpoints are whole numbers, from
    0.22·N down to 0.06·N by 0.03·N, each rounded down and at least 1; the first comparison of the first period is with
    an inner loss of 0; "at most ρ" instead of "less than ρ"; and ε-balls are projected onto by a norm plus 1e-12.

    Attributes:
        epsilon: ε ≥ 0, in pixel units. At 0 x' is x and no step is run.
        steps: N ≥ 1, N + 1 forwards and N backwards; with BulletTrain its N_B, and the step sizes of its plan are not
            used.
        norm: "linf" or "l2" (over all pixels of one image).
        start: "clean", at x, "normal", as for `PGD`, or "uniform": as AutoAttack, at `x + ε·t / ‖t‖` with t uniform in
            [-1, 1] (ℓ∞) or normal (ℓ2), so on the ball's surface, clamped to the bounds. None: the loss's own, and
            "uniform" for `evaluate`.
        inner: as for `PGD`, or "dlr_targeted" (K ≥ 4 classes), towards the most likely wrong class of the clean image;
            in `evaluate` towards the next one in each restart. None: the loss's own, and "cross_entropy" for
            `evaluate`. "kl" and "lse" have no gradient at x, and so no "clean" start.
        rho: ρ in [0, 1].
        bounds, normalization: as for `PGD`.

    Raises:
        TypeError: an argument is not of its kind.
        ValueError: a value is out of range or not known.
    """

    epsilon: float
    steps: int
    norm: Norm = "linf"
    start: Noise | None = None
    inner: OfAPGD | None = None
    rho: float = 0.75
    bounds: tuple[float, float] = (0.0, 1.0)
    normalization: Normalization | None = None
    statistics: ClassVar[Statistics] = "running"

    def __post_init__(self) -> None:
        steps, rho = step_count("steps", self.steps, least=1), real("rho", self.rho)
        vars(self).update(epsilon=size("epsilon", self.epsilon), steps=steps, rho=rho)
        vars(self).update(bounds=checked_bounds(self.bounds))
        check_choice("norm", self.norm, NORMS)
        check_start(self.start)
        check_inner("inner", self.inner, (*NAMES, TARGETED))
        if not 0.0 <= rho <= 1.0:
            raise ValueError(f"rho must lie in [0, 1], got {self.rho}: write rho=0.75")
        check_not_at_x(self.start, self.inner)
        instead = "write normalization=Normalization(mean, std)"
        check_kind("normalization", self.normalization, Normalization, instead, optional=True)

    @property
    def threat(self) -> ThreatModel:
        """The perturbations that the attack may make."""
        return ThreatModel(self.epsilon, NORMS[self.norm], *self.bounds)

    @property
    def step_size(self) -> float:
        """2ε, that of the first step."""
        return 2.0 * self.epsilon


def checkpoints(steps: int) -> dict[int, int]:
    """At which iterates 1..N an attack of N steps decides about its step size, each with the length of its period."""
    period, least, less = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    at, result = period, dict[int, int]()
    while at <= steps:
        result[at] = period
        period = max(period - less, least)
        at += period
    return result
