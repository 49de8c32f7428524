"""Plants bugs into the kernels' source; the checks must catch each of them."""

from unittest import mock

import pytest
import rows_cases
import torch

pytest.importorskip("triton")

import ptxrun
from compiled_kernel import compiled_kernels, planted

from bt_fast.kernels import ascent_direction as kernels
from bt_fast.kernels import signed_variance
from bt_fast.ops import rows
from bt_fast.ops.ascent_direction import ascent_direction_reference, launch_ascent_direction

# name, text, and replacement of each planted bug
BUGS = [
    ("descent", "b_p - tl.load(target, mask=m_x, other=0.0)", "tl.load(target, mask=m_x, other=0.0) - b_p"),
    ("a power too large", "127 - b_biased", "128 - b_biased"),
    ("infinite powers", "-126), 126)", "-126), 128)"),
    ("signed magnitudes", " & 0x7FFFFFFF", ""),
    ("NaN scales the rest", "tl.where(b_biased == 255, 0x7FC00000, b_power)", "b_power"),
    ("scaled whether asked or not", "if SCALED:", "if True:"),
    ("the padding counts", "tl.where(m_x, b_p - tl.load", "tl.where(b_p == b_p, b_p - 1 - tl.load"),
    ("the last block alone", "tl.maximum(b_largest, _magnitude", "tl.maximum(0, _magnitude"),
    ("a sum over other maxima", "b_sum * _exp(b_max.to(tl.float64) - b_base)", "b_sum"),
    (
        "not rounded to float32",
        "(b_e * b_reciprocal).to(tl.float32)",
        "(b_e * b_reciprocal * (1 + 1e-7)).to(tl.float32)",
    ),
    ("NaN is dropped", 'tl.where(b_z != b_z, float("inf"), b_z)', "b_z"),
    ("a mask that ends too late", "(o_k < K)[None, :]", "(o_k <= K)[None, :]"),
    ("the target's rows apart as the logits'", "target + o_x", "target + o_z"),
    ("rows end to end", "(K if stride is None else stride)", "K"),
]
SMALL = {"LONGEST_BLOCK": 128, "LONG_BLOCK": 128, "LONG_WARPS": 4}  # makes 300 classes three blocks
CASES = [
    rows_cases.batch(70, 10, torch.float32, 0)[0],
    rows_cases.batch(5, 100, torch.float16, 1, layout="apart")[0],
    rows_cases.batch(42, 300, torch.float32, 2, layout="apart")[0],
]


def caught(module):
    """Returns whether this module's kernels fault or give a wrong result in some case."""
    stand_ins = compiled_kernels(module, 80)
    with mock.patch.multiple(kernels, **stand_ins), mock.patch.multiple(rows, **SMALL), rows_cases.poisoned():
        for z in CASES:
            for scaled in (True, False):
                given = z, rows_cases.target_for(z, 0), scaled
                try:
                    result = launch_ascent_direction(*given)
                    rows_cases.assert_same_direction(result, ascent_direction_reference(*given))
                except (AssertionError, ptxrun.FaultError):
                    return True
    return False


def test_the_kernel_as_it_is_passes():
    assert not caught(kernels)


@pytest.mark.parametrize(("text", "instead"), [pytest.param(*bug[1:], id=bug[0]) for bug in BUGS])
def test_a_planted_bug_is_caught(text, instead, tmp_path):
    assert caught(planted(kernels, text, instead, tmp_path / "planted.py"))


@pytest.mark.parametrize("name", ["_exp", "_load", "_reciprocal"])
def test_the_softmax_is_that_of_the_target(name):
    assert getattr(kernels, name) is getattr(signed_variance, name)
