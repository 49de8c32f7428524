"""Remembered perturbations against TRADES and BulletTrain: trains by a plain prototype, and judges by strong attacks.

python -m benchmarks.ten_times --method bullet --method memory --seed 0 --seed 1 --data FILE.npz
python -m benchmarks.ten_times --table

A method is a name below or a text as `benchmarks.remembered` reads it. Each pair of method and seed is a run, one after
the other. A run that was cut, by kill -9 too, goes on where its last checkpoint is and ends with the same numbers, bit
for bit on the same machine; one that has ended is left alone. Records are in
benchmarks/results/ten-times/RUN/metrics.jsonl: the configuration, a line for each epoch, and the judgement. Checkpoints
are in `--checkpoints`; that of an ended run holds the weights alone. `--data` takes an .npz of images or of JPEG files,
as `benchmarks.on_gpu` does; without it the package's own digits are trained on.

F counts forward-pass equivalents of an iteration: by arithmetic from the sizes of the groups, and by counting the rows
that were run. The authors' code takes 39 F.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import remembered
from benchmarks.on_gpu.training import images_of
from benchmarks.remembered import BOUNDARY, OUTLIER, ROBUST, Phase, PlainMemory, Recipe, Rows
from bt_fast import PGD, evaluate
from bt_fast.attack.inner import Inner
from bt_fast.augment import CropAndFlip
from bt_fast.baselines.trades_reference import trades_reference_loss
from bt_fast.lab.data import ImageDataset, images, minibatches
from bt_fast.lab.files import append_line, parse_json, replacing, whole_lines, write_text
from bt_fast.lab.locks import held
from bt_fast.lab.models import build_model
from bt_fast.lab.provenance import fingerprint

RESULTS = Path(__file__).parent / "results" / "ten-times"
CHECKPOINTS = Path("runs") / "ten-times"
SECONDS = 300.0  # between checkpoints within an epoch
BATCH = 250  # of an evaluation
RISE = 0.3  # of the epochs, in which the rate grows


class Judge(NamedTuple):
    """An attack that judges: PGD of `steps` steps, from so many uniform starts."""

    name: str
    steps: int
    inner: Inner
    restarts: int


JUDGES = (
    Judge("pgd20", 20, "cross_entropy", 1),
    Judge("pgd50", 50, "cross_entropy", 2),
    Judge("pgd50_margin", 50, "margin", 2),
)
CURVE = tuple(judge._replace(restarts=1) for judge in JUDGES)
HARD = Judge("pgd100_margin", 100, "margin", 5)

_CHEAP = "remember,skip,half,one-clean"
METHODS = {
    "authors": "authors",
    "trades": "10",
    "bullet": "10/2/0",
    "bullet-3": "3/2/0",
    "remembered": "1,remember",
    "remembered-2-1": "2/1/0,remember",
    "remembered-1-1": "1/1/0,remember",
    "skip": "1/1/0,remember,skip,beta=9",
    "memory": f"1/1/0,{_CHEAP},beta=12",
    "memory-before": "1/1/0,remember,skip,half-before,one-clean,beta=12",
    "memory-outliers": f"1/1/1,{_CHEAP},beta=6",
    "memory-margin": f"1/1/0,{_CHEAP},beta=9,margin=0.5",
    "memory-gradient": f"1/1/0,{_CHEAP},beta=9,gradient=0.5",
    "memory-int8": f"1/1/0,{_CHEAP},int8,beta=12",
    "memory-then-2-1": f"1/1/0,{_CHEAP},beta=12;0.8:2/1/1,remember,one-clean,beta=6",
    "memory-then-bullet": f"1/1/0,{_CHEAP},beta=12;0.8:10/2/0,beta=6",
    "memory-then-trades": f"1/1/0,{_CHEAP},beta=12;0.8:10,beta=6",
}


# Configuration


@dataclass(frozen=True)
class Config:
    """All that a run's result depends on, beside the images: of these `data` is the name."""

    method: str
    seed: int = 0
    data: str = "digits"
    train: int = 10_000
    test: int = 1000  # judged images
    curve: int = 200  # of these, judged after each epoch
    epochs: int = 15
    batch: int = 100
    network: str = "cnn5"
    width: int = 32  # of cnn5
    lr: float = 0.1
    weight_decay: float = 5e-4
    epsilon: float = 8 / 255
    padding: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        remembered.phases_of(self.method)
        for name in ("train", "test", "curve", "epochs", "batch", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @functools.cached_property
    def phases(self) -> tuple[Phase, ...]:
        """The method's phases."""
        return remembered.phases_of(self.method)

    def recipe(self, epoch: int) -> Recipe:
        """Returns the recipe of an epoch, counted from 0."""
        return [phase.recipe for phase in self.phases if epoch >= round(phase.begin * self.epochs)][-1]

    @property
    def name(self) -> str:
        """The name of the run's folder; all options in which runs of one table may differ are in it."""
        method = re.sub(r"[^\w.-]+", "_", self.method)
        network = f"{self.network}-{self.width}" if self.network == "cnn5" else self.network
        return f"{self.data}-{self.train}-{network}-{self.epochs}ep-{method}-s{self.seed}"


def network_of(config: Config, shape: Sequence[int], classes: int) -> nn.Module:
    """Returns a new network for images [C, H, W], seeded."""
    with torch.random.fork_rng([]):
        torch.manual_seed(config.seed)
        if config.network == "cnn5":
            return cnn5(shape[0], classes, config.width)
        size = (shape[1], shape[2])
        return build_model(config.network, in_channels=shape[0], image_size=size, num_classes=classes)


def cnn5(channels: int, classes: int, width: int) -> nn.Module:
    """Five convolutions with batch norm, of which two halve the image, then the mean over all positions."""
    layers: list[nn.Module] = []
    for factor, stride in ((1, 1), (2, 2), (2, 1), (4, 2), (4, 1)):
        conv = nn.Conv2d(channels, factor * width, 3, stride, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(factor * width), nn.ReLU()]
        channels = factor * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def rate(peak: float, done: float) -> float:
    """Returns the one-cycle rate after a share of the training: linear to the peak, then to 0 as half a cosine."""
    if done < RISE:
        return peak * (0.04 + 0.96 * done / RISE)
    return peak * 0.5 * (1.0 + math.cos(math.pi * (done - RISE) / (1.0 - RISE)))


# Training


@dataclass
class Tally:
    """Sums over the iterations of an epoch."""

    iterations: int = 0
    samples: int = 0
    loss: float = 0.0
    rows: int = 0
    arithmetic: int = 0
    outlier: int = 0
    boundary: int = 0
    robust: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        """Returns the epoch's means, but its own seconds."""
        n = self.samples
        shares = {name: getattr(self, name) / n for name in ("outlier", "boundary", "robust")}
        return {
            "loss": self.loss / n,
            **shares,
            "F": self.rows / n,
            "F_by_arithmetic": self.arithmetic / n,
            "iterations": self.iterations,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
        }


class Training:
    """A run: its network, what is remembered, and its records; `train` goes on to the end.

    Args:
        folder: of the records. checkpoint: the file that a cut run goes on from.

    Raises:
        ValueError: the folder or the checkpoint holds a run with another configuration or other images.
    """

    def __init__(self, config: Config, dataset: ImageDataset, folder: Path, checkpoint: Path) -> None:
        self.config, self.dataset, self.checkpoint = config, dataset, checkpoint
        self.metrics = folder / "metrics.jsonl"
        x = dataset.x_train
        self.model = network_of(config, x.shape[1:], dataset.classes)
        self.rows = Rows(self.model)
        options: dict[str, Any] = {"momentum": 0.9, "nesterov": True, "weight_decay": config.weight_decay}
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=config.lr, **options)
        recipes = [phase.recipe for phase in config.phases]
        self.memory: PlainMemory | None = None
        if any(recipe.remember for recipe in recipes):
            self.memory = PlainMemory(x.shape, config.epsilon, int8=any(recipe.int8 for recipe in recipes))
        self.fraction, self.iteration, self.tally = 0.0, 0, Tally()
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        self._begin()

    @property
    def per_epoch(self) -> int:
        """The number of minibatches of an epoch."""
        return -(-len(self.dataset.x_train) // self.config.batch)

    @property
    def iterations(self) -> int:
        """The number of minibatches of the whole run."""
        return self.config.epochs * self.per_epoch

    def train(self) -> None:
        """Trains and judges; returns at once if that is done."""
        if any(record["kind"] == "judged" for record in records_of(self.metrics)):
            return
        saved = time.monotonic()
        while self.iteration < self.iterations:
            epoch, first = divmod(self.iteration, self.per_epoch)
            order = minibatches(len(self.dataset.x_train), self.config.batch, seed=self.config.seed, epoch=epoch)
            for indices in islice(order, first, None):
                self.step(indices, self.config.recipe(epoch))
                ended = self.iteration % self.per_epoch == 0
                if ended:
                    self._end_epoch(epoch)
                if ended or time.monotonic() - saved > SECONDS:
                    self.save()
                    saved = time.monotonic()
        self.save(weights_alone=True)
        self.append(kind="judged", **judged(self.model, self.dataset, self.config, self.config.test, JUDGES))

    def judge_hard(self) -> None:
        """Judges an ended run by HARD, once, from the weights in its checkpoint."""
        if any(record["kind"] == "hard" for record in records_of(self.metrics)):
            return
        if not self.checkpoint.exists():
            raise ValueError(
                f"{self.checkpoint}: no such file, and the weights of the run are nowhere else; run it anew"
            )
        self.model.load_state_dict(torch.load(self.checkpoint, weights_only=True)["model"])
        self.append(kind="hard", **judged(self.model, self.dataset, self.config, self.config.test, [HARD]))

    def step(self, indices: Tensor, recipe: Recipe) -> None:
        """Takes a training step on the images of these numbers, and counts it."""
        begin, begin_cpu, rows = time.perf_counter(), time.process_time(), self.rows.count
        with self.rows:
            loss, group = self._step(indices, recipe)
        t, m = self.tally, len(group)
        if not math.isfinite(loss):
            raise ValueError(f"the loss of iteration {self.iteration} is {loss}: lower --lr")
        t.iterations, t.samples, t.loss = t.iterations + 1, t.samples + m, t.loss + loss * m
        t.rows += self.rows.count - rows
        t.arithmetic += remembered.rows_by_arithmetic(recipe, group)
        for name, member in (("outlier", OUTLIER), ("boundary", BOUNDARY), ("robust", ROBUST)):
            setattr(t, name, getattr(t, name) + int((group == member).sum()))
        t.seconds += time.perf_counter() - begin
        t.cpu_seconds += time.process_time() - begin_cpu
        self.iteration += 1

    def _step(self, indices: Tensor, recipe: Recipe) -> tuple[float, Tensor]:
        """Takes the step; returns the loss and each sample's group [m]."""
        c, generator = self.config, generator_of(self.config.seed, self.iteration)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate(c.lr, self.iteration / self.iterations)
        whole, y = images(self.dataset.x_train[indices], "cpu"), self.dataset.y_train[indices]
        x, placement = CropAndFlip(c.padding, c.flip)(whole, generator)
        delta = self.memory.read(indices, placement) if self.memory and recipe.remember else None
        self.optimizer.zero_grad()
        if recipe.authors:
            loss, group = self._authors_loss(x, y, recipe, generator), torch.full_like(y, BOUNDARY)
            loss.backward()
        else:
            options: dict[str, Any] = {"epsilon": c.epsilon, "fraction": self.fraction, "delta": delta}
            made = remembered.minibatch(self.model, x, y, recipe, generator=generator, **options)
            loss, group, self.fraction = made.loss, made.group, made.fraction
            loss.backward()
            if self.memory and recipe.remember:
                new = made.remembers.nonzero().flatten()
                at = dataclasses.replace(placement, **{k: v[new] for k, v in vars(placement).items()})
                self.memory.write(indices[new], at, made.perturbation(x, recipe, c.epsilon)[new], made.moved[new])
        self.optimizer.step()
        return float(loss.detach()), group

    def _authors_loss(self, x: Tensor, y: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
        with torch.random.fork_rng([]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            epsilon = self.config.epsilon
            options: dict[str, Any] = {"step_size": epsilon / 4, "epsilon": epsilon, "beta": recipe.beta}
            return trades_reference_loss(self.model, x, y, self.optimizer, **options)

    def _end_epoch(self, epoch: int) -> None:
        accuracies = judged(self.model, self.dataset, self.config, self.config.curve, CURVE)
        self.append(kind="epoch", epoch=epoch + 1, **self.tally.record(), robust_fraction=self.fraction, **accuracies)
        self.tally = Tally()

    # Records and checkpoints

    def append(self, **record: object) -> None:
        """Writes a record and waits until it is on disk."""
        append_line(self.metrics, json.dumps(record))

    def save(self, *, weights_alone: bool = False) -> None:
        """Replaces the checkpoint, which is synced before."""
        state: dict[str, Any] = {"config": dataclasses.asdict(self.config), "iteration": self.iteration}
        state["model"] = self.model.state_dict()
        if not weights_alone:
            state |= {"optimizer": self.optimizer.state_dict(), "fraction": self.fraction}
            state |= {"tally": dataclasses.asdict(self.tally)}
            state["memory"] = None if self.memory is None else self.memory.stored
        with replacing(self.checkpoint) as file:
            torch.save(state, file)

    def _begin(self) -> None:
        """Goes on from the checkpoint, or begins the records."""
        first = {"kind": "config", **dataclasses.asdict(self.config), "images": fingerprint(self.dataset)}
        first |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
        records = records_of(self.metrics)
        if records:
            differences = [k for k in first if k not in ("torch", "threads") and first[k] != records[0].get(k)]
            if differences:
                raise ValueError(
                    f"{self.metrics}: a run with another {', '.join(differences)}; move it away, or write --out"
                )
        if any(record["kind"] == "judged" for record in records):
            return
        epochs = 0
        if self.checkpoint.exists():
            self._load()
            epochs = self.iteration // self.per_epoch
        # records after the checkpoint will be made again
        kept = [record for record in records[1:] if record["kind"] == "epoch" and record["epoch"] <= epochs]
        if len(kept) < epochs:
            raise ValueError(f"{self.metrics}: lacks epochs before {self.checkpoint}; remove both to begin anew")
        lines = [json.dumps(record) for record in [records[0] if epochs else first, *kept]]
        write_text(self.metrics, "".join(line + "\n" for line in lines))

    def _load(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        if state["config"] != dataclasses.asdict(self.config):
            raise ValueError(f"{self.checkpoint}: of a run with other options; move it away, or write --checkpoints")
        self.model.load_state_dict(state["model"])
        self.iteration = state["iteration"]
        if self.iteration == self.iterations and "optimizer" not in state:
            return
        self.optimizer.load_state_dict(state["optimizer"])
        self.fraction, self.tally = state["fraction"], Tally(**state["tally"])
        if self.memory is not None:
            self.memory.stored = state["memory"]


def generator_of(seed: int, iteration: int) -> torch.Generator:
    """Returns the generator of an iteration: it depends on no earlier one."""
    mixed = int(np.random.SeedSequence(seed, spawn_key=(1, iteration)).generate_state(1)[0])
    return torch.Generator().manual_seed(mixed)


def judged(
    model: nn.Module, dataset: ImageDataset, config: Config, count: int, attacks: Sequence[Judge]
) -> dict[str, Any]:
    """Returns accuracies in [0, 1] on the first `count` test images, clean and by each attack."""
    x, y, epsilon = images(dataset.x_test[:count], "cpu"), dataset.y_test[:count], config.epsilon
    batches = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
    result: dict[str, Any] = {"images": len(y)}
    modes = [module.training for module in model.modules()]
    for judge in attacks:
        attack = PGD(epsilon, 2 * epsilon / judge.steps, judge.steps, start="uniform", inner=judge.inner)
        generator = torch.Generator().manual_seed(config.seed)
        stood = evaluate(model, batches, attack, restarts=judge.restarts, generator=generator, engine="fast")
        result["clean"], result[judge.name] = stood.clean_correct / len(y), stood.robust_correct / len(y)
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    return result


def records_of(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a run, without a last line that was cut off."""
    return [parse_json(line) for line in whole_lines(path)]


# The command


def parser_of() -> argparse.ArgumentParser:
    """Returns the parser: options of `Config`, of which two may be given several times, and places of files."""
    head, names = (__doc__ or "").split("\n\n")[0], ", ".join(METHODS)
    parser = argparse.ArgumentParser("python -m benchmarks.ten_times", description=head)
    parser.add_argument("--method", action="append", help=f"{names}, or a text as benchmarks.remembered reads it")
    parser.add_argument("--seed", action="append", type=int)
    parser.add_argument("--data", type=Path, help="an .npz of images or JPEG files (default: the package's digits)")
    for field in dataclasses.fields(Config):
        if field.name not in ("method", "seed", "data"):
            kind = argparse.BooleanOptionalAction if field.name == "flip" else None
            typed = {"action": kind} if kind else {"type": type(field.default)}
            parser.add_argument(f"--{field.name.replace('_', '-')}", default=None, **typed)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--hard", action="store_true", help="judge each run by PGD-100 from 5 starts, margin loss, too")
    parser.add_argument("--table", action="store_true", help="write table and pictures of the runs into --out")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Trains the given methods with the given seeds, or prints the table; returns the exit status."""
    given = vars(parser_of().parse_args(arguments))
    places = {name: given.pop(name) for name in ("data", "out", "checkpoints", "threads", "hard", "table")}
    methods, seeds = given.pop("method"), given.pop("seed") or [0]
    if places["table"]:
        from benchmarks.ten_times_table import draw, table

        text = table(places["out"])
        print(text)
        pictures = "".join(f"\n![Robust accuracy against cost]({path.name})\n" for path in draw(places["out"]))
        write_text(places["out"] / "table.md", text + pictures)
        return 0
    if not methods:
        print("nothing to train: give --method, or --table", file=sys.stderr)
        return 2
    torch.set_num_threads(places["threads"])
    whole, options = images_of(places["data"]), {name: value for name, value in given.items() if value is not None}
    if whole.x_train.shape[1] == 1:  # digits: no letter or digit is mirrored
        options = {"epsilon": 0.2, "padding": 2, "flip": False} | options
    options = {"train": min(Config.train, len(whole.x_train))} | options
    for seed in seeds:
        for method in methods:
            try:
                config = Config(METHODS.get(method, method), seed, data=whole.name, **options)
                dataset = whole.take(config.train, config.test)
                checkpoint = places["checkpoints"] / config.name / "checkpoint.pt"
                checkpoint.parent.mkdir(parents=True, exist_ok=True)
                with held(checkpoint.parent):
                    run = Training(config, dataset, places["out"] / config.name, checkpoint)
                    run.train()
                    if places["hard"]:
                        run.judge_hard()
            except ValueError as error:
                print(error, file=sys.stderr)
                return 2
            print(f"{config.name}: done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
