"""Writes the public API as text, a line for each name: python -m tests.public_api [--write]

`tests/public_api.txt` holds the names that users may rely on; `test_public_api.py` compares it with the package. After
an intended change, `--write` rewrites the file: its diff shows what users must know.
"""

import argparse
import dataclasses
import importlib
import inspect
import re
import sys
import typing
from pathlib import Path

import click
import torch

from bt_fast.lab.cli import cli

SNAPSHOT = Path(__file__).with_suffix(".txt")
ADDRESS = re.compile(r" at 0x[0-9a-f]+")

# all of `__all__` if a module has one; the rest of a submodule is not for users
MODULES = {
    "bt_fast": None,
    "bt_fast.ops": None,
    "bt_fast.allocation": ("cross_entropy", "gradient_norm", "margin", "signed_variance", "three_groups", "uniform"),
    "bt_fast.augment": None,
    "bt_fast.augment.mix": ("Choices", "augment_and_mix", "draw_choices"),
    "bt_fast.autoattack": ("AutoAttacked", "autoattack", "for_autoattack"),
    "bt_fast.baselines.fast": ("fast_loss",),
    "bt_fast.baselines.grad_align": ("grad_align",),
    "bt_fast.baselines.yopo": ("yopo_loss",),
    "bt_fast.evaluation": ("STOOD", "Accuracy", "Evaluation", "evaluate"),
    "bt_fast.faults": ("Fault", "gradients_without_direction", "read"),
    "bt_fast.power": ("Sample", "Summary", "driver_version"),
    "bt_fast.ranges": ("ATTACK_STEP", "BACKWARD", "MINING", "PHASES", "UPDATE", "range_"),
    "bt_fast.speedup": (
        "augmix_cost",
        "mart_cost",
        "pgd_cost",
        "theoretical_speedup",
        "trades_cost",
        "trades_reference_cost",
        "yopo_cost",
    ),
}


def public_objects():
    """Yields `(name, object)` of everything in `MODULES`."""
    for module_name, listed in MODULES.items():
        module = importlib.import_module(module_name)
        for name in module.__all__ if listed is None else listed:
            yield f"{module_name}.{name}", getattr(module, name)


def lines():
    """Returns the whole public API, sorted."""
    result = {line for name, value in public_objects() for line in described(name, value)}
    result |= {f"torch.ops.{schema}" for schema in op_schemas()}
    return sorted(result | set(command_lines()))


def described(name, value):
    if inspect.isclass(value):
        yield from described_class(name, value)
    elif isinstance(value, torch._library.custom_ops.CustomOpDef):
        yield f"{name}{signature(value._init_fn)}"
    elif inspect.isroutine(value):
        yield f"{name}{signature(value)}"
    elif isinstance(value, dict):
        yield f"{name} has {', '.join(map(repr, value))}"
    else:
        yield f"{name} = {value!r}"


def described_class(name, cls):
    """Yields a class's constructor, its fields, and the members without an underscore of it and its bases here."""
    kind = "class"
    if dataclasses.is_dataclass(cls):
        options = cls.__dataclass_params__
        kind = f"{'frozen ' if options.frozen else ''}dataclass{'' if options.eq else ' compared by identity'}"
        for field in dataclasses.fields(cls):
            yield f"{name}.{field.name}: {type_name(field.type)}"
    elif issubclass(cls, tuple):
        kind = "named tuple"
        yield from (f"{name}.{field}: {type_name(kind)}" for field, kind in typing.get_type_hints(cls).items())
    bases = [base.__qualname__ for base in cls.__bases__ if base not in (object, tuple)]
    yield f"{name}: {kind}{''.join(f' of {base}' for base in bases)}"
    yield f"{name}{signature(cls, without=())}"
    for member, value in members(cls):
        if isinstance(value, property):
            yield f"{name}.{member}: {type_name(value.fget.__annotations__.get('return'))} (read only)"
        elif isinstance(value, classmethod | staticmethod):
            yield f"{name}.{member}{signature(value.__func__)}, {type(value).__name__}"
        elif inspect.isfunction(value):
            yield f"{name}.{member}{signature(value)}"


def members(cls):
    """Yields the members that classes of the package define, except `_names` other than calls and `with` blocks."""
    result = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("bt_fast"):
            result |= vars(base)
    for name, value in result.items():
        if not name.startswith("_") or name in ("__call__", "__enter__", "__exit__"):
            yield name, value


def signature(function, without=("self", "cls")):
    """Returns names, kinds, types and defaults as written; the same in all versions of Python."""
    given = inspect.signature(function)
    parts, keyword_only = [], False
    for name, parameter in given.parameters.items():
        if parts == [] and name in without:
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            parts.append("*")
        keyword_only |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        kind = "" if parameter.annotation is parameter.empty else f": {type_name(parameter.annotation)}"
        default = "" if parameter.default is parameter.empty else f" = {ADDRESS.sub('', repr(parameter.default))}"
        parts.append(f"{stars}{name}{kind}{default}")
    returned = "" if given.return_annotation is given.empty else f" -> {type_name(given.return_annotation)}"
    return f"({', '.join(parts)}){returned}"


def type_name(annotation):
    if isinstance(annotation, typing.ForwardRef):
        return annotation.__forward_arg__
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def op_schemas():
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("bt_fast::")]
    return [str(getattr(torch.ops.bt_fast, name.split("::")[1]).default._schema) for name in names]


def command_lines():
    for name, command in cli.commands.items():
        arguments = [p for p in command.params if isinstance(p, click.Argument)]
        yield " ".join([f"bt-fast {name}", *(f"{p.name.upper()}{'...' if p.nargs == -1 else ''}" for p in arguments)])
        yield from (f"bt-fast {name} {option_line(p)}" for p in command.params if isinstance(p, click.Option))


def option_line(option):
    parts = ["/".join([*option.opts, *option.secondary_opts])]
    if not option.is_flag:
        parts.append(kind_of(option.type))
        if option.multiple:
            parts.append("(repeatable)")
        if isinstance(option.default, str | int | float | Path):
            parts.append(f"(default {option.default})")
    return " ".join(parts)


def kind_of(kind):
    if isinstance(kind, click.Choice):
        return "|".join(kind.choices)
    if isinstance(kind, click.IntRange | click.FloatRange):
        low = "" if kind.min is None else f" {'>' if kind.min_open else '>='} {kind.min:g}"
        high = "" if kind.max is None else f" {'<' if kind.max_open else '<='} {kind.max:g}"
        return f"{kind.name.split()[0]}{low}{high}"
    return kind.name


def main(arguments=None):
    parser = argparse.ArgumentParser("python -m tests.public_api", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"renew {SNAPSHOT.name}")
    text = "".join(f"{line}\n" for line in lines())
    if parser.parse_args(arguments).write:
        SNAPSHOT.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    sys.exit(main())
