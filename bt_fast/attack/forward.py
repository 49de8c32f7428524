"""A model's forward in an attack: its modes, its logits and the gradient of its images."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bt_fast.untraced import untraced
from bt_fast.validation import check_model

Modes = list[tuple[nn.Module, bool]]  # of a module and all modules in it, parents first: True in train mode


def modes_of(model: nn.Module) -> Modes:
    """Returns the train or eval mode of each module."""
    return [(module, module.training) for module in model.modules()]


def set_modes(modes: Modes) -> None:
    """Sets the mode of each module.

    Calls `train(mode)`, parents first, since some modules do work in it (adapters merge and unmerge their weights);
    then sets the flags exactly, since other modules refuse.
    """
    for module, training in modes:
        if module.training != training:
            module.train(training)
    for module, training in modes:
        module.training = training


def plain_values(model: nn.Module) -> tuple[tuple[str, object], ...]:
    """Returns modes, numbers and names in the model's modules, which a graph of its forward fixes besides tensors."""
    return tuple([item for module in model.modules() for item in vars(module).items() if type(item[1]) in _PLAIN])


_PLAIN = frozenset({bool, int, float, str, type(None)})


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """Restores the train or eval mode of every submodule at the end. TypeError if the model is not a module."""
    check_model(model)
    modes = modes_of(model)
    try:
        yield
    finally:
        set_modes(modes)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Sets the whole model to eval mode: batch-norm statistics are frozen, and no sample depends on its neighbours."""
    with modes_restored(model):
        model.eval()
        yield


def uncompiled() -> AbstractContextManager[object]:
    """Runs compiled modules as they were written. (If the compiler is not imported there are none.)"""
    compiled = "torch._dynamo" in sys.modules and not torch.compiler.is_compiling()
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def uncached(x: Tensor) -> AbstractContextManager[object]:
    """Disables the cache of cast weights in the caller's autocast on the device of x.

    A graph would outlive the cache, and an update needs casts that have a gradient.
    """
    dtype = caller_autocast(x)
    return nullcontext() if dtype is None else torch.autocast(x.device.type, dtype, cache_enabled=False)


def caller_autocast(x: Tensor) -> torch.dtype | None:
    """Returns the dtype of the caller's autocast on the device of x, or None."""
    kind = x.device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if enabled else None


@contextmanager
def training_modes(model: nn.Module) -> Iterator[None]:
    """The modes of an update: those that each module has, or train mode where all are in eval mode."""
    with modes_restored(model):
        if not any(module.training for module in model.modules()):
            model.train()
        yield


@contextmanager
def buffers_kept(model: nn.Module, *, after_errors_only: bool = False) -> Iterator[None]:
    """The model's buffers are afterwards the tensors, with the values, that they were; or only after an error."""
    modules = list(model.modules())
    before = [(m, name, b, b.detach().clone()) for m in modules for name, b in m._buffers.items() if b is not None]
    put_back = True
    try:
        yield
        put_back = not after_errors_only
    finally:
        for module, name, buffer, value in before if put_back else ():
            buffer.data.copy_(value)  # .data: an earlier loss may still await its backward
            module._buffers[name] = buffer  # some modules put a new tensor in its place


def logits_of(model: Callable[[Tensor], Tensor], x: Tensor, *, least: int = 2) -> Tensor:
    """`model(x)` of x [n, ...], checked: [n, K]. A model that changes its images in place changes a copy of them.

    Args:
        least: of K; 1 for outputs that need be no logits.

    Raises:
        TypeError: the model does not return a floating-point tensor.
        ValueError: the model does not return one row of at least two logits for each sample.
    """
    return checked_logits(model(x.clone()), len(x), least=least)


