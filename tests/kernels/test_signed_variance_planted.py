"""Plants bugs into the kernels' source; the checks must catch each of them."""

from unittest import mock

import pytest
import rows_cases
import torch

pytest.importorskip("triton")

import ptxrun
from compiled_kernel import compiled_kernels, planted

from bt_fast.kernels import signed_variance as kernels
from bt_fast.ops import rows
from bt_fast.ops.signed_variance import launch_signed_variance, signed_variance_reference

# name, text, and replacement of each planted bug
BUGS = [
    ("the last maximum", "tl.min(tl.where(b_z == b_max", "tl.max(tl.where(b_z != b_max"),
    ("a later block's maximum wins a tie", "b_z > b_lane_max", "b_z >= b_lane_max"),
    ("a mask that ends too late", "m_k = (o_k < K)[None, :]", "m_k = (o_k <= K)[None, :]"),
    ("a mask that ends too early", "m_k = (o_k < K)[None, :]", "m_k = (o_k < K - 1)[None, :]"),
    ("a row too many", "m_m = o_m < m", "m_m = o_m <= m"),
    ("the padding counts", "tl.where(m_k, b_p - 1.0 / K, 0.0)", "b_p - 1.0 / K"),
    ("a sum over other maxima", "b_sum * _exp(b_max.to(tl.float64) - b_base)", "b_sum"),
    ("the last block alone", "b_square += b_d * b_d", "b_square = b_d * b_d"),
    ("NaN is dropped", 'tl.where(b_z != b_z, float("inf"), b_z)', "b_z"),
    ("+Inf is sound", '& (b_max < float("inf"))', ""),
    ("nothing but -Inf is sound", 'b_fit = (b_max > float("-inf")) &', "b_fit ="),
    ("no -0", "b_variance * b_sign", "b_variance * b_sign + 0.0"),
    ("a label beyond is sound", "| (b_label >= K)", ""),
    ("a label in 32 bits", "(b_first == b_label)", "(b_first == b_label.to(tl.int32))"),
    ("float32", "b_p - 1.0 / K", "b_p.to(tl.float32) - 1.0 / K"),
    ("an exponential of few terms", "b_y * b_r + 1.0 / 6\n", "b_r * (1.0 / 24) + 1.0 / 6\n"),
    ("rows end to end", "(K if stride is None else stride)", "K"),
]
SMALL = {"LONGEST_BLOCK": 128, "LONG_BLOCK": 128, "LONG_WARPS": 4}  # makes 300 classes three blocks
CASES = [
    rows_cases.batch(70, 10, torch.float32, 0),
    rows_cases.batch(5, 100, torch.float16, 1, layout="apart"),
    rows_cases.batch(42, 300, torch.float32, 2, layout="apart"),
]


def caught(module):
    """Returns whether this module's kernels fault or give a wrong result in some case."""
    stand_ins = compiled_kernels(module, 80)
    with mock.patch.multiple(kernels, **stand_ins), mock.patch.multiple(rows, **SMALL), rows_cases.poisoned():
        for case in CASES:
            try:
                rows_cases.assert_same_mining(launch_signed_variance(*case), signed_variance_reference(*case))
            except (AssertionError, ptxrun.FaultError):
                return True
    return False


def test_the_kernel_as_it_is_passes():
    assert not caught(kernels)


@pytest.mark.parametrize(("text", "instead"), [pytest.param(*bug[1:], id=bug[0]) for bug in BUGS])
def test_a_planted_bug_is_caught(text, instead, tmp_path):
    assert caught(planted(kernels, text, instead, tmp_path / "planted.py"))
