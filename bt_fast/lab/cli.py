"""The `bt-fast` command: compare, train, evaluate, corruptions, study, report, profile, doctor."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import click
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from bt_fast.allocation import METRICS, POLICIES
from bt_fast.attack.balanced import Balance
from bt_fast.attack.losses import LOSSES
from bt_fast.attack.pgd import PGD, norm_of
from bt_fast.device import out_of_memory
from bt_fast.engine import Engine
from bt_fast.evaluation import evaluate as evaluate_model
from bt_fast.guard import NON_FINITE
from bt_fast.lab import doctor as examination
from bt_fast.lab import profile as profiling
from bt_fast.lab import report
from bt_fast.lab.checkpoint import load_checkpoint, read_tensors
from bt_fast.lab.config import OBJECTIVES, PRESETS, RunConfig
from bt_fast.lab.corruptions import CORRUPTIONS, CorruptedTestSet, corruption_errors
from bt_fast.lab.data import ImageDataset, load_dataset
from bt_fast.lab.files import write_text
from bt_fast.lab.fitting import check_labels
from bt_fast.lab.html_report.loading import load_runs
from bt_fast.lab.html_report.page import check_path, write_page
from bt_fast.lab.html_report.scalars import write_scalars
from bt_fast.lab.locks import held
from bt_fast.lab.make_corruptions import make_corruptions
from bt_fast.lab.methods import COMPARED, FORMS, Method
from bt_fast.lab.models import build_model, classes_in, load_published
from bt_fast.lab.provenance import Provenance, changes, check_configuration, check_data, fingerprint, this_start
from bt_fast.lab.studies.catalogue import STUDIES
from bt_fast.lab.studies.study import SCALES, check_run, open_run
from bt_fast.lab.studies.study import conclude as conclude_study
from bt_fast.lab.studies.study import write as write_study
from bt_fast.lab.training import Run, evaluation_batches, median_speedup
from bt_fast.lab.world import World, joined, norms_alone

console = Console()
say = functools.partial(console.print, soft_wrap=True, highlight=False)  # lines to copy from are not broken
_Command = TypeVar("_Command", bound=Callable[..., Any])


class _OneLineGroup(click.Group):
    """Commands whose errors are one line on standard error, with exit code 2 for a user's mistake."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Run the command line and exit."""
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except click.exceptions.NoArgsIsHelpError as help_wanted:
            help_wanted.show()
            sys.exit(2)
        except click.ClickException as error:
            click.echo(f"bt-fast: {' '.join(error.format_message().split())}", err=True)
            sys.exit(2)
        except (click.Abort, KeyboardInterrupt):
            click.echo("bt-fast: interrupted; a run goes on with --resume FOLDER", err=True)
            sys.exit(128 + signal.SIGINT)
        sys.exit(code if isinstance(code, int) else 0)


def _one_line_errors(command: _Command) -> _Command:
    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (ValueError, TypeError, OSError) as error:
            raise click.ClickException(str(error)) from error
        except Exception as error:
            if not out_of_memory(error):
                raise
            raise click.ClickException(_room(str(error), "batch_size" in kwargs)) from error

    return wrapped  # type: ignore[return-value]


def _room(message: str, batches: bool) -> str:
    """What to do when a memory is full; `batches` if the command takes the size of one."""
    smaller = "a smaller --batch-size or --model, " if batches else ""
    first = message.splitlines()[0] if message else "no more is known"
    return f"the memory is full: try {smaller}--device cpu, or end what else runs there (nvidia-smi lists it): {first}"


