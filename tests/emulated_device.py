"""CUDA's streams, events, graphs and memory pools on the CPU, to test what uses them through `bt_fast.attack.device`.

    with EmulatedDevice() as emulated:
        run_the_engine(x)                       # runs eagerly, in the order in which it was enqueued, and is recorded
    for seed in range(1000):
        (found,) = emulated.shuffled(seed, [x])  # x, had the device run the work in another order that CUDA permits

Work waits for what its stream holds already and for the streams that this one was told to wait for, and for nothing
else. Memory comes from a pool for each stream and for each graph pool, and a freed block is handed out again at the
next request from the same pool, as CUDA's allocator does: work on another stream may then find other bytes in it. What
the allocator hands out holds garbage. Work that is not ordered is permuted whole operation by whole operation.

A capture records instead of running. It refuses what CUDA refuses: to read a value, to bring one from the host, and to
launch for the first time. A replay refuses memory that was freed outside the graph.
"""

import functools
import random
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

from bt_fast.attack import device

READS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select"}
FROM_HOST = {"lift_fresh", "lift_fresh_copy"}


class NotPermittedError(RuntimeError):
    """What CUDA refuses during a capture, or what would read freed memory."""


@dataclass(frozen=True)
class Ref:
    """A tensor as its memory and its place in it."""

    memory: int
    dtype: torch.dtype
    size: tuple
    stride: tuple
    offset: int

    def on(self, storage):
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.size, self.stride)


@dataclass
class Stream:
    """A queue: `last` is its latest work, `awaited` what its next work has to wait for."""

    emulated: "EmulatedDevice"
    pool: object = field(default_factory=object)
    last: int | None = None
    awaited: list = field(default_factory=list)

    def wait_stream(self, other):
        if other.last is not None:
            self.awaited.append(other.last)


@dataclass(eq=False)
class Work:
    call: object
    args: tuple
    kwargs: dict
    results: list  # of Ref: new tensors
    stream: Stream = None
    after: tuple = ()


@dataclass(eq=False)
class Graph:
    emulated: "EmulatedDevice"
    pool: object
    work: list = field(default_factory=list)
    inside: set = field(default_factory=set)  # memory of its own
    scratch: dict = field(default_factory=dict)

    def replay(self):
        for work in self.work:
            self.emulated.run_again(work, self)


