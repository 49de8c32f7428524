"""Executes the update (its forwards, its loss and its backward), eagerly or from CUDA graphs.

The whole update is captured as one function, in two graphs: its forwards and loss, and its backward. All captured
updates of a model share one memory pool: a forward replayed between another's forward and backward would overwrite the
tensors saved by the latter. So an update runs eagerly while an earlier loss awaits its backward.

`torch.cuda.make_graphed_callables` would capture the parameters' own nodes, which accumulate their gradients. While an
earlier loss is alive these belong to the stream of its forward, for which a capture cannot wait. Here the parameters
are replaced, during the capture, by leaves on the same memory.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bt_fast.attack import device
from bt_fast.attack.captures import GraphKey, GraphPool, ModelGraphs, Recent, hook_reason
from bt_fast.attack.device import RandomStates
from bt_fast.attack.forward import caller_autocast, plain_values, uncached
from bt_fast.attack.graph_cache import GraphCache
from bt_fast.untraced import untraced

MOST_CAPTURED = 8  # of one model: each keeps gradients as large as the model
MOST_REMEMBERED = 64
WARM_UPS = 3
OFTEN = 8  # a capture costs as much as several updates, and not all varying sizes come again

Terms = tuple[Tensor, ...]
Given = tuple[Tensor, Tensor, Tensor]  # x, x' and y


@dataclass(frozen=True)
class Update:
    """The way the update is executed; the attack has `Frozen` and runners.

    Attributes:
        channels_last: 4-d images enter the update's forwards with the channel as the fastest index: the same gradients
            up to rounding.
        graphs: forwards, loss and backward are replayed from CUDA graphs, with exactly the eager result. An update is
            captured when it comes for the second time with the same shapes, modes and weights' addresses; one whose
            number of adversarial rows varies (`unperturbed="skip"`) when that number comes for the eighth time. The 8
            most recently used are kept for each model. A change of anything that a graph has fixed makes a new key: a
            parameter replaced, moved, or no longer trained, a mode, a Python number of a module (for example a norm's
            momentum), MART's β, the caller's autocast (its cast weights are then not cached). The loss has one
            backward; an earlier one may be alive. The update runs eagerly, with one warning that says why: not on CUDA,
            with a hook, with DistributedDataParallel, for a model that replaces its buffers, draws from the host's
            generator or trains tensors that are not parameters of its modules, after a failed capture (for good, for
            example out of memory; the graphs are freed), and while an earlier loss awaits its backward. Other state
            that a forward keeps in Python is not detected.

    Raises:
        TypeError: an option is not a bool.
    """

    channels_last: bool = True
    graphs: bool = False

    def __post_init__(self) -> None:
        for name in ("channels_last", "graphs"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {value!r}: write Update({name}=True)")


class Computation(Protocol):
    """An objective's update."""

    @property
    def identity(self) -> Hashable:
        """Equal for computations of the same result; None if unknown."""

    @property
    def unknown(self) -> str | None:
        """Why there is no identity, in words; None where there is one."""

    def steady(self, m: int) -> bool:
        """Whether every batch of m samples has the same shapes throughout."""

    def __call__(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, replayable: bool | None = None
    ) -> tuple[Terms, bool]:
        """Returns terms, of which the first has a gradient, and whether `RepeatedForward` can replay its forward."""


def run_update(
    update: Update | None,
    model: nn.Module,
    computation: Computation,
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    cache: GraphCache | None = None,
) -> Terms:
    """Returns the computation's terms.

    Args:
        cache: holds captured updates; without it, a cache shared by all callers.
    """
    if update is None or not update.graphs:
        return computation(model, x, x_adv, y)[0]
    return _run_graphs(model, computation, (x, x_adv, y), cache)


@untraced
def _run_graphs(model: nn.Module, computation: Computation, given: Given, cache: GraphCache | None) -> Terms:
    return _graphs_of(model, cache)(model, computation, given)


