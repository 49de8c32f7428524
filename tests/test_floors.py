"""A version that is too old gives an error of one line with the installed version, the required one and the command."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bt_fast.floors import FLOORS, numbers, require, too_old

PROJECT = (Path(__file__).parents[1] / "pyproject.toml").read_text()


def test_the_floors_are_those_of_the_project():
    declared = dict(re.findall(r'"([a-z0-9-]+)>=([\d.]+)[;"]', PROJECT))
    assert {name: declared[name] for name in FLOORS} == FLOORS
    (block,) = re.findall(r"^dependencies = \[(.*?)^\]", PROJECT, re.DOTALL | re.MULTILINE)
    (lab,) = re.findall(r"^lab = \[(.*?)\]", PROJECT, re.MULTILINE)
    assert set(re.findall(r'"([a-z0-9-]+)>=', block + lab)) == set(FLOORS)


@pytest.mark.parametrize(
    ("version", "old"),
    [
        ("2.5.1+cu121", True),
        ("1.13", True),
        ("2.6.0a0+df5bbc09d1.nv24.12", False),
        ("2.6", False),
        ("2.10.0", False),
        ("3", False),
        ("main", False),
    ],
)
def test_versions_are_compared_as_numbers(version, old):
    assert too_old("torch", version) == old


def test_the_numbers_of_a_version_end_where_its_words_begin():
    assert numbers("3.6.0+git1234") == [3, 6, 0]
    assert numbers("main") == []


def test_a_version_that_is_new_enough_is_accepted():
    require("numpy", "1.24.0")


OLD = """
import {name}
{name}.__version__ = "{version}"
import torch
del torch.library.custom_op, torch.OutOfMemoryError
import bt_fast
"""


@pytest.mark.parametrize(("name", "version", "needed"), [("torch", "2.5.1+cu121", "2.6"), ("numpy", "1.23.5", "1.24")])
def test_import_beside_a_package_that_is_too_old_is_an_error_of_one_line(name, version, needed):
    """The error comes before the package uses anything that an old torch lacks."""
    code = OLD.format(name=name, version=version)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    line = f"bt_fast needs {name} >= {needed}, but {version} is installed"
    command = f"python -m pip install --upgrade '{name}>={needed}'"
    assert result.stderr.splitlines()[-1] == f"ImportError: {line}: {command}"