class _Finite(click.FloatRange):
    """A range of numbers without NaN and infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number, or a usage error that names the option."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


def _method_names(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """The value of a --method option, one name or several, if `Method.parse` reads them."""
    for name in value if isinstance(value, tuple) else [value] if value else []:
        try:
            Method.parse(name)
        except ValueError as error:
            raise click.ClickException(str(error)) from error
    return value


def _engine(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """The value of --engine, if `Engine.parse` reads it."""
    if value is not None:
        try:
            Engine.parse(value)
        except ValueError as error:
            raise click.ClickException(f"--engine: {error}") from error
    return value


_COUNT = click.IntRange(min=0)
_AT_LEAST_ONE = click.IntRange(min=1)
_SEED = click.IntRange(min=0, max=2**32 - 1)  # torch's CPU generator keeps 32 bits
_POSITIVE = _Finite(min=0, min_open=True)
_SHARE = _Finite(min=0, max=1, max_open=True)

_SOURCES = "digits|mnist|cifar10|cifar100|PATH"
_RUN_OPTIONS = [
    click.option("--data", metavar=_SOURCES, help="Data set; PATH is an .npz or a folder. [digits]"),
    click.option("--train-size", type=_AT_LEAST_ONE, help="Use the first N training images. [all]"),
    click.option("--test-size", type=_AT_LEAST_ONE, help="Use the first N test images. [all]"),
    _ENGINE_OPTION := click.option(
        "--engine",
        metavar="exact|fast|bf16",
        callback=_engine,
        help="How attack and update are executed, and options of it (fast,graphs=off). [fast]",
    ),
    click.option("--model", metavar="NAME", help="small-cnn, preactresnet-18 or wrn-D-K."),
    click.option("--width", type=_AT_LEAST_ONE, help="Channels of small-cnn's first layer."),
    click.option("--augment/--no-augment", default=None, help="Random crops and flips."),
    click.option("--loss", type=click.Choice(OBJECTIVES), help="Objective. [trades]"),
    click.option("--epochs", type=_AT_LEAST_ONE),
    click.option("--batch-size", type=_AT_LEAST_ONE),
    click.option("--lr", type=_POSITIVE, help="SGD learning rate."),
    click.option("--sgd-momentum", type=_SHARE),
    click.option("--weight-decay", type=_Finite(min=0)),
    click.option(
        "--decay-epochs", type=_AT_LEAST_ONE, multiple=True, help="Epochs after which lr falls tenfold (repeatable)."
    ),
    click.option("--epsilon", type=_POSITIVE, help="Radius of the l_inf ball, in [0, 1] pixel units."),
    click.option("--step-size", type=_POSITIVE, help="Step size of the attack."),
    click.option("--steps", type=_AT_LEAST_ONE, help="Attack steps N without BulletTrain. [10]"),
    click.option("--beta", type=_Finite(min=0), help="Weight of the robust term (not of pgd)."),
    click.option("--boundary-steps", type=_COUNT, help="N_B of BulletTrain. [--steps]"),
    click.option("--robust-steps", type=_COUNT, help="N_R of BulletTrain. [2]"),
    click.option("--outlier-steps", type=_COUNT, help="N_O of BulletTrain. [0]"),
    click.option("--gamma", type=_Finite(min=0, max=1, min_open=True), help="Scale of F_R. [0.8]"),
    click.option("--fraction-momentum", type=_SHARE, help="p of F_R. [0.9]"),
    click.option("--metric", type=click.Choice(list(METRICS)), help="Of a sample's certainty. [signed_variance]"),
    click.option("--policy", type=click.Choice(list(POLICIES)), help="Certainty to steps. [three_groups]"),
    click.option("--grad-align", type=_Finite(min=0), help="Weight of GradAlign's regulariser. [0]"),
    click.option("--non-finite", type=click.Choice(NON_FINITE), help="A minibatch with NaN or Inf. [raise]"),
    click.option("--eval-steps", type=_AT_LEAST_ONE, help="Steps of the final PGD. [20]"),
    click.option("--eval-restarts", type=_AT_LEAST_ONE, help="Restarts of the final PGD. [1]"),
    click.option("--curve-size", type=_AT_LEAST_ONE, help="Test images evaluated after each epoch."),
    _SEED_OPTION := click.option("--seed", type=_SEED),
]
_PLACE_OPTIONS = [
    click.option("--data-dir", type=click.Path(path_type=Path), default=Path("data"), show_default=True),
    click.option("--device", default=None, help="cpu, cuda or cuda:N. [cuda where there is one]"),
    click.option("--out", type=click.Path(path_type=Path), help="Run folder. [runs/DATE-TIME]"),
    click.option("--resume", type=click.Path(path_type=Path), help="Go on with the run in this folder."),
]
_RANK_OPTIONS = [
    click.option("--balance", is_flag=True, help="Ranks share BulletTrain's attack out, where that is quicker."),
    click.option(
        "--rank-timeout",
        type=_POSITIVE,
        default=10.0,
        show_default=True,
        metavar="MINUTES",
        help="A rank that does not answer for so long is an error.",
    ),
]
_REPEAT_OPTION = click.option(
    "--repeat", type=click.Path(path_type=Path), help="Begin the run in this folder anew, in another, on the same data."
)


def _with_options(options: list[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@click.group(cls=_OneLineGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="bt-fast", prog_name="bt-fast")
def cli() -> None:
    """Robust training that spends its attack steps on the samples near the decision boundary."""


@cli.command()
@click.option(
    "--method",
    "methods",
    metavar="METHOD",
    callback=_method_names,
    multiple=True,
    help=f"What to compare with each other (repeatable): {FORMS}; also on an engine of its own (bullet-exact, "
    f"bullet-bf16) and with options of its own (bullet,robust-steps=0). [{', '.join(COMPARED)}]",
)
@_with_options([*_RUN_OPTIONS, *_PLACE_OPTIONS, _REPEAT_OPTION, *_RANK_OPTIONS])
@_one_line_errors
def compare(
    methods: tuple[str, ...],
    data_dir: Path,
    device: str | None,
    out: Path | None,
    resume: Path | None,
    repeat: Path | None,
    balance: bool,
    rank_timeout: float,
    **given: Any,
) -> None:
    """Train an objective as its authors wrote it, ours and ours + BulletTrain on the same minibatches and compare.

    Interrupted or terminated, it finishes the iteration, saves and exits with 130 or 143; a second time it exits at
    once. --resume goes on from there, and from the last checkpoint after a kill.

    Several GPUs: torchrun --nproc-per-node N -m bt_fast compare ...; --batch-size is that of the whole minibatch,
    which the ranks share, so that any number of them trains the same.
    """
    twice = [method for method in methods if methods.count(method) > 1]
    if twice:
        raise ValueError(f"--method {twice[0]} is given twice: each method is trained once; give it once")
    if not methods and resume is None and repeat is None:
        methods = _compared(given["loss"], given["engine"])
    with _world(device, rank_timeout) as (world, where):
        _run(methods or None, data_dir, where, out, resume, repeat, given, world, balance)


def _compared(loss: str | None, engine: str | None) -> tuple[str, ...]:
    """What is compared by default; BulletTrain also on the engine that was asked for, fast if none was."""
    methods = [name for name in COMPARED if loss != "augmix" or name != "reference"]
    return (*methods[:-1], "bullet") if engine else tuple(methods)


@cli.command()
@click.option("--method", metavar="METHOD", callback=_method_names, help="What to train. [bullet]")
@_with_options([*_RUN_OPTIONS, *_PLACE_OPTIONS, _REPEAT_OPTION, *_RANK_OPTIONS])
@_one_line_errors
def train(
    method: str | None,
    data_dir: Path,
    device: str | None,
    out: Path | None,
    resume: Path | None,
    repeat: Path | None,
    balance: bool,
    rank_timeout: float,
    **given: Any,
) -> None:
    """Train one model.

    Interrupted or terminated, it finishes the iteration, saves and exits with 130 or 143; a second time it exits at
    once. --resume goes on from there, and from the last checkpoint after a kill.

    Several GPUs: torchrun --nproc-per-node N -m bt_fast train ...; --batch-size is that of the whole minibatch,
    which the ranks share, so that any number of them trains the same.
    """
    if method is None and resume is None and repeat is None:
        method = "bullet"
    with _world(device, rank_timeout) as (world, where):
        _run((method,) if method else None, data_dir, where, out, resume, repeat, given, world, balance)


@cli.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--method", metavar="METHOD", callback=_method_names, help="Which model of a comparison. [the only one, or all]"
)
@click.option("--model", metavar="NAME", help="Network of a published checkpoint: small-cnn, wrn-D-K, ...")
@click.option("--data", metavar=_SOURCES, help="Data set. [the checkpoint's]")
@click.option("--data-dir", type=click.Path(path_type=Path), default=Path("data"), show_default=True)
@click.option("--test-size", type=_AT_LEAST_ONE, help="Use the first N test images. [the checkpoint's]")
@click.option("--epsilon", type=_POSITIVE, help="[the checkpoint's]")
@click.option("--distance", type=click.Choice(["l_inf", "l_2"]), default="l_inf", show_default=True)
@click.option("--loss", type=click.Choice(LOSSES), default="ce", show_default=True, help="What the attack ascends.")
@click.option("--steps", type=_AT_LEAST_ONE, default=20, show_default=True)
@click.option("--step-size", type=_POSITIVE, help="[2 epsilon / steps]")
@click.option("--restarts", type=_AT_LEAST_ONE, default=1, show_default=True)
@click.option("--seed", type=_SEED, default=0, show_default=True)
@_ENGINE_OPTION
@click.option("--device", default=None)
@_one_line_errors
def evaluate(
    checkpoint: Path,
    method: str | None,
    model: str | None,
    data: str | None,
    data_dir: Path,
    test_size: int | None,
    epsilon: float | None,
    distance: str,
    loss: str,
    steps: int,
    step_size: float | None,
    restarts: int,
    seed: int,
    engine: str | None,
    device: str | None,
) -> None:
    """Clean and PGD accuracy of CHECKPOINT: a run's checkpoint.pt, or a state_dict such as TRADES publishes."""
    where, chosen = _device(device), Engine.parse(engine or "fast")
    if chosen.precision is not None:
        raise ValueError(f"--engine {engine}: an evaluation has the network's own precision; write exact or fast")
    if model is None:
        networks, dataset, _, default_epsilon = _own_networks(checkpoint, method, data, data_dir, test_size)
    else:
        found = _published_network(checkpoint, model, method, data, data_dir, test_size)
        networks, dataset, _, default_epsilon = found
    radius = epsilon or default_epsilon
    attack = PGD(radius, step_size or 2 * radius / steps, steps, norm_of(distance))
    attacked = distance if loss == "ce" else f"{distance}, {loss} loss"
    for name, network in networks.items():
        with _progress() as progress:
            decided = _follower(progress, progress.add_task(name, total=len(dataset.y_test)))
            accuracy = evaluate_model(
                network.to(where),
                evaluation_batches(dataset.x_test, dataset.y_test, where),
                attack,
                restarts=restarts,
                loss=loss,
                engine=chosen,
                generator=torch.Generator(where).manual_seed(seed),
                progress=decided,
            )
        say(
            f"{name}: clean {100 * accuracy.clean:.2f} %, robust {100 * accuracy.robust:.2f} % "
            f"(PGD-{steps} x {restarts}, {attacked}, eps = {radius:g}, {accuracy.total} images)"
        )


