"""Checks are worth something only if they see bugs: each of these, planted into a kernel's source, must be caught."""

from unittest import mock

import pgd_cases
import pytest
import torch

pytest.importorskip("triton")

import ptxrun
from compiled_kernel import compiled_kernels, planted

from bt_fast.kernels import pgd_step as kernels
from bt_fast.ops import pgd_step as ops

FULL = {"counts": True, "flags": True}
# what is planted: a name, the text, and its replacement
LINF = [
    ("a mask that ends too late", "m_x = o_x < length", "m_x = o_x <= length"),
    ("a mask that ends too early", "m_x = o_x < length", "m_x = o_x < length - 1"),
    ("no upper ε", "b_x + b_step, b_c - b_epsilon, b_c + b_epsilon", 'b_x + b_step, b_c - b_epsilon, float("inf")'),
    ("no bounds", "b_moved = _clip(b_moved, b_lower, b_upper)", "b_moved = b_moved"),
    ("swapped bounds", "_clip(b_moved, b_lower, b_upper)", "_clip(b_moved, b_upper, b_lower)"),
    ("bounds before ε", "b_c - b_epsilon, b_c + b_epsilon)", "b_lower, b_upper)"),
    ("another sample's α", "tl.load(step_size + i_n)", "tl.load(step_size + i_n * 0)"),
    ("descent", "tl.where(b_g > 0, b_alpha", "tl.where(b_g <= 0, b_alpha"),
    ("a zero gradient moves", "tl.where(b_g < 0, -b_alpha", "tl.where(b_g <= 0, -b_alpha"),
    ("one step too many", "> tl.load(step)", ">= tl.load(step)"),
    ("another channel's limits", "(i_r % channels)", "((i_r + 1) % channels)"),
    ("limits out of order", "2 * channels", "1 * channels"),
    ("channels not interleaved", "o_x % channels", "o_x // channels % channels"),
    ("NaN moves", "tl.where(b_nan, b_x, b_moved)", "b_moved"),
    ("NaN is not counted", "nan_seen > 0", "nan_seen > 1"),
    ("NaN of another sample", "tl.atomic_max(faulty + i_n", "tl.atomic_max(faulty + i_n * 0"),
    ("NaN is dropped", "tl.maximum(b_v, b_low, propagate_nan=tl.PropagateNan.ALL)", "tl.maximum(b_v, b_low)"),
    ("the wrong row", "i_r = i_x // blocks", "i_r = i_x % blocks"),
]
CASES = [
    pgd_cases.case(3, (3, 15, 37), torch.float32, 0, **FULL),
    pgd_cases.case(3, (3, 15, 37), torch.float32, 0, channel_limits=True, **FULL),
    pgd_cases.case(3, (3, 4, 5), torch.float32, 1, channel_limits=True, last=True, **FULL),
]


def caught(module):
    """Whether a case comes out wrong, or faults, with the kernels of this module."""
    with mock.patch.multiple(kernels, **compiled_kernels(module, 80)):
        for case in CASES:
            try:
                pgd_cases.assert_same(case.run(ops.launch_linf), case.run(ops.linf_reference))
            except (AssertionError, ptxrun.FaultError):
                return True
    return False


def test_the_kernel_as_it_is_passes():
    assert not caught(kernels)


@pytest.mark.parametrize(("text", "instead"), [pytest.param(*bug[1:], id=bug[0]) for bug in LINF])
def test_a_planted_bug_is_caught(text, instead, tmp_path):
    assert caught(planted(kernels, text, instead, tmp_path / "planted.py"))
