"""The cache of CUDA graphs for attack steps (`graphs.py`) and updates (`objectives/update.py`).

The key of a graph is all that it has fixed. Graphs share a memory pool, and are dropped when a tensor of the model has
moved or when they are the least recently used. A model that cannot be captured runs eagerly, with a warning why.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import nn

from bt_fast.attack import device
from bt_fast.attack.tracing import hooked
from bt_fast.warning import warn_caller

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(frozen=True)
class GraphKey:
    """All that a captured computation has fixed."""

    computation: Hashable
    inputs: tuple[object, ...]  # their layout
    autocast: torch.dtype | None  # the caller's
    values: tuple[object, ...]  # modes, numbers and names in the model's modules
    tensors: tuple[object, ...]  # the addresses of the model's, and their layout where that may change


def hook_reason(model: nn.Module) -> str | None:
    """Why a model with a hook cannot be captured; None for one without."""
    name = hooked(model)
    return f"{name} has a hook, which a graph would not run" if name else None


class Recent(OrderedDict[K, V]):
    """A dictionary in the order of use, the least recently used first."""

    def use(self, key: K) -> V | None:
        """The value of this key, from now on the most recently used."""
        if key in self:
            self.move_to_end(key)
        return self.get(key)


class GraphPool(Recent[K, V]):
    """Graphs that share a memory pool: they must replay one after another."""

    def __init__(self) -> None:
        super().__init__()
        self._pool: object = None

    def add(self, key: K, most: int, record: Callable[[object], V]) -> V:
        """Keep the graphs that `record(pool)` captures; the least recently used make room where there are `most`.

        Whatever the model or the driver raises, out of memory too, is a CaptureError.
        """
        while len(self) >= most:
            self.popitem(last=False)
        if not self:  # torch takes no pool that no graph uses any more
            self._pool = device.new_pool()
        try:
            self[key] = graph = record(self._pool)
        except device.CaptureError:
            raise
        except Exception as error:
            raise device.CaptureError.of(error) from error
        return graph


class ModelGraphs(Generic[V]):
    """The graphs of one model for one subject ("attack" or "update") by key, and why its calls run eagerly."""

    def __init__(self, subject: str, captured: Recent[GraphKey, V]) -> None:
        self._subject = subject
        self.captured = captured
        self.failed: str | None = None  # why the model is never captured again
        self.reason: str | None = None  # why the last call could not use graphs
        self._warned: set[str] = set()

    def use(self, key: GraphKey) -> V | None:
        """What was captured for this key. What works on memory that is the model's no more is dropped first."""
        for old in [k for k in self.captured if k.tensors != key.tensors]:
            del self.captured[old]
        return self.captured.use(key)

    def refuse(self, reason: str, *, for_good: bool = False) -> None:
        """Note why the call runs eagerly, and warn of it once; `for_good` also frees all graphs."""
        self.reason = reason
        if for_good:
            self.failed = reason
            self.captured.clear()
        if reason not in self._warned:
            self._warned.add(reason)
            warn_caller(f"the {self._subject} runs without graphs: {reason}")

    def explain(self, graphs: int, until: str) -> str:
        """How the calls run, in words, with so many captured graphs. Without any they are eager `until` ..."""
        if self.reason:
            return f"eagerly, since {self.reason}"
        return f"from CUDA graphs, {graphs} captured" if graphs else f"eagerly, until {until}"
