"""Runs with TRITON_INTERPRET=1, in a process of its own: see test_interpreted.py."""

import pytest
import rows_cases
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bt_fast.ops.signed_variance import launch_signed_variance, signed_variance_reference

CLASSES = st.one_of(st.sampled_from([2, 3, 10, 16, 100, 1000, 1001]), st.integers(2, 600))


def same(z, y):
    with rows_cases.poisoned():
        result = launch_signed_variance(z, y)
    rows_cases.assert_same_mining(result, signed_variance_reference(z, y))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 40),
    CLASSES,
    st.sampled_from(rows_cases.DTYPES),
    st.integers(0, 2**31),
    st.sampled_from(rows_cases.LAYOUTS),
)
def test_rows_of_a_block(m, k, dtype, seed, layout):
    same(*rows_cases.batch(m, k, dtype, seed, layout=layout))


@pytest.mark.parametrize(
    ("m", "k", "layout"),
    [(9, 8192, "apart"), (14, 8193, "end to end"), (3, 2**15 + 1, "apart by 16"), (2, 100_000, "end to end")],
)
def test_long_rows(m, k, layout):
    same(*rows_cases.batch(m, k, torch.float32, k, layout=layout))


@pytest.mark.parametrize("dtype", rows_cases.DTYPES[1:])
def test_long_rows_of_16_bits(dtype):
    same(*rows_cases.batch(14, 9000, dtype, 1))


def test_labels_a_stride_apart():
    z, y = rows_cases.batch(20, 10, torch.float32, 0)
    same(z, y.repeat_interleave(3)[::3])
