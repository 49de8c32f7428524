"""Runs with TRITON_INTERPRET=1, in a process of its own: see test_interpreted.py."""

import importlib
import warnings
from unittest import mock

import assign_cases
import pytest
import torch
from assign_cases import assert_same, case, poisoned_memory, run
from hypothesis import given, settings
from hypothesis import strategies as st

op = importlib.import_module("bt_fast.ops.assign_steps")  # as an attribute this name is the function


def check(launch, arguments):
    expected = run(op.assign_reference, arguments)
    with poisoned_memory(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy warns of Inf - Inf
        result = run(launch, arguments)
    assert_same(result, expected)


cases = st.builds(
    case,
    st.one_of(st.integers(1, 9), st.integers(1, 1100)),
    st.integers(0, 2**31),
    kind=st.sampled_from(assign_cases.VALUES),
    f_r=st.one_of(st.sampled_from(assign_cases.FRACTIONS), st.floats(0, 1), st.just(float("nan"))),
    policy=st.one_of(st.sampled_from(assign_cases.POLICIES), st.tuples(*[st.integers(0, 300)] * 3)),
    full=st.booleans(),
    sound=st.booleans(),
)


@settings(max_examples=50, deadline=None)
@given(cases)
def test_one_launch(arguments):
    check(op.launch_assign, arguments)


@settings(max_examples=20, deadline=None)
@given(cases, st.sampled_from([128, 2048]))
def test_in_blocks(arguments, block):
    with mock.patch.object(op, "BLOCK", block):
        check(op.launch_assign_in_blocks, arguments)


@pytest.mark.parametrize("m", [1024, 1025, 8191, 8192])
def test_one_launch_up_to_its_limit(m):
    check(op.launch_assign, case(m, m, kind="close", f_r=0.3))


def test_an_empty_batch():
    check(op.launch_assign, case(0, 0, sound=True))


@pytest.mark.parametrize("kind", ["normal", "all equal"])
def test_as_many_samples_as_the_blocks_take(kind):
    with mock.patch.object(op, "BLOCK", 2**14):
        check(op.launch_assign_in_blocks, case(op.MOST_SAMPLES, 0, kind=kind, f_r=0.3, policy=(3, 3, 3)))


def test_more_faults_than_a_chunk():
    many = case(5, 0, sound=True) | {"faults": torch.zeros(130, dtype=torch.int64)}
    check(op.launch_assign, many)
    many["faults"][129] = 4
    check(op.launch_assign, many)


def test_strided_inputs():
    given_ = case(20, 0)
    check(op.launch_assign, {k: v[::2] if k in ("svar", "correct", "unfit") else v for k, v in given_.items()})
