"""The augmentation of CIFAR training: random crops and flips, for a whole minibatch at once."""

from __future__ import annotations

import torch
from torch import Tensor

from bt_fast.augment.crops import cut
from bt_fast.lab.world import Share
from bt_fast.placement import Placement

PADDING = 4


def crop_and_flip(x: Tensor, *, seed: int, iteration: int, share: Share | None = None) -> tuple[Tensor, Placement]:
    """Crops each image [m, C, H, W] at random after zero padding, and mirrors it with probability 1/2.

    Returns the crops and their placement. The random numbers depend on `seed` and `iteration` alone, so a resumed run
    repeats them. With `share`, x is that share of a larger minibatch, and gets its numbers in the whole minibatch.
    """
    share = Share(0, len(x), len(x)) if share is None else share
    generator = torch.Generator().manual_seed(seed * 1_000_003 + iteration)
    tops, lefts = torch.randint(2 * PADDING + 1, (2, share.of), generator=generator, device="cpu") - PADDING
    flips = torch.rand(share.of, generator=generator, device="cpu") < 0.5
    placement = Placement(*(share.own(drawn).to(x.device) for drawn in (tops, lefts, flips)))
    return cut(x, placement), placement
