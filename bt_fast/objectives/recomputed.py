"""The modes of an update, also when the caller's backward recomputes activations (`torch.utils.checkpoint`).

That backward runs parts of the model again, after the model's modes have been restored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from bt_fast.attack.forward import Modes, modes_of, modes_restored, set_modes


@contextmanager
def update_modes(model: nn.Module) -> Iterator[DeferredModes]:
    """Sets the modes of an update in the block: each module's own, or train mode if all are in eval mode.

    With `again_in_backward` of the yielded object, the backward of given tensors also runs in them.
    """
    with modes_restored(model):
        before = modes_of(model)
        if not any(training for _, training in before):
            model.train()
        yield DeferredModes(model, before)


class DeferredModes:
    """A model's current modes, for a backward that comes when the modes `before` are restored."""

    def __init__(self, model: nn.Module, before: Modes) -> None:
        self._model, self._modes = model, modes_of(model)
        self._differ = self._modes != before
        self._entered = False

    def again_in_backward(self, terms: Sequence[Tensor]) -> None:
        """Makes every backward of these run in the current modes, and leave them at its end, or when it raises."""
        for term in terms if self._differ else ():
            if term.grad_fn is not None:
                term.grad_fn.register_prehook(self._enter)

    def _enter(self, gradients: tuple[Tensor, ...]) -> None:
        if self._entered:
            return
        self._entered = True
        depth, before = _entered.get(self._model, (0, []))
        _entered[self._model] = depth + 1, before or [(module, module.training) for module, _ in self._modes]
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(_AtTheEnd(self))
        set_modes(self._modes)

    def leave(self) -> None:
        """Restores the modes that the model had before the first of its running backwards."""
        if not self._entered:
            return
        self._entered = False
        depth, before = _entered.pop(self._model)
        if depth > 1:
            _entered[self._model] = depth - 1, before
        else:
            set_modes(before)


# for each model with a running backward: how many there are, and the modes before the first
_entered: WeakKeyDictionary[nn.Module, tuple[int, Modes]] = WeakKeyDictionary()


class _AtTheEnd:
    """Called when a backward has ended; if it raised, torch only frees this object."""

    def __init__(self, modes: DeferredModes) -> None:
        self._modes = modes

    def __call__(self) -> None:
        self._modes.leave()

    __del__ = __call__


class Recomputing:
    """Detects in a `with` block, as `seen`, whether a forward leaves something for its backward to recompute."""

    seen = False

    def __enter__(self) -> Recomputing:
        # a checkpoint, like everything that decides what is saved, enters this context
        enter = self._enter = saved_tensors_hooks.__enter__

        def watched(hooks: saved_tensors_hooks) -> None:
            self.seen = True
            enter(hooks)

        saved_tensors_hooks.__enter__ = watched  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        saved_tensors_hooks.__enter__ = self._enter  # type: ignore[method-assign]
