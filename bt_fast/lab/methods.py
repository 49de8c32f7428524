"""The methods of a run by name: `bullet`, `optimised-bf16`, `fast-2`, `bullet-exact,robust-steps=0`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

COMPARED = ("reference", "optimised-exact", "bullet-exact", "bullet-fast")
FORMS = "reference, optimised, bullet, fast, fast-N, yopo-M-N and no-jsd"
REMEMBERING = ("optimised", "bullet")  # the algorithms that may have a memory


def _on(text: str) -> bool:
    if text not in ("on", "off"):
        raise ValueError(text)
    return text == "on"


CHANGES: dict[str, Callable[[str], float | int | str]] = {  # options that a method may set for itself, and their types
    "step-size": float,
    "beta": float,
    "boundary-steps": int,
    "robust-steps": int,
    "outlier-steps": int,
    "gamma": float,
    "fraction-momentum": float,
    "metric": str,
    "policy": str,
    "grad-align": float,
    "memory": _on,
}
_FORM = re.compile(r"(reference|optimised|bullet|no-jsd|fast(?:-\d+)?|yopo-\d+-\d+)(?:-(exact|fast|bf16|frozen))?")


@dataclass(frozen=True)
class Method:
    """An algorithm, the engine that it runs on, and the run's options that it sets for itself.

    Algorithms are "reference" (the objective as its authors wrote it), "optimised" (ours, the same result), "bullet"
    (ours with BulletTrain), "fast" (N steps from a uniform start), "yopo" (YOPO-m-n) and "no-jsd" (AugMix without its
    divergence).
    """

    name: str  # as written
    algorithm: str
    engine: str = ""  # "exact", "fast" (in the first version "frozen") or "bf16"; "" for the run's
    numbers: tuple[int, ...] = ()  # (N,) of fast, (m, n) of yopo
    changes: Mapping[str, float | int | str] = field(default_factory=dict)  # by the names of `RunConfig`'s fields

    @classmethod
    def parse(cls, name: str) -> Method:
        """Returns the method of that name.

        Raises:
            ValueError: there is none; the message lists the methods.
        """
        form, *options = name.split(",")
        match = _FORM.fullmatch(form)
        if not match:
            raise ValueError(
                f"--method {name}: no such method; write one of {FORMS}, each also with -exact, -fast or -bf16 "
                f"behind it, and then NAME=VALUE after a comma for {', '.join(CHANGES)}"
            )
        form, engine = match.groups(default="")
        algorithm, *counts = [form] if form == "no-jsd" else form.split("-")
        numbers = tuple(map(int, counts)) or ((1,) if algorithm == "fast" else ())
        if 0 in numbers:
            raise ValueError(f"--method {name}: counts must be at least 1; write 1 or more")
        if engine and algorithm in ("reference", "yopo"):
            raise ValueError(f"--method {name}: {algorithm} runs as it was written, on no engine; leave -{engine} away")
        changes = dict(_change(name, option) for option in options)
        if len(changes) < len(options):
            raise ValueError(f"--method {name}: an option is given twice; give each once")
        return cls(name, algorithm, "fast" if engine == "frozen" else engine, numbers, changes)


def _change(name: str, option: str) -> tuple[str, float | int | str]:
    key, equals, text = option.partition("=")
    kind = CHANGES.get(key)
    if kind is None or not equals:
        raise ValueError(f"--method {name}: expected NAME=VALUE with a name of {', '.join(CHANGES)}, got {option!r}")
    try:
        return key.replace("-", "_"), kind(text)
    except ValueError as error:
        expected = {int: "an integer", float: "a number", _on: "on or off"}[kind]
        raise ValueError(f"--method {name}: {key} must be {expected}, got {text!r}; give one") from error
