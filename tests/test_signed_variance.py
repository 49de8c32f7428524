import math

import numpy as np
import pytest
import rows_cases
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended_device import DEVICE, pretended_device
from tolerances import DTYPES

from bt_fast import ops
from bt_fast.ops.signed_variance import _signed_variance, signed_variance_reference

quick = settings(max_examples=40, deadline=None)
CLASSES = [2, 3, 10, 100, 1000, 1001, 2**15 + 1, 100_000]


def literally(z, y):
    """Computes SVar, correct, probabilities and unfit, row by row in 80 bits."""
    results = []
    for row, label in zip(z.double().numpy().astype(np.longdouble), y.tolist(), strict=True):
        k = len(row)
        unfit = 2 * (not 0 <= label < k)
        if np.isnan(row).any() or row.max() in (np.inf, -np.inf):
            results.append((math.nan, False, np.full(k, math.nan), unfit + 1))
            continue
        first = int(np.flatnonzero(row == row.max())[0])
        e = np.exp(row - row.max())
        p = e / e.sum()
        variance = ((p - np.longdouble(1) / k) ** 2).mean()
        results.append((variance if first == label else -variance, first == label, p, unfit))
    return [np.array(column) for column in zip(*results, strict=True)]


def assert_accurate(result, expected, k):
    """Compares to 1e-6 of each number, and to 1e-24/K² where a row is nearly uniform."""
    svar, correct, probabilities, unfit = expected
    assert result.correct.tolist() == correct.tolist()
    assert result.unfit.tolist() == unfit.tolist()
    for a, b, least in ((result.svar, svar, 1e-24 / k**2), (result.probabilities, probabilities, 1e-45)):
        a = a.numpy().astype(np.longdouble)
        assert (np.isnan(a) == np.isnan(b)).all()
        number = ~np.isnan(b)
        assert (abs(a - b)[number] <= 1e-6 * abs(b[number]) + least).all()


@quick
@given(
    st.integers(1, 12),
    st.integers(2, 40),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
    st.sampled_from(rows_cases.LAYOUTS),
)
def test_signed_variance_is_its_equation(m, k, dtype, seed, layout):
    z, y = rows_cases.batch(m, k, dtype, seed, layout=layout)
    result = ops.signed_variance(z, y)
    assert (
        result.svar.dtype == result.probabilities.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    )
    assert_accurate(result, literally(z, y), k)


@pytest.mark.parametrize("scale", [1e-7, 1e-4, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("k", CLASSES)
def test_accuracy(k, scale):
    z = (scale * torch.randn(2, k, generator=torch.Generator().manual_seed(k))).clamp(-1e4, 1e4)
    z[1] += 1.0
    y = z.argmax(dim=1) * torch.tensor([1, 0])
    assert_accurate(ops.signed_variance(z, y), literally(z, y), k)


@pytest.mark.parametrize("gap", [5.5, 8.001, 11.0])
def test_accuracy_where_a_rounding_would_repeat_itself_in_every_class(gap):
    z = torch.full((1, 100_000), 1.3)
    z[0, 7] += gap
    y = torch.tensor([7])
    assert_accurate(ops.signed_variance(z, y), literally(z, y), 100_000)


def test_a_uniform_row_has_variance_0_and_its_class_keeps_the_sign():
    for k in range(2, 12):
        svar, correct, _, _ = ops.signed_variance(torch.full((2, k), 3.0), torch.tensor([0, k - 1]))
        assert svar.tolist() == [0.0, 0.0]
        assert svar.signbit().tolist() == [False, True]
        assert correct.tolist() == [True, False]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_without_a_softmax(bad, dtype):
    z = torch.tensor([[0.0, bad], [0.0, 1.0], [-math.inf, 1.0], [-math.inf, -math.inf]], dtype=dtype)
    svar, correct, probabilities, unfit = ops.signed_variance(z, torch.tensor([1, 1, 1, 0]))
    assert svar.isnan().tolist() == [True, False, False, True]
    assert probabilities.isnan().all(dim=1).tolist() == [True, False, False, True]
    assert correct.tolist() == [False, True, True, False]
    assert unfit.tolist() == [1, 0, 0, 1]


def test_a_label_that_is_no_class():
    z = torch.tensor([[0.0, 1.0]] * 4 + [[0.0, math.nan]])
    _, correct, _, unfit = ops.signed_variance(z, torch.tensor([1, -1, 2, 2**32 + 1, 2]))
    assert correct.tolist() == [True, False, False, False, False]
    assert unfit.tolist() == [0, 2, 2, 2, 3]


def test_of_nothing():
    result = ops.signed_variance(torch.empty(0, 5), torch.empty(0, dtype=torch.int64))
    assert [list(t.shape) for t in result] == [[0], [0], [0, 5], [0]]


# Registration


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(dtype):
    torch.library.opcheck(_signed_variance, rows_cases.batch(5, 4, dtype, 0, faults=False))


def test_compiled_it_is_one_op():
    targets = []

    def backend(graph, _):
        targets.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def mine(z, y):
        return tuple(ops.signed_variance(z, y))

    torch._dynamo.reset()
    z, y = rows_cases.batch(5, 4, torch.float32, 0, faults=False)
    compiled = torch.compile(mine, fullgraph=True, backend=backend)(z, y)
    assert all(torch.equal(a, b) for a, b in zip(compiled, mine(z, y), strict=True))
    assert [t for t in targets if "getitem" not in str(t)] == [torch.ops.bt_fast.signed_variance.default]


def test_the_reference_waits_for_nothing():
    with pretended_device():
        z, y = torch.empty(6, 4, device=DEVICE), torch.empty(6, dtype=torch.int64, device=DEVICE)
        result, expected = signed_variance_reference(z, y), ops.signed_variance(z, y)
    assert [(t.shape, t.dtype, t.device) for t in result] == [(t.shape, t.dtype, t.device) for t in expected]


Z, Y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("z", "y", "error", "message"),
    [
        (Z.long(), Y, TypeError, "logits must be floating point, got torch.int64"),
        (Z[0], Y, ValueError, r"logits must have shape \[m, K\].*got \[3\]"),
        (Z[:, :1], Y, ValueError, r"logits must have shape .*K >= 2.*got \[4, 1\]"),
        (Z, Y.int(), TypeError, "labels must be torch.int64, got torch.int32"),
        (Z, Y[:3], ValueError, r"labels must have shape \[4\], got \[3\]"),
        (Z, Y.to(DEVICE), ValueError, "labels must be on cpu.*meta"),
    ],
)
def test_an_error_names_the_argument(z, y, error, message):
    with pytest.raises(error, match=message):
        ops.signed_variance(z, y)