@cli.command()
@click.argument("name", type=click.Choice(list(STUDIES)), metavar="|".join(STUDIES))
@click.option("--scale", type=click.Choice(SCALES), default="laptop", show_default=True, help="Network, data, epochs.")
@click.option("--seed", "seeds", type=_SEED, multiple=True, help="One run for each (repeatable). [0]")
@click.option("--out", type=click.Path(path_type=Path), help="Folder; a study left there goes on. [studies/NAME]")
@click.option(
    "--corruptions-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="For table1: CIFAR-10-C or a like folder; one that is not there is made of the test set. [OUT/corrupted]",
)
@click.option("--data-dir", type=click.Path(path_type=Path), default=Path("data"), show_default=True)
@click.option("--device", default=None, help="cpu, cuda or cuda:N. [cuda where there is one]")
@_with_options([option for option in _RUN_OPTIONS if option is not _SEED_OPTION])
@_one_line_errors
def study(
    name: str,
    scale: str,
    seeds: tuple[int, ...],
    out: Path | None,
    corruptions_dir: Path | None,
    data_dir: Path,
    device: str | None,
    **given: Any,
) -> None:
    """Run the study of a table or figure of the paper: NAME.json and NAME.png. The same command goes on with it.

    Options other than the study's own (--data, --train-size, ...) replace those of the scale.
    """
    where, chosen = _device(device), STUDIES[name]
    asked = {option: value for option, value in given.items() if value not in (None, ())}
    preset = chosen.config(scale)
    dataset = load_dataset(asked.get("data", preset.data), data_dir)
    config, dataset = _adapt(preset, asked, dataset)
    folder = out or Path("studies") / name
    if corruptions_dir is not None and not chosen.corruptions:
        which = ", ".join(other.name for other in STUDIES.values() if other.corruptions)
        raise ValueError(f"--corruptions-dir: {name} has no corruptions, {which} has; leave it away")
    configs = [dataclasses.replace(config, seed=seed) for seed in dict.fromkeys(seeds or (0,))]
    for each in configs:
        check_run(each, dataset, folder, where)
    say(f"{chosen.title}\n{config.data}: {len(dataset.x_train)} training, {len(dataset.x_test)} test images; {folder}")
    test_set = None
    if chosen.corruptions:
        corrupted = corruptions_dir or folder / "corrupted"
        test_set = _corrupted_test_set(corrupted, dataset, config.test_size)
        check_labels(dataset.classes, test_set.labels, str(corrupted), f"the network for {config.data}")
    runs = []
    for each in configs:
        with ExitStack() as stack:
            with _stop_signals() as stop:
                run = open_run(chosen, each, dataset, folder, where)
                stack.callback(run.close)
                _train(run, stop, f"the same command goes on in {folder}")
            with _progress() as progress:
                task = progress.add_task(f"evaluation, seed {each.seed}", total=len(config.methods))
                summary = conclude_study(run, test_set, _advancer(progress, task))
        console.print(report.table(summary))
        runs.append((run, summary))
    say("wrote", ", ".join(str(path) for path in write_study(chosen, scale, runs, folder)))


