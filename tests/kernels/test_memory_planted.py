"""Plants bugs into the kernels' source; the checks must catch each of them."""

from unittest import mock

import memory_cases as cases
import pytest
import torch

pytest.importorskip("triton")

import ptxrun
from compiled_kernel import compiled_kernels, planted

from bt_fast.kernels import recall, remember

# name, text, and replacement of each planted bug
RECALL = [
    ("a mask that ends too late", "m_x = o_x < CHANNELS * HEIGHT * WIDTH", "m_x = o_x <= CHANNELS * HEIGHT * WIDTH"),
    ("no order", "i_s = tl.load(order + i_n)", "i_s = tl.load(order + i_n) * 0 + i_n"),
    ("another sample's steps", "tl.load(steps + i_s)", "tl.load(steps + i_n)"),
    ("another sample's slot", "tl.load(slots + i_s)", "tl.load(slots + i_n)"),
    ("another sample's place", "tl.load(left + i_s)", "tl.load(left + i_s * 0)"),
    ("another sample's ε", "tl.load(epsilons + i_s)", "tl.load(epsilons + i_n)"),
    ("a slot below 0 is read", "slot >= 0", "slot >= -1"),
    ("127 as 128", "tl.div_rn(b_f, 127.0)", "tl.div_rn(b_f, 128.0)"),
    ("no fraction below -1", "_clip(b_f, -1.0, 1.0)", "b_f"),
    ("NaN is remembered", "b_f == b_f", "b_f > -1000.0"),
    ("mirrored after the crop's shift", "WIDTH - 1 - b_j", "WIDTH - b_j"),
    ("never mirrored", "tl.load(mirrored + i_s) != 0", "tl.load(mirrored + i_s) == 7"),
    ("padding is remembered", "(b_j < OWN_WIDTH)", "(b_j <= OWN_WIDTH)"),
    ("rows of the image's width", "(b_c * OWN_HEIGHT + b_i) * OWN_WIDTH", "(b_c * OWN_HEIGHT + b_i) * WIDTH"),
    ("not projected", "_clip(b_delta, -epsilon, epsilon)", "b_delta"),
    ("not shortened", "b_delta * shrink", "b_delta"),
    ("no noise", "b_delta += _noise(", "b_delta += 0.0 * _noise("),
    ("noise without numbers", "i_c = tl.load(samples + i_s)", "i_c = i_s"),
    ("moved without steps", "tl.load(steps + i_s) > 0", "tl.load(steps + i_s) >= 0"),
]
REMEMBER = [
    ("another sample's slot", "tl.load(slots + i_s)", "tl.load(slots + i_n)"),
    ("another sample's steps", "tl.load(steps + i_s)", "tl.load(steps + i_n)"),
    ("kept without steps", "tl.where(moves, b_written, True)", "b_written"),
    ("what is not shown is lost", "mask=m_q & b_written", "mask=m_q"),
    ("kept although it is old", "tl.load(keep + i_s) == 0", "tl.load(keep + i_s) == 7"),
    ("mirrored wrongly", "WIDTH - 1 - b_j", "WIDTH - b_j"),
    ("shifted the other way", "b_i -= tl.load(top", "b_i += tl.load(top"),
    ("not rounded", "b_f * 127.0 + NEAREST - NEAREST", "b_f * 127.0"),
    ("a fraction beyond 1", "_clip(b_f, -1.0, 1.0)", "b_f"),
    ("of x' alone", "b_x_adv - b_x", "b_x_adv"),
    ("not at an ε of 0", "tl.where(epsilon > 0, tl.where(b_f == b_f, b_f, 0.0), 0.0)", "b_f"),
    ("the image's rows in the frame's order", "(b_c * HEIGHT + b_i) * WIDTH", "(b_c * OWN_HEIGHT + b_i) * WIDTH"),
]
MIXED = {"placed": True, "numbered": True, "own": True}
BOTH = [(3, 8, 24), (3, 16, 12)]


def recalled(seed, stored=torch.float16, **options):
    case = cases.recall_case(7, BOTH, torch.float32, stored, seed, **options)
    return case.recall, cases.recall_op.launch_recall, cases.recall_op.recall_reference, cases.same_start, options


def remembered(seed, stored=torch.int8, **options):
    case = cases.remember_case(5, BOTH, torch.float32, stored, seed, **options)
    ops = cases.remember_op.launch_remember, cases.remember_op.remember_reference
    return case.remember, *ops, cases.same_memory, {}


CASES = {
    recall: [
        recalled(0, **MIXED),
        recalled(1, torch.int8, **MIXED),
        recalled(2, torch.float32, noise=0.05),
        recalled(3, l2=True, noise=0.05, **MIXED),
    ],
    remember: [remembered(0, placed=True, own=True), remembered(1, torch.float32), remembered(2, placed=True)],
}


def caught(kernels, module):
    """Returns whether this module's kernels fault or give a wrong result in some case."""
    with mock.patch.multiple(kernels, **compiled_kernels(module, 80)):
        for run, launch, reference, compare, options in CASES[kernels]:
            try:
                compare(run(launch), run(reference), *([True] if options.get("l2") else []))
            except (AssertionError, ptxrun.FaultError):
                return True
    return False


@pytest.mark.parametrize("kernels", CASES)
def test_the_kernels_as_they_are_pass(kernels):
    assert not caught(kernels, kernels)


@pytest.mark.parametrize(("text", "instead"), [pytest.param(*bug[1:], id=bug[0]) for bug in RECALL])
def test_a_planted_bug_in_recall_is_caught(text, instead, tmp_path):
    assert caught(recall, planted(recall, text, instead, tmp_path / "planted.py"))


@pytest.mark.parametrize(("text", "instead"), [pytest.param(*bug[1:], id=bug[0]) for bug in REMEMBER])
def test_a_planted_bug_in_remember_is_caught(text, instead, tmp_path):
    assert caught(remember, planted(remember, text, instead, tmp_path / "planted.py"))
