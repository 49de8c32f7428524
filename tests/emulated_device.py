"""Emulates CUDA's streams, events, graphs and memory pools on the CPU, replacing those of `torch.cuda`.

It tests all code above them: the package, and torch's `torch.cuda.graph` and `make_graphed_callables`.

    with EmulatedDevice() as emulated:
        run_the_engine(x)                       # runs eagerly, in the order of the calls, and is recorded
    for seed in range(1000):
        (found,) = emulated.shuffled(seed, [x])  # x as computed in another order that CUDA permits

Work waits only for earlier work on its stream and for the streams that its stream waits for. Each stream and each graph
pool has its own memory pool. As in CUDA's allocator, the next request from the same pool reuses a freed block: work on
another stream may then read other bytes from it. New memory holds garbage. Unordered work is permuted in units of whole
operations.

A gradient node belongs to the stream on which its forward made it, as in torch's CUDA autograd: its backward runs
there, after the nodes that give it gradients, and the caller's stream waits for the last ones. The node that
accumulates a parameter's gradient exists as long as the oldest loss that is still alive.

A capture records the work of its streams instead of running it: of its own stream and those that wait for it. It
refuses what CUDA refuses: to read a value, to copy one from the host, to wait for the device or for a stream outside,
to make the default stream wait for it, to end before it waits for all work, and to launch for the first time; in
"global" mode also any other thread's call (`call_from_another_thread`). After a refusal the capture is invalid, and its
end raises. What it leaves behind depends on torch's version, see `UNWINDS`. A replay refuses memory that was freed
outside the graph. Matrix products use a cuBLAS workspace for each stream; it is freed when a graph captured on the
stream is freed, as in torch 2.12 to 2.14, and a replay refuses a workspace of another pool. Random numbers come from
the CPU's default generator in place of the device's: a replay draws those of its graph.
"""

import functools
import random
import threading
import warnings
from collections import Counter, defaultdict, deque
from contextlib import ExitStack
from dataclasses import dataclass, field
from unittest import mock

import torch
import torch._dynamo  # the first call of a registered op imports it, which fails inside a mode in torch 2.6
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode_stack

from bt_fast.attack import device

