"""Generates rows of logits and labels, including hard cases, for all tests of the ops over rows of logits."""

import contextlib
import math

import torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["end to end", "apart", "apart by 16", "turned", "one for all"]
SOUND = ["plain", "large", "near", "uniform", "ties", "saturated", "zeros of both signs", "ruled out", "one class left"]
FAULTS = ["NaN", "+Inf", "NaN beside +Inf", "nothing but -Inf", "nothing but NaN"]


def row(kind, k, g):
    z = torch.randn(k, generator=g)
    place = torch.randint(k, (2,), generator=g)
    if kind == "large":
        z = (z * 1e4).clamp(-1e4, 1e4)
    elif kind == "near":
        z = 1 + z * 1e-4
    elif kind == "uniform":
        z = z[:1].expand(k).clone()
    elif kind == "ties":
        z = torch.randint(-1, 2, (k,), generator=g).float()
    elif kind == "saturated":
        z = torch.full((k,), -1e4)
        z[place] = 1e4
    elif kind == "zeros of both signs":
        z = torch.zeros(k).copysign(z)
    elif kind == "ruled out":
        z[z < 0] = -math.inf
        z[place] = 0.5
    elif kind == "one class left":
        z[:] = -math.inf
        z[place[0]] = -3.0
    elif kind == "NaN":
        z[place[0]] = math.nan
    elif kind == "+Inf":
        z[place[0]] = math.inf
    elif kind == "NaN beside +Inf":
        z[place[0]], z[place[1]] = math.nan, math.inf
    elif kind == "nothing but -Inf":
        z[:] = -math.inf
    elif kind == "nothing but NaN":
        z[:] = math.nan
    return z


def batch(m, k, dtype, seed, *, layout="end to end", faults=True, strays=True):
    """Returns logits [m, k] with all kinds of rows, shuffled, and labels: right, of a later maximum, wrong, invalid."""
    g = torch.Generator().manual_seed(seed)
    kinds = SOUND + (FAULTS if faults else [])
    turn = torch.randperm(len(kinds), generator=g).tolist()
    z = torch.stack([row(kinds[turn[i % len(kinds)]], k, g) for i in range(m)] or [torch.empty(0, k)]).view(m, k)
    z = z.to(dtype)
    best = z.nan_to_num(nan=math.inf).argmax(dim=1)
    last = k - 1 - z.nan_to_num(nan=math.inf).flip(1).argmax(dim=1)
    other = torch.randint(k, (m,), generator=g)
    none = torch.tensor([-1, k, -(2**40), 2**32])[torch.randint(4, (m,), generator=g)]
    luck = torch.randint(5 if strays else 4, (m,), generator=g)
    y = torch.stack([best, best, last, other, none])[luck, torch.arange(m)]
    return laid(z, layout), y


def laid(z, layout):
    """Returns the same values with this `layout` in memory; memory between the rows holds NaN."""
    m, k = z.shape
    if layout == "turned":
        return z.t().contiguous().t()
    if layout == "one for all":
        return z[:1].expand(m, k)
    if layout == "end to end":
        return z
    stride = -(-(k + 5) // 16) * 16 + (layout == "apart")
    wide = torch.full((m, stride), math.nan, dtype=z.dtype)
    wide[:, :k] = z
    return wide[:, :k]


@contextlib.contextmanager
def poisoned():
    """Fills the results of `torch.empty` with NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        assert (torch.empty(3, dtype=torch.uint8) == 255).all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_same_mining(result, expected):
    """Compares two results of `signed_variance`: SVar and probabilities to an ulp of float32, with the sign of 0."""
    for a, b in zip(result, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
    (svar, correct, probabilities, unfit), b = result, expected
    assert torch.equal(correct, b[1])
    assert torch.equal(unfit, b[3])
    assert_ulp(probabilities, b[2])
    assert_ulp(svar, b[0], atol=1e-30)
    number = ~svar.isnan()
    assert torch.equal(svar.signbit()[number], b[0].signbit()[number])


def assert_ulp(a, b, atol=0.0):
    torch.testing.assert_close(a, b, rtol=1.2e-7, atol=atol, equal_nan=True)


def state(f_r=0.3, faults=2):
    return torch.tensor(f_r, dtype=torch.float64), torch.tensor(faults)


def target_for(z, seed):
    """Returns targets [n, k] for these logits: their softmax, others near and far, one-hot, subnormal gaps, and NaN."""
    g = torch.Generator().manual_seed(seed)
    n, k = z.shape
    z = z.double().nan_to_num(0.0, 0.0, -math.inf)  # a number even where the row has no softmax
    own = z.softmax(dim=1).float()
    near = (z + 1e-5 * torch.randn(n, k, generator=g)).softmax(dim=1).float()
    far = torch.randn(n, k, generator=g).softmax(dim=1)
    hot = torch.nn.functional.one_hot(torch.randint(k, (n,), generator=g), k).float()
    tiny = own + 1e-41 * torch.randint(-3, 4, (n, k), generator=g).float()
    broken = torch.where(torch.rand(n, k, generator=g) < 0.2, math.nan, far)
    choice = torch.randint(6, (n,), generator=g)
    return torch.stack([own, near, far, hot, tiny, broken])[choice, torch.arange(n)]


def assert_same_direction(result, expected, ulps=0):
    """Compares two results of `ascent_direction`: bit for bit where the softmax is the same, but for the sign of 0."""
    assert result.dtype == expected.dtype
    eps = torch.finfo(result.dtype).eps
    torch.testing.assert_close(result, expected, rtol=ulps * eps, atol=0, equal_nan=True)
