"""The exchange of a process group's ranks about a minibatch: one all-gather, and one sum.

Data parallel ranks that mined only their own samples would drift apart, since F_R and the percentile of Eq. 6 belong to
the whole minibatch. So every rank gets the values of all ranks, 16 bytes a sample, and computes the same from them.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# the second is the older name
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


class Sharing(ABC):  # noqa: B024, nothing is abstract: mining only hands it on
    """The way ranks share an attack; `bt_fast.Balance`, from the attack's layer, is registered as the only kind."""


@dataclass(frozen=True, eq=False)
class Together:
    """A minibatch of all N ranks, each padded to `rows` rows: M = N · rows in all. Tensors are on the device.

    Attributes:
        certainty: [M] floating point, NaN in padding.
        correct: [M] bool, False in padding.
        unfit: [M] uint8, see `ops.signed_variance`.
        is_sample: [M] bool, False in padding.
        sizes: [N] int64, the ranks' numbers of samples.
        state: [2] int64, rank 0's random state, a tensor of its own.
        faults: [N, f] int64, the counts of other faults.
        rank: this process's number. m: its number of samples.
    """

    certainty: Tensor
    correct: Tensor
    unfit: Tensor
    is_sample: Tensor
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
        """Whether a rank has more samples than rows: [N] int64. Then the results must not be used."""
        return (self.sizes > self._rows).long()

    def own(self, values: Tensor) -> Tensor:
        """Returns this rank's [m] of values [M]; 0 for samples beyond the rows."""
        mine = values[self.rank * self._rows :][: min(self.m, self._rows)]
        return torch.cat([mine, mine.new_zeros(self.m - len(mine))])

    @property
    def _rows(self) -> int:
        return len(self.is_sample) // len(self.sizes)


class Ranks:
    """A process group for mining; a copy is the same group. Its methods are collective, in the same order.

    Attributes:
        rank: this process's number in the group, of `count`.
        rows: the largest minibatch of any rank in the first call of `gather`; None before.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.count = dist.get_world_size(group)
        self.rows: int | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self

    def gather(self, certainty: Tensor, correct: Tensor, unfit: Tensor, state: Tensor, faults: Tensor) -> Together:
        """Returns the samples of all ranks, by one all-gather. Waits for the device only in its first call.

        certainty [m] is float32 or float64, correct [m] bool, unfit [m] uint8, state [2] and faults [f] int64. Samples
        beyond `rows` are left out, and `Together.too_many` then says so on every rank.
        """
        m, device = len(certainty), certainty.device
        if self.rows is None:
            most = torch.full((1,), m, dtype=torch.int64, device=device)
            dist.all_reduce(most, dist.ReduceOp.MAX, self.group)
            self.rows = int(most)
        rows = self.rows
        padded_certainty = torch.full((rows,), torch.nan, dtype=torch.float64, device=device)
        padded_bits = torch.zeros(rows, dtype=torch.int64, device=device)
        fits = min(m, rows)
        padded_certainty[:fits] = certainty[:fits].double()
        padded_bits[:fits] = (correct.long() | unfit.long() << 1)[:fits]
        parts = [state.new_full((1,), m), state, faults, padded_certainty.view(torch.int64), padded_bits]
        sent = torch.cat(parts)
        received = sent.new_empty(self.count, len(sent))
        _all_gather(received.view(-1), sent, group=self.group)
        sizes, states, counts, certainties, bits = received.split([len(part) for part in parts], dim=1)
        return Together(
            certainty=certainties.contiguous().view(torch.float64).flatten().to(certainty.dtype),
            correct=(bits & 1).bool().flatten(),
            unfit=(bits >> 1).to(torch.uint8).flatten(),
            is_sample=(torch.arange(rows, device=device) < sizes).flatten(),
            sizes=sizes[:, 0],
            state=states[0].clone(),
            faults=counts,
            rank=self.rank,
            m=m,
        )

    def start_sum(self, numbers: Tensor) -> Callable[[], Tensor]:
        """Starts the sum of `numbers` [n] int64 on the device over the ranks, in place.

        The returned function returns the sum. On a GPU it makes the device wait, not the host.
        """
        work = dist.all_reduce(numbers, group=self.group, async_op=True)

        def finish() -> Tensor:
            work.wait()
            return numbers

        return finish