@cli.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--corruptions-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="CIFAR-10-C, CIFAR-100-C or a like folder; one that is not there is made of the test set. [a temporary one]",
)
@click.option(
    "--method", metavar="METHOD", callback=_method_names, help="Which model of a comparison. [the only one, or all]"
)
@click.option("--model", metavar="NAME", help="Network of a published checkpoint: small-cnn, wrn-D-K, ...")
@click.option("--data", metavar=_SOURCES, help="Data set. [the checkpoint's]")
@click.option("--data-dir", type=click.Path(path_type=Path), default=Path("data"), show_default=True)
@click.option("--test-size", type=_AT_LEAST_ONE, help="Use the first N test images. [the checkpoint's]")
@click.option("--seed", type=_SEED, help="Of the corruptions that are made. [0]")
@click.option("--device", default=None)
@_one_line_errors
def corruptions(
    checkpoint: Path,
    corruptions_dir: Path | None,
    method: str | None,
    model: str | None,
    data: str | None,
    data_dir: Path,
    test_size: int | None,
    seed: int | None,
    device: str | None,
) -> None:
    """Error of CHECKPOINT under fifteen corruptions at five severities."""
    where = _device(device)
    if model is None:
        networks, dataset, images, _ = _own_networks(checkpoint, method, data, data_dir, test_size)
    else:
        networks, dataset, images, _ = _published_network(checkpoint, model, method, data, data_dir, test_size)
    with tempfile.TemporaryDirectory() as temporary:
        test_set = _corrupted_test_set(corruptions_dir or Path(temporary) / "made", dataset, images, seed)
        for name, network in networks.items():
            errors = {}
            with _progress() as progress:
                found = corruption_errors(network.to(where), test_set, where)
                for corruption, of_severities in progress.track(found, total=len(CORRUPTIONS), description=name):
                    errors[corruption] = of_severities
            console.print(report.corruption_table(name, errors))


