"""The folded view: a faster form of the model for the attack, during which the weights do not change.

In eval mode batch norm is `s·x + t` for each channel, so that after a convolution or a linear layer it can be folded
into that layer's weights: `bn(conv(x, W, b)) = conv(x, s·W, s·b + t)`. The view runs the model's own computation,
traced once, on folded weights, which `refresh` rewrites in place after the optimiser has moved the model.

A compiled model is traced as it was before compilation, and an average of models like a model. A norm is not folded if
it does not directly follow one layer: for example the first of a pre-activation block, since the sum before it is also
the skip connection. (Its scale could pass through the relu into the next convolution, but only while every scale is
positive, which cannot be known without waiting for the device.)
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.swa_utils import AveragedModel

from bt_fast.attack.forward import eval_mode, logits_of, uncached, uncompiled
from bt_fast.attack.wrapped import gathered, unwrapped
from bt_fast.deprecated import renamed
from bt_fast.full_precision import full_precision
from bt_fast.validation import check_kind
from bt_fast.warning import warn_caller

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_POOLS = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_REMEDY = (
    "what is traced must not decide by the images' values: decide by their shape, or put what decides into a function "
    "marked by torch.fx.wrap"
)
AGREEMENT = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass(frozen=True)
class Frozen:
    """The folded view of a model in the attack: each choice changes its gradients by rounding only.

    In the model's own precision rounding moves almost no pixel of x'. In 16 bits it flips the signs of many small
    gradients: it gives another x', by an attack of the same strength (the README has the figures).

    Attributes:
        fold: batch norm becomes part of the layer before it.
        channels_last: images and convolution weights have the channel as the fastest index.
        autocast: torch.bfloat16 or torch.float16 for the attack's forwards and backwards, regardless of the caller's
            autocast; None for the caller's, or without one the model's own precision.
        compile: `torch.compile` of the view (takes tens of seconds once; batch sizes are dynamic).

    Raises:
        TypeError: autocast is neither of the two dtypes nor None.
    """

    fold: bool = True
    channels_last: bool = True
    autocast: torch.dtype | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        if self.autocast not in (None, torch.bfloat16, torch.float16):
            raise TypeError(
                f"autocast must be torch.bfloat16, torch.float16 or None, got {self.autocast}: "
                "write Frozen(autocast=torch.bfloat16)"
            )


class _FoldedLayer(nn.Module):
    """A convolution or linear layer with its own weights, without gradients; a norm after it is folded in."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: Any, norm: Any, channels_last: bool) -> None:
        super().__init__()
        self._source = (layer, norm)  # in a tuple, so that they do not become submodules of the view
        weight = layer.weight.detach()
        last = channels_last and weight.dim() == 4
        memory_format = torch.channels_last if last else torch.preserve_format
        self.register_buffer("weight", weight.clone(memory_format=memory_format))
        has_bias = layer.bias is not None or norm is not None
        self.register_buffer("bias", weight.new_zeros(len(weight)) if has_bias else None)

    def forward(self, x: Tensor) -> Tensor:
        layer, _ = self._source
        if isinstance(layer, nn.Linear):
            return F.linear(x, self.weight, self.bias)
        return cast(Tensor, layer._conv_forward(x, self.weight, self.bias))

    def refresh(self) -> None:
        """Copies the current weights."""
        layer, norm = self._source
        weight, bias = layer.weight, layer.bias
        if norm is None:
            self.weight.copy_(weight)
        else:
            scale, shift = _affine(norm)
            torch.mul(weight, scale.view(-1, *[1] * (weight.dim() - 1)), out=self.weight)
            bias = shift if bias is None else shift.addcmul_(bias, scale)
        if self.bias is not None:
            self.bias.copy_(bias)


