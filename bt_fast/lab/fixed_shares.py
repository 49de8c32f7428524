"""Fixed shares: a rank sees the same images in every epoch, shuffled anew, so that it can remember their attacks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bt_fast.lab.data import minibatches
from bt_fast.lab.world import World


def owners(n: int, batch_size: int, ranks: int, *, seed: int) -> Tensor:
    """Returns the rank of each of n images, int64 [n]: the one that has it in the first epoch of a shuffled run."""
    ranks_of = torch.empty(n, dtype=torch.int64, device="cpu")
    for batch in minibatches(n, batch_size, seed=seed, epoch=0):
        for rank in range(ranks):
            ranks_of[World(rank, ranks).share(len(batch)).own(batch)] = rank
    return ranks_of


def minibatches_of(ranks_of: Tensor, batch_size: int, *, seed: int, epoch: int) -> Iterator[Tensor]:
    """Yields one epoch's minibatches like `data.minibatches`, in which each rank's share holds images of its own alone.

    With one rank, and in the first epoch, they are the same as without shares.
    """
    n, ranks = len(ranks_of), int(ranks_of.max()) + 1
    order = torch.cat([*minibatches(n, batch_size, seed=seed, epoch=epoch)])
    of_ranks = [order[ranks_of[order] == rank] for rank in range(ranks)]
    taken = [0] * ranks
    for start in range(0, n, batch_size):
        parts = []
        for rank, own in enumerate(of_ranks):
            first = taken[rank]
            taken[rank] += len(World(rank, ranks).share(min(batch_size, n - start)))
            parts.append(own[first : taken[rank]])
        yield torch.cat(parts)
