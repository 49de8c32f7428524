"""Runs the groups of a schedule beside each other, each on its own stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bt_fast.attack.batch import AttackBatch
from bt_fast.attack.graphs import GraphRunner
from bt_fast.attack.runners import Join, joined, run_eager, run_queued
from bt_fast.attack.threat import ThreatModel


class StreamRunner:
    """Executes attack steps on CUDA streams, groups of samples beside each other: as `Engine(streams=True)` may choose.

    Samples with the same number of steps (boundary, robust, outlier) are one chain, and the chains run concurrently.
    Each chain is replayed from graphs on its own stream and from its own memory pool. The streams start after the
    caller's earlier work, and the caller's stream waits for them all. In ℓ2 there is one chain of all samples, since
    the replacement of a zero gradient depends on a sample's place in the chain.

    Args:
        bucket: the sizes of chains are rounded up to a multiple of it.
        most_graphs: for each model and chain; beyond it, the least recently used are dropped.

    Raises:
        TypeError or ValueError: a count is not an integer of at least 1.
    """

    def __init__(self, *, bucket: int = 8, most_graphs: int = 64) -> None:
        self._new_chain = partial(GraphRunner, bucket=bucket, most_graphs=most_graphs)
        self._chains = [self._new_chain()]

    __call__ = run_queued

    def start(
        self,
        model: Callable[[Tensor], Tensor],
        batch: AttackBatch,
        threat: ThreatModel,
        generator: torch.Generator | None,
    ) -> Callable[[], None]:
        """Queues all chains; the returned function makes the caller's stream wait for them."""
        groups = _groups(batch.active) if threat.norm == "l_inf" else [slice(None)]
        self._chains += [self._new_chain() for _ in groups[len(self._chains) :]]
        joins: list[Join] = []
        try:
            for chain, rows in zip(self._chains, groups, strict=False):
                part = batch[rows]
                join = chain.queued(model, part, threat, generator, capacity=len(batch))
                if join is None and not joins:  # as one chain, which a model that draws random numbers needs
                    run_eager(model, batch, threat, generator)
                    return joined
                if join is None:
                    run_eager(model, part, threat, generator)
                joins.append(join or joined)
        except BaseException:
            _join_all(joins)
            raise
        return partial(_join_all, joins)

    def forget(self, model: Callable[[Tensor], Tensor]) -> None:
        """Frees a model's graphs and their memory."""
        for chain in self._chains:
            chain.forget(model)

    def explain(self, model: Any) -> str:
        """Describes how a model's attacks run."""
        return f"{len(self._chains)} chains beside each other, the first {self._chains[0].explain(model)}"


def _join_all(joins: list[Join]) -> None:
    for join in joins:
        join()


def _groups(active: Sequence[int]) -> list[slice]:
    """Returns the rows of each number of steps above 0, the largest number first."""
    return [slice(*ends) for ends in pairwise([0, *sorted(set(active) - {0})])]
