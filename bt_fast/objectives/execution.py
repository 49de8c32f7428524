"""How one loss runs on one device: its engine there, and in words what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bt_fast.attack import device
from bt_fast.attack.auto import AutoRunner
from bt_fast.attack.folded import FoldedModel, Frozen, known_view
from bt_fast.attack.graph_cache import DTYPES, GraphCache, view_of
from bt_fast.attack.graphs import GraphRunner
from bt_fast.attack.runners import Runner, run_eager
from bt_fast.attack.streams import StreamRunner
from bt_fast.engine import Engine
from bt_fast.objectives.update import Update, explain_graphs


@dataclass(frozen=True, eq=False)
class Execution:
    """An engine, as it is for one device.

    Attributes:
        view: of the model, for the attack; None for the model itself.
        runner: how the attack's steps are executed.
        update: how the update is executed; None for eagerly, in the images' own format.
        cache: of the update's graphs; None for the one of all callers.
        precision: of the whole under autocast; None for the caller's.
    """

    view: Frozen | None
    runner: Runner
    update: Update | None
    cache: GraphCache | None = None
    precision: torch.dtype | None = None

    @classmethod
    def of(cls, engine: Engine, cache: GraphCache, x: Tensor) -> Execution:
        """The engine on the device of x."""
        runner = cache.runner(engine, x)
        graphs = engine.graphs and device.has_graphs(x)
        update = Update(channels_last=engine.channels_last, graphs=graphs) if engine.channels_last or graphs else None
        return cls(view_of(engine), runner, update, cache, DTYPES[engine.precision] if engine.precision else None)

    def autocast(self, x: Tensor) -> AbstractContextManager[object]:
        """The precision, around attack and update."""
        return nullcontext() if self.precision is None else torch.autocast(x.device.type, self.precision)


@dataclass(frozen=True, eq=False)
class Seen:
    """What a loss has run.

    Attributes:
        model: as the attack knows it, updated: as the update does. device: of the images.
        execution: how it ran.
        beside: whether the update's clean forward ran beside the attack.
    """

    model: Callable[[], nn.Module | None]
    updated: Callable[[], nn.Module | None]
    device: torch.device
    execution: Execution
    beside: bool


def lines(seen: Seen) -> Iterator[str]:
    """What ran folded, from graphs, in 16 bits, on streams, and why something did not."""
    execution, model, updated = seen.execution, seen.model(), seen.updated()
    if model is None or updated is None:
        yield "the model of the last call is gone: explain while there is one"
        return
    view = None if execution.view is None else known_view(model, execution.view)
    yield f"folded view: {_fold(execution.view, view)}"
    update = execution.update
    last = execution.view is not None and execution.view.channels_last
    yield f"channels last: attack {_yes(last)}, update {_yes(update is not None and update.channels_last)}"
    attacked = model if view is None else view
    yield f"attack steps: {_runner(execution.runner, attacked, seen.device)}"
    graphs = update is not None and update.graphs
    yield f"update: {explain_graphs(updated, execution.cache) if graphs else 'eagerly'}"
    yield f"clean forward beside the attack: {_yes(seen.beside)}"
    if execution.precision is not None:
        yield f"precision: {execution.precision}, under autocast"
    elif execution.view is not None and execution.view.autocast is not None:
        yield f"precision: the attack in {execution.view.autocast}"
    else:
        yield "precision: as the model and the caller have it"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _fold(recipe: Frozen | None, view: FoldedModel | None) -> str:
    if recipe is None or not recipe.fold:
        return "no, not asked for"
    if view is None:
        return "no longer known"
    return "yes" if view.reason is None else f"no, {view.reason}"


def _runner(runner: Runner, attacked: object, where: torch.device) -> str:
    if isinstance(runner, (AutoRunner, GraphRunner, StreamRunner)):
        return runner.explain(attacked)
    if runner is run_eager and where.type != "cuda":
        return f"eagerly, since graphs and streams are CUDA's and the images are on {where}"
    return "eagerly" if runner is run_eager else f"by {getattr(runner, '__name__', type(runner).__name__)}"
