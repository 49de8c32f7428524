"""Inputs of one projected-gradient step, hard cases among them: for every layer of tests of the same op."""

from dataclasses import dataclass, field, replace

import torch

SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -3e38]
# within a block, over its end, over several blocks, one element, one element a channel, divisible by 16 and not
SHAPES = [(3, 4, 4), (1, 28, 28), (3, 16, 16), (2, 15, 37), (5, 1, 1), (7,), (1,), (48,), (3, 8, 8, 4)]
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass
class Case:
    """`arguments` of the step, for the first n of the samples in `buffer`; what lies behind them must not change."""

    buffer: torch.Tensor
    arguments: dict = field(default_factory=dict)

    def run(self, step):
        """A copy of the case, stepped: its whole buffer and its faulty flags."""
        buffer = self.buffer.clone(memory_format=torch.preserve_format)
        given = dict(self.arguments)
        if given["faulty"] is not None:
            given["faulty"] = given["faulty"].clone()
        step(buffer[: len(given["grad"])], **given)
        return buffer, given["faulty"]

    def but(self, **changed):
        return replace(self, arguments=self.arguments | changed)


def case(
    n, shape, dtype, seed, *, last=False, channel_limits=False, counts=False, flags=False, special=True, spare=2
) -> Case:
    """n samples of the shape before `spare` poisoned ones, gradients with zeros and, if `special`, NaN and ±Inf.

    Args:
        last: the channels are the fastest index.
        channel_limits: each channel has limits of its own.
        counts: some samples have no steps left.
        flags: the samples whose gradient holds NaN are to be marked.
    """
    g = torch.Generator().manual_seed(seed)
    images = [torch.randn(n + spare, *shape, generator=g).mul(0.3).add(0.4) for _ in range(3)]
    grad, clean, buffer = images
    clean.clamp_(0, 1)
    buffer[:n] = clean[:n] + 0.1 * (buffer[:n] - 0.4)
    grad[grad.abs() < 0.3] = 0.0
    if special and n:
        for values in (grad[:n], buffer[:n], clean[:n]):
            # an eighth of all, and NaN the first of them
            k = -(-values.numel() // 8)
            places = torch.randperm(values.numel(), generator=g)[:k]
            values.view(-1)[places] = torch.tensor(SPECIAL).repeat(k)[:k]
    buffer[n:] = float("nan")
    last = last and len(shape) + 1 in FORMATS
    memory_format = FORMATS[len(shape) + 1] if last else torch.contiguous_format
    grad, clean, buffer = (t.to(dtype).contiguous(memory_format=memory_format) for t in (grad, clean, buffer))
    limits = torch.rand(3, shape[0], generator=g).mul(0.1) + torch.tensor([[0.0], [-0.1], [0.8]])
    return Case(
        buffer,
        {
            "grad": grad[:n],
            "clean": clean[:n],
            "step_size": torch.rand(n, generator=g).mul(0.1).to(dtype),
            "epsilon": 0.031,
            "lower": 0.0,
            "upper": 1.0,
            "limits": limits if channel_limits and len(shape) > 1 else None,
            "steps": torch.tensor([2, 1, 3, 0]).repeat(n)[:n] if counts else None,
            "step": torch.tensor(1) if counts else None,
            "faulty": torch.zeros(n, dtype=torch.int32) if flags else None,
        },
    )


def assert_same(found, expected, ulp=0):
    """Two results of `Case.run` are equal, NaN for NaN, to `ulp` units in the last place of the buffer."""
    a, b = found[0], expected[0]
    if ulp:
        assert torch.equal(a.isnan(), b.isnan())
        bits = {2: torch.int16, 4: torch.int32}[a.element_size()]
        apart = (a.contiguous().view(bits).long() - b.contiguous().view(bits).long()).abs()
        assert (apart[~a.isnan() & (a != b)] <= ulp).all()
    else:
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert (found[1] is None) == (expected[1] is None)
    assert found[1] is None or torch.equal(found[1], expected[1])
