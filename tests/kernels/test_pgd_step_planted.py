"""Plants bugs into the kernels' source; the checks must catch each of them."""

from unittest import mock

import pgd_cases
import pytest
import torch

pytest.importorskip("triton")

import ptxrun
from compiled_kernel import compiled_kernels, planted

from bt_fast.kernels import pgd_step as kernels
from bt_fast.ops import pgd_l2_step, pgd_step

FULL = {"counts": True, "flags": True}
OWN = FULL | {"own": True}
RADIUS, SHRINKING = "_radius(epsilon, epsilons, i_n)", "_shrinking(tl.sum(b_sum, axis=0)"
OF_ITS_OWN = [
    ("another sample's ε", "tl.load(epsilons + i_n)", "tl.load(epsilons + i_n * 0)"),
    ("one ε for all", "epsilon = tl.load(epsilons + i_n).to(tl.float32)", "epsilon = epsilon * 1.0"),
]
# what is planted: a name, the text, and its replacement
LINF = [
    ("a mask that ends too late", "m_x = o_x < length", "m_x = o_x <= length"),
    ("a mask that ends too early", "m_x = o_x < length", "m_x = o_x < length - 1"),
    ("no upper ε", "b_x + b_step, b_c - epsilon, b_c + epsilon", 'b_x + b_step, b_c - epsilon, float("inf")'),
    ("no bounds", "b_c + epsilon), lower, upper)", 'b_c + epsilon), -float("inf"), float("inf"))'),
    ("swapped bounds", "b_c + epsilon), lower, upper)", "b_c + epsilon), upper, lower)"),
    ("another sample's α", "tl.load(step_size + i_n)", "tl.load(step_size + i_n * 0)"),
    ("descent", "tl.where(b_g > 0, b_alpha", "tl.where(b_g <= 0, b_alpha"),
    ("a zero gradient moves", "tl.where(b_g < 0, -b_alpha", "tl.where(b_g <= 0, -b_alpha"),
    ("one step too many", "> tl.load(step)", ">= tl.load(step)"),
    ("NaN moves a sample", "tl.where(top > INFINITY, False, m_x)", "m_x"),
    ("infinite gradients stay", "tl.where(top > INFINITY, False, m_x)", "tl.where(top >= INFINITY, False, m_x)"),
    ("NaN is not counted", "faulty + i_n, 1, mask=top > INFINITY", "faulty + i_n, 0, mask=top > INFINITY"),
    ("NaN of another sample", "faulty + i_n, 1, mask=top > INFINITY", "faulty + 0, 1, mask=top > INFINITY"),
    ("a long sample with NaN moves", "tl.load(held + i_n) != 0", "tl.load(held + i_n) < 0"),
    ("only the last part is searched for NaN", "b_top = tl.maximum(b_top, _magnitude(b_g))", "b_top = _magnitude(b_g)"),
    ("NaN is dropped", "tl.maximum(b_v, b_low, propagate_nan=tl.PropagateNan.ALL)", "tl.maximum(b_v, b_low)"),
    ("the wrong sample", "i_n = i_x // blocks", "i_n = i_x % blocks"),
    *OF_ITS_OWN,
    ("samples share an ε", f"{RADIUS}, lower, upper)\n    top", "epsilon, lower, upper)\n    top"),
    ("long samples share an ε", f"{RADIUS}, lower, upper)\n    tl", "epsilon, lower, upper)\n    tl"),
]
L2 = [
    ("squares overflow or vanish in a sample", "b_g * _power_of_two(-_exponent(top))", "b_g * 1.0"),
    (
        "scales of lanes are not brought together",
        "norm = tl.sqrt(tl.sum(b_sum * b_ratio * b_ratio",
        "norm = tl.sqrt(tl.sum(b_sum",
    ),
    ("a lane's sum keeps its old scale", "b_sum * b_ratio * b_ratio + b_scaled", "b_sum + b_scaled"),
    ("the perturbation does not shrink", "tl.where(size > epsilon", "tl.where(size > 2 * epsilon"),
    ("every perturbation is stretched", "tl.where(size > epsilon", "tl.where(size > 0"),
    ("padding counts in a perturbation's length", "tl.where(m_x, b_delta, 0.0)", "b_delta + 0.0"),
    ("Inf moves a sample", "(top > 0) & (top < INFINITY)", "(top > 0) & (top <= INFINITY)"),
    ("a zero gradient is forgotten", "tl.store(flat + i_n, (top == 0)", "tl.store(flat + i_n, (top < 0)"),
    ("everyone is moved by noise", "tl.load(flat + i_n) == 0", "tl.load(flat + i_n) < 0"),
    ("all samples' noise is the same", "o_x, i_n, 0, 0)", "o_x, i_n * 0, 0, 0)"),
    ("noise without its centre", "b_sum.to(tl.int32) - 2040", "b_sum.to(tl.int32) - 2048"),
    ("a long sample without direction moves", "if shrink < 0", "if shrink < -2"),
    ("a long sample leaves its lower bound", "b_delta * shrink, lower, upper)", "b_delta * shrink, lower - 1, upper)"),
    ("Inf is not counted", "mask=top >= INFINITY", "mask=top > INFINITY"),
    *OF_ITS_OWN,
    ("samples share an ε", f"b_delta, axis=0), {RADIUS})", "b_delta, axis=0), epsilon)"),
    ("long samples share an ε", f"n + i_n, {SHRINKING}, {RADIUS}))", f"n + i_n, {SHRINKING}, epsilon))"),
    ("samples moved by noise share an ε", f"= {SHRINKING}, {RADIUS})", f"= {SHRINKING}, epsilon)"),
]
NORMS = {
    "linf": (
        pgd_step.launch_linf,
        pgd_step.linf_reference,
        [
            pgd_cases.case(3, (3, 15, 17), torch.float32, 0, **FULL),
            pgd_cases.case(3, (3, 15, 20), torch.float32, 1, **OWN),
            pgd_cases.case(3, (3, 37, 39), torch.float32, 3, **OWN),
        ],
    ),
    "l2": (
        pgd_l2_step.launch_l2,
        pgd_l2_step.l2_reference,
        [
            pgd_cases.l2_case(7, (3, 15, 17), torch.float32, 1, seeded=True, flags=True).but(lower=0.1),
            pgd_cases.l2_case(7, (3, 4, 5), torch.float32, 1, **OWN),
            pgd_cases.l2_case(7, (3, 37, 39), torch.float32, 5, seeded=True, flags=True, own=True).but(lower=0.1),
        ],
    ),
}


def caught(module, norm):
    """Returns whether this module's kernels fault or give a wrong result in some case."""
    launch, reference, cases = NORMS[norm]
    with mock.patch.multiple(kernels, **compiled_kernels(module, 80)):
        for case in cases:
            try:
                pgd_cases.assert_near(case.run(launch), case.run(reference))
            except (AssertionError, ptxrun.FaultError):
                return True
    return False


@pytest.mark.parametrize("norm", NORMS)
def test_the_kernels_as_they_are_pass(norm):
    assert not caught(kernels, norm)


@pytest.mark.parametrize(
    ("norm", "text", "instead"),
    [
        pytest.param(norm, *bug[1:], id=f"{norm}: {bug[0]}")
        for norm, bugs in (("linf", LINF), ("l2", L2))
        for bug in bugs
    ],
)
def test_a_planted_bug_is_caught(norm, text, instead, tmp_path):
    assert caught(planted(kernels, text, instead, tmp_path / "planted.py"), norm)
