"""Threat models: the perturbations that an attack may make."""

from __future__ import annotations

from dataclasses import dataclass

from bt_fast.validation import check_choice, check_kind, real, size

NORMS = ("l_inf", "l_2")


@dataclass(frozen=True)
class ThreatModel:
    """The perturbations that an attack may make: all x' with `‖x' - x‖ ≤ epsilon` and every pixel in [lower, upper].

    Attributes:
        epsilon: ε ≥ 0, in pixel units; at 0 x' is x.
        norm: "l_inf" or "l_2" (over all pixels of one sample).
        lower: the least pixel value, upper: the greatest.

    Raises:
        TypeError: epsilon or a bound is not a number.
        ValueError: a value is out of range or the norm is unknown.
    """

    epsilon: float
    norm: str = "l_inf"
    lower: float = 0.0
    upper: float = 1.0

    def __post_init__(self) -> None:
        size("epsilon", self.epsilon)
        check_choice("norm", self.norm, NORMS)
        if not real("lower", self.lower) < real("upper", self.upper):
            raise ValueError(
                f"lower must be less than upper, got {self.lower} and {self.upper}: "
                "give the least and the greatest value of a pixel"
            )
        for name in ("epsilon", "lower", "upper"):  # also from a fraction, a 64-bit integer, ...
            object.__setattr__(self, name, float(getattr(self, name)))


def check_threat(threat: ThreatModel) -> None:
    """Raises TypeError unless it is a threat model."""
    check_kind("threat", threat, ThreatModel, "write ThreatModel(epsilon)")
