"""Runs with TRITON_INTERPRET=1, in a process of its own: see test_interpreted.py."""

import gather_start_cases as cases
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
flag = st.booleans()
OPTIONS = {"noise": st.sampled_from(["normal", "uniform"])}
OPTIONS |= {name: flag for name in ("last", "ordered", "counted", "numbered", "bounded")}


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4),
    st.sampled_from(cases.SHAPES),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
    st.fixed_dictionaries(OPTIONS),
)
def test_gather_start(m, shape, dtype, seed, options):
    case = cases.case(m, shape, dtype, seed, **options)
    expected = case.run(cases.op.gather_start_reference)
    cases.assert_same(case.run(cases.op.launch_gather_start), expected)


def test_samples_without_steps_are_to_the_bit_what_they_were():
    case = cases.case(4, (2, 15, 37), torch.float32, 0, ordered=False, bounded=True)
    idle = case.arguments["steps"] == 0
    _, start = case.run(cases.op.launch_gather_start)
    assert torch.equal(cases.bits(start[idle]), cases.bits(case.arguments["x"][idle]))


def test_steps_in_32_bits_and_an_order_that_is_not_contiguous():
    case = cases.case(4, (48,), torch.float32, 0)
    order, steps = (case.arguments[name].repeat_interleave(2)[::2] for name in ("order", "steps"))
    other = case.but(order=order, steps=steps.int())
    cases.assert_same(other.run(cases.op.launch_gather_start), case.run(cases.op.launch_gather_start))


def test_nothing():
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4)):
        case = cases.case(shape[0], shape[1:], torch.float32, 0)
        clean, start = case.run(cases.op.launch_gather_start)
        assert clean.shape == start.shape == shape
