"""The minimum versions of required packages, as in `pyproject.toml`, and the error for older ones.

Imported first, so that the rest of the package may rely on them.
"""

from __future__ import annotations

import re

import numpy
import torch

FLOORS = {
    "torch": "2.6",
    "triton": "3.2",
    "numpy": "1.24",
    "nvidia-ml-py": "12",
    "click": "8.1",
    "rich": "13",
    "matplotlib": "3.8",
    "jinja2": "3.1",
}


def numbers(version: str) -> list[int]:
    """Returns [2, 6, 0] for "2.6.0a0+git1234", and an empty list for a version that does not begin with a number."""
    return [int(part) for part in re.match(r"[\d.]*", version)[0].split(".") if part]  # type: ignore[index]


def too_old(name: str, version: str) -> bool:
    """Whether a version of the package is below its minimum; a version without numbers is not."""
    return bool(numbers(version)) and numbers(version) < numbers(FLOORS[name])


def upgrade(name: str) -> str:
    """Returns the command that installs a new enough version."""
    return f"python -m pip install --upgrade '{name}>={FLOORS[name]}'"


def require(name: str, version: str) -> None:
    """Raises ImportError if this version of the package is too old."""
    if too_old(name, version):
        raise ImportError(f"bt_fast needs {name} >= {FLOORS[name]}, but {version} is installed: {upgrade(name)}")


require("torch", torch.__version__)
require("numpy", numpy.__version__)
