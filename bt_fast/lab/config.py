"""One training run's configuration: plain data that is stored with everything the run writes."""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any

from bt_fast.allocation import METRICS, POLICIES
from bt_fast.engine import ENGINES, Engine
from bt_fast.guard import NON_FINITE
from bt_fast.lab.files import parse_json
from bt_fast.lab.methods import COMPARED, REMEMBERING, Method
from bt_fast.units import warn_of_units

OBJECTIVES = ("trades", "mart", "pgd", "augmix")
STORAGES, STORED = ("device", "host", "file"), ("int8", "float16", "float32")
MEMORY_STEPS: dict[str, Any] = {"steps": 1, "boundary_steps": 1, "robust_steps": 1, "outlier_steps": 0}
SOURCES = "digits|mnist|cifar10|cifar100|PATH"


def option(
    default: object,
    help: str | None = None,
    *,
    choices: Iterable[str] = (),
    metavar: str | None = None,
    **limits: float,
) -> Any:
    """Returns a field of `RunConfig` with its metadata for the command line.

    Args:
        default: the value for the digits.
        help, metavar: as in click's options.
        choices: the accepted values, if they are names.
        limits: of a number, as in click's ranges: min, max, and min_open or max_open if the limit itself is outside.
    """
    shown = {"help": help, "metavar": metavar}
    return dataclasses.field(default=default, metadata={"shown": shown, "choices": tuple(choices), "limits": limits})


_at_least_1 = functools.partial(option, min=1)
_at_least_0 = functools.partial(option, min=0)
_above_0 = functools.partial(option, min=0, min_open=True)
_share = functools.partial(option, min=0, max=1, max_open=True)


