"""Generates inputs, including hard cases, for all tests of the sorted start."""

import importlib
from dataclasses import dataclass, replace
from unittest import mock

import pgd_cases
import torch

op = importlib.import_module("bt_fast.ops.gather_start")  # the package has a function of this name
# shorter than a block, just over it, several blocks, less than the four of a Philox call, (not) divisible by 16
SHAPES = [(3, 4, 4), (1, 28, 28), (3, 16, 16), (2, 15, 37), (5, 1, 1), (7,), (1,), (3,), (48,), (3, 8, 8, 4)]
SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, 1e4, -1e4]
SPARE = 2


@dataclass
class Case:
    """`arguments` of the op, by name."""

    arguments: dict

    def run(self, function):
        """Returns clean and start of `function`, written between garbage; checks that the garbage is unchanged."""
        given = dict(self.arguments, state=self.arguments["state"].clone())
        buffers = []

        def poisoned(x):
            memory_format = op.dense_format(x) or torch.contiguous_format
            shape = (len(x) + SPARE, *x.shape[1:])
            buffers.append(torch.empty(shape, dtype=x.dtype, memory_format=memory_format).fill_(-12345.0))
            return buffers[-1][: len(x)]

        with mock.patch.object(op, "_like", poisoned):
            clean, start = function(**given)
        assert all((b[-SPARE:] == torch.tensor(-12345.0).to(b.dtype)).all() for b in buffers)
        return clean, start

    def but(self, **changed):
        return replace(self, arguments=self.arguments | changed)


def case(
    m,
    shape,
    dtype,
    seed,
    *,
    last=False,
    ordered=True,
    counted=True,
    numbered=False,
    noise="normal",
    bounded=False,
    special=True,
) -> Case:
    """Makes m samples of the shape; if `special`, an eighth of the pixels are NaN, ±Inf and similar.

    Args:
        last: the channels are the fastest index.
        ordered: there is an order; counted: there are steps, some of them 0; numbered: samples have numbers.
        bounded: the start is clipped to [0.1, 0.9].
    """
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(m, *shape, generator=g)
    if special and m:
        k = -(-x.numel() // 8)
        x.view(-1)[torch.randperm(x.numel(), generator=g)[:k]] = torch.tensor(SPECIAL).repeat(k)[:k]
    formats = pgd_cases.FORMATS if last else {}
    return Case(
        {
            "x": x.to(dtype).contiguous(memory_format=formats.get(len(shape) + 1, torch.contiguous_format)),
            "order": torch.randperm(m, generator=g) if ordered else None,
            "steps": torch.tensor([2, 0, 3, 1]).repeat(m)[:m] if counted else None,
            "state": torch.randint(-(2**63), 2**63 - 1, (2,), generator=g),
            "noise": noise,
            "scale": 0.03,
            "lower": 0.1 if bounded else None,
            "upper": 0.9 if bounded else None,
            "samples": torch.randint(2**32, (m,), generator=g) if numbered else None,
        }
    )


def assert_same(result, expected, ulp=0):
    """Compares two results of `Case.run`: clean bit for bit, start up to `ulp` units in the last place."""
    assert torch.equal(bits(result[0]), bits(expected[0]))
    pgd_cases.assert_same((result[1], None), (expected[1], None), ulp)
    for a, b in zip(result, expected, strict=True):
        assert a.stride() == b.stride()


def bits(values):
    return values.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])
