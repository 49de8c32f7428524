"""An engine on the device of one loss, and the lines of a loss's `explain` about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bt_fast.attack import device
from bt_fast.attack.apgd import APGD
from bt_fast.attack.auto import AutoRunner
from bt_fast.attack.folded import FoldedModel, Frozen, known_view
from bt_fast.attack.graph_cache import DTYPES, GraphCache, view_of
from bt_fast.attack.graphs import GraphRunner
from bt_fast.attack.memory_format import CONTIGUOUS, takes_channels_last
from bt_fast.attack.pgd import PGD
from bt_fast.attack.runners import Runner, run_eager
from bt_fast.attack.statistics import why_apart
from bt_fast.attack.streams import StreamRunner
from bt_fast.attack.valued_runners import APGDRunner, PGDRunner, runner_for
from bt_fast.engine import Engine
from bt_fast.objectives.update import Update, explain_graphs


@dataclass(frozen=True, eq=False)
class Execution:
    """An engine on one device."""

    view: Frozen | None  # what the attack uses; None for the model itself
    runner: Runner  # of the attack's steps
    update: Update | None  # None for eagerly, in the images' own format
    cache: GraphCache | None = None  # of the update's graphs; None for the one of all callers
    precision: torch.dtype | None = None  # of the whole under autocast; None for the caller's
    attack_alone: torch.dtype | None = None  # of the attack, where the update has the caller's
    update_alone: torch.dtype | None = None  # of the update, where the attack has the caller's
    apart: str | None = None  # why the attack runs without view, graphs and streams

    @classmethod
    def of(cls, engine: Engine, cache: GraphCache, x: Tensor) -> Execution:
        """Returns the execution of the engine on the device of x."""
        graphs = engine.graphs and device.has_graphs(x)
        update = Update(channels_last=engine.channels_last, graphs=graphs) if engine.channels_last or graphs else None
        dtypes = dict.fromkeys(("both", "attack", "update")) | {engine.precision_of: dtype_of(engine.precision)}
        alone = {"attack_alone": dtypes["attack"], "update_alone": dtypes["update"]}
        return cls(view_of(engine), cache.runner(engine, x), update, cache, dtypes["both"], **alone)

    def fitting(self, attack: PGD | APGD) -> Execution:
        """The same, but for what this attack cannot use of it, and with its own runner, if it has one."""
        own = runner_for(attack)
        if attack.statistics == "running":
            return self if own is None else replace(self, runner=own)
        return replace(self, view=None, runner=own or run_eager, apart=why_apart(attack.statistics))

    def autocast(self, x: Tensor) -> AbstractContextManager[object]:
        """Returns the autocast around attack and update."""
        return autocast(self.precision, x)

    def autocast_of_attack(self, x: Tensor) -> AbstractContextManager[object]:
        """The autocast around an attack that has one of its own, inside of `autocast`."""
        return autocast(self.attack_alone, x, cached=False)

    def autocast_of_update(self, x: Tensor) -> AbstractContextManager[object]:
        """Likewise around an update."""
        return autocast(self.update_alone, x, cached=False)


def dtype_of(precision: str | None) -> torch.dtype | None:
    """The dtype of a precision's autocast; None for the caller's."""
    return DTYPES[precision] if precision else None


def autocast(precision: torch.dtype | None, x: Tensor, *, cached: bool = True) -> AbstractContextManager[object]:
    """Returns autocast on the device of x; None leaves the caller's unchanged.

    Not `cached`, it takes no weights that an autocast around it has cast to another dtype.
    """
    return nullcontext() if precision is None else torch.autocast(x.device.type, precision, cache_enabled=cached)


@dataclass(frozen=True, eq=False)
class Seen:
    """The state of a loss's last call, for `explain`."""

    model: Callable[[], nn.Module | None]  # the model of the attack
    updated: Callable[[], nn.Module | None]  # the model of the update
    device: torch.device
    execution: Execution
    beside: bool  # the update's clean forward ran beside the attack
    shared: bool = False  # it ran before, and mining and attack took its logits


def lines(seen: Seen) -> Iterator[str]:
    """Yields what ran folded, from graphs, in 16 bits, on streams, and why something did not."""
    execution, model, updated = seen.execution, seen.model(), seen.updated()
    if model is None or updated is None:
        yield "the model of the last call is gone: explain while there is one"
        return
    recipe, update = execution.view, execution.update
    view = None if recipe is None else known_view(model, recipe)
    apart = execution.apart
    yield f"folded view: {f'no, since {apart}' if apart else _fold(recipe, view)}"
    attack_last, update_last = (kind is not None and kind.channels_last for kind in (view or recipe, update))
    contiguous = (recipe or update) and not takes_channels_last(model)
    update_last = update_last and not contiguous
    why = f"; {CONTIGUOUS}" if contiguous else ""
    yield f"channels last: attack {yes(attack_last)}, update {yes(update_last)}{why}"
    runner = _runner(execution.runner, model if view is None else view, seen.device)
    yield f"attack steps: {f'eagerly, since {apart}' if apart else runner}"
    graphs = update is not None and update.graphs
    shared = "eagerly, since its clean forward comes before the attack, which shares it"
    yield f"update: {shared if seen.shared else explain_graphs(updated, execution.cache) if graphs else 'eagerly'}"
    yield f"clean forward beside the attack: {yes(seen.beside)}"
    if execution.precision is not None:
        yield f"precision: {execution.precision}, under autocast"
    elif execution.update_alone is not None:
        yield f"precision: the update in {execution.update_alone}, under autocast"
    elif execution.attack_alone is not None:
        yield f"precision: the attack in {execution.attack_alone}, under autocast"
    elif recipe is not None and recipe.autocast is not None:
        yield f"precision: the attack in {recipe.autocast}"
    else:
        yield "precision: as the model and the caller have it"


def yes(value: bool) -> str:
    """A bool in words."""
    return "yes" if value else "no"


def _fold(recipe: Frozen | None, view: FoldedModel | None) -> str:
    if recipe is None or not recipe.fold:
        return "no, not asked for"
    if view is None:
        return "no longer known"
    return folded_in_words(view) if view.reason is None else f"no, {view.reason}"


def folded_in_words(view: FoldedModel) -> str:
    """What is folded in a view, and what runs as it is inside it."""
    folded, left = view.norms
    norms = f"{folded} of {folded + left} batch norms" if folded + left else "without a batch norm"
    (name, why), more = next(iter(view.kept.items()), ("", "")), len(view.kept) - 1
    kept = f"; {name} runs as it is, not traced: {why}" if name else ""
    return f"yes, {norms}{kept}{f'; so do {more} more modules' if more > 0 else ''}"


def _runner(runner: Runner, attacked: object, where: torch.device) -> str:
    if isinstance(runner, (AutoRunner, GraphRunner, StreamRunner, PGDRunner, APGDRunner)):
        return runner.explain(attacked)
    if runner is run_eager and where.type != "cuda":
        return f"eagerly, since graphs and streams are CUDA's and the images are on {where}"
    return "eagerly" if runner is run_eager else f"by {getattr(runner, '__name__', type(runner).__name__)}"
