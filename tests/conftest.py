"""One thread: the networks of the tests are so small that handing work to a second costs more than it saves."""

from pathlib import Path
from unittest import mock

import pytest
import torch

import bt_fast.deprecated

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def quiet_keywords():
    """Keywords of the first version warn in `test_deprecated.py` alone: elsewhere other warnings are counted."""

    def quietly(old, new):
        pass

    with mock.patch.object(bt_fast.deprecated, "warn_deprecated", quietly):
        yield


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m cuda` only files with such tests are imported: the others need what a GPU's machine may lack."""
    if config.getoption("markexpr") == "cuda" and collection_path.suffix == ".py":
        return b"mark.cuda" not in collection_path.read_bytes() or None
    return None
