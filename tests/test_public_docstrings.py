"""The docstring of each public name says what it is, what it takes, what it raises and what it returns."""

import ast
import inspect
import re
import textwrap

import pytest

import bt_fast
from tests import public_api

pytestmark = pytest.mark.any_torch
NAMES = [name for name in bt_fast.__all__ if callable(getattr(bt_fast, name))]
CHECKS = re.compile(r"_?check(ed)?(_\w+)?|positive|real|size|size_of_step|step_count|weight")
MADE_BY_US = {"Judged", "MinedPlan", "NonFiniteError", "Plan", "Rows", "Skipped", "UpdateBatch"}  # need no errors


def own_docs(value):
    """The docstrings of a callable, of a class with those of its bases here."""
    if not inspect.isclass(value):
        return inspect.getdoc(value) or ""
    return "\n\n".join(inspect.cleandoc(c.__doc__ or "") for c in value.__mro__ if c.__module__.startswith("bt_fast"))


def entries(text):
    """The names in the sections Args and Attributes: `a: ...`, `a, b: ...`, or several in a line, `a: ... b: ...`."""
    sections = re.findall(r"^(?:Args|Attributes):\n((?:    .*\n|\n)+)", text + "\n", re.M)
    lists = re.findall(r"(?:^ {4}|[.;,] )((?:\w+,\s+)*\w+):", "\n".join(sections), re.M)
    return {name for names in lists for name in re.split(r",\s+", names)}


def parameters(value):
    """The names that a call takes."""
    return [name for name in inspect.signature(value).parameters if name not in ("self", "cls")]


def bodies(value):
    """The functions that check a call's arguments."""
    if not inspect.isclass(value):
        return [value]
    return [vars(value)[name] for name in ("__init__", "__post_init__") if name in vars(value)]


def raises(function):
    """Whether it has a `raise`, or calls a check of arguments, itself."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except OSError:  # made by dataclasses
        return False
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    names = (f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in calls)
    anew = any(isinstance(node, ast.Raise) and node.exc is not None for node in ast.walk(tree))
    return anew or any(map(CHECKS.fullmatch, names))


@pytest.mark.parametrize("name", NAMES)
def test_the_first_line_is_a_sentence_about_it_alone(name):
    first, *rest = inspect.getdoc(getattr(bt_fast, name)).splitlines()
    assert re.search(r"[.:)`]$", first)
    assert not rest or rest[0] == ""


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_an_entry(name):
    value = getattr(bt_fast, name)
    assert not set(parameters(value)) - entries(own_docs(value))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in MADE_BY_US])
def test_what_raises_names_its_errors(name):
    value = getattr(bt_fast, name)
    if any(map(raises, bodies(value))):
        assert re.search(r"^Raises:\n    \w+", own_docs(value), re.M)


def methods():
    """Yields `(Class.method, function)` of the public classes' own methods and properties."""
    for name in NAMES:
        value = getattr(bt_fast, name)
        for member, of_class in public_api.members(value) if inspect.isclass(value) else ():
            function = getattr(of_class, "fget", None) or getattr(of_class, "__func__", of_class)
            if inspect.isfunction(function) and not member.startswith("__"):
                yield pytest.param(function, id=f"{name}.{member}")


@pytest.mark.parametrize("method", list(methods()))
def test_a_method_says_what_it_does_and_names_its_errors(method):
    text = inspect.getdoc(method)
    assert re.search(r"^\W*[A-Z1-9].*[.:)`]$", text.splitlines()[0])
    assert not raises(method) or re.search(r"Error|errors?\b|Raises", text)


@pytest.mark.parametrize("name", [name for name in NAMES if inspect.isfunction(getattr(bt_fast, name))])
def test_a_function_says_what_it_returns(name):
    text = own_docs(getattr(bt_fast, name))
    assert re.search(
        r"^Returns:\n    \S|^Returns |^Eq\. 7|the AugMix form of Eq\. 7|with its result", text, re.M | re.I
    )


def test_a_missing_entry_error_or_sentence_is_noticed():
    def undocumented(x, y):
        """Adds.

        Args:
            x: a number. It says, among others: nothing about the other.
        """
        if x is y:
            raise ValueError
        return x + y

    assert parameters(undocumented) == ["x", "y"]
    assert "y" not in entries(own_docs(undocumented))
    assert raises(undocumented)
    assert "Raises" not in own_docs(undocumented)
