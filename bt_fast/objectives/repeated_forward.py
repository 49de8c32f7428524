"""A second training forward of the same batch, without running it.

The TRADES code runs `h(x)` twice in one update. The second run gives the same logits and moves the batch-norm buffers
by the same batch statistics, so it can be replayed from what the first one did to them: exactly, unless the forward
draws random numbers (dropout) or keeps other state, in which case it must really run again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_BATCH_NORM_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)

# whether a model's forward in given modes leaves its other buffers alone: found once, since comparing values waits
_Modes = tuple[bool, ...]
_leaves_alone: WeakKeyDictionary[nn.Module, dict[_Modes, bool]] = WeakKeyDictionary()


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

    Randomness is seen in torch's default generators and state in the model's buffers: a training forward that uses a
    generator of its own, or keeps state elsewhere, is not recognised. The first time that a model is seen in its
    current modes, its other buffers are compared by value, which on a GPU waits for the device; later nothing does.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._before = [_Statistics.of(m) for m in model.modules() if _is_tracking_batch_norm(m)]
        self._after: list[_Statistics] = []
        means = [id(before.layer.running_mean) for before in self._before]
        self._shared = len(means) > len(set(means))  # layers that move one tensor in turn
        self._modes = tuple(m.training for m in model.modules())
        self._versions = self._other_versions()
        known = _leaves_alone.setdefault(model, {})
        self._values = None if self._modes in known else {k: b.clone() for k, b in self._other_buffers().items()}
        self._random = _random_states(device)
        self.replayable = False

    def first_done(self) -> None:
        """Note what the first forward did."""
        self._after = [_Statistics.of(before.layer) for before in self._before]
        drew = any(not torch.equal(a, b) for a, b in zip(self._random, _random_states(self._device), strict=True))
        known = _leaves_alone[self._model]
        if self._values is not None:
            others = self._other_buffers()
            known[self._modes] = all(_same(others.get(name), value) for name, value in self._values.items())
        unchanged = known[self._modes] and self._other_versions() == self._versions
        self.replayable = unchanged and not drew and not self._shared

    def _other_buffers(self) -> dict[str, Tensor]:
        """All buffers but those that `replay` moves."""
        moved = {id(getattr(before.layer, name)) for before in self._before for name in _BUFFERS}
        return {name: b for name, b in self._model.named_buffers() if id(b) not in moved}

    def _other_versions(self) -> dict[str, tuple[int, int]]:
        """Which tensor each other buffer is, and its version: what the host can see of a change."""
        return {name: (id(b), b._version) for name, b in self._other_buffers().items()}

    def replay(self) -> None:
        """Move the batch-norm buffers as the same forward would move them again."""
        for before, after in zip(self._before, self._after, strict=True):
            updates = after.updates - before.updates
            if updates:
                _replay(before, after, updates)


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


def _replay(before: _Statistics, after: _Statistics, updates: int) -> None:
    # .data: autograd saved these buffers in the forward, and batch norm itself moves them without a new version
    layer = after.layer
    mean, variance, seen = (cast(Tensor, getattr(layer, name)) for name in _BUFFERS)
    if layer.momentum is None:
        # cumulative average over n batches: r·n is their sum, to which the first forward added its own part
        # (in float64, since n exceeds what 16 bits hold)
        n_before, n_after, n_now = before.seen.double(), after.seen.double(), seen.double()
        for now, was, then in ((mean, before.mean, after.mean), (variance, before.variance, after.variance)):
            added = then.double() * n_after - was.double() * n_before
            now.data.copy_((now.double() * n_now + added) / (n_now + updates))
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
