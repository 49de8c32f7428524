"""Runs with TRITON_INTERPRET=1, in a process of its own: see test_interpreted.py."""

import memory_cases as cases
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
flag = st.booleans()
OPTIONS = {name: flag for name in ("placed", "last", "ordered", "counted", "numbered", "own", "l2")}
OPTIONS |= {"noise": st.sampled_from([0.0, 0.001, 0.05])}


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 5),
    st.sampled_from(cases.SHAPES),
    st.sampled_from(DTYPES),
    st.sampled_from(cases.STORED),
    st.integers(0, 2**31),
    st.fixed_dictionaries(OPTIONS),
)
def test_recall(m, shapes, dtype, stored, seed, options):
    case = cases.recall_case(m, shapes, dtype, stored, seed, **options)
    expected = case.recall(cases.recall_op.recall_reference)
    cases.same_start(case.recall(cases.recall_op.launch_recall), expected, options["l2"])


def test_vectors():
    for shapes in cases.VECTORS:
        for l2 in (False, True):
            case = cases.recall_case(3, shapes, torch.float32, torch.int8, 0, l2=l2)
            expected = case.recall(cases.recall_op.recall_reference)
            cases.same_start(case.recall(cases.recall_op.launch_recall), expected, l2)


def test_nothing():
    for m, shape in ((0, (3, 4, 4)), (2, (3, 0, 4))):
        case = cases.recall_case(m, (shape, shape), torch.float32, torch.int8, 0, numbered=True)
        clean, start = case.recall(cases.recall_op.launch_recall)
        assert clean.shape == start.shape == (m, *shape)
