import math

import pytest
import rows_cases
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended_device import DEVICE, pretended_device
from test_ops import batches, fractions
from tolerances import DTYPES

from bt_fast import ops
from bt_fast.ops.update_fraction import _update_fraction_, update_fraction_reference

quick = settings(max_examples=60, deadline=None)


@quick
@given(batches(least=1), fractions, st.floats(0.01, 1.0), st.floats(0.0, 0.99))
def test_update_fraction_is_its_equation(batch, f_r, gamma, p):
    z, y = batch
    result, faults = rows_cases.state(f_r, 3)
    ops.update_fraction_(result, faults, z, y, gamma, p)
    hits = sum(row.index(max(row)) == label for row, label in zip(z.tolist(), y.tolist(), strict=True))
    assert result.item() == p * f_r + (1 - p) * gamma * (hits / len(z))
    assert faults.item() == 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("row", "label"),
    [
        ([0.0, math.nan, 1.0], 1),
        ([0.0, math.inf, 1.0], 1),
        ([-math.inf] * 3, 0),
        ([0.0, 1.0, 2.0], -1),
        ([0.0, 1.0, 2.0], 3),
    ],
)
def test_a_fault_leaves_the_fraction_and_is_counted_once(dtype, row, label):
    z = torch.tensor([[1.0, 0.0, 0.0], row, row, [-math.inf, 0.0, 0.0]]).to(dtype)
    result, faults = rows_cases.state(0.3, 2)
    ops.update_fraction_(result, faults, z, torch.tensor([0, label, label, 1]), 0.8, 0.9)
    assert (result.item(), faults.item()) == (0.3, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_infinities_of_excluded_classes_and_the_largest_numbers_are_no_fault(dtype):
    largest = torch.finfo(dtype).max
    z = torch.tensor([[largest, largest, -largest], [largest, -largest, -math.inf]], dtype=dtype)
    result, faults = rows_cases.state(0.0, 0)
    ops.update_fraction_(result, faults, z, torch.tensor([0, 0]), 0.8, 0.9)
    assert (result.item(), faults.item()) == ((1 - 0.9) * 0.8, 0)


# Registration


def test_opcheck():
    torch.library.opcheck(_update_fraction_, (*rows_cases.state(), *rows_cases.batch(5, 4, torch.half, 0), 0.8, 0.9))


def test_compiled_it_is_one_op():
    targets = []

    def backend(graph, _):
        targets.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def move(f_r, faults, z, y):
        ops.update_fraction_(f_r, faults, z, y, 0.8, 0.9)

    torch._dynamo.reset()
    batch = rows_cases.batch(5, 4, torch.float32, 0, faults=False, strays=False)
    plain, compiled = rows_cases.state(), rows_cases.state()
    move(*plain, *batch)
    torch.compile(move, fullgraph=True, backend=backend)(*compiled, *batch)
    assert plain == compiled
    assert targets == [torch.ops.bt_fast.update_fraction_.default]


def test_the_reference_waits_for_nothing():
    f_r, faults = (t.to(DEVICE) for t in rows_cases.state())
    with pretended_device():
        z, y = torch.empty(6, 4, device=DEVICE), torch.empty(6, dtype=torch.int64, device=DEVICE)
        update_fraction_reference(f_r, faults, z, y, 0.8, 0.9)


GIVEN = dict(zip(("robust_fraction", "unreported_faults"), rows_cases.state(), strict=True)) | {
    "logits": torch.randn(4, 3),
    "labels": torch.tensor([0, 1, 2, 0]),
}


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("logits", torch.ones(4, 3).long(), TypeError),
        ("logits", torch.ones(0, 3), ValueError),
        ("logits", torch.ones(4, 1), ValueError),
        ("labels", torch.ones(4), TypeError),
        ("labels", torch.ones(3, dtype=torch.int64), ValueError),
        ("labels", torch.ones(4, dtype=torch.int64, device=DEVICE), ValueError),
        ("robust_fraction", torch.tensor(0.3), TypeError),
        ("robust_fraction", torch.zeros(1, dtype=torch.float64), ValueError),
        ("unreported_faults", torch.tensor(0, dtype=torch.int32), TypeError),
        ("unreported_faults", torch.zeros((), dtype=torch.int64, device=DEVICE), ValueError),
    ],
)
def test_an_error_names_the_argument(name, value, error):
    with pytest.raises(error, match=rf"^{name} must"):
        ops.update_fraction_(**GIVEN | {name: value}, gamma=0.8, momentum=0.9)
