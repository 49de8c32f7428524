"""Training runs: several methods in lockstep on the same minibatches, so that their times and accuracies are paired."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bt_fast.allocation import Oracle
from bt_fast.attack.balanced import Balance
from bt_fast.attack.forward import clean_logits, eval_mode
from bt_fast.attack.pgd import PGD
from bt_fast.evaluation import evaluate
from bt_fast.faults import NonFiniteError
from bt_fast.guard import Skipped
from bt_fast.lab.augment import crop_and_flip
from bt_fast.lab.checkpoint import load_checkpoint, save_checkpoint
from bt_fast.lab.config import RunConfig
from bt_fast.lab.contestant import Contestant as Contestant
from bt_fast.lab.data import ImageDataset, images
from bt_fast.lab.energy import TrainingEnergy
from bt_fast.lab.files import append_line, parse_json, whole_lines, write_text
from bt_fast.lab.fitting import check_training
from bt_fast.lab.fixed_shares import minibatches_of, owners
from bt_fast.lab.locks import hold, new_folder
from bt_fast.lab.provenance import Provenance, check_configuration, check_data, data_summary, fingerprint, this_start
from bt_fast.lab.remembering import mean_age
from bt_fast.lab.world import ALONE, Share, World
from bt_fast.ops import GROUPS
from bt_fast.placement import Placement

EVALUATION_BATCH = 250
CHECKPOINT_SECONDS = 60.0
RECORD_EVERY = 10  # iterations; a record waits for the device
WARM_UP = 3  # iterations left out of the ratios: first calls compile and allocate


class Progress(NamedTuple):
    """The number of iterations done, and whether an epoch has just ended and its records were added."""

    iteration: int
    epoch_ended: bool


class Run:
    """A run folder and the training that fills it.

    `metrics.jsonl` holds one record a line, `checkpoint.pt` everything needed to resume, and `run.json` a
    `provenance.Provenance`. No other process can write into the folder until `close`, the deletion of the Run object,
    or the end of the process; any can read it.

    Args:
        folder: made if missing; None for a new one, `runs/DATE-TIME`.
        resume: continue from the folder's checkpoint, with its configuration; the data may lie in another place.
        observe: called with the run after every tenth iteration, to `append` records. It must not change models and
            random numbers.
        world: the ranks, each with a run of the same arguments; methods are collective, and rank 0 writes.
        balance: how the ranks share BulletTrain's attacks.

    Attributes:
        minibatch: this rank's images and labels of the last iteration.
        fingerprint: SHA-256 of the data.

    Raises:
        ValueError: see `fitting.check_training`; or another process writes into the folder, it already holds a run and
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
        self._remembers = any(contestant.config.memory for contestant in self.contestants)
        ranks = world.count if self._remembers else 1  # a rank remembers what it sees again
        self._ranks_of = owners(len(dataset.x_train), config.batch_size, ranks, seed=config.seed)
        if folder is None:
            folder = world.broadcast_path(new_folder(Path("runs")) if world.leads else None)
        self.folder = folder
        self.checkpoint_path = folder / "checkpoint.pt"
        self._metrics_path = folder / "metrics.jsonl"
        self._provenance_path = folder / "run.json"
        self._release: Callable[[], object] = lambda: None
        if resume and not self.checkpoint_path.exists():
            raise ValueError(f"{self.checkpoint_path}: no such checkpoint file; start the run with --out instead")
        if world.leads:
            folder.mkdir(parents=True, exist_ok=True)
            self._release = weakref.finalize(self, hold(folder))
        if self._remembers:
            world.most(0)  # no rank opens a file before the first one has locked the folder
        try:
            if resume:
                self._resume()
            else:
                self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        if self.world.leads:
            self._check_empty()
        for contestant in self.contestants:
            contestant.remember(self.folder, self._ranks_of, self.fingerprint)
        if self.world.leads:
            self._provenance_path.unlink(missing_ok=True)  # from a run killed before its first checkpoint
            self._record_start()
        self.save()  # so that a run killed at any moment can be resumed

    def _check_empty(self) -> None:
        files = (self.checkpoint_path, self._metrics_path, self.folder / "summary.json")
        existing = [path for path in files if path.exists()]
        if existing:
            go_on = f"go on with it by --resume {self.folder}, or " if existing[0] == self.checkpoint_path else ""
            raise ValueError(
                f"{self.folder}: already holds a run ({existing[0].name}); {go_on}name another folder with --out"
            )

    def _resume(self) -> None:
        config, state = load_checkpoint(self.checkpoint_path)
        data = state.get("data")  # None in checkpoints of the first version, which kept only the data's path
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
            for contestant in self.contestants:
                if contestant.config.memory:
                    saved = state["contestants"][contestant.method]["memory"]
                    contestant.remember(self.folder, self._ranks_of, self.fingerprint, saved)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            raise ValueError(
                f"{self.checkpoint_path}: does not fit this run ({error}); start another with --out"
            ) from error
        if not self.world.leads:
            return
        # records after the checkpoint will be made again
        kept = [json.dumps(record) for record in self.records() if record["iteration"] <= self.iteration]
        write_text(self._metrics_path, "".join(line + "\n" for line in kept))
        if self.iteration < self.iterations:
            self._record_start()

    def _record_start(self) -> None:
        """Adds this process's start to run.json, which is created if missing."""
        if self._provenance_path.exists():
            starts = Provenance.read(self._provenance_path)
            provenance = dataclasses.replace(starts, config=self.config)  # the data may have moved
        else:
            provenance = Provenance(self.config, data_summary(self.dataset, self.fingerprint), [])
        provenance.starts.append(this_start(self.iteration, self.device, self.world.count))
        provenance.write(self._provenance_path)

    def close(self) -> None:
        """Releases the folder to other processes; the run is over in this one."""
        self._release()

    @property
    def iterations_per_epoch(self) -> int:
        """The number of minibatches in one pass over the training images."""
        return -(-len(self.dataset.x_train) // self.config.batch_size)

    @property
    def iterations(self) -> int:
        """The number of minibatches in the whole run."""
        return self.config.epochs * self.iterations_per_epoch

    def train(self) -> Iterator[Progress]:
        """Trains to the end, yielding after every iteration; the run can be left and saved at any yield.

        Raises:
            NonFiniteError: NaN or Inf in a minibatch, or in too many consecutive ones if they are skipped.
            OSError: a record or checkpoint cannot be written; earlier ones are intact, and the run can resume.
        """
        with self.energy:
            saved = time.monotonic()
            while self.iteration < self.iterations:
                epoch, first = divmod(self.iteration, self.iterations_per_epoch)
                drops = sum(epoch >= drop for drop in self.config.decay_epochs)
                for contestant in self.contestants:
                    for group in contestant.optimizer.param_groups:
                        group["lr"] = self.config.lr * 0.1**drops
                size, seed = self.config.batch_size, self.config.seed
                for batch in islice(minibatches_of(self._ranks_of, size, seed=seed, epoch=epoch), first, None):
                    self._step(batch)
                    ended = self.iteration % self.iterations_per_epoch == 0
                    if ended:
                        self._record_allocations(batch)
                        self._end_epoch(epoch)
                    due = time.monotonic() - saved > CHECKPOINT_SECONDS
                    if ended or (self.world.most(due) if self._remembers else due):
                        self.save()
                        saved = time.monotonic()
                    yield Progress(self.iteration, ended)

    def save(self) -> None:
        """Writes the checkpoint, on rank 0. Collective where ranks remember."""
        memories = {c.method: c.memory_states() for c in self.contestants}
        if not self.world.leads:
            return
        state = {
            "iteration": self.iteration,
            "data": self.fingerprint,
            "contestants": {c.method: c.state() | {"memory": memories[c.method]} for c in self.contestants},
            "energy": self.energy.state(),
        }
        save_checkpoint(self.checkpoint_path, self.config, state)

    def evaluate(self, contestant: Contestant, size: int | None, restarts: int) -> dict[str, Any]:
        """The `clean` and `robust` accuracy in [0, 1] on the first `size` test images (None: all), and their number.

        Random starts are the same each time. `robust` is None for AugMix, which defends against no attack: its measure
        is `corruptions.corruption_errors`. Collective.
        """
        x, y = self.dataset.x_test[:size], self.dataset.y_test[:size]
        share = self.world.share(len(y))
        batches = evaluation_batches(share.own(x), share.own(y), self.device)
        if self.config.loss == "augmix":
            (clean,) = self.world.sums([_clean_correct(contestant.model, batches)])
            return {"clean": clean / len(y), "robust": None, "images": len(y)}
        correct, epsilon = [0, 0], self.config.epsilon
        if len(share):
            accuracy = evaluate(
                contestant.model,
                batches,
                PGD(epsilon, 2 * epsilon / self.config.eval_steps, self.config.eval_steps),
                restarts=restarts,
                generator=torch.Generator(self.device).manual_seed(self.config.seed),
                engine="fast",
                first=share.first,
            )
            correct = [accuracy.clean_correct, accuracy.robust_correct]
        clean, robust = self.world.sums(correct)
        return {"clean": clean / len(y), "robust": robust / len(y), "images": len(y)}

    def final(self, contestant: Contestant) -> dict[str, Any]:
        """Returns a trained method's accuracy on all test images, evaluated once and then kept among the records.

        Collective; only rank 0 reads the records and returns a whole one.
        """
        records = self.records() if self.world.leads else []
        finals = [r for r in records if r["kind"] == "final" and r["method"] == contestant.method]
        if self.world.most(len(finals)):
            return finals[0] if finals else {}
        accuracy = self.evaluate(contestant, None, self.config.eval_restarts)
        self.append(kind="final", method=contestant.method, **accuracy)
        return self.records()[-1] if self.world.leads else accuracy

    def records(self) -> list[dict[str, Any]]:
        """Returns the records in metrics.jsonl; ValueError if a line other than a cut-off last one is not a record."""
        path, records = self._metrics_path, []
        for line in whole_lines(path):
            try:
                record = parse_json(line)
                if not isinstance(record, dict) or type(record.get("iteration")) is not int or "kind" not in record:
                    raise ValueError(json.dumps(record)[:80])
            except ValueError as error:
                raise ValueError(
                    f"{path}: a line is not a record ({error}); restore the file, or start the run anew"
                ) from error
            records.append(record)
        return records

    def append(self, **record: object) -> None:
        """Writes a record of this iteration to metrics.jsonl, on rank 0."""
        if self.world.leads:
            append_line(self._metrics_path, json.dumps({"iteration": self.iteration, **record}))

    def _step(self, batch: Tensor) -> None:
        x, y, placement = self._images(batch, self.world.share(len(batch)), self.iteration)
        turn = self.iteration % len(self.contestants)
        skipped: dict[str, Skipped | None] = {}
        for contestant in self.contestants[turn:] + self.contestants[:turn]:
            try:
                skipped[contestant.method] = contestant.step(x, y, batch, placement)
            except NonFiniteError as error:
                message = f"{contestant.method}, {error}"
                raise NonFiniteError(message, error.samples, earlier=error.earlier) from error
            self.energy.add(contestant.method, contestant.interval)
        self.iteration += 1
        for method in self.config.methods:
            if (skip := skipped[method]) is not None:
                blamed = list(skip.blamed) if skip.samples else []
                self.append(kind="skipped", method=method, reason=skip.reason, images=list(skip.indices), blamed=blamed)
        self.minibatch = (x, y)
        if self.iteration % RECORD_EVERY == 0:
            self._record_fractions()
            if self._observe is not None:
                self._observe(self)

    def _images(self, batch: Tensor, share: Share, iteration: int) -> tuple[Tensor, Tensor, Placement | None]:
        """Returns images, labels and crops of a share of an iteration's minibatch, augmented."""
        own, placement = share.own(batch), None
        x, y = images(self.dataset.x_train[own], self.device), self.dataset.y_train[own].to(self.device)
        if self.config.augment:
            x, placement = crop_and_flip(x, seed=self.config.seed, iteration=iteration, share=share)
        return x, y, placement

    def _record_fractions(self) -> None:
        """Records the shares of the groups since the last record (Fig. 3)."""
        for contestant in self.contestants:
            if contestant.bullet is None:
                continue
            contestant.bullet.finish()
            counts = contestant.bullet.group_counts.clone()
            recent, contestant.counted = (counts - contestant.counted).double(), counts
            shares = (recent / recent.sum()).tolist()
            if not math.isnan(shares[0]):  # NaN if all minibatches were skipped
                self.append(
                    kind="fractions",
                    method=contestant.method,
                    **dict(zip(GROUPS, shares, strict=True)),
                    robust_fraction=float(contestant.bullet.robust_fraction),
                )

    def _record_allocations(self, batch: Tensor) -> None:
        """Records each sample's SVar and steps in the last trained minibatch (Fig. 5), without changing any state."""
        if not self.world.leads:
            return
        x, y, _ = self._images(batch, ALONE.share(len(batch)), self.iteration - 1)
        for contestant in self.contestants:
            if contestant.bullet is None or isinstance(contestant.bullet.policy, Oracle):  # an oracle would attack
                continue
            bullet = copy.deepcopy(contestant.bullet)
            bullet.process_group = None
            try:
                with eval_mode(contestant.model):
                    plan = bullet.plan(clean_logits(contestant.model, x), y, epsilon=contestant.config.epsilon)
            except NonFiniteError:  # a skipped minibatch has no steps
                continue
            self.append(
                kind="allocation",
                method=contestant.method,
                svar=plan.svar.tolist(),
                steps=plan.steps.tolist(),
                threshold=float(plan.threshold),
            )

    def _end_epoch(self, epoch: int) -> None:
        self.energy.settle()
        for contestant in self.contestants:
            learnt = self.iterations_per_epoch - contestant.left_out
            memory = contestant.memory
            self.append(
                kind="epoch",
                epoch=epoch + 1,
                method=contestant.method,
                **self.evaluate(contestant, self.config.curve_size, restarts=1),
                loss=float(contestant.loss_sum) / learnt if learnt else None,
                seconds=sum(contestant.seconds),
                joules=self.energy.joules(contestant.method),
                **({} if memory is None else {"memory_age": mean_age(memory)}),
            )
            contestant.loss_sum.zero_()
            contestant.left_out = 0


Observe = Callable[[Run], None]


def evaluation_batches(x: Tensor, y: Tensor, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields images uint8 [n, C, H, W] and labels [n] as float minibatches on the device."""
    for start in range(0, len(y), EVALUATION_BATCH):
        end = start + EVALUATION_BATCH
        yield images(x[start:end], device), y[start:end].to(device)


def _clean_correct(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> int:
    """Returns the number of images that the model classifies correctly, in eval mode."""
    with eval_mode(model):
        return sum(int((clean_logits(model, x).argmax(dim=1) == y).sum()) for x, y in batches)


def median_speedup(slower: list[float], faster: list[float]) -> float:
    """Returns the median over iterations of the ratio of two methods' times, without the first few."""
    pairs = list(zip(slower, faster, strict=True))
    return statistics.median(a / b for a, b in pairs[WARM_UP:] or pairs)
