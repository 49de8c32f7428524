"""The kernels under Triton's interpreter. It is chosen when triton is imported: each file has a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent / "interpreted"
KERNELS = Path(__file__).parents[2] / "kernels" / "pgd_step.py"


def interpreted(*command, fails=False):
    paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    assert (result.returncode != 0) == fails, result.stdout + result.stderr


def test_pgd_step():
    interpreted("-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "pgd_step.py"))


def test_offsets_beyond_2_to_the_31():
    interpreted(str(HERE / "int64.py"), str(KERNELS))


def test_offsets_in_int32_are_caught(tmp_path):
    source, planted = KERNELS.read_text(), "tl.cast(i_r, tl.int64)"
    assert planted in source
    (tmp_path / "planted.py").write_text(source.replace(planted, "i_r"))
    interpreted(str(HERE / "int64.py"), str(tmp_path / "planted.py"), fails=True)
