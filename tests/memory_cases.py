"""Generates inputs, including hard cases, for all tests of recalling and remembering perturbations."""

import importlib
from dataclasses import dataclass, replace
from unittest import mock

import pgd_cases
import torch
from gather_start_cases import SPARE, bits

from bt_fast.ops.frames import like

recall_op = importlib.import_module("bt_fast.ops.recall")  # the package has a function of this name
remember_op = importlib.import_module("bt_fast.ops.remember")
STORED = [torch.int8, torch.float16, torch.float32]
# of the images, and of their own frames: shorter than a block, several blocks, (not) divisible by 16, larger, smaller
SHAPES = [
    ((3, 4, 4), (3, 4, 4)),
    ((1, 28, 28), (1, 28, 28)),
    ((3, 16, 16), (3, 20, 20)),
    ((2, 15, 37), (2, 15, 37)),
    ((3, 8, 24), (3, 16, 12)),
    ((5, 1, 1), (5, 1, 1)),
    ((6, 7), (9, 3)),
    ((2, 3, 4, 5), (2, 3, 4, 5)),
]
VECTORS = [((7,), (7,)), ((48,), (48,)), ((1,), (1,))]
TORN = [float("nan"), float("inf"), -float("inf"), 1.5, -0.0]


@dataclass
class Case:
    """`arguments` of an op, by name, after those of its named tuple."""

    arguments: dict

    def but(self, **changed):
        return replace(self, arguments=self.arguments | changed)

    def recall(self, function):
        """Returns clean and start of `function`, written between garbage; checks that the garbage is unchanged."""
        given = dict(self.arguments, state=self.arguments["state"].clone())
        buffers = []

        def poisoned(x):
            empty = like(x)
            last = not empty.is_contiguous()
            whole = torch.empty(
                (len(x) + SPARE, *x.shape[1:]),
                dtype=x.dtype,
                memory_format=torch.channels_last if last else torch.contiguous_format,
            )
            buffers.append(whole.fill_(-12345.0))
            return whole[: len(x)]

        with mock.patch.object(recall_op, "_like", poisoned):
            clean, start = function(**given)
        assert all((b[-SPARE:] == torch.tensor(-12345.0).to(b.dtype)).all() for b in buffers)
        return clean, start

    def remember(self, function):
        """Returns the memory, with rows before and after it, after `function` changed it."""
        given = dict(self.arguments)
        memory = given["memory"]
        whole = torch.full((len(memory) + 2 * SPARE, *memory.shape[1:]), 77, dtype=memory.dtype)
        whole[SPARE:-SPARE] = memory
        function(**given | {"memory": whole[SPARE:-SPARE]})
        assert (whole[:SPARE] == 77).all()
        assert (whole[-SPARE:] == 77).all()
        return whole


def placement(m, shape, own, g):
    """Placements of m crops, each of which shows something."""
    (h, w), (own_h, own_w) = shape[-2:], own[-2:]
    top, left = (torch.randint(1 - n, k, (m,), generator=g) for n, k in ((h, own_h), (w, own_w)))
    if m > 1 and (h, w) == (own_h, own_w):
        top[0] = left[0] = 0
    return {"top": top, "left": left, "mirrored": torch.rand(m, generator=g) < 0.5}


def recall_case(
    m,
    shapes,
    dtype,
    stored,
    seed,
    *,
    placed=False,
    last=False,
    ordered=True,
    counted=True,
    numbered=False,
    own=False,
    l2=False,
    noise=0.001,
    slots=9,
) -> Case:
    """m images of the first shape and a memory of `slots` frames of the second, some of which are not remembered.

    Args:
        placed: images have a place in their frames. last: the channels are the fastest index.
        ordered, counted, numbered: as in `gather_start_cases`. own: each sample has an ε of its own, one in four 0.
    """
    g = torch.Generator().manual_seed(seed)
    shape, frame = shapes if placed else (shapes[0], shapes[0])
    x = torch.rand(m, *shape, generator=g)
    memory = torch.rand(slots, *frame, generator=g) * 2 - 1
    memory = memory / (2 * memory[0].numel() ** 0.5) if l2 else memory
    if stored == torch.int8:
        memory = torch.randint(-128, 128, memory.shape, generator=g)
    else:
        k = -(-memory.numel() // 16)
        memory.view(-1)[torch.randperm(memory.numel(), generator=g)[:k]] = torch.tensor(TORN).repeat(k)[:k]
    formats = pgd_cases.FORMATS if last else {}
    at = torch.randint(slots, (m,), generator=g)
    at[2::5] = -1
    arguments = {
        "x": x.to(dtype).contiguous(memory_format=formats.get(len(shape) + 1, torch.contiguous_format)),
        "memory": memory.to(stored),
        "slots": at,
        "state": torch.randint(-(2**63), 2**63 - 1, (2,), generator=g),
        "epsilon": 0.031,
        "lower": 0.1,
        "upper": 0.9,
        "l2": l2,
        "noise": noise,
        "order": torch.randperm(m, generator=g) if ordered else None,
        "steps": torch.tensor([2, 0, 3, 1]).repeat(m)[:m] if counted else None,
        "samples": torch.randint(2**32, (m,), generator=g) if numbered else None,
        "epsilons": pgd_cases.radii(m, seed, 0.031).roll(1) if own else None,
    }
    return Case(arguments | (placement(m, shape, frame, g) if placed else dict.fromkeys(("top", "left", "mirrored"))))


def remember_case(m, shapes, dtype, stored, seed, *, kept=True, l2=False, **options) -> Case:
    """x' of m images, which partly lies outside of the ball, and a memory with a frame for each of them and more."""
    case = recall_case(m, shapes, dtype, stored, seed, l2=l2, slots=m + 3, **options)
    g = torch.Generator().manual_seed(seed)
    given = dict(case.arguments)
    clean = given.pop("x")
    delta = (torch.rand(clean.shape, generator=g) * 2.2 - 1.1) * 0.031
    x_adv = torch.empty_like(clean).copy_(clean.float() + delta)
    if m:
        x_adv[(0,) * x_adv.dim()] = float("nan")
    for name in ("state", "lower", "upper", "noise", "samples"):
        given.pop(name)
    given["slots"] = torch.randperm(m + 3, generator=g)[:m]
    keep = {"keep": torch.tensor([True, True, False]).repeat(m)[:m] if kept else None}
    return Case({"memory": given.pop("memory"), "x_adv": x_adv, "clean": clean} | given | keep)


def same_start(result, expected, l2=False):
    """Compares two results of `recall`: to the bit, in ℓ2 but for the norm's last bits."""
    assert torch.equal(bits(result[0]), bits(expected[0]))
    if l2:
        eps = torch.finfo(result[1].dtype).eps
        torch.testing.assert_close(result[1], expected[1], rtol=eps, atol=eps if eps > 1e-4 else 1e-7)
    else:
        assert torch.equal(bits(result[1]), bits(expected[1]))
    for a, b in zip(result, expected, strict=True):
        assert a.stride() == b.stride()


def same_memory(result, expected):
    """Compares two memories, NaN of rows that stay included."""
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
