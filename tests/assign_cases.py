"""Generates minibatches, including hard cases, for all tests of `assign_steps` and of its order."""

from contextlib import contextmanager
from unittest import mock

import torch

VALUES = ["normal", "ties", "all equal", "extreme", "special", "close"]
POLICIES = [(0, 10, 2), (0, 0, 0), (2, 2, 2), (3, 3, 0), (0, 2, 2), (1, 0, 1), (5, 1, 7), (0, 300, 1)]
FRACTIONS = [0.0, 1e-12, 0.25, 1 / 3, 0.5, 0.8, 1.0]
SIZES = (0.1, 0.007, 1.7 * 0.031 / 3)  # all different, and none is exact in float32


def values(m, kind, seed):
    """Returns SVar [m] float32 of one of the kinds in VALUES."""
    g = torch.Generator().manual_seed(seed)
    drawn = torch.randn(m, generator=g)
    if kind == "ties":
        return drawn.mul(2).round().mul(0.05)
    if kind == "all equal":
        return torch.full((m,), 0.09)
    if kind == "extreme":
        return torch.ldexp(drawn, torch.randint(-150, 127, (m,), generator=g))
    if kind == "close":  # neighbouring float32 values
        return (torch.tensor(0.1).view(torch.int32) + torch.randint(0, 5, (m,), generator=g).int()).view(torch.float32)
    if kind == "special":
        inf, nan = float("inf"), float("nan")
        some = torch.tensor([nan, -nan, inf, -inf, 0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, 0.1])
        return some[torch.randint(len(some), (m,), generator=g)]
    return drawn.mul(0.1)


def case(m, seed, *, kind="normal", f_r=0.5, policy=(0, 10, 2), full=True, sound=False):
    """Builds the arguments of `assign_steps` as a dict: with the optional ones if `full`, without faults if `sound`."""
    g = torch.Generator().manual_seed(seed + 1)
    correct = torch.rand(m, generator=g) < 0.7
    unfit = torch.randint(0, 4, (m,), generator=g, dtype=torch.uint8)
    return {
        "svar": values(m, kind, seed),
        "correct": correct,
        "robust_fraction": torch.tensor(f_r, dtype=torch.float64),
        "group_steps": policy,
        "group_step_sizes": SIZES,
        "unfit": unfit * (not sound) if full else None,
        "faults": torch.tensor([0, 0 if sound else 3]) if full else None,
        "group_counts": torch.tensor([5, 6, 7]) if full else None,
    }


def run(assign, arguments):
    """Runs `assign` and returns its results and the group counts after the call."""
    given = dict(arguments)
    if given["group_counts"] is not None:
        given["group_counts"] = given["group_counts"].clone()
    return *assign(**given), given["group_counts"]


def assert_same(result, expected):
    """Asserts that two results are equal bit for bit; NaN equals NaN."""
    names = ("threshold", "group", "steps", "step_size", "order", "counts", "group_counts")
    for name, a, b in zip(names, result, expected, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype, name
            both_nan = (a != a) & (b != b)
            assert torch.equal(_bits(a)[~both_nan], _bits(b)[~both_nan]), name


def _bits(values):
    return values.view(torch.int64) if values.dtype == torch.float64 else values


@contextmanager
def poisoned_memory():
    """Makes `torch.empty` return memory filled with garbage, so that elements that are never written show up."""
    empty = torch.empty

    def poisoned(*shape, **options):
        made = empty(*shape, **options)
        return made.fill_(float("nan") if made.is_floating_point() else -(2**31) + 7)

    with mock.patch.object(torch, "empty", poisoned):
        yield
