"""A loss of adversarial training: the attack, the update's forwards, and an objective of their logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal
from weakref import ref

import torch
from torch import Tensor, nn

from bt_fast.attack.balanced import Balance
from bt_fast.attack.graph_cache import GraphCache
from bt_fast.attack.pgd import PGD, InnerLoss
from bt_fast.attack.pixels import OnPixels, on_pixels
from bt_fast.attack.start import Noise
from bt_fast.attack.wrapped import unwrapped
from bt_fast.engine import Engine
from bt_fast.mining import BulletTrain
from bt_fast.objectives import adversarial
from bt_fast.objectives.adversarial import Adversary, Attack
from bt_fast.objectives.execution import Execution, Seen, lines
from bt_fast.objectives.forwards import Forwards
from bt_fast.objectives.given_back import given_back
from bt_fast.validation import check_kind, weight

Unperturbed = Literal["keep", "skip"]


@dataclass(frozen=True, eq=False)
class Call:
    """How one call of a loss goes about it, beside what the loss itself is made of.

    Attributes:
        execution: of attack and update.
        indices: [m] integers, the samples' numbers. generator: for the random start.
        unperturbed: whether samples with 0 steps take part in the update's adversarial forward; None for the default.
        balance: how the ranks of the mining's process group share the attack out, if they do.
        name: of the images in messages.
    """

    execution: Execution
    indices: Tensor | None
    generator: torch.Generator | None
    unperturbed: Unperturbed | None
    balance: Balance | None
    name: str = "x"


@dataclass(frozen=True, eq=False)
class Record:
    """What a script logs of a loss's last minibatch of m samples, in the order in which it was given.

    Attributes:
        logits: [m, K], of the update's clean forward; None for a loss that has none.
        adversarial_logits: [m, K], of the update's adversarial forward.
        x_adv: [m, ...], x', in the units of x.
        steps: [m] int64, the attack steps of each sample.
    """

    logits: Tensor | None
    adversarial_logits: Tensor
    x_adv: Tensor
    steps: Tensor


class AdversarialLoss(nn.Module, ABC):
    """A loss whose images are attacked first: `criterion(model, x, y).backward()`.

    A loss of one's own is a subclass with an `objective`. The attack runs in eval mode. The update's forwards run in
    the modes in which the model was found, module by module; a model found in eval mode as a whole runs them in train
    mode, as the authors' code makes it. The modes are restored. With `mining` it is Algorithm 2 of the BulletTrain
    paper: steps by group, the samples sorted by descending steps, F_R moved by the adversarial samples' accuracy.

    Args:
        attack: how images are attacked.
        mining: who gets how many steps; None for all alike. It is a part of this module, moves and saves with it.
        engine: how attack and update are executed, by name or as an `Engine`.

    Attributes:
        clean_forwards: how often the update runs the clean images: 0, 1, or 2 as TRADES' authors do.
        default_start, default_inner: of an attack that names none.

    Raises:
        TypeError: an argument is not of its kind.
        ValueError: the engine's name is not known, or attack and mining have different numbers of steps.
    """

    clean_forwards: int = 1
    default_start: ClassVar[Noise] = "normal"
    default_inner: ClassVar[InnerLoss] = "cross_entropy"
    step_in_l2_is_its_own: ClassVar[bool] = False  # the authors' function does not use its step size there
    drop_in: ClassVar[str] = ""  # the authors' function

    def __init__(self, attack: PGD, *, mining: BulletTrain | None = None, engine: Engine | str = "fast") -> None:
        super().__init__()
        check_kind("attack", attack, PGD, "write PGD(epsilon=8 / 255, step_size=2 / 255, steps=10)")
        check_kind("mining", mining, BulletTrain, "write mining=BulletTrain()", optional=True)
        adversarial.check_steps(attack, mining)
        if mining is not None and mining.unperturbed == "skip" and self.clean_forwards == 0:
            raise ValueError(
                f"mining's unperturbed must be 'keep' or None for {type(self).__name__}, got 'skip': "
                "its only forward is the adversarial one: leave unperturbed out"
            )
        self.attack = attack
        self.mining = mining
        self._engine = Engine.of(engine)
        self._cache = GraphCache()
        self._seen: Seen | None = None
        self._last: tuple[Attack, Callable[[], Tensor], Tensor, Tensor | None] | None = None

    @property
    def engine(self) -> Engine:
        """How attack and update are executed; may be set, by name too."""
        return self._engine

    @engine.setter
    def engine(self, engine: Engine | str) -> None:
        self._engine = Engine.of(engine)

    @abstractmethod
    def objective(self, clean_logits: Tensor | None, adversarial_logits: Tensor, y: Tensor) -> Tensor:
        """The loss of a minibatch, 0-dim, with gradient to the logits.

        Args:
            clean_logits: [m, K], of the update's forward of x; None where `clean_forwards` is 0.
            adversarial_logits: [m, K], of its forward of x'. Of samples without attack steps, whose forward is left
                out, they are the clean ones.
            y: [m] int64 in 0..K-1.
        """

    def graph_key(self) -> Hashable:
        """All numbers of its own that `objective` reads, for graphs to be captured anew where one changes.

        None, the default: the update of a loss of one's own is not captured. One that reads nothing but its arguments
        returns (); one that reads tensors of its own cannot be captured.
        """
        return None

    def objective_of_two(self, first: Tensor, second: Tensor, adversarial_logits: Tensor, y: Tensor) -> Tensor:
        """The loss where there are two clean forwards, `first` and `second` [m, K], that differ by random numbers.

        Args:
            adversarial_logits, y: as for `objective`.
        """
        return self.objective(first, adversarial_logits, y)

    def forward(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        indices: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The loss of a minibatch, ready for `backward()`. Gradients are not zeroed.

        Args:
            model: maps [m, ...] to logits [m, K]; compiled by `torch.compile` or not.
            x: [m, ...] floating point within the attack's bounds, m ≥ 1.
            y: [m] integers in 0..K-1.
            indices: [m] integers in 0..2^32-1, each sample's number, in its data set say. Its start is then that of
                this number and of the seed that `generator` (or the device's own) was given last, from which nothing is
                drawn: the same in whatever batch and on whatever rank it is. Give a new seed in each epoch.
            generator: on the images' device, for the random start. Without it and without mining, images on the CPU
                draw as the authors' code does, so that a seeded script repeats its numbers. With mining only a seed is
                drawn, from this generator or the device's own.

        Returns:
            0-dim loss with gradient to the model's parameters.

        Raises:
            TypeError: images are not floating point, labels not integers, or the model does not return a tensor.
            ValueError: a shape, device or value does not fit (pixels outside the bounds, labels out of range, NaN
                logits, NaN in the input gradient). Nothing has been changed then: no buffer, no gradient, no F_R. Only
                what goes wrong in the update's own forwards, after a sound attack, leaves batch norm's buffers moved.
                On a GPU NaN in an input gradient is known after those forwards, and with mining raised by the next
                call.
        """
        adversarial.check_batch(x, y, "x")
        adversarial.check_draws(x, indices, generator, "indices")
        mining = self.mining
        balance = None if mining is None else adversarial.checked_balance(mining.balance, mining)
        unperturbed = None if mining is None else mining.unperturbed
        execution = Execution.of(self.engine, self._cache, x)
        return self.of_call(model, x, y, Call(execution, indices, generator, unperturbed, balance))

    def of_call(self, model: nn.Module, x: Tensor, y: Tensor, call: Call) -> Tensor:
        """The loss of model, x and y, which have been checked; `call` is how it goes about it."""
        mining, given, execution = self.mining, self.attack, call.execution
        with (
            on_pixels(model, x, given.normalization, call.name, given.bounds) as (model, pixels),
            execution.autocast(x),
        ):
            attack = adversarial.start(model, pixels(x), y, self._adversary(call), mining, call.name)
            update = execution.update
            forwards = Forwards(
                key=self._identity(),
                of=self,
                rows=self._adversarial_rows(attack, call.unperturbed),
                channels_last=update is not None and update.channels_last,
                rerun=mining is None,
            )
            ran = adversarial.run(model, attack, forwards, update, execution.cache)
            self._seen = Seen(ref(unwrapped(model)), ref(model), x.device, execution, ran.beside)
        loss, judged, *clean = ran.terms
        ended = attack.ended()
        if mining is not None:
            mining.observe(judged, attack.y, order=attack.order, faulty=attack.faulty)
            mining.keep(ended)
        normalize = model.normalize if isinstance(model, OnPixels) else None
        self._last = ended, given_back(ran.x_adv, x, attack.plan, normalize), judged, clean[0] if clean else None
        return loss

    @property
    def last(self) -> Record:
        """What there is to log of the last minibatch.

        Raises:
            RuntimeError: there has been none.
        """
        if self._last is None:
            raise RuntimeError("there is no last minibatch yet: call the loss first, criterion(model, x, y)")
        attack, x_adv, judged, clean = self._last
        plan = attack.plan
        logits = None if clean is None else plan.unsort(clean)
        return Record(logits, plan.unsort(judged), x_adv(), plan.steps)

    def explain(self) -> str:
        """What ran folded, from graphs, in 16 bits, on streams in the last call; what did not, and why."""
        title = f"{type(self).__name__}, engine {self.engine.name!r}"
        if self._seen is None:
            return f"{title}: not called yet"
        title += f", on {self._seen.device}"
        return "\n".join([title, *lines(self._seen)])

    def extra_repr(self) -> str:
        """The configuration, as it would be written."""
        return f"{self.attack}, engine={self.engine.name!r}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None, "_seen": None}

    def _adversary(self, call: Call) -> Adversary:
        attack = self.attack
        return Adversary(
            attack.threat,
            attack.step_size,
            attack.steps,
            attack.start or self.default_start,
            attack.inner or self.default_inner,
            call.generator,
            call.execution.view,
            call.execution.runner,
            call.indices,
            call.balance,
        )

    def _adversarial_rows(self, attack: Attack, unperturbed: Unperturbed | None) -> int:
        """How many rows, from the first, run an adversarial forward.

        The default of `unperturbed` is that of N_R and N_O for every policy, whatever counts it gives.
        """
        mining = self.mining
        if mining is None or self.clean_forwards == 0:
            return len(attack.x)
        keep = unperturbed == "keep" if unperturbed else mining.robust_steps or mining.outlier_steps
        return len(attack.x) if keep else attack.moving

    def _identity(self) -> Hashable:
        """What tells the loss's updates from those of others; None where it is not known to say so."""
        of_key = next(c for c in type(self).__mro__ if "graph_key" in vars(c))
        of_objective = next(c for c in type(self).__mro__ if vars(c).keys() & {"objective", "objective_of_two"})
        key = self.graph_key() if issubclass(of_key, of_objective) else None
        return None if key is None else (type(self), key)


class RobustTermLoss(AdversarialLoss):
    """An adversarial loss of a clean and a robust term.

    Args:
        beta: β ≥ 0, the weight of the robust term. attack, mining, engine: as for `AdversarialLoss`.

    Raises:
        TypeError, ValueError: as `AdversarialLoss`, or beta is no finite number of at least 0.
    """

    def __init__(
        self, attack: PGD, beta: float = 6.0, *, mining: BulletTrain | None = None, engine: Engine | str = "fast"
    ) -> None:
        super().__init__(attack, mining=mining, engine=engine)
        self.beta = beta

    @property
    def beta(self) -> float:
        """β, the weight of the robust term; may be set."""
        return self._beta

    @beta.setter
    def beta(self, beta: float) -> None:
        self._beta = weight("beta", beta)
