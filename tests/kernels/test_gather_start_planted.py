"""Plants bugs into the kernel's source; the checks must catch each of them."""

from unittest import mock

import gather_start_cases as cases
import pytest
import torch

pytest.importorskip("triton")

import ptxrun
from compiled_kernel import compiled_kernels, planted

from bt_fast.kernels import gather_start as kernels

# name, text, and replacement of each planted bug
BUGS = [
    ("a mask that ends too late", "m_x = o_x < length", "m_x = o_x <= length"),
    ("a mask that ends too early", "m_x = o_x < length", "m_x = o_x < length - 1"),
    ("no order", "i_s = tl.load(order + i_n)", "i_s = tl.load(order + i_n) * 0 + i_n"),
    ("another sample's steps", "tl.load(steps + i_s)", "tl.load(steps + i_n)"),
    ("noise without steps", "tl.load(steps + i_s) > 0", "tl.load(steps + i_s) >= 0"),
    ("noise of the sorted row", "i_c = i_s", "i_c = tl.cast(i_n, tl.int64)"),
    ("another sample's number", "tl.load(samples + i_s)", "tl.load(samples + i_n)"),
    ("no numbers", "tl.load(samples + i_s)", "tl.load(samples + i_s) * 0 + i_s"),
    ("noise repeated in each block", "o_g = i_b * (BLOCK // 4) +", "o_g ="),
    ("the seed as offset", "tl.load(state + 1)", "tl.load(state)"),
    ("half of the seed", "tl.load(state), o_g", "tl.load(state) & 0xFFFFFFFF, o_g"),
    ("half of the offset", "(offset >> 32).to(tl.int32)", "offset.to(tl.int32)"),
    ("outputs out of order", "tl.join(b_0, b_2), tl.join(b_1, b_3)", "tl.join(b_0, b_1), tl.join(b_2, b_3)"),
    ("half of the circle", "tl.int32, bitcast=True) & -0x80000000)", "tl.int32, bitcast=True) & 0)"),
    ("the sign's bit in the angle", "_signed(b_v << 1)", "_signed(b_v)"),
    ("noise of its own scale", "b_noise * scale", "b_noise"),
    ("swapped bounds", "scale, lower, upper)", "scale, upper, lower)"),
    ("NaN is dropped", "tl.maximum(b_v, b_low, propagate_nan=tl.PropagateNan.ALL)", "tl.maximum(b_v, b_low)"),
    ("noise in the clean batch", "tl.store(clean + row + o_x, b_x", "tl.store(clean + row + o_x, b_x + 1.0"),
]
CASES = [
    cases.case(4, (2, 15, 37), torch.float32, 0, bounded=True),
    cases.case(4, (7,), torch.float32, 1, noise="uniform"),
    cases.case(4, (7,), torch.float32, 1, numbered=True),
]


def caught(module):
    """Returns whether this module's kernel faults or gives a wrong result in some case."""
    with mock.patch.multiple(kernels, **compiled_kernels(module, 80)):
        for case in CASES:
            try:
                cases.assert_same(
                    case.run(cases.op.launch_gather_start),
                    case.run(cases.op.gather_start_reference),
                )
            except (AssertionError, ptxrun.FaultError):
                return True
    return False


def test_the_kernel_as_it_is_passes():
    assert not caught(kernels)


@pytest.mark.parametrize(("text", "instead"), [pytest.param(*bug[1:], id=bug[0]) for bug in BUGS])
def test_a_planted_bug_is_caught(text, instead, tmp_path):
    assert caught(planted(kernels, text, instead, tmp_path / "planted.py"))
