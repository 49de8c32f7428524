"""Runs on a GPU the kernel tests that the other files of this folder run without one: `pytest -m cuda`."""

import importlib

import assign_cases
import divergence_cases
import gather_start_cases
import memory_cases
import on_device as elsewhere
import pgd_cases
import pytest
import rows_cases
import torch

from bt_fast import ops
from bt_fast.ops import availability, divergence
from bt_fast.ops.ascent_direction import ascent_direction_reference
from bt_fast.ops.order_by_steps import order_reference
from bt_fast.ops.pgd_l2_step import l2_reference, pgd_l2_step_
from bt_fast.ops.pgd_step import linf_reference, pgd_linf_step_
from bt_fast.ops.signed_variance import signed_variance_reference
from bt_fast.ops.update_fraction import update_fraction_reference

pytest.importorskip("triton")
DEVICE = "cuda"
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(3, 32, 32), (1, 28, 28), (3, 15, 37), (3, 96, 96), (7,)]
assign = importlib.import_module("bt_fast.ops.assign_steps")  # the op of this name hides the file


@pytest.fixture(autouse=True)
def in_kernels():
    """Forbids ops to fall back to plain torch, which would be compared with itself."""
    yield
    assert availability.why_plain(torch.device(DEVICE, torch.cuda.current_device())) is None


def on_device(run):
    """Returns `run` on the GPU, with arguments and results on the host."""
    return elsewhere.on_device(run, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("last", "own"), [(False, False), (True, False), (False, True)])
def test_linf(shape, dtype, last, own):
    case = pgd_cases.case(33, shape, dtype, 0, last=last, counts=True, flags=True, own=own)
    pgd_cases.assert_same(case.run(on_device(pgd_linf_step_)), case.run(linf_reference))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("seeded", "own"), [(False, False), (True, False), (True, True)])
def test_l2(shape, dtype, seeded, own):
    case = pgd_cases.l2_case(33, shape, dtype, 0, counts=True, flags=True, seeded=seeded, own=own)
    pgd_cases.assert_near(case.run(on_device(pgd_l2_step_)), case.run(l2_reference))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("noise", ["normal", "uniform"])
def test_gather_start(shape, dtype, noise):
    given = gather_start_cases.case(33, shape, dtype, 0, noise=noise, bounded=True).arguments
    expected = gather_start_cases.op.gather_start_reference(**given)
    state = given["state"].clone()
    result = on_device(ops.gather_start)(**given | {"state": state})
    gather_start_cases.assert_same(result, expected)
    assert (state - given["state"]).tolist() == [0, 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", memory_cases.STORED)
@pytest.mark.parametrize("shapes", memory_cases.SHAPES)
@pytest.mark.parametrize("l2", [False, True])
def test_recall_and_remember(shapes, dtype, stored, l2):
    options = {"placed": True, "own": True, "l2": l2}
    case = memory_cases.recall_case(33, shapes, dtype, stored, 0, **options)
    expected = memory_cases.recall_op.recall_reference(**case.arguments)
    given = case.arguments | {"state": case.arguments["state"].clone()}
    memory_cases.same_start(on_device(memory_cases.recall_op._recall)(**given), expected, l2)
    given = memory_cases.remember_case(33, shapes, dtype, stored, 0, **options).arguments
    expected, result = given["memory"].clone(), given["memory"].clone()
    memory_cases.remember_op.remember_reference(**given | {"memory": expected})
    on_device(memory_cases.remember_op._remember)(**given | {"memory": result})
    memory_cases.same_memory(result, expected)


@pytest.mark.parametrize("m", [0, 1, 128, 1025, 8192, 8193, 2**17, 2**20])
@pytest.mark.parametrize("kind", assign_cases.VALUES)
def test_assign_steps(m, kind):
    case = assign_cases.case(m, 0, kind=kind, f_r=1 / 3, sound=True)
    expected = assign_cases.run(assign.assign_reference, case)
    assign_cases.assert_same(assign_cases.run(on_device(ops.assign_steps), case), expected)


@pytest.mark.parametrize("m", [0, 1, 128, 8193, 2**20])
def test_order_by_steps(m):
    steps = torch.randint(0, 12, (m,), generator=torch.Generator().manual_seed(0))
    for result, expected in zip(on_device(ops.order_by_steps)(steps, 12), order_reference(steps, 12), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", rows_cases.LAYOUTS)
@pytest.mark.parametrize(("m", "k"), [(128, 10), (128, 100), (33, 1000), (5, 100_000)])
def test_rows_of_logits(m, k, layout, dtype):
    z, y = rows_cases.batch(m, k, dtype, 0, layout=layout)
    rows_cases.assert_same_mining(on_device(ops.signed_variance)(z, y), signed_variance_reference(z, y))
    target = rows_cases.target_for(z, 0)
    for scaled in (True, False):
        result = on_device(ops.ascent_direction)(z, target, scaled)
        rows_cases.assert_same_direction(result, ascent_direction_reference(z, target, scaled), ulps=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sound", [False, True])
@pytest.mark.parametrize(("m", "k"), [(128, 10), (8193, 10), (300, 1000)])
def test_update_fraction(m, k, sound, dtype):
    z, y = rows_cases.batch(m, k, dtype, 0, faults=not sound, strays=not sound)
    result, expected = rows_cases.state(), rows_cases.state()
    on_device(ops.update_fraction_)(*result, z, y, 0.8, 0.9)
    update_fraction_reference(*expected, z, y, 0.8, 0.9)
    assert [v.item() for v in result] == [v.item() for v in expected]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", divergence_cases.LOSSES)
@pytest.mark.parametrize(("n", "classes"), [(128, 10), (33, 1000), (3, 32_769)])
def test_losses(name, n, classes, dtype):
    case = divergence_cases.case(name, n, classes, dtype, 0, special=True)
    run = on_device(getattr(divergence, f"{name}_rows"))
    divergence_cases.assert_right(case, run(*case.arguments))


@pytest.mark.parametrize("strides", ["apart", "columns", "one"])
@pytest.mark.parametrize("name", divergence_cases.LOSSES)
def test_losses_of_strided_rows(name, strides):
    case = divergence_cases.case(name, 33, 1000, torch.float32, 0, special=True, strides=strides)
    divergence_cases.assert_right(case, on_device(getattr(divergence, f"{name}_rows"))(*case.arguments))


def test_a_replayed_graph_draws_new_noise_and_moves_by_the_device_s_own_counter():
    x = torch.rand(8, 3, 32, 32, device=DEVICE)
    order, steps = torch.arange(8, device=DEVICE), torch.tensor([2, 2, 1, 1, 1, 0, 0, 0], device=DEVICE)
    state, t = torch.tensor([5, 0], device=DEVICE), torch.zeros((), dtype=torch.int64, device=DEVICE)
    grad, size = torch.ones_like(x), torch.full((8,), 0.01, device=DEVICE)
    out = torch.empty_like(x)

    def work():
        clean, start = ops.gather_start(x, order, steps, state, "normal", 0.001)
        ops.linf_step_(start, grad, clean, size, 0.03, 0.0, 1.0, steps=steps, step=t)
        out.copy_(start)
        t.add_(1)

    work()  # a first launch before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    result = []
    for _ in range(2):
        t.zero_()
        graph.replay()
        result.append(out.clone())
    assert not torch.equal(result[0][:5], result[1][:5])
    assert torch.equal(result[0][5:], x[5:])
    assert state.tolist() == [5, 3]
