"""The compiled kernels, executed on the CPU, have layouts, predicates, reductions and rounding as on a GPU."""

from unittest import mock

import divergence_cases
import pytest
import torch
from divergence_cases import LOSSES, assert_right

pytest.importorskip("triton")

from compiled_kernel import compiled_kernels

from bt_fast.kernels import divergence as kernels
from bt_fast.ops import divergence as ops


@pytest.fixture(params=[80, 90])
def compiled(request):
    """Replaces the kernels by their compiled versions, returned as a dict by name."""
    stand_ins = compiled_kernels(kernels, request.param)
    with mock.patch.multiple(kernels, **stand_ins):
        yield stand_ins


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_whole_rows(compiled, name, dtype):
    sizes = [(7, 10, "rows"), (4, 32, "apart"), (3, 2, "columns")] + [(2, 200, "one")] * (dtype == torch.float32)
    for seed, (n, classes, strides) in enumerate(sizes):
        case = divergence_cases.case(name, n, classes, dtype, seed, special=True, strides=strides)
        assert_right(case, case.run("launch"))


@pytest.mark.parametrize("name", LOSSES)
def test_rows_in_blocks(compiled, name):
    case = divergence_cases.case(name, 2, 2500, torch.float32, 0, special=True, strides="apart")
    assert_right(case, case.run("launch"))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("classes", "reads"), [(10, 1), (2049, 3)])
def test_bytes_read_and_written(compiled, name, classes, reads):
    n = 3
    case = divergence_cases.case(name, n, classes, torch.float32, 0)
    case.run("launch")
    (kernel,) = [kernel for kernel in compiled.values() if kernel.statistics]
    names = kernel.function.arg_names
    size, inputs = 4 * n * classes, len(case.logits)
    loads, stores = (
        {names[k]: v for k, v in kernel.statistics[f"{how}.parameter"].items() if names[k] not in ("labels", "loss")}
        for how in ("load", "store")
    )
    assert loads == dict.fromkeys(names[:inputs], reads * size)
    assert stores == {name: size for name in names if "grad" in name}


def test_one_launch_whatever_the_number_of_rows(compiled):
    launches = []
    for name in LOSSES:
        case = divergence_cases.case(name, 70, 2, torch.float32, 0)
        with mock.patch.object(divergence_cases.divergence, "_launch", lambda *a: launches.append(a[0].function)):
            case.run("launch")
    assert len(launches) == len(set(launches)) == 3


@pytest.mark.parametrize(("classes", "whole"), [(2, True), (32, True), (33, True), (1024, True), (1025, False)])
def test_rows_that_fit_into_a_block_are_held_whole(classes, whole):
    for logits in (2, 3):
        block, rows, warps = ops.tile(classes, logits)
        assert ops.whole(classes, logits) == whole
        assert block >= classes or not whole
        assert rows * block % (32 * warps) == 0
