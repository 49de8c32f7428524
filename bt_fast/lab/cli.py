"""The `bt-fast` command: compare, train, evaluate, corruptions, study, report, profile, doctor."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import click
import torch

from bt_fast.attack.inner import NAMES, SHORT
from bt_fast.attack.pgd import PGD, norm_of
from bt_fast.device import out_of_memory
from bt_fast.engine import Engine
from bt_fast.evaluation import evaluate as evaluate_model
from bt_fast.lab import doctor as examination
from bt_fast.lab import options, report
from bt_fast.lab import profile as profiling
from bt_fast.lab.corruptions import CORRUPTIONS, corruption_errors
from bt_fast.lab.data import load_dataset
from bt_fast.lab.evaluating import Source, corrupted_test_set, read_networks
from bt_fast.lab.files import write_text
from bt_fast.lab.fitting import check_labels
from bt_fast.lab.html_report.loading import load_runs
from bt_fast.lab.html_report.page import check_path, write_page
from bt_fast.lab.html_report.scalars import write_scalars
from bt_fast.lab.methods import COMPARED, FORMS
from bt_fast.lab.session import Start, adapt, configure, named_device, run_training, sizes, usable_device
from bt_fast.lab.studies.catalogue import STUDIES
from bt_fast.lab.studies.study import SCALES, check_run, conduct
from bt_fast.lab.studies.study import write as write_study
from bt_fast.lab.terminal import console, progress_bar, say
from bt_fast.lab.training import evaluation_batches


class _Command(click.Command):
    """A command that turns a user's mistakes and full memories into click's errors."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (ValueError, TypeError, OSError) as error:
            raise click.ClickException(str(error)) from error
        except Exception as error:
            if not out_of_memory(error):
                raise
            smaller = "a smaller --batch-size or --model, " if "batch_size" in ctx.params else ""
            reason = (str(error).splitlines() or ["no more is known"])[0]
            raise click.ClickException(
                f"the memory is full: try {smaller}--device cpu, or end what else runs there (nvidia-smi lists it): "
                f"{reason}"
            ) from error


class _Group(click.Group):
    """A group of commands with errors of one line on standard error, and exit code 2 for a user's mistake."""

    command_class = _Command

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


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="bt-fast", prog_name="bt-fast")
def cli() -> None:
    """Robust training that spends its attack steps on the samples near the decision boundary."""


# Training


def _training(command: Any) -> Any:
    """Adds to a command the options of a training, and the help that all trainings share."""
    command.__doc__ = f"""{command.__doc__}

    Interrupted or terminated, it finishes the iteration, saves and exits with 130 or 143; a second time it exits at
    once. --resume goes on from there, and from the last checkpoint after a kill.

    Several GPUs: torchrun --nproc-per-node N -m bt_fast {command.__name__} ...; --batch-size is that of the whole
    minibatch, which the ranks share, so that any number of them trains the same.
    """
    return options.with_options(options.TRAINING_OPTIONS)(command)


def _run(methods: tuple[str, ...], default: tuple[str, ...], values: dict[str, Any]) -> None:
    """Trains these methods, or the default ones; `values` of all options except --method."""
    names = {field.name for field in dataclasses.fields(Start)}
    start = Start(**{name: values[name] for name in names})
    chosen = methods or (default if start.previous is None else ())
    run_training(start, options.given({"methods": chosen} | {k: v for k, v in values.items() if k not in names}))


@cli.command()
@options.method(
    "methods",
    multiple=True,
    help=f"What to compare with each other (repeatable): {FORMS}; also on an engine of its own (bullet-exact, "
    f"bullet-bf16) and with options of its own (bullet,robust-steps=0). [{', '.join(COMPARED)}]",
)
@_training
def compare(methods: tuple[str, ...], **values: Any) -> None:
    """Train an objective as its authors wrote it, ours and ours + BulletTrain on the same minibatches and compare."""
    twice = [method for method in methods if methods.count(method) > 1]
    if twice:
        raise ValueError(f"--method {twice[0]} is given twice: each method is trained once; give it once")
    default = COMPARED[1:] if values["loss"] == "augmix" else COMPARED  # AugMix has no authors' code here
    if values["engine"]:
        default = (*default[:-1], "bullet")  # on the named engine
    _run(methods, default, values)