@cli.command()
@click.option("--method", metavar="METHOD", callback=_method_names, default="bullet", show_default=True)
@click.option("--iterations", type=_AT_LEAST_ONE, default=10, show_default=True, help="Timed ones, for the energy too.")
@_with_options(_RUN_OPTIONS)
@click.option("--data-dir", type=click.Path(path_type=Path), default=Path("data"), show_default=True)
@click.option("--device", default=None, help="cpu, cuda or cuda:N. [cuda where there is one]")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of trace.json. [profiles/DATE-TIME]")
@_one_line_errors
def profile(method: str, iterations: int, data_dir: Path, device: str | None, out: Path | None, **given: Any) -> None:
    """Time of a few iterations phase by phase, their energy by NVML, and a trace for Perfetto or chrome://tracing."""
    where = _device(device)
    asked = {name: value for name, value in given.items() if value not in (None, ())}
    config, dataset = _configure(asked | {"methods": (method,)}, data_dir)
    found, folder = profiling.profile(config, dataset, where, out, iterations)
    console.print(profiling.table(found))
    for line in profiling.lines(found):
        say(line)
    say(f"wrote {folder / 'profile.json'}, and {folder / 'trace.json'}, which ui.perfetto.dev shows")


def _corrupted_test_set(
    folder: Path, dataset: ImageDataset, images: int | None, seed: int | None = None
) -> CorruptedTestSet:
    """The test set in the folder, made of the data set's if there is none; what was asked for is so, or refused.

    Args:
        images: how many are to be evaluated; None for all.
        seed: of the corruptions that are made, 0 where None; where it is given, those that are there have it too.
    """
    if not folder.exists() or not any(folder.iterdir()):
        with _progress() as progress:
            task = progress.add_task("corrupting the test set", total=len(CORRUPTIONS))
            make_corruptions(
                dataset.x_test,
                dataset.y_test,
                folder,
                seed=seed or 0,
                done=_advancer(progress, task),
                waiting=lambda who: say(f"{folder}: waiting for {who}, which makes it"),
            )
    test_set = CorruptedTestSet(folder, images)
    if list(test_set.image_shape) != list(dataset.x_test.shape[1:]):
        found, expected = list(test_set.image_shape), list(dataset.x_test.shape[1:])
        hint = "name another --corruptions-dir"
        raise ValueError(f"{folder}: found images of {found}, expected {expected} as in {dataset.name}; {hint}")
    test_set.check_made_of(dataset.x_test, dataset.y_test, seed)
    say(f"{folder}: {test_set}")
    return test_set


class _ToEvaluate(NamedTuple):
    """Networks by name, their data, the first how many test images of them (None: all), and ε."""

    networks: dict[str, torch.nn.Module]
    dataset: ImageDataset
    images: int | None
    epsilon: float


