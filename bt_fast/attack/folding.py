"""A traced graph with what its weights decide alone taken out of each step: into weights of its own.

In eval mode batch norm is `s·x + t` for each channel, and so is a product with, or a sum with, numbers that depend on
weights and buffers alone (a frozen norm, a layer's learnt scale). Directly behind a convolution or a linear layer they
are folded into it: `s·conv(x, W, b) + t = conv(x, s·W, s·b + t)`. What else is computed of weights alone (standardised
weights, a table of relative positions) is computed once for each attack.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bt_fast.attack.folded_layers import Affine, Constant, FoldedLayer, KeptNorm, Merge, Source, affine_of
from bt_fast.attack.weights import Values, Weights, argument

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_LAYER_FUNCTIONS = (F.conv1d, F.conv2d, F.conv3d, F.linear)
_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)  # in eval mode
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
_NORM_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
_AFFINE = {"mul": "mul", "multiply": "mul", "imul": "mul", "add": "add", "iadd": "add", "sub": "sub", "subtract": "sub"}
_AFFINE |= {"isub": "sub", "div": "div", "divide": "div", "truediv": "div", "itruediv": "div", "true_divide": "div"}


@dataclass(frozen=True, eq=False)
class Folds:
    """What a folded graph reads beside the model's own modules.

    Attributes:
        layers: each with tensors of its own.
        folded: how many batch norms are part of the layer before them.
        kept: how many are not.
    """

    layers: list[FoldedLayer | KeptNorm | Constant]
    weights: Weights
    folded: int
    kept: int

    @torch.no_grad()
    def refresh(self) -> None:
        """Follow the model's weights and statistics, in place."""
        with self.weights.uncast():
            values = self.weights.values()
            for layer in self.layers:
                layer.refresh(values)


def fold(graph: fx.GraphModule, channels_last: bool) -> Folds:
    """Fold the graph of a model in eval mode, in place. Its tensors are filled by a first `refresh`."""
    with torch.no_grad():
        return _Folding(graph, channels_last).run()


def is_leaf(module: nn.Module) -> bool:
    """Whether it is a layer or a batch norm that computes what torch's own does, of whatever class."""
    return _is_layer(module) or _has_statistics(module)


def batch_norms(module: nn.Module) -> int:
    """The number of batch norms in a module that use stored statistics in eval mode."""
    return sum(isinstance(m, _BatchNorm) and m.running_mean is not None for m in module.modules())


def _is_identity(module: nn.Module) -> bool:
    return type(module) in _IDENTITIES and "forward" not in vars(module)


def _is_layer(module: nn.Module | None) -> bool:
    kind: Any = next((kind for kind in _LAYERS if isinstance(module, kind)), None)
    if kind is None or module is None or type(module).forward is not kind.forward or "forward" in vars(module):
        return False
    return kind is nn.Linear or cast(Any, type(module))._conv_forward is kind._conv_forward


def _has_statistics(module: nn.Module | None) -> bool:
    """Whether it is a batch norm that uses stored statistics in eval mode."""
    as_torch = isinstance(module, _BatchNorm) and type(module).forward in _NORM_FORWARDS
    return as_torch and "forward" not in vars(module) and cast(Any, module).running_mean is not None


