"""The compiled kernel, executed on the CPU, has layouts, predicates, vector accesses and rounding as on a GPU."""

from unittest import mock

import gather_start_cases as cases
import pytest
import torch

pytest.importorskip("triton")

from compiled_kernel import compiled_kernels

from benchmarks.kernel_variants import VARIANTS
from bt_fast import ops
from bt_fast.kernels import gather_start as kernels

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BARE = {"ordered": False, "counted": False}


@pytest.fixture(params=[80, 90])
def compiled(request):
    """Replaces the kernel by its compiled version, returned as a dict by name."""
    stand_ins = compiled_kernels(kernels, request.param)
    with mock.patch.multiple(kernels, **stand_ins):
        yield stand_ins


@pytest.mark.parametrize(
    ("m", "shape", "dtype", "options"),
    [
        *((4, (3, 16, 16), dtype, {}) for dtype in DTYPES),
        *((2, (2, 15, 37), dtype, {"bounded": True}) for dtype in DTYPES),
        *((4, (3, 4, 4), dtype, {"noise": "uniform", "bounded": True, "last": True}) for dtype in DTYPES),
        (3, (7,), torch.float32, BARE),
        (4, (48,), torch.float32, {"numbered": True}),
        (3, (7,), torch.bfloat16, BARE | {"numbered": True}),
        (3, (1,), torch.float32, {}),
    ],
)
def test_gather_start(compiled, m, shape, dtype, options):
    case = cases.case(m, shape, dtype, 0, **options)
    cases.assert_same(case.run(cases.op.launch_gather_start), case.run(cases.op.gather_start_reference))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_read_and_two_writes_of_each_element(compiled, dtype):
    cases.case(3, (3, 15, 20), dtype, 0).run(cases.op.launch_gather_start)
    kernel = compiled["gather_start_fwd_kernel"]
    each = 3 * 900 * dtype.itemsize
    names = dict(enumerate(kernel.function.arg_names))
    loads, stores = (
        {names[k]: v for k, v in kernel.statistics[f"{how}.parameter"].items() if names[k] not in SMALL}
        for how in ("load", "store")
    )
    assert loads == {"x": each}
    assert stores == {"clean": each, "start": each}


def test_the_op_launches_it_and_moves_the_offset(compiled):
    case = cases.case(4, (3, 4, 4), torch.float32, 0)
    state = case.arguments["state"].clone()
    with mock.patch.object(cases.op, "_kernel_takes", return_value=True):
        result = ops.gather_start(**case.arguments | {"state": state})
    cases.assert_same(result, case.run(cases.op.gather_start_reference))
    assert (state - case.arguments["state"]).tolist() == [0, 1]
    assert compiled["gather_start_fwd_kernel"].statistics


SMALL = ("order", "steps", "samples", "state")


def test_single_precision_divisible_by_16_takes_128_bits():
    result = [v for v in VARIANTS.values() if v.types.get("start") == "*fp32" and "length" in v.divisible]
    assert result
    assert all(v.load_bits == v.store_bits == 128 for v in result)
