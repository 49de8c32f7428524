"""One clean forward in the modes of the update, for mining, the attack's target and the update.

It is the one exception to the rule that mining sees logits of the attack's mode: it looks through batch statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from bt_fast.attack.apgd import APGD
from bt_fast.attack.forward import logits_of
from bt_fast.attack.inner import TARGETED, OfAPGD, of_clean
from bt_fast.attack.memory_format import formatted, takes_channels_last
from bt_fast.attack.pgd import PGD
from bt_fast.attack.statistics import check_statistics
from bt_fast.objectives.recomputed import update_modes
from bt_fast.ranges import UPDATE, range_
from bt_fast.validation import step_count

CleanUpdates = int | Literal["authors", "shared"]
SHARED = "shared"


@dataclass(frozen=True)
class SharedForward:
    """The clean forward of a loss's update, run before the attack. What it has computed is kept until the backward."""

    channels_last: bool

    def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
        """The logits [m, K] of x, with gradient."""
        with range_(UPDATE), update_modes(model):
            return logits_of(model, formatted(x, self.channels_last and takes_channels_last(model)))


def clean_forwards_of(clean_updates: CleanUpdates, most: int) -> int:
    """How many clean forwards an update has, `most` by its authors; TypeError or ValueError unless it is one of these.

    These are 1 to `most`, "authors" and "shared".
    """
    if isinstance(clean_updates, str):
        if clean_updates in ("authors", SHARED):
            return 1 if clean_updates == SHARED else most
        raise ValueError(
            f"clean_updates must be a number or 'shared', got {clean_updates!r}: write clean_updates='shared'"
        )
    forwards = step_count("clean_updates", clean_updates, least=1)
    if forwards > most:
        allowed = "1 or 2" if most == 2 else "1"
        raise ValueError(f"clean_updates must be {allowed}, got {clean_updates}: write clean_updates=1, or 'shared'")
    return forwards


def check_shared(attack: PGD | APGD, inner: OfAPGD, *, mined: bool) -> None:
    """Raise ValueError where there is nothing to share: neither mining nor the inner loss looks at clean logits."""
    instead = "write clean_updates=1"
    check_statistics(attack.statistics, "with clean_updates='shared'", instead)
    if not mined and not of_clean(inner) and inner != TARGETED:
        raise ValueError(
            f"clean_updates must be 1 without mining and with the inner loss {inner!r}, got 'shared': the attack then "
            "runs no clean forward that could be shared: write clean_updates=1, or give the loss mining=BulletTrain()"
        )
