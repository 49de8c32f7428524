"""The minimum versions of the packages that this one needs, as in `pyproject.toml`, and the error for an older one.

Imported before anything else of the package, which then may rely on them.
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
    """[2, 6, 0] of "2.6.0a0+git1234"; empty for a version that begins with no number."""
    return [int(part) for part in re.match(r"[\d.]*", version)[0].split(".") if part]  # type: ignore[index]


def too_old(name: str, version: str) -> bool:
    """Whether a version of the package is below its floor; one without numbers is not."""
    return bool(numbers(version)) and numbers(version) < numbers(FLOORS[name])


def upgrade(name: str) -> str:
    """The command that installs a version which is new enough."""
    return f"python -m pip install --upgrade '{name}>={FLOORS[name]}'"


def require(name: str, version: str) -> None:
    """Raise ImportError where this version of the package is too old."""
    if too_old(name, version):
        raise ImportError(f"bt_fast needs {name} >= {FLOORS[name]}, but {version} is installed: {upgrade(name)}")


require("torch", torch.__version__)
require("numpy", numpy.__version__)
