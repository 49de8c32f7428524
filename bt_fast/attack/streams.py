"""Run the groups of a schedule beside each other, each on a stream of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bt_fast.attack.graphs import GraphRunner
from bt_fast.attack.schedule import Schedule
from bt_fast.attack.threat import ThreatModel


class StreamRunner:
    """Runs the samples with the same number of steps (boundary, robust, outlier) as one chain, the chains concurrently.

    Each chain is replayed from graphs on a stream and from a memory pool of its own. The streams start with what the
    caller's holds, and the caller's waits for them all. In ℓ2 there is one chain, of all samples: what stands in for a
    zero gradient is drawn for a sample by its place in the chain.

    Args:
        bucket: the sizes of chains are rounded up to a multiple of it.
        most_graphs: for each model and chain; the least recently used are dropped beyond.

    Raises:
        TypeError or ValueError: a count is not an integer of at least 1.
    """

    def __init__(self, *, bucket: int = 8, most_graphs: int = 64) -> None:
        self._options = {"bucket": bucket, "most_graphs": most_graphs}
        self._chains = [GraphRunner(**self._options)]

    def __call__(
        self,
        model: Callable[[Tensor], Tensor],
        x_adv: Tensor,
        clean: Tensor,
        target: Tensor,
        schedule: Schedule,
        threat: ThreatModel,
        generator: torch.Generator | None,
        faulty: Tensor | None,
    ) -> None:
        """As `run_eager`."""
        groups = groups_of(schedule) if threat.norm == "l_inf" else [slice(None)]
        self._chains += [GraphRunner(**self._options) for _ in groups[len(self._chains) :]]
        joins = []
        try:
            for run, rows in zip(self._chains, groups, strict=False):
                found = None if faulty is None else faulty[rows]
                images = (x_adv[rows], clean[rows], target[rows])
                part = schedule.part(rows)
                joins.append(run.start(model, *images, part, threat, generator, found, capacity=len(x_adv)))
        finally:
            for join in joins:
                join()


def groups_of(schedule: Schedule) -> list[slice]:
    """The rows of each number of steps above 0, the largest first."""
    ends = sorted(set(schedule.active) - {0})
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
