"""The kernels under Triton's interpreter. It is chosen when triton is imported: each file has a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent / "interpreted"


def interpreted(*command):
    paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr


def test_pgd_step():
    interpreted("-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "pgd_step.py"))


def test_offsets_beyond_2_to_the_31():
    interpreted(str(HERE / "int64.py"))
