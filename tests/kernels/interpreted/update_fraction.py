"""Runs with TRITON_INTERPRET=1, in a process of its own: see test_interpreted.py."""

from unittest import mock

import pytest
import rows_cases
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bt_fast.ops import update_fraction as ops

CLASSES = st.one_of(st.sampled_from([2, 3, 10, 16, 100, 1000, 1001]), st.integers(2, 600))
unit = st.floats(0, 1)


def same(z, y, f_r=0.3, gamma=0.8, momentum=0.9):
    result, expected = rows_cases.state(f_r), rows_cases.state(f_r)
    with rows_cases.poisoned():
        ops.launch_update_fraction(*result, z, y, gamma, momentum)
    ops.update_fraction_reference(*expected, z, y, gamma, momentum)
    assert result == expected


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40),
    CLASSES,
    st.sampled_from(rows_cases.DTYPES),
    st.integers(0, 2**31),
    st.sampled_from(rows_cases.LAYOUTS),
    st.tuples(unit, unit, unit),
    st.tuples(st.booleans(), st.booleans()),
)
def test_small_batches(m, k, dtype, seed, layout, numbers, bad):
    z, y = rows_cases.batch(m, k, dtype, seed, layout=layout, faults=bad[0], strays=bad[1])
    same(z, y, *numbers)


@pytest.mark.parametrize(("m", "k"), [(14, 8193), (2, 100_000), (8192, 10)])
def test_large_batches(m, k):
    z, y = rows_cases.batch(m, k, torch.float32, k, faults=False, strays=False)
    same(z, y)
    z[m // 2, k // 2] = torch.nan
    same(z, y)


@pytest.mark.parametrize("bad", [False, True])
def test_two_launches(bad):
    """9000 rows partly fill three rounds of the programs."""
    z, y = rows_cases.batch(9000, 10, torch.float32, 0, faults=False, strays=False)
    if bad:
        y[8999] = 10
    same(z, y)
    with mock.patch.multiple(ops, MOST_LOGITS=2**10, PROGRAMS=4):
        same(z, y)
