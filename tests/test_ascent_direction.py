import math

import numpy as np
import pytest
import rows_cases
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended_device import DEVICE, pretended_device
from test_ops import batches, softmax
from tolerances import DTYPES, assert_near

from bt_fast import ops
from bt_fast.ops.ascent_direction import _ascent_direction, ascent_direction_reference

HALF = (torch.float16, torch.bfloat16)
quick = settings(max_examples=40, deadline=None)


def target_of(z):
    return ops.signed_variance(z, torch.zeros(len(z), dtype=torch.int64)).probabilities


@pytest.mark.parametrize("dtype", DTYPES)
@quick
@given(batches(dtypes=[torch.float64], least=1), st.integers(0, 2**31))
def test_it_is_the_kl_gradient_up_to_a_power_of_two_for_each_row(dtype, batch, seed):
    z = batch[0].to(dtype)
    target = 2 * torch.randn(z.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    target = target.softmax(dim=1).to(ops.wide(z).dtype)
    result = ops.ascent_direction(z, target)
    assert result.dtype == dtype
    assert result.isfinite().all()

    exact = torch.tensor(softmax(z.double().numpy())) - target.double()
    size = exact.abs().amax(dim=1, keepdim=True)
    clear = size[:, 0] > 0.2  # larger than the rounding of the difference
    result, exact, size = result.double()[clear], exact[clear], size[clear]
    largest = result.abs().amax(dim=1, keepdim=True)
    assert_near(result / largest, exact / size, dtype)
    assert ((largest >= 1) & (largest <= 2)).all()
    if dtype not in HALF:
        power = (largest / size).log2()
        assert ((power - power.round()).abs() < 1e-4).all()


@quick
@given(st.integers(1, 12), st.integers(2, 30), st.sampled_from(rows_cases.DTYPES), st.integers(0, 2**31))
def test_the_scale_is_exact(n, k, dtype, seed):
    """From the gap in float32 on, the only rounding is that to the logits' dtype."""
    z, _ = rows_cases.batch(n, k, dtype, seed)
    target = rows_cases.target_for(z, seed)
    gap = (target_of(z) - target).double()
    expected = torch.full_like(gap, math.nan)
    for i, row in enumerate(gap):
        if row.isfinite().all():
            largest = row.abs().max().item()
            expected[i] = row * 2.0 ** min(-math.floor(math.log2(largest)), 126) if largest else 0.0
    assert torch.equal(ops.ascent_direction(z, target).nan_to_num(nan=7.0), expected.to(dtype).nan_to_num(nan=7.0))


@pytest.mark.parametrize("exponent", [-149, -148, -130, -127, -126, -125, -30])
def test_gaps_that_are_hardly_there(exponent):
    """With two classes ruled out, their probabilities are 0, so the gap is the target, of any size."""
    gap = 2.0**exponent
    z = torch.tensor([[0.0, -math.inf, -math.inf]])
    result = ops.ascent_direction(z, torch.tensor([[1.0, gap, 0.0]]))
    assert result.tolist() == [[0.0, -(gap * 2.0 ** min(-exponent, 126)), 0.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gap", [1e-5, 1e-7])
def test_of_nearly_equal_distributions_it_is_not_0(dtype, gap):
    z = torch.tensor([[1.0, 0.5, -2.0]], dtype=dtype)
    direction = ops.ascent_direction(z, target_of(z) + torch.tensor([[gap, -gap, 0.0]]))
    assert direction.sign().tolist()[0][:2] == [-1.0, 1.0]


@quick
@given(st.integers(1, 12), st.integers(2, 30), st.sampled_from(rows_cases.DTYPES), st.integers(0, 2**31))
def test_not_scaled_it_is_the_gap(n, k, dtype, seed):
    z, _ = rows_cases.batch(n, k, dtype, seed)
    target = rows_cases.target_for(z, seed)
    expected = (target_of(z) - target).to(dtype)
    assert torch.equal(ops.ascent_direction(z, target, False).nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_at_the_target_it_is_0(dtype):
    z = torch.randn(50, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
    z[0, 1], z[1] = 1e4, -1e4
    assert (ops.ascent_direction(z, target_of(z)) == 0).all()


@pytest.mark.parametrize("k", [1000, 1001, 2**15 + 1, 100_000])
def test_of_many_classes(k):
    z = (1e4 * torch.randn(2, k, generator=torch.Generator().manual_seed(k))).clamp(-1e4, 1e4)
    z[1] *= 1e-4
    target = torch.nn.functional.one_hot(torch.tensor([3, 5]), k).float()
    exact = softmax(z.numpy().astype(np.longdouble)) - target.numpy()
    exact *= 2 ** -np.floor(np.log2(abs(exact).max(axis=1, keepdims=True)))
    assert_near(ops.ascent_direction(z, target), exact.astype(np.float64))


def test_a_target_of_16_bits_is_widened():
    z, target = torch.randn(3, 4).half(), torch.eye(4)[:3]
    assert torch.equal(ops.ascent_direction(z, target.half()), ops.ascent_direction(z, target))


def test_of_nothing():
    assert ops.ascent_direction(torch.empty(0, 5), torch.empty(0, 5)).shape == (0, 5)


# Registration


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(dtype, scaled):
    z, _ = rows_cases.batch(5, 4, dtype, 0, faults=False)
    torch.library.opcheck(_ascent_direction, (z, target_of(z).flip(1), scaled))


def test_compiled_it_is_one_op():
    targets = []

    def backend(graph, _):
        targets.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    z, target = torch.randn(3, 4), torch.eye(4)[:3]
    result = torch.compile(ops.ascent_direction, fullgraph=True, backend=backend)(z, target)
    assert torch.equal(result, ops.ascent_direction(z, target))
    assert targets == [torch.ops.bt_fast.ascent_direction.default]


def test_the_reference_waits_for_nothing():
    with pretended_device():
        z, target = torch.empty(6, 4, device=DEVICE).half(), torch.empty(6, 4, device=DEVICE)
        result, expected = ascent_direction_reference(z, target), ops.ascent_direction(z, target)
    assert (result.shape, result.dtype, result.device) == (expected.shape, expected.dtype, expected.device)


Z = torch.randn(4, 3)


@pytest.mark.parametrize(
    ("z", "target", "error", "message"),
    [
        (Z.long(), Z, TypeError, "logits must be floating point, got torch.int64"),
        (Z[0], Z[0], ValueError, r"logits must have shape \[m, K\].*got \[3\]"),
        (Z, Z.long(), TypeError, "target must be floating point, got torch.int64"),
        (Z, Z[:3], ValueError, r"target must have shape \[4, 3\], got \[3, 3\]"),
        (Z, Z.to(DEVICE), ValueError, "target must be on cpu.*meta"),
    ],
)
def test_an_error_names_the_argument(z, target, error, message):
    with pytest.raises(error, match=message):
        ops.ascent_direction(z, target)
