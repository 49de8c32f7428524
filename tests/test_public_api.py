"""What users may rely on: names, signatures, documentation, and types that a type checker sees."""

import inspect
import re
from pathlib import Path

import pytest
import torch

import bt_fast
from bt_fast import power, speedup
from tests import public_api

pytestmark = pytest.mark.any_torch
ROOT = Path(__file__).parents[1]
MEANT = "If the change is meant: python -m tests.public_api --write, and say so to users in the commit."


def difference(result, expected):
    """Returns the lines that are gone and those that are new."""
    gone = [f"- {line}" for line in expected if line not in result]
    return "\n".join([*gone, *(f"+ {line}" for line in result if line not in expected)])


def test_the_public_api_is_the_one_that_was_published():
    result, expected = public_api.lines(), public_api.SNAPSHOT.read_text().splitlines()
    assert result == expected, f"The public API changed:\n{difference(result, expected)}\n{MEANT}"


def test_another_default_and_a_new_argument_are_changes(monkeypatch):
    def trades_cost(mean_steps: float, corrupted_fraction: float = 0.5, *, more: int = 0) -> float:
        return 0.0

    monkeypatch.setattr(speedup, "trades_cost", trades_cost)
    reported = difference(public_api.lines(), public_api.SNAPSHOT.read_text().splitlines())
    assert re.fullmatch(
        r"- bt_fast\.speedup\.trades_cost\(.*\n\+ .*fraction: float = 0\.5, \*, more: int = 0.*", reported
    )


def test_another_option_of_the_command_line_is_a_change(monkeypatch):
    monkeypatch.setattr(public_api.cli.commands["train"].params[0], "opts", ["--means"])
    reported = difference(public_api.lines(), public_api.SNAPSHOT.read_text().splitlines())
    assert "- bt-fast train --method" in reported
    assert "+ bt-fast train --means" in reported


@pytest.mark.parametrize("path", ["README.md", "docs/features.md", "docs/guide.md"])
def test_what_the_documents_import_is_public(path):
    public = {name for name, _ in public_api.public_objects()}
    text = (ROOT / path).read_text()
    imports = re.findall(r"from (bt_fast[\w.]*) import ([\w, ]+)", text)
    imported = {f"{module}.{name.strip()}" for module, names in imports for name in names.split(",")}
    used = set(re.findall(r"\b(bt_fast\.[A-Za-z_]\w*)\b(?=\()", text))
    assert imported
    assert not (imported | used) - public


# Documentation


# documented once for all of a kind: in `run_eager`, in `allocation.Judged`, and at the head of the module
OF_A_KIND = (
    ["model", "batch", "threat", "generator"],
    ["logits", "labels"],
    ["judged"],
)


def callables():
    """Yields `(name, callable, documentation)` of everything public that takes arguments."""
    for name, value in public_api.public_objects():
        if inspect.isclass(value):
            yield name, value, "\n".join(c.__doc__ or "" for c in value.__mro__ if c.__module__.startswith("bt_fast"))
            for member, of_class in public_api.members(value):
                function = getattr(of_class, "__func__", of_class)
                if inspect.isfunction(function) and not member.startswith("__"):
                    yield f"{name}.{member}", function, function.__doc__
        elif isinstance(value, torch._library.custom_ops.CustomOpDef):
            yield name, value._init_fn, value._init_fn.__doc__
        elif inspect.isroutine(value):
            yield name, value, value.__doc__


# these have the signature of their authors' code; and an op, with its kernel's tensors
MANY = ("trades_loss", "mart_loss", "pgd_loss", "yopo_loss", "ops.l2_step_")


@pytest.mark.parametrize(("name", "function", "text"), [pytest.param(*c, id=c[0]) for c in callables()])
def test_no_public_callable_takes_more_than_ten(name, function, text):
    taken = [p for p in inspect.signature(function).parameters if p not in ("self", "cls", "deprecated")]
    made_by_us = function in (bt_fast.MinedPlan, power.Sample, power.Summary)  # nobody calls these
    assert len(taken) <= 10 or name.endswith(MANY) or made_by_us


@pytest.mark.parametrize(("name", "function", "text"), [pytest.param(*c, id=c[0]) for c in callables()])
def test_every_public_callable_says_what_it_takes(name, function, text):
    assert text, f"{name} has no docstring"
    assert not text.startswith(f"{function.__name__}("), f"{name} has only the docstring that dataclasses make"
    taken = [p for p in inspect.signature(function).parameters if p not in ("self", "cls")]
    common = next((kind for kind in OF_A_KIND if taken[: len(kind)] == kind), [])
    untold = [p for p in taken[len(common) :] if not re.search(rf"\b{p}\b", text)]
    assert not untold, f"{name} does not say what {', '.join(untold)} is"