def explain_graphs(model: nn.Module, cache: GraphCache | None) -> str:
    """Describes how a model's updates run with graphs."""
    graphs = _graphs_of(model, cache)
    return graphs.explain(len(graphs.captured), "the same shapes come again")


def _graphs_of(model: nn.Module, cache: GraphCache | None) -> _UpdateGraphs:
    kept = _graphs if cache is None else cache.updates
    return cast(_UpdateGraphs, kept.setdefault(model, _UpdateGraphs()))


@dataclass(eq=False)
class _History:
    """The number of updates with one key, and whether their clean forward can be replayed on the buffers."""

    times: int = 0
    replayable: bool = False


class _UpdateGraphs(ModelGraphs["_Captured"]):
    """One model's captured updates."""

    captured: GraphPool[GraphKey, _Captured]

    def __init__(self) -> None:
        super().__init__("update", GraphPool())
        self._side: device.Stream | None = None  # the stream of all captures, since a pool's memory belongs to a stream
        self._histories: Recent[GraphKey, _History] = Recent()
        self._latest: Callable[[], _Replay | None] = lambda: None
        self._stream: device.Stream | None = None  # the stream of the latest replay
        self._new = 0  # consecutive updates with new keys

    def __call__(self, model: nn.Module, computation: Computation, given: Given) -> Terms:
        self.reason = None
        if reason := self.failed or computation.unknown or _reason(model, given[0]) or self._awaited():
            self.refuse(reason)
            return _eagerly(model, computation, given)[0]
        key = _key(model, computation, given)
        captured = self.use(key)
        history = self._histories.use(key) or self._histories.setdefault(key, _History())
        if captured is None:
            history.times += 1
            if history.times < (2 if computation.steady(len(given[0])) else OFTEN):
                return self._run_eagerly(history, model, computation, given)
            captured = self._capture(key, history, model, computation, given)
        if captured is None:
            return _eagerly(model, computation, given)[0]
        return self._replay(captured, model, given)

    def _awaited(self) -> str | None:
        replay = self._latest()
        if replay is None or replay.done:
            return None
        return "an earlier loss still awaits its backward, for which the graphs' memory is kept"

    def _run_eagerly(self, history: _History, model: nn.Module, computation: Computation, given: Given) -> Terms:
        """Runs an eager update, and records what a graph would omit."""
        while len(self._histories) > MOST_REMEMBERED:
            self._histories.popitem(last=False)
        self._new = self._new + 1 if history.times == 1 else 0
        before, host = _tensors(model), RandomStates(device.host_generator(given[0].device))
        terms, history.replayable = _eagerly(model, computation, given)
        after = _tensors(model)
        if len(before) != len(after) or any(a is not b for a, b in zip(before, after, strict=True)):
            self.refuse("the model's forward replaces its parameters or buffers", for_good=True)
        elif host.moved:
            what = "the model's forward draws from the host's generator, whose numbers a graph would repeat"
            self.refuse(what, for_good=True)
        elif self._new > MOST_REMEMBERED:
            what = f"each of the last {MOST_REMEMBERED} updates was another one: does the model count its forwards?"
            self.refuse(what, for_good=True)
        return terms

    def _capture(
        self, key: GraphKey, history: _History, model: nn.Module, computation: Computation, given: Given
    ) -> _Captured | None:
        """Captures the update; returns None, with all graphs freed, if that failed. The model does not change."""
        side = self._side = self._side or device.new_stream(given[0])
        buffers = [(b, b.detach().clone()) for b in model.buffers()]
        random = RandomStates.of(given[0].device)
        try:
            record = partial(_Captured, model, computation, history.replayable, given, side)
            return self.captured.add(key, MOST_CAPTURED, record)
        except device.CaptureError as error:
            reason = str(error)
        finally:
            random.restore()
            for buffer, value in buffers:
                buffer.data.copy_(value)  # .data: an eager loss may still await its backward
        self.refuse(reason, for_good=True)
        return None

    def _replay(self, captured: _Captured, model: nn.Module, given: Given) -> Terms:
        stream = device.current_stream(given[0])
        if self._stream is not None:
            stream.wait_stream(self._stream)
        self._stream = stream
        replay = _Replay()
        self._latest = ref(replay)
        terms: Terms = _Replayed.apply(captured, replay, *given, *_trained(model))  # type: ignore[no-untyped-call]
        return terms


