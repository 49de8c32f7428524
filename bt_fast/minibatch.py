"""The last minibatch of a `BulletTrain`, or of a loss without one, for a further pass over it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bt_fast.plan import MinedPlan


@dataclass
class LastMinibatch:
    """The tensors of the last minibatch; neither saved nor copied with the module."""

    fraction_before: Tensor | None = None  # F_R before it; None until `observe` has ended it, and without mining
    kept: object = None  # the results of its objective
    owner: object = None  # whose results these are
    planned: MinedPlan | None = None  # until `observe` counts it
    attacked: tuple[Tensor, Tensor] | None = None  # the arguments of `BulletTrain.attacked`, until `observe`

    def begin_again(self, reuse: object) -> None:
        """Begin a further pass, at other weights; TypeError or RuntimeError where it is not possible."""
        if not isinstance(reuse, bool):
            raise TypeError(
                f"reuse must be True (the x' of the first pass) or False (made anew), got {reuse!r}: "
                "write again(reuse=False)"
            )
        if self.fraction_before is None and self.kept is None:
            raise RuntimeError(
                "again goes over the last minibatch once more, but there is none that ended without an error: call the "
                "loss with it (or plan and observe) first, outside of the block of `with bullet.again():`"
            )
        torch.clear_autocast_cache()  # of the caller's autocast: it holds casts of the weights of the first pass

    def check_owner(self, owner: object) -> None:
        """RuntimeError where there is a last minibatch, and another loss than this one has made it."""
        if self.owner != owner and (self.fraction_before is not None or self.kept is not None):
            raise RuntimeError(
                "again goes over this loss's last minibatch once more, but the last one of its mining was that of "
                "another loss or script: give each loss a BulletTrain of its own, or go over a minibatch again before "
                "the next loss is called"
            )

    def reused(self, owner: object = None) -> object:
        """Returns the kept results; RuntimeError if there are none, or those of another owner."""
        if self.kept is None:
            raise RuntimeError(
                "again(reuse=True) takes the x' that a loss of bt_fast has made, but the last minibatch had none: "
                "write `with bullet.again(reuse=False):`"
            )
        if self.owner != owner:
            raise RuntimeError(
                "again(reuse=True) takes the x' that the same loss has made, but the last minibatch of its mining was "
                "that of another loss, or of other arguments: write `with bullet.again(reuse=False):` to make new "
                "ones, or give each loss a BulletTrain of its own"
            )
        return self.kept
