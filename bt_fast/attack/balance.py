"""Balanced raggedness: in data-parallel training, ranks with much to attack hand samples to ranks with little.

Ranks differ in their samples' step counts, and all wait for the slowest when the gradients are reduced. From the counts
of all ranks every rank makes the same plan on the host, without communication; images travel before the attack and
perturbed ones after it, each in one all-to-all of sizes that the plan gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from bt_fast.attack.auto import median_seconds
from bt_fast.attack.batch import AttackBatch
from bt_fast.ops.launch import dense_format
from bt_fast.validation import real, step_count

PARCEL = 32  # samples, some more than the busiest rank sends in `benchmarks/results/stragglers.md`


# The plan


@dataclass(frozen=True, eq=False)
class Exchange:
    """The plan of an exchange between N ranks, for step counts 0..n. Tensors are int64 on the CPU."""

    counts: Tensor  # [N, n+1], the number of samples of rank r that take exactly k steps
    quotas: Tensor  # [N, n+1], the number that rank r attacks; samples without steps stay with their rank
    # [moves]: `number` samples of `level` steps go from rank `source` to `target`. Ascending in source, then in target;
    # descending in level. No rank both sends and receives a level.
    source: Tensor
    target: Tensor
    level: Tensor
    number: Tensor

    @property
    def ranks(self) -> int:
        """N."""
        return len(self.counts)

    @property
    def busiest(self) -> int:
        """The largest number of samples that one rank sends, or receives."""
        ends = (self.source.numpy(), self.target.numpy())
        return max((int(np.bincount(end, self.number.numpy()).max()) for end in ends if len(end)), default=0)

    def outgoing(self, rank: int) -> Tensor:
        """[N, n+1]: how many samples of each step count a rank sends to each other."""
        return self._moves_of(self.source == rank, self.target)

    def incoming(self, rank: int) -> Tensor:
        """[N, n+1]: how many samples of each step count a rank receives from each other."""
        return self._moves_of(self.target == rank, self.source)

    def _moves_of(self, mine: Tensor, other: Tensor) -> Tensor:
        moves = torch.zeros_like(self.counts)
        moves[other[mine], self.level[mine]] = self.number[mine]
        return moves


def plan(counts: Tensor, ranks_per_node: int = 1) -> Exchange:
    """Plans an even attack: at each step t the ranks' numbers of samples with more than t steps differ by at most 1.

    If that leaves a choice, the rank with the least work so far gets one more, so that the sums over all steps are
    close, too. If all ranks have equally many samples, no rank attacks more than it has. Samples move within a node
    first. The same counts give the same plan on every rank.

    Args:
        counts: [N, n+1] int64 on the CPU: counts[r, k] samples of rank r take exactly k steps.
        ranks_per_node: ranks r with the same `r // ranks_per_node` are close to each other.

    Raises:
        TypeError or ValueError: counts is not such a tensor, or ranks_per_node is not an integer of at least 1.
    """
    if not isinstance(counts, Tensor) or counts.dtype != torch.int64:
        raise TypeError(
            f"counts must be a tensor of int64, got {getattr(counts, 'dtype', type(counts).__name__)}: "
            "write torch.as_tensor(counts)"
        )
    if not counts.is_cpu:
        raise ValueError(f"counts must be on the CPU, but is on {counts.device}: write counts.cpu()")
    if counts.dim() != 2 or 0 in counts.shape:
        raise ValueError(
            f"counts must have shape [N, n+1] with N >= 1, got {list(counts.shape)}: "
            "give a row for each rank, with its samples of 0 to n steps"
        )
    near = step_count("ranks_per_node", ranks_per_node, least=1)
    have = counts.numpy()
    if have.min() < 0:
        raise ValueError(f"counts must be at least 0, got {have.min()}: give the numbers of samples")
    quotas = _quotas(have)
    return Exchange(counts, torch.from_numpy(quotas), *map(torch.from_numpy, _moves(have - quotas, near)))


def _quotas(counts: np.ndarray) -> np.ndarray:
    """Returns [N, n+1], the number of samples of each step count for each rank.

    From the most steps down, each rank gets the same number of samples with at least k steps, and some ranks get one
    more: first those that already have one more, then those with the least work so far, then those with the most own
    samples to spare.
    """
    ranks, most = counts.shape[0], counts.shape[1] - 1
    quotas: np.ndarray = counts.copy()
    active = np.zeros(ranks, dtype=np.int64)  # samples with more than k steps
    work = np.zeros(ranks, dtype=np.int64)  # their steps after k
    total = 0
    for k in range(most, 0, -1):
        level = counts[:, k]
        if level.any():
            total += int(level.sum())
            least, extra = divmod(total, ranks)
            order = np.lexsort((active - level, work, active <= least))
            share = np.full(ranks, least)
            share[order[:extra]] += 1
            quotas[:, k] = share - active
            active = share
        work += active
    return quotas


def _moves(surplus: np.ndarray, ranks_per_node: int) -> tuple[np.ndarray, ...]:
    """Returns source, target, step count and size of the moves that bring the surplus [N, n+1] (need: < 0) to 0."""
    ranks, used = len(surplus), np.flatnonzero(surplus.any(axis=0))[::-1]  # from the most steps down
    nodes, levels = -(-ranks // ranks_per_node), len(used)
    by_level = surplus.T[used].ravel()
    cells = np.arange(len(by_level))  # of (step count, rank)
    giving, taking = (np.repeat(cells, np.maximum(s, 0)) for s in (by_level, -by_level))  # one for each sample
    homes = [cell // ranks * nodes + cell % ranks // ranks_per_node for cell in (giving, taking)]  # (step count, node)
    offers, needs = (np.bincount(home, minlength=levels * nodes) for home in homes)
    within = np.minimum(offers, needs)
    near = []
    for home, totals in zip(homes, (offers, needs), strict=True):
        place = np.arange(len(home)) - (totals.cumsum() - totals)[home]
        near.append(place < within[home])
    source = np.concatenate([giving[near[0]], giving[~near[0]]])
    target = np.concatenate([taking[near[1]], taking[~near[1]]])
    key = ((source % ranks) * ranks + target % ranks) * levels + source // ranks
    key, number = np.unique(key, return_counts=True)
    pair = key // max(levels, 1)
    return pair // ranks, pair % ranks, used[key - pair * levels], number


# The decision


@dataclass(frozen=True)
class Costs:
    """What an attack step, and an exchange of samples between ranks, cost: by this `Balance` decides whether one pays.

    They must be the same on all ranks, or some would wait for an exchange in vain.

    Attributes:
        row_seconds: for one sample in one attack step.
        step_seconds: for an attack step, for any number of samples.
        sample_bytes: of one sample attacked elsewhere, there and back (`sample_bytes`).
        latency_seconds: of one all-to-all, for any number of bytes; an exchange has two.
        bytes_per_second: the rate at which a rank sends while it receives equally much.

    Raises:
        TypeError or ValueError: a value is not a finite number of at least 0, or bytes_per_second is 0.
    """

    row_seconds: float
    step_seconds: float
    sample_bytes: float
    latency_seconds: float
    bytes_per_second: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(real(name, value)) and value >= 0):
                raise ValueError(
                    f"{name} must be a finite number of at least 0, got {value}: give what `measured_costs` finds"
                )
        if self.bytes_per_second == 0:
            raise ValueError("bytes_per_second must be above 0, got 0: write 1e15 where sending costs nothing")

    def attack_seconds(self, counts: Tensor) -> Tensor:
        """Returns [N] float64: each rank's attack on counts [N, n+1]; a step without samples costs nothing."""
        levels = torch.arange(counts.shape[1], device="cpu")
        longest = (levels * (counts > 0)).amax(dim=1)
        return self.row_seconds * (counts * levels).sum(dim=1).double() + self.step_seconds * longest.double()

    def exchange_seconds(self, exchange: Exchange) -> float:
        """Returns the time of an exchange's two all-to-alls, given by the rank that sends or receives most."""
        if len(exchange.number) == 0:
            return 0.0
        return 2 * self.latency_seconds + exchange.busiest * self.sample_bytes / self.bytes_per_second


