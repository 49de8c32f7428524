"""Replays the ragged attack's step from CUDA graphs: one graph for each size of prefix, rounded up to a bucket.

All buckets are prefixes of one set of static buffers, sorted by descending steps, so that there are m / 8 of them
instead of one for each pair of group sizes. The samples that pad a bucket have no steps left, so the step does not
change them (or they are rows of an earlier, larger batch, which nobody reads): the result is the eager one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bt_fast.attack import device
from bt_fast.attack.batch import AttackBatch, View
from bt_fast.attack.captures import GraphKey, GraphPool, ModelGraphs, Recent, hook_reason
from bt_fast.attack.device import RandomStates
from bt_fast.attack.folded import FoldedModel
from bt_fast.attack.forward import caller_autocast, plain_values, uncached
from bt_fast.attack.runners import Join, joined, run_eager, run_queued, stand_in_seeds, take_step
from bt_fast.attack.threat import ThreatModel
from bt_fast.attack.wrapped import spread
from bt_fast.device import out_of_memory
from bt_fast.ops.launch import dense_format
from bt_fast.ranges import ATTACK_STEP, range_
from bt_fast.untraced import untraced
from bt_fast.validation import step_count

MOST_SESSIONS = 4  # of one model, with a pool of memory each


class GraphRunner:
    """Executes attack steps from CUDA graphs, each launched at once: as `Engine(graphs=True)` has it.

    A graph is captured when a number of rows comes for the second time; until then they run eagerly.
    Work is queued on the runner's own stream, which waits for the caller's and which the caller's then waits for. A
    model that cannot be captured runs eagerly, with one warning that says why: one with hooks (which run on the host),
    one that waits for the device, one that draws random numbers (the rows that pad a bucket would draw some, too), one
    that changes a number of its own in its forward. If a capture fails, or memory runs out, the runner frees all graphs
    and buffers that it holds and runs that model eagerly from then on: all graphs of a model share one pool, so keeping
    fewer would hardly save memory.

    Args:
        bucket: prefixes are rounded up to a multiple of it.
        most_graphs: for each model; beyond it, the least recently used are dropped, as are those of more than four
            forms of attack (image sizes, norms, bounds, inner losses). ε and step sizes are not among these: they are
            copied in, so that one capture serves a schedule of them.

    Raises:
        TypeError or ValueError: a count is not an integer of at least 1.
    """

    def __init__(self, *, bucket: int = 8, most_graphs: int = 64) -> None:
        self._bucket = step_count("bucket", bucket, least=1)
        self._most = step_count("most_graphs", most_graphs, least=1)
        self._graphs: WeakKeyDictionary[View, ModelGraphs[_Session]] = WeakKeyDictionary()

    __call__ = run_queued

    def start(
        self,
        model: Callable[[Tensor], Tensor],
        batch: AttackBatch,
        threat: ThreatModel,
        generator: torch.Generator | None,
    ) -> Callable[[], None]:
        """Queues the attack beside the caller's next work; calling the returned function makes later work wait for it.

        After an exception the caller's stream waits for the queued work, and the batch is unchanged.
        """
        join = self.queued(model, batch, threat, generator)
        if join is None:
            run_eager(model, batch, threat, generator)
        return join or joined

    @untraced
    def queued(
        self,
        model: Callable[[Tensor], Tensor],
        batch: AttackBatch,
        threat: ThreatModel,
        generator: torch.Generator | None,
        *,
        capacity: int = 0,
    ) -> Callable[[], None] | None:
        """Like `start`, but only warns and returns None if the model cannot run from graphs.

        Args:
            capacity: the least number of samples to make room for.
        """
        graphs = self._of(model)
        graphs.reason = None
        if reason := graphs.failed or own_inner_reason(batch) or _reason(model, batch.x_adv):
            graphs.refuse(reason)
            return None
        random = RandomStates.of(batch.x_adv.device, generator)
        session: _Session | None = None
        try:
            batch = batch.with_radii(threat)
            session = self._session(graphs, model, batch, threat, max(capacity, len(batch)))
            seeds = stand_in_seeds(batch, threat, generator)
            with uncached(batch.x_adv):
                return session.start(model, batch, seeds)
        except device.CaptureError as error:
            reason = str(error)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            reason = f"out of memory ({error})"
        del session  # the error is gone too, so no frame holds its memory when the attack runs eagerly
        for of_model in self._graphs.values():
            of_model.captured.clear()
        random.restore()
        graphs.refuse(reason, for_good=True)
        return None

    def forget(self, model: Callable[[Tensor], Tensor]) -> None:
        """Frees a model's graphs and their memory."""
        self._of(model).captured.clear()

    def explain(self, model: Any) -> str:
        """Describes how a model's attacks run."""
        graphs = self._of(model)
        return graphs.explain(sum(len(s.graphs) for s in graphs.captured.values()), "a size comes again")

    def _of(self, model: View) -> ModelGraphs[_Session]:
        return self._graphs.setdefault(model, ModelGraphs("attack", Recent()))

    def _session(
        self, graphs: ModelGraphs[_Session], model: View, batch: AttackBatch, threat: ThreatModel, capacity: int
    ) -> _Session:
        key, sessions = _key(model, batch, threat), graphs.captured
        session = graphs.use(key)
        if session is None or session.capacity < capacity:
            session = sessions[key] = _Session(model, batch, threat, self._bucket, self._most, capacity)
        while len(sessions) > MOST_SESSIONS or (
            len(sessions) > 1 and sum(len(s.graphs) for s in sessions.values()) > self._most
        ):
            sessions.popitem(last=False)
        return session


