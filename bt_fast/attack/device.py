"""CUDA streams, graphs and generators for runners and the update, which reach them by this module alone.

So that an emulation can take their place where there is no GPU.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from bt_fast.floors import numbers
from bt_fast.warning import warn_caller

Stream = torch.cuda.Stream
Graph = torch.cuda.CUDAGraph


def has_graphs(x: Tensor) -> bool:
    """Whether there are graphs where `x` is."""
    return x.is_cuda


def no_graphs_reason(x: Tensor) -> str | None:
    """Why graphs cannot be used for work on `x`, or None."""
    if not has_graphs(x):
        return f"the images are on {x.device}, and graphs are CUDA's"
    if torch.cuda.is_current_stream_capturing():
        return "the caller is capturing a graph"
    return _unusable


def current_stream(x: Tensor) -> Stream:
    """The stream on which the caller works on `x`'s device."""
    return torch.cuda.current_stream(x.device)


def new_stream(x: Tensor) -> Stream:
    """A further stream on `x`'s device."""
    return torch.cuda.Stream(x.device)


def on(stream: Stream) -> AbstractContextManager[object]:
    """Work inside goes to the stream."""
    return torch.cuda.stream(stream)


def new_pool() -> Any:
    """A memory pool for graphs: those that share one must replay one after another."""
    return torch.cuda.graph_pool_handle()


@contextmanager
def capture(pool: Any) -> Iterator[Graph]:
    """Record the launches on the current stream, which must not be the default one, instead of running them.

    Nothing inside may wait for the device or be launched there for the first time; other threads may go on meanwhile.
    The pool is a new one, or one that a graph still uses. A capture that breaks off leaves streams, generators and
    torch's allocator as they were; where that fails, a warning says so, and `no_graphs_reason` from then on.
    """
    graph, stream, phase = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), "begin"
    with _no_collection(), _own_workspaces():
        try:
            # in "global" mode a data loader that pins memory would break it
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            phase = "inside"
            yield graph
            phase = "end"
            with on(stream):
                graph.capture_end()
        except BaseException:
            _unwind(graph, pool, stream, phase)
            raise


def free_unused() -> None:
    """Give back memory that torch keeps for its streams: that of a capture is its own."""
    torch.cuda.empty_cache()


class CaptureError(RuntimeError):
    """A capture that failed, and why."""

    @classmethod
    def of(cls, error: BaseException) -> CaptureError:
        """With the error of the model or the driver."""
        return cls(f"capture failed ({type(error).__name__}: {error})")


# Before 2.14 torch counts a broken capture's pool as used for good, and may still look at its graph
GIVES_MEMORY_BACK = numbers(torch.__version__) >= [2, 14]
_broken: list[Graph] = []
_unusable: str | None = None  # why no graph is captured in this process any more


def _unwind(graph: Any, pool: Any, stream: Any, phase: str) -> None:
    """End what a capture that broke off in this phase has left under way."""
    with on(stream):  # which the model may have left
        if phase == "inside":
            with suppress(RuntimeError), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it may be empty
                graph.capture_end()
                return  # what broke it off was no error of CUDA's
        graph.reset()
    with suppress(RuntimeError):  # newer ones have done so
        _end_allocation(stream.device_index, pool)
    if phase != "begin" and not GIVES_MEMORY_BACK:
        _broken.append(graph)
        with suppress(RuntimeError):
            torch._C._cuda_releasePool(stream.device_index, pool)
    try:
        _try_out(stream.device)
    except RuntimeError as error:
        _give_up(error)


def _end_allocation(device_index: int, pool: Any) -> None:
    # its name in torch before 2.8 says "CurrentStream", though it did the same
    name = "_cuda_endAllocateToPool"
    allocator: Any = torch._C
    end = getattr(allocator, name, None) or allocator._cuda_endAllocateCurrentStreamToPool
    end(device_index, pool)


def _try_out(where: torch.device) -> None:
    """Capture a launch on a stream and into a pool of its own, and draw a number.

    Before 2.13 only the end of a capture ends the broken one for the generators.
    """
    free_unused()
    graph, random = torch.cuda.CUDAGraph(), RandomStates(device_generator(where))
    with on(torch.cuda.Stream(where)):
        number = torch.zeros(1, device=where)
        number.zero_()  # not for the first time in the capture
        graph.capture_begin(capture_error_mode="thread_local")
        number.zero_()
        graph.capture_end()
        number.uniform_()
    random.restore()


def _give_up(error: RuntimeError) -> None:
    global _unusable
    if _unusable is not None:
        return
    reason = str(error).partition("\n")[0]
    _unusable = f"a capture that broke off has left CUDA unable to capture another ({reason})"
    warn_caller(f"no more graphs in this process, start a new one to have them: {_unusable}")


@contextmanager
def _no_collection() -> Iterator[None]:
    """A collected tensor or graph would touch the allocator in the middle of a capture."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@contextmanager
def _own_workspaces() -> Iterator[None]:
    """A capture takes the workspace of cuBLAS from its own pool, and leaves none of that to its stream.

    torch keeps one workspace for each stream, and before 2.15 a graph uses its stream's. But it may be freed while the
    graph is still there: since 2.12 where another graph of that stream goes, and wherever a model that was compiled
    with graphs of its own captures one.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


def host_generator(device: torch.device) -> torch.Generator | None:
    """The default generator of the host, where the device has one of its own. A graph does not draw from it again."""
    return None if device.type == "cpu" else torch.default_generator


def device_generator(device: torch.device) -> torch.Generator | None:
    """The default generator of the device, from which graphs draw as the eager code does."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index]
    return torch.default_generator if device.type == "cpu" else None


class RandomStates:
    """The states of some generators now (None among them is none)."""

    def __init__(self, *generators: torch.Generator | None) -> None:
        self._states = [(g, g.get_state()) for g in generators if g is not None]

    @classmethod
    def of(cls, where: torch.device, *others: torch.Generator | None) -> RandomStates:
        """The states of the host's and the device's default generators, and of others."""
        return cls(host_generator(where), device_generator(where), *others)

    @property
    def moved(self) -> bool:
        """Whether any has drawn since. Never waits for the device: a state is the host's."""
        return any(_bytes(g.get_state()) != _bytes(state) for g, state in self._states)

    def restore(self) -> None:
        """Set them back."""
        for generator, state in self._states:
            generator.set_state(state)


def _bytes(state: Tensor) -> bytes:
    return state.numpy().tobytes()
