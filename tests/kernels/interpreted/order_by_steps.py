"""Runs with TRITON_INTERPRET=1, in a process of its own: see test_interpreted.py."""

import importlib

import pytest
import torch
from assign_cases import poisoned_memory
from hypothesis import given, settings
from hypothesis import strategies as st

from bt_fast.kernels.order_by_steps import order_by_steps_fwd_kernel

op = importlib.import_module("bt_fast.ops.order_by_steps")  # as an attribute this name is the function
LAUNCHES = [op.launch_order, op.launch_order_in_blocks]


def check(launch, steps, most):
    expected = op.order_reference(steps, most)
    with poisoned_memory():
        result = launch(steps, most)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("launch", LAUNCHES)
@settings(max_examples=25, deadline=None)
@given(
    st.one_of(st.integers(1, 9), st.integers(1, 600)),
    st.one_of(st.integers(0, 11), st.integers(0, 1000)),
    st.integers(0, 3),
    st.integers(0, 2**31),
)
def test_an_order(launch, m, largest, spare, seed):
    steps = torch.randint(largest + 1, (m,), generator=torch.Generator().manual_seed(seed))
    check(launch, steps, largest + spare)


@pytest.mark.parametrize("launch", LAUNCHES)
def test_strided_counts(launch):
    check(launch, torch.arange(40)[::3], 40)


@pytest.mark.parametrize("launch", LAUNCHES)
def test_counts_beyond_the_most_disturb_no_other_memory(launch):
    order, _ = launch(torch.tensor([3, 900, -5, 2, 2**40]), 4)
    assert ((order >= 0) & (order < 5)).all()


def test_the_largest_counts_of_one_launch():
    most = 2**31 // op.ONE_LAUNCH - 3
    assert (most + 2) * op.ONE_LAUNCH < 2**31
    steps = torch.tensor([0, most, most - 1, 0, most])
    order, active = torch.empty_like(steps), torch.empty(most, dtype=torch.int64)
    order_by_steps_fwd_kernel[(1,)](steps, order, active, len(steps), most, **op.PAIRS)  # the first program
    assert order.tolist() == [1, 4, 2, 0, 3]
    assert active[: op.PAIRS["BLOCK_I"] - len(steps)].eq(3).all()