def _key(model: nn.Module, computation: Computation, given: Given) -> GraphKey:
    return GraphKey(
        computation=computation.identity,
        inputs=tuple((t.shape, t.stride(), t.dtype, t.device) for t in given),
        autocast=caller_autocast(given[0]),
        values=plain_values(model),
        tensors=tuple((t.data_ptr(), t.shape, t.stride(), t.dtype, t.requires_grad) for t in _tensors(model)),
    )


class _Captured:
    """One update as two graphs, of its forward and of its backward. They write to static memory."""

    def __init__(
        self,
        model: nn.Module,
        computation: Computation,
        replayable: bool,
        given: tuple[Tensor, ...],
        side: device.Stream,
        pool: object,
    ) -> None:
        """Captures the update on the stream `side`. The caller restores what its runs move (buffers, generators)."""
        self._kept = [t.detach() for t in _tensors(model)]  # the graphs hold their addresses, which must not be reused
        self._given = tuple(t.clone(memory_format=torch.preserve_format) for t in given)
        trial = _Trial(model, computation, replayable)
        caller = device.current_stream(given[0])
        side.wait_stream(caller)
        try:
            with uncached(given[0]):
                with device.on(side):
                    arriving = trial.warm_up(self._given)
                self._arriving = tuple(torch.empty_like(a) for a in arriving)  # on the replays' stream
                del arriving
                device.free_unused()
                with device.on(side):
                    with device.capture(pool) as self._forward:
                        terms = trial.terms(self._given)
                    with device.capture(pool) as self._backward:
                        self._gradients = trial.gradients(terms, self._arriving)
        finally:
            caller.wait_stream(side)  # its runs end before the caller restores anything
        self._terms = tuple(t.detach() for t in terms)
        self.constant = tuple(k for k, t in enumerate(terms) if not t.requires_grad)

    def forward(self, *given: Tensor) -> Terms:
        """Replays the forward on the values of x, x' and y; returns copies of its terms, which a caller may keep."""
        for static, value in zip(self._given, given, strict=True):
            static.copy_(value)
        self._forward.replay()
        return tuple(t.clone() for t in self._terms)

    def backward(self, arriving: list[Tensor]) -> tuple[Tensor | None, ...]:
        """Replays the backward on the gradients of the terms that have some."""
        for static, value in zip(self._arriving, arriving, strict=True):
            static.copy_(value)
        self._backward.replay()
        return self._gradients


