"""The graphs of one loss's attack steps and updates, and how an engine executes its attack."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bt_fast.attack import device
from bt_fast.attack.auto import AutoRunner
from bt_fast.attack.folded import Frozen
from bt_fast.attack.graphs import GraphRunner
from bt_fast.attack.runners import Runner, run_eager
from bt_fast.engine import Engine

DTYPES = {"bf16": torch.bfloat16}


class GraphCache:
    """The runners of a loss's attacks and the graphs of its updates. It keeps no model alive, and is never copied."""

    def __init__(self) -> None:
        self._runners: dict[bool, Runner] = {}  # by whether it may use streams
        self.updates: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()  # by model

    def runner(self, engine: Engine, x: Tensor) -> Runner:
        """Returns the runner of the engine's attack on images like x: eager without graphs."""
        if not (engine.graphs and device.has_graphs(x)):
            return run_eager
        if engine.streams not in self._runners:
            self._runners[engine.streams] = AutoRunner() if engine.streams else GraphRunner()
        return self._runners[engine.streams]

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphCache:
        return GraphCache()

    def __reduce__(self) -> tuple[type[GraphCache], tuple[()]]:
        return GraphCache, ()


def view_of(engine: Engine) -> Frozen | None:
    """Returns the view of the model that the engine's attack uses; None for the model itself."""
    if not (engine.fold or engine.channels_last or engine.compile or engine.attack_precision):
        return None
    dtype = DTYPES[engine.attack_precision] if engine.attack_precision else None
    return Frozen(fold=engine.fold, channels_last=engine.channels_last, autocast=dtype, compile=engine.compile)


def shared_cache(engine: Engine) -> GraphCache:
    """Returns the cache for all functions called with this engine, since a function has no cache of its own."""
    return _shared.setdefault(engine, GraphCache())


_shared: dict[Engine, GraphCache] = {}
