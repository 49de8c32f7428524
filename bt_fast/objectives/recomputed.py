"""The modes of an update, also where the caller's backward computes activations again (`torch.utils.checkpoint`).

Such a backward runs parts of the model once more, when the model is back in the modes that it had before the update.
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
    """In the block, the modes of an update: those that each module has, or train mode where all are in eval mode.

    `again_in_backward` of what is yielded has the backward of given tensors run in them too.
    """
    with modes_restored(model):
        before = modes_of(model)
        if not any(training for _, training in before):
            model.train()
        yield DeferredModes(model, before)


class DeferredModes:
    """A model's present modes, for a backward that comes when it is back in those `before`."""

    def __init__(self, model: nn.Module, before: Modes) -> None:
        self._model, self._modes = model, modes_of(model)
        self._differ = self._modes != before
        self._entered = False

    def again_in_backward(self, terms: Sequence[Tensor]) -> None:
        """Have every backward of these run in the present modes, and leave them at its end, or when it raises."""
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
        """Put the model back into the modes that it had before the first of its backwards under way."""
        if not self._entered:
            return
        self._entered = False
        depth, before = _entered.pop(self._model)
        if depth > 1:
            _entered[self._model] = depth - 1, before
        else:
            set_modes(before)


# of models with such a backward under way: how many there are, and the modes before the first
_entered: WeakKeyDictionary[nn.Module, tuple[int, Modes]] = WeakKeyDictionary()


class _AtTheEnd:
    """Called when a backward has ended; where it raised, torch only lets go of it."""

    def __init__(self, modes: DeferredModes) -> None:
        self._modes = modes

    def __call__(self) -> None:
        self._modes.leave()

    __del__ = __call__


class Recomputing:
    """In a `with` block, `seen` becomes whether a forward leaves something to its backward to compute again."""

    seen = False

    def __enter__(self) -> Recomputing:
        # a checkpoint, as all that decides about what is saved, comes by this way
        enter = self._enter = saved_tensors_hooks.__enter__

        def watched(hooks: saved_tensors_hooks) -> None:
            self.seen = True
            enter(hooks)

        saved_tensors_hooks.__enter__ = watched  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        saved_tensors_hooks.__enter__ = self._enter  # type: ignore[method-assign]
