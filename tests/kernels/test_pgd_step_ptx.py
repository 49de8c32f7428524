"""The compiled kernels, executed on the CPU: layouts, predicates, vector accesses and rounding as on a GPU."""

from unittest import mock

import pgd_cases
import pytest
import torch

pytest.importorskip("triton")

from compiled_kernel import compiled_kernels

from bt_fast.kernels import pgd_step as kernels
from bt_fast.ops import pgd_step as ops

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BARE, FULL = {}, {"counts": True, "flags": True}


@pytest.fixture(params=[80, 90])
def compiled(request):
    """The step's kernels, each replaced by its compiled self: a dict by name."""
    stand_ins = compiled_kernels(kernels, request.param)
    with mock.patch.multiple(kernels, **stand_ins):
        yield stand_ins


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "shape", "options"),
    [
        (3, (3, 16, 16), FULL),
        (2, (2, 15, 37), FULL | {"channel_limits": True}),
        (3, (3, 16, 16), FULL | {"channel_limits": True, "last": True}),
        (2, (7,), BARE),
        (3, (1,), FULL),
    ],
)
def test_linf(compiled, n, shape, dtype, options):
    case = pgd_cases.case(n, shape, dtype, 0, **options)
    pgd_cases.assert_same(case.run(ops.launch_linf), case.run(ops.linf_reference))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linf_reads_three_tensors_and_writes_one(compiled, dtype):
    case = pgd_cases.case(3, (3, 15, 20), dtype, 0)
    case = case.but(steps=torch.tensor([1, 0, 3]), step=torch.tensor(0))
    case.run(ops.launch_linf)
    kernel = compiled["pgd_linf_step_fwd_kernel"]
    moving = 2 * 900 * dtype.itemsize
    names = dict(enumerate(kernel.function.arg_names))
    loads, stores = (
        {names[k]: v for k, v in kernel.statistics[f"{how}.parameter"].items() if names[k] not in SMALL}
        for how in ("load", "store")
    )
    assert loads == {"x_adv": moving, "grad": moving, "clean": moving}
    assert stores == {"x_adv": moving}


SMALL = ("step_size", "steps", "step", "limits", "faulty")
