"""One training run's configuration: plain data that is stored with everything the run writes."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from bt_fast.allocation import METRICS, POLICIES
from bt_fast.engine import Engine
from bt_fast.guard import NON_FINITE
from bt_fast.lab.files import parse_json
from bt_fast.lab.methods import COMPARED, Method
from bt_fast.units import warn_of_units

OBJECTIVES = ("trades", "mart", "pgd", "augmix")


@dataclass(frozen=True)
class RunConfig:
    """What a run trains and how. Step sizes, ε and pixels are in [0, 1] units.

    Attributes:
        methods: what is trained, in lockstep on the same minibatches; each as `Method.parse` reads it, with options of
            its own where it has them.
        engine: of the methods that name none, as `Engine.parse` reads it.
        loss: the objective, one of `OBJECTIVES`.
        data: as `load_dataset`'s source. train_size, test_size: how many images of it; None is all.
        model: as `build_model`'s name. width: of small-cnn.
        augment: random crops with 4 pixels of padding, and horizontal flips.
        epochs, batch_size, lr, sgd_momentum, weight_decay: SGD. lr falls tenfold after each of `decay_epochs`.
        epsilon, step_size, steps: the attack. beta: the weight of the robust term, which PGD has not.
        boundary_steps, robust_steps, outlier_steps, gamma, fraction_momentum, metric, policy: BulletTrain's.
        non_finite: what becomes of a minibatch with NaN or Inf, one of `guard.NON_FINITE`.
        grad_align: the weight of GradAlign's regulariser, added to the loss.
        eval_steps, eval_restarts: PGD for the final robust accuracy.
        curve_size: test images for the accuracy after each epoch (PGD-`eval_steps`, one start).

    A run with the objective "augmix" attacks nothing: it has no robust accuracy of its own.
    """

    methods: tuple[str, ...]
    engine: str
    data: str
    train_size: int | None
    test_size: int | None
    model: str
    width: int | None
    augment: bool
    loss: str
    epochs: int
    batch_size: int
    lr: float
    sgd_momentum: float
    weight_decay: float
    decay_epochs: tuple[int, ...]
    epsilon: float
    step_size: float
    steps: int
    beta: float
    boundary_steps: int
    robust_steps: int
    outlier_steps: int
    gamma: float
    fraction_momentum: float
    metric: str
    policy: str
    grad_align: float
    non_finite: str
    eval_steps: int
    eval_restarts: int
    curve_size: int
    seed: int

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RunConfig:
        """The configuration that `to_json` wrote.

        Raises:
            ValueError: it is not one, or of another version.
        """
        try:
            fields = parse_json(text)
        except ValueError as error:
            raise ValueError(f"not a run configuration: {error}; expected what `to_json` wrote") from error
        if isinstance(fields, dict):
            fields = _ADDED | fields
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or set(fields) != names:
            found = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
            raise ValueError(
                f"not a run configuration of this version: found {found}, expected {sorted(names)}; "
                "give it to the version of bt_fast that wrote it"
            )
        lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        config = cls(**{**fields, **lists})
        for name, kinds in _KINDS.items():
            value = getattr(config, name)
            if (isinstance(value, bool) and bool not in kinds) or not isinstance(value, kinds):
                raise ValueError(
                    f"{name} in the run configuration has the wrong kind of value: {value!r}; "
                    f"write a value like {getattr(_DIGITS, name)!r}"
                )
        for name, kind in (("methods", str), ("decay_epochs", int)):
            values = getattr(config, name)
            if any(type(value) is not kind for value in values):
                raise ValueError(
                    f"{name} in the run configuration has the wrong kind of values: {values!r}; "
                    f"write values like {getattr(_DIGITS, name)!r}"
                )
        config.check()
        return config

    def check(self) -> None:
        """Raise ValueError, which names the option, for a choice that there is not, or not for the objective."""
        for name, value, choices in (
            ("loss", self.loss, OBJECTIVES),
            ("metric", self.metric, METRICS),
            ("policy", self.policy, POLICIES),
            ("non_finite", self.non_finite, NON_FINITE),
        ):
            if value not in choices:
                raise ValueError(
                    f"{name} in the run configuration must be one of {', '.join(choices)}, got {value!r}; "
                    f"write {name}={next(iter(choices))!r}"
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

    def of_method(self, name: str) -> tuple[Method, RunConfig]:
        """The method of that name, and this configuration with what the method has for itself.

        Raises:
            ValueError: there is no such method, or not for this objective.
        """
        method = Method.parse(name)
        taken = _OF_AUGMIX if self.loss == "augmix" else _OF_ATTACKS
        if method.algorithm not in taken:
            raise ValueError(f"--method {name}: {self.loss} has {', '.join(taken)}; name one of these")
        changes: dict[str, Any] = dict(method.changes)
        return method, dataclasses.replace(self, **changes)

    def differences(self, other: RunConfig, *, but: tuple[str, ...] = ()) -> list[str]:
        """`name: this value against the other value` for every field in which the two differ, but for some."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        names = [name for name in mine if name not in but and mine[name] != theirs[name]]
        return [f"{name}: {mine[name]} against {theirs[name]}" for name in names]


_DIGITS = RunConfig(
    methods=COMPARED,
    engine="fast",
    data="digits",
    train_size=None,
    test_size=None,
    model="small-cnn",
    width=16,
    augment=False,
    loss="trades",
    epochs=3,
    batch_size=50,
    lr=0.03,
    sgd_momentum=0.9,
    weight_decay=0.0,
    decay_epochs=(2,),
    epsilon=0.2,
    step_size=0.04,
    steps=10,
    beta=6.0,
    boundary_steps=10,
    robust_steps=2,
    outlier_steps=0,
    gamma=0.8,
    fraction_momentum=0.9,
    metric="signed_variance",
    policy="three_groups",
    grad_align=0.0,
    non_finite="raise",
    eval_steps=20,
    eval_restarts=1,
    curve_size=250,
    seed=0,
)

# the scripts of TRADES, as the paper's Table 2 runs them
_CIFAR = dataclasses.replace(
    _DIGITS,
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

# The defaults for each data set. "digits" is chosen so that two CPU cores finish a comparison in minutes.
PRESETS = {
    "digits": _DIGITS,
    "mnist": dataclasses.replace(_DIGITS, data="mnist", width=32, epochs=10, decay_epochs=(8,), curve_size=500),
    "cifar10": _CIFAR,
    "cifar100": dataclasses.replace(_CIFAR, data="cifar100"),
}

_OF_ATTACKS = ("reference", "optimised", "bullet", "fast", "yopo")
_OF_AUGMIX = ("optimised", "bullet", "no-jsd")

# what configurations that were written before these options existed mean
_ADDED = {
    "metric": "signed_variance",
    "policy": "three_groups",
    "grad_align": 0.0,
    "non_finite": "raise",
    "engine": "exact",
}

_OPTIONAL = {"train_size", "test_size", "width"}


def _kinds(name: str, example: object) -> tuple[type, ...]:
    if name in _OPTIONAL:
        return (int, type(None))
    return (int, float) if isinstance(example, float) else (type(example),)


_KINDS = {name: _kinds(name, value) for name, value in dataclasses.asdict(_DIGITS).items()}
