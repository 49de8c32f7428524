"""CUDA streams and graphs, as the attack's runners reach them: through these functions and nothing else.

So that a stand-in can take their place where there is no GPU.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

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


def no_graphs_reason(x: Tensor) -> str | None:
    """Why graphs cannot be used for work on `x`, or None."""
    if not x.is_cuda:
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
    collecting = gc.isenabled()
    gc.disable()  # a collected tensor or graph would touch the allocator in the middle of the capture
    try:
        # other threads (a data loader that pins memory) may go on meanwhile
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            yield graph
        finally:
            graph.capture_end()
    finally:
        if collecting:
            gc.enable()
