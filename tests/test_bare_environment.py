"""A GPU machine needs only the package's dependencies and pytest for `pytest -m cuda`."""

import subprocess
import sys
from pathlib import Path

import bare_environment

TESTS = Path(__file__).parent
MARK = ".".join(("pytest", "mark", "cuda"))  # this file itself has no such mark
EXTRAS = {"PIL", "accelerate", "click", "foolbox", "hypothesis", "matplotlib", "pytest_benchmark", "rich", "xdist"}


def test_the_tests_that_need_a_gpu_are_all_collected_in_a_bare_environment():
    collect = ["pytest", "-m", "cuda", "--collect-only", "-q", "tests"]
    run = subprocess.run(
        [sys.executable, bare_environment.__file__, *collect], cwd=TESTS.parent, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    result = {line.split("::")[0] for line in run.stdout.splitlines() if "::" in line}
    marked = {path for path in TESTS.rglob("test_*.py") if MARK in path.read_text()}
    assert result == {str(path.relative_to(TESTS.parent)) for path in marked}


def test_a_bare_environment_has_the_package_s_dependencies_and_no_extras():
    unwanted = bare_environment.unwanted()
    assert unwanted >= EXTRAS
    assert not unwanted & {"torch", "triton", "numpy", "pynvml", "pytest", "bt_fast"}
