"""Where the attack of an objective starts: noise as its authors draw it, a counter's, or points that are given."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bt_fast.attack.start import ball_start, given_start, normal_noise, sorted_start, surface_start
from bt_fast.ops.numeric import per_sample

if TYPE_CHECKING:
    from bt_fast.objectives.adversarial import Adversary


def in_order(x: Tensor, a: Adversary) -> Tensor:
    """The starts of images x [m, ...] in the caller's order, with the noise that the authors' code draws."""
    generator = a.call.generator
    if a.own.start is not None:
        return given_start(a.own.start, x, a.threat, a.radii(x))
    if a.call.recalled is not None:
        return a.call.recalled.starts(x, a.threat, a.random_state(x), a.numbers)[1]
    if a.noise == "clean":
        return x
    if a.call.indices is not None:
        return sorted_by(x, None, None, a.random_state(x), a, a.numbers)[1]
    if a.noise in ("uniform", "surface"):
        return (surface_start if a.noise == "surface" else ball_start)(x, a.threat, generator, a.radii(x))
    as_authors = generator is None and not x.is_cuda
    noise = normal_noise(x, generator, on_cpu=as_authors)
    if as_authors and a.threat.norm == "l_2":  # the TRADES code draws once more and uses the second
        noise = normal_noise(x, None, on_cpu=True)
    return (x + noise).to(x.dtype)


def sorted_by(
    x: Tensor, order: Tensor | None, steps: Tensor | None, state: Tensor, a: Adversary, numbers: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `sorted_start`, also of starts that are given."""
    if a.own.start is None:
        return sorted_start(x, order, steps, state, a.noise, a.threat, numbers, a.radii(x))
    begin = given_start(a.own.start, x, a.threat, a.radii(x))
    begin = begin if steps is None else torch.where(per_sample(steps > 0, x), begin, x)
    return (x, begin) if order is None else (x[order], begin[order])