READS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select"}
FROM_HOST = {"lift_fresh", "lift_fresh_copy"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
STREAM = "emulated stream"  # key in a gradient node's metadata, which lives as long as the node

# What torch itself cleans up when the end of a capture raises:
UNWINDS = {
    "2.6": set(),  # the pool stays in use, its memory counts as used, and the generator still believes it is capturing
    "2.13": {"pool", "generator"},  # only the memory is not returned
    "2.15": {"pool", "generator", "memory"},
}


def everywhere(x):
    """Replaces `has_graphs`. A mock would keep its tensor argument alive, and so that tensor's memory."""
    return True


def current():
    """Returns the active emulated device, or None."""
    return next((m for m in reversed(_get_current_dispatch_mode_stack()) if isinstance(m, EmulatedDevice)), None)


def capturing():
    """Returns whether a capture is recording now."""
    return current() is not None and current().graph is not None


class NotPermittedError(RuntimeError):
    """Raised where CUDA refuses a call during a capture, or where work would read freed memory."""


@dataclass(frozen=True)
class Ref:
    """A tensor, as its memory and its place in it."""

    memory: int
    dtype: torch.dtype
    size: tuple
    stride: tuple
    offset: int

    def on(self, storage):
        return torch.empty(0, dtype=self.dtype, device="cpu").set_(storage, self.offset, self.size, self.stride)


@dataclass(eq=False)
class Stream:
    """A queue: `last` is its latest work, `awaited` what its next work must wait for."""

    emulated: "EmulatedDevice"
    pool: object = field(default_factory=object)
    last: int | None = None
    awaited: list = field(default_factory=list)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    device_index: int = 0

    def wait_stream(self, other):
        self.emulated.wait(self, other)
        if other.last is not None:
            self.awaited.append(other.last)


@dataclass
class On:
    """Replaces torch.cuda.StreamContext, which is not exited when the end of a capture raises."""

    emulated: "EmulatedDevice"
    stream: Stream

    def __enter__(self):
        self.before, self.emulated.stream = self.emulated.stream, self.stream

    def __exit__(self, *error):
        self.emulated.stream = self.before


@dataclass(eq=False)
class Work:
    call: object
    args: tuple
    kwargs: dict
    results: list  # of Ref: new tensors
    stream: Stream = None
    after: tuple = ()
    draws: bool = False


@dataclass(eq=False)
class Workspace:
    """The memory that cuBLAS works in, and the pool of the capture that allocated it, or None."""

    pool: object
    freed: bool = False


@dataclass(eq=False)
class Graph:
    """Replaces torch.cuda.CUDAGraph."""

    emulated: "EmulatedDevice"
    memory_pool: object = None
    work: list = field(default_factory=list)
    invalid: bool = False
    mode: str = "global"
    streams: list = field(default_factory=list)  # the captured streams; the capture began on the first
    uses_memory: bool = False
    workspaces: set = field(default_factory=set)
    recorded: Counter = field(default_factory=Counter)  # how much work of each stream is recorded
    awaited: dict = field(default_factory=lambda: defaultdict(Counter))  # how much of it other streams wait for

    def capture_begin(self, pool=None, capture_error_mode="global", check_input_liveness=False):
        emulated = self.emulated
        assert emulated.graph is None
        if emulated.stream is emulated.default:
            raise NotPermittedError("a capture must be on another than the default stream")
        self.memory_pool = object() if pool is None else pool
        if self.memory_pool in emulated.under_way:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        if self.memory_pool in emulated.given_back:
            raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
        emulated.under_way.add(self.memory_pool)
        emulated.uses[self.memory_pool] += 1
        self.uses_memory, self.mode, self.streams = True, capture_error_mode, [emulated.stream]
        emulated.graph = self

    def capture_end(self):
        emulated = self.emulated
        if emulated.stream is not self.streams[0]:
            raise RuntimeError("Capture must end on the same stream it began on.")
        if emulated.graph is not self:
            raise RuntimeError("no capture is under way")
        emulated.graph = None
        error = "operation failed due to a previous error during capture"
        if not self.invalid and self.recorded - self.known_to(self.streams[0]):
            self.invalid, error = True, "capture was not ended because it contains unjoined work"
        if not self.invalid or "pool" in emulated.unwinds:
            emulated.under_way.remove(self.memory_pool)
        if self.invalid:
            emulated.generator_captures = "generator" not in emulated.unwinds
            self.uses_memory = "memory" in emulated.unwinds
            raise RuntimeError(error)
        if not self.work:
            warnings.warn("The CUDA Graph is empty.", stacklevel=2)
        emulated.generator_captures = False
        emulated.captures += 1

    def known_to(self, stream):
        """Returns how much of each stream's work precedes the next work of this stream."""
        return self.awaited[stream] | Counter({stream: self.recorded[stream]})

    def reset(self):
        if self.uses_memory:
            self.emulated.clear_workspaces(self.streams[0])
            self.emulated.release(0, self.memory_pool)
        self.uses_memory = False

    __del__ = reset

    def replay(self):
        self.emulated.replays += 1
        if any(workspace.freed and workspace.pool != self.memory_pool for workspace in self.workspaces):
            raise NotPermittedError("a graph works in memory of cuBLAS that was freed")
        for work in self.work:
            self.emulated.run_again(work)


class GradientNodes(TorchFunctionMode):
    """Records at each call which stream its new gradient nodes belong to."""

    def __init__(self, emulated):
        super().__init__()
        self.emulated = emulated

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.emulated.note(out)
        return out


class EmulatedDevice(TorchDispatchMode):
    """Runs work inside the block on the emulated device; broken captures unwind as in torch version `as_torch`."""

    def __init__(self, as_torch="2.6"):
        super().__init__()
        self.unwinds = UNWINDS[as_torch]
        self.under_way, self.uses = set(), Counter()  # pools that captures allocate from; how many captures use each
        self.given_back = set()  # pools that no graph uses any more: torch reuses none of them while a tensor is left
        self.generator_captures = False  # stays true when the end of a capture raises
        self.stream = self.default = Stream(self)
        self.work, self.graph, self.host_waits_for = [], None, {}
        self.known, self.sizes, self.initial = (
            {},
            {},
            {},
        )  # by address: bytes, and the older contents if there are any
        self.blocks, self.block_sizes, self.free = {}, [], {}  # memory's block; bytes of each; (pool -> free blocks)
        self.owner, self.launched, self.captures, self.replays = {}, set(), 0, 0
        self.lasts, self.scratch = {}, {}  # each stream's latest work; memory of graphs without a tensor
        self.of_graphs = set()  # memory allocated by captures
        self.workspaces = {}  # of cuBLAS, by stream

    def __enter__(self):
        self._patches = ExitStack()
        self._nodes = GradientNodes(self)
        run_backward = torch.autograd._engine_run_backward
        stand_ins = {
            "current_stream": lambda device=None: self.stream,
            "Stream": lambda device=None: Stream(self),
            "stream": lambda stream: On(self, stream),
            "graph_pool_handle": object,
            "CUDAGraph": lambda: Graph(self),
            "is_current_stream_capturing": lambda: self.recording is not None,
            "synchronize": self.synchronize,
            "empty_cache": self.empty_cache,
        }
        of_allocator = {
            "_cuda_endAllocateToPool": self.end_allocation,
            "_cuda_endAllocateCurrentStreamToPool": self.end_allocation,  # its name in torch before 2.8
            "_cuda_releasePool": self.release,
        }
        self._patches.enter_context(mock.patch.multiple(torch.cuda, **stand_ins))
        for name, stand_in in of_allocator.items():
            if hasattr(torch._C, name):
                self._patches.enter_context(mock.patch.object(torch._C, name, stand_in))
        self._patches.enter_context(mock.patch.object(device, "GIVES_MEMORY_BACK", "memory" in self.unwinds))
        self._patches.enter_context(mock.patch.object(device, "_unusable", None))
        backward = functools.partial(self.run_backward, run_backward)
        self._patches.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", backward))
        self._patches.enter_context(mock.patch.object(torch._C, "_host_emptyCache", create=True, return_value=None))
        clear = mock.patch.object(torch._C, "_cuda_clearCublasWorkspaces", self.clear_workspaces, create=True)
        self._patches.enter_context(clear)
        self._patches.enter_context(mock.patch.object(torch.cuda.graphs.graph, "default_capture_stream", None))
        self._patches.enter_context(mock.patch.object(device, "has_graphs", everywhere))
        self._nodes.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        self._patches.close()
        super().__exit__(*error)
        return self._nodes.__exit__(*error)

    @property
    def recording(self):
        """Returns the graph that records work on the current stream, or None."""
        return self.graph if self.graph and self.stream in self.graph.streams else None

    def synchronize(self, device=None):
        self.permitted(self.graph is None, "synchronize")
        self.host_waits_for.update(self.lasts)

    def permitted(self, permitted, name):
        if not permitted:
            self.graph.invalid = True
            raise NotPermittedError(f"{name}: operation not permitted when stream is capturing")

    def wait(self, waiting, other):
        """Updates the capture under way when one stream waits for another."""
        streams = self.graph.streams if self.graph else []
        if other in streams and waiting not in streams:
            self.permitted(waiting is not self.default, "the default stream waits for a captured one")
            streams.append(waiting)
        elif waiting in streams:
            self.permitted(other in streams, "a captured stream waits for one outside the capture")
        if other in streams:
            self.graph.awaited[waiting] |= self.graph.known_to(other)

    def call_from_another_thread(self):
        """Returns the error of a call to CUDA from another thread, for example one that pins memory."""
        errors = []

        def call():
            try:
                self.permitted(not self.graph or self.graph.mode != "global", "another thread's call")
            except NotPermittedError as error:
                errors.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        return errors[0] if errors else None

    # Gradients

    def note(self, made):
        """Assigns new gradient nodes to the current stream."""
        nodes = [v.grad_fn for v in flat(made) if isinstance(v, torch.Tensor)]
        while nodes:
            node = nodes.pop()
            if node is not None and STREAM not in node.metadata:
                node.metadata[STREAM] = self.stream
                nodes += following(node)

    def stream_of(self, node):
        stream = node.metadata.get(STREAM, self.stream)
        return stream if stream.emulated is self else self.default

    def run_backward(self, run, roots, gradients, keep_graph, create_graph, inputs, *rest, **options):
        """Runs every node on its own stream, after the nodes that feed it; the caller's stream waits for the last."""
        self.note(roots)
        nodes = run_by_backward(roots, inputs)
        if all(self.stream_of(node) is self.stream for node in nodes):
            return run(roots, gradients, keep_graph, create_graph, inputs, *rest, **options)
        caller, first, done, hooks = self.stream, self.stream.last, {}, ExitStack()
        for node, makers in nodes.items():
            stream = self.stream_of(node)
            for maker in makers or [None]:
                self.wait(stream, self.stream_of(maker) if maker else caller)
            begin = functools.partial(self.begin_node, stream, makers, first, done)
            end = functools.partial(self.end_node, node, nodes, done)
            if not self.graph:  # a capture records all work in one sequence anyway
                hooks.callback(node.register_prehook(begin).remove)
                hooks.callback(node.register_hook(end).remove)
        feeding = {maker for makers in nodes.values() for maker in makers}
        last = [node for node in nodes if node not in feeding]
        for node in last:
            self.wait(caller, self.stream_of(node))
        with hooks:
            try:
                return run(roots, gradients, keep_graph, create_graph, inputs, *rest, **options)
            finally:
                self.stream = caller  # a leaf's gradient may be returned as it was made
                ends = [done.get(n) for node in last for n in (node, *nodes[node])]
                caller.awaited += [work for work in ends if work is not None]

    def begin_node(self, stream, makers, first, done, gradients):
        self.stream = stream
        stream.awaited += [work for work in [first, *(done.get(maker) for maker in makers)] if work is not None]

    def end_node(self, node, nodes, done, *gradients):
        done[node] = self.stream.last
        taking = [n for n in following(node) if n in nodes]
        if taking and done[node] is not None:  # adds up several gradients on this node's stream
            self.stream = self.stream_of(taking[0])
            self.stream.awaited.append(done[node])

    # Memory

    def empty_cache(self):
        if self.under_way:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    def end_allocation(self, device_index, pool):
        if pool not in self.under_way:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.under_way.remove(pool)

    def release(self, device_index, pool):
        self.uses[pool] -= 1
        assert self.uses[pool] >= 0, "memory given back that another graph still uses"
        if self.uses[pool] == 0:
            self.given_back.add(pool)

    def use_workspace(self):
        workspace = self.workspaces.setdefault(self.stream, Workspace(self.recording and self.recording.memory_pool))
        if self.recording:
            self.recording.workspaces.add(workspace)

    def clear_workspaces(self, *streams):
        """Frees the workspaces of these streams, or of all."""
        for stream in streams or tuple(self.workspaces):
            if stream in self.workspaces:
                self.workspaces.pop(stream).freed = True

    def memory_of(self, tensor, *, new=False):
        """Returns the number of the tensor's memory, which views share."""
        storage = tensor.untyped_storage()
        known = self.known.get(storage._cdata)
        if known is not None and not known[1].expired():
            return known[0]
        number = len(self.sizes)
        self.known[storage._cdata] = (number, StorageWeakRef(storage))
        self.sizes[number] = storage.nbytes()
        pool = None
        if new:
            pool = self.recording.memory_pool if self.recording else self.stream.pool
            if self.recording:
                self.of_graphs.add(number)
        else:
            self.initial[number] = torch.tensor([], dtype=torch.uint8, device="cpu").set_(storage).clone()
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
        """Returns the blocks of freed tensors to their pools."""
        expired = torch.UntypedStorage._expired  # as in `StorageWeakRef.expired`, which is slower
        for address in [a for a, (_, weak) in self.known.items() if expired(weak.cdata)]:
            number, _ = self.known.pop(address)
            self.free.setdefault(self.owner[number], []).append(self.blocks[number])

    def ref(self, tensor, *, new=False):
        place = (tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset())
        return Ref(self.memory_of(tensor, new=new), tensor.dtype, *place)

    def refs(self, tree):
        return mapped(lambda v: self.ref(v) if isinstance(v, torch.Tensor) else v, tree)

    # Recording

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():
            return self.dispatch(call, args, kwargs or {})

    def dispatch(self, call, args, kwargs):
        name = call._schema.name.split("::")[1]
        self.collect()
        inputs = [v for v in flat((args, kwargs)) if isinstance(v, torch.Tensor)]
        self.permitted(not self.graph or (name not in READS and name not in FROM_HOST), name)
        if is_view(call) or name in ("detach", "alias"):
            for value in inputs:
                self.memory_of(value)
            return call(*args, **kwargs)
        launch = (call, tuple((v.dtype, tuple(v.shape)) for v in inputs))
        self.permitted(not self.graph or launch in self.launched, f"{name}, launched for the first time")
        self.launched.add(launch)
        if name in PRODUCTS:
            self.use_workspace()
        draws = torch.Tag.nondeterministic_seeded in call.tags
        if draws and self.generator_captures and not self.recording and kwargs.get("generator") is None:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        given = self.refs(args), self.refs(kwargs)
        recording = self.recording
        out = self.without_effect(call, args, kwargs) if recording else call(*args, **kwargs)
        results = [] if changes_its_input(call) else [v for v in flat(out) if isinstance(v, torch.Tensor)]
        work = Work(call, *given, [self.ref(v, new=True) for v in results], draws=draws)
        if recording:
            for value in results:
                if self.memory_of(value) in self.of_graphs:
                    spoil(value)
            recording.work.append(work)
            recording.recorded[self.stream] += 1
        else:
            self.enqueue(drawn(work, args, results) if draws else work)
            if name in READS:
                self.host_waits_for[self.stream] = self.stream.last
        return out

    @staticmethod
    def without_effect(call, args, kwargs):
        """Returns what a call gives, without what it changes (buffers too, which schemas do not mention) and draws."""
        if not changes_its_input(call):
            state = torch.get_rng_state()
            args, kwargs = mapped(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, (args, kwargs))
            out = call(*args, **kwargs)
            torch.set_rng_state(state)
            return out
        written = [a for a, spec in zip(args, call._schema.arguments, strict=False) if is_written(spec)]
        written += [kwargs[s.name] for s in call._schema.arguments if is_written(s) and s.name in kwargs]
        return None if not call._schema.returns else written[0] if len(call._schema.returns) == 1 else tuple(written)

    def enqueue(self, work):
        stream = self.stream
        after = [*stream.awaited, stream.last, *self.host_waits_for.values()]
        stream.awaited = []
        work.stream, work.after = stream, tuple(w for w in after if w is not None)
        self.work.append(work)
        stream.last = self.lasts[stream] = len(self.work) - 1

    def run_again(self, work):
        """Replays one operation of a graph on the memory it was captured with."""
        live = {number: address for address, (number, weak) in self.known.items() if not weak.expired()}

        def tensor(ref):
            if ref.memory in live:
                return ref.on(torch.UntypedStorage._new_with_weak_ptr(live[ref.memory]))
            if ref.memory not in self.of_graphs:
                raise NotPermittedError("a graph works on memory that was freed")
            if ref.memory not in self.scratch:
                self.scratch[ref.memory] = torch.UntypedStorage(self.sizes[ref.memory])
            return ref.on(self.scratch[ref.memory])

        again = Work(work.call, work.args, work.kwargs, work.results)
        with _disable_current_modes(), torch.no_grad():
            call, args, kwargs, results = placed(again, tensor)
            run_step(call, args, kwargs, results)
            if work.draws:
                again = drawn(again, args, results)
        self.enqueue(again)

    # Permuting

    def shuffled(self, seed, wanted):
        """Returns the tensors `wanted` after running the recorded work in an order drawn from the seed."""
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
        """Returns a function that places a tensor in its allocated memory, and each call with its tensors."""
        memory = [torch.UntypedStorage(size) for size in self.block_sizes]
        self.bytes = [torch.tensor([], dtype=torch.uint8, device="cpu").set_(storage) for storage in memory]
        tensor = functools.cache(lambda ref: ref.on(memory[self.blocks[ref.memory]]))
        return tensor, [placed(work, tensor) for work in self.work]


def drawn(work, args, results):
    """Returns an operation that writes the numbers already drawn, the same in every order."""
    if results:
        numbers = [v.clone() for v in results]
        return Work(lambda: tuple(numbers), (), {}, work.results)
    numbers = args[0].clone()
    return Work(lambda out: out.copy_(numbers), (work.args[0],), {}, [])


def placed(work, tensor):
    args, kwargs = (mapped(lambda v: tensor(v) if isinstance(v, Ref) else v, t) for t in (work.args, work.kwargs))
    return work.call, args, kwargs, [tensor(ref) for ref in work.results]


def run_step(call, args, kwargs, results):
    out = call(*args, **kwargs)
    if results:
        made = [out] if isinstance(out, torch.Tensor) else [v for v in flat(out) if isinstance(v, torch.Tensor)]
        for result, value in zip(results, made, strict=True):
            result.copy_(value)


def flat(tree):
    """Returns what lists, tuples and dicts hold; torch's function for all kinds of trees takes far longer."""
    if isinstance(tree, (list, tuple, dict)):
        return [v for part in (tree.values() if isinstance(tree, dict) else tree) for v in flat(part)]
    return [tree]


def mapped(function, tree):
    """Returns lists, tuples and dicts as they are with the function's result in each place."""
    if isinstance(tree, dict):
        return {key: mapped(function, part) for key, part in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)([mapped(function, part) for part in tree])
    return function(tree)


def following(node):
    """Returns the nodes that receive this node's gradients."""
    return [n for n, _ in node.next_functions if n is not None]


def run_by_backward(roots, inputs):
    """Returns, in order, the nodes that a backward runs or returns gradients of, with the nodes that feed them."""
    stack = [node for node in (root.grad_fn for root in roots) if node is not None]
    seen, backwards = set(), {}
    while stack:
        if stack[-1] in seen:
            backwards[stack.pop()] = None
        else:
            seen.add(stack[-1])
            stack += [node for node in following(stack[-1]) if node not in seen]
    wanted = {id(t) for t in inputs} | {t.grad_fn for t in inputs}
    needed = {}
    for node in backwards:
        own = not inputs or node in wanted or id(getattr(node, "variable", None)) in wanted
        needed[node] = own or any(needed[n] for n in following(node))
    makers = {node: [] for node in reversed(backwards) if needed[node]}
    for node in makers:
        for taking in following(node):
            if needed[taking]:
                makers[taking].append(node)
    return makers


def is_written(spec):
    return spec.alias_info is not None and spec.alias_info.is_write


@functools.cache
def changes_its_input(call):
    return any(is_written(spec) for spec in call._schema.arguments)


@functools.cache
def is_view(call):
    aliased = any(r.alias_info is not None for r in call._schema.returns)
    return aliased and not changes_its_input(call)


def spoil(tensor):
    """Fills a tensor with garbage that shows in arithmetic."""
    if tensor.dtype == torch.uint8:
        tensor.fill_(0xFF)  # NaN in every floating-point type
    elif tensor.is_floating_point():
        tensor.fill_(float("nan"))
