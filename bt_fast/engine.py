"""Engines: how an attack and an update are executed, in which precision and with which optimisations."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

PRESETS_LINE = "write engine='exact', 'fast' or 'bf16', or an Engine of your own"


@dataclass(frozen=True)
class Engine:
    """The way attack and update are executed. `Engine()` is the authors' way: in eager mode, on the model itself.

    Names: "exact", "fast" (the same result up to rounding) and "bf16" ("fast" in 16 bits).

    Attributes:
        precision: "bf16" runs the forwards and backwards of attack and update under `torch.autocast` with bfloat16,
            with weights, losses and gradients in their own precision; None changes nothing.
        precision_of: what `precision` is of: "both", or "attack" (with mining's look at the clean images) or "update"
            alone.
        fold: the attack uses a folded view of the model, in which each batch norm is part of the layer before it.
        channels_last: 4-d images, and the view's weights, have the channel as the fastest index.
        graphs: attack steps, and the update with its backward, are replayed from CUDA graphs; on CUDA only.
        streams: with graphs, groups of samples are attacked concurrently on CUDA streams, if that is measured to be
            faster on the first minibatch; on CUDA only.
        compile: `torch.compile` of the attack's view (takes tens of seconds once).

    Raises:
        TypeError: an option is not a bool.
        ValueError: the precision is another one, or streams are on without graphs.
    """

    precision: str | None = None
    fold: bool = False
    channels_last: bool = False
    graphs: bool = False
    streams: bool = False
    compile: bool = False
    precision_of: str = "both"

    def __post_init__(self) -> None:
        if self.precision not in (None, "bf16"):
            raise ValueError(f"precision must be 'bf16' or None, got {self.precision!r}: write precision='bf16'")
        if self.precision_of not in PARTS:
            raise ValueError(
                f"precision_of must be one of {', '.join(map(repr, PARTS))}, got {self.precision_of!r}: "
                "write precision_of='update'"
            )
        if self.precision_of != "both" and self.precision is None:
            raise ValueError(
                f"precision_of={self.precision_of!r} needs a precision, got None: "
                f"write Engine(precision='bf16', precision_of={self.precision_of!r})"
            )
        for name in SWITCHES:
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {value!r}: write Engine({name}=True)")
        if self.streams and not self.graphs:
            raise ValueError(
                "streams need graphs, of which their chains are made: write Engine(graphs=True, streams=True)"
            )

    @classmethod
    def of(cls, engine: Engine | str) -> Engine:
        """Returns the engine of this name, or the engine itself; TypeError or ValueError for anything else."""
        if isinstance(engine, Engine):
            return engine
        if not isinstance(engine, str):
            raise TypeError(f"engine must be a name or an Engine, got {type(engine).__name__}: {PRESETS_LINE}")
        if engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}: {PRESETS_LINE}")
        return ENGINES[engine]

    @classmethod
    def parse(cls, text: str) -> Engine:
        """Returns an engine from text: a name, then options, as in `fast,graphs=off` or `bf16,precision_of=update`.

        ValueError if one is unknown.
        """
        name, *options = text.split(",")
        engine, changes = cls.of(name), dict[str, Any]()
        for option in options:
            switch, _, value = option.partition("=")
            if switch == "precision_of":
                changes[switch] = value
                continue
            if switch not in SWITCHES or value not in ("on", "off"):
                raise ValueError(
                    f"engine {text!r}: expected NAME=on or NAME=off, NAME one of {', '.join(SWITCHES)}; got {option!r}"
                )
            changes[switch] = value == "on"
            if option == "graphs=off":
                changes.setdefault("streams", False)  # streams need graphs
        return replace(engine, **changes)

    @property
    def attack_precision(self) -> str | None:
        """That of the attack, and of mining's look at the clean images."""
        return None if self.precision_of == "update" else self.precision

    @property
    def update_precision(self) -> str | None:
        """That of the update's forwards and backward."""
        return None if self.precision_of == "attack" else self.precision

    @property
    def name(self) -> str:
        """The preset's name, or the options as they would be written."""
        return next((name for name, preset in ENGINES.items() if preset == self), repr(self))

    def __repr__(self) -> str:
        """Returns the options that differ from the default."""
        options = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"Engine({', '.join(options)})"


PARTS = ("both", "attack", "update")
SWITCHES = ("fold", "channels_last", "graphs", "streams", "compile")
_FAST = Engine(fold=True, channels_last=True, graphs=True, streams=True)
ENGINES = {"exact": Engine(), "fast": _FAST, "bf16": replace(_FAST, precision="bf16")}
