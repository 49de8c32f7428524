"""Plants bugs into the kernels' source; the checks must catch each of them."""

from unittest import mock

import divergence_cases
import pytest
import torch

pytest.importorskip("triton")

import ptxrun
from compiled_kernel import compiled_kernels, planted

from bt_fast.kernels import divergence as kernels

# name, loss that shows it, text, and replacement of each planted bug
BUGS = [
    ("a mask that ends too late", "trades_kl", "m_n & (o_k < classes)", "m_n & (o_k <= classes)"),
    ("a mask that ends too early", "trades_kl", "m_n & (o_k < classes)", "m_n & (o_k < classes - 1)"),
    ("rows beyond the last", "trades_kl", "o_n < n", "o_n <= n"),
    ("a masked class has a logit", "trades_kl", 'other=-float("inf")', "other=0.0"),
    ("the largest logit is not subtracted", "trades_kl", "b_x - tl.max(b_x, axis=1, keep_dims=True)", "b_x"),
    ("0 log 0", "trades_kl", "tl.where(b_p > 0, b_log_p - b_log_q, 0.0)", "(b_log_p - b_log_q)"),
    ("the other's stride", "trades_kl", "clean + o_n * clean_stride", "clean + o_n * adversarial_stride"),
    ("the target's gradient is left out", "trades_kl", "b_terms - b_p * b_kl", "b_terms * 0"),
    ("the gradient is not centred", "trades_kl", "b_terms - b_p * b_kl", "b_terms"),
    ("the label is a wrong class", "mart_loss", 'tl.where(m_label, -float("inf"), b_z)', "b_z"),
    ("the last of equals", "mart_loss", "tl.min(tl.where(m_largest, b_ids, NO_CLASS)", "tl.max(tl.where(m_largest, b_ids, 0)"),  # noqa: E501
    ("the margin by difference", "mart_loss", "1.00000001e-4 + b_runner_rest", "1.0001 - (1.0 - b_runner_rest)"),
    ("no constant in the logarithm", "mart_loss", "tl.log(b_q + 1e-12)", "tl.log(b_q)"),
    ("no constant in its derivative", "mart_loss", "b_p * (b_q / (b_q + 1e-12))", "b_p"),
    ("the weight is a constant", "mart_loss", "- b_kl * b_of_weight", "- 0.0 * b_of_weight"),
    ("the margin pulls", "mart_loss", "b_cross_entropy + b_away", "b_cross_entropy - b_away"),
    ("a label that is no class", "mart_loss", "(b_label >= 0) & (b_label < classes)", "b_label >= 0"),
    ("no clamp", "js_divergence", "tl.maximum(b_mean, 1e-7,", "tl.maximum(b_mean, 1e-30,"),
    ("the clamp passes gradient", "js_divergence", "b_mean < 1e-7, 1.0, 0.0", "b_mean < 1e-7, 0.0, 0.0"),
    ("the sum instead of the mean", "js_divergence", "(b_p1 + b_p2 + b_p3) / 3.0", "(b_p1 + b_p2 + b_p3)"),
    ("NaN of one view stays there", "js_divergence", "1e-7, propagate_nan=tl.PropagateNan.ALL", "1e-7"),
]  # fmt: skip
LOOPED = [
    ("the sum is not rescaled", "trades_kl", "b_sum * tl.exp(b_max - b_shift)", "b_sum"),
    ("the lanes are not rescaled", "trades_kl", "_sum(b_sum * tl.exp(b_max - _finite(b_largest)))", "_sum(b_sum)"),
    ("a lane without a class is NaN", "trades_kl", 'tl.where(b_max == -float("inf"), 0.0, b_max)', "b_max"),
    ("one block too few", "trades_kl", "range(0, classes, BLOCK)", "range(0, classes - BLOCK, BLOCK)"),
    ("the first block again", "trades_kl", "i_k + tl.arange(0, BLOCK)", "tl.arange(0, BLOCK)"),
    ("the last block's runner-up", "mart_loss", "b_z > b_wrong", "b_z == b_z"),
    ("the label is a wrong class", "mart_loss", "(o_k != b_label) & (b_z > b_wrong)", "b_z > b_wrong"),
    ("the last block's sum", "js_divergence", "b_terms2 += _times_gap(", "b_terms2 = _times_gap("),
]


def cases(name, looped):
    if looped:
        return [divergence_cases.case(name, 3, 2100, torch.float32, 0, special=special) for special in (False, True)]
    result = [divergence_cases.case(name, 3, 1000, torch.float32, 0)]
    result += [divergence_cases.case(name, 6, 10, torch.float32, seed, special=True) for seed in (0, 2, 4)]
    result += [divergence_cases.case(name, 6, 10, torch.float32, 0, spread=0.0, strides="apart")]
    if name == "mart_loss":
        result[-1].arguments[2][1] = 10
    return result


def caught(module, name, looped):
    """Returns whether this module's kernels fault or give a wrong result in some case of this loss."""
    with mock.patch.multiple(kernels, **compiled_kernels(module, 80)):
        for case in cases(name, looped):
            try:
                divergence_cases.assert_right(case, case.run("launch"))
            except (AssertionError, ptxrun.FaultError):
                return True
    return False


@pytest.mark.parametrize("looped", [False, True])
@pytest.mark.parametrize("name", divergence_cases.LOSSES)
def test_the_kernels_as_they_are_pass(name, looped):
    assert not caught(kernels, name, looped)


@pytest.mark.parametrize(
    ("name", "text", "instead", "looped"),
    [pytest.param(*bug[1:], False, id=f"{bug[1]}: {bug[0]}") for bug in BUGS]
    + [pytest.param(*bug[1:], True, id=f"{bug[1]} in blocks: {bug[0]}") for bug in LOOPED],
)
def test_a_planted_bug_is_caught(name, text, instead, looped, tmp_path):
    assert caught(planted(kernels, text, instead, tmp_path / "planted.py"), name, looped)
