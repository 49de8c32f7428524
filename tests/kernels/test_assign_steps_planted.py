"""Plants bugs into the kernels' source; the checks must catch each of them."""

import importlib
from unittest import mock

import assign_cases
import pytest
import torch

pytest.importorskip("triton")

import ptxrun
from compiled_kernel import compiled_kernels, planted

from bt_fast.kernels import assign_steps as kernels
from bt_fast.kernels import order_by_steps as order_kernels

op = importlib.import_module("bt_fast.ops.assign_steps")  # as an attribute this name is the function
order_op = importlib.import_module("bt_fast.ops.order_by_steps")

# name, text, and replacement of each planted bug
ASSIGN = [
    ("a rank too high", "k = below.to(tl.int32)", "k = below.to(tl.int32) + 1"),
    ("a strict comparison of ranks", "fewer <= k", "fewer < k"),
    ("the upper neighbour is the lower", "up_to_low > tl.minimum(k + 1, m - 1)", "up_to_low > k"),
    ("a threshold below 0", "(percentile <= 0) |", "(percentile != percentile) |"),
    ("keys of negative numbers in reverse", "b_key = b_bits ^ ((b_bits >> 31) & LAST)", "b_key = b_bits"),
    ("NaN by its sign", "(b_v == b_v) & m_v", "m_v"),
    ("groups by rounded numbers", ".to(tl.float64) >= least", " >= least.to(tl.float32)"),
    ("swapped α", "_real(size_boundary)", "_real(size_robust)"),
    ("not stable", "tl.cumsum(b_one, axis=0) - b_one", "tl.sum(b_one, axis=0) - tl.cumsum(b_one, axis=0)"),
    ("equal counts apart", "steps_robust == b_steps, b_robust", "steps_robust < 0, b_robust"),
    ("active one step longer", "steps_boundary > o_t", "steps_boundary >= o_t"),
    ("unfit rows are not looked at", "faulty = unfit", "faulty = unfit * 0"),
]
BLOCKS = [
    ("keys with another prefix count", "m_same = m_x & ", "m_same = m_x | "),
    ("others are not taken out", "tl.where(o_b == 0, others, 0)", "0"),
    ("the next key only in the last digit", "next_digit < BINS, low -", "next_digit >= 0, low -"),
    ("the lower neighbour for the upper", "among_equal + 1 < equal", "among_equal < equal"),
    ("samples of the blocks before are forgotten", "o_k < i_b, b_sizes", "o_k < 0, b_sizes"),
]
ORDER = [
    ("not stable", "* SPAN + o_i,", "* SPAN - o_i,"),
    ("one step too many", "(most - (o_i - m)) * SPAN", "(most + 1 - (o_i - m)) * SPAN"),
    ("what lies beyond m counts", "tl.where(m_j, b_key, 0x7FFFFFFF)", "tl.where(m_j, b_key, 0)"),
    ("itself before itself", "o_j[None, :] < o_i[:, None]", "o_j[None, :] <= o_i[:, None]"),
    ("not one cell further", "cells + 1 +", "cells +"),
]


def assign_cases_of(*sizes):
    """Returns a batch of each kind and size, which together take every branch."""
    for i, (m, kind) in enumerate((m, kind) for m in sizes for kind in assign_cases.VALUES):
        f_r, policy = assign_cases.FRACTIONS[i % 7], assign_cases.POLICIES[i % 8]
        yield assign_cases.case(m, i, kind=kind, f_r=f_r, policy=policy, sound=i % 2 > 0)
    # between neighbouring float32 values
    close = torch.tensor([0.1, 0.1]).view(torch.int32).add(torch.tensor([0, 1])).int().view(torch.float32)
    yield assign_cases.case(2, 0, f_r=0.75, sound=True) | {"svar": close, "correct": torch.ones(2, dtype=torch.bool)}
    yield assign_cases.case(9, 3, f_r=0.8, sound=True) | {"faults": torch.tensor([0, 1])}
    for half in (1, 2):
        unfit = torch.tensor([half, 0, half], dtype=torch.uint8)
        yield assign_cases.case(3, half, f_r=0.3, sound=True) | {"unfit": unfit}


def assign_is_wrong(module, launch, *sizes):
    """Returns whether this module's kernels fault or give a wrong result in some case."""
    small = mock.patch.object(op, "BLOCK", 256)
    with small, mock.patch.multiple(kernels, **compiled_kernels(module, 80)):
        for arguments in assign_cases_of(*sizes):
            expected = assign_cases.run(op.assign_reference, arguments)
            try:
                assign_cases.assert_same(assign_cases.run(launch, arguments), expected)
            except (AssertionError, ptxrun.FaultError):
                return True
    return False


def order_is_wrong(module):
    with mock.patch.multiple(order_kernels, **compiled_kernels(module, 80)):
        for launch in (order_op.launch_order, order_op.launch_order_in_blocks):
            steps = torch.randint(5, (300,), generator=torch.Generator().manual_seed(0))
            try:
                result = launch(steps, 6)
            except ptxrun.FaultError:
                return True
            if not all(map(torch.equal, result, order_op.order_reference(steps, 6))):
                return True
    return False


def test_the_kernels_as_they_are_pass():
    assert not assign_is_wrong(kernels, op.launch_assign, 7, 40, 0)
    assert not assign_is_wrong(kernels, op.launch_assign_in_blocks, 7, 300)
    assert not order_is_wrong(order_kernels)


def bugs(listed):
    return pytest.mark.parametrize(("text", "instead"), [pytest.param(*bug[1:], id=bug[0]) for bug in listed])


@bugs(ASSIGN)
def test_a_planted_bug_is_caught(text, instead, tmp_path):
    assert assign_is_wrong(planted(kernels, text, instead, tmp_path / "planted.py"), op.launch_assign, 7, 40, 0)


@bugs(BLOCKS)
def test_a_planted_bug_of_the_blocks_is_caught(text, instead, tmp_path):
    module = planted(kernels, text, instead, tmp_path / "planted.py")
    assert assign_is_wrong(module, op.launch_assign_in_blocks, 7, 300)


@bugs(ORDER)
def test_a_planted_bug_of_the_order_is_caught(text, instead, tmp_path):
    assert order_is_wrong(planted(order_kernels, text, instead, tmp_path / "planted.py"))
