"""How the update (its forwards, its loss and its backward) is executed.

The whole update is captured as one function, in two graphs: its forwards and loss, and its backward. All captured
updates of a model share one memory pool: a forward replayed between another's forward and backward would overwrite what
that one has saved. So an update runs eagerly while an earlier loss awaits its backward.

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

MOST_CAPTURED = 8  # of one model: each keeps gradients of the model's size
MOST_REMEMBERED = 64
WARM_UPS = 3
OFTEN = 8  # a capture costs as much as several updates, and sizes that vary do not all come again

Terms = tuple[Tensor, ...]
Given = tuple[Tensor, Tensor, Tensor]  # x, x' and y


@dataclass(frozen=True)
class Update:
    """How the update is executed; the attack has `Frozen` and runners.

    Attributes:
        channels_last: 4-d images enter the update's forwards with the channel as the fastest index: the same gradients
            up to rounding.
        graphs: forwards, loss and backward are replayed from CUDA graphs: the eager result, exactly. An update is
            captured when it comes for the second time with the same shapes, modes and weights' addresses; one whose
            number of adversarial rows varies (`unperturbed="skip"`) when that number comes for the eighth time. The 8
            used last are kept for each model. A change of anything that a graph has fixed makes a new key: a parameter
            replaced, moved, or no longer trained, a mode, a Python number of a module (a norm's momentum, say), MART's
            β, the caller's autocast, whose cast weights are not cached then. The loss has one backward; an earlier one
            may be alive. It runs eagerly, with one warning that says why: not on CUDA, a hook, DistributedDataParallel,
            a model that replaces its buffers, draws from the host's generator or trains tensors that are no parameters
            of its modules, a capture that failed (for good: out of memory, say; the graphs are freed), and while an
            earlier loss awaits its backward. A forward that keeps other state of its own in Python is not recognised.

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
        """Equal to another's where both compute the same; None where that is not known."""

    @property
    def unknown(self) -> str | None:
        """Why there is no identity, in words; None where there is one."""

    def steady(self, m: int) -> bool:
        """Whether every batch of m samples has the same shapes throughout."""

    def __call__(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, replayable: bool | None = None
    ) -> tuple[Terms, bool]:
        """Terms, of which the first has a gradient, and whether `RepeatedForward` can replay its forward."""


def run_update(
    update: Update | None,
    model: nn.Module,
    computation: Computation,
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    cache: GraphCache | None = None,
) -> Terms:
    """The computation's terms.

    Args:
        cache: where captured updates are kept; without it in one for all callers.
    """
    if update is None or not update.graphs:
        return computation(model, x, x_adv, y)[0]
    return _graphs_of(model, cache)(model, computation, (x, x_adv, y))


def explain_graphs(model: nn.Module, cache: GraphCache | None) -> str:
    """How a model's updates run with graphs, in words."""
    graphs = _graphs_of(model, cache)
    return graphs.explain(len(graphs.captured), "the same shapes come again")


def _graphs_of(model: nn.Module, cache: GraphCache | None) -> _UpdateGraphs:
    kept = _graphs if cache is None else cache.updates
    return cast(_UpdateGraphs, kept.setdefault(model, _UpdateGraphs()))


@dataclass(eq=False)
class _History:
    """How often an update of one key has come, and whether its clean forward can be replayed on the buffers."""

    times: int = 0
    replayable: bool = False


class _UpdateGraphs(ModelGraphs["_Captured"]):
    """One model's captured updates."""

    captured: GraphPool[GraphKey, _Captured]

    def __init__(self) -> None:
        super().__init__("update", GraphPool())
        self._side: device.Stream | None = None  # on which all are captured, as memory of a pool is the stream's
        self._histories: Recent[GraphKey, _History] = Recent()
        self._latest: Callable[[], _Replay | None] = lambda: None
        self._stream: device.Stream | None = None  # on which the latest replay was queued
        self._new = 0  # updates in a row that had not come before

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
        """An eager update, of which it is noted what a graph would leave out."""
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
        """Capture the update; None, with all graphs freed, where that failed. The model is as it was."""
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
    """One update as two graphs, of its forward and of its backward. What these write is static memory."""

    def __init__(
        self,
        model: nn.Module,
        computation: Computation,
        replayable: bool,
        given: tuple[Tensor, ...],
        side: device.Stream,
        pool: object,
    ) -> None:
        """Capture it on the stream `side`. What its runs move (buffers, generators) is the caller's to restore."""
        self._kept = [t.detach() for t in _tensors(model)]  # the graphs hold their addresses, which no other may get
        self._given = tuple(t.clone(memory_format=torch.preserve_format) for t in given)
        trial = _Trial(model, computation, replayable)
        caller = device.current_stream(given[0])
        side.wait_stream(caller)
        try:
            with uncached(given[0]):
                with device.on(side):
                    arriving = trial.warm_up(self._given)
                self._arriving = tuple(torch.empty_like(a) for a in arriving)  # on the stream of the replays
                del arriving
                device.free_unused()
                with device.on(side):
                    with device.capture(pool) as self._forward:
                        terms = trial.terms(self._given)
                    with device.capture(pool) as self._backward:
                        self._gradients = trial.gradients(terms, self._arriving)
        finally:
            caller.wait_stream(side)  # whose runs end before the caller restores anything
        self._terms = tuple(t.detach() for t in terms)
        self.constant = tuple(k for k, t in enumerate(terms) if not t.requires_grad)

    def forward(self, *given: Tensor) -> Terms:
        """Replay the forward on the values of x, x' and y: copies of its terms, as a caller may keep them."""
        for static, value in zip(self._given, given, strict=True):
            static.copy_(value)
        self._forward.replay()
        return tuple(t.clone() for t in self._terms)

    def backward(self, arriving: list[Tensor]) -> tuple[Tensor | None, ...]:
        """Replay the backward on the gradients of the terms that have some."""
        for static, value in zip(self._arriving, arriving, strict=True):
            static.copy_(value)
        self._backward.replay()
        return self._gradients


class _Trial(nn.Module):
    """The update as a forward, in which leaves stand for the trained parameters; `torch.func` wants a module."""

    def __init__(self, model: nn.Module, computation: Computation, replayable: bool) -> None:
        super().__init__()
        self.model, self._computation, self._replayable = model, computation, replayable
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._leaves: dict[str, Tensor] = {f"model.{name}": nn.Parameter(p.detach()) for name, p in trained.items()}

    def forward(self, x: Tensor, x_adv: Tensor, y: Tensor) -> Terms:
        """The update's terms."""
        return self._computation(self.model, x, x_adv, y, self._replayable)[0]

    def terms(self, given: tuple[Tensor, ...]) -> Terms:
        """The update's terms, whose gradients lead to the leaves."""
        terms: Terms = torch.func.functional_call(self, self._leaves, given)
        return terms

    def gradients(self, terms: Terms, arriving: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        """Those of the trained parameters; None for one that is not used."""
        of = [t for t in terms if t.requires_grad]
        return torch.autograd.grad(of, list(self._leaves.values()), arriving, allow_unused=True)

    def warm_up(self, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Run it, so that nothing is launched for the first time later; tensors like the terms' gradients."""
        arriving: tuple[Tensor, ...] = ()
        for _ in range(WARM_UPS):
            terms = self.terms(given)
            if _leaves_of(terms) - {id(leaf) for leaf in self._leaves.values()}:
                raise device.CaptureError("it trains tensors that are no parameters of the model's modules")
            arriving = tuple(torch.zeros_like(t) for t in terms if t.requires_grad)
            self.gradients(terms, arriving)
        return arriving


def _leaves_of(terms: Terms) -> set[int]:
    """The identities of the tensors that the gradients of `terms` lead to."""
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
    """One replayed forward: what it has saved lasts until its backward, or until it is gone."""

    def __init__(self) -> None:
        self.done = False

    def begin_backward(self) -> None:
        """Before the backward's replay, which overwrites what it no longer needs.

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

    All leave static memory, which the next replay overwrites: a caller may keep a loss, and autograd makes what it is
    given a parameter's `.grad`.
    """

    @staticmethod
    def forward(ctx: Any, captured: _Captured, replay: _Replay, *given: Tensor) -> Terms:
        """Copies."""
        ctx.captured, ctx.replay = captured, replay
        ctx.save_for_backward(*given[3:])
        terms = captured.forward(*given[:3])
        ctx.mark_non_differentiable(*[terms[k] for k in captured.constant])
        return terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Tensor | None, ...]:
        """Copies. Raises, as autograd does, where a parameter was changed in place since the forward."""
        ctx.replay.begin_backward()
        parameters, captured = ctx.saved_tensors, ctx.captured
        gradients = captured.backward([a for k, a in enumerate(arriving) if k not in captured.constant])
        copies = [None if g is None else torch.empty_like(p) for p, g in zip(parameters, gradients, strict=True)]
        torch._foreach_copy_([c for c in copies if c is not None], [g for g in gradients if g is not None])
        return (None, None, None, None, None, *copies)


def _eagerly(model: nn.Module, computation: Computation, given: Given) -> tuple[Terms, bool]:
    with uncached(given[0]):  # as the graphs
        return computation(model, *given)


def _reason(model: nn.Module, x: Tensor) -> str | None:
    """Why an update of this model cannot be captured now."""
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
