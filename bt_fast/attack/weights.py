"""What a traced graph computes of weights and buffers alone: no image changes it, so no step has to compute it."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

Values = Mapping[fx.Node, Any]
_IMPURE = re.compile(r"rand|dropout|bernoulli|multinomial|binomial|poisson|^normal$|rrelu|gumbel|[^_]_$")


class Weights:
    """The nodes of a graph that no image changes, and what computes them."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self._steps: dict[fx.Node, _Step] = {}
        self.first: dict[fx.Node, Any] = {}  # their values when the graph was folded
        tensors = [*graph.parameters(), *graph.buffers()]
        self._kind = tensors[0].device.type if tensors else "cpu"
        with torch.no_grad(), self.uncast():
            for node in graph.graph.nodes:
                self._add(graph, node)

    def _add(self, graph: fx.GraphModule, node: fx.Node) -> None:
        step = _Step.of(graph, node)
        if step is None or not all(n in self.first for n in node.all_input_nodes):
            return
        if any(_changes(graph, user, node) for user in node.users):
            return
        try:
            value = step(self.first)
        except Exception:  # it raises in the graph, then
            return
        if isinstance(value, Tensor) or _is_plain(value):
            self._steps[node], self.first[node] = step, value

    def keep(self, nodes: Iterable[fx.Node]) -> None:
        """Compute from now on these nodes only."""
        waiting, kept = list(nodes), set()
        while waiting:
            node = waiting.pop()
            if node not in kept:
                kept.add(node)
                waiting += self._steps[node].reads
        self._steps = {node: step for node, step in self._steps.items() if node in kept}
        self.first = {}

    def values(self) -> Values:
        """What they are now."""
        now: dict[fx.Node, Any] = {}
        for node, step in self._steps.items():
            now[node] = step(now)
        return now

    def uncast(self) -> AbstractContextManager[object]:
        """No autocast: its cache would keep casts without gradient for the update."""
        enabled = torch.amp.is_autocast_available(self._kind) and torch.is_autocast_enabled(self._kind)
        return torch.autocast(self._kind, enabled=False) if enabled else nullcontext()


@dataclass(frozen=True, eq=False)
class _Step:
    """How a node is computed of weights."""

    run: Callable[..., Any]
    args: Any
    kwargs: Any
    reads: list[fx.Node]

    @classmethod
    def of(cls, graph: fx.GraphModule, node: fx.Node) -> _Step | None:
        """None for a node that may draw random numbers, change its arguments or do what is not torch's."""
        run: Any = node.target
        if node.op == "get_attr":
            value = operator.attrgetter(str(run))(graph)
            return cls(lambda: value, (), {}, []) if isinstance(value, Tensor) else None
        name = str(run if node.op == "call_method" else getattr(run, "__name__", ""))
        if node.op not in ("call_function", "call_method") or not node.all_input_nodes or _IMPURE.search(name):
            return None
        if node.op == "call_method":
            return cls(partial(_call, name), node.args, node.kwargs, node.all_input_nodes)
        if run is F.batch_norm and argument(node, 1, "running_mean") is not None:  # in train mode it would move it
            return None
        known = getattr(run, "__module__", None) or ""
        torchs = known.partition(".")[0] in ("torch", "_operator", "builtins", "math", "") and "out" not in node.kwargs
        return cls(run, node.args, node.kwargs, node.all_input_nodes) if torchs else None

    def __call__(self, values: Values) -> Any:
        args, kwargs = (fx.node.map_arg(a, values.__getitem__) for a in (self.args, self.kwargs))
        return self.run(*args, **kwargs)


def _call(name: str, value: Any, *args: Any, **kwargs: Any) -> Any:
    return getattr(value, name)(*args, **kwargs)


def argument(node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    """An argument of a traced call, by its place or its name."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device, torch.layout))


def _changes(graph: fx.GraphModule, user: fx.Node, node: fx.Node) -> bool:
    """Whether it may write into the value of the node that it uses."""
    if user.op == "call_module":
        return bool(getattr(graph.get_submodule(str(user.target)), "inplace", False))
    name = str(user.target if user.op == "call_method" else getattr(user.target, "__name__", ""))
    if name.startswith("__") or user.op == "output":
        return False
    first = bool(user.args) and user.args[0] is node
    in_place = (name.endswith("_") and first) or name in ("iadd", "isub", "imul", "itruediv", "setitem", "copy_")
    return in_place or user.kwargs.get("out") is node or bool(user.kwargs.get("inplace", False))
