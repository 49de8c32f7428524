"""One method of a training run: its model, loss, optimiser, mining state, random stream and clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bt_fast.attack.balanced import Balance
from bt_fast.attack.pgd import PGD
from bt_fast.baselines.fast import fast_loss
from bt_fast.baselines.grad_align import grad_align
from bt_fast.baselines.mart_reference import mart_reference_loss
from bt_fast.baselines.pgd_reference import pgd_reference_loss
from bt_fast.baselines.trades_reference import trades_reference_loss
from bt_fast.baselines.yopo import yopo_loss
from bt_fast.device import synchronize
from bt_fast.engine import Engine
from bt_fast.faults import NonFiniteError
from bt_fast.guard import Guard, Skipped
from bt_fast.lab.config import RunConfig
from bt_fast.lab.data import ImageDataset
from bt_fast.lab.models import build_model
from bt_fast.lab.remembering import check_no_file, file_of, new_memory, own_state, remove_unsaved, states_of
from bt_fast.lab.world import ALONE, Share, World
from bt_fast.memory import Memory
from bt_fast.mining import BulletTrain
from bt_fast.objectives.augmix import AugMixLoss
from bt_fast.objectives.loss import AdversarialLoss
from bt_fast.objectives.mart import MARTLoss, mart_loss
from bt_fast.objectives.pgd import PGDLoss, pgd_loss
from bt_fast.objectives.trades import TRADESLoss, trades_loss
from bt_fast.placement import Placement
from bt_fast.ranges import BACKWARD, range_

# by name: the authors' code, our class, and our function
OBJECTIVES: dict[str, tuple[Callable[..., Tensor], type[AdversarialLoss], Callable[..., Tensor]]] = {
    "trades": (trades_reference_loss, TRADESLoss, trades_loss),
    "mart": (mart_reference_loss, MARTLoss, mart_loss),
    "pgd": (pgd_reference_loss, PGDLoss, pgd_loss),
}


class Contestant:
    """One method of a run, in the same state on each rank of a world.

    Attributes:
        kind, config: the parsed method, and the run's configuration with the method's options.
        bullet, criterion: None for a method without one.
        seconds: of each step. interval: begin and end of the last step, on the clock of `time.perf_counter`.
        loss_sum, left_out: the summed losses of this epoch, and the number of its skipped minibatches.
        counted: int64 [3], samples in each group up to the last record.
    """

    def __init__(
        self,
        method: str,
        config: RunConfig,
        dataset: ImageDataset,
        device: torch.device,
        world: World = ALONE,
        balance: Balance | None = None,
    ) -> None:
        self.method = method
        self.kind, self.config = config.of_method(method)
        if self.kind.algorithm == "yopo" and world.group is not None:
            raise ValueError(
                f"--method {method}: YOPO's gradients bypass the sum over ranks; it runs on one alone; "
                "leave it out under torchrun"
            )
        self.world = world
        self.device = device
        torch.manual_seed(config.seed)
        self.image_shape = dataset.x_train.shape[1:]
        channels, height, width = self.image_shape
        sizes: dict[str, Any] = {"in_channels": channels, "image_size": (height, width), "num_classes": dataset.classes}
        self.model, self._wrapped = world.place(build_model(config.model, width=config.width, **sizes), device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=config.lr,
            momentum=config.sgd_momentum,
            weight_decay=config.weight_decay,
            fused=device.type == "cuda" or None,  # the fused step skips faulty gradients on the device
        )
        self.bullet = _bullet(self.config, world, balance).to(device) if self.kind.algorithm == "bullet" else None
        modules = [self.model] if self.bullet is None else [self.model, self.bullet]
        skip: Any = config.non_finite
        self.guard = Guard(self.optimizer, *modules, non_finite=skip, process_group=world.group)
        self.engine = Engine.parse(self.kind.engine or self.config.engine)
        self.criterion = self._criterion()
        self.seconds: list[float] = []
        self.interval = (0.0, 0.0)
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.left_out = 0
        self.counted = torch.zeros(3, dtype=torch.int64, device=device)
        self._random = _random_state(device)

    def _criterion(self) -> AdversarialLoss | AugMixLoss | None:
        c, algorithm = self.config, self.kind.algorithm
        if c.loss == "augmix":
            return AugMixLoss(self.bullet, jsd=algorithm != "no-jsd", engine=self.engine)
        if algorithm not in ("optimised", "bullet"):
            return None
        steps = c.steps if self.bullet is None else max(c.boundary_steps, 1)
        attack = PGD(c.epsilon, c.step_size, steps)
        return OBJECTIVES[c.loss][1](attack, mining=self.bullet, engine=self.engine, **self._beta())

    def _beta(self) -> dict[str, Any]:
        """The weight of the robust term as an option; PGD's loss has none."""
        return {} if self.config.loss == "pgd" else {"beta": self.config.beta}

    @property
    def memory(self) -> Memory | None:
        """What it remembers; None for a method without a memory, or before `remember`."""
        return self.criterion.memory if isinstance(self.criterion, AdversarialLoss) else None

    def remember(
        self, folder: Path, ranks_of: Tensor, fingerprint: str, saved: list[dict[str, Any]] | None = None
    ) -> None:
        """Begins the memory, or goes on with that of a checkpoint; nothing without one in the configuration.

        Args:
            folder: for its file. ranks_of: int64 [n], the rank that sees each training image.
            fingerprint: of the data.
            saved: what `memory_states` returned on rank 0; None for a new run.

        Raises:
            ValueError: the file is another's, or the checkpoint's memory is.
        """
        if not self.config.memory or not isinstance(self.criterion, AdversarialLoss):
            return
        path, own = file_of(folder, self.method, self.world.rank), None
        if saved is None:
            check_no_file(path)
        else:
            own = own_state(saved, self.world)
            if self.config.memory_storage == "file":
                remove_unsaved(path, own)
        memory = new_memory(self.config, self.image_shape, ranks_of, self.world.rank, fingerprint, path)
        memory.to(self.device)
        if own is not None:
            memory.load_state_dict(own)
        self.criterion.memory = memory

    def step(
        self, x: Tensor, y: Tensor, indices: Tensor | None = None, placement: Placement | None = None
    ) -> Skipped | None:
        """Takes one timed training step; returns why the minibatch was skipped, or None. Collective.

        Args:
            x: [m, C, H, W] in [0, 1], this rank's images. y: int64 [m], their labels.
            indices: int64, the places in the training set of the whole minibatch, for reports, its size and a memory.
            placement: of these images, where they are crops.

        Raises:
            NonFiniteError: NaN or Inf in the minibatch, in a run that does not skip such minibatches.
        """
        skipped_before, loss = len(self.guard.skipped), torch.zeros((), device=self.device)
        share = self.world.share(len(x) if indices is None else len(indices))
        with self._own_random_stream():
            synchronize(self.device)
            begin = time.perf_counter()
            with self.guard.minibatch(indices):
                loss = self._loss_of_share(x, y, share, **self._numbered(share, indices, placement))
                with range_(BACKWARD):
                    # with these weights, the mean of the ranks' gradients is the gradient of the whole minibatch
                    (loss * (share.weight * self.world.count) if self.world.group else loss).backward()
                    self.guard.step(loss)
            self.world.follow(self.model)
            synchronize(self.device)
            self.interval = (begin, time.perf_counter())
            self.seconds.append(self.interval[1] - begin)
        self.guard.settle()  # does not wait, since the device has just finished
        if len(self.guard.skipped) > skipped_before:
            self.left_out += 1
            return self.guard.skipped[-1]
        self.loss_sum += self.world.mean(loss.detach(), share)
        return None

    def _numbered(self, share: Share, indices: Tensor | None, placement: Placement | None) -> dict[str, Any]:
        """What a call of a criterion with a memory takes, with the seed of this iteration's starts; else nothing."""
        if self.memory is None or indices is None:
            return {}
        seed = self.config.seed * 1_000_003 + len(self.seconds)
        generator = torch.Generator(self.device).manual_seed(seed)
        return {"indices": share.own(indices).to(self.device), "placement": placement, "generator": generator}

    def _loss_of_share(self, x: Tensor, y: Tensor, share: Share, **numbered: Any) -> Tensor:
        """The loss with the random numbers of the whole minibatch; a fault in one rank's share is raised on all."""
        loss, fault = torch.zeros((), device="cpu"), None
        try:
            with self.world.draws(share) or nullcontext():
                loss = self._loss(x, y, **numbered)
        except NonFiniteError as error:
            fault = error
        self.world.check(fault, share)
        return loss

    def _loss(self, x: Tensor, y: Tensor, **numbered: Any) -> Tensor:
        if self.criterion is None:
            loss = self._baseline(x, y)
        else:
            self.optimizer.zero_grad()
            options = {"generator": self._augmix_generator()} if self.config.loss == "augmix" else numbered
            loss = self.criterion(self._wrapped, x, y, **options)
        if self.config.grad_align:
            loss = loss + self.config.grad_align * grad_align(self._wrapped, x, y, epsilon=self.config.epsilon)
        return loss

    def _augmix_generator(self) -> torch.Generator | None:
        """A generator for AugMix's views if each of several ranks draws for its own boundary samples, else None."""
        if self.bullet is None or self.world.group is None:
            return None
        seed = (self.config.seed * 1_000_003 + len(self.seconds)) * self.world.count + self.world.rank
        return torch.Generator(self.device).manual_seed(seed)

    def _baseline(self, x: Tensor, y: Tensor) -> Tensor:
        """Computes the loss of a method without its own class; clears the gradients itself."""
        c, kind = self.config, self.kind
        batch = (self._wrapped, x, y, self.optimizer)
        options: dict[str, Any] = {"epsilon": c.epsilon, **self._beta()}
        reference_loss, _, our_loss = OBJECTIVES[c.loss]
        if kind.algorithm == "reference":
            return reference_loss(*batch, c.step_size, perturb_steps=c.steps, **options)
        if kind.algorithm == "yopo":
            m, n = kind.numbers
            options |= {"propagations": m, "layer_steps": n, "step_size": c.step_size, "objective": c.loss}
            loss = yopo_loss(*batch, **options)
            return loss / m if c.loss == "pgd" else loss  # of m summed gradients; the authors divide the learning rate
        own_size = c.step_size if "step_size" in kind.changes else None
        return fast_loss(our_loss, *batch, steps=kind.numbers[0], step_size=own_size, engine=self.engine, **options)

    @contextmanager
    def _own_random_stream(self) -> Iterator[None]:
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.set_rng_state(self._random[0])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(self._random[1], self.device)
            try:
                yield
            finally:
                self._random = _random_state(self.device)

    def state(self) -> dict[str, Any]:
        """Returns all that the next step depends on, and the clock; except what it remembers: `memory_states`."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "bullet": None if self.bullet is None else self.bullet.state_dict(),
            "counted": self.counted,
            "random": self._random,
            "seconds": torch.tensor(self.seconds, dtype=torch.float64, device="cpu"),
            "loss_sum": self.loss_sum,
            "guard": self.guard.state_dict(),
            "left_out": self.left_out,
        }

    def memory_states(self) -> list[dict[str, Any]] | None:
        """Returns the states of the ranks' memories on rank 0; None without a memory. Collective."""
        return None if self.memory is None else states_of(self.memory, self.world)

    def load(self, state: dict[str, Any]) -> None:
        """Loads what `state` returned; in the first version it had neither `guard` nor `left_out`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.bullet is not None:
            self.bullet.load_state_dict(state["bullet"])
        self.counted = state["counted"].to(self.device)
        self._random = state["random"]
        self.seconds = state["seconds"].tolist()
        self.loss_sum = state["loss_sum"].to(self.device)
        self.guard.load_state_dict(state.get("guard", {"minibatches": len(self.seconds), "in_a_row": 0}))
        self.left_out = state.get("left_out", 0)
        with self._own_random_stream():  # raises if torch refuses the states
            pass


def _bullet(config: RunConfig, world: World, balance: Balance | None) -> BulletTrain:
    bullet = BulletTrain(
        config.boundary_steps,
        config.robust_steps,
        config.outlier_steps,
        gamma=config.gamma,
        momentum=config.fraction_momentum,
        metric=config.metric,
        policy=config.policy,
        process_group=world.group,
        balance=balance,
    )
    if bullet.ranks is not None:  # set in advance: the first minibatch of a resumed run may be a small one
        bullet.ranks.rows = world.most_in_a_share(config.batch_size)
    return bullet


def _random_state(device: torch.device) -> list[Tensor]:
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *cuda]
