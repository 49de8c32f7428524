"""The compiled kernels, executed on the CPU, with blocks in random order."""

import importlib
from unittest import mock

import pytest
import torch
from assign_cases import poisoned_memory

pytest.importorskip("triton")

from compiled_kernel import compiled_kernels

from bt_fast.kernels import order_by_steps as kernels

op = importlib.import_module("bt_fast.ops.order_by_steps")  # as an attribute this name is the function


@pytest.fixture(params=[80, 90])
def compiled(request):
    with mock.patch.multiple(kernels, **compiled_kernels(kernels, request.param)):
        yield


@pytest.mark.parametrize("launch", [op.launch_order, op.launch_order_in_blocks])
@pytest.mark.parametrize(("m", "most"), [(1, 0), (7, 1), (128, 10), (300, 150), (600, 11), (513, 0)])
def test_an_order(compiled, launch, m, most):
    steps = torch.randint(most + 1, (m,), generator=torch.Generator().manual_seed(m))
    expected = op.order_reference(steps, most)
    with poisoned_memory():
        result = launch(steps, most)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
