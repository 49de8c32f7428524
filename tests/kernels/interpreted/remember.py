"""Runs with TRITON_INTERPRET=1, in a process of its own: see test_interpreted.py."""

import memory_cases as cases
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
flag = st.booleans()
OPTIONS = {name: flag for name in ("placed", "last", "ordered", "counted", "own", "kept", "l2")}


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 5),
    st.sampled_from(cases.SHAPES),
    st.sampled_from(DTYPES),
    st.sampled_from(cases.STORED),
    st.integers(0, 2**31),
    st.fixed_dictionaries(OPTIONS),
)
def test_remember(m, shapes, dtype, stored, seed, options):
    case = cases.remember_case(m, shapes, dtype, stored, seed, **options)
    expected = case.remember(cases.remember_op.remember_reference)
    cases.same_memory(case.remember(cases.remember_op.launch_remember), expected)


def test_vectors_and_nothing():
    for shapes in cases.VECTORS:
        case = cases.remember_case(3, shapes, torch.float32, torch.int8, 0)
        expected = case.remember(cases.remember_op.remember_reference)
        cases.same_memory(case.remember(cases.remember_op.launch_remember), expected)
    case = cases.remember_case(0, cases.SHAPES[0], torch.float32, torch.int8, 0)
    cases.same_memory(case.remember(cases.remember_op.launch_remember)[2:-2], case.arguments["memory"])
