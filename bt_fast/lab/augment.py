"""The augmentation of CIFAR training: random crops and flips, for a whole minibatch at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bt_fast.lab.world import Share

PADDING = 4


def crop_and_flip(x: Tensor, *, seed: int, iteration: int, share: Share | None = None) -> Tensor:
    """Crops each image [m, C, H, W] at random after zero padding, and mirrors it with probability 1/2.

    The random numbers depend on `seed` and `iteration` alone, so a resumed run repeats them. With `share`, x is that
    share of a larger minibatch, and gets its numbers in the whole minibatch.
    """
    m, _, height, width = x.shape
    share = Share(0, m, m) if share is None else share
    generator = torch.Generator().manual_seed(seed * 1_000_003 + iteration)
    tops, lefts = torch.randint(2 * PADDING + 1, (2, share.of, 1), generator=generator, device="cpu")
    flips = torch.rand(share.of, 1, generator=generator, device="cpu") < 0.5
    top, left, flip = (share.own(drawn).to(x.device) for drawn in (tops, lefts, flips))
    rows = top + torch.arange(height, device=x.device)
    columns = torch.arange(width, device=x.device).expand(m, -1)
    columns = left + torch.where(flip, columns.flip(1), columns)
    padded = F.pad(x, [PADDING] * 4)
    samples = torch.arange(m, device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[samples, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
