"""Every message of an error says how to get out of it: what to write, give, name, leave out, ... instead."""

import ast
from pathlib import Path

import pytest

import bt_fast
from tests.ways_out import has_way_out

PACKAGE = Path(bt_fast.__file__).parent
MESSAGE_OF = {"ValueError": 0, "TypeError": 0, "RuntimeError": 0, "ImportError": 0, "Fault": 1}
ENDED_ELSEWHERE = {
    "faults.py": "a fault's detail or its error ends it",
    "lab/checkpoint.py": "`read_tensors` ends what it says of an archive",
    "lab/files.py": "the reader says what it expected",
    "lab/html_report/loading.py": "`load_runs` ends what it says of a line or a summary",
    "lab/profile.py": "of a trace that is our own",
    "lab/training.py": "`_restore` ends it",
    "lab/world.py": "of a caller that is our own",
}


def text_of(node):
    """What an expression of strings says, with `{...}` for what is put into it."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return "{" + ast.unparse(node.value if isinstance(node, ast.FormattedValue) else node) + "}"


def messages():
    """(place, message) of every error that the package makes with words of its own."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name in ENDED_ELSEWHERE:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in MESSAGE_OF:
                message = "".join(text_of(part) for part in node.args[MESSAGE_OF[node.func.id] :][:1])
                if " " in message.split("{")[0]:  # else it passes one on
                    yield pytest.param(message, id=f"{name}:{node.lineno}")


@pytest.mark.parametrize("message", list(messages()))
def test_a_message_ends_with_what_to_do(message):
    assert has_way_out(message)
