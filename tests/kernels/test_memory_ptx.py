"""The compiled kernels of the memory, executed on the CPU: layouts, predicates, vectors and rounding as on a GPU."""

from unittest import mock

import memory_cases as cases
import pytest
import torch

pytest.importorskip("triton")

from compiled_kernel import compiled_kernels, moved_bytes

from bt_fast import ops
from bt_fast.kernels import recall as recall_kernels
from bt_fast.kernels import remember as remember_kernels

SAME, LARGER, ODD, PLAIN = cases.SHAPES[0], cases.SHAPES[2], cases.SHAPES[3], ((7,), (7,))
BARE = {"ordered": False, "counted": False}
ALL = {"placed": True, "numbered": True, "own": True}


@pytest.fixture(params=[80, 90])
def compiled(request):
    """Replaces the kernels by their compiled versions, returned as a dict by name."""
    recalling, remembering = (compiled_kernels(file, request.param) for file in (recall_kernels, remember_kernels))
    with mock.patch.multiple(recall_kernels, **recalling), mock.patch.multiple(remember_kernels, **remembering):
        yield recalling | remembering


@pytest.mark.parametrize(
    ("m", "shapes", "dtype", "stored", "options"),
    [
        (4, LARGER, torch.float32, torch.int8, {"placed": True}),
        (3, LARGER, torch.bfloat16, torch.float16, ALL),
        (3, LARGER, torch.float32, torch.int8, ALL | {"last": True}),
        (3, SAME, torch.float16, torch.float32, {"last": True}),
        (3, ODD, torch.float32, torch.float16, {"own": True}),
        (3, PLAIN, torch.float32, torch.int8, BARE | {"noise": 0.0}),
        (3, LARGER, torch.float32, torch.float16, {"placed": True, "l2": True}),
        (3, ODD, torch.float16, torch.float32, ALL | {"l2": True}),
        (3, PLAIN, torch.bfloat16, torch.float16, BARE | {"l2": True, "noise": 0.0}),
    ],
)
def test_recall(compiled, m, shapes, dtype, stored, options):
    case = cases.recall_case(m, shapes, dtype, stored, 0, **options)
    expected = case.recall(cases.recall_op.recall_reference)
    cases.same_start(case.recall(cases.recall_op.launch_recall), expected, options.get("l2"))


@pytest.mark.parametrize(
    ("m", "shapes", "dtype", "stored", "options"),
    [
        (4, LARGER, torch.float32, torch.int8, {"placed": True}),
        (3, LARGER, torch.bfloat16, torch.float16, {"placed": True, "own": True, "last": True}),
        (3, SAME, torch.float16, torch.float32, {"last": True}),
        (3, ODD, torch.float32, torch.int8, {"placed": True, "kept": False}),
        (3, ODD, torch.float32, torch.float16, {"own": True, "l2": True}),
        (3, PLAIN, torch.bfloat16, torch.int8, BARE),
    ],
)
def test_remember(compiled, m, shapes, dtype, stored, options):
    case = cases.remember_case(m, shapes, dtype, stored, 0, **options)
    expected = case.remember(cases.remember_op.remember_reference)
    cases.same_memory(case.remember(cases.remember_op.launch_remember), expected)


def test_each_element_is_read_and_written_once(compiled):
    cases.recall_case(3, LARGER, torch.float32, torch.int8, 0).recall(cases.recall_op.launch_recall)
    loads, stores = moved_bytes(compiled["recall_linf_fwd_kernel"])
    elements = 3 * 3 * 16 * 16
    # of the three samples one has no steps, and nothing is remembered of another
    assert (loads["x"], loads["memory"]) == (4 * elements, elements // 3)
    assert (stores["clean"], stores["start"]) == (4 * elements, 4 * elements)
    cases.remember_case(3, LARGER, torch.float32, torch.int8, 0).remember(cases.remember_op.launch_remember)
    loads, stores = moved_bytes(compiled["remember_fwd_kernel"])
    assert (loads["x_adv"], loads["clean"]) == (4 * elements // 3 * 2, 4 * elements // 3 * 2)
    assert stores == {"memory": elements}


def test_the_ops_launch_them(compiled):
    case = cases.recall_case(4, LARGER, torch.float32, torch.int8, 0, placed=True)
    given = dict(case.arguments)
    limits = ops.Limits(*(given.pop(name) for name in ("epsilon", "lower", "upper", "l2")))
    placed = tuple(given.pop(name) for name in ("top", "left", "mirrored"))
    state = given["state"].clone()
    given = {name: value for name, value in given.items() if name != "epsilons"} | {"state": state, "placed": placed}
    with mock.patch.object(cases.recall_op, "_kernel_takes", return_value=True):
        result = ops.recall(limits=limits, **given)
    cases.same_start(result, case.recall(cases.recall_op.recall_reference))
    assert (state - case.arguments["state"]).tolist() == [0, 1]
    assert compiled["recall_linf_fwd_kernel"].statistics