class _Trial(nn.Module):
    """The update as a forward in which leaves replace the trained parameters; `torch.func` needs a module."""

    def __init__(self, model: nn.Module, computation: Computation, replayable: bool) -> None:
        super().__init__()
        self.model, self._computation, self._replayable = model, computation, replayable
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._leaves: dict[str, Tensor] = {f"model.{name}": nn.Parameter(p.detach()) for name, p in trained.items()}

    def forward(self, x: Tensor, x_adv: Tensor, y: Tensor) -> Terms:
        """Returns the update's terms."""
        return self._computation(self.model, x, x_adv, y, self._replayable)[0]

    def terms(self, given: tuple[Tensor, ...]) -> Terms:
        """Returns the update's terms, with gradients that lead to the leaves."""
        terms: Terms = torch.func.functional_call(self, self._leaves, given)
        return terms

    def gradients(self, terms: Terms, arriving: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        """Returns the gradients of the trained parameters; None for an unused one."""
        of = [t for t in terms if t.requires_grad]
        return torch.autograd.grad(of, list(self._leaves.values()), arriving, allow_unused=True)

    def warm_up(self, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Runs the update, so that no launch is a first one later; returns tensors like the terms' gradients."""
        arriving: tuple[Tensor, ...] = ()
        for _ in range(WARM_UPS):
            terms = self.terms(given)
            if _leaves_of(terms) - {id(leaf) for leaf in self._leaves.values()}:
                raise device.CaptureError("it trains tensors that are no parameters of the model's modules")
            arriving = tuple(torch.zeros_like(t) for t in terms if t.requires_grad)
            self.gradients(terms, arriving)
        return arriving


def _leaves_of(terms: Terms) -> set[int]:
    """Returns the identities of the tensors that the gradients of `terms` lead to."""
    leaves, visited = set(), {t.grad_fn for t in terms}
    waiting = list(visited)
    while waiting:
        node = waiting.pop()
        if node is not None:
            if node.name() == "torch::autograd::AccumulateGrad":
                leaves.add(id(cast(Any, node).variable))
            new = {n for n, _ in node.next_functions} - visited
            visited |= new
            waiting += new
    return leaves


class _Replay:
    """One replayed forward, with saved tensors that last until its backward, or until it is freed."""

    def __init__(self) -> None:
        self.done = False

    def begin_backward(self) -> None:
        """Marks the begin of the backward's replay, which overwrites tensors that it no longer needs.

        Raises:
            RuntimeError: it is the second one.
        """
        if self.done:
            raise RuntimeError(
                "a loss from graphs has one backward, with retain_graph=True too: its memory has been used since. "
                "For more than one leave graphs=True out"
            )
        self.done = True


class _Replayed(torch.autograd.Function):
    """The terms of a captured update of (x, x', y, trained parameters), and the parameters' gradients.

    All are copied out of static memory, which the next replay overwrites: a caller may keep a loss, and autograd uses
    the gradients themselves as `.grad`.
    """

    @staticmethod
    def forward(ctx: Any, captured: _Captured, replay: _Replay, *given: Tensor) -> Terms:
        """Returns copies."""
        ctx.captured, ctx.replay = captured, replay
        ctx.save_for_backward(*given[3:])
        terms = captured.forward(*given[:3])
        ctx.mark_non_differentiable(*[terms[k] for k in captured.constant])
        return terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Tensor | None, ...]:
        """Returns copies. Raises, like autograd, if a parameter was changed in place since the forward."""
        ctx.replay.begin_backward()
        parameters, captured = ctx.saved_tensors, ctx.captured
        gradients = captured.backward([a for k, a in enumerate(arriving) if k not in captured.constant])
        copies = [None if g is None else torch.empty_like(p) for p, g in zip(parameters, gradients, strict=True)]
        torch._foreach_copy_([c for c in copies if c is not None], [g for g in gradients if g is not None])
        return (None, None, None, None, None, *copies)


def _eagerly(model: nn.Module, computation: Computation, given: Given) -> tuple[Terms, bool]:
    with uncached(given[0]):  # like the graphs
        return computation(model, *given)


def _reason(model: nn.Module, x: Tensor) -> str | None:
    """Returns why an update of this model cannot be captured now, or None."""
    if reason := device.no_graphs_reason(x):
        return reason
    if reason := hook_reason(model):
        return reason
    for name, p in model.named_parameters():
        if p._backward_hooks:
            return f"parameter {name} has a hook, which a graph would run a second time"
    if any(isinstance(m, (nn.parallel.DistributedDataParallel, nn.DataParallel)) for m in model.modules()):
        return "the model is spread over devices"
    if not torch.is_grad_enabled() or not _trained(model):
        return "there is no gradient to take"
    if any(b.requires_grad for b in model.buffers()):
        return "a buffer requires a gradient"
    return None


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


_graphs: WeakKeyDictionary[nn.Module, _UpdateGraphs] = WeakKeyDictionary()
