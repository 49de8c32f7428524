"""Every error message says how to fix the problem: what to write, give, name, leave out, ... instead."""

import ast
import importlib
import re
from pathlib import Path

import pytest

import bt_fast
from tests.ways_out import has_way_out

pytestmark = pytest.mark.any_torch
PACKAGE = Path(bt_fast.__file__).parent
MESSAGE_OF = {
    "ValueError": 0,
    "TypeError": 0,
    "RuntimeError": 0,
    "ImportError": 0,
    "SelectError": 0,
    "Fault": 1,
    "wrong": 1,
}
# of these functions another one ends the message, or only our own code can meet it
ENDED_ELSEWHERE = {
    *("faults.py pixels_outside", "faults.py __getitem__"),
    *("lab/checkpoint.py _check_archive", "lab/files.py parse_json"),
    *("objectives/training_outputs.py _look", "lab/training.py _resume", "lab/world.py broadcast_path"),
    *(f"lab/html_report/loading.py {name}" for name in ("_parts", "_record", "_number", "_object")),
    *(f"lab/html_report/loading.py {name}" for name in ("_allocation", "_severities")),
}


def text_of(node, constants):
    """Returns the text of an expression of strings: constants in full, `{...}` for other values."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part, constants) for part in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left, constants) + text_of(node.right, constants)
    expression = ast.unparse(node.value if isinstance(node, ast.FormattedValue) else node)
    if re.fullmatch(r"(\w+\.)?[A-Z_]+", expression):
        return str(eval(expression, constants))
    return f"{{{expression}}}"


def messages():
    """Yields (place, message) of every error for which the package writes the text."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        module = ".".join(("bt_fast", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        constants = vars(importlib.import_module(module))
        yield from _in(ast.parse(path.read_text(encoding="utf-8")), name, "", constants)


def _in(tree, name, function, constants):
    for node in ast.iter_child_nodes(tree):
        inner = node.name if isinstance(node, ast.FunctionDef) else function
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in MESSAGE_OF:
            message = "".join(text_of(part, constants) for part in node.args[MESSAGE_OF[node.func.id] :][:1])
            if node.func.id == "wrong":
                message = "found {}, expected {}".format(*(text_of(part, constants) for part in node.args[1:]))
            own_words = " " in re.sub(r"{[^}]*}", "", message).strip()  # else it passes a message on
            if own_words and f"{name} {function}" not in ENDED_ELSEWHERE:
                yield pytest.param(message, id=f"{name}:{node.lineno} {function}")
        yield from _in(node, name, inner, constants)


@pytest.mark.parametrize("message", list(messages()))
def test_a_message_ends_with_what_to_do(message):
    assert has_way_out(message)
