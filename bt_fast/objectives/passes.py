"""The passes over one minibatch: the first attacks and counts, a further one takes its x' at other weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from bt_fast.minibatch import LastMinibatch
from bt_fast.mining import BulletTrain


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

    def __reduce__(self) -> tuple[type[Passes], tuple[()]]:
        return Passes, ()

    @contextmanager
    def again(self, mining: BulletTrain | None, reuse: bool) -> Iterator[None]:
        """In the block, a further pass; `reuse` takes its x'. TypeError or RuntimeError as `BulletTrain.again`."""
        if mining is not None:
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

    def begin(self) -> object:
        """What a further pass without mining reuses; None where x' is to be made, of a new minibatch or anew."""
        if self._reuse is None:
            self._last = LastMinibatch()
        return self._last.reused() if self._reuse else None

    def keep(self, made: object) -> None:
        """Keep what a first pass without mining has made."""
        if self._reuse is None:
            self._last.kept = made
