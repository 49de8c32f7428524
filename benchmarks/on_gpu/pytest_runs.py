"""Running pytest with nothing but itself, and reading what it prints."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.on_gpu.stage import ROOT, Context

# the run-time dependencies and pytest are enough: no option of a plugin, and no cache in the tree
PYTEST = ("-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "--color=no", "-ra", "--tb=short", "-m", "cuda")
STAND_IN = ("-p", "benchmarks.on_gpu.pytest_stand_in")
OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
TEST = re.compile(r"(tests/\S+::.*?)(?= (?:PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b|$)")


def pytest_command(context: Context, arguments: Sequence[str]) -> list[str]:
    """Pytest on the tests that need a GPU."""
    return [sys.executable, "-u", *PYTEST, *(STAND_IN if context.rehearsal else ()), *arguments]


def has_xdist() -> bool:
    """Whether tests can run in parallel."""
    return importlib.util.find_spec("xdist") is not None


def marked_files() -> list[str]:
    """The test files that hold tests for a GPU, the kernels' own first. (What others import may be missing.)"""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if "mark.cuda" in path.read_text(encoding="utf-8")]


def kernels_own(path: str) -> bool:
    """Whether a test file is one of the kernels'."""
    return Path(path).parts[:2] == ("tests", "kernels")


def progress(line: str) -> tuple[str, str] | None:
    """The test and its outcome that a line of `-v` tells, with xdist or without; None for any other line."""
    test, outcome = TEST.search(line), OUTCOME.search(line)
    if test is None or outcome is None or line.startswith(outcome[1]):  # the summary's lines begin so
        return None
    return test[1].strip(), outcome[1].lower()


def explained(line: str) -> tuple[str, str] | None:
    """The test and the reason that a line of the summary tells of what failed; None for any other line."""
    result = re.match(r"(?:FAILED|ERROR) (tests/.+?)(?: - (.*))?$", line)
    return None if result is None else (result[1], result[2] or "")