def _own_networks(
    path: Path, method: str | None, data: str | None, data_dir: Path, test_size: int | None
) -> _ToEvaluate:
    """The networks in a run's checkpoint."""
    config, state = load_checkpoint(path)
    stored: dict[str, Any] = state["contestants"]
    if method is not None and method not in stored:
        raise ValueError(f"--method {method}: {path} holds {', '.join(stored)}; name one of them, or none for all")
    dataset = _evaluated_on(config, state.get("data"), data, data_dir, test_size, path)
    networks = {}
    for name in [method] if method else stored:
        networks[name] = _build(config.model, config.width, dataset, stored[name]["model"], path)
        _load_weights(networks[name], stored[name]["model"], path)
    return _ToEvaluate(networks, dataset, test_size or config.test_size, config.epsilon)


def _evaluated_on(
    config: RunConfig, sha256: object, data: str | None, data_dir: Path, test_size: int | None, path: Path
) -> ImageDataset:
    """The data that are named, or else those of the run, which are no others though others lie there now."""
    if data is not None:
        return load_dataset(data, data_dir).take(None, test_size or config.test_size)
    whole = _load(dataclasses.replace(config, train_size=None, test_size=None), data_dir)
    if sha256 is not None:
        used = whole.take(config.train_size, config.test_size)
        check_data(used, fingerprint(used), str(sha256), path)
    return whole.take(None, test_size or config.test_size)


def _published_network(
    path: Path, model: str, method: str | None, data: str | None, data_dir: Path, test_size: int | None
) -> _ToEvaluate:
    """A network whose state_dict somebody published."""
    if method is not None:
        raise ValueError(f"--method {method}: a checkpoint that is read with --model holds one network; leave it away")
    source = data or "digits"
    dataset = load_dataset(source, data_dir).take(None, test_size)
    network = _build(model, None, dataset, read_tensors(path), path)
    network = load_published(network, path)
    return _ToEvaluate({model: network}, dataset, test_size, _preset(source, dataset).epsilon)


def _load_weights(network: torch.nn.Module, weights: dict[str, Any], path: Path) -> None:
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:  # other data, of other channels or of another size
        raise ValueError(
            f"{path}: its network does not fit the data ({error}); evaluate it on --data with images like its own"
        ) from error


@contextmanager
def _world(device: str | None, minutes: float) -> Iterator[tuple[World, torch.device]]:
    """The ranks and this one's device; only the first has something to say."""
    with joined(device, minutes) as (world, name):
        quiet, console.quiet = console.quiet, not world.leads
        try:
            yield world, _device(name)
        finally:
            console.quiet = quiet


def _run(
    methods: tuple[str, ...] | None,
    data_dir: Path,
    where: torch.device,
    out: Path | None,
    resume: Path | None,
    repeat: Path | None,
    given: dict[str, Any],
    world: World,
    balance: bool,
) -> None:
    if balance and world.group is None:
        raise ValueError("--balance shares an attack out over ranks: start several with torchrun; leave it away on one")
    asked = {name: value for name, value in given.items() if value not in (None, ())}
    if methods is not None:
        asked["methods"] = methods
    if resume is None:
        config, dataset = _configure(asked, data_dir) if repeat is None else _repeated(repeat, asked, data_dir)
        if repeat is not None and world.leads:
            _tell_changes(repeat, where)
        _train_and_report(config, dataset, where, out, False, world, balance)
        return
    resume = resume.parent if resume.name == "checkpoint.pt" else resume
    if out is not None or repeat is not None:
        other = "--out" if out is not None else "--repeat"
        raise ValueError(f"{other}: a resumed run stays in its folder; leave {other} or --resume away")
    saved = (resume / "checkpoint.pt").is_file()
    with held(resume) if saved and world.leads else nullcontext():  # told before the data are read
        config, dataset = _resumed(resume, asked, data_dir)
        if world.leads:
            _tell_changes(resume, where)
        _train_and_report(config, dataset, where, resume, True, world, balance)


def _train_and_report(
    config: RunConfig,
    dataset: ImageDataset,
    where: torch.device,
    folder: Path | None,
    resume: bool,
    world: World,
    balance: bool,
) -> None:
    if balance and (config.loss == "augmix" or not any(m.startswith("bullet") for m in config.methods)):
        raise ValueError(
            "--balance shares BulletTrain's attack out: it needs a method bullet, and a loss but augmix; leave it away"
        )
    shared = Balance(ranks_per_node=world.per_node) if balance else None
    with ExitStack() as stack:
        with _stop_signals() as stop:
            run = Run(folder, config, dataset, where, resume=resume, world=world, balance=shared)
            stack.callback(run.close)
            if world.group is not None and norms_alone(run.contestants[0].model):
                say("batch norm: torch synchronises it on CUDA alone; here it sees each rank's own samples")
            sizes = f"{len(dataset.x_train)} training, {len(dataset.x_test)} test images"
            say(f"{config.data}: {sizes}; run folder {run.folder}")
            begun = run.iteration
            _train(run, stop, f"go on with --resume {run.folder}")
        if not world.leads:
            for contestant in run.contestants:
                run.final(contestant)
            return
        with _progress() as progress:
            task = progress.add_task("final evaluation", total=len(config.methods))
            summary = report.summarise(run, _advancer(progress, task))
        paths = report.plot(run)
        console.print(report.table(summary))
        for contestant in run.contestants:
            if contestant.criterion is not None and run.iteration > begun:
                say(f"{contestant.method}: {contestant.criterion.explain().replace(chr(10), '; ')}")
        for method, entry in summary["methods"].items():
            if entry.get("skipped"):
                skipped = f"{entry['skipped']} minibatches skipped for NaN or Inf"
                say(f"{method}: {skipped}; metrics.jsonl tells which and why")
        say("wrote", ", ".join(str(p) for p in [run.folder / "summary.json", run.folder / "metrics.jsonl", *paths]))


