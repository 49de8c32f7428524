"""CUDA streams, graphs and random numbers, as runners and the update reach them: through this module and nothing else.

So that a stand-in can take their place where there is no GPU.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol, cast

import torch
from torch import Tensor


class Stream(Protocol):
    """A queue of work on the device: `torch.cuda.Stream`."""

    def wait_stream(self, other: Any) -> None:
        """What is enqueued from now on starts after all that `other` holds now."""


class Graph(Protocol):
    """A captured sequence of launches: `torch.cuda.CUDAGraph`."""

    def replay(self) -> None:
        """Enqueue the sequence on the current stream."""


def has_graphs(x: Tensor) -> bool:
    """Whether there are graphs where `x` is."""
    return x.is_cuda


def no_graphs_reason(x: Tensor) -> str | None:
    """Why graphs cannot be used for work on `x`, or None."""
    if not has_graphs(x):
        return f"the images are on {x.device}, and graphs are CUDA's"
    if torch.cuda.is_current_stream_capturing():
        return "the caller is capturing a graph"
    return None


def current_stream(x: Tensor) -> Stream:
    """The stream on which the caller works on `x`'s device."""
    return torch.cuda.current_stream(x.device)


def new_stream(x: Tensor) -> Stream:
    """A further stream on `x`'s device."""
    return torch.cuda.Stream(x.device)


def on(stream: Any) -> AbstractContextManager[object]:
    """Work inside goes to the stream."""
    return torch.cuda.stream(stream)


def new_pool() -> object:
    """A memory pool for graphs: those that share one must replay one after another."""
    return torch.cuda.graph_pool_handle()


@contextmanager
def capture(pool: Any) -> Iterator[Graph]:
    """Record what is launched on the current stream, which must not be the default one, instead of running it.

    Nothing inside may wait for the device or be launched there for the first time.
    """
    graph = torch.cuda.CUDAGraph()
    with _no_collection():
        # other threads (a data loader that pins memory) may go on meanwhile
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            yield graph
        except BaseException:
            with suppress(RuntimeError):  # what broke off has made the capture invalid, and is the better reason
                graph.capture_end()
            raise
        graph.capture_end()


def graphed(
    function: Callable[..., tuple[Tensor, ...]], samples: tuple[Tensor, ...], pool: Any
) -> Callable[..., tuple[Tensor, ...]]:
    """`torch.cuda.make_graphed_callables`: the function and its backward from graphs. Waits for the device.

    It runs the function several times, and what that moves (buffers, generators) is the caller's to restore.

    Args:
        samples: static arguments; what a call gives is copied there, unless it is there already.
        pool: of the two graphs. Both keep memory in it from the forward to the backward.

    Returns:
        The function on other values of the same shapes. Results and gradients are static memory.

    Raises:
        CaptureError: whatever the function or the driver raised, out of memory too.
    """
    broken: list[str] = []

    def noting(*given: Tensor) -> tuple[Tensor, ...]:
        try:
            return function(*given)
        except Exception as error:  # the end of a capture that broke off raises another error, which says less
            broken.append(_said(error))
            raise

    try:
        # torch leaves its own stream the current one where a capture breaks off
        with _no_collection(), on(current_stream(samples[0])):
            made = torch.cuda.make_graphed_callables(noting, samples, allow_unused_input=True, pool=pool)
    except Exception as error:
        with suppress(RuntimeError):
            torch.cuda.synchronize()  # its runs on another stream have to end before the caller restores anything
        raise CaptureError(broken[0] if broken else _said(error)) from error
    return cast(Callable[..., tuple[Tensor, ...]], made)


class CaptureError(RuntimeError):
    """Why a capture failed."""


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


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


def host_generator(device: torch.device) -> torch.Generator | None:
    """The default generator of the host, where the device has one of its own: what it draws no graph draws again."""
    return None if device.type == "cpu" else torch.default_generator


def device_generator(device: torch.device) -> torch.Generator | None:
    """The default generator of the device, from which graphs draw on as the eager code does."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index]
    return torch.default_generator if device.type == "cpu" else None


class RandomStates:
    """Where some generators stand now (None among them is none)."""

    def __init__(self, *generators: torch.Generator | None) -> None:
        self._states = [(g, g.get_state()) for g in generators if g is not None]

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
