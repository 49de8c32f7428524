"""Generates inputs, including hard cases, for all tests of one projected-gradient step."""

from dataclasses import dataclass, field, replace

import torch

NAN = float("nan")
SPECIAL = [float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -3e38]
# shorter than any block, filling it, just over it, in several parts, one element, one element a channel, divisible
# by 16 or not
SHAPES = [(3, 4, 4), (1, 28, 28), (3, 32, 32), (2, 15, 37), (3, 27, 27), (4, 36, 36), (5, 1, 1), (7,), (1,), (48,)]
SHAPES += [(3, 8, 8, 4), (4, 32, 32), (5, 16, 16), (2, 47, 47), (1, 64, 68)]
# kinds of gradients in ℓ2
KINDS = ("plain", "zero", "tiny", "huge", "uneven", "NaN", "infinite")
TINY_AND_HUGE = {torch.float16: (1e-6, 2e4)}
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass
class Case:
    """The step's `arguments`, for the first n samples in `buffer`; memory after them must not change."""

    buffer: torch.Tensor
    arguments: dict = field(default_factory=dict)

    def run(self, step):
        """Returns the whole buffer and the faulty flags of a copy after the step."""
        buffer = self.buffer.clone(memory_format=torch.preserve_format)
        given = dict(self.arguments)
        if given["faulty"] is not None:
            given["faulty"] = given["faulty"].clone()
        step(buffer[: len(given["grad"])], **given)
        return buffer, given["faulty"]

    def but(self, **changed):
        return replace(self, arguments=self.arguments | changed)


def case(n, shape, dtype, seed, *, last=False, counts=False, flags=False, own=False, special=True, spare=2) -> Case:
    """n samples of the shape before `spare` poisoned ones, gradients with zeros and, if `special`, ±Inf.

    If `special`, one sample in three has NaN at one place of its gradient, and images have NaN too.

    Args:
        last: the channels are the fastest index.
        counts: some samples have no steps left.
        flags: the samples whose gradient holds NaN are to be marked.
        own: each sample has an ε of its own, one in four 0.
    """
    g = torch.Generator().manual_seed(seed)
    images = [torch.randn(n + spare, *shape, generator=g).mul(0.3).add(0.4) for _ in range(3)]
    grad, clean, buffer = images
    clean.clamp_(0, 1)
    buffer[:n] = clean[:n] + 0.1 * (buffer[:n] - 0.4)
    grad[grad.abs() < 0.3] = 0.0
    if special and n:
        for whole in (grad, buffer, clean):
            values = whole[:n]
            # an eighth of all pixels
            k = -(-values.numel() // 8)
            places = torch.randperm(values.numel(), generator=g)[:k]
            result = torch.tensor(SPECIAL if whole is grad else [NAN, *SPECIAL])
            values.view(-1)[places] = result.repeat(k)[:k]
        for i in range((2 - seed) % 3, n, 3):
            grad[i].view(-1)[torch.randint(grad[i].numel(), (), generator=g)] = NAN
    buffer[n:] = float("nan")
    last = last and len(shape) + 1 in FORMATS
    memory_format = FORMATS[len(shape) + 1] if last else torch.contiguous_format
    grad, clean, buffer = (t.to(dtype).contiguous(memory_format=memory_format) for t in (grad, clean, buffer))
    return Case(
        buffer,
        {
            "grad": grad[:n],
            "clean": clean[:n],
            "step_size": torch.rand(n, generator=g).mul(0.1).to(dtype),
            "epsilon": 0.031,
            "lower": 0.0,
            "upper": 1.0,
            "steps": torch.tensor([2, 1, 3, 0]).repeat(n)[:n] if counts else None,
            "step": torch.tensor(1) if counts else None,
            "faulty": torch.zeros(n, dtype=torch.int32) if flags else None,
            "epsilons": radii(n, seed, 0.031).to(dtype) if own else None,
        },
    )


def as_own(case, dtype=None):
    """The same with the ε of all as each sample's own, in the given dtype; None for float32 at least."""
    images, epsilon = case.arguments["grad"], case.arguments["epsilon"]
    dtype = dtype or torch.promote_types(images.dtype, torch.float32)
    return case.but(epsilon=9.0, epsilons=torch.full((len(images),), epsilon, dtype=dtype))


def radii(n, seed, epsilon):
    """ε of n samples, [n] float32: most in 0.5·ε to 1.5·ε, and every fourth 0."""
    result = epsilon * (0.5 + torch.rand(n, generator=torch.Generator().manual_seed(seed)))
    result[1::4] = 0.0
    return result


def l2_case(n, shape, dtype, seed, *, last=False, counts=False, flags=False, own=False, seeded=False) -> Case:
    """`case` in ℓ2: gradients of all `KINDS` one after another from that of the seed, and every third sample far off.

    Args:
        seeded: the replacement of a zero gradient is drawn from a seed instead of given.
    """
    result = case(n, shape, dtype, seed, last=last, counts=counts, special=False)
    grad, g = result.arguments["grad"].float(), torch.Generator().manual_seed(seed)
    tiny, huge = TINY_AND_HUGE.get(dtype, (1e-30, 1e30))
    for i in range(n):
        kind, one = KINDS[(seed + i) % len(KINDS)], grad[i].view(-1) if not last else grad[i].reshape(-1)
        place = torch.randint(one.numel(), (), generator=g)
        if kind in ("zero", "tiny", "huge"):
            one = one * {"zero": 0.0, "tiny": tiny, "huge": huge}[kind]
        elif kind == "uneven":
            one[:: 2 + i] *= huge
        elif kind != "plain":
            one[place] = NAN if kind == "NaN" else (-1) ** seed * float("inf")
        grad[i] = one.view(shape)
        if i % 3 == 0:
            result.buffer[i] += torch.randn(shape, generator=g).to(dtype)
    noise = torch.randn(n, *shape, generator=g).to(dtype)
    length = grad[0].numel() if n else 1
    return Case(
        result.buffer,
        result.arguments
        | {
            "grad": torch.empty_like(result.arguments["grad"]).copy_(grad),
            "epsilon": 0.05 * length**0.5,
            "step_size": result.arguments["step_size"] * length**0.5,
            "stand_in": torch.tensor((seed << 31) - 3) if seeded else noise,
            "faulty": torch.zeros(n, dtype=torch.int32) if flags else None,
            "epsilons": radii(n, seed, 0.05 * length**0.5).to(torch.promote_types(dtype, torch.float32))
            if own
            else None,
        },
    )


def assert_same(result, expected, ulp=0):
    """Compares two results of `Case.run`, NaN for NaN, up to `ulp` units in the last place of the buffer."""
    a, b = result[0], expected[0]
    if ulp:
        assert torch.equal(a.isnan(), b.isnan())
        bits = {2: torch.int16, 4: torch.int32}[a.element_size()]
        apart = (a.contiguous().view(bits).long() - b.contiguous().view(bits).long()).abs()
        assert (apart[~a.isnan() & (a != b)] <= ulp).all()
    else:
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert (result[1] is None) == (expected[1] is None)
    assert result[1] is None or torch.equal(result[1], expected[1])


def assert_near(result, expected):
    """Compares two results of `Case.run` except for the last bits, which depend on the order of the norms' sums."""
    eps = torch.finfo(result[0].dtype).eps
    atol = eps if result[0].element_size() == 2 else 8 * eps
    torch.testing.assert_close(result[0], expected[0], rtol=0, atol=atol, equal_nan=True)
    assert (result[1] is None) == (expected[1] is None)
    assert result[1] is None or torch.equal(result[1], expected[1])