class EmulatedDevice(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.stream = Stream(self)
        self.work, self.graph, self.host_waits_for = [], None, None
        self.known, self.sizes, self.initial = (
            {},
            {},
            {},
        )  # by address; bytes; contents if older
        self.blocks, self.block_sizes, self.free = {}, [], {}  # memory's block; bytes of each; (pool -> free blocks)
        self.owner, self.launched, self.captures, self.replays = {}, set(), 0, 0

    def __enter__(self):
        stand_ins = {
            "no_graphs_reason": lambda x: "the caller is capturing a graph" if self.graph else None,
            "current_stream": lambda x: self.stream,
            "new_stream": lambda x: Stream(self),
            "on": self.on,
            "new_pool": object,
            "capture": self.capture,
        }
        self._patch = mock.patch.multiple(device, **stand_ins)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        self._patch.stop()
        return super().__exit__(*error)

    @contextmanager
    def on(self, stream):
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextmanager
    def capture(self, pool):
        assert self.graph is None
        self.graph = Graph(self, pool)
        try:
            yield self.graph
        finally:
            self.graph = None
        self.captures += 1

    # Memory

    def memory_of(self, tensor, *, new=False):
        """The number of the tensor's memory, which is the same for views of it."""
        storage = tensor.untyped_storage()
        known = self.known.get(storage._cdata)
        if known is not None and not known[1].expired():
            return known[0]
        number = len(self.sizes)
        self.known[storage._cdata] = (number, StorageWeakRef(storage))
        self.sizes[number] = storage.nbytes()
        pool = None
        if new:
            pool = self.graph.pool if self.graph else self.stream.pool
            if self.graph:
                self.graph.inside.add(number)
        else:
            self.initial[number] = torch.tensor([], dtype=torch.uint8).set_(storage).clone()
        self.owner[number] = pool
        self.blocks[number] = self.take_block(pool, storage.nbytes())
        return number

    def take_block(self, pool, size):
        fitting = [b for b in self.free.get(pool, []) if self.block_sizes[b] >= size]
        if pool is not None and fitting:
            self.free[pool].remove(fitting[-1])
            return fitting[-1]
        self.block_sizes.append(size)
        return len(self.block_sizes) - 1

    def collect(self):
        """Hand the blocks of tensors that are gone back to their pools."""
        for address in [a for a, (_, weak) in self.known.items() if weak.expired()]:
            number, _ = self.known.pop(address)
            self.free.setdefault(self.owner[number], []).append(self.blocks[number])

    def ref(self, tensor, *, new=False):
        place = (tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset())
        return Ref(self.memory_of(tensor, new=new), tensor.dtype, *place)

    def refs(self, tree):
        return tree_map(lambda v: self.ref(v) if isinstance(v, torch.Tensor) else v, tree)

    # Recording

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = call._schema.name.split("::")[1]
        self.collect()
        inputs = [v for v in flat((args, kwargs)) if isinstance(v, torch.Tensor)]
        if self.graph and (name in READS or name in FROM_HOST):
            raise NotPermittedError(f"{name}: operation not permitted when stream is capturing")
        if is_view(call) or name in ("detach", "alias"):
            for value in inputs:
                self.memory_of(value)
            return call(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded in call.tags:
            return self.drawn(call, args, kwargs)
        launch = (call, tuple((v.dtype, tuple(v.shape)) for v in inputs))
        if self.graph and launch not in self.launched:
            raise NotPermittedError(f"{name}: launched for the first time in a capture")
        self.launched.add(launch)
        given = self.refs(args), self.refs(kwargs)
        out = self.without_effect(call, args, kwargs) if self.graph else call(*args, **kwargs)
        results = [] if changes_its_input(call) else [v for v in flat(out) if isinstance(v, torch.Tensor)]
        work = Work(call, *given, [self.ref(v, new=True) for v in results])
        if self.graph:
            for value in results:
                if self.memory_of(value) in self.graph.inside:
                    spoil(value)
            self.graph.work.append(work)
        else:
            self.enqueue(work)
            if name in READS:
                self.host_waits_for = self.stream.last
        return out

    def drawn(self, call, args, kwargs):
        """Random numbers, which are the same in every order."""
        if self.graph or changes_its_input(call):
            raise NotImplementedError(f"{call}: random numbers in a capture or in place")
        out = call(*args, **kwargs)
        numbers = out.clone()
        self.enqueue(Work(lambda: numbers, (), {}, [self.ref(out, new=True)]))
        return out

    @staticmethod
    def without_effect(call, args, kwargs):
        if not changes_its_input(call):
            return call(*args, **kwargs)
        written = [a for a, spec in zip(args, call._schema.arguments, strict=False) if is_written(spec)]
        written += [kwargs[s.name] for s in call._schema.arguments if is_written(s) and s.name in kwargs]
        return None if not call._schema.returns else written[0] if len(call._schema.returns) == 1 else tuple(written)

    def enqueue(self, work):
        stream = self.stream
        after = [*stream.awaited, stream.last, self.host_waits_for]
        stream.awaited = []
        work.stream, work.after = stream, tuple(w for w in after if w is not None)
        self.work.append(work)
        stream.last = len(self.work) - 1

    def run_again(self, work, graph):
        """Work of a graph: now, on the memory that it was captured with."""
        self.replays += work is graph.work[0]
        live = {number: address for address, (number, weak) in self.known.items() if not weak.expired()}

        def tensor(ref):
            if ref.memory in graph.inside:
                if ref.memory not in graph.scratch:
                    graph.scratch[ref.memory] = torch.UntypedStorage(self.sizes[ref.memory])
                return ref.on(graph.scratch[ref.memory])
            if ref.memory not in live:
                raise NotPermittedError("a graph works on memory that was freed")
            return ref.on(torch.UntypedStorage._new_with_weak_ptr(live[ref.memory]))

        again = Work(work.call, work.args, work.kwargs, work.results)
        with _disable_current_modes():
            run_step(*placed(again, tensor))
        self.enqueue(again)

    # Permuting

    def shuffled(self, seed, wanted):
        """The tensors `wanted`, after the recorded work ran in an order drawn by the seed."""
        order = random.Random(seed)
        tensor, steps = self.prepared
        for storage in self.bytes:
            spoil(storage)
        for number, content in self.initial.items():
            self.bytes[self.blocks[number]].copy_(content)
        queues = {}
        for i, work in enumerate(self.work):
            queues.setdefault(id(work.stream), deque()).append(i)
        eagerness = {stream: order.random() ** 4 + 1e-6 for stream in queues}  # one stream may run far ahead
        done = [False] * len(self.work)
        with torch.no_grad():
            while queues:
                ready = [s for s, q in queues.items() if all(done[i] for i in self.work[q[0]].after)]
                chosen = order.choices(ready, [eagerness[s] for s in ready])[0]
                i = queues[chosen].popleft()
                if not queues[chosen]:
                    del queues[chosen]
                run_step(*steps[i])
                done[i] = True
        return [tensor(self.ref(t)).clone() for t in wanted]

    @functools.cached_property
    def prepared(self):
        """What places a tensor in the memory that the allocator gave it, and each call with its tensors."""
        memory = [torch.UntypedStorage(size) for size in self.block_sizes]
        self.bytes = [torch.tensor([], dtype=torch.uint8).set_(storage) for storage in memory]
        tensor = functools.cache(lambda ref: ref.on(memory[self.blocks[ref.memory]]))
        return tensor, [placed(work, tensor) for work in self.work]


def placed(work, tensor):
    args, kwargs = (tree_map(lambda v: tensor(v) if isinstance(v, Ref) else v, t) for t in (work.args, work.kwargs))
    return work.call, args, kwargs, [tensor(ref) for ref in work.results]


def run_step(call, args, kwargs, results):
    out = call(*args, **kwargs)
    if results:
        made = [out] if isinstance(out, torch.Tensor) else [v for v in flat(out) if isinstance(v, torch.Tensor)]
        for result, value in zip(results, made, strict=True):
            result.copy_(value)


def flat(tree):
    return torch.utils._pytree.tree_leaves(tree)


def is_written(spec):
    return spec.alias_info is not None and spec.alias_info.is_write


def changes_its_input(call):
    return any(is_written(spec) for spec in call._schema.arguments)


def is_view(call):
    aliased = any(r.alias_info is not None for r in call._schema.returns)
    return aliased and not changes_its_input(call)


def spoil(tensor):
    """Garbage, and such that arithmetic shows it."""
    if tensor.dtype == torch.uint8:
        tensor.fill_(0xFF)  # NaN in every floating-point type
    elif tensor.is_floating_point():
        tensor.fill_(float("nan"))