def checked_logits(logits: object, n: int, *, least: int = 2, where: str = "") -> Tensor:
    """A model's output for n images, if it is logits [n, K]; else the errors of `logits_of`, `where` in their text."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        kind = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        instead = "let its forward return the scores of the classes before any softmax, [n, K]"
        if (which := place_of_logits(logits, n)) is not None:
            instead = (
                f"write Logits(model, lambda output: output{which}), or of a loss logits=lambda output: output{which}"
            )
        raise TypeError(f"model must return a floating-point tensor of logits, got {kind}{where}: {instead}")
    if logits.dim() != 2 or len(logits) != n or logits.shape[1] < least:
        expected = f"logits of shape [{n}, K] with K >= 2 classes" if least > 1 else f"outputs of shape [{n}, d]"
        raise ValueError(
            f"model must return {expected}, got {list(logits.shape)}{where}: "
            "let its forward end with .flatten(1), and with a logit for each class"
        )
    return logits


def place_of_logits(returned: object, n: int) -> str | None:
    """Where in a tuple, dict or object that a model returned for n images its logits seem to be, as one writes it."""

    def fits(value: object) -> bool:
        return isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 2 and len(value) == n

    if isinstance(returned, Mapping):
        keys = [key for key, value in returned.items() if fits(value)]
        return f"[{'logits' if 'logits' in keys or not keys else keys[0]!r}]"
    if isinstance(returned, Sequence) and not isinstance(returned, str):
        return next((f"[{k}]" for k, value in enumerate(returned) if fits(value)), "[0]")
    return ".logits" if hasattr(returned, "logits") else None


@contextmanager
def reentrant_refused() -> Iterator[None]:
    """Makes `autograd.grad` raise ValueError for a model with reentrant checkpoints, which need `backward()`."""
    try:
        yield
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise ValueError(
            "model must not recompute activations by a reentrant checkpoint, which gives images no gradient: write "
            "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
        ) from error


def gradient_of(outputs: Tensor, x: Tensor, weights: Tensor | None = None, *, create_graph: bool = False) -> Tensor:
    """Returns the gradient of the model's `outputs` (times `weights` unless they are a number) by its images `x`.

    Raises:
        ValueError: the outputs have no gradient to the images, or a reentrant checkpoint lies between them.
    """
    grad = None
    if outputs.requires_grad:
        with reentrant_refused():
            (grad,) = torch.autograd.grad(outputs, x, weights, create_graph=create_graph, allow_unused=True)
    if grad is None:
        raise without_gradient()
    return grad


def without_gradient() -> ValueError:
    """Returns the error for a model that gives its images no gradient."""
    return ValueError(
        "model must return logits with a gradient to its images, but gave logits without one: "
        "take .detach(), torch.no_grad() or a rounding out of its forward"
    )


_in_float16: WeakKeyDictionary[Callable[[Tensor], Tensor], dict[object, bool]] = WeakKeyDictionary()


@untraced
def in_float16(model: Callable[[Tensor], Tensor], x: Tensor, logits: Tensor) -> bool:
    """Whether the gradient of the model's `logits` for x passes through float16, which loses small values.

    Walks the backward once for each model, kind of images and autocast, without compiled parts.
    """
    if logits.dtype in (torch.float16, torch.float64):
        return logits.dtype == torch.float16
    key = (x.dtype, logits.dtype, caller_autocast(x))
    known = _in_float16.setdefault(model, {})
    if key not in known:
        known[key] = any(dtype == torch.float16 for dtype in _dtypes_behind(logits))
    return known[key]


def _dtypes_behind(outputs: Tensor) -> Iterator[torch.dtype]:
    """Yields the dtypes of all gradients in a backward of `outputs`."""
    waiting, visited = [outputs.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        yield from (kind.dtype for kind in getattr(node, "_input_metadata", None) or () if kind is not None)
        waiting += [following for following, _ in node.next_functions]


def clean_logits(model: Callable[[Tensor], Tensor], x: Tensor, *, least: int = 2) -> Tensor:
    """The logits of clean samples for the attack, without gradient: computed once, not in every step."""
    with torch.no_grad(), uncached(x):
        return logits_of(model, x, least=least)
