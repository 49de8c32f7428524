"""The cache of CUDA graphs for attack steps (`graphs.py`) and updates (`objectives/update.py`).

The key of a graph holds all that the graph has fixed. Graphs share a memory pool, and are dropped when a tensor of the
model has moved or when they are the least recently used. A model that cannot be captured runs eagerly, with a warning
that says why.
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
    """Everything that a captured computation has fixed."""

    computation: Hashable
    inputs: tuple[object, ...]  # their layout
    autocast: torch.dtype | None  # the caller's
    values: tuple[object, ...]  # modes, numbers and names in the model's modules
    tensors: tuple[object, ...]  # the addresses of the model's tensors, and their layout if that may change


def hook_reason(model: nn.Module) -> str | None:
    """Returns why a model with a hook cannot be captured; None for a model without one."""
    name = hooked(model)
    return f"{name} has a hook, which a graph would not run" if name else None


class Recent(OrderedDict[K, V]):
    """A dictionary in the order of use, the least recently used first."""

    def use(self, key: K) -> V | None:
        """Returns the value of this key and makes it the most recently used."""
        if key in self:
            self.move_to_end(key)
        return self.get(key)


class GraphPool(Recent[K, V]):
    """Graphs that share a memory pool: they must replay one after another."""

    def __init__(self) -> None:
        super().__init__()
        self._pool: object = None

    def add(self, key: K, most: int, record: Callable[[object], V]) -> V:
        """Keeps the graphs that `record(pool)` captures, and drops the least recently used if there are already `most`.

        Any exception of the model or the driver, including out of memory, becomes a CaptureError.
        """
        while len(self) >= most:
            self.popitem(last=False)
        if not self:  # torch accepts no pool that no graph uses any more
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
        """Returns what was captured for this key, after dropping graphs on memory that the model no longer uses."""
        for old in [k for k in self.captured if k.tensors != key.tensors]:
            del self.captured[old]
        return self.captured.use(key)

    def refuse(self, reason: str, *, for_good: bool = False) -> None:
        """Records why the call runs eagerly, and warns of it once; `for_good` also frees all graphs."""
        self.reason = reason
        if for_good:
            self.failed = reason
            self.captured.clear()
        if reason not in self._warned:
            self._warned.add(reason)
            warn_caller(f"the {self._subject} runs without graphs: {reason}")

    def explain(self, graphs: int, until: str) -> str:
        """Describes how the calls run with this many captured graphs. Without any they are eager `until` ..."""
        if self.reason:
            return f"eagerly, since {self.reason}"
        return f"from CUDA graphs, {graphs} captured" if graphs else f"eagerly, until {until}"
