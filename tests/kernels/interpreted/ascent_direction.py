"""Runs with TRITON_INTERPRET=1, in a process of its own: see test_interpreted.py."""

import pytest
import rows_cases
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bt_fast.ops.ascent_direction import ascent_direction_reference, launch_ascent_direction

CLASSES = st.one_of(st.sampled_from([2, 3, 10, 16, 100, 1000, 1001]), st.integers(2, 600))


def same(z, target):
    for scaled in (True, False):
        with rows_cases.poisoned():
            result = launch_ascent_direction(z, target, scaled)
        rows_cases.assert_same_direction(result, ascent_direction_reference(z, target, scaled))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 40),
    CLASSES,
    st.sampled_from(rows_cases.DTYPES),
    st.integers(0, 2**31),
    st.sampled_from(rows_cases.LAYOUTS),
)
def test_rows_of_a_block(n, k, dtype, seed, layout):
    z, _ = rows_cases.batch(n, k, dtype, seed, layout=layout)
    same(z, rows_cases.target_for(z, seed))


@pytest.mark.parametrize(
    ("n", "k", "layout"),
    [(9, 8192, "apart"), (14, 8193, "end to end"), (3, 2**15 + 1, "apart by 16"), (2, 100_000, "end to end")],
)
def test_long_rows(n, k, layout):
    z, _ = rows_cases.batch(n, k, torch.float32, k, layout=layout)
    same(z, rows_cases.target_for(z, 1))


@pytest.mark.parametrize("dtype", rows_cases.DTYPES[1:])
def test_long_rows_of_16_bits(dtype):
    z, _ = rows_cases.batch(14, 9000, dtype, 1)
    same(z, rows_cases.target_for(z, 2))


def test_targets_a_stride_apart():
    z, _ = rows_cases.batch(20, 10, torch.float32, 0)
    same(z, rows_cases.laid(rows_cases.target_for(z, 3), "apart"))
