"""Runs with TRITON_INTERPRET=1, in a process of its own: see test_interpreted.py."""

import pgd_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bt_fast.ops import pgd_step

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
flag = st.booleans()


def ulps(dtype):
    return 1 if dtype == torch.bfloat16 else 0  # the interpreter truncates to it instead of rounding


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.sampled_from(pgd_cases.SHAPES),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
    st.fixed_dictionaries({"last": flag, "channel_limits": flag, "counts": flag, "flags": flag}),
)
def test_linf(n, shape, dtype, seed, options):
    case = pgd_cases.case(n, shape, dtype, seed, **options)
    found = case.run(pgd_step.launch_linf)
    pgd_cases.assert_same(found, case.run(pgd_step.linf_reference), ulps(dtype))


@pytest.mark.parametrize("last", [False, True])
def test_linf_of_a_gradient_in_another_memory_format(last):
    case = pgd_cases.case(2, (3, 5, 7), torch.float32, 0, last=last)
    other = torch.contiguous_format if last else torch.channels_last
    turned = case.but(grad=case.arguments["grad"].contiguous(memory_format=other))
    pgd_cases.assert_same(turned.run(pgd_step.launch_linf), case.run(pgd_step.linf_reference))


def test_linf_of_nothing():
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4)):
        x = torch.empty(shape)
        pgd_step.launch_linf(x, x, x, torch.ones(len(x)), 0.1, 0.0, 1.0)
