"""Half of a minibatch's robust samples, drawn at random, stand for all of them in the update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, SupportsIndex

import torch
from torch import Tensor

from bt_fast import ops
from bt_fast.validation import check_choice, step_count


@dataclass(frozen=True)
class HalfDrawn:
    """Robust samples of which half, drawn at random, stand for all in the update: `BulletTrain(10, HalfDrawn(2), 0)`.

    Of the n robust samples of a minibatch ⌈n/2⌉ are drawn without replacement, and count n/⌈n/2⌉ times in the update's
    adversarial term and in F_R's mean. The others run no adversarial forward and count in neither. At fixed batch
    statistics the expectation of loss and gradients is that of all; batch norm in train mode sees fewer samples. The
    draw is that of the call's `generator`, after its draw of the start, and is made where `indices` are given, too.

    Attributes:
        steps: an integer, N_R, at least 0.
        attacked: "all": the half is drawn after the attack. "half": before it, so that the others take no steps; not in
            a process group.

    Raises:
        TypeError: steps is no integer. ValueError: it is below 0, or attacked not known.
    """

    steps: SupportsIndex
    attacked: Literal["all", "half"] = "all"

    def __post_init__(self) -> None:
        vars(self).update(steps=step_count("steps", self.steps))
        check_choice("attacked", self.attacked, ("all", "half"))

    def __repr__(self) -> str:
        return f"HalfDrawn({self.steps}{'' if self.attacked == 'all' else ', attacked=' + repr(self.attacked)})"


def steps_of(robust_steps: SupportsIndex | HalfDrawn) -> SupportsIndex:
    """N_R of either."""
    return robust_steps.steps if isinstance(robust_steps, HalfDrawn) else robust_steps


@dataclass(frozen=True, eq=False)
class Halved:
    """What drawing half of the robust samples makes of a plan of m samples. In the batch's own order.

    Attributes:
        weights: [m] float64, n/⌈n/2⌉ for the ⌈n/2⌉ drawn of n robust samples, 0 for the left-out ones, else 1.
        steps: [m] int64, 0 for the left-out ones if they are not attacked.
        order: [m] int64, the stable order by descending steps, in which of equals the left-out ones come last.
        active: [most] int64, how many samples have more than t steps.
        idle: [1] int64, how many of the left-out ones have steps.
    """

    weights: Tensor
    steps: Tensor
    order: Tensor
    active: Tensor
    idle: Tensor


def halved(how: HalfDrawn, group: Tensor, steps: Tensor, most: int, generator: torch.Generator | None) -> Halved:
    """Draws the half of those in the robust `group` [m], for a plan of these steps [m], of which none has more."""
    weights = weights_of_half(group == ops.ROBUST, generator)
    left = weights == 0
    if how.attacked == "half":
        steps = steps.masked_fill(left, 0)
    order, counts = ops.order_by_steps(2 * steps + ~left, 2 * most + 1)
    return Halved(weights, steps, order, counts[1::2], (left & (steps > 0)).sum().reshape(1))


def weights_of_half(robust: Tensor, generator: torch.Generator | None) -> Tensor:
    """[m] float64: n/⌈n/2⌉ for ⌈n/2⌉ of the n `robust` [m] bool, drawn without replacement, 0 for their rest, else 1.

    Never waits for the device.
    """
    keys = torch.rand(len(robust), dtype=torch.float64, generator=generator, device=robust.device)
    shuffled = keys.argsort()
    n = robust.sum()
    half = (n + 1) // 2
    drawn = torch.empty_like(robust)
    drawn[shuffled] = robust[shuffled].cumsum(0) <= half
    return torch.where(robust, torch.where(drawn, n.double() / half.clamp(min=1), 0.0), 1.0)


def check_saving(how: HalfDrawn | None, robust_move: bool, skipped: bool) -> None:
    """Raise ValueError unless robust samples run an adversarial forward that may be left out.

    They do where they have steps, or where samples without are not `skipped`.
    """
    if how is not None and skipped and not robust_move:
        raise ValueError(
            f"robust_steps must be a number where robust samples take no steps and the unperturbed are skipped, got "
            f"{how}: none of them runs an adversarial forward to leave out: write robust_steps=0, or unperturbed='keep'"
        )


def check_ranks(how: HalfDrawn | None, together: bool) -> None:
    """Raise ValueError where ranks mine `together`, but each of them would take steps away by itself."""
    if together and how is not None and how.attacked == "half":
        raise ValueError(
            f"robust_steps must have attacked='all' in a process group, got {how}: a rank would count steps that "
            f"another leaves out: write HalfDrawn({how.steps})"
        )


def check_all_count(how: HalfDrawn | None, where: str, instead: str) -> None:
    """Raise ValueError `where` each sample counts once."""
    if how is not None:
        raise ValueError(
            f"mining's robust_steps must be a number {where}, got {how}: {instead}, or write robust_steps={how.steps}"
        )