@dataclass(frozen=True)
class RunConfig:
    """The configuration of a run: the command line's options, with the defaults of the digits.

    Step sizes, ε and pixels are in [0, 1] units. The objective "augmix" attacks nothing, so its runs have no robust
    accuracy.
    """

    methods: tuple[str, ...] = COMPARED  # in lockstep on the same minibatches; each as `Method.parse` reads it
    engine: str = option(
        "fast",
        "How attack and update are executed, and options of it (fast,graphs=off). [fast]",
        metavar="|".join(ENGINES),
    )
    data: str = option("digits", "Data set; PATH is an .npz or a folder. [digits]", metavar=SOURCES)
    train_size: int | None = _at_least_1(None, "Use the first N training images. [all]")
    test_size: int | None = _at_least_1(None, "Use the first N test images. [all]")
    model: str = option("small-cnn", "small-cnn, preactresnet-18 or wrn-D-K.", metavar="NAME")
    width: int | None = _at_least_1(16, "Channels of small-cnn's first layer.")
    augment: bool = option(False, "Random crops and flips.")
    loss: str = option("trades", "Objective. [trades]", choices=OBJECTIVES)
    epochs: int = _at_least_1(3)
    batch_size: int = _at_least_1(50)
    lr: float = _above_0(0.03, "SGD learning rate.")
    sgd_momentum: float = _share(0.9)
    weight_decay: float = _at_least_0(0.0)
    decay_epochs: tuple[int, ...] = _at_least_1((2,), "Epochs after which lr falls tenfold (repeatable).")
    epsilon: float = _at_least_0(0.2, "Radius of the l_inf ball, in [0, 1] pixel units.")
    step_size: float = _above_0(0.04, "Step size of the attack.")
    steps: int = _at_least_1(10, "Attack steps N without BulletTrain. [10]")
    beta: float = _at_least_0(6.0, "Weight of the robust term (not of pgd).")
    boundary_steps: int = _at_least_0(10, "N_B of BulletTrain. [--steps]")
    robust_steps: int = _at_least_0(2, "N_R of BulletTrain. [2]")
    outlier_steps: int = _at_least_0(0, "N_O of BulletTrain. [0]")
    gamma: float = _above_0(0.8, "Scale of F_R. [0.8]", max=1)
    fraction_momentum: float = _share(0.9, "p of F_R. [0.9]")
    metric: str = option("signed_variance", "Of a sample's certainty. [signed_variance]", choices=METRICS)
    policy: str = option("three_groups", "Certainty to steps. [three_groups]", choices=POLICIES)
    grad_align: float = _at_least_0(0.0, "Weight of GradAlign's regulariser. [0]")
    memory: bool = option(False, "An attack starts where that of its image ended an epoch ago, and takes one step.")
    memory_storage: str = option("device", "Where the memory lies: file in the run folder. [device]", choices=STORAGES)
    memory_dtype: str = option("int8", "Of the memory. [int8]", choices=STORED)
    non_finite: str = option("raise", "A minibatch with NaN or Inf. [raise]", choices=NON_FINITE)
    eval_steps: int = _at_least_1(20, "Steps of the final PGD. [20]")
    eval_restarts: int = _at_least_1(1, "Restarts of the final PGD. [1]")
    curve_size: int = _at_least_1(250, "Test images evaluated after each epoch.")
    seed: int = _at_least_0(0, max=2**32 - 1)  # torch's CPU generator keeps 32 bits

    def to_json(self) -> str:
        """Returns one line of JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RunConfig:
        """Returns the configuration that `to_json` wrote.

        Raises:
            ValueError: the text is not one, or of another version.
        """
        try:
            values = parse_json(text)
        except ValueError as error:
            raise ValueError(f"not a run configuration: {error}; expected what `to_json` wrote") from error
        if isinstance(values, dict):
            values = {"engine": "exact"} | values  # configurations from before there were engines
        if not isinstance(values, dict) or not set(KINDS) - _LATER <= set(values) <= set(KINDS):
            names = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise ValueError(
                f"not a run configuration of this version: found {names}, expected {sorted(KINDS)}; "
                "give it to the version of bt_fast that wrote it"
            )
        for name, value in values.items():
            values[name] = tuple(value) if isinstance(value, list) else value
            if not _fits(values[name], KINDS[name]):
                raise ValueError(
                    f"{name} in the run configuration has the wrong kind of value: {values[name]!r}; "
                    f"write a value like {getattr(cls, name)!r}"
                )
        config = cls(**values)
        config.check()
        return config

    def check(self) -> None:
        """Raises ValueError, which names the option, for a choice that does not exist, or not for the objective."""
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata.get("choices")
            if choices and value not in choices:
                raise ValueError(
                    f"{field.name} in the run configuration must be one of {', '.join(choices)}, got {value!r}; "
                    f"write {field.name}={choices[0]!r}"
                )
        Engine.parse(self.engine)
        if len(set(self.methods)) < len(self.methods) or not self.methods:
            raise ValueError(
                f"methods must be at least one, each once, got {', '.join(self.methods) or 'none'}; give --method"
            )
        for name in self.methods:
            _, config = self.of_method(name)
            if self.loss != "augmix":
                warn_of_units(config.epsilon, step_size=config.step_size)
        kept = ("memory_storage", "memory_dtype")
        unused = [name for name in kept if getattr(self, name) != getattr(type(self), name)]
        if unused and not any(self.of_method(name)[1].memory for name in self.methods):
            given = " ".join(f"--{name.replace('_', '-')} {getattr(self, name)}" for name in unused)
            raise ValueError(f"{given}: no method has a memory; write --memory too, or leave it away")

    def of_method(self, name: str) -> tuple[Method, RunConfig]:
        """Returns the method of that name, and this configuration with the method's own options.

        One with a memory has the memory's steps.

        Raises:
            ValueError: the method does not exist, or not for this objective; or it has a memory and cannot, or other
                steps than that.
        """
        method = Method.parse(name)
        algorithms = _OF_AUGMIX if self.loss == "augmix" else _OF_ATTACKS
        if method.algorithm not in algorithms:
            raise ValueError(f"--method {name}: {self.loss} has {', '.join(algorithms)}; name one of these")
        changes: dict[str, Any] = dict(method.changes)
        config = dataclasses.replace(self, **changes)
        if not config.memory:
            return method, config
        if self.loss == "augmix":
            raise ValueError("--memory: augmix attacks nothing, so nothing is remembered; leave it away")
        if method.algorithm not in REMEMBERING:
            raise ValueError(
                f"--method {name}: {method.algorithm} has no memory; leave --memory away, and write "
                f"--method bullet,memory=on (or optimised,memory=on) for those that shall have one"
            )
        config.check_steps(changes, f"--method {name}: ")
        return method, dataclasses.replace(config, **MEMORY_STEPS)

    def check_steps(self, given: Mapping[str, Any], prefix: str = "") -> None:
        """Raises ValueError, which names the option, if options that were given are not those of a memory."""
        for name, own in {**MEMORY_STEPS, "step_size": self.epsilon}.items():
            if given.get(name, own) != own:
                option = f"--{name.replace('_', '-')}"
                raise ValueError(
                    f"{prefix}{option} {given[name]:g}: with a memory it is {own:g}, for an attack goes on from where "
                    f"it ended an epoch ago; leave {option} away"
                )

    def differences(self, other: RunConfig, *, but: tuple[str, ...] = ()) -> list[str]:
        """Returns `name: this value against the other value` for every differing field, except those in `but`."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        names = [name for name in mine if name not in but and mine[name] != theirs[name]]
        return [f"{name}: {mine[name]} against {theirs[name]}" for name in names]


def _fits(value: object, kind: Any) -> bool:
    """Whether a value read from JSON has the type of its field; an integer is also a float, a bool is not a number."""
    if isinstance(kind, UnionType):
        return any(_fits(value, member) for member in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(type(member) is typing.get_args(kind)[0] for member in value)
    return type(value) is kind or (kind is float and type(value) is int)


KINDS: dict[str, Any] = typing.get_type_hints(RunConfig)
_OF_ATTACKS = ("reference", "optimised", "bullet", "fast", "yopo")
_OF_AUGMIX = ("optimised", "bullet", "no-jsd")
_LATER = {"metric", "policy", "grad_align", "non_finite"}  # options that older configurations lack
_LATER |= {"memory", "memory_storage", "memory_dtype"}

_CIFAR = RunConfig(  # the scripts of TRADES, which the paper's Table 2 uses
    data="cifar10",
    model="wrn-34-10",
    width=None,
    augment=True,
    epochs=76,
    batch_size=128,
    lr=0.1,
    weight_decay=2e-4,
    decay_epochs=(75,),
    epsilon=0.031,
    step_size=0.007,
    curve_size=500,
)
PRESETS = {  # the defaults for each data set; with those of the digits two CPU cores finish a comparison in minutes
    "digits": RunConfig(),
    "mnist": RunConfig(data="mnist", width=32, epochs=10, decay_epochs=(8,), curve_size=500),
    "cifar10": _CIFAR,
    "cifar100": dataclasses.replace(_CIFAR, data="cifar100"),
}