class _KeptNorm(nn.Module):
    """A norm that is not folded: `s·x + t` with its own numbers, without gradients to its parameters."""

    scale: Tensor
    shift: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self._source = (norm,)
        for name, value in (("scale", 1.0), ("shift", 0.0), ("mean", 0.0), ("variance", 1.0)):
            self.register_buffer(name, torch.full_like(norm.running_mean, value))

    def forward(self, x: Tensor) -> Tensor:
        # without `F.batch_norm`, which in torch 2.11 refuses an eps of 0
        on = torch.backends.cudnn.enabled
        return torch.batch_norm(x, self.scale, self.shift, self.mean, self.variance, False, 0.0, 0.0, on)

    def refresh(self) -> None:
        """Copies the current statistics and parameters."""
        scale, shift = _affine(self._source[0])
        self.scale.copy_(scale)
        self.shift.copy_(shift)


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Returns s and t of the norm in eval mode, `s·x + t`, as new tensors [channels]."""
    scale = (norm.running_var + norm.eps).rsqrt_()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift.add_(norm.bias)


class NotFoldedError(Exception):
    """Raised with the reason why a model cannot be folded."""


class FoldedModel:
    """The folded view of one model. Call it inside `eval_mode(model)`.

    Attributes:
        reason: why the model runs unfolded, or None if it runs folded.
        channels_last: whether images should have the channel as the fastest index.
        independent: whether it reads no statistics of the model's norms, so that a training forward of the model may
            change them while an attack runs on the view.
    """

    def __init__(self, model: nn.Module, recipe: Frozen, x: Tensor) -> None:
        """Traces the model and compares the view with it on `x` [n, ...]: waits for the device, once."""
        self._model = ref(model)
        self._recipe = recipe
        self.channels_last = recipe.channels_last
        self._held = _held(model)
        self._layers: list[_FoldedLayer | _KeptNorm] = []
        self._folded: Callable[[Tensor], Tensor] | None = None
        self._kinds = _kinds(self._held)
        self.independent = False
        self.reason = self._fold(model, x) if recipe.fold else "not asked to fold"
        if recipe.compile:
            self._compile(model, x)

    def _fold(self, model: nn.Module, x: Tensor) -> str | None:
        """Traces the model; returns the reason if that is impossible."""
        try:
            graph, self._layers = _traced(model, self._recipe.channels_last)
            self.refresh()
            with uncached(x):
                _compare(model, graph, self._formatted(x))
        except NotFoldedError as error:
            self._layers = []
            warn_caller(f"the attack runs on the model as it is, not folded: {error}")
            return str(error)
        for layer in self._layers:
            if isinstance(layer, _FoldedLayer) and layer.weight.dtype != torch.float64:  # autocast leaves float64 alone
                layer.to(self._recipe.autocast)  # once, not in every step
        self._folded = graph
        read = {id(buffer) for buffer in graph.buffers()}
        norms = (m for m in model.modules() if isinstance(m, _NormBase))
        self.independent = not any(id(buffer) in read for norm in norms for buffer in norm.buffers())
        return None

    def _compile(self, model: nn.Module, x: Tensor) -> None:
        """Compiles forward and backward now, so that a failure is known now."""
        plain = self._folded
        self._folded = torch.compile(model if plain is None else plain, dynamic=True)  # for prefixes of many sizes
        leaf = x.detach().clone().requires_grad_()
        try:
            with torch.enable_grad():
                torch.autograd.grad(self(leaf).float().sum(), leaf)
        except Exception as error:  # any error of the compiler, or a missing C++ compiler
            why = " ".join(str(error).splitlines()[:2])  # the second line names what the backend raised
            warn_caller(f"the attack's view of the model is not compiled: {type(error).__name__}: {why}")
            self._folded = plain

    @property
    def model(self) -> nn.Module:
        """The model that this is a view of."""
        model = self._model()
        assert model is not None, "the model is gone"
        return model

    def tensors(self) -> list[Tensor]:
        """All tensors that a call reads."""
        folded = [t for layer in self._layers for t in layer.buffers()]
        return [*folded, *(t for t in self._held if isinstance(t, Tensor))]

    @property
    def current(self) -> bool:
        """Whether the model consists of the modules and tensors that were traced, of the same kinds, without hooks."""
        model = self._model()
        if model is None or (self._layers and hooked(model)):
            return False
        now = _held(model)
        same = len(now) == len(self._held) and all(a is b for a, b in zip(now, self._held, strict=True))
        return same and _kinds(now) == self._kinds

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the model's current weights and statistics, in place: nothing is traced or allocated."""
        for layer in self._layers:
            layer.refresh()

    def __call__(self, x: Tensor) -> Tensor:
        """Logits [n, K] of x [n, ...]."""
        run = self.model if self._folded is None else self._folded
        x = self._formatted(x)
        if self._recipe.autocast is None:
            return run(x)
        # the cache of an outer autocast may hold the same weights cast to another dtype
        with torch.autocast(x.device.type, self._recipe.autocast, cache_enabled=False):
            return run(x)

    def _formatted(self, x: Tensor) -> Tensor:
        last = self.channels_last and x.dim() == 4
        return x.contiguous(memory_format=torch.channels_last) if last else x


