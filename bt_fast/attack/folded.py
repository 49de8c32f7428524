"""The folded view: a faster form of the model for the attack, during which the weights do not change.

In eval mode batch norm is `s·x + t` for each channel, so that after a convolution or a linear layer it can be folded
into that layer's weights: `bn(conv(x, W, b)) = conv(x, s·W, s·b + t)`. The view runs the model's own computation,
traced once, on folded weights, which `refresh` rewrites in place after the optimiser has moved the model.

A compiled model is traced as it was before, and an average of models as a model. A module that cannot be traced runs
as it is, inside the view. Not folded is a norm that does not directly follow one layer: in a pre-activation block the
first, since the sum before it is also the skip connection. (Its scale could pass through the relu into the next
convolution, but only while every scale is positive, and to know that is to wait for the device.)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from bt_fast.attack.folded_layers import FoldedLayer
from bt_fast.attack.folding import Folds, fold, is_leaf
from bt_fast.attack.forward import caller_autocast, eval_mode, uncached, uncompiled
from bt_fast.attack.memory_format import formatted, logits_in_format, needs_contiguous, takes_channels_last
from bt_fast.attack.tracing import NotFoldedError, Trace, first_line, hooked, trace
from bt_fast.attack.wrapped import gathered, unwrapped
from bt_fast.deprecated import renamed
from bt_fast.full_precision import full_precision
from bt_fast.untraced import untraced
from bt_fast.validation import check_kind
from bt_fast.warning import warn_caller

AGREEMENT = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass(frozen=True)
class Frozen:
    """How the attack's folded view of a model is made, which computes the same up to rounding: as `Engine` has it now.

    In the model's own precision rounding moves almost no pixel of x'. In 16 bits it flips the signs of many small
    gradients: it gives another x', by an attack of the same strength (docs/benchmarks.md has the figures).

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


class FoldedModel:
    """The folded view of one model. Call it inside `eval_mode(model)`.

    Attributes:
        reason: why the model runs as it is, or None where it runs folded.
        kept: by the name of each module that could not be traced and runs as it is inside the view, why.
        norms: how many batch norms are folded into the layer before them, and how many are not.
        channels_last: whether images are best given with the channel as the fastest index.
        independent: whether it reads no statistics of the model's own norms, so that a training forward of the model
            may move these while an attack runs on the view.
    """

    def __init__(self, model: nn.Module, recipe: Frozen, x: Tensor) -> None:
        """Traces the model and compares the view with it on `x` [n, ...]: waits for the device, once."""
        self._model = ref(model)
        self._recipe = recipe
        self.channels_last = recipe.channels_last and (recipe.fold or takes_channels_last(model, x))
        self._held = _held(model)
        self._folds: Folds | None = None
        self._folded: Callable[[Tensor], Tensor] | None = None
        self._decided: frozenset[str] = frozenset()
        self._form = _form(x)
        self.kept: dict[str, str] = {}
        self.norms = (0, 0)
        self._kinds = _kinds(self._held)
        self.independent = False
        self.reason = self._fold(model, x) if recipe.fold else "not asked to fold"
        if self._folds is None and recipe.fold:
            self.channels_last = recipe.channels_last and takes_channels_last(model, x)
        if recipe.compile:
            self._compile(model, x)

    def _fold(self, model: nn.Module, x: Tensor) -> str | None:
        """Traces the model; returns the reason if that is impossible."""
        try:
            traced, self._folds = _traced(model, self._formatted(x), self._precision(x), self.channels_last)
            self.refresh()
            with self._precision(x)() if "form" in traced.decides else uncached(x):
                _compare(model, traced.graph, self._formatted(x), self.channels_last)
        except NotFoldedError as error:
            self._folds = None
            if self.channels_last and needs_contiguous(error.__cause__):  # a module that runs as it is
                self.channels_last = False
                return self._fold(model, x)
            warn_caller(f"the attack runs on the model as it is, not folded: {error}")
            return str(error)
        for layer in self._folds.layers:
            if isinstance(layer, FoldedLayer) and layer.weight.dtype != torch.float64:  # which autocast leaves alone
                layer.to(self._recipe.autocast)  # once, not in every step
        self._folded, self._decided = traced.graph, traced.decides
        self.kept, self.norms = traced.kept, (self._folds.folded, self._folds.kept)
        norms = (m for m in model.modules() if isinstance(m, _NormBase))
        self.independent = not _read(traced.graph) & {id(buffer) for norm in norms for buffer in norm.buffers()}
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

    def as_they_are(self) -> list[nn.Module]:
        """The modules that run untraced in a call: all of the model, or the `kept` ones, whose numbers it reads."""
        if self._folded is None or self._folds is None:
            return [self.model]
        return [module for name, module in self.model.named_modules() if name in self.kept]

    @property
    def _layers(self) -> list[nn.Module]:
        return [] if self._folds is None else [*self._folds.layers]

    def fits(self, x: Tensor) -> bool:
        """Whether it is for images like x [n, ...]: where its forward decides by their shape, for this shape alone."""
        now = _form(x) if self._decided else {}
        return all(now[name] == self._form[name] for name in self._decided)

    @property
    def current(self) -> bool:
        """Whether the model consists of the modules and tensors that were traced, of the same kinds, without hooks."""
        model = self._model()
        if model is None or (self._folds is not None and hooked(model)):
            return False
        now = _held(model)
        same = len(now) == len(self._held) and all(a is b for a, b in zip(now, self._held, strict=True))
        return same and _kinds(now) == self._kinds

    def refresh(self) -> None:
        """Follow the model's weights and statistics, in place: nothing is traced anew."""
        if self._folds is not None:
            self._folds.refresh()

    def __call__(self, x: Tensor) -> Tensor:
        """Logits [n, K] of x [n, ...]."""
        run = self.model if self._folded is None else self._folded
        x = self._formatted(x)
        if self._recipe.autocast is None:
            return run(x)
        with self._precision(x)():
            return run(x)

    def _precision(self, x: Tensor) -> Callable[[], AbstractContextManager[object]]:
        """The autocast of a call."""
        if self._recipe.autocast is None:
            return lambda: uncached(x)
        # the cache of an outer autocast may hold the same weights cast to another dtype
        return lambda: torch.autocast(x.device.type, self._recipe.autocast, cache_enabled=False)

    def _formatted(self, x: Tensor) -> Tensor:
        contiguous = self._recipe.channels_last and not self.channels_last
        return x.contiguous() if contiguous else formatted(x, self.channels_last)


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
        yield _view_of(model, recipe, x)


