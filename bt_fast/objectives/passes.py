"""The passes over one minibatch: the first attacks and counts, a further one takes its x' at other weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor

from bt_fast.faults import Fault
from bt_fast.minibatch import LastMinibatch
from bt_fast.mining import BulletTrain
from bt_fast.plan import Plan

NEW_ONES = "write again(reuse=False) to make new ones"


def _nothing() -> None:
    """There is nothing to be done."""


@dataclass(frozen=True, eq=False)
class Pass:
    """What is wanted of the losses that are called now; the fields' defaults are those of any other call."""

    further: bool = False  # over the minibatch of their last call, with its x'
    adversarial_first: bool = False  # of an update with two clean forwards
    of_moving: bool = False  # an update of the samples that have attack steps alone
    update_begins: Callable[[], None] = _nothing  # called when the attack has ended or is queued


_wanted: ContextVar[Pass | None] = ContextVar("wanted", default=None)


def wanted() -> Pass | None:
    """The pass of the block that this call is in; None outside of such blocks."""
    return _wanted.get()


@contextmanager
def wanting(this: Pass) -> Iterator[None]:
    """Whatever loss is called in the block, however deep in a function of the user's, goes over its minibatch so."""
    token = _wanted.set(this)
    try:
        yield
    finally:
        _wanted.reset(token)


def check_moving(without: bool) -> None:
    """Raise ValueError where the samples that move are wanted of a loss `without` mining."""
    if without:
        raise ValueError(
            "AWP's samples='moved' are those that mining gives attack steps, but this loss has no attack with mining: "
            "write samples='all', or give the loss mining=BulletTrain()"
        )


def check_outside(function: str, instead: str) -> None:
    """Raise ValueError where a `function` without a minibatch of its own is called by a loss that is called twice."""
    if wanted() is not None:
        raise ValueError(f"{function} would make a new x' in the second pass of AWP, by moved weights: {instead}")


class Passes:
    """The last minibatch of a loss, for further passes over it; neither saved nor copied. With mining, that has it."""

    def __init__(self) -> None:
        self._last = LastMinibatch()
        self._reuse: bool | None = None  # the argument of `again`, in its block
        self.owner: object = object()  # of what is kept; equal for losses that a function makes anew in each call

    def __reduce__(self) -> tuple[type[Passes], tuple[()]]:
        return Passes, ()

    @contextmanager
    def again(self, mining: BulletTrain | None, reuse: bool) -> Iterator[None]:
        """In the block, a further pass; `reuse` takes its x'. TypeError or RuntimeError as `BulletTrain.again`.

        Also a RuntimeError where the mining's last minibatch is not that of this loss.
        """
        if mining is not None:
            mining._last.check_owner(self.owner)
            with mining.again(reuse=reuse):
                yield
            return
        self._last.begin_again(reuse)
        outer, self._reuse = self._reuse, reuse
        try:
            yield
        finally:
            self._reuse = outer

    def first(self, mining: BulletTrain | None) -> bool:
        """Whether this pass is the minibatch's first."""
        return self._reuse is None if mining is None else mining.counts_now

    def reuses(self, mining: BulletTrain | None) -> bool:
        """Whether this pass takes the x' of the minibatch's first."""
        return bool(self._reuse if mining is None else mining._reuse)

    def begin(self) -> object:
        """What a further pass without mining reuses; None where x' is to be made, of a new minibatch or anew."""
        if self._reuse is None:
            self._last = LastMinibatch()
        return self._last.reused() if self._reuse else None

    def keep(self, made: object, mining: BulletTrain | None) -> None:
        """Keep what a first pass has made."""
        if mining is not None:
            mining.keep(made, self.owner)
        elif self._reuse is None:
            self._last.kept = made


def other_samples(kept_x: Tensor, kept_y: Tensor, x: Tensor, y: Tensor, plan: Plan | None = None) -> Fault:
    """Counts the samples that differ from those of the first pass, which is in the order of `plan`, if given.

    Raises:
        ValueError: the images are of another shape, dtype or device, or the labels of another shape.
    """
    needs = "again(reuse=True) needs the images and labels of the last call outside of its block"
    instead = f"call the loss on these once before, or {NEW_ONES}"
    if (kept_x.shape, kept_x.dtype, kept_x.device) != (x.shape, x.dtype, x.device):
        first, now = (f"{list(t.shape)} {t.dtype} on {t.device}" for t in (kept_x, x))
        raise ValueError(f"{needs}, {first}, got {now}: {instead}")
    if kept_y.shape != y.shape:
        raise ValueError(f"{needs}, y of shape {list(kept_y.shape)}, got {list(y.shape)}: {instead}")
    x, y = (x, y) if plan is None else (plan.sort(x), plan.sort(y))
    other_labels = (kept_y != y.to(kept_y.dtype)).reshape(len(y), -1).any(dim=1)
    differs = (kept_x != x).flatten(1).any(dim=1) | other_labels
    return Fault(differs.sum(), f"{needs}, but {{count}} of {len(y)} samples are others: {instead}")