@cli.command()
@options.method(help="What to train. [bullet]")
@_training
def train(method: str | None, **values: Any) -> None:
    """Train one model."""
    _run((method,) if method else (), ("bullet",), values)


@cli.command()
@click.argument("name", type=click.Choice(list(STUDIES)), metavar="|".join(STUDIES))
@click.option("--scale", type=click.Choice(SCALES), default="laptop", show_default=True, help="Network, data, epochs.")
@click.option("--seed", "seeds", type=options.TYPES["seed"], multiple=True, help="One run for each (repeatable). [0]")
@click.option("--out", type=options.PATH, help="Folder; a study left there goes on. [studies/NAME]")
@click.option(
    "--corruptions-dir",
    type=options.FOLDER,
    help="For table1: CIFAR-10-C or a like folder; one that is not there is made of the test set. [OUT/corrupted]",
)
@options.DATA_DIR
@options.DEVICE
@options.with_options(option for name, option in options.RUN_OPTIONS.items() if name != "seed")
def study(
    name: str,
    scale: str,
    seeds: tuple[int, ...],
    out: Path | None,
    corruptions_dir: Path | None,
    data_dir: Path,
    device: str | None,
    **values: Any,
) -> None:
    """Run the study of a table or figure of the paper: NAME.json and NAME.png. The same command goes on with it.

    Options other than the study's own (--data, --train-size, ...) replace those of the scale.
    """
    where, chosen, values = usable_device(device), STUDIES[name], options.given(values)
    base = chosen.config(scale)
    config, dataset = adapt(base, values, load_dataset(values.get("data", base.data), data_dir))
    folder = out or Path("studies") / name
    if corruptions_dir is not None and not chosen.corruptions:
        which = ", ".join(other.name for other in STUDIES.values() if other.corruptions)
        raise ValueError(f"--corruptions-dir: {name} has no corruptions, {which} has; leave it away")
    configs = [dataclasses.replace(config, seed=seed) for seed in dict.fromkeys(seeds or (0,))]
    for each in configs:
        check_run(each, dataset, folder, where)
    say(f"{chosen.title}\n{config.data}: {sizes(dataset)}; {folder}")
    test_set = None
    if chosen.corruptions:
        corrupted = corruptions_dir or folder / "corrupted"
        test_set = corrupted_test_set(corrupted, dataset, config.test_size)
        check_labels(dataset.classes, test_set.labels, str(corrupted), f"the network for {config.data}")
    runs = [conduct(chosen, each, dataset, folder, where, test_set) for each in configs]
    say("wrote", ", ".join(str(path) for path in write_study(chosen, scale, runs, folder)))


@cli.command()
@options.method(default="bullet", show_default=True)
@click.option("--iterations", type=options.COUNT, default=10, show_default=True, help="Timed ones, for the energy too.")
@options.with_options([*options.RUN_OPTIONS.values(), options.DATA_DIR, options.DEVICE])
@click.option("--out", type=options.PATH, help="Folder of trace.json. [profiles/DATE-TIME]")
def profile(method: str, iterations: int, data_dir: Path, device: str | None, out: Path | None, **values: Any) -> None:
    """Time of a few iterations phase by phase, their energy by NVML, and a trace for Perfetto or chrome://tracing."""
    where = usable_device(device)
    config, dataset = configure(options.given(values) | {"methods": (method,)}, data_dir)
    result, folder = profiling.profile(config, dataset, where, out, iterations)
    console.print(profiling.table(result))
    for line in profiling.lines(result):
        say(line)
    say(f"wrote {folder / 'profile.json'}, and {folder / 'trace.json'}, which ui.perfetto.dev shows")


# Checkpoints and run folders


