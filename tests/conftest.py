"""One thread: the networks of the tests are so small that handing work to a second costs more than it saves."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m cuda` only files with such tests are imported: the others need what a GPU's machine may lack."""
    if config.getoption("markexpr") == "cuda" and collection_path.suffix == ".py":
        return b"mark.cuda" not in collection_path.read_bytes() or None
    return None
