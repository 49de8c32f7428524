"""CUDA streams, graphs and generators for runners and the update, which use them only through this module.

An emulation can therefore replace them where there is no GPU.
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
    """Whether the device of `x` has graphs."""
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
    """Returns a memory pool for graphs: those that share one must replay one after another."""
    return torch.cuda.graph_pool_handle()


@contextmanager
def capture(pool: Any) -> Iterator[Graph]:
    """Records the launches on the current stream, which must not be the default one, instead of running them.

    Nothing inside may wait for the device or be launched there for the first time; other threads may go on meanwhile.
    The pool is a new one, or one that a graph still uses. A capture that breaks off restores streams, generators and
    torch's allocator; if that fails, a warning says so, and `no_graphs_reason` from then on.
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
    """Frees memory that torch keeps for its streams: a capture has its own."""
    torch.cuda.empty_cache()


class CaptureError(RuntimeError):
    """A capture that failed, and why."""

    @classmethod
    def of(cls, error: BaseException) -> CaptureError:
        """Returns a CaptureError with the error of the model or the driver."""
        return cls(f"capture failed ({type(error).__name__}: {error})")


# Before 2.14 torch counts a broken capture's pool as in use forever, and may still read its graph
GIVES_MEMORY_BACK = numbers(torch.__version__) >= [2, 14]
_broken: list[Graph] = []
_unusable: str | None = None  # why no graph is captured in this process any more


def _unwind(graph: Any, pool: Any, stream: Any, phase: str) -> None:
    """Ends what a capture that broke off in this phase has left unfinished."""
    with on(stream):  # the model may have left the stream
        if phase == "inside":
            with suppress(RuntimeError), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the warning that the graph may be empty
                graph.capture_end()
                return  # what broke off the capture was not an error of CUDA
        graph.reset()
    with suppress(RuntimeError):  # newer versions have already done so
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
    # before torch 2.8 its name has "CurrentStream", though it does the same
    name = "_cuda_endAllocateToPool"
    allocator: Any = torch._C
    end = getattr(allocator, name, None) or allocator._cuda_endAllocateCurrentStreamToPool
    end(device_index, pool)


def _try_out(where: torch.device) -> None:
    """Captures a launch on a new stream and into a new pool, and draws a number.

    Before 2.13 only the end of a capture ends the broken one for the generators.
    """
    free_unused()
    graph, random = torch.cuda.CUDAGraph(), RandomStates(device_generator(where))
    with on(torch.cuda.Stream(where)):
        number = torch.zeros(1, device=where)
        number.zero_()  # a first launch before the capture
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
    """Disables garbage collection: freeing a tensor or graph would touch the allocator during a capture."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@contextmanager
def _own_workspaces() -> Iterator[None]:
    """Makes a capture take the workspace of cuBLAS from its own pool, and leaves no such workspace to its stream.

    torch keeps one workspace for each stream, and before 2.15 a graph uses its stream's. But that may be freed while
    the graph still exists: since 2.12 when another graph of that stream is freed, and whenever a model that was
    compiled with CUDA graphs captures one.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


def host_generator(device: torch.device) -> torch.Generator | None:
    """Returns the host's default generator if the device has its own. A replayed graph does not draw from it again."""
    return None if device.type == "cpu" else torch.default_generator


def device_generator(device: torch.device) -> torch.Generator | None:
    """Returns the device's default generator, from which graphs draw like the eager code."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index]
    return torch.default_generator if device.type == "cpu" else None


class RandomStates:
    """The current states of some generators (None stands for no generator)."""

    def __init__(self, *generators: torch.Generator | None) -> None:
        self._states = [(g, g.get_state()) for g in generators if g is not None]

    @classmethod
    def of(cls, where: torch.device, *others: torch.Generator | None) -> RandomStates:
        """Returns the states of the host's and the device's default generators, and of others."""
        return cls(host_generator(where), device_generator(where), *others)

    @property
    def moved(self) -> bool:
        """Whether any generator has drawn since. Never waits for the device: the host holds the states."""
        return any(_bytes(g.get_state()) != _bytes(state) for g, state in self._states)

    def restore(self) -> None:
        """Restores the states."""
        for generator, state in self._states:
            generator.set_state(state)


def _bytes(state: Tensor) -> bytes:
    return state.numpy().tobytes()
