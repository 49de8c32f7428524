"""Runs with TRITON_INTERPRET=1, in a process of its own: see test_interpreted.py."""

import pgd_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bt_fast.ops import pgd_l2_step, pgd_step

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
flag = st.booleans()
options = {"last": flag, "counts": flag, "flags": flag, "own": flag}


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.sampled_from(pgd_cases.SHAPES),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
    st.fixed_dictionaries(options),
)
def test_linf(n, shape, dtype, seed, options):
    case = pgd_cases.case(n, shape, dtype, seed, **options)
    result = case.run(pgd_step.launch_linf)
    pgd_cases.assert_same(result, case.run(pgd_step.linf_reference))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 7),
    st.sampled_from(pgd_cases.SHAPES),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
    st.fixed_dictionaries(options | {"seeded": flag}),
)
def test_l2(n, shape, dtype, seed, options):
    case = pgd_cases.l2_case(n, shape, dtype, seed, **options)
    pgd_cases.assert_near(case.run(pgd_l2_step.launch_l2), case.run(pgd_l2_step.l2_reference))


@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 15, 37), (4, 36, 36)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("arrange", "launch"),
    [(pgd_cases.case, pgd_step.launch_linf), (pgd_cases.l2_case, pgd_l2_step.launch_l2)],
    ids=["linf", "l2"],
)
def test_one_epsilon_of_each_sample_is_to_the_bit_the_same_number_for_all(arrange, launch, dtype, shape):
    case = arrange(7, shape, dtype, 0)
    pgd_cases.assert_same(pgd_cases.as_own(case).run(launch), case.run(launch))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("arrange", "launch", "reference"),
    [
        (pgd_cases.case, pgd_step.launch_linf, pgd_step.linf_reference),
        (pgd_cases.l2_case, pgd_l2_step.launch_l2, pgd_l2_step.l2_reference),
    ],
)
def test_a_gradient_in_another_memory_format(arrange, launch, reference, last):
    case = arrange(2, (3, 5, 7), torch.float32, 0, last=last)
    other = torch.contiguous_format if last else torch.channels_last
    turned = case.but(grad=case.arguments["grad"].contiguous(memory_format=other))
    pgd_cases.assert_near(turned.run(launch), case.run(reference))


def test_nothing():
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4)):
        x = torch.empty(shape)
        pgd_step.launch_linf(x, x, x, torch.ones(len(x)), 0.1, 0.0, 1.0)
        pgd_l2_step.launch_l2(x, x, x, torch.ones(len(x)), 0.1, 0.0, 1.0, torch.tensor(0))
