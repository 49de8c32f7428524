"""Records the kernels that code launches by running it: on a device without values, or on the CPU.

`trace` runs code on meta tensors that call themselves CUDA. They hold no values, so a WRN-34-10 costs a second; the
code takes the paths that it takes on a GPU, the runners' streams and graphs included. `trace_on_cpu` really runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.gpu_model import Action, HostWait, Kernel, Kind, Launch, Record, StreamWait
from bt_fast import faults
from bt_fast.attack import device as attack_device

NOWHERE = torch.device("meta")
OURS = "bt_fast"
_ROOM = ("empty", "empty_strided", "new_empty", "empty_like", "detach", "alias", "lift_fresh", "_unsafe_view")
_WITHOUT_READING = ("fill_", "zero_", "copy_", "zeros", "zeros_like", "ones", "ones_like", "full", "new_zeros")
_KINDS: dict[str, Kind] = {
    "mm": "matmul",
    "addmm": "matmul",
    "bmm": "matmul",
    "native_batch_norm": "norm",
    "native_batch_norm_backward": "norm_backward",
    "max_pool2d_with_indices": "pool",
    "max_pool2d_with_indices_backward": "pool_backward",
}


def trace(work: Callable[[], object], *, reads: Sequence[int] = (), warm: int = 1) -> list[Action]:
    """Returns the launches, events and waits that `work()` would give a GPU.

    Args:
        work: works on tensors on `NOWHERE`, without reading their values.
        reads: the first numbers that each read of the device returns; zeros follow.
        warm: how often to run it before: the first runs capture graphs and make some state.
    """
    recorder = _Recorder(NOWHERE)
    with ExitStack() as stack:
        stack.enter_context(_replaced(faults, HostRead=lambda values: _Read(recorder, len(values), reads)))
        stack.enter_context(
            _replaced(
                attack_device,
                no_graphs_reason=lambda x: None,
                current_stream=lambda x: recorder.stream,
                new_stream=lambda x: recorder.new_stream(),
                on=recorder.on,
                new_pool=object,
                capture=recorder.capture,
            )
        )
        requested = (torch.is_autocast_enabled, torch.get_autocast_dtype)
        stack.enter_context(_replaced(torch.cuda, initial_seed=torch.initial_seed))
        stack.enter_context(_replaced(torch, **{ask.__name__: _asked_of_cuda(ask) for ask in requested}))
        stack.enter_context(_CallsItselfCuda())
        stack.enter_context(recorder)
        for _ in range(warm):
            work()
        recorder.actions.clear()
        work()
    return recorder.actions


def trace_on_cpu(work: Callable[[], object]) -> list[Action]:
    """Returns the operations of `work()` on the CPU, which runs one after another, including those inside our ops."""
    recorder = _Recorder(torch.device("cpu"))
    with recorder:
        work()
    return recorder.actions


class _Recorder(TorchDispatchMode):
    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.actions: list[Action] = []
        self.stream = _Stream(self, 0)
        self._device, self._streams, self._events = device, 1, 0
        self._captured: list[Kernel] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == OURS and self._device.type == "cpu":
            self.launch([Kernel(func._schema.name, "stream", 0, 0, 0, fused=True)])  # takes only the host's time
            with self:  # records the ops inside
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        out = func(*args, **kwargs)
        if any(t.device.type == self._device.type for t in _tensors((args, kwargs, out))):
            if self._device == NOWHERE and torch.Tag.nondeterministic_seeded in func.tags:
                torch.rand((), device="cpu")  # moves a default generator, as the device's would move
            self.launch(kernels_of_call(func, args, kwargs, out))
        return out

    def launch(self, kernels: Sequence[Kernel]) -> None:
        if self._captured is not None:
            self._captured.extend(kernels)
        else:
            self.actions.extend(Launch((kernel,), self.stream.number) for kernel in kernels)

    def record(self) -> int:
        """Records a new event on the current stream and returns it."""
        self._events += 1
        self.actions.append(Record(self._events, self.stream.number))
        return self._events

    def new_stream(self) -> _Stream:
        self._streams += 1
        return _Stream(self, self._streams - 1)

    @contextmanager
    def on(self, stream: _Stream) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextmanager
    def capture(self, pool: object) -> Iterator[_Graph]:
        graph = _Graph(self, [])
        self._captured = graph.kernels
        try:
            yield graph
        finally:
            self._captured = None


@dataclass
class _Stream:
    recorder: _Recorder
    number: int

    def wait_stream(self, other: _Stream) -> None:
        with self.recorder.on(other):
            event = self.recorder.record()
        self.recorder.actions.append(StreamWait(event, self.number))


@dataclass
class _Graph:
    recorder: _Recorder
    kernels: list[Kernel]

    def replay(self) -> None:
        self.recorder.actions.append(Launch(tuple(self.kernels), self.recorder.stream.number, graph=True))


class _Read:
    """Replaces `HostRead`: a copy to the host, with a prepared answer."""

    def __init__(self, recorder: _Recorder, length: int, answer: Sequence[int]) -> None:
        self._recorder = recorder
        self._answer = [*answer, *[0] * length][:length]
        recorder.launch([Kernel("copy to the host", "stream", 0, 16 * length, length)])
        self._event = recorder.record()

    def wait(self) -> list[int]:
        self._recorder.actions.append(HostWait(self._event))
        return self._answer


class _CallsItselfCuda(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return args[0].device == NOWHERE
        return func(*args, **(kwargs or {}))


def _asked_of_cuda(ask: Callable[..., Any]) -> Callable[..., Any]:
    """Turns a question about the device type "meta", which has no such functions, into one about CUDA."""
    return lambda *types: ask(*("cuda" if kind == NOWHERE.type else kind for kind in types))


@contextmanager
def _replaced(module: Any, **names: Any) -> Iterator[None]:
    before = {name: getattr(module, name) for name in names}
    try:
        for name, value in names.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def kernels_of_call(func: Any, args: Any, kwargs: Any, out: Any) -> list[Kernel]:
    """Returns what one operation launches: a kernel, or none for a view or an allocation.

    A convolution's backward is one for each gradient. An operation in several passes over an operand (batch norm in
    train mode needs its statistics first) reads it several times.
    """
    name = func.overloadpacket.__name__
    if _is_view(func) or name in _ROOM or not _bytes((args, kwargs, out)):
        return []
    if name == "convolution":
        x, w = args[:2]
        return [_product("conv", name, _flops(func, args, kwargs, out), _bytes((x, w, out)), out, w[0].numel())]
    if name == "convolution_backward":
        return _convolution_backward(func, args, kwargs, out)
    changed = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
    read = args[1:] if name in _WITHOUT_READING else (args, kwargs)
    moved = _bytes(read) + _bytes(_written(func, args, kwargs) if changed else out)
    kind = _KINDS.get(name, "stream")
    if kind == "matmul":
        depth = args[-2].shape[-1]
        return [_product(kind, name, _flops(func, args, kwargs, out), moved, out, depth)]
    if name == "native_batch_norm" and args[5]:
        moved += _bytes(args[0])
    if name == "native_batch_norm_backward" and args[7]:
        moved += _bytes(args[:2])
    elements = max(t.numel() for t in _tensors((args, kwargs, out)))
    return [Kernel(name, kind, 0, moved, elements, fused=func.namespace == OURS)]


def _convolution_backward(func: Any, args: Any, kwargs: Any, out: Any) -> list[Kernel]:
    grad, x, w = args[:3]
    kernels = []
    if out[0] is not None:
        flops = _flops(func, (*args[:10], [True, False, False]), kwargs, out)
        kernels.append(_product("conv_input", "convolution_backward", flops, _bytes((grad, w, out[0])), x, 0))
    if out[1] is not None:
        flops = _flops(func, (*args[:10], [False, True, False]), kwargs, out)
        rows, columns = w.shape[0], w[0].numel()
        moved = _bytes((grad, x, out[1]))
        kernels.append(
            Kernel("convolution_backward", "conv_weight", flops, moved, rows, columns, _depth(flops, rows * columns))
        )
    if out[2] is not None:
        kernels.append(Kernel("convolution_backward", "stream", 0, _bytes((grad, out[2])), grad.numel()))
    return kernels


def _product(kind: Kind, name: str, flops: int, moved: int, out: Tensor, depth: int) -> Kernel:
    """Returns a product with the result `out` [n, columns, ...]; a depth of 0 is derived from the FLOPs."""
    columns = out.shape[1]
    rows = out.numel() // columns
    return Kernel(name, kind, flops, moved, rows, columns, depth or _depth(flops, rows * columns))


def _depth(flops: int, outputs: int) -> int:
    return max(1, flops // (2 * outputs))


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    return int(flop_registry[func._overloadpacket](*args, **kwargs, out_val=out))


def _is_view(func: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def _written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """Returns the arguments that an operation changes."""
    written = []
    for i, spec in enumerate(func._schema.arguments):
        if spec.alias_info is not None and spec.alias_info.is_write:
            written.append(args[i] if i < len(args) else kwargs.get(spec.name))
    return written


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _bytes(tree: Any) -> int:
    """Returns the bytes that the tensors hold; an expanded tensor holds no more than its memory."""
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in _tensors(tree))