@cli.command()
@options.with_options(options.CHECKPOINT_OPTIONS)
@click.option("--epsilon", type=options.TYPES["epsilon"], help="[the checkpoint's]")
@click.option("--distance", type=click.Choice(["l_inf", "l_2"]), default="l_inf", show_default=True)
@click.option(
    "--loss", type=click.Choice((*SHORT, *NAMES)), default="ce", show_default=True, help="What the attack ascends."
)
@click.option("--steps", type=options.COUNT, default=20, show_default=True)
@click.option("--step-size", type=options.TYPES["step_size"], help="[2 epsilon / steps]")
@click.option("--restarts", type=options.COUNT, default=1, show_default=True)
@click.option("--seed", type=options.TYPES["seed"], default=0, show_default=True)
@options.RUN_OPTIONS["engine"]
def evaluate(
    epsilon: float | None,
    distance: str,
    loss: Any,
    steps: int,
    step_size: float | None,
    restarts: int,
    seed: int,
    engine: str | None,
    device: str | None,
    **source: Any,
) -> None:
    """Clean and PGD accuracy of CHECKPOINT: a run's checkpoint.pt, or a state_dict such as TRADES publishes."""
    where, chosen = usable_device(device), Engine.parse(engine or "fast")
    if chosen.precision is not None:
        raise ValueError(f"--engine {engine}: an evaluation has the network's own precision; write exact or fast")
    evaluated = read_networks(Source(**source))
    x, y = evaluated.dataset.x_test, evaluated.dataset.y_test
    radius = evaluated.epsilon if epsilon is None else epsilon
    attack = PGD(radius, step_size or 2 * radius / steps, steps, norm_of(distance))
    attacked = distance if loss == "ce" else f"{distance}, {loss} loss"
    for name, network in evaluated.networks.items():
        with progress_bar(name, len(y)) as bar:
            accuracy = evaluate_model(
                network.to(where),
                evaluation_batches(x, y, where),
                attack,
                restarts=restarts,
                loss=loss,
                engine=chosen,
                generator=torch.Generator(where).manual_seed(seed),
                progress=bar.reach,
            )
        say(
            f"{name}: clean {100 * accuracy.clean:.2f} %, robust {100 * accuracy.robust:.2f} % "
            f"(PGD-{steps} x {restarts}, {attacked}, eps = {radius:g}, {accuracy.total} images)"
        )


@cli.command()
@options.with_options(options.CHECKPOINT_OPTIONS)
@click.option(
    "--corruptions-dir",
    type=options.FOLDER,
    help="CIFAR-10-C, CIFAR-100-C or a like folder; one that is not there is made of the test set. [a temporary one]",
)
@click.option("--seed", type=options.TYPES["seed"], help="Of the corruptions that are made. [0]")
def corruptions(corruptions_dir: Path | None, seed: int | None, device: str | None, **source: Any) -> None:
    """Error of CHECKPOINT under fifteen corruptions at five severities."""
    where = usable_device(device)
    evaluated = read_networks(Source(**source))
    with tempfile.TemporaryDirectory() as temporary:
        folder = corruptions_dir or Path(temporary) / "made"
        test_set = corrupted_test_set(folder, evaluated.dataset, evaluated.test_size, seed)
        for name, network in evaluated.networks.items():
            errors = {}
            with progress_bar(name, len(CORRUPTIONS)) as bar:
                for corruption, of_severities in corruption_errors(network.to(where), test_set, where):
                    errors[corruption] = of_severities
                    bar.advance()
            console.print(report.corruption_table(name, errors))


@cli.command("report")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=options.PATH)
@click.option("--out", type=options.PATH, default=Path("report.html"), show_default=True)
@click.option("--tensorboard", type=options.PATH, help="Also write TensorBoard scalars into this folder.")
def html_report(runs: tuple[Path, ...], out: Path, tensorboard: Path | None) -> None:
    """Write one HTML page about the runs in run folders or study folders RUN, side by side. It needs no network.

    A run that is not finished, running or not, is reported as far as it is.
    """
    loaded = load_runs(runs)
    check_path(out)
    if tensorboard is not None:
        write_scalars(loaded, tensorboard)
    write_page(loaded, out)
    say("wrote", ", ".join(str(path) for path in (out, tensorboard) if path is not None))


# The machine


@cli.command()
@click.option("--device", help="cpu, cuda or cuda:N. [cuda where it can be used]")
@click.option("--json", "path", type=options.FILE, help="Write the same for a bug report.")
def doctor(device: str | None, path: Path | None) -> int:
    """What is installed, what runs fused, and whether it computes what it should; exit code 1 if something fails."""
    findings = examination.examine(None if device is None else named_device(device))
    for line in examination.lines(findings):
        say(line, markup=False)
    if path is not None:
        write_text(path, json.dumps(examination.as_json(findings), indent=2) + "\n")
    return 0 if examination.verdict(findings)[0] else 1
