"""Replay the ragged attack's step from CUDA graphs: one graph for each size of prefix, rounded up to a bucket.

All buckets are prefixes of one set of static buffers, sorted by descending steps, so that their number is m / 8 and not
that of the pairs of group sizes. The samples that pad a bucket have no steps left, and the step leaves those alone (or
are rows of an earlier, larger batch, that nobody reads): the result is the eager one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bt_fast.attack import device
from bt_fast.attack.batch import AttackBatch
from bt_fast.attack.device import RandomStates
from bt_fast.attack.folded import FrozenModel, hooked
from bt_fast.attack.frozen import plain_values, uncached
from bt_fast.attack.runners import joined, run_eager, stand_in_seeds, take_step
from bt_fast.attack.threat import ThreatModel
from bt_fast.device import out_of_memory
from bt_fast.ops.launch import dense_format
from bt_fast.ranges import ATTACK_STEP, range_
from bt_fast.validation import step_count
from bt_fast.warning import warn_caller


class GraphRunner:
    """Runs schedules from graphs, captured when a prefix's size is met for the second time.

    Work is queued on a stream of the runner's own, which waits for the caller's and which the caller's then waits for.
    A model that cannot be captured runs eagerly, with one warning that says why: one with hooks (which run on the
    host), one that waits for the device, one that draws random numbers (the rows that pad a bucket would draw some,
    too), one whose forward changes a number of its own. Where a capture fails, or memory runs out, the runner frees all
    graphs and buffers that it holds and runs that model eagerly from then on: all graphs of a model share one pool, so
    that fewer of them would hardly need less.

    Args:
        bucket: prefixes are rounded up to a multiple of it.
        most_graphs: for each model; the least recently used are dropped beyond.

    Raises:
        TypeError or ValueError: a count is not an integer of at least 1.
    """

    def __init__(self, *, bucket: int = 8, most_graphs: int = 64) -> None:
        self._bucket = step_count("bucket", bucket, least=1)
        self._most = step_count("most_graphs", most_graphs, least=1)
        self._sessions: WeakKeyDictionary[Callable[[Tensor], Tensor], OrderedDict[_Key, _Session]] = WeakKeyDictionary()
        self._failed: WeakKeyDictionary[Callable[[Tensor], Tensor], str] = WeakKeyDictionary()
        self._said: WeakKeyDictionary[Callable[[Tensor], Tensor], set[str]] = WeakKeyDictionary()
        # why a model's last attack ran eagerly
        self._now: WeakKeyDictionary[Callable[[Tensor], Tensor], str] = WeakKeyDictionary()

    def __call__(
        self,
        model: Callable[[Tensor], Tensor],
        batch: AttackBatch,
        threat: ThreatModel,
        generator: torch.Generator | None,
    ) -> None:
        """As `run_eager`."""
        self.start(model, batch, threat, generator)()

    def start(
        self,
        model: Callable[[Tensor], Tensor],
        batch: AttackBatch,
        threat: ThreatModel,
        generator: torch.Generator | None,
    ) -> Callable[[], None]:
        """Queue the attack beside whatever the caller queues next, until it calls what this returns: then that waits.

        An exception leaves the caller's stream waiting for what was queued, and the batch as it was.
        """
        join = self.queued(model, batch, threat, generator)
        if join is None:
            run_eager(model, batch, threat, generator)
            return joined
        return join

    def queued(
        self,
        model: Callable[[Tensor], Tensor],
        batch: AttackBatch,
        threat: ThreatModel,
        generator: torch.Generator | None,
        *,
        capacity: int = 0,
    ) -> Callable[[], None] | None:
        """As `start`, but None where the model cannot run from graphs: it was said why, and nothing has been done.

        Args:
            capacity: make room for so many samples, if that is more than there are.
        """
        reason = self._failed.get(model) or _reason(model, batch.x_adv)
        self._now.pop(model, None)
        if reason is None:
            where = batch.x_adv.device
            random = RandomStates(device.host_generator(where), device.device_generator(where), generator)
            session: _Session | None = None
            try:
                session = self._session(model, batch, threat, max(capacity, len(batch)))
                seeds = stand_in_seeds(batch, threat, generator)
                with uncached(batch.x_adv):
                    return session.start(model, batch, seeds)
            except device.CaptureError as error:
                reason = str(error)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                reason = f"out of memory ({error})"
            del session  # with the error gone too, no frame holds its memory when the attack runs eagerly
            self._sessions.clear()
            random.restore()
            self._failed[model] = reason
        self._now[model] = reason
        said = self._said.setdefault(model, set())
        if reason not in said:
            said.add(reason)
            warn_caller(f"the attack runs without graphs: {reason}")
        return None

    def forget(self, model: Callable[[Tensor], Tensor]) -> None:
        """Let go of a model's graphs and their memory."""
        self._sessions.pop(model, None)

    def explain(self, model: Any) -> str:
        """How a model's attacks run, in words."""
        if reason := self._now.get(model):
            return f"eagerly, since {reason}"
        captured = sum(len(session.graphs) for session in self._sessions.get(model, {}).values())
        return f"from CUDA graphs, {captured} captured" if captured else "eagerly, until a size comes again"

    def _session(
        self, model: Callable[[Tensor], Tensor], batch: AttackBatch, threat: ThreatModel, capacity: int
    ) -> _Session:
        key = _Key.of(model, batch, threat)
        sessions = self._sessions.setdefault(model, OrderedDict())
        for old in [k for k in sessions if k.addresses != key.addresses]:
            del sessions[old]  # its graphs read memory that is the model's no more
        session = sessions.get(key)
        if session is None or session.capacity < capacity:
            session = sessions[key] = _Session(model, batch, threat, self._bucket, capacity)
        sessions.move_to_end(key)
        while len(sessions) > 1 and sum(len(s.graphs) for s in sessions.values()) > self._most:
            sessions.popitem(last=False)
        session.most_graphs = self._most
        return session


