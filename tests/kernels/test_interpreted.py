"""Runs the kernels in Triton's interpreter, each file in its own process, forked from one with the interpreter."""

import re
from pathlib import Path

import pytest
from forked_interpreter import ForkedInterpreter

pytest.importorskip("triton")
HERE = Path(__file__).parent / "interpreted"
KERNELS = Path(__file__).parents[2] / "kernels"
# for each op, the text that widens an offset to 64 bits, and a replacement that leaves it in 32
WIDENED = {
    "gather_start": ("tl.cast(i_n, tl.int64)", "i_n"),
    "recall": ("tl.cast(i_n, tl.int64)", "i_n"),
    "remember": ("tl.cast(i_n, tl.int64)", "i_n"),
    "ascent_direction": ("tl.cast(i_n, tl.int64)", "i_n"),
    "pgd_step": ("tl.cast(i_n, tl.int64)", "i_n"),
    "signed_variance": ("tl.cast(i_m, tl.int64)", "i_m"),
    "update_fraction": ("tl.cast(i_b, tl.int64)", "i_b"),
    "divergence": ("tl.cast(tl.program_id(0), tl.int64)", "tl.program_id(0)"),
}
# a script for several kernels must notice each of them
SEVERAL = [
    (op, name) for op in ["pgd_step"] for name in re.findall(r"def (\w+_kernel)", (KERNELS / f"{op}.py").read_text())
]


@pytest.fixture(scope="module")
def interpreted():
    """A function that runs a command and returns its exit code and what it printed."""
    with ForkedInterpreter() as run:
        yield run


OPS = sorted(file.stem for file in HERE.glob("*.py") if not file.stem.endswith("_int64") and file.stem != "conftest")


@pytest.mark.parametrize("op", OPS)
def test_an_op(op, interpreted):
    code, printed = interpreted("-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / f"{op}.py"))
    assert code == 0, printed


@pytest.mark.parametrize("op", WIDENED)
def test_offsets_beyond_2_to_the_31(op, interpreted):
    code, printed = interpreted(str(HERE / f"{op}_int64.py"), str(KERNELS / f"{op}.py"))
    assert code == 0, printed


@pytest.mark.parametrize(("op", "kernel"), [*((op, ()) for op in WIDENED if op not in dict(SEVERAL)), *SEVERAL])
def test_offsets_in_32_bits_are_caught(op, kernel, tmp_path, interpreted):
    source, (widened, planted) = (KERNELS / f"{op}.py").read_text(), WIDENED[op]
    assert widened in source
    (tmp_path / "planted.py").write_text(source.replace(widened, planted))
    script = str(HERE / f"{op}_int64.py"), str(tmp_path / "planted.py"), *([kernel] if kernel else [])
    code, printed = interpreted(*script)
    assert code != 0, printed
