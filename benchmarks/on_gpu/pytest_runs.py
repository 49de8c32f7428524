"""Runs pytest without plugins, and reads its output."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.on_gpu.stage import ROOT, Context

# needs only the run-time dependencies and pytest: no option of a plugin, and no cache in the tree
PYTEST = ("-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "--color=no", "-ra", "--tb=short", "-m", "cuda")
STAND_IN = ("-p", "benchmarks.on_gpu.pytest_stand_in")
OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
TEST = re.compile(r"(tests/\S+::.*?)(?= (?:PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b|$)")


def pytest_command(context: Context, arguments: Sequence[str]) -> list[str]:
    """Returns the command of pytest for the tests that need a GPU."""
    return [sys.executable, "-u", *PYTEST, *(STAND_IN if context.rehearsal else ()), *arguments]


def has_xdist() -> bool:
    """Returns whether tests can run in parallel."""
    return importlib.util.find_spec("xdist") is not None


def marked_files() -> list[str]:
    """Returns the test files with tests for a GPU, the kernels' own first; imports of other files may be missing."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if "mark.cuda" in path.read_text(encoding="utf-8")]


def kernels_own(path: str) -> bool:
    """Returns whether a test file is one of the kernels'."""
    return Path(path).parts[:2] == ("tests", "kernels")


def progress(line: str) -> tuple[str, str] | None:
    """Returns the test and outcome in a line of `-v`, with xdist or without; None for any other line."""
    test, outcome = TEST.search(line), OUTCOME.search(line)
    if test is None or outcome is None or line.startswith(outcome[1]):  # lines of the summary begin with the outcome
        return None
    return test[1].strip(), outcome[1].lower()


def explained(line: str) -> tuple[str, str] | None:
    """Returns the failed test and the reason in a line of the summary; None for any other line."""
    result = re.match(r"(?:FAILED|ERROR) (tests/.+?)(?: - (.*))?$", line)
    return None if result is None else (result[1], result[2] or "")