def independent(view: Callable[[Tensor], Tensor]) -> bool:
    """Whether a training forward of the model may run beside calls of this view."""
    return isinstance(view, FoldedModel) and view.independent


_views: WeakKeyDictionary[nn.Module, dict[Frozen, FoldedModel]] = WeakKeyDictionary()


@contextmanager
def attack_model(model: nn.Module, recipe: Frozen | None, x: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yields the view of the model by this recipe, up to date and in eval mode; without a recipe the model itself.

    Args:
        x: [n, ...], n ≥ 1, a batch on which a new view is compared with the model.

    Raises:
        TypeError: the recipe is not a `Frozen`, the model not a module, or its output not logits.
    """
    check_kind("frozen", recipe, Frozen, "write frozen=Frozen()", optional=True)
    model = unwrapped(model)
    with eval_mode(model), gathered(model):
        if recipe is None:
            yield model
            return
        views = _views.setdefault(model, {})
        view = views.get(recipe)
        if view is None or not view.current:
            view = views[recipe] = FoldedModel(model, recipe, x)
        view.refresh()
        yield view


def known_view(model: nn.Module, recipe: Frozen) -> FoldedModel | None:
    """Returns the view of a model by this recipe, or None."""
    return _views.get(model, {}).get(recipe)


def _held(model: nn.Module) -> list[object]:
    """Returns the modules and tensors of a trace. (A moved storage needs no new trace: the tensor is the same.)

    Modules are held by weak reference: a user's model may be one inside another.
    """
    _, *inner = model.modules()
    return [*map(ref, inner), *model.parameters(), *model.buffers()]


def _kinds(held: list[object]) -> list[tuple[torch.dtype, torch.device]]:
    """Returns dtypes and devices, since a parameter stays the same tensor when its module is cast or moved."""
    return [(t.dtype, t.device) for t in held if isinstance(t, Tensor)]


def _traced(model: nn.Module, channels_last: bool) -> tuple[fx.GraphModule, list[_FoldedLayer | _KeptNorm]]:
    """Returns the model's computation on folded layers, and these layers."""
    if name := hooked(model):
        raise NotFoldedError(f"{name} has a hook, which a folded model would not run")
    try:
        tracer = _Tracer()
        traced = tracer.trace(_of_images_alone(_as_written(model)))
        for node in traced.nodes:
            node.meta.pop("is_wrapped", None)  # else the code would look up the pools by a name that no module has
        graph = fx.GraphModule(tracer.root, traced)
    except Exception as error:  # any error of the model's own code on a proxy
        raise NotFoldedError(f"it cannot be traced: {_where(error)}{_first_line(error)}; {_REMEDY}") from error
    modules = dict(graph.named_modules(remove_duplicate=False))
    layers: list[_FoldedLayer | _KeptNorm] = []
    for node in graph.graph.nodes:  # without nodes that the loop erases
        module = modules[node.target] if node.op == "call_module" else None
        if type(module) in _LAYERS:
            norm_node = _norm_after(node, modules)
            norm = None if norm_node is None else modules[str(norm_node.target)]
            layers.append(_FoldedLayer(module, norm, channels_last))
            if norm_node is not None:
                norm_node.replace_all_uses_with(node)
                graph.graph.erase_node(norm_node)
        elif _has_statistics(module):
            layers.append(_KeptNorm(module))
        else:
            continue
        node.target = f"folded_{len(layers)}"
        graph.add_submodule(node.target, layers[-1])
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph.eval(), layers


class _ImagesAlone(nn.Module):
    """Calls a model with its images only, so that other arguments of its forward have their defaults."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.model(x))


def _of_images_alone(model: nn.Module) -> nn.Module:
    """Returns the model if its forward takes only images, else a wrapper of it."""
    parameters = inspect.signature(model.forward).parameters
    return model if len(parameters) == 1 else _ImagesAlone(model).train(model.training)


def _where(error: Exception) -> str:
    """Returns the model's own line that raised an error, if there is one."""
    ours = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))
    lines = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((*ours, "<"))]
    return f"line {lines[-1].lineno} of {Path(lines[-1].filename).name}, `{lines[-1].line}`: " if lines else ""


