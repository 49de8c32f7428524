"""A loss of adversarial training: the attack, the update's forwards, and an objective of their logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar
from weakref import ref

import torch
from torch import Tensor, nn

from bt_fast.attack.apgd import APGD
from bt_fast.attack.graph_cache import GraphCache
from bt_fast.attack.inner import InnerLoss
from bt_fast.attack.logits import Select, Selection
from bt_fast.attack.memory_format import takes_channels_last
from bt_fast.attack.pgd import PGD
from bt_fast.attack.pixels import Normalize, OnPixels
from bt_fast.attack.start import Noise
from bt_fast.attack.wrapped import unwrapped
from bt_fast.engine import Engine
from bt_fast.labels import is_soft
from bt_fast.memory import Memory
from bt_fast.mining import BulletTrain
from bt_fast.objectives import adversarial, arguments
from bt_fast.objectives.adversarial import Attack, Call
from bt_fast.objectives.cross_entropy import CrossEntropy, Smoothed, Smoothing
from bt_fast.objectives.execution import Seen, lines
from bt_fast.objectives.extra_term import Extra, ExtraTerm, check_extra
from bt_fast.objectives.forwards import Forwards
from bt_fast.objectives.passes import Pass, Passes, check_moving, wanted
from bt_fast.objectives.shared_forward import SHARED, CleanUpdates, SharedForward, check_shared, clean_forwards_of
from bt_fast.objectives.update_order import in_callers_order, in_callers_rows, in_update_order, left_out, weights_of
from bt_fast.placement import Placement
from bt_fast.plan import Plan
from bt_fast.recalled import Recalled
from bt_fast.robust_half import check_all_count
from bt_fast.validation import weight


@dataclass(frozen=True, eq=False)
class Record:
    """The data to log of a loss's last minibatch of m samples, in the caller's order.

    Attributes:
        logits: [m, K], of the update's clean forward; None for a loss without one.
        adversarial_logits: [m, K], of the update's adversarial forward; the clean ones for samples that it leaves out.
        x_adv: [m, ...], x', in the units of x.
        steps: [m] int64, the attack steps of each sample.
    """

    logits: Tensor | None
    adversarial_logits: Tensor
    x_adv: Tensor
    steps: Tensor

    @classmethod
    def of(
        cls,
        plan: Plan,
        x: Tensor,
        x_adv: Tensor,
        normalize: Normalize | None,
        adversarial_logits: Tensor,
        *clean: Tensor,
    ) -> Record:
        """Returns the record of x' and logits in the plan's sorted order; `clean` logits if there are any."""
        x_adv = in_callers_order(x_adv, x, plan, normalize)
        return cls(plan.unsort(clean[0]) if clean else None, plan.unsort(adversarial_logits), x_adv, plan.steps)


class AdversarialLoss(nn.Module, ABC):
    """A loss that first attacks the images: `criterion(model, x, y).backward()`.

    A custom loss is a subclass with an `objective`. The attack runs in eval mode. The update's forwards run in the
    modes of the model's modules; a model entirely in eval mode runs them in train mode, as in the authors' code. The
    modes are restored. With `mining` it is Algorithm 2 of the BulletTrain paper: steps by group, the samples sorted by
    descending steps, F_R moved by the adversarial samples' accuracy.

    Args:
        attack: how images are attacked, a `PGD` or an `APGD`; it may be set, to follow a schedule of ε say.
        mining: who gets how many steps; None for all alike. It is a part of this module, moves and saves with it.
        engine: how attack and update are executed, by name or as an `Engine`.
        extra: a further term: a function of an `UpdateBatch` that returns a 0-dim tensor, which is added to the loss,
            such as `lambda batch: F.mse_loss(batch.logits, teacher(batch.x))`. It runs in the update, under its modes
            and its autocast, after its forwards, and eagerly: an update with it is not captured in a graph.
        logits: of a model that returns a tuple, a dict or an object: the function that takes its logits [m, K], as
            `select` of `Logits`. None for a model that returns them.
        memory: the perturbations of the data set's samples, where attacks start, with steps of their own in place of
            those of attack and mining. It is a part of this module too; calls then need `indices`.

    Attributes:
        clean_forwards: how often the update runs the clean images: 0, 1, or 2 like TRADES' authors.
        clean_shared: whether the one clean forward comes before the attack, and mining and attack take its logits.
        on_input_gradient: None, or a function to which the loss's backward hands its gradient with respect to x', a
            tensor [m, ...] in the caller's order and for pixels, 0 for samples without an adversarial forward: at the
            price of one input gradient of the first layer, the ascent direction of a further step. Not called where no
            sample runs an adversarial forward. May be set; a module is then a part of this one, until None is set.
        default_start, default_inner: for an attack that names none.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: the engine's name is unknown, or attack and mining have different numbers of steps.
    """

    clean_forwards: int = 1
    clean_shared: bool = False
    on_input_gradient: Callable[[Tensor], None] | None
    default_start: ClassVar[Noise] = "normal"
    default_inner: ClassVar[InnerLoss] = "cross_entropy"
    step_in_l2_is_its_own: ClassVar[bool] = False  # the authors' function does not use its step size in l2
    drop_in: ClassVar[str] = ""  # the authors' function

    def __init__(
        self,
        attack: PGD | APGD,
        *,
        mining: BulletTrain | None = None,
        engine: Engine | str = "fast",
        extra: Extra | None = None,
        logits: Select | None = None,
        memory: Memory | None = None,
    ) -> None:
        super().__init__()
        self.memory = memory
        self._check(attack, mining, extra)
        self.attack = attack
        self.mining = mining
        self.extra = extra
        self.on_input_gradient = None
        self._engine = Engine.of(engine)
        self._selection = None if logits is None else Selection(logits)
        self._cache = GraphCache()
        self._seen: Seen | None = None
        self._last: Callable[[], Record] | None = None
        self._passes = Passes()

    @property
    def engine(self) -> Engine:
        """How attack and update are executed; may be set, also by name."""
        return self._engine

    @engine.setter
    def engine(self, engine: Engine | str) -> None:
        self._engine = Engine.of(engine)

    @abstractmethod
    def objective(self, clean_logits: Tensor | None, adversarial_logits: Tensor, y: Tensor) -> Tensor:
        """Returns the loss of a minibatch, 0-dim, with gradient to the logits.

        Args:
            clean_logits: [m, K], of the update's forward of x; None if `clean_forwards` is 0.
            adversarial_logits: [m, K], of its forward of x'; the clean ones for samples that it leaves out.
            y: [m] int64 in 0..K-1, or [m, K] distributions in the width of the logits (float32 at least).
        """

    def graph_key(self) -> Hashable:
        """Returns all of the loss's own numbers that `objective` reads: graphs are captured again if one changes.

        None, the default: the update of a custom loss is not captured. A loss that reads only its arguments returns ();
        a loss that reads its own tensors cannot be captured.
        """
        return None

    def objective_of_two(self, first: Tensor, second: Tensor, adversarial_logits: Tensor, y: Tensor) -> Tensor:
        """Returns the loss for two clean forwards, `first` and `second` [m, K], that differ by random numbers.

        Args:
            adversarial_logits, y: as for `objective`.
        """
        return self.objective(first, adversarial_logits, y)

    def weighted_objective(
        self, clean_logits: Tensor | None, adversarial_logits: Tensor, y: Tensor, weights: Tensor
    ) -> Tensor:
        """Like `objective`, where a sample's adversarial logits count as often as its weight says.

        For a mining with `HalfDrawn`, in which half of the robust samples stand for all of them; a loss of your own is
        refused there unless it has this method.

        Args:
            clean_logits, adversarial_logits, y: as for `objective`; without clean forwards, of weights above 0 alone.
            weights: [m] float64 of at least 0, w. Over all samples of a minibatch they sum to their number.

        Raises:
            NotImplementedError: the loss has none of its own.
        """
        raise NotImplementedError

    def forward(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        indices: Tensor | None = None,
        *,
        placement: Placement | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Returns the loss of a minibatch, ready for `backward()`. Gradients are not zeroed.

        Args:
            model: maps [m, ...] to logits [m, K]; compiled by `torch.compile` or not.
            x: [m, ...] floating point within the attack's bounds, m ≥ 1.
            y: [m] integers in 0..K-1; or [m, K] floating-point distributions (of CutMix, Mixup, a teacher), rows of at
                least 0 with the sum 1, to 1e-5 or in 16 bits four units in the last place. Mining judges a sample by
                the largest part of its distribution, the first of equals.
            indices: [m] integers in 0..2^32-1, each sample's number, in its data set say. A sample's start then depends
                on its number and the seed last given to `generator` (or the device's own) alone, in whatever batch and
                on whatever rank it is, of images in one memory format. Nothing is drawn: give a new seed each epoch.
            placement: with a memory, where crops lie in their own images' frames, and which are mirrored; None: the
                images are these.
            generator: on the images' device, for the random start. Without it and without mining, images on the CPU
                draw like the authors' code, so that a seeded script repeats its numbers. With mining only a seed is
                drawn, from this generator or the device's own.

        Returns:
            0-dim loss with gradient to the model's parameters.

        Raises:
            TypeError: images are not floating point, labels of another kind, or the model does not return a tensor.
            ValueError: a shape, device or value does not fit (pixels outside the bounds, labels out of range, NaN
                logits, NaN in the input gradient). No buffer, no gradient and no F_R has changed then, and random
                generators are as before, unless it is the update that went wrong, its forwards or its further term:
                batch norm may have moved. On a GPU, NaN in an input gradient is raised after these forwards, and with
                mining by the next call.
        """
        call = Call.of(self.engine, self._cache, x, y, self.mining, indices, generator)
        return self.of_call(model, x, y, replace(call, placement=placement))

    def of_call(self, model: nn.Module, x: Tensor, y: Tensor, call: Call) -> Tensor:
        """The loss of model, x and y, which have been checked; `call` is how it goes about it."""
        this = wanted() or Pass()
        with self.again() if this.further else nullcontext():
            if self._selection is None:
                return self._of_pass(model, x, y, call, this)
            with self._selection.in_front_of(model) as selected:
                return self._of_pass(selected, x, y, call, this)

    def _of_pass(self, model: nn.Module, x: Tensor, y: Tensor, call: Call, this: Pass) -> Tensor:
        self._check(self.attack, self.mining, self.extra)  # which may have been set since
        check_moving(this.of_moving and self.mining is None)
        if this.of_moving and self.mining is not None:
            check_all_count(self.mining.half_drawn, "with AWP's samples='moved'", "write samples='all'")
        recalled = None if self._passes.reuses(self.mining) else self._recalled(x, call.indices, call.placement)
        call = replace(call, execution=call.execution.fitting(self.attack), recalled=recalled)
        call = replace(call, kept=self._passes.begin(), owner=self._passes.owner)
        mining, execution, update = self.mining, call.execution, call.execution.update
        defaults = self.default_start, self.default_inner
        last, take = update is not None and update.channels_last, self.on_input_gradient
        if self.clean_shared:
            this.update_begins()  # its clean forward is the first
            call = replace(call, clean=SharedForward(last))
        with adversarial.attacking(model, x, y, self.attack, defaults, mining, call) as (model, attack):
            if not self.clean_shared:
                this.update_begins()
            attack = in_update_order(attack)
            updated = attack.of_moving() if this.of_moving else attack
            normalize = model.normalize if isinstance(model, OnPixels) else None
            forwards = Forwards(
                key=self._identity(),
                of=self,
                rows=self._adversarial_rows(updated, call),
                channels_last=last and takes_channels_last(model),
                rerun=mining is None,
                extra=None if self.extra is None else ExtraTerm(self.extra, x.detach(), attack.plan, normalize),
                adversarial_first=this.adversarial_first and self.clean_forwards == 2,
                of_moving=this.of_moving,
                weights=weights_of(attack.plan),
                on_gradient=take and in_callers_rows(take, attack.plan),
            )
            terms, x_adv, beside = adversarial.run(model, updated, forwards, execution)
            self._seen = Seen(
                ref(unwrapped(model)), ref(model), x.device, execution, beside, updated.shared is not None
            )
        loss, adversarial_logits, *clean = terms
        assert attack.y is not None
        of_all = attack.of_all(adversarial_logits)
        if mining is not None:
            labels = attack.plan.sort(y) if is_soft(y) else attack.y  # as given: in 16 bits their sums are off
            mining.observe(of_all, labels, order=attack.plan.order, faulty=attack.unable)
        self._passes.keep(attack.ended(), mining)
        if self.memory is not None and call.recalled is not None and self._passes.first(mining):
            epsilon, l2 = self.attack.epsilon, self.attack.norm == "l2"
            self.memory.remember(call.recalled, x_adv.detach(), attack.x, attack.plan, epsilon, l2=l2)
        whole = len(updated.x) == len(x)
        self._last = partial(Record.of, attack.plan, x.detach(), x_adv, normalize, of_all, *clean) if whole else None
        return loss

    def again(self, *, reuse: bool = True) -> AbstractContextManager[None]:
        """A further pass over the last minibatch, at other weights: in the block a loss moves neither F_R nor a count.

        For optimizers that evaluate one minibatch's loss at several weights, such as sharpness-aware ones:
        `with criterion.again(): criterion(model, x, y).backward()`. The last minibatch is that of the last call outside
        of such a block; its tensors stay on the device until the next. With mining it is `mining.again`. To enter it
        is a RuntimeError where there is no last minibatch, it ended with an error, or since then the mining was moved
        or loaded, or served another loss; a ValueError of the call where x and y are not that minibatch.

        Args:
            reuse: whether the calls in the block take the x' of the first pass, and run only the update's forwards.
                False: the attack runs anew at the present weights, with mining by F_R as it was for the first pass.
        """
        return self._passes.again(self.mining, reuse)

    @property
    def last(self) -> Record:
        """The data to log of the last minibatch.

        Raises:
            RuntimeError: there has been none.
        """
        if self._last is None:
            raise RuntimeError("there is no last minibatch yet: call the loss first, criterion(model, x, y)")
        return self._last()

    def explain(self) -> str:
        """Describes what ran folded, from graphs, in 16 bits, on streams in the last call; what did not, and why."""
        title = f"{type(self).__name__}, engine {self.engine.name!r}"
        if self._seen is None:
            return f"{title}: not called yet"
        memory = [] if self.memory is None else [f"memory: {self.memory.description()}"]
        return "\n".join([f"{title}, on {self._seen.device}", *lines(self._seen), *memory])

    def extra_repr(self) -> str:
        """The configuration, as it would be written."""
        extra = "" if self.extra is None else f", extra={getattr(self.extra, '__name__', type(self.extra).__name__)}"
        return f"{self.attack}, engine={self.engine.name!r}{extra}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None, "_seen": None}

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a version without these too
        added: dict[str, Any] = {"_passes": Passes(), "extra": None, "_selection": None, "memory": None}
        added["on_input_gradient"] = None
        added["cross_entropy"] = CrossEntropy()
        for name in added.keys() & state["_modules"].keys():  # what is a module is a part of the loss
            del added[name]
        super().__setstate__(added | state)  # type: ignore[no-untyped-call]

    def _check(self, attack: PGD | APGD, mining: BulletTrain | None, extra: Extra | None) -> None:
        arguments.check_attack(attack, mining, (self.default_start, self.default_inner), memory=self.memory)
        if mining is not None and mining.unperturbed == "skip" and self.clean_forwards == 0:
            raise ValueError(
                f"mining's unperturbed must be 'keep' or None for {type(self).__name__}, got 'skip': "
                "its only forward is the adversarial one: leave unperturbed out"
            )
        take = getattr(self, "on_input_gradient", None)  # which the first check comes before
        if take is not None and not callable(take):
            raise TypeError(
                f"on_input_gradient must be a function of a tensor or None, got {type(take).__name__}: "
                "write criterion.on_input_gradient = gradients.append"
            )
        if self.clean_shared:
            if self.clean_forwards != 1:
                raise ValueError(
                    f"clean_forwards must be 1 with clean_shared, got {self.clean_forwards}: write clean_forwards = 1"
                )
            check_shared(attack, attack.inner or self.default_inner, mined=mining is not None)
        if mining is not None and not self._overrides("weighted_objective"):
            check_all_count(mining.half_drawn, f"for {type(self).__name__}", "give it a weighted_objective")
        check_extra(extra)

    def _recalled(self, x: Tensor, indices: Tensor | None, placement: Placement | None) -> Recalled | None:
        if self.memory is not None:
            together = self.mining is not None and self.mining.process_group is not None
            return self.memory.recall(x, indices, placement, l2=self.attack.norm == "l2", together=together)
        if placement is not None:
            raise ValueError(
                f"placement is for a loss with a memory, but this {type(self).__name__} has none: leave it out, or "
                "write memory=Memory(samples)"
            )
        return None

    def _adversarial_rows(self, attack: Attack, call: Call) -> int:
        """Returns how many rows, from the first, run an adversarial forward.

        The default of `unperturbed` depends on N_R and N_O for every policy, regardless of its counts.
        """
        mining, all_rows = self.mining, len(attack.x) - left_out(attack.plan)[0]
        if mining is None or self.clean_forwards == 0:
            return all_rows
        keep = call.unperturbed == "keep" if call.unperturbed else mining.robust_steps or mining.outlier_steps
        return all_rows if keep else attack.moving

    def _identity(self) -> Hashable:
        """Distinguishes the loss's updates from others; None if a custom objective has no `graph_key`."""
        key = self.graph_key() if self._overrides("graph_key") else None
        return None if key is None else (type(self), key)

    def _overrides(self, method: str) -> bool:
        """Whether the method is of the class whose objective this is, or of one below it."""
        of_method = next(c for c in type(self).__mro__ if method in vars(c))
        of_objective = next(c for c in type(self).__mro__ if vars(c).keys() & {"objective", "objective_of_two"})
        return issubclass(of_method, of_objective)


