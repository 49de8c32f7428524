"""The compiled kernels, executed on the CPU, have layouts, predicates, vector accesses and rounding as on a GPU."""

from unittest import mock

import pytest
import rows_cases
import torch

pytest.importorskip("triton")

from compiled_kernel import compiled_kernels, moved_bytes

from bt_fast.kernels import update_fraction as kernels
from bt_fast.ops import update_fraction as ops


@pytest.fixture(params=[80, 90])
def compiled(request):
    """Replaces the kernels by their compiled versions, returned as a dict by name."""
    stand_ins = compiled_kernels(kernels, request.param)
    with mock.patch.multiple(kernels, **stand_ins):
        yield stand_ins


def same(z, y):
    result, expected = rows_cases.state(), rows_cases.state()
    with rows_cases.poisoned():
        ops.launch_update_fraction(*result, z, y, 0.8, 0.9)
    ops.update_fraction_reference(*expected, z, y, 0.8, 0.9)
    assert result == expected


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize(
    ("m", "k", "dtype", "layout"),
    [
        (600, 10, torch.float32, "end to end"),
        (70, 100, torch.bfloat16, "apart"),
        (33, 1000, torch.float32, "apart by 16"),
        (3, 8200, torch.float16, "end to end"),
    ],
)
def test_one_launch(compiled, m, k, dtype, layout, bad):
    z, y = rows_cases.batch(m, k, dtype, k, layout=layout, faults=False, strays=False)
    if bad:
        z[-1, -1] = torch.nan
    same(z, y)
    assert compiled["update_fraction_finish_kernel"].statistics is None


@pytest.mark.parametrize("bad", [False, True])
def test_two_launches(compiled, bad):
    z, y = rows_cases.batch(900, 100, torch.float32, 0, faults=False, strays=False)
    if bad:
        y[0] = -1
    with mock.patch.multiple(ops, MOST_ROWS=2**6, PROGRAMS=4):
        same(z, y)
    assert compiled["update_fraction_finish_kernel"].statistics


def test_bytes(compiled):
    """One read of the logits; nothing of that size is written."""
    m, k = 70, 100
    z, y = rows_cases.batch(m, k, torch.float16, 0, faults=False, strays=False)
    same(z, y)
    loads, stores = moved_bytes(compiled["update_fraction_fwd_kernel"])
    assert loads["logits"] == 2 * m * k
    assert stores == {"robust_fraction": 8, "unreported_faults": 8}