class _Tracer(fx.Tracer):
    """Traces into compiled modules, and permits a traced value as a pool's size."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=_POOLS)
        self._autowrap_search.append(F)  # torch 2.6 accepts only numbers unless the functions are wrapped

    def call_module(
        self, m: nn.Module, forward: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]
    ) -> object:
        """Like `fx.Tracer`, but runs the Python code of a compiled module."""
        written = _as_written(m)  # a module compiled in place would call its compiled code
        if written is not m or m._compiled_call_impl is not None:
            forward = written._call_impl
        return super().call_module(written, forward, args, kwargs)


def _as_written(module: nn.Module) -> nn.Module:
    """Returns the module inside a compiled module or an `AveragedModel` (which has a forward with any arguments)."""
    while True:
        # the class of compiled modules would import the compiler
        inner = module.module if type(module) is AveragedModel else getattr(module, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def hooked(model: nn.Module) -> str | None:
    """Returns the name of a module with a hook, or None."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = model.named_modules()
    return next((name or "the model" for name, module in modules if any(getattr(module, k) for k in kinds)), None)


def _norm_after(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | None:
    """Returns the norm that is the only reader of a layer's output, if it can be folded into the layer."""
    (reader, *others) = node.users or (None,)
    if others or reader is None or reader.op != "call_module" or reader.args != (node,):
        return None
    norm, layer = modules.get(str(reader.target)), modules[str(node.target)]
    # BatchNorm1d after a linear layer on more than [n, features] differs from its folded form: `_compare` refuses it
    same = isinstance(norm, nn.BatchNorm1d) == isinstance(layer, (nn.Linear, nn.Conv1d))
    return reader if _has_statistics(norm) and same else None


def _has_statistics(module: nn.Module | None) -> bool:
    """Whether it is a batch norm that uses stored statistics in eval mode."""
    return type(module) in _NORMS and module.running_mean is not None  # type: ignore[union-attr]


@torch.no_grad()
def _compare(model: nn.Module, graph: fx.GraphModule, x: Tensor) -> None:
    expected = logits_of(model, x)
    try:
        same = _same(graph(x.clone()), expected)
    except Exception as error:
        raise NotFoldedError(f"its trace does not run ({_first_line(error)})") from error
    if same:
        return
    try:  # in TF32 folded weights round to other bits: the logits may differ by more than the fold itself causes
        with full_precision(), uncompiled():
            same = _same(graph(x.clone()), logits_of(model, x))
    except RuntimeError as error:  # from a model that reads the old setting of TF32
        raise NotFoldedError(f"it does not run in full precision ({_first_line(error)})") from error
    if not same:
        raise NotFoldedError("its traced computation gives other logits than the model itself")


def _same(logits: Tensor, expected: Tensor) -> bool:
    room = AGREEMENT.get(expected.dtype, 0.0) * max(1.0, float(expected.abs().nan_to_num(0.0, 0.0).max()))
    return logits.shape == expected.shape and torch.allclose(logits, expected, rtol=0.0, atol=room, equal_nan=True)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


if not TYPE_CHECKING:  # a type checker should know only the new name
    __getattr__ = renamed(__name__, {"FrozenModel": "bt_fast.attack.folded.FoldedModel"})
