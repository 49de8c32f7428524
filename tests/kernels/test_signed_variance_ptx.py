"""The compiled kernels, executed on the CPU, have layouts, predicates, vector accesses and rounding as on a GPU."""

from unittest import mock

import pytest
import rows_cases
import torch

pytest.importorskip("triton")

from compiled_kernel import compiled_kernels, moved_bytes

from bt_fast.kernels import signed_variance as kernels
from bt_fast.ops.signed_variance import launch_signed_variance, signed_variance_reference


@pytest.fixture(params=[80, 90])
def compiled(request):
    """Replaces the kernels by their compiled versions, returned as a dict by name."""
    stand_ins = compiled_kernels(kernels, request.param)
    with mock.patch.multiple(kernels, **stand_ins):
        yield stand_ins


def same(z, y):
    with rows_cases.poisoned():
        result = launch_signed_variance(z, y)
    rows_cases.assert_same_mining(result, signed_variance_reference(z, y))


@pytest.mark.parametrize(
    ("m", "k", "dtype", "layout"),
    [
        (70, 10, torch.float32, "end to end"),
        (70, 10, torch.bfloat16, "apart"),
        (33, 16, torch.float32, "apart by 16"),
        (15, 100, torch.float16, "end to end"),
        (300, 2, torch.float32, "turned"),
        (9, 1000, torch.float32, "end to end"),
        (5, 1001, torch.float16, "one for all"),
        (3, 8192, torch.float32, "end to end"),
        (14, 8193, torch.bfloat16, "end to end"),
        (2, 2**15 + 1, torch.float32, "apart"),
    ],
)
def test_signed_variance(compiled, m, k, dtype, layout):
    same(*rows_cases.batch(m, k, dtype, k, layout=layout))


@pytest.mark.parametrize(("k", "reads"), [(10, 1), (1000, 1), (8200, 2)])
def test_bytes(compiled, k, reads):
    """One read of the logits and one write of the probabilities; rows longer than a block are read twice."""
    m = 6
    z, y = rows_cases.batch(m, k, torch.float16, 0)
    launch_signed_variance(z, y)
    (kernel,) = (f for f in compiled.values() if f.statistics)
    loads, stores = moved_bytes(kernel)
    assert loads["logits"] == reads * 2 * m * k
    assert stores["probabilities"] == 4 * m * k
    assert loads.keys() == {"logits", "labels"}
    assert stores.keys() == {"probabilities", "svar", "correct", "unfit"}
