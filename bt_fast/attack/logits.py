"""Models whose forward returns a tuple, a dict or an object: a module in front of one selects its logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, fx, nn

from bt_fast.attack.forward import place_of_logits
from bt_fast.attack.wrapped import Fronted, Lent, unwrapped
from bt_fast.ops.numeric import kind_of
from bt_fast.untraced import untraced
from bt_fast.validation import check_model

Select = Callable[[Any], Tensor]


class SelectError(TypeError, ValueError):
    """A `select` that raises, or that does not return logits."""


class Logits(Fronted):
    """A model of which `select` takes the logits: `Logits(model, lambda output: output["logits"])`.

    For models that return a tuple, a dict or an object. Make it once, before the loop, and give it to `perturb`,
    `evaluate` and losses in the model's place: folded views and graphs are kept for this object. (A loss makes its own
    by `logits=select`.) It has no state but the model's: parameters and modes are the model's own, so optimizers,
    averages and `model.train()` go on as they were. Save `model.state_dict()`: that of this module has the same
    tensors under `model.`. The model may be wrapped by `DistributedDataParallel`, sharded or compiled.

    Args:
        model: maps [n, ...] to any output.
        select: a function of that output that returns floating point [n, K]; it should only look things up.

    Raises:
        TypeError: the model is no module, or select no function. Called, a `TypeError` that is a `ValueError` too:
            select raised, or did not return a floating-point tensor [n, K].
    """

    def __init__(self, model: nn.Module, select: Select) -> None:
        super().__init__()
        check_model(model)
        check_select("select", select)
        self.model, self.select = model, select
        self._inside: tuple[Logits, ...] = ()  # in a tuple, so that it is no submodule

    @property
    def training(self) -> bool:
        """The model's own mode: its `eval()` need not know of this module."""
        model = self._modules.get("model")
        return model is None or model.training

    @training.setter
    def training(self, mode: bool) -> None:
        """The model has it."""

    @property
    def unwrapped(self) -> nn.Module:
        """The one in front of the module that the model wraps, always the same; itself where it wraps none."""
        inside = unwrapped(self.model)
        if inside is self.model:
            return self
        if not self._inside or self._inside[0].model is not inside:
            self._inside = (Logits(inside, self.select),)
        return self._inside[0]

    def forward(self, x: Tensor) -> Tensor:
        """The logits [n, K] of x [n, ...]."""
        return _selected(self.select, self.model(x), x)


class LentLogits(Lent):
    """A loss's `Logits`, in front of one model while the loss is computed."""

    def __init__(self, select: Select) -> None:
        super().__init__()
        self.select = select

    def forward(self, x: Tensor) -> Tensor:
        """The logits [n, K] of x [n, ...]."""
        return _selected(self.select, self.model(x), x)


class Selection:
    """What stands in front of a loss's models: one module for each, that does not keep the model. It is never copied.

    TypeError unless `select`, the loss's `logits`, is a function.
    """

    def __init__(self, select: Select) -> None:
        check_select("logits", select)
        self.select = select
        self._fronts: WeakKeyDictionary[nn.Module, LentLogits] = WeakKeyDictionary()

    @contextmanager
    def in_front_of(self, model: nn.Module) -> Iterator[nn.Module]:
        """In the block, a module that returns the logits of the model."""
        check_model(model)
        inner = unwrapped(model)
        front, inside = self._front_of(model), self._front_of(inner)
        with inside.holding(inner, inside), front.holding(model, inside):
            yield front

    @untraced
    def _front_of(self, model: nn.Module) -> LentLogits:
        return self._fronts.setdefault(model, LentLogits(self.select))

    def __deepcopy__(self, memo: dict[int, Any]) -> Selection:
        return Selection(self.select)

    def __reduce__(self) -> tuple[type[Selection], tuple[Select]]:
        return Selection, (self.select,)


def check_select(name: str, select: object) -> None:
    """Raise TypeError that names `name` unless it is a function."""
    if isinstance(select, type) or not callable(select):
        raise TypeError(
            f"{name} must be a function of the model's output, got {kind_of(select)}: "
            f"write {name}=lambda output: output['logits']"
        )


def _selected(select: Select, returned: object, x: Tensor | fx.Proxy) -> Tensor:
    """The logits of x in what the model returned for it. SelectError if they are none."""
    if isinstance(x, fx.Proxy):  # a trace, which is compared with the model itself
        return select(returned)
    try:
        logits: object = select(returned)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise SelectError(
            f"select must take the logits out of the model's output, but raised {why}: {_instead(returned, x)}"
        ) from error
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        got = kind_of(logits)
    elif logits.dim() != 2 or len(logits) != len(x):
        got = f"shape {list(logits.shape)}"
    else:
        return logits
    expected = "the logits, a floating-point tensor [n, K]"
    raise SelectError(f"select must return {expected}, got {got} for {len(x)} images: {_instead(returned, x)}")


def _instead(returned: object, x: Tensor) -> str:
    """What to write for what a model returned."""
    if isinstance(returned, Tensor):
        return "the model returns a tensor: leave select out"
    kind = type(returned).__name__
    if isinstance(returned, dict):
        kind = f"{kind} with the keys {', '.join(map(repr, returned))}"
    elif isinstance(returned, (tuple, list)):
        kind = f"{kind} of {len(returned)}"
    return f"of a {kind} write lambda output: output{place_of_logits(returned, len(x)) or '.logits'}"