def pays(exchange: Exchange, costs: Costs) -> bool:
    """Whether the slowest rank's attack becomes shorter by more than the exchange takes."""
    saved = costs.attack_seconds(exchange.counts).max() - costs.attack_seconds(exchange.quotas).max()
    return float(saved) > costs.exchange_seconds(exchange)


def sample_bytes(clean: Tensor, target: Tensor) -> int:
    """Returns the bytes of one sample attacked elsewhere: x, start, target and step size there, x' and flag back."""
    image = math.prod(clean.shape[1:]) * clean.element_size()
    return 3 * image + target.shape[1] * target.element_size() + 8 + 4  # a label's 8 bytes more do not count


def measured_costs(
    attack: Callable[[int], object], rows: int, clean: Tensor, target: Tensor, group: dist.ProcessGroup | None = None
) -> Costs:
    """Measures the costs, as the mean of all ranks. Every rank of the group must call it.

    Meant to run once before a training, since it waits for the device. The bytes per second include the latency, and so
    are too low.

    Args:
        attack: `attack(n)` takes one attack step on n samples.
        rows: ≥ 2, of this rank's usual minibatch; ranks may have different ones.
        clean: [m, ...] images, target: [m, K], like those of the training and on its device.
    """
    few, many = max(1, step_count("rows", rows, least=2) // 4), rows
    size, ranks = sample_bytes(clean, target), dist.get_world_size(group)
    parcel = torch.zeros(PARCEL, size, dtype=torch.uint8, device=clean.device)
    to_next, from_last = ([0] * ranks for _ in range(2))
    to_next[(dist.get_rank(group) + 1) % ranks] = from_last[dist.get_rank(group) - 1] = PARCEL
    works: list[Callable[[], object]] = [
        lambda: attack(few),
        lambda: attack(many),
        lambda: dist.all_to_all_single(parcel[:0].clone(), parcel[:0], [0] * ranks, [0] * ranks, group=group),
        lambda: dist.all_to_all_single(parcel.clone(), parcel, from_last, to_next, group=group),
    ]

    def together(work: Callable[[], object]) -> Callable[[], object]:
        dist.barrier(group)  # else the wait for a slower rank would be measured
        return work

    of_few, of_many, of_nothing, of_parcel = median_seconds([partial(together, work) for work in works], clean)
    row = max(0.0, (of_many - of_few) / (many - few))  # of this rank only: ranks differ in rows
    mine = torch.tensor(
        [row, max(0.0, of_few - few * row), of_nothing, of_parcel], dtype=torch.float64, device=clean.device
    )
    of_all = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(of_all, mine, group=group)
    per_row, per_step, latency, parcel_seconds = torch.stack(of_all).cpu().mean(dim=0).tolist()
    return Costs(per_row, per_step, size, latency, PARCEL * size / parcel_seconds)


# The exchange


@dataclass(frozen=True, eq=False)
class Route:
    """One all-to-all of a rank: the rows to send, and the order of its new batch."""

    leaving: Tensor  # [sent] int64, rows of the old batch in the order of sending
    sent: list[int]  # number of rows for each of the N ranks
    received: list[int]  # number of rows from each of them
    order: Tensor  # [new] int64: new row i is row order[i] of the old batch followed by the received rows

    def carry(self, tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
        """Returns each tensor's new rows, in its memory format. Every rank of the group must call it.

        All tensors are sent bit for bit, as bytes in one all-to-all. The host waits only if the group's backend does.
        On all ranks the tensors agree in dtype, and in shape except for the number of rows.
        """
        device = tensors[0].device
        leaving, order = (_to(index, device) for index in (self.leaving, self.order))
        parcels = [_bytes_of(t.detach()[leaving]) for t in tensors]
        parcel = torch.cat(parcels, dim=1)
        arrived = parcel.new_empty(sum(self.received), parcel.shape[1])
        dist.all_to_all_single(arrived, parcel, self.received, self.sent, group=group)
        widths = [p.shape[1] for p in parcels]
        news = []
        for own, rows in zip(tensors, arrived.split(widths, dim=1), strict=True):
            guests = rows.clone(memory_format=torch.contiguous_format).view(own.dtype).view(len(rows), *own.shape[1:])
            news.append(_in_format_of(own, torch.cat([own.detach(), guests])[order]))
        return news


def routes(exchange: Exchange, rank: int) -> tuple[Route, Route]:
    """Returns a rank's route out and its route home.

    Out: from its samples in sorted order to those that it attacks, by descending steps, first its own and then the
    others' by rank. Of each step count its last samples leave, to the lowest rank first. Home: from the attacked
    samples, followed by the starts of its own, to the x' of its own.
    """
    most = exchange.counts.shape[1] - 1
    levels = np.arange(most, 0, -1)
    have = exchange.counts[rank].numpy()[levels]
    to, by = (moves.numpy()[:, levels] for moves in (exchange.outgoing(rank), exchange.incoming(rank)))
    staying = have - to.sum(axis=0)
    begin = have.cumsum() - have  # of each level in sorted order
    # the j-th sample for rank r at level k follows those that stay and those for ranks below r
    leaving = _ranges((begin + staying + to.cumsum(axis=0) - to).ravel(), to.ravel())
    own = _ranges(begin, staying)
    own_level, guest_level = np.repeat(levels, staying), np.repeat(np.tile(levels, len(by)), by.ravel())
    order = np.argsort(-np.concatenate([own_level, guest_level]), kind="stable")
    m, sent, received = int(exchange.counts[rank].sum()), to.sum(axis=1).tolist(), by.sum(axis=1).tolist()
    attacked = len(order)
    place = np.empty(attacked, dtype=np.int64)  # in the attacked batch: own samples that stay, then guests
    place[order] = np.arange(attacked)
    home = attacked + np.arange(m)  # the start, for samples without steps
    home[own] = place[: len(own)]
    home[leaving] = attacked + m + np.arange(len(leaving))
    there = Route(_index(leaving), sent, received, _index(np.concatenate([own, m + np.arange(sum(received))])[order]))
    return there, Route(_index(place[len(own) :]), received, sent, _index(home))


@dataclass(frozen=True, eq=False)
class Rebalanced:
    """The samples that this rank attacks, at their start: its own that have steps and stay, and others' samples."""

    batch: AttackBatch
    _own_start: Tensor
    _home: Route
    _group: dist.ProcessGroup | None

    def bring_home(self, x_adv: Tensor, faulty: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x' [m, ...] and the flags [m] int32 of this rank's own samples, in its sorted order. Collective.

        Samples without steps keep their start and are not faulty. `x_adv` [a, ...] and `faulty` [a] are those of
        `batch`.
        """
        for name, given, like in (("x_adv", x_adv, self.batch.x_adv), ("faulty", faulty, self.batch.faulty)):
            if given.shape != like.shape or given.dtype != like.dtype:
                raise ValueError(
                    f"{name} must be {like.dtype} of shape {list(like.shape)}, "
                    f"got {given.dtype} of shape {list(given.shape)}: let it stay as it was made"
                )
        own = self._own_start
        images = torch.cat([x_adv.detach(), own])
        flags = torch.cat([faulty, faulty.new_zeros(len(own))])
        x_home, faulty_home = self._home.carry([images, flags], self._group)
        return _in_format_of(own, x_home), faulty_home


def send_out(batch: AttackBatch, exchange: Exchange, group: dist.ProcessGroup | None = None) -> Rebalanced:
    """Sends this rank's surplus to others and receives theirs. Every rank must call it with the same plan."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if exchange.ranks != ranks:
        raise ValueError(
            f"exchange must be a plan for the group's {ranks} ranks, got one for {exchange.ranks}: "
            "make it from counts with a row for each rank"
        )
    m = int(exchange.counts[rank].sum())
    if len(batch) != m:
        raise ValueError(
            f"batch must hold the {m} samples that the plan counts, got {len(batch)}: give the samples of this rank"
        )
    there, home = routes(exchange, rank)
    own = [batch.x_adv, batch.clean, batch.target, batch.step_size]
    names = [name for name in ("labels", "epsilon") if getattr(batch, name) is not None]
    more = [getattr(batch, name) for name in names]
    begin, clean, target, sizes, *more = there.carry([*own, *more], group)
    quota = exchange.quotas[rank].flip(0)[:-1]  # by descending steps, without those of 0
    steps = torch.arange(len(quota), 0, -1, device="cpu").repeat_interleave(quota)
    active = tuple(n for n in quota.cumsum(0).flip(0).tolist() if n)
    faulty = torch.zeros(len(begin), dtype=torch.int32, device=begin.device)
    attacked = AttackBatch(begin, clean, target, sizes, _to(steps, begin.device), active, faulty, batch.inner)
    carried: dict[str, Any] = dict(zip(names, more, strict=True))
    attacked = replace(attacked, **carried)
    return Rebalanced(attacked, batch.x_adv.detach(), home, group)


def _ranges(begin: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Returns the ranges [begin[i], begin[i] + length[i]), one after another."""
    before = length.cumsum() - length
    return np.repeat(begin - before, length) + np.arange(int(length.sum()))


def _index(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64, copy=False))


def _to(index: Tensor, device: torch.device) -> Tensor:
    """Copies to the device; the host does not wait for the copy."""
    return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index.to(device)


def _in_format_of(like: Tensor, images: Tensor) -> Tensor:
    return images.contiguous(memory_format=dense_format(like) or torch.contiguous_format)


def _bytes_of(rows: Tensor) -> Tensor:
    """Returns the rows as uint8 [n, bytes of a row]."""
    width = math.prod(rows.shape[1:])
    return rows.contiguous().view(len(rows), width).view(torch.uint8)
