"""The speedup of BulletTrain by arithmetic: Eq. 7, its AugMix form, and a finer model of costs in forward passes.

A cost is that of one iteration in units of F, a forward pass of a full batch; an input or weight gradient also costs F.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields

from bt_fast.validation import check_choice, check_kind, real


@dataclass(frozen=True)
class Fractions:
    """The shares of boundary, robust and outlier samples, F_B, F_R and F_O, each in [0, 1].

    They sum to 1, or are all 0 before the first assignment.

    Attributes:
        boundary, robust, outlier: F_B, F_R, F_O.

    Raises:
        TypeError: a share is not a number.
        ValueError: a share is outside [0, 1], or their sum above 1.
    """

    boundary: float
    robust: float
    outlier: float

    def __post_init__(self) -> None:
        shares = astuple(self)
        for field, share in zip(fields(self), shares, strict=True):
            real(field.name, share)
        if not (all(0.0 <= share <= 1.0 for share in shares) and sum(shares) <= 1.0 + 1e-9):
            raise ValueError(
                f"fractions must lie in [0, 1] and sum to at most 1, got {shares}: write shares, as 0.3 for 30 %"
            )

    def mean_steps(self, boundary_steps: int, robust_steps: int, outlier_steps: int) -> float:
        """Returns the attack steps per sample, `F_B·N_B + F_R·N_R + F_O·N_O`.

        N_B, N_R and N_O are boundary_steps, robust_steps and outlier_steps.
        """
        return self.boundary * boundary_steps + self.robust * robust_steps + self.outlier * outlier_steps


def theoretical_speedup(
    fractions: Fractions,
    *,
    boundary_steps: int = 10,
    robust_steps: int = 2,
    outlier_steps: int = 0,
    baseline_steps: int = 10,
) -> float:
    """Eq. 7: `(N + 1) / (F_B·N_B + F_R·N_R + F_O·N_O + 1)`, counted in iterations.

    Args:
        fractions: measured shares F_B, F_R, F_O.
        boundary_steps: N_B, robust_steps: N_R, outlier_steps: N_O; baseline_steps: N, of the training for comparison.

    Raises:
        TypeError or ValueError: fractions is not a `Fractions`, or a step count not a number of at least 0.
    """
    check_kind("fractions", fractions, Fractions, "write Fractions(boundary, robust, outlier)")
    steps = {"boundary_steps": boundary_steps, "robust_steps": robust_steps, "outlier_steps": outlier_steps}
    for name, count in {**steps, "baseline_steps": baseline_steps}.items():
        real(name, count)
        if not 0 <= count < 2**63:
            raise ValueError(f"{name} must be at least 0 and fit into 63 bits, got {count}: write {name}=10")
    return (baseline_steps + 1) / (fractions.mean_steps(**steps) + 1)


def theoretical_speedup_augmix(boundary_fraction: float) -> float:
    """The AugMix form of Eq. 7, `3 / (1 + 2·F_B)`: only boundary samples run their two augmented views.

    Args:
        boundary_fraction: F_B.

    Raises:
        TypeError or ValueError: boundary_fraction is not a number in [0, 1].
    """
    real("boundary_fraction", boundary_fraction)
    if not 0.0 <= boundary_fraction <= 1.0:
        raise ValueError(
            f"boundary_fraction must lie in [0, 1], got {boundary_fraction}: write a share, as 0.3 for 30 %"
        )
    return 3.0 / (1.0 + 2.0 * boundary_fraction)


def trades_cost(mean_steps: float, corrupted_fraction: float = 1.0, clean_forwards: int = 1) -> float:
    """The cost of TRADES: one clean forward, two F for each attack step, three F for each forward of the update.

    27 F for ten uniform steps. mean_steps are attack steps per sample, corrupted_fraction is the share of samples in
    the update's adversarial forward, clean_forwards is 2 if a model with dropout must run the authors' second one.
    """
    return 1.0 + 2.0 * mean_steps + 3.0 * clean_forwards + 3.0 * corrupted_fraction


def trades_reference_cost(steps: int) -> float:
    """The cost of TRADES' authors' code with this many steps: a clean forward in each step, three in the loss."""
    return 3.0 * steps + 9.0


def augmix_cost(boundary_fraction: float = 1.0) -> float:
    """The cost of AugMix: `3 + 6·F_B`, for the clean batch and two views of the boundary_fraction F_B."""
    return 3.0 + 6.0 * boundary_fraction


def mart_cost(mean_steps: float, corrupted_fraction: float = 1.0, *, mining: bool = True) -> float:
    """The cost of MART: two F for each attack step, three for each of the update's two forwards.

    26 F for ten uniform steps, like its authors' code: the attack on the cross-entropy needs no clean forward, but
    mining does. mean_steps and corrupted_fraction are as in `trades_cost`.
    """
    return mining + 2.0 * mean_steps + 3.0 + 3.0 * corrupted_fraction


def pgd_cost(mean_steps: float, *, mining: bool = True) -> float:
    """The cost of PGD adversarial training: as `mart_cost`, also in mean_steps and mining, with one update forward."""
    return mining + 2.0 * mean_steps + 3.0


def yopo_cost(propagations: float, objective: str = "pgd") -> float:
    """The cost of YOPO-m-n, with m = propagations. The first layer's cost, also in the n steps, is left out.

    With the objective "pgd" three F for each propagation, in which the backward gives all gradients. With "trades" and
    "mart" two for each, since the weights' gradients are the update's, and the update's two forwards; TRADES adds its
    clean forward: 11 F for the paper's TRADES + YOPO-2-5. ValueError for another objective.
    """
    check_choice("objective", objective, ("pgd", "trades", "mart"))
    if objective == "pgd":
        return 3.0 * propagations
    return (objective == "trades") + 2.0 * propagations + 6.0
