"""The compiled kernels, executed on the CPU, have layouts, predicates, vector accesses and rounding as on a GPU."""

from unittest import mock

import pytest
import rows_cases
import torch

pytest.importorskip("triton")

from compiled_kernel import compiled_kernels, moved_bytes

from bt_fast.kernels import ascent_direction as kernels
from bt_fast.ops.ascent_direction import ascent_direction_reference, launch_ascent_direction


@pytest.fixture(params=[80, 90])
def compiled(request):
    """Replaces the kernels by their compiled versions, returned as a dict by name."""
    stand_ins = compiled_kernels(kernels, request.param)
    with mock.patch.multiple(kernels, **stand_ins):
        yield stand_ins


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(
    ("n", "k", "dtype", "layout"),
    [
        (70, 10, torch.float32, "end to end"),
        (70, 10, torch.bfloat16, "apart"),
        (33, 16, torch.float32, "apart by 16"),
        (15, 100, torch.float16, "end to end"),
        (300, 2, torch.bfloat16, "turned"),
        (9, 1000, torch.float32, "end to end"),
        (5, 1001, torch.float16, "one for all"),
        (14, 8193, torch.bfloat16, "end to end"),
        (2, 2**15 + 1, torch.float32, "apart"),
    ],
)
def test_ascent_direction(compiled, n, k, dtype, layout, scaled):
    z, _ = rows_cases.batch(n, k, dtype, k, layout=layout)
    target = rows_cases.target_for(z, k)
    with rows_cases.poisoned():
        result = launch_ascent_direction(z, target, scaled)
    rows_cases.assert_same_direction(result, ascent_direction_reference(z, target, scaled))


@pytest.mark.parametrize(
    ("k", "scaled", "of_logits", "of_target"),
    [(10, True, 1, 1), (10, False, 1, 1), (1000, True, 1, 1), (8200, True, 3, 2), (8200, False, 2, 1)],
)
def test_bytes(compiled, k, scaled, of_logits, of_target):
    """One read of each input and one write; rows longer than a block are first read for the sum and for the scale."""
    n = 6
    z, _ = rows_cases.batch(n, k, torch.float16, 0)
    launch_ascent_direction(z, rows_cases.target_for(z, 0), scaled)
    (kernel,) = (f for f in compiled.values() if f.statistics)
    loads, stores = moved_bytes(kernel)
    assert loads == {"logits": of_logits * 2 * n * k, "target": of_target * 4 * n * k}
    assert stores == {"direction": 2 * n * k}