def _tell_changes(folder: Path, where: torch.device) -> None:
    """Say what is another than when the run in the folder was started last, and why that matters."""
    path = folder / "run.json"
    starts = Provenance.read(path).starts if path.exists() else []
    if starts and (found := changes(starts[-1], this_start(0, where, 1))):
        say(f"{folder}: what follows may differ in its last bits, for it was started with {'; '.join(found)}")


def _resumed(folder: Path, asked: dict[str, Any], data_dir: Path) -> tuple[RunConfig, ImageDataset]:
    """The configuration of the run in the folder with what was asked for, and its data, wherever they are now."""
    path = folder / "checkpoint.pt"
    if folder.is_dir() and not path.exists():
        raise ValueError(f"{folder}: has no checkpoint.pt, so nothing was saved yet: start it with --out instead")
    stored, state = load_checkpoint(path)
    config = dataclasses.replace(stored, **asked)
    check_configuration(config, stored, path, but_data=state.get("data") is not None)
    return config, _load(config, data_dir)


def _repeated(folder: Path, asked: dict[str, Any], data_dir: Path) -> tuple[RunConfig, ImageDataset]:
    """The configuration of the run in the folder, and its data; only where they lie may be another place."""
    path = folder / "run.json"
    told = Provenance.read(path)
    others = sorted(set(asked) - {"data"})
    if others:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise ValueError(f"{names}: --repeat {folder} takes the options of that run; leave away what is to be another")
    config = dataclasses.replace(told.config, **asked)
    dataset = _load(config, data_dir)
    check_data(dataset, fingerprint(dataset), told.data["sha256"], path)
    return config, dataset


def _train(run: Run, stop: list[int], how_to_go_on: str) -> None:
    """Train to the end, or to the first iteration after a signal arrived in any rank's `stop`: then save and exit."""
    with _progress() as progress:
        task = progress.add_task("training", total=run.iterations, completed=run.iteration)
        try:
            for at in run.train():
                progress.update(task, completed=at.iteration, description=_ratios(run))
                if at.epoch_ended and run.world.leads:
                    say(_epoch_line(run))
                if number := run.world.most(stop[0] if stop else 0):
                    run.save()
                    run.world.most(0)  # whose rank ends is followed by torchrun's signal to the others: not before
                    progress.stop()
                    say(f"stopped and saved: {how_to_go_on}")
                    sys.exit(128 + number)
        except OSError as error:
            raise OSError(f"{error}; what was saved before is whole: {how_to_go_on}") from error


def _epoch_line(run: Run) -> str:
    latest = run.records()[-len(run.contestants) :]
    if run.config.loss == "augmix":
        parts = [f"{r['method']} {r['clean']:.1%} in {r['seconds']:.0f} s" for r in latest]
        return f"epoch {latest[0]['epoch']}, clean: " + ", ".join(parts)
    parts = [f"{r['method']} {r['clean']:.1%} / {r['robust']:.1%} in {r['seconds']:.0f} s" for r in latest]
    return f"epoch {latest[0]['epoch']}, clean / robust: " + ", ".join(parts)


