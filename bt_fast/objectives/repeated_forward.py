"""A second training forward of the same batch, without running it.

The TRADES code runs `h(x)` twice in one update. The second run gives the same logits and moves the batch-norm buffers
by the same batch statistics, so it can be replayed from what the first one did to them: exactly, unless the forward
draws random numbers (dropout) or keeps other state, in which case it must really run again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, eq=False)
class _Statistics:
    """One batch norm's buffers at some moment; `updates` is num_batches_tracked's version, known to the host."""

    layer: _BatchNorm
    mean: Tensor
    variance: Tensor
    seen: Tensor
    updates: int

    @classmethod
    def of(cls, layer: _BatchNorm) -> _Statistics:
        mean, variance, seen = (cast(Tensor, getattr(layer, name)) for name in _BUFFERS)
        return cls(layer, mean.clone(), variance.clone(), seen.clone(), seen._version)


class RepeatedForward:
    """Watches one forward of a model in its current modes, then decides whether a repetition can be replayed.

    repeat = RepeatedForward(model, x.device)    # before h(x)
    logits = model(x)
    repeat.first_done()                          # right after it
    ...                                          # any other forwards
    if repeat.replayable: repeat.replay()        # the buffers as after another h(x), whose logits are `logits`
    else: logits_again = model(x)
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._device = device
        layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and _tracks(m)]
        tracked = {id(getattr(layer, name)) for layer in layers for name in _BUFFERS}
        self._before = [_Statistics.of(layer) for layer in layers]
        self._after: list[_Statistics] = []
        self._others = [b for b in model.buffers() if id(b) not in tracked]
        self._versions = [b._version for b in self._others]
        self._random = _random_states(device)
        self._replayed_norms_only = not any(
            _tracks(m) for m in model.modules() if isinstance(m, _NormBase) and not isinstance(m, _BatchNorm)
        )
        self.replayable = False

    def first_done(self) -> None:
        """Note what the first forward did."""
        self._after = [_Statistics.of(before.layer) for before in self._before]
        drew = any(not torch.equal(a, b) for a, b in zip(self._random, _random_states(self._device), strict=True))
        changed = any(b._version != v for b, v in zip(self._others, self._versions, strict=True))
        self.replayable = self._replayed_norms_only and not (drew or changed)

    def replay(self) -> None:
        """Move the batch-norm buffers as the same forward would move them again."""
        for before, after in zip(self._before, self._after, strict=True):
            updates = after.updates - before.updates
            if updates:
                _replay(before, after, updates)


def _tracks(layer: _NormBase) -> bool:
    return layer.training and layer.track_running_stats and layer.running_mean is not None


def _replay(before: _Statistics, after: _Statistics, updates: int) -> None:
    # .data: autograd saved these buffers in the forward, and batch norm itself moves them without a new version
    layer = after.layer
    mean, variance, seen = (cast(Tensor, getattr(layer, name)) for name in _BUFFERS)
    if layer.momentum is None:
        # cumulative average over n batches: r·n is their sum, to which the first forward added its own part
        n_before, n_after = before.seen.to(mean.dtype), after.seen.to(mean.dtype)
        n_now = seen.to(mean.dtype)
        for now, was, then in ((mean, before.mean, after.mean), (variance, before.variance, after.variance)):
            now.data.copy_((now * n_now + (then * n_after - was * n_before)) / (n_now + updates))
    else:
        # k updates with momentum μ: r ← (1-μ)^k·r + b, and b is what the first forward added
        keep = (1.0 - layer.momentum) ** updates
        for now, was, then in ((mean, before.mean, after.mean), (variance, before.variance, after.variance)):
            now.data.mul_(keep).add_(then - keep * was)
    seen.add_(updates)


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states
