"""What the ranks of a process group tell each other about a minibatch: one all-gather, and one sum.

Data parallel ranks that each mined their own samples would drift apart: F_R and the percentile of Eq. 6 are those of
the whole minibatch. So every rank gets what all ranks know, 16 bytes a sample, and computes the same from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SIZE = 0  # of the header: the rank's number of samples; behind it the random state, then the counts of faults
STATE = slice(1, 3)
FAULTS = 3

# the second is its older name
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


@dataclass(frozen=True, eq=False)
class Together:
    """A minibatch of all N ranks, each filled up to `rows` rows: M = N · rows in all. Tensors are on the device.

    Attributes:
        certainty: [M] floating point, NaN in rows that fill up.
        correct: [M] bool; False in rows that fill up.
        unfit: [M] uint8, as `ops.signed_variance` says.
        there: [M] bool, whether a row is a sample.
        sizes: [N] int64, the ranks' numbers of samples.
        state: [2] int64, rank 0's random state, a tensor of its own.
        faults: [N, f] int64, how often something else was wrong.
        rank: whose view this is, m: its number of samples.
    """

    certainty: Tensor
    correct: Tensor
    unfit: Tensor
    there: Tensor
    sizes: Tensor
    state: Tensor
    faults: Tensor
    rank: int
    m: int

    @property
    def first(self) -> Tensor:
        """The place of this rank's first sample in the whole minibatch, 0-dim int64."""
        return self.sizes[: self.rank].sum()

    @property
    def too_many(self) -> Tensor:
        """Whether a rank has more samples than there is room for: [N] int64. What they got is not to be used then."""
        return (self.sizes > self._rows).long()

    def own(self, values: Tensor) -> Tensor:
        """This rank's [m] of values [M]; 0 where there was no room."""
        mine = values[self.rank * self._rows :][: min(self.m, self._rows)]
        return torch.cat([mine, mine.new_zeros(self.m - len(mine))])

    @property
    def _rows(self) -> int:
        return len(self.there) // len(self.sizes)


class Ranks:
    """A process group, as the mining sees it. All methods are collective: every rank calls them in the same order.

    A copy of what holds it holds the same group.

    Attributes:
        rank: this process's number in the group, of `count`.
        rows: the most samples that a minibatch of any rank had when the group first met; None before.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.count = dist.get_world_size(group)
        self.rows: int | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self

    def gather(self, certainty: Tensor, correct: Tensor, unfit: Tensor, state: Tensor, faults: Tensor) -> Together:
        """What all ranks know of their samples, in one all-gather. Waits for the device in its first call only.

        Args:
            certainty: [m] float32 or float64, correct: [m] bool, unfit: [m] uint8, of this rank. More samples than
                `rows` do not fit: `Together.too_many` says so then, on every rank.
            state: [2] int64. faults: [f] int64.
        """
        m, device = len(certainty), certainty.device
        if self.rows is None:
            self.rows = self._most(m, device)
        rows, fits = self.rows, min(m, self.rows)
        told = torch.zeros(FAULTS + len(faults) + 2 * rows, dtype=torch.int64, device=device)
        told[SIZE].fill_(m)
        told[STATE] = state
        head = FAULTS + len(faults)
        told[FAULTS:head] = faults
        told[head : head + rows].view(torch.float64).fill_(torch.nan)
        told[head : head + fits] = certainty[:fits].double().view(torch.int64)
        told[head + rows : head + rows + fits] = (correct.long() | unfit.long() << 1)[:fits]
        heard = told.new_empty(self.count, len(told))
        _all_gather(heard.view(-1), told, group=self.group)
        sizes, bits = heard[:, SIZE], heard[:, head + rows :]
        return Together(
            certainty=heard[:, head : head + rows].contiguous().view(torch.float64).flatten().to(certainty.dtype),
            correct=(bits & 1).bool().flatten(),
            unfit=(bits >> 1).to(torch.uint8).flatten(),
            there=(torch.arange(rows, device=device) < sizes[:, None]).flatten(),
            sizes=sizes,
            state=heard[0, STATE].clone(),
            faults=heard[:, FAULTS:head],
            rank=self.rank,
            m=m,
        )

    def start_sum(self, numbers: Tensor) -> Callable[[], Tensor]:
        """Begin to add up numbers over the ranks, while the caller goes on.

        Args:
            numbers: [n] int64, on the device; their sum takes their place.

        Returns:
            What gives the sum. On a GPU it makes the device wait, not the host.
        """
        work = dist.all_reduce(numbers, group=self.group, async_op=True)

        def finish() -> Tensor:
            work.wait()
            return numbers

        return finish

    def _most(self, m: int, device: torch.device) -> int:
        most = torch.full((1,), m, dtype=torch.int64, device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX, self.group)
        return int(most)


class OfRanks(Sequence[str]):
    """`messages` for each of `count` ranks, rank by rank, then `others` of no rank; made when one is needed."""

    def __init__(self, messages: Sequence[str], count: int, others: Sequence[str]) -> None:
        self._messages, self._count, self._others = messages, count, others

    def __len__(self) -> int:
        return self._count * len(self._messages) + len(self._others)

    def __getitem__(self, i: Any) -> Any:
        each = len(self._messages)
        if i < self._count * each:
            return f"rank {i // each}: {self._messages[i % each]}"
        return self._others[i - self._count * each]