def _ratios(run: Run) -> str:
    first, *others = run.contestants
    ratios = [f"{c.method} {median_speedup(first.seconds[-50:], c.seconds[-50:]):.2f}x" for c in others]
    return ", ".join(ratios) or "training"


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that receives the number of an interrupt or termination signal; a second one exits at once."""
    received: list[int] = []

    def take(number: int, _: object) -> None:
        received.append(number)
        if len(received) > 1:
            sys.exit(128 + number)
        os.write(2, b"bt-fast: stopping after this iteration; once more to stop at once\n")  # safe in a handler

    watched = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, take) for number in watched]
    try:
        yield received
    finally:
        for number, handler in zip(watched, before, strict=True):
            signal.signal(number, handler)


def _configure(asked: dict[str, Any], data_dir: Path) -> tuple[RunConfig, ImageDataset]:
    source = asked.get("data", "digits")
    dataset = load_dataset(source, data_dir)
    return _adapt(dataclasses.replace(_preset(source, dataset), data=source), asked, dataset)


def _adapt(preset: RunConfig, asked: dict[str, Any], dataset: ImageDataset) -> tuple[RunConfig, ImageDataset]:
    """A configuration with what was asked for, and the part of the data that it uses."""
    if "model" in asked and asked["model"] != "small-cnn":
        preset = dataclasses.replace(preset, width=None)
    if asked.get("loss", preset.loss) == "augmix":  # a sample is augmented or it is not
        asked = {"boundary_steps": 1, "robust_steps": 0, "outlier_steps": 0, **asked}
    elif "steps" in asked:
        asked.setdefault("boundary_steps", asked["steps"])
    config = dataclasses.replace(preset, **asked)
    config.check()
    dataset = dataset.take(config.train_size, config.test_size)
    return dataclasses.replace(config, curve_size=min(config.curve_size, len(dataset.x_test))), dataset


def _preset(source: str, dataset: ImageDataset) -> RunConfig:
    if source in PRESETS:
        return PRESETS[source]
    return PRESETS["mnist" if dataset.x_train.shape[1] == 1 else "cifar10"]


def _load(config: RunConfig, data_dir: Path) -> ImageDataset:
    """A run's data, which may not be where they were."""
    try:
        return load_dataset(config.data, data_dir).take(config.train_size, config.test_size)
    except ValueError as error:
        raise ValueError(f"{error}; say with --data where the run's data are now") from error


def _build(model: str, width: int | None, dataset: ImageDataset, weights: object, path: Path) -> torch.nn.Module:
    """The network for weights that are somewhere in what `path` holds: it has their classes, not those of the data."""
    classes = classes_in(model, weights)
    if classes is None:
        classes = 2  # loading says which weights are missing
    else:
        check_labels(classes, dataset.y_test, dataset.name, f"the network of {path}")
    _, channels, height, breadth = dataset.x_test.shape
    return build_model(model, in_channels=channels, image_size=(height, breadth), num_classes=classes, width=width)


def _device(name: str | None) -> torch.device:
    asked = name or ("cuda" if torch.cuda.is_available() else "cpu")
    hint = ""
    try:
        device = torch.device(asked)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("expected cpu, cuda or cuda:N")
        hint = "; bt-fast doctor says what to do, and --device cpu goes without" if device.type == "cuda" else ""
        torch.zeros(1, device=device)  # a launch, which a GPU that torch was not built for does not take
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {asked}: {str(error).splitlines()[0].split('. ')[0]}{hint}") from error
    return device


def _follower(progress: Progress, task: TaskID) -> Callable[[int], None]:
    """Moves a task's bar to the count that it is told."""
    return lambda count: progress.update(task, completed=count)


def _advancer(progress: Progress, task: TaskID) -> Callable[[str], None]:
    """Moves a task's bar by one whenever it is told of something done."""
    return lambda _: progress.advance(task)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


@cli.command()
@click.option("--device", default=None, help="cpu, cuda or cuda:N. [cuda where it can be used]")
@click.option(
    "--json", "path", type=click.Path(path_type=Path, dir_okay=False), help="Write the same for a bug report."
)
@_one_line_errors
def doctor(device: str | None, path: Path | None) -> int:
    """What is installed, what runs fused, and whether it computes what it should; exit code 1 if something fails."""
    found = examination.examine(_named(device))
    for line in examination.lines(found):
        say(line, markup=False)
    if path is not None:
        write_text(path, json.dumps(examination.as_json(found), indent=2) + "\n")
    return 0 if examination.verdict(found)[0] else 1


def _named(name: str | None) -> torch.device | None:
    """The device of that name, which need not be there."""
    if name is None:
        return None
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: expected cpu, cuda or cuda:N")
    return device


@cli.command("report")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=Path("report.html"), show_default=True)
@click.option("--tensorboard", type=click.Path(path_type=Path), help="Also write TensorBoard scalars into this folder.")
@_one_line_errors
def html_report(runs: tuple[Path, ...], out: Path, tensorboard: Path | None) -> None:
    """Write one HTML page about the runs in run folders or study folders RUN, side by side. It needs no network.

    A run that is not finished, running or not, is told as far as it is.
    """
    found = load_runs(runs)
    check_path(out)
    if tensorboard is not None:
        write_scalars(found, tensorboard)
    write_page(found, out)
    say("wrote", ", ".join(str(path) for path in (out, tensorboard) if path is not None))