@dataclass(frozen=True)
class _Key:
    """All that a captured step has fixed."""

    shape: tuple[int, ...]
    classes: int
    dtypes: tuple[torch.dtype, ...]
    strides: tuple[int, ...]
    device: torch.device
    threat: ThreatModel
    autocast: tuple[bool, torch.dtype]
    values: tuple[object, ...]
    addresses: tuple[int, ...]

    @classmethod
    def of(cls, model: Callable[[Tensor], Tensor], batch: AttackBatch, threat: ThreatModel) -> _Key:
        x, target = batch.x_adv, batch.target
        kind = x.device.type
        return cls(
            shape=tuple(x.shape[1:]),
            classes=target.shape[1],
            dtypes=(x.dtype, batch.clean.dtype, target.dtype),
            strides=x.stride(),
            device=x.device,
            threat=threat,
            autocast=(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)),
            values=_values(model),
            addresses=tuple(t.data_ptr() for t in _tensors(model)),
        )


class _Session:
    """Static buffers for at most `capacity` samples, and the graphs that work on them."""

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        batch: AttackBatch,
        threat: ThreatModel,
        bucket: int,
        capacity: int,
    ) -> None:
        x = batch.x_adv
        self.capacity = -(-capacity // bucket) * bucket
        self.graphs: OrderedDict[int, device.Graph] = OrderedDict()
        self.most_graphs = 1
        self._bucket, self._threat = bucket, threat
        # the graphs hold their addresses, which no other tensor must get
        self._kept = [t.detach() for t in _tensors(model)]
        self._warm: set[int] = set()
        self._stream = device.new_stream(x)
        self._pool: object = None
        self._own = AttackBatch(
            x_adv=_room(x, self.capacity),
            clean=_room(batch.clean, self.capacity),
            target=batch.target.new_zeros(self.capacity, batch.target.shape[1]),
            step_size=x.new_zeros(self.capacity),
            steps=torch.zeros(self.capacity, dtype=torch.int64, device=x.device),
            active=(),
            faulty=torch.zeros(self.capacity, dtype=torch.int32, device=x.device),
        )
        self._step, self._seed = (torch.zeros((), dtype=torch.int64, device=x.device) for _ in range(2))

    def start(self, model: Callable[[Tensor], Tensor], batch: AttackBatch, seeds: Tensor | None) -> Callable[[], None]:
        """Queue the attack; what is returned makes the caller wait. An exception leaves the batch as it was."""
        own, caller = self._own[: len(batch)], device.current_stream(batch.x_adv)
        self._stream.wait_stream(caller)
        try:
            with device.on(self._stream):
                own.x_adv.copy_(batch.x_adv)
                own.clean.copy_(batch.clean)
                own.target.copy_(batch.target)
                own.step_size.copy_(batch.step_size)
                own.steps.copy_(batch.steps)
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
            caller.wait_stream(self._stream)  # whose buffers may be freed next, for the caller to use
            raise
        # until then the caller's stream must be given none of the memory that this one works on
        return partial(_join, caller, self._stream, (self, batch, seeds))

    def _advance(self, model: Callable[[Tensor], Tensor], n: int) -> None:
        """One step of the first n samples: replayed, or run where this size is new."""
        graph = self.graphs.get(n)
        if graph is None and n in self._warm:
            graph = self._capture(model, n)
        if graph is None:
            where = self._own.x_adv.device
            random = RandomStates(device.host_generator(where), device.device_generator(where))
            values = _values(model)
            self._take_step(model, n)
            if _values(model) != values:
                raise device.CaptureError("the model's forward changes a number of its own, as no graph does")
            if random.moved:
                raise device.CaptureError("the model draws random numbers, of which padding would take some")
            self._warm.add(n)
        else:
            self.graphs.move_to_end(n)
            graph.replay()

    def _capture(self, model: Callable[[Tensor], Tensor], n: int) -> device.Graph:
        while len(self.graphs) >= self.most_graphs:
            self.graphs.popitem(last=False)
        if not self.graphs:  # torch takes no pool that no graph uses any more
            self._pool = device.new_pool()
        try:
            with device.capture(self._pool) as graph:
                self._take_step(model, n)
        except Exception as error:  # whatever the model or the driver raise: the eager run will tell which
            raise device.CaptureError.of(error) from error
        self.graphs[n] = graph
        return graph

    def _take_step(self, model: Callable[[Tensor], Tensor], n: int) -> None:
        take_step(model, self._own[:n], self._threat, self._seed, self._step)
        self._step.add_(1)


def _join(caller: device.Stream, stream: device.Stream, kept: tuple[object, ...]) -> None:
    caller.wait_stream(stream)


def _reason(model: Callable[[Tensor], Tensor], x: Tensor) -> str | None:
    root = model.model if isinstance(model, FrozenModel) else model
    if isinstance(root, nn.Module) and (name := hooked(root)):
        return f"{name} has a hook, which a graph would not run"
    return device.no_graphs_reason(x)


def _values(model: Callable[[Tensor], Tensor]) -> tuple[object, ...]:
    """A view's are in its trace."""
    return plain_values(model) if isinstance(model, nn.Module) else ()


def _tensors(model: Callable[[Tensor], Tensor]) -> list[Tensor]:
    if isinstance(model, FrozenModel):
        return model.tensors()
    return [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []


def _room(x: Tensor, capacity: int) -> Tensor:
    """Zeros for `capacity` samples like those of `x`, in its memory format."""
    return torch.zeros_like(
        x[:1].expand(capacity, *x.shape[1:]), memory_format=dense_format(x) or torch.contiguous_format
    )