class RobustTermLoss(Smoothed, AdversarialLoss):
    """An adversarial loss of a clean and a robust term.

    Args:
        beta: β ≥ 0, the weight of the robust term. attack, mining, engine, extra, logits,
            memory: as for `AdversarialLoss`.
        label_smoothing, smoothing: of the term that learns the labels, as `CrossEntropy` has them; not of the attack.
        clean_updates: how often the clean batch moves batch norm: "authors", as in the authors' code, a number below
            that, or "shared", as for `TRADESLoss`.

    Raises:
        TypeError, ValueError: as `AdversarialLoss`, or another argument is not of its kind or out of range.
    """

    def __init__(
        self,
        attack: PGD | APGD,
        beta: float = 6.0,
        *,
        mining: BulletTrain | None = None,
        engine: Engine | str = "fast",
        label_smoothing: float = 0.0,
        smoothing: Smoothing = "torch",
        clean_updates: CleanUpdates = "authors",
        extra: Extra | None = None,
        logits: Select | None = None,
        memory: Memory | None = None,
    ) -> None:
        super().__init__(attack, mining=mining, engine=engine, extra=extra, logits=logits, memory=memory)
        self.beta = beta
        self.cross_entropy = CrossEntropy(label_smoothing, smoothing)
        self.clean_forwards = clean_forwards_of(clean_updates, most=type(self).clean_forwards)
        self.clean_shared = clean_updates == SHARED
        self._check(attack, mining, extra)

    def extra_repr(self) -> str:
        """The configuration, as it would be written."""
        fewer = ", clean_updates=1" if self.clean_forwards < type(self).clean_forwards else ""
        clean = ", clean_updates='shared'" if self.clean_shared else fewer
        return super().extra_repr() + self.cross_entropy.options() + clean

    @property
    def beta(self) -> float:
        """The weight β of the robust term; may be set."""
        return self._beta

    @beta.setter
    def beta(self, beta: float) -> None:
        self._beta = weight("beta", beta)
