"""Sets torch to one thread: for the tests' small networks, a second one costs more than it saves."""

from pathlib import Path
from unittest import mock

import pytest
import torch

import bt_fast.deprecated

torch.set_num_threads(1)


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