def _key(model: View, batch: AttackBatch, threat: ThreatModel) -> GraphKey:
    x, target = batch.x_adv, batch.target
    dtypes = [None if t is None else t.dtype for t in (x, batch.clean, target, batch.epsilon)]
    return GraphKey(
        computation=(threat.norm, threat.lower, threat.upper, batch.inner),
        inputs=(x.shape[1:], target.shape[1], *dtypes, x.stride(), x.device),
        autocast=caller_autocast(x),
        values=_values(model),
        tensors=tuple(t.data_ptr() for t in _tensors(model)),
    )


class _Session:
    """Static buffers for at most `capacity` samples, and the graphs that work on them, by number of rows."""

    def __init__(
        self, model: View, batch: AttackBatch, threat: ThreatModel, bucket: int, most: int, capacity: int
    ) -> None:
        x = batch.x_adv
        self.capacity = -(-capacity // bucket) * bucket
        self.graphs: GraphPool[int, device.Graph] = GraphPool()
        self._bucket, self._most, self._threat = bucket, most, threat
        # the graphs hold their addresses, which must not be reused
        self._kept = [t.detach() for t in _tensors(model)]
        self._warm: set[int] = set()
        self._stream = device.new_stream(x)
        self._own = AttackBatch(
            x_adv=_room(x, self.capacity),
            clean=_room(batch.clean, self.capacity),
            target=batch.target.new_zeros(self.capacity, batch.target.shape[1]),
            step_size=x.new_zeros(self.capacity),
            steps=torch.zeros(self.capacity, dtype=torch.int64, device=x.device),
            active=(),
            faulty=torch.zeros(self.capacity, dtype=torch.int32, device=x.device),
            inner=batch.inner,
            labels=None if batch.labels is None else batch.labels.new_zeros(self.capacity),
            epsilon=None if batch.epsilon is None else batch.epsilon.new_zeros(self.capacity),  # no graph bakes in one
        )
        self._step, self._seed = (torch.zeros((), dtype=torch.int64, device=x.device) for _ in range(2))

    def start(self, model: View, batch: AttackBatch, seeds: Tensor | None) -> Join:
        """Queues the attack; the returned function makes the caller wait. An exception leaves the batch unchanged."""
        own, caller = self._own[: len(batch)], device.current_stream(batch.x_adv)
        self._stream.wait_stream(caller)
        try:
            with device.on(self._stream):
                own.x_adv.copy_(batch.x_adv)
                own.clean.copy_(batch.clean)
                own.target.copy_(batch.target)
                if own.labels is not None and batch.labels is not None:
                    own.labels.copy_(batch.labels)
                own.step_size.copy_(batch.step_size)
                own.steps.copy_(batch.steps)
                if own.epsilon is not None and batch.epsilon is not None:
                    own.epsilon.copy_(batch.epsilon)
                self._step.zero_()
                own.faulty.zero_()
                for t, n in enumerate(batch.active):
                    if seeds is not None:
                        self._seed.copy_(seeds[t])
                    if n:
                        with range_(ATTACK_STEP):
                            self._advance(model, -(-n // self._bucket) * self._bucket)
                batch.x_adv.copy_(own.x_adv)
                torch.maximum(batch.faulty, own.faulty, out=batch.faulty)
        except BaseException:
            caller.wait_stream(self._stream)  # its buffers may be freed next and reused by the caller
            raise
        # until then the caller's stream must not get any memory that this one works on
        return partial(_join, caller, self._stream, (self, batch, seeds))

    def _advance(self, model: View, n: int) -> None:
        """Takes one step of the first n samples: replayed, or eager if this size is new."""
        graph = self.graphs.use(n)
        if graph is None and n not in self._warm:
            self._try(model, n)
            return
        if graph is None:
            graph = self.graphs.add(n, self._most, partial(self._record, model, n))
        graph.replay()

    def _try(self, model: View, n: int) -> None:
        """Runs a step eagerly, and checks whether a graph could do the same."""
        random, values = RandomStates.of(self._own.x_adv.device), _values(model)
        self._take_step(model, n)
        if _values(model) != values:
            raise device.CaptureError("the model's forward changes a number of its own, as no graph does")
        if random.moved:
            raise device.CaptureError("the model draws random numbers, of which padding would take some")
        self._warm.add(n)

    def _record(self, model: View, n: int, pool: object) -> device.Graph:
        with device.capture(pool) as graph:
            self._take_step(model, n)
        return graph

    def _take_step(self, model: View, n: int) -> None:
        take_step(model, self._own[:n], self._threat, self._seed, self._step)
        self._step.add_(1)


def _join(caller: device.Stream, stream: device.Stream, kept: tuple[object, ...]) -> None:
    caller.wait_stream(stream)


def own_inner_reason(batch: AttackBatch) -> str | None:
    """Why a batch with an inner loss of one's own is not attacked from graphs; None for a named one."""
    if isinstance(batch.inner, str):
        return None
    return "the inner loss is a function of your own, of which a graph could not know what it reads"


def _reason(model: View, x: Tensor) -> str | None:
    """Returns why the attack on this model cannot be captured now, or None."""
    root = model.model if isinstance(model, FoldedModel) else model
    reason = hook_reason(root) if isinstance(root, nn.Module) else None
    if isinstance(root, nn.Module) and any(map(spread, root.modules())):
        reason = reason or "the model is spread over devices"
    return reason or device.no_graphs_reason(x)


def _values(model: View) -> tuple[object, ...]:
    """Returns the values fixed by a graph; those of what a folded view has traced are in its trace."""
    modules = model.as_they_are() if isinstance(model, FoldedModel) else [model]
    return tuple(value for module in modules if isinstance(module, nn.Module) for value in plain_values(module))


def _tensors(model: View) -> list[Tensor]:
    if isinstance(model, FoldedModel):
        return model.tensors()
    return [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []


def _room(x: Tensor, capacity: int) -> Tensor:
    """Returns zeros for `capacity` samples like those of `x`, in its memory format."""
    rows = x[:1].expand(capacity, *x.shape[1:])
    return torch.zeros_like(rows, memory_format=dense_format(x) or torch.contiguous_format)
