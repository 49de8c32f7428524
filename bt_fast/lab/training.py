"""Training runs: several methods in lockstep on the same minibatches, so that their times pair and their data agree."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bt_fast.allocation import Oracle
from bt_fast.attack.balanced import Balance
from bt_fast.attack.forward import clean_logits, eval_mode
from bt_fast.attack.pgd import PGD
from bt_fast.baselines.fast import fast_loss
from bt_fast.baselines.grad_align import grad_align
from bt_fast.baselines.mart_reference import mart_reference_loss
from bt_fast.baselines.pgd_reference import pgd_reference_loss
from bt_fast.baselines.trades_reference import trades_reference_loss
from bt_fast.baselines.yopo import yopo_loss
from bt_fast.device import synchronize
from bt_fast.engine import Engine
from bt_fast.evaluation import evaluate
from bt_fast.faults import NonFiniteError
from bt_fast.guard import Guard, Skipped
from bt_fast.lab.augment import crop_and_flip
from bt_fast.lab.checkpoint import load_checkpoint, save_checkpoint
from bt_fast.lab.config import RunConfig
from bt_fast.lab.data import ImageDataset, images, minibatches
from bt_fast.lab.energy import TrainingEnergy
from bt_fast.lab.files import append_line, parse_json, write_text
from bt_fast.lab.fitting import check_training
from bt_fast.lab.locks import hold, new_folder
from bt_fast.lab.models import build_model
from bt_fast.lab.provenance import Provenance, check_configuration, check_data, described, fingerprint, this_start
from bt_fast.lab.world import ALONE, Share, World
from bt_fast.mining import BulletTrain
from bt_fast.objectives.augmix import AugMixLoss
from bt_fast.objectives.loss import AdversarialLoss
from bt_fast.objectives.mart import MARTLoss, mart_loss
from bt_fast.objectives.pgd import PGDLoss, pgd_loss
from bt_fast.objectives.trades import TRADESLoss, trades_loss
from bt_fast.ops import GROUPS
from bt_fast.ranges import BACKWARD, range_

EVALUATION_BATCH = 250
CHECKPOINT_SECONDS = 60.0
RECORD_EVERY = 10  # iterations; each look waits for the device
# the authors' code, ours, and the same as a function
OBJECTIVES: dict[str, tuple[Callable[..., Tensor], type[AdversarialLoss], Callable[..., Tensor]]] = {
    "trades": (trades_reference_loss, TRADESLoss, trades_loss),
    "mart": (mart_reference_loss, MARTLoss, mart_loss),
    "pgd": (pgd_reference_loss, PGDLoss, pgd_loss),
}
WARM_UP = 3  # iterations left out of the ratios: first calls compile and allocate


class Contestant:
    """One method: its model, optimiser, mining state, random stream and clock; the same on each rank of a world.

    Raises:
        ValueError: the method does not run on several ranks.
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
        model = build_model(
            config.model,
            in_channels=channels,
            image_size=(height, width),
            num_classes=dataset.classes,
            width=config.width,
        )
        self.model = world.together(model, device).to(device)
        self._wrapped = world.wrap(self.model, device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=config.lr,
            momentum=config.sgd_momentum,
            weight_decay=config.weight_decay,
            fused=device.type == "cuda" or None,  # it leaves a faulty step out on the device
        )
        self.bullet = _bullet(self.config, world, balance).to(device) if self.kind.algorithm == "bullet" else None
        modules = [self.model] if self.bullet is None else [self.model, self.bullet]
        skip: Any = config.non_finite
        self.guard = Guard(self.optimizer, *modules, non_finite=skip, process_group=world.group)
        self.left_out = 0  # minibatches of this epoch that were skipped
        self.counted = torch.zeros(3, dtype=torch.int64, device=device)  # samples by group, at the last record
        self.engine = Engine.parse(self.kind.engine or self.config.engine)
        self.criterion = self._criterion()
        self.seconds: list[float] = []
        self.interval = (0.0, 0.0)  # of the last step, on `time.perf_counter`'s clock
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self._random = _random_state(device)

    def _criterion(self) -> AdversarialLoss | AugMixLoss | None:
        """Our loss; None of a method that has none of its own."""
        c, algorithm = self.config, self.kind.algorithm
        if c.loss == "augmix":
            return AugMixLoss(self.bullet, jsd=algorithm != "no-jsd", engine=self.engine)
        if algorithm not in ("optimised", "bullet"):
            return None
        steps = c.steps if self.bullet is None else max(c.boundary_steps, 1)
        attack, beta = PGD(c.epsilon, c.step_size, steps), {} if c.loss == "pgd" else {"beta": c.beta}
        return OBJECTIVES[c.loss][1](attack, mining=self.bullet, engine=self.engine, **beta)

    def step(self, x: Tensor, y: Tensor, indices: Tensor | None = None) -> Skipped | None:
        """One iteration on images [m, C, H, W] in [0, 1] and labels [m], timed. Collective.

        Args:
            x, y: this rank's share.
            indices: int64, which training images the whole minibatch is: for reports, and, on several ranks, for the
                size of the whole.

        Returns:
            What was wrong, if it was skipped.

        Raises:
            NonFiniteError: something was, and is to be raised.
        """
        skipped, loss = len(self.guard.skipped), torch.zeros((), device=self.device)
        share = self.world.share(len(x) if indices is None else len(indices))
        with self._own_random_stream():
            synchronize(self.device)
            began = time.perf_counter()
            with self.guard.minibatch(indices):
                loss = self._loss_of_share(x, y, share)
                with range_(BACKWARD):
                    # the mean of the ranks' gradients is that of the whole minibatch then
                    (loss * (share.weight * self.world.count) if self.world.group else loss).backward()
                    self.guard.step(loss)
            self.world.follow(self.model)
            synchronize(self.device)
            end = time.perf_counter()
            self.seconds.append(end - began)
            self.interval = (began, end)
        self.guard.settle()  # known since the device was waited for
        if len(self.guard.skipped) > skipped:
            self.left_out += 1
            return self.guard.skipped[-1]
        self.loss_sum += self.world.mean(loss.detach(), share)
        return None

    def _loss_of_share(self, x: Tensor, y: Tensor, share: Share) -> Tensor:
        """The loss, its random numbers those of the whole minibatch; what is wrong with one share is raised on all."""
        loss, fault = torch.zeros((), device="cpu"), None
        try:
            with self.world.draws(share) or nullcontext():
                loss = self._loss(x, y)
        except NonFiniteError as error:
            fault = error
        self.world.check(fault, share)
        return loss

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        loss = self._augmix(x, y) if self.config.loss == "augmix" else self._adversarial(x, y)
        if self.config.grad_align:
            loss = loss + self.config.grad_align * grad_align(self._wrapped, x, y, epsilon=self.config.epsilon)
        return loss

    def _augmix(self, x: Tensor, y: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        generator = None
        if self.bullet is not None and self.world.group is not None:  # each rank draws for its own boundary samples
            seed = (self.config.seed * 1_000_003 + len(self.seconds)) * self.world.count + self.world.rank
            generator = torch.Generator(self.device).manual_seed(seed)
        assert self.criterion is not None
        loss: Tensor = self.criterion(self._wrapped, x, y, generator=generator)
        return loss

    def _adversarial(self, x: Tensor, y: Tensor) -> Tensor:
        c = self.config
        batch = (self._wrapped, x, y, self.optimizer)
        options: dict[str, Any] = {"epsilon": c.epsilon} | ({} if c.loss == "pgd" else {"beta": c.beta})
        reference_loss, _, our_loss = OBJECTIVES[c.loss]
        if self.criterion is not None:
            found: Tensor = self.criterion(self._wrapped, x, y)
            self.optimizer.zero_grad()
            return found
        if self.kind.algorithm == "reference":
            return reference_loss(*batch, c.step_size, perturb_steps=c.steps, **options)
        if self.kind.algorithm == "yopo":
            m, n = self.kind.numbers
            options |= {"propagations": m, "layer_steps": n, "step_size": c.step_size, "objective": c.loss}
            loss = yopo_loss(*batch, **options)
            return loss / m if c.loss == "pgd" else loss  # of m summed gradients; the authors divide the learning rate
        own_size = c.step_size if "step_size" in self.kind.changes else None
        options["engine"] = self.engine
        return fast_loss(our_loss, *batch, steps=self.kind.numbers[0], step_size=own_size, **options)

    @contextmanager
    def _own_random_stream(self) -> Iterator[None]:
        outside = _random_state(self.device)
        _set_random_state(self._random, self.device)
        try:
            yield
        finally:
            self._random = _random_state(self.device)
            _set_random_state(outside, self.device)

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, and the clock."""
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

    def load(self, state: dict[str, Any]) -> None:
        """Take on what `state` returned, or did before there was a guard."""
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
        with self._own_random_stream():  # that it is one
            pass


@dataclass(frozen=True)
class Progress:
    """Where a run stands: `iteration` of `iterations` are done; `epoch_ended` where records were just added."""

    iteration: int
    iterations: int
    epoch_ended: bool


class Run:
    """A run folder and the training that fills it.

    `metrics.jsonl` has one record a line, `checkpoint.pt` everything needed to go on, and `run.json` what the run is
    made of (`provenance.Provenance`).

    From when it is made until it is closed or forgotten the folder is this process's: another that would write there is
    refused, readers are not. A process that dies leaves it free.

    Args:
        folder: made if it is not there; None for a new one, `runs/DATE-TIME`.
        resume: go on from the folder's checkpoint, with its configuration; its data may lie in another place.
        observe: called with the run after every tenth iteration, to `append` records of its own. It leaves models and
            random numbers as they are.
        world: the ranks that train together. Each makes a run of the same arguments; what it does is collective, and
            rank 0 writes.
        balance: how the attacks of BulletTrain are shared out among them.

    Attributes:
        minibatch: this rank's images and labels of the last iteration.
        fingerprint: of the data.

    Raises:
        ValueError: as of `fitting.check_training`; another process writes into the folder, it already holds a run and
            `resume` is not set, or the checkpoint does not fit the configuration or the data. Nothing was written.
        OSError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path | None,
        config: RunConfig,
        dataset: ImageDataset,
        device: torch.device,
        *,
        resume: bool = False,
        observe: Observe | None = None,
        world: World = ALONE,
        balance: Balance | None = None,
    ) -> None:
        world.check_minibatches(len(dataset.x_train), config.batch_size)
        check_training(config, dataset, device, world)
        if folder is not None and folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder}: a file, expected a folder for the run; name another with --out")
        self.config = config
        self.dataset = dataset
        self.device = device
        self.world = world
        self.iteration = 0
        self.minibatch: tuple[Tensor, Tensor]
        self._observe = observe
        self.contestants = [Contestant(method, config, dataset, device, world, balance) for method in config.methods]
        self.energy = TrainingEnergy(device, config.methods)
        self.fingerprint = fingerprint(dataset)
        if folder is None:
            folder = world.told(new_folder(Path("runs")) if world.leads else None)
        self.folder = folder
        self.checkpoint_path = folder / "checkpoint.pt"
        self._metrics_path = folder / "metrics.jsonl"
        self._provenance_path = folder / "run.json"
        self._let_go: Callable[[], object] = lambda: None
        if resume and not self.checkpoint_path.exists():
            raise ValueError(f"{self.checkpoint_path}: no such checkpoint file; start the run with --out instead")
        if world.leads:
            folder.mkdir(parents=True, exist_ok=True)
            self._let_go = weakref.finalize(self, hold(folder))
        try:
            self._begin(resume)
        except BaseException:
            self.close()
            raise

    def _begin(self, resume: bool) -> None:
        if resume:
            self._restore()
            if self.iteration < self.iterations:
                self._tell_start()
        elif self.world.leads:
            there = [p for p in (self.checkpoint_path, self._metrics_path, self.folder / "summary.json") if p.exists()]
            if there:
                go_on = f"go on with it by --resume {self.folder}, or " if there[0] == self.checkpoint_path else ""
                raise ValueError(
                    f"{self.folder}: already holds a run ({there[0].name}); {go_on}name another folder with --out"
                )
            self._provenance_path.unlink(missing_ok=True)  # of a run that was killed before its first checkpoint
            self._tell_start()
            self.save()  # so that a run killed at any moment can be resumed

    def close(self) -> None:
        """Leave the folder to other processes; the run is over for this one."""
        self._let_go()

    @property
    def iterations_per_epoch(self) -> int:
        """Minibatches in one pass over the training images."""
        return -(-len(self.dataset.x_train) // self.config.batch_size)

    @property
    def iterations(self) -> int:
        """Minibatches in the whole run."""
        return self.config.epochs * self.iterations_per_epoch

    def train(self) -> Iterator[Progress]:
        """Train to the end, yielding after every iteration; the run can be left at any yield and saved.

        Raises:
            NonFiniteError: NaN or Inf in a minibatch, or in too many one after the other if they are skipped.
            OSError: a record or checkpoint cannot be written; what was written before is whole, and the run resumes.
        """
        with self.energy:
            yield from self._train()

    def _train(self) -> Iterator[Progress]:
        saved = time.monotonic()
        while self.iteration < self.iterations:
            epoch, first = divmod(self.iteration, self.iterations_per_epoch)
            for contestant in self.contestants:
                _set_learning_rate(contestant.optimizer, self.config, epoch)
            indices = list(
                minibatches(len(self.dataset.x_train), self.config.batch_size, seed=self.config.seed, epoch=epoch)
            )
            for batch in indices[first:]:
                self._step(batch)
                ended = self.iteration % self.iterations_per_epoch == 0
                if ended:
                    self._record_allocations(batch)
                    self._end_epoch(epoch)
                if ended or time.monotonic() - saved > CHECKPOINT_SECONDS:
                    self.save()
                    saved = time.monotonic()
                yield Progress(self.iteration, self.iterations, ended)

    def save(self) -> None:
        """Write the checkpoint, on rank 0."""
        if not self.world.leads:
            return
        state = {
            "iteration": self.iteration,
            "data": self.fingerprint,
            "contestants": {c.method: c.state() for c in self.contestants},
            "energy": self.energy.state(),
        }
        save_checkpoint(self.checkpoint_path, self.config, state)

    def evaluate(self, contestant: Contestant, size: int | None, restarts: int) -> dict[str, Any]:
        """Accuracy on the first `size` test images (None: all), the same random starts each time. Collective.

        The ranks share the images out.

        Returns:
            `clean` and `robust` in [0, 1], and `images`, their number. AugMix, which defends against no attack, has
            None for `robust`: `corruptions.corruption_errors` is its measure.
        """
        x, y = self.dataset.x_test[:size], self.dataset.y_test[:size]
        share = self.world.share(len(y))
        batches = evaluation_batches(share.own(x), share.own(y), self.device)
        if self.config.loss == "augmix":
            (clean,) = self.world.sums([clean_correct(contestant.model, batches)])
            return {"clean": clean / len(y), "robust": None, "images": len(y)}
        correct, epsilon = [0, 0], self.config.epsilon
        if len(share):
            found = evaluate(
                contestant.model,
                batches,
                PGD(epsilon, 2 * epsilon / self.config.eval_steps, self.config.eval_steps),
                restarts=restarts,
                generator=torch.Generator(self.device).manual_seed(self.config.seed),
                engine="fast",
                first=share.first,
            )
            correct = [found.clean_correct, found.robust_correct]
        clean, robust = self.world.sums(correct)
        return {"clean": clean / len(y), "robust": robust / len(y), "images": len(y)}

    def final(self, contestant: Contestant) -> dict[str, Any]:
        """What a trained method came to on all test images; evaluated once and then kept among the records.

        Collective; only rank 0 looks into the records, and returns all of one.
        """
        for record in self.records() if self.world.leads else ():
            if record["kind"] == "final" and record["method"] == contestant.method:
                self.world.most(1)
                return record
        if self.world.most(0):
            return {}
        found = self.evaluate(contestant, None, self.config.eval_restarts)
        self.append(kind="final", method=contestant.method, **found)
        return self.records()[-1] if self.world.leads else found

    def records(self) -> list[dict[str, Any]]:
        """What metrics.jsonl holds, but for a last line that was cut off while it was written.

        Raises:
            ValueError: another line is not a record.
        """
        if not self._metrics_path.exists():
            return []
        text = self._metrics_path.read_text(encoding="utf-8", errors="replace")
        lines = text[: text.rfind("\n") + 1].splitlines()
        try:
            found = [parse_json(line) for line in lines]
        except ValueError as error:
            raise ValueError(
                f"{self._metrics_path}: a line is not a record ({error}); restore the file, or start the run anew"
            ) from error
        for record in found:
            if not isinstance(record, dict) or type(record.get("iteration")) is not int or "kind" not in record:
                raise ValueError(
                    f"{self._metrics_path}: a line is not a record ({json.dumps(record)[:80]}); "
                    "restore the file, or start the run anew"
                )
        return found

    def _step(self, batch: Tensor) -> None:
        x, y = self._images(batch, self.world.share(len(batch)), self.iteration)
        turn = self.iteration % len(self.contestants)
        skipped = {}
        for contestant in self.contestants[turn:] + self.contestants[:turn]:
            try:
                skipped[contestant.method] = contestant.step(x, y, batch)
            except NonFiniteError as error:
                message = f"{contestant.method}, {error}"
                raise NonFiniteError(message, error.samples, earlier=error.earlier) from error
            self.energy.add(contestant.method, contestant.interval)
        self.iteration += 1
        self._record_skipped(skipped)
        self.minibatch = (x, y)
        if self.iteration % RECORD_EVERY == 0:
            self._record_fractions()
            if self._observe is not None:
                self._observe(self)

    def _images(self, batch: Tensor, share: Share, iteration: int) -> tuple[Tensor, Tensor]:
        """Images and labels of a share of an iteration's minibatch, augmented."""
        own = share.own(batch)
        x, y = images(self.dataset.x_train[own], self.device), self.dataset.y_train[own].to(self.device)
        if self.config.augment:
            x = crop_and_flip(x, seed=self.config.seed, iteration=iteration, share=share)
        return x, y

    def _record_skipped(self, found: dict[str, Skipped | None]) -> None:
        """What each method did not learn from in this iteration: the training images by their numbers."""
        for contestant in self.contestants:
            if (one := found[contestant.method]) is not None:
                blamed = list(one.blamed) if one.samples else []
                self.append(
                    kind="skipped",
                    method=contestant.method,
                    reason=one.reason,
                    images=list(one.indices),
                    blamed=blamed,
                )

    def _record_fractions(self) -> None:
        """Shares of the groups since the last record (Fig. 3)."""
        for contestant in self.contestants:
            if contestant.bullet is None:
                continue
            contestant.bullet.finish()
            counts = contestant.bullet.group_counts.clone()
            recent, contestant.counted = (counts - contestant.counted).double(), counts
            shares = (recent / recent.sum()).tolist()
            if math.isnan(shares[0]):  # all of them were skipped
                continue
            self.append(
                kind="fractions",
                method=contestant.method,
                **dict(zip(GROUPS, shares, strict=True)),
                robust_fraction=float(contestant.bullet.robust_fraction),
            )

    def _record_allocations(self, batch: Tensor) -> None:
        """Each sample's SVar and steps in the minibatch just trained on (Fig. 5), as if nobody had looked."""
        if not self.world.leads:
            return
        x, y = self._images(batch, ALONE.share(len(batch)), self.iteration - 1)
        for contestant in self.contestants:
            if contestant.bullet is None or isinstance(contestant.bullet.policy, Oracle):  # it must attack to tell
                continue
            bullet = copy.deepcopy(contestant.bullet)
            bullet.process_group = None
            try:
                with eval_mode(contestant.model):
                    found = bullet.plan(clean_logits(contestant.model, x), y, epsilon=contestant.config.epsilon)
            except NonFiniteError:  # a minibatch that was skipped has no steps
                continue
            self.append(
                kind="allocation",
                method=contestant.method,
                svar=found.svar.tolist(),
                steps=found.steps.tolist(),
                threshold=float(found.threshold),
            )

    def _end_epoch(self, epoch: int) -> None:
        self.energy.settle()
        for contestant in self.contestants:
            learnt = self.iterations_per_epoch - contestant.left_out
            self.append(
                kind="epoch",
                epoch=epoch + 1,
                method=contestant.method,
                **self.evaluate(contestant, self.config.curve_size, restarts=1),
                loss=float(contestant.loss_sum) / learnt if learnt else None,
                seconds=sum(contestant.seconds),
                joules=self.energy.joules(contestant.method),
            )
            contestant.loss_sum.zero_()
            contestant.left_out = 0

    def append(self, **record: object) -> None:
        """Write a record of this iteration to metrics.jsonl, on rank 0."""
        if not self.world.leads:
            return
        append_line(self._metrics_path, json.dumps({"iteration": self.iteration, **record}))

    def _restore(self) -> None:
        config, state = load_checkpoint(self.checkpoint_path)
        data = state.get("data")  # checkpoints from before there were fingerprints have but the place
        check_configuration(self.config, config, self.checkpoint_path, but_data=data is not None)
        if data is not None:
            check_data(self.dataset, self.fingerprint, str(data), self.checkpoint_path)
        try:
            for contestant in self.contestants:
                contestant.load(state["contestants"][contestant.method])
            if type(state["iteration"]) is not int or not 0 <= state["iteration"] <= self.iterations:
                raise ValueError(f"iteration {state['iteration']} of {self.iterations}")
            self.energy.load(state.get("energy"))
            self.iteration = state["iteration"]
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            raise ValueError(
                f"{self.checkpoint_path}: does not fit this run ({error}); start another with --out"
            ) from error
        if not self.world.leads:
            return
        # what was recorded after the checkpoint will be recorded again
        kept = [json.dumps(record) for record in self.records() if record["iteration"] <= self.iteration]
        write_text(self._metrics_path, "".join(line + "\n" for line in kept))

    def _tell_start(self) -> None:
        """Write into run.json that this process goes on with the run; begun with what it is made of."""
        if not self.world.leads:
            return
        if self._provenance_path.exists():
            told = dataclasses.replace(Provenance.read(self._provenance_path), config=self.config)  # its data moved
        else:
            told = described(self.config, self.dataset, self.fingerprint)
        told.starts.append(this_start(self.iteration, self.device, self.world.count))
        told.write(self._provenance_path)


Observe = Callable[[Run], None]


def evaluation_batches(x: Tensor, y: Tensor, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Images uint8 [n, C, H, W] and labels [n] as float minibatches on the device."""
    for start in range(0, len(y), EVALUATION_BATCH):
        end = start + EVALUATION_BATCH
        yield images(x[start:end], device), y[start:end].to(device)


def clean_correct(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> int:
    """How many images the model classifies correctly, in eval mode."""
    right = 0
    with eval_mode(model):
        for x, y in batches:
            right += int((clean_logits(model, x).argmax(dim=1) == y).sum())
    return right


def median_speedup(slower: list[float], faster: list[float]) -> float:
    """The median over iterations of the ratio of two methods' times, without the first few."""
    pairs = list(zip(slower, faster, strict=True))
    return statistics.median(a / b for a, b in pairs[WARM_UP:] or pairs)


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
    if bullet.ranks is not None:  # known beforehand: the first minibatch of a resumed run may be a small one
        bullet.ranks.rows = world.most_in_a_share(config.batch_size)
    return bullet


def _set_learning_rate(optimizer: torch.optim.Optimizer, config: RunConfig, epoch: int) -> None:
    drops = sum(epoch >= drop for drop in config.decay_epochs)
    for group in optimizer.param_groups:
        group["lr"] = config.lr * 0.1**drops


def _random_state(device: torch.device) -> list[Tensor]:
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *cuda]


def _set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
