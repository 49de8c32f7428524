"""Sets torch to one thread: for the tests' small networks, a second one costs more than it saves."""

import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from each_value_once import each_value_once

import bt_fast.deprecated

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start


@pytest.fixture(scope="session", autouse=True)
def quiet_keywords():
    """Ignores the warnings about old keywords outside `test_deprecated.py`, where other warnings are counted."""

    def quietly(old, new):
        pass

    with mock.patch.object(bt_fast.deprecated, "warn_deprecated", quietly):
        yield


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m cuda`, skips importing files without such tests: they may need what a GPU machine lacks."""
    if config.getoption("markexpr") == "cuda" and collection_path.suffix == ".py":
        return b"mark.cuda" not in collection_path.read_bytes() or None
    return None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--each-value-once",
        action="store_true",
        help="of the cases of each test run few, which together have every value of every parameter: for a further "
        "torch, beside a whole run on another",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `--each-value-once`, leaves out the cases whose values are all in others that run."""
    if config.getoption("each_value_once"):
        kept = each_value_once(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]
