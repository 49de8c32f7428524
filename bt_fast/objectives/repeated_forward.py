"""Replays a second training forward of the same batch without running it.

The TRADES code runs `h(x)` twice in one update. The second run gives the same logits and moves the batch-norm buffers
by the same batch statistics, so it can be replayed from what the first one did to them: exactly, unless the forward
draws random numbers (dropout) or keeps other state, in which case it must run again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeGuard, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bt_fast.attack.device import RandomStates, device_generator, host_generator
from bt_fast.attack.forward import logits_of
from bt_fast.attack.wrapped import unwrapped
from bt_fast.objectives.recomputed import Recomputing
from bt_fast.ops import wide
from bt_fast.untraced import untraced

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_BATCH_NORM_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
_Statistics = list[Tensor]  # the values of a layer's `_BUFFERS`
_Modes = tuple[bool, ...]

# whether a model's forward in given modes changes none of its other buffers: decided once, since comparing values waits
_leaves_alone: WeakKeyDictionary[nn.Module, dict[_Modes, bool]] = WeakKeyDictionary()


class RepeatedForward:
    """Watches one forward of a model in its current modes, then decides whether a repetition can be replayed.

        repeat = RepeatedForward(model, x.device)    # before h(x)
        with repeat.first():
            logits = model(x)
        ...                                          # any other forwards
        if repeat.replayable: repeat.replay()        # the buffers as after another h(x), whose logits are `logits`
        else: logits_again = model(x)

    Randomness is detected only in torch's default generators, and state only in the model's buffers. The first forward
    of a model in its current modes compares other buffers by value, which on a GPU waits for the device.

    Args:
        replayable: the answer, if known: then the host checks nothing, and a graph can capture everything.

    Attributes:
        replayable: whether a replay has all effects of a second forward.
        recomputed: whether the backward runs parts of the forward again: with a second forward it would run them twice.
    """

    def __init__(self, model: nn.Module, device: torch.device, replayable: bool | None = None) -> None:
        model = unwrapped(model)
        self.replayable, self.recomputed = bool(replayable), False
        self._layers = [] if replayable is False else [m for m in model.modules() if _is_tracking_batch_norm(m)]
        self._before = [_copied_statistics(layer) for layer in self._layers]
        self._after: list[_Statistics] = []
        self._watch = _watch(model, device, self._layers) if replayable is None else None

    @contextmanager
    def first(self) -> Iterator[None]:
        """Records the effects of the first forward."""
        with Recomputing() as watched:
            yield
        self.recomputed = watched.seen
        self._after = [_copied_statistics(layer) for layer in self._layers]
        if self._watch is not None:
            self.replayable = self._watch.repeatable()

    def replay(self) -> None:
        """Moves the batch-norm buffers as the same forward would again. Never waits for the device."""
        for layer, before, after in zip(self._layers, self._before, self._after, strict=True):
            _replay(layer, before, after)


class _Watch:
    """Detects, as far as the host can see, that a forward does more than move the buffers of `layers`."""

    def __init__(self, model: nn.Module, device: torch.device, layers: list[_BatchNorm]) -> None:
        self._model = model
        self._moved = {id(buffer) for layer in layers for buffer in _statistics(layer)}
        means = [id(layer.running_mean) for layer in layers]
        self._shared = len(means) > len(set(means))  # some layers move the same tensor in turn
        self._modes = _modes(model)
        self._versions = self._other_versions()
        known = _leaves_alone.setdefault(model, {})
        self._values = None if self._modes in known else {k: b.clone() for k, b in self._other_buffers().items()}
        self._random = RandomStates(host_generator(device), device_generator(device))

    @untraced
    def repeatable(self) -> bool:
        """Whether the forward since then did nothing that a replay would omit."""
        known = _leaves_alone[self._model]
        if self._values is not None:
            others = self._other_buffers()
            known[self._modes] = all(_same(others.get(name), value) for name, value in self._values.items())
        unchanged = known[self._modes] and self._other_versions() == self._versions
        return unchanged and not self._random.moved and not self._shared

    def _other_buffers(self) -> dict[str, Tensor]:
        """Returns all buffers except those that `replay` moves."""
        return {name: b for name, b in self._model.named_buffers() if id(b) not in self._moved}

    def _other_versions(self) -> dict[str, tuple[int, int]]:
        """Returns the identity and version of each other buffer: what the host can see of a change."""
        return {name: (id(b), b._version) for name, b in self._other_buffers().items()}


@untraced
def _watch(model: nn.Module, device: torch.device, layers: list[_BatchNorm]) -> _Watch:
    return _Watch(model, device, layers)


def watched_forward(model: nn.Module, x: Tensor) -> Tensor:
    """Returns the checked logits of `x`; afterwards `moves_batch_norm_alone` knows the answer."""
    if _known(unwrapped(model)) is not None:
        return logits_of(model, x)
    watch = RepeatedForward(model, x.device)
    with watch.first():
        return logits_of(model, x)


def moves_batch_norm_alone(model: nn.Module) -> bool:
    """Whether a forward in the current modes is known to move only the buffers of torch's batch norms."""
    return bool(_known(unwrapped(model)))


@untraced
def _known(model: nn.Module) -> bool | None:
    """The answer for the model in its current modes, if there is one."""
    return _leaves_alone.get(model, {}).get(_modes(model))


def _modes(model: nn.Module) -> _Modes:
    return tuple(m.training for m in model.modules())


def _is_tracking_batch_norm(module: nn.Module) -> TypeGuard[_BatchNorm]:
    """Whether this is torch's own batch norm, and about to move its buffers."""
    return (
        isinstance(module, _BatchNorm)
        and type(module).forward in _BATCH_NORM_FORWARDS
        and module.training
        and module.track_running_stats
        and all(getattr(module, name) is not None for name in _BUFFERS)
    )


def _same(now: Tensor | None, before: Tensor) -> bool:
    return now is not None and now.shape == before.shape and bool(torch.equal(now, before))


def _statistics(layer: _BatchNorm) -> _Statistics:
    return [cast(Tensor, getattr(layer, name)) for name in _BUFFERS]


def _copied_statistics(layer: _BatchNorm) -> _Statistics:
    return [buffer.clone() for buffer in _statistics(layer)]


def _replay(layer: _BatchNorm, before: _Statistics, after: _Statistics) -> None:
    # .data: autograd saved these buffers in the forward, and batch norm itself moves them without a version change
    (*moments, seen), (*moments_before, seen_before), (*moments_after, seen_after) = _statistics(layer), before, after
    updates = seen_after - seen_before  # a norm may be used several times in a forward, or not at all
    for now, was, then in zip(moments, moments_before, moments_after, strict=True):
        if layer.momentum is None:
            # cumulative average over n batches: r·n is their sum, to which the first forward added its part
            # (in float64, since n exceeds what 16 bits hold)
            added = then.double() * seen_after.double() - was.double() * seen_before.double()
            moved = (now.double() * seen.double() + added) / (seen + updates).double()
            now.data.copy_(torch.where(updates > 0, moved, now.double()))
        else:
            # k updates with momentum μ: r ← (1-μ)^k·r + b, and b is what the first forward added
            keep = torch.pow(1.0 - layer.momentum, updates.double())
            now.data.copy_(keep * wide(now) + (wide(then) - keep * wide(was)))
    seen.add_(updates)
