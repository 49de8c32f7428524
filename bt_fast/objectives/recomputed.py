"""Activations that the caller's backward computes again (checkpoints): in the modes of the update, and told apart.

A forward under `torch.utils.checkpoint` keeps less than its backward needs, which runs parts of the model once more. By
then the model is back in the modes in which it was found.
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
    """The modes of an update: those in which each module was found, or, where all were found in eval mode, train mode.

    They are left with the block, whatever happens in it. `again_in_backward` of what is yielded has the backward of
    given tensors run in them too.
    """
    with modes_restored(model):
        found = modes_of(model)
        if not any(training for _, training in found):
            model.train()
        yield DeferredModes(model, found)


class DeferredModes:
    """A model's present modes, for a backward that comes when it has others."""

    def __init__(self, model: nn.Module, found: Modes) -> None:
        self._model, self._modes = model, modes_of(model)
        self._differ = any(now != before for (_, now), (_, before) in zip(self._modes, found, strict=True))
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
        depth, found = _entered.get(self._model, (0, []))
        _entered[self._model] = depth + 1, found or [(module, module.training) for module, _ in self._modes]
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(_AtTheEnd(self))
        set_modes(self._modes)

    def leave(self) -> None:
        """Put the model back into the modes in which the first of its backwards under way has found it."""
        if not self._entered:
            return
        self._entered = False
        depth, found = _entered.pop(self._model)
        if depth > 1:
            _entered[self._model] = depth - 1, found
        else:
            set_modes(found)


# of models with such a backward under way: how many there are, and in which modes the first has found it
_entered: WeakKeyDictionary[nn.Module, tuple[int, Modes]] = WeakKeyDictionary()


class _AtTheEnd:
    """Called when a backward has ended; where it raised, torch only lets go of it."""

    def __init__(self, modes: DeferredModes) -> None:
        self._modes = modes

    def __call__(self) -> None:
        self._modes.leave()

    def __del__(self) -> None:
        self._modes.leave()


class Recomputing:
    """Whether a forward leaves something to its backward to compute again.

    with Recomputing() as watched:
        logits = model(x)
    watched.seen
    """

    def __init__(self) -> None:
        self.seen = False

    def __enter__(self) -> Recomputing:
        # a checkpoint, as whatever else has a word in what is saved, comes by this way
        enter = self._enter = saved_tensors_hooks.__enter__

        def watched(hooks: saved_tensors_hooks) -> None:
            self.seen = True
            enter(hooks)

        saved_tensors_hooks.__enter__ = watched  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        saved_tensors_hooks.__enter__ = self._enter  # type: ignore[method-assign]
