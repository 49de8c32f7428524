import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import DTYPES, TOLERANCES, assert_near

from bt_fast import ops

quick = settings(max_examples=40, deadline=None)
fractions = st.one_of(st.sampled_from([0.0, 1e-12, 0.5, 1.0]), st.floats(0.0, 1.0))


@st.composite
def batches(draw, dtypes=DTYPES, least=0):
    """Draws logits [m, K] with ties between classes and samples, saturated rows, and all kinds of labels."""
    m, k = draw(st.integers(least, 12)), draw(st.integers(2, 6))
    entry = draw(st.sampled_from([st.integers(-2, 2), st.floats(-8, 8, width=16), st.sampled_from([-1e4, 0.0, 1e4])]))
    logits = draw(st.lists(st.lists(entry, min_size=k, max_size=k), min_size=m, max_size=m))
    dtype = draw(st.sampled_from(dtypes))
    z = torch.tensor(logits, dtype=torch.float64).view(m, k).to(dtype)
    best = [row.index(max(row)) for row in z.tolist()]
    luck = draw(st.sampled_from(["any", "all correct", "all wrong"]))
    shifts = {
        "any": st.integers(0, k - 1),
        "all correct": st.just(0),
        "all wrong": st.integers(1, k - 1),
    }[luck]
    y = [(b + draw(shifts)) % k for b in best]
    return z, torch.tensor(y, dtype=torch.int64)


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


# Steps


def images(m, dtype, seed=0, shape=(2, 3, 3)):
    """Returns clean images, starts near them, gradients with some zeros, and a step size for each sample."""
    g = torch.Generator().manual_seed(seed)
    clean = torch.rand(m, *shape, generator=g, dtype=torch.float64).mul(1.2).sub(0.1).clamp(0, 1)
    start = clean + 0.02 * torch.randn(clean.shape, generator=g, dtype=torch.float64)
    grad = torch.randn(clean.shape, generator=g, dtype=torch.float64)
    grad[grad.abs() < 0.2] = 0.0
    sizes = 0.001 + 0.05 * torch.rand(m, generator=g, dtype=torch.float64)
    return [t.to(dtype) for t in (clean, start, grad, sizes)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [0, 1, 5])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-0.5, 0.8)])
def test_linf_step(dtype, m, bounds):
    lower, upper = bounds
    clean, x, grad, sizes = images(m, dtype)
    moved = x.double() + sizes.double().view(-1, 1, 1, 1) * grad.double().sign()
    expected = moved.clamp(clean.double() - 0.031, clean.double() + 0.031).clamp(lower, upper)
    ops.linf_step_(x, grad, clean, sizes, 0.031, lower, upper)
    assert_near(x, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [0, 1, 5])
@pytest.mark.parametrize("epsilon", [0.05, 100.0])
def test_l2_step(dtype, m, epsilon):
    clean, x, grad, sizes = images(m, dtype)
    if m > 1:
        grad[1] = 0.0
    stand_in = torch.full_like(grad, 0.5)
    expected = x.double().clone()
    for i in range(m):
        g = grad[i].double()
        direction = g / g.norm() if g.norm() > 0 else stand_in[i].double()
        delta = (expected[i] + sizes[i].double() * direction).clamp(0, 1) - clean[i].double()
        # torch.renorm, which the TRADES code uses, adds 1e-7 like this
        expected[i] = clean[i].double() + delta * (epsilon / (delta.norm() + 1e-7) if delta.norm() > epsilon else 1.0)
    ops.l2_step_(x, grad, clean, sizes, epsilon, 0.0, 1.0, stand_in)
    assert_near(x, expected.clamp(0, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-3, 3e4])
def test_l2_step_takes_any_finite_gradient(dtype, size):
    clean = torch.full((1, 64), 0.5, dtype=dtype)
    x, stand_in = clean.clone(), torch.full_like(clean, math.nan)
    ops.l2_step_(x, torch.full_like(clean, size), clean, torch.ones(1, dtype=dtype), 10.0, 0.0, 1.0, stand_in)
    assert_near(x, torch.full((1, 64), 0.625))


# The divergence of the update


@quick
@given(batches(least=1), st.randoms())
def test_trades_kl_is_kl_div_in_double_precision(batch, random):
    z = batch[0]
    shift = torch.tensor([[random.uniform(-3, 3) for _ in row] for row in z.tolist()]).view(z.shape)
    q = (z.double() + shift).to(z.dtype)
    ours = [t.clone().requires_grad_() for t in (q, z)]
    exact = [t.double().clone().requires_grad_() for t in (q, z)]
    value = ops.trades_kl(*ours)
    log_p = exact[1].log_softmax(dim=1)
    reference = F.kl_div(exact[0].log_softmax(dim=1), log_p, reduction="sum", log_target=True)
    assert_near(value, reference.detach(), z.dtype)
    value.backward()
    reference.backward()
    for a, b in zip(ours, exact, strict=True):
        assert a.grad.isfinite().all()
        assert_near(a.grad, b.grad, z.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("adversarial", "clean"),
    [
        ([1e4, -1e4, 0.0], [1e4, -1e4, 0.0]),
        ([-1e4, 1e4, 0.0], [1e4, -1e4, 0.0]),
        ([0.0, -math.inf, 1.0], [0.0, -math.inf, 0.5]),
        ([0.0, 1.0, 1.0], [0.0, -math.inf, 0.5]),
        ([0.0, 1.0, -math.inf], [1e4, -1e4, -1e4]),
    ],
)
def test_trades_kl_of_saturated_rows_is_finite(dtype, adversarial, clean):
    q, z = (torch.tensor([row], dtype=dtype, requires_grad=True) for row in (adversarial, clean))
    value = ops.trades_kl(q, z)
    value.backward()
    assert value.isfinite()
    assert value >= 0
    assert q.grad.isfinite().all()
    assert z.grad.isfinite().all()


def test_trades_kl_gradients_numerically():
    torch.manual_seed(0)
    q, z = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(ops.trades_kl, (q, z))


@pytest.mark.parametrize("dtype", DTYPES)
def test_trades_kl_of_nothing_and_of_equal_rows_is_0(dtype):
    z = torch.randn(3, 4).to(dtype).requires_grad_()
    assert ops.trades_kl(z[:0], z[:0]).item() == 0.0
    assert abs(ops.trades_kl(z, z.detach()).item()) <= TOLERANCES[dtype]["atol"]


# Registration


REGISTERED = sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith("bt_fast::"))


@pytest.mark.parametrize("name", REGISTERED)
def test_no_registered_op_has_a_default(name):
    """Some versions of torch drop such arguments from the call, and then miss the one that the op changes."""
    schema = getattr(torch.ops.bt_fast, name.removeprefix("bt_fast::")).default._schema
    assert [a.name for a in schema.arguments if a.has_default_value()] == []


def test_every_op_is_registered():
    assert len(REGISTERED) == 13
