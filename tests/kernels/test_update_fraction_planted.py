"""Plants bugs into the kernels' source; the checks must catch each of them."""

from unittest import mock

import pytest
import rows_cases
import torch

pytest.importorskip("triton")

import ptxrun
from compiled_kernel import compiled_kernels, planted

from bt_fast.kernels import update_fraction as kernels
from bt_fast.ops import update_fraction as ops

# name, text, and replacement of each planted bug
BUGS = [
    ("float32", "/ tl.cast(m, tl.float64))", "/ tl.cast(m, tl.float64)).to(tl.float32)"),
    ("a fault moves F_R", "tl.where(faults > 0, before, after)", "after"),
    ("a fault is not counted", "count + (faults > 0).to(tl.int64)", "count"),
    ("a fault counts for each row", "(faults > 0).to(tl.int64)", "faults.to(tl.int64)"),
    ("a race", "    tl.debug_barrier()", "    #"),
    ("the last block of rows alone", "b_hits +=", "b_hits ="),
    ("faults of the last block of rows alone", "b_faults +=", "b_faults ="),
    ("a row too many", "m_m = o_m < m", "m_m = o_m <= m"),
    ("the padding is faulty", "(m_m & (b_fit == 0))", "(b_fit == 0)"),
    ("a block of rows left out", "range(i_p, blocks, programs)", "range(i_p, blocks - 1, programs)"),
    ("every program counts all", "range(i_p, blocks, programs)", "range(0, blocks)"),
    ("NaN is dropped", 'tl.where(b_z != b_z, float("inf"), b_z)', "b_z"),
    ("the last maximum", "b_z > b_lane_max", "b_z >= b_lane_max"),
    ("a label beyond is sound", "& (b_label < K)", ""),
    ("hits for faults", "tl.load(tallies + PROGRAMS + o_p)", "tl.load(tallies + o_p)"),
    ("rows end to end", "(K if stride is None else stride)", "K"),
]


def without_fault(m, k, seed, **options):
    return rows_cases.batch(m, k, torch.float32, seed, faults=False, strays=False, **options)


def with_faults(z, y, nan, beyond):
    z[nan, -1] = torch.nan
    y[beyond] = z.shape[1]
    return z, y


SMALL = {"ELEMENTS": 512, "WARPS": 4, "PROGRAMS": 2}  # makes 90 rows of 10 classes three blocks
CASES = [
    without_fault(90, 10, 0, layout="apart"),
    with_faults(*without_fault(90, 10, 0, layout="apart"), [3, 4], []),
    with_faults(*without_fault(90, 10, 0, layout="apart"), [], [5]),
    without_fault(9, 600, 1),
]


def caught(module):
    """Returns whether this module's kernels fault or give a wrong result in some case, in one launch and in two."""
    with mock.patch.multiple(kernels, **compiled_kernels(module, 80)), rows_cases.poisoned():
        for most in (ops.MOST_ROWS, 1):
            for case in CASES:
                result, expected = rows_cases.state(), rows_cases.state()
                try:
                    with mock.patch.multiple(ops, MOST_ROWS=most, **SMALL):
                        ops.launch_update_fraction(*result, *case, 0.8, 0.9)
                    ops.update_fraction_reference(*expected, *case, 0.8, 0.9)
                    assert result == expected
                except (AssertionError, ptxrun.FaultError):
                    return True
    return False


def test_the_kernel_as_it_is_passes():
    assert not caught(kernels)


@pytest.mark.parametrize(("text", "instead"), [pytest.param(*bug[1:], id=bug[0]) for bug in BUGS])
def test_a_planted_bug_is_caught(text, instead, tmp_path):
    assert caught(planted(kernels, text, instead, tmp_path / "planted.py"))
