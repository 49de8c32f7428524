"""Chooses the runner of an attack by timing the candidates."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from bt_fast.attack import device
from bt_fast.attack.batch import AttackBatch, View
from bt_fast.attack.forward import caller_autocast
from bt_fast.attack.graphs import GraphRunner, own_inner_reason
from bt_fast.attack.runners import Runner, run_eager, run_queued, start_of
from bt_fast.attack.streams import StreamRunner
from bt_fast.attack.threat import ThreatModel
from bt_fast.device import synchronize
from bt_fast.untraced import untraced

WARM, ROUNDS = 3, 5  # a graph is captured when its size comes again, and replayed afterwards


class AutoRunner:
    """Executes attack steps in the fastest of several ways: eagerly, from CUDA graphs, or on CUDA streams.

    It times the candidates on the first minibatch of each configuration (model, images, norm) and keeps the fastest.
    The measurement waits for the device, attacks copies, draws from a separate generator, and interleaves the
    candidates. Without graphs (on the CPU) there is nothing to choose: it runs eagerly.

    Args:
        candidates: runners by name; eager, graphs and streams if not given.

    Attributes:
        reasons: a line for each configuration, with the measured times and the choice.

    Raises:
        ValueError: candidates is empty.
    """

    def __init__(self, candidates: Mapping[str, Runner] | None = None) -> None:
        if candidates is None:
            candidates = {"eager": run_eager, "graphs": GraphRunner(), "streams": StreamRunner()}
        if not candidates:
            instead = 'leave it out, or give {"eager": run_eager}'
            raise ValueError(f"candidates must hold at least 1 runner, got none: {instead}")
        self._candidates = dict(candidates)
        self._chosen: WeakKeyDictionary[View, dict[object, Runner]] = WeakKeyDictionary()
        self._reason: WeakKeyDictionary[View, str] = WeakKeyDictionary()
        self.reasons: list[str] = []

    def explain(self, model: Any) -> str:
        """Describes how a model's attacks run, for the configuration measured last."""
        return self._reason.get(model, "not measured yet")

    __call__ = run_queued

    @untraced
    def start(
        self,
        model: Callable[[Tensor], Tensor],
        batch: AttackBatch,
        threat: ThreatModel,
        generator: torch.Generator | None,
    ) -> Callable[[], None]:
        """Queues the attack like the chosen runner; the returned function makes the caller's stream wait for it."""
        x = batch.x_adv
        inner = batch.inner if isinstance(batch.inner, str) else None
        attacked = threat.norm, threat.lower, threat.upper, inner  # not ε, which a schedule may change each time
        configuration = (x.shape[1:], batch.target.shape[1], x.dtype, x.device, attacked, caller_autocast(x))
        chosen = self._chosen.setdefault(model, {})
        if configuration not in chosen:
            chosen[configuration] = self._choose(model, batch, threat)
            self._reason[model] = self.reasons[-1]
        return start_of(chosen[configuration])(model, batch, threat, generator)

    def _choose(self, model: View, batch: AttackBatch, threat: ThreatModel) -> Runner:
        x = batch.x_adv
        images = f"{len(x)} x {list(x.shape[1:])} {x.dtype}"
        if reason := device.no_graphs_reason(x) or own_inner_reason(batch):
            self.reasons.append(f"{images}: eager, since {reason}")
            return run_eager
        generator = torch.Generator(x.device).manual_seed(0)

        def prepared(run: Runner) -> Callable[[], object]:
            attacked = replace(batch, x_adv=x.clone(), faulty=batch.faulty.clone())
            return lambda: run(model, attacked, threat, generator)

        works = [partial(prepared, run) for run in self._candidates.values()]
        seconds = dict(zip(self._candidates, median_seconds(works, x), strict=True))
        fastest = min(seconds, key=lambda name: seconds[name])
        measured = ", ".join(f"{name} {1e3 * median:.3g} ms" for name, median in seconds.items())
        self.reasons.append(f"{images}: {fastest}, since {measured}")
        for name, runner in self._candidates.items():
            if name != fastest and isinstance(runner, (GraphRunner, StreamRunner)):
                runner.forget(model)  # each graph keeps the memory of a whole step
        return self._candidates[fastest]


def median_seconds(works: Sequence[Callable[[], Callable[[], object]]], x: Tensor) -> list[float]:
    """Returns the median seconds of works on the device of x, in interleaved rounds. A work returns its timed part."""
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(WARM + ROUNDS):
        for prepare, times in zip(works, seconds, strict=True):
            work = prepare()
            began = now(x)
            work()
            times.append(now(x) - began)
    return [statistics.median(times[WARM:]) for times in seconds]


def now(x: Tensor) -> float:
    """Returns the time after the device of `x` has done all its work."""
    synchronize(x.device)
    return time.perf_counter()


# shared by all callers: they keep their graphs by model, and keep no model alive
RUNNERS: dict[str, Runner] = {
    "eager": run_eager,
    "graphs": GraphRunner(),
    "streams": StreamRunner(),
    "auto": AutoRunner(),
}


def runner_of(runner: Runner | str) -> Runner:
    """Returns the runner itself, or the one with this name; TypeError or ValueError for anything else."""
    if isinstance(runner, str):
        if runner in RUNNERS:
            return RUNNERS[runner]
        raise ValueError(f"runner must be a runner or one of {', '.join(RUNNERS)}, got {runner!r}: {_INSTEAD}")
    if isinstance(runner, type) or not callable(runner):
        raise TypeError(f"runner must be a runner or its name, got {type(runner).__name__}: {_INSTEAD}")
    return runner


_INSTEAD = "write runner='eager'"