class _Folding:
    """The rewriting of one graph."""

    def __init__(self, graph: fx.GraphModule, channels_last: bool) -> None:
        self._graph, self._channels_last = graph, channels_last
        self._modules = dict(graph.named_modules(remove_duplicate=False))
        self._layers: list[FoldedLayer | KeptNorm | Constant] = []
        self._read: list[fx.Node] = []  # what the layers read of the weights
        self._folded = self._kept = 0

    def run(self) -> Folds:
        """Rewrite it."""
        self._leave_out_identities()
        if self._channels_last:
            self._reshape_views()
        self._weights = Weights(self._graph)
        self._values = self._weights.first
        for node in self._graph.graph.nodes:  # without those that the loop erases
            if node in self._values:
                continue
            if (source := self._source(node)) is not None:
                self._fold_into(node, source)
            elif (norm := self._norm(node)) is not None:
                self._keep(node, norm)
            elif node.op == "call_module":
                self._kept += batch_norms(self._modules[str(node.target)])
        self._take_out_constants()
        self._weights.keep(self._read)
        self._graph.delete_all_unused_submodules()
        self._graph.recompile()
        return Folds(self._layers, self._weights, self._folded, self._kept)

    def _leave_out_identities(self) -> None:
        """Take dropout, which does nothing in eval mode, out of the way of what follows it."""
        for node in self._graph.graph.nodes:
            of_module = node.op == "call_module" and _is_identity(self._modules[str(node.target)])
            of_function = node.target in _DROPOUTS and argument(node, 2, "training", True) is False
            if (of_module or of_function) and node.args and isinstance(node.args[0], fx.Node):
                node.replace_all_uses_with(node.args[0])
                self._graph.graph.erase_node(node)

    def _reshape_views(self) -> None:
        """Let what is viewed as another shape have its channel as the fastest index."""
        for node in self._graph.graph.nodes:
            views = node.op == "call_method" and node.target == "view" and not node.kwargs
            if views and not any(isinstance(a, torch.dtype) for a in node.args):
                node.target = "reshape"

    def _source(self, node: fx.Node) -> Source | None:
        """The weights of a layer, if the node is one."""
        if node.op == "call_module" and _is_layer(self._modules[str(node.target)]):
            return Source(self._modules[str(node.target)], None, None)
        if node.op != "call_function" or node.target not in _LAYER_FUNCTIONS:
            return None
        weight, bias = (argument(node, k, name) for k, name in ((1, "weight"), (2, "bias")))
        if not node.args or weight not in self._values or (bias is not None and bias not in self._values):
            return None
        if self._values[weight].dim() < 2:
            return None
        return Source(None, weight, bias)

    def _norm(self, node: fx.Node) -> Merge | None:
        """The affine function that a batch norm is, if the node is one with stored statistics."""
        if node.op == "call_module" and _has_statistics(self._modules[str(node.target)]):
            n: Any = self._modules[str(node.target)]
            return lambda _: affine_of([n.running_mean, n.running_var, n.weight, n.bias], n.eps)
        training = argument(node, 5, "training", False)
        if node.op != "call_function" or node.target is not F.batch_norm or training is not False or not node.args:
            return None
        names = ("running_mean", "running_var", "weight", "bias")
        tensors = [argument(node, k, name) for k, name in enumerate(names, start=1)]
        eps = argument(node, 7, "eps", 1e-5)
        if not isinstance(eps, float) or not all(t in self._values for t in tensors[:2]):
            return None
        if not all(t is None or t in self._values for t in tensors[2:]):
            return None
        self._read += [t for t in tensors if t is not None]
        return lambda values: affine_of([None if t is None else values[t] for t in tensors], eps)

    def _fold_into(self, node: fx.Node, source: Source) -> None:
        """Give the layer weights of its own, with all in them that can be folded into it."""
        weight, _ = source.now(self._values)
        merges: list[Merge] = []
        while len(node.users) == 1:
            (reader,) = node.users
            if (merge := self._merge(reader, node, weight)) is None:
                break
            merges.append(merge)
            reader.replace_all_uses_with(node)
            self._graph.graph.erase_node(reader)
        self._read += [n for n in (source.weight, source.bias) if n is not None]
        layer = FoldedLayer(source, merges, self._channels_last, self._values)
        name = self._add(layer)
        if source.module is not None:
            node.target = name
            return
        with self._graph.graph.inserting_before(node):
            tensors = [
                self._graph.graph.get_attr(f"{name}.{t}") for t in ("weight", "bias") if getattr(layer, t) is not None
            ]
        given = {k: v for k, v in node.kwargs.items() if k not in ("weight", "bias")}
        bias = tensors[1] if len(tensors) == 2 else None
        node.args, node.kwargs = (node.args[0], tensors[0], bias, *node.args[3:]), given

    def _merge(self, reader: fx.Node, node: fx.Node, weight: Tensor) -> Merge | None:
        """What the only reader of a layer's output does to it, if it is an affine function of each channel."""
        if reader.op == "output":
            return None
        if reader.args[:1] == (node,) and (norm := self._norm(reader)) is not None:
            scale, _ = norm(self._values)
            # one that sees more than [n, features] behind a linear layer is not this: the comparison refuses it
            if scale is None or len(scale) != len(weight):
                return None
            self._folded += 1
            return norm
        return self._arithmetic(reader, node, weight)

    def _arithmetic(self, reader: fx.Node, node: fx.Node, weight: Tensor) -> Merge | None:
        """The same for sums and products."""
        name = str(reader.target if reader.op == "call_method" else getattr(reader.target, "__name__", ""))
        kind = _AFFINE.get(name.removesuffix("_")) if reader.op in ("call_method", "call_function") else None
        if kind is None or reader.kwargs or len(reader.args) != 2:
            return None
        first, second = reader.args
        mirrored = second is node
        other = first if mirrored else second
        if (kind == "div" and mirrored) or not self._by_channel(other, weight):
            return None
        if isinstance(other, fx.Node):
            self._read.append(other)
        like = torch.empty(len(weight), dtype=weight.dtype, device=weight.device)
        return partial(_arithmetic, kind, mirrored, other, like)

    def _by_channel(self, other: Any, weight: Tensor) -> bool:
        """Whether it is a number, or one for each channel of the layer's output."""
        value = self._values.get(other) if isinstance(other, fx.Node) else other
        if not isinstance(value, Tensor):
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        if value.dtype != weight.dtype:  # the sum would have another
            return False
        spatial = weight.dim() - 2
        shape = list(value.shape)
        if shape[:1] == [1] and len(shape) == spatial + 2 and spatial:
            shape = shape[1:]
        channels = shape[:1] == [len(weight)] and shape[1:] == [1] * spatial and len(shape) == spatial + 1
        return value.dim() == 0 or channels

    def _keep(self, node: fx.Node, norm: Merge) -> None:
        """Leave a norm one, with numbers of its own."""
        self._kept += 1
        name = self._add(KeptNorm(norm, self._values))
        if node.op == "call_module":
            node.target = name
            return
        with self._graph.graph.inserting_before(node):
            kept = self._graph.graph.call_module(name, (node.args[0],))
        node.replace_all_uses_with(kept)
        self._graph.graph.erase_node(node)

    def _take_out_constants(self) -> None:
        """Put in what images do not change, and take away what computed it."""
        for node in self._graph.graph.nodes:
            value = self._values.get(node)
            users = [user for user in node.users if user not in self._values]
            if node not in self._values or not users:
                continue
            if not isinstance(value, Tensor):
                for user in users:
                    put = lambda n, node=node, value=value: _literal(value) if n is node else n  # noqa: E731
                    user.args, user.kwargs = fx.node.map_arg(user.args, put), fx.node.map_arg(user.kwargs, put)
            elif value.is_floating_point() and not (node.op == "get_attr" and not value.requires_grad):
                name = self._add(Constant(node, self._values))
                self._read.append(node)
                with self._graph.graph.inserting_before(node):
                    constant = self._graph.graph.get_attr(f"{name}.value")
                for user in users:
                    user.replace_input_with(node, constant)
        for node in reversed(self._graph.graph.nodes):
            if node in self._values and not node.users:
                self._graph.graph.erase_node(node)

    def _add(self, layer: FoldedLayer | KeptNorm | Constant) -> str:
        self._layers.append(layer)
        name = f"folded_{len(self._layers)}"
        self._graph.add_submodule(name, layer)
        return name


def _arithmetic(kind: str, mirrored: bool, other: Any, like: Tensor, values: Values) -> Affine:
    """The affine function `x (kind) other` of each channel, or `other (kind) x`."""
    c = torch.as_tensor(values[other] if isinstance(other, fx.Node) else other, dtype=like.dtype, device=like.device)
    c = c.reshape(-1).expand_as(like)
    if kind == "mul":
        return c, None
    if kind == "div":
        return 1 / c, None
    if kind == "sub":
        return (-torch.ones_like(c), c) if mirrored else (None, -c)
    return None, c


def _literal(value: Any) -> Any:
    """As a graph takes it."""
    return tuple(map(_literal, value)) if isinstance(value, (tuple, list)) else value
