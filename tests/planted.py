"""Plants bugs by replacing text in a module's source, and lists the calls that a list of bugs leaves out."""

import ast
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

# calls that order work, copy data or separate memory: without each of them a test must fail
ORDERING = {
    *("wait_stream", "synchronize", "on", "new_stream", "new_pool", "capture", "replay"),
    *("copy_", "_foreach_copy_", "clone", "zero_", "add_", "maximum", "restore"),
    *("finish", "_join", "_join_all", "join", "wait"),
}


@dataclass(frozen=True)
class Bug:
    """A replacement of every `text` in the source by `instead`; `scenario` shows the bug."""

    name: str
    text: str
    instead: str = "pass"
    scenario: object = None

    def __str__(self):
        return self.name


def planted(original, bug, folder):
    """Returns the module `original` with the bug, under another name."""
    source, path = Path(original.__file__).read_text(), folder / "planted.py"
    assert bug.text in source, f"{bug.text!r} is not in {original.__name__}"
    path.write_text(source.replace(bug.text, bug.instead))
    spec = importlib.util.spec_from_file_location("planted_module", path)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {"planted_module": module}):  # dataclasses look up their module
        spec.loader.exec_module(module)
    return module


def left_out(original, bugs):
    """Returns the module's ordering calls that no bug's text touches."""
    source = Path(original.__file__).read_text()
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    touched = [span for bug in bugs for span in spans(source.encode(), bug.text.encode())]
    result = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and name_of(node.func) in ORDERING and not of_words(node.func):
            start = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            if not any(a < end and start < b for a, b in touched):
                result.append(ast.get_source_segment(source, node))
    return result


def of_words(function):
    """Returns whether it is a string's method."""
    return isinstance(getattr(function, "value", None), ast.Constant)


def name_of(function):
    return getattr(function, "attr", getattr(function, "id", None))


def spans(source, text):
    at = source.find(text)
    while at >= 0:
        yield at, at + len(text)
        at = source.find(text, at + 1)
