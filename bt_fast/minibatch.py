"""The last minibatch of a `BulletTrain`, for a further pass over it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bt_fast.plan import MinedPlan


@dataclass
class LastMinibatch:
    """The tensors of the last minibatch; neither saved nor copied with the module."""

    fraction_before: Tensor | None = None  # F_R before it; None until `observe` ends the minibatch
    kept: object = None  # the results of its objective
    planned: MinedPlan | None = None  # until `observe` counts it
    attacked: tuple[Tensor, Tensor] | None = None  # the arguments of `BulletTrain.attacked`, until `observe`

    def check_again(self, reuse: object) -> None:
        """Raises TypeError or RuntimeError unless a further pass is possible."""
        if not isinstance(reuse, bool):
            raise TypeError(
                f"reuse must be True (the x' of the first pass) or False (made anew), got {reuse!r}: "
                "write `with bullet.again(reuse=False):`"
            )
        if self.fraction_before is None:
            raise RuntimeError(
                "again goes over the last minibatch once more, but there is none that ended without an error: call the "
                "loss with it (or plan and observe) first, outside of the block of `with bullet.again():`"
            )

    def reused(self) -> object:
        """Returns the kept results; RuntimeError if there are none."""
        if self.kept is None:
            raise RuntimeError(
                "again(reuse=True) takes the x' that a loss of bt_fast has made, but the last minibatch had none: "
                "write `with bullet.again(reuse=False):`"
            )
        return self.kept
