"""The options shared by several commands; those of a run are made from the fields of `RunConfig`."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from bt_fast.engine import Engine
from bt_fast.lab.config import KINDS, SOURCES, RunConfig
from bt_fast.lab.methods import Method

Decorator = Callable[[Any], Any]

PATH = click.Path(path_type=Path)
FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)
COUNT = click.IntRange(min=1)


class FiniteRange(click.FloatRange):
    """A range of numbers without NaN and infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Returns the number, or raises a usage error that names the option."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class Parsed(click.types.StringParamType):
    """A text for `parse`: its ValueError becomes the command's error, with the prefix before it."""

    def __init__(self, parse: Callable[[str], object], prefix: str = "") -> None:
        self._parse, self._prefix = parse, prefix

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Checks the text and returns it unchanged."""
        try:
            self._parse(value)
        except ValueError as error:
            raise click.ClickException(f"{self._prefix}{error}") from error
        return value


def _type_of(field: dataclasses.Field[Any]) -> click.ParamType[Any]:
    """Returns the type of the option of a `RunConfig` field."""
    kinds = {KINDS[field.name], *typing.get_args(KINDS[field.name])}
    if field.name == "engine":
        return Parsed(Engine.parse, "--engine: ")
    if field.metadata["choices"]:
        return click.Choice(field.metadata["choices"])
    if int in kinds:
        return click.IntRange(**field.metadata["limits"])
    if float in kinds:
        return FiniteRange(**field.metadata["limits"])
    return click.BOOL if bool in kinds else click.STRING


def _option_of(field: dataclasses.Field[Any]) -> Decorator:
    """Returns the option of a `RunConfig` field; if not given, its value is None, or () for several."""
    name, kind = field.name.replace("_", "-"), KINDS[field.name]
    return click.option(
        f"--{name}/--no-{name}" if kind is bool else f"--{name}",
        type=TYPES[field.name],
        default=None,
        multiple=typing.get_origin(kind) is tuple,
        **field.metadata["shown"],
    )


def method(*name: str, **attributes: Any) -> Decorator:
    """Returns the option --method, with values for `Method.parse`."""
    return click.option("--method", *name, metavar="METHOD", type=Parsed(Method.parse), **attributes)


_FIELDS = [field for field in dataclasses.fields(RunConfig) if field.name != "methods"]  # --method differs by command
TYPES = {field.name: _type_of(field) for field in _FIELDS}
RUN_OPTIONS = {field.name: _option_of(field) for field in _FIELDS}

DATA_DIR = click.option("--data-dir", type=PATH, default=Path("data"), show_default=True)
DEVICE = click.option("--device", help="cpu, cuda or cuda:N. [cuda where there is one]")
TRAINING_OPTIONS = [
    *RUN_OPTIONS.values(),
    DATA_DIR,
    DEVICE,
    click.option("--out", type=PATH, help="Run folder. [runs/DATE-TIME]"),
    click.option("--resume", type=PATH, help="Go on with the run in this folder."),
    click.option("--repeat", type=PATH, help="Begin the run in this folder anew, in another, on the same data."),
    click.option("--balance", is_flag=True, help="Ranks share BulletTrain's attack out, where that is quicker."),
    click.option(
        "--rank-timeout",
        type=FiniteRange(min=0, min_open=True),
        default=10.0,
        show_default=True,
        metavar="MINUTES",
        help="A rank that does not answer for so long is an error.",
    ),
]
CHECKPOINT_OPTIONS = [
    click.argument("checkpoint", type=PATH),
    method(help="Which model of a comparison. [the only one, or all]"),
    click.option("--model", metavar="NAME", help="Network of a published checkpoint: small-cnn, wrn-D-K, ..."),
    click.option("--data", metavar=SOURCES, help="Data set. [the checkpoint's]"),
    DATA_DIR,
    click.option("--test-size", type=COUNT, help="Use the first N test images. [the checkpoint's]"),
    DEVICE,
]


def with_options(options: Iterable[Decorator]) -> Decorator:
    """Returns a decorator that adds the options to a command, in their order."""

    def decorate(command: Any) -> Any:
        for option in reversed([*options]):
            command = option(command)
        return command

    return decorate


def given(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the given options of a run, by the names of `RunConfig`'s fields."""
    return {name: value for name, value in values.items() if value not in (None, ())}