@untraced
def _view_of(model: nn.Module, recipe: Frozen, x: Tensor) -> FoldedModel:
    """The view, up to date: a new one where there is none yet that fits."""
    views = _views.setdefault(model, {})
    view = views.get(recipe)
    with torch.inference_mode(False):  # of a caller: what a view keeps is for attacks, and for later ones
        if view is None or not view.current or not view.fits(x):
            view = views[recipe] = FoldedModel(model, recipe, x.clone())
        view.refresh()
    return view


def known_view(model: nn.Module, recipe: Frozen) -> FoldedModel | None:
    """Returns the view of a model by this recipe, or None."""
    return _views.get(model, {}).get(recipe)


def _held(model: nn.Module) -> list[object]:
    """Returns the modules and tensors of a trace. (A moved storage needs no new trace: the tensor is the same.)

    Modules are held by weak reference: a user's model may be one inside another.
    """
    _, *inner = model.modules()
    return [*map(ref, inner), *model.parameters(), *model.buffers()]


def _form(x: Tensor) -> dict[str, object]:
    """What the forward of a view may have decided by."""
    return {"form": (x.dtype, x.device, caller_autocast(x)), "shape": x.shape[1:]}


def _kinds(held: list[object]) -> list[tuple[torch.dtype, torch.device]]:
    """Returns dtypes and devices, since a parameter stays the same tensor when its module is cast or moved."""
    return [(t.dtype, t.device) for t in held if isinstance(t, Tensor)]


def _read(graph: fx.GraphModule) -> set[int]:
    """The ids of the buffers that a graph reads."""
    values = [
        operator.attrgetter(str(n.target))(graph) for n in graph.graph.nodes if n.op in ("get_attr", "call_module")
    ]
    return {id(t) for value in values for t in (value.buffers() if isinstance(value, nn.Module) else [value])}


def _traced(
    model: nn.Module, x: Tensor, precision: Callable[[], AbstractContextManager[object]], channels_last: bool
) -> tuple[Trace, Folds]:
    """The model's computation on folded layers, and these layers."""
    traced = trace(model, x, is_leaf, precision)
    try:
        folds = fold(traced.graph, channels_last)
    except Exception as error:  # of weights that do not go together, say: the model itself will raise it
        raise NotFoldedError(f"its weights cannot be folded ({first_line(error)})") from error
    return traced, folds


@torch.no_grad()
def _compare(model: nn.Module, graph: fx.GraphModule, x: Tensor, channels_last: bool) -> None:
    expected = logits_in_format(model, x, channels_last)
    try:
        same = _same(graph(x.clone()), expected)
    except Exception as error:
        raise NotFoldedError(f"its trace does not run ({first_line(error)})") from error
    if same:
        return
    try:  # in TF32 folded weights round to other bits: the logits may differ by more than the fold itself causes
        with full_precision(), uncompiled():
            same = _same(graph(x.clone()), logits_in_format(model, x, channels_last))
    except RuntimeError as error:  # of a model that reads the old setting of TF32
        raise NotFoldedError(f"it does not run in full precision ({first_line(error)})") from error
    if not same:
        raise NotFoldedError("its traced computation gives other logits than the model itself")


def _same(logits: Tensor, expected: Tensor) -> bool:
    room = AGREEMENT.get(expected.dtype, 0.0) * max(1.0, float(expected.abs().nan_to_num(0.0, 0.0).max()))
    return logits.shape == expected.shape and torch.allclose(logits, expected, rtol=0.0, atol=room, equal_nan=True)


_MOVED = {"FrozenModel": "bt_fast.attack.folded.FoldedModel", "hooked": "bt_fast.attack.tracing.hooked"}
_MOVED["NotFoldedError"] = "bt_fast.attack.tracing.NotFoldedError"

if not TYPE_CHECKING:  # a checker is to know the new name only
    __getattr__ = renamed(__name__, _MOVED)
