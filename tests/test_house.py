"""The code stays small and plain: short files and functions, and names that say what a thing is."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

pytestmark = pytest.mark.any_torch
ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "bt_fast").rglob("*.py"))
MOST_LINES = {"file": 450, "function": 60}
RIDDLES = {"told", "found", "whose", "met", "said"}  # past participles as names: the reader must guess of what


def functions(path):
    """Yields the name and number of lines, including decorators and documentation, of each function in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield node.name, node.end_lineno - first + 1


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_and_no_function_is_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES["file"]
    assert not [(name, lines) for name, lines in functions(path) if lines > MOST_LINES["function"]]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_name_is_a_riddle(path):
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    names = {token.string for token in tokens if token.type == tokenize.NAME}
    assert not {name for name in names if RIDDLES & set(name.lower().split("_"))} - ALLOWED


ALLOWED = {"found_inf"}  # GradScaler's own name
