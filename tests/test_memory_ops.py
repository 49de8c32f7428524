"""Perturbations are recalled and remembered as a loop over samples and pixels does it."""

import math

import memory_cases as cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended_device import DEVICE, pretended_device

from bt_fast import ops
from bt_fast.ops.gather_start import unit_noise

quick = settings(max_examples=40, deadline=None)
flag = st.booleans()
SMALL = [((2, 3, 4), (2, 5, 3)), ((1, 2, 2), (1, 4, 4)), ((3, 2), (3, 2)), ((2, 1, 2, 3), (2, 1, 3, 3))]
DOUBLE = torch.float64


def own_place(place, i, j, width, s):
    """Where pixel (i, j) of the image lies in its own frame, by the words of `Placement`."""
    top, left, mirrored = (values[s].item() for values in place)
    return top + i, left + (width - 1 - j if mirrored else j)


def inside(i, j, shape):
    return 0 <= i < shape[-2] and 0 <= j < shape[-1]


def pixels(shape):
    return [(i, j) for i in range(shape[-2]) for j in range(shape[-1])]


def fraction_literally(stored, dtype):
    value = stored.item() / 127 if dtype == torch.int8 else stored.item()
    return 0.0 if math.isnan(value) else max(-1.0, min(1.0, value))


def recall_literally(x, memory, slots, state, epsilon, lower, upper, l2, noise, order, steps, samples, epsilons,
                     top=None, left=None, mirrored=None):  # fmt: skip
    """One sample and one pixel at a time, in double precision."""
    clean, start = x.clone(), x.clone()
    for row in range(len(x)):
        s = row if order is None else order[row].item()
        clean[row] = start[row] = x[s]
        if steps is not None and steps[s] == 0:
            continue
        delta = torch.zeros(x.shape[1:], dtype=DOUBLE)
        for at in torch.cartesian_prod(*[torch.arange(n) for n in x.shape[1:]]).view(-1, x.dim() - 1).tolist():
            place = tuple(at)
            if top is not None:
                i, j = own_place((top, left, mirrored), *at[-2:], x.shape[-1], s)
                if not inside(i, j, memory.shape):
                    continue
                place = (*at[:-2], i, j)
            if slots[s] >= 0:
                delta[tuple(at)] = fraction_literally(memory[slots[s]][place], memory.dtype)
        radius = epsilon if epsilons is None else epsilons[s].item()
        number = torch.tensor([s if samples is None else samples[s].item()])
        drawn = unit_noise(number, x[0].numel(), state, "normal")[0].double()
        drawn = (
            drawn.view(x.shape[2:] + x.shape[1:2]).movedim(-1, 0) if x.dim() == 4 and not x.is_contiguous() else drawn
        )
        delta = delta * radius + noise * drawn.reshape(delta.shape)
        size = delta.norm().item()
        delta = delta * (radius / size if size > radius else 1.0) if l2 else delta.clamp(-radius, radius)
        start[row] = (x[s].double() + delta).clamp(lower, upper)
    return clean, start


def remember_literally(memory, x_adv, clean, slots, epsilon, l2, order, steps, keep, epsilons,
                       top=None, left=None, mirrored=None):  # fmt: skip
    for row in range(len(clean)):
        s = row if order is None else order[row].item()
        frame, radius = memory[slots[s]], epsilon if epsilons is None else epsilons[s].item()
        if (steps is not None and steps[s] == 0) or (keep is not None and not keep[s] and top is not None):
            frame.zero_()
        if steps is not None and steps[s] == 0:
            continue
        fractions = (x_adv[row].double() - clean[row].double()) / radius if radius else torch.zeros(clean[row].shape)
        fractions = fractions.nan_to_num(0.0).clamp(-1, 1)
        stored = (fractions * 127).round() if memory.dtype == torch.int8 else fractions
        for i, j in pixels(clean.shape) if top is not None else ():
            place = own_place((top, left, mirrored), i, j, clean.shape[-1], s)
            if inside(*place, memory.shape):
                frame[(..., *place)] = stored[..., i, j].to(memory.dtype)
        if top is None:
            frame.copy_(stored)


OPTIONS = {name: flag for name in ("placed", "last", "ordered", "counted", "own", "l2")}


@quick
@given(
    st.integers(0, 4),
    st.sampled_from(SMALL),
    st.sampled_from([torch.float32, DOUBLE]),
    st.sampled_from([*cases.STORED, DOUBLE]),
    st.integers(0, 2**31),
    st.fixed_dictionaries(OPTIONS | {"numbered": flag, "noise": st.sampled_from([0.0, 0.001, 0.05])}),
)
def test_recall_is_its_definition(m, shapes, dtype, stored, seed, options):
    case = cases.recall_case(m, shapes, dtype, stored, seed, **options)
    (clean, start), (same, expected) = case.recall(cases.recall_op.recall_reference), case.recall(recall_literally)
    assert torch.equal(clean, same)
    close = 2e-7 if dtype == torch.float32 else 1e-8 if options["noise"] else 1e-15  # it is drawn in float32
    torch.testing.assert_close(start, expected, rtol=0, atol=close)


@quick
@given(
    st.integers(0, 4),
    st.sampled_from(SMALL),
    st.sampled_from([torch.float32, DOUBLE]),
    st.sampled_from([*cases.STORED, DOUBLE]),
    st.integers(0, 2**31),
    st.fixed_dictionaries(OPTIONS | {"kept": flag}),
)
def test_remember_is_its_definition(m, shapes, dtype, stored, seed, options):
    case = cases.remember_case(m, shapes, dtype, stored, seed, **options)
    result = case.remember(cases.remember_op.remember_reference)
    expected = case.remember(remember_literally)
    if stored == torch.int8:  # of two equally near numbers, rounding in float32 may have chosen the other
        assert (result.int() - expected.int()).abs().max() <= (1 if dtype == torch.float32 else 0)
        assert (result == expected).double().mean() > 0.97
    else:
        close = {torch.float16: 1e-3, torch.float32: 1e-6}.get(stored, 1e-6 if dtype == torch.float32 else 1e-15)
        torch.testing.assert_close(result, expected, rtol=close, atol=close, equal_nan=True)


@pytest.mark.parametrize("stored", [*cases.STORED, DOUBLE])
def test_what_was_remembered_comes_back_where_it_was(stored):
    g = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, 6, 5, generator=g) * 0.5 + 0.25
    place = torch.tensor([0, 2, -1, 4]), torch.tensor([0, 5, 3, -2]), torch.tensor([False, True, True, False])
    memory, slots, epsilon = torch.zeros(4, 3, 8, 9, dtype=stored), torch.tensor([3, 1, 0, 2]), 0.1
    x_adv = x + (torch.rand(x.shape, generator=g) * 2 - 1) * epsilon
    ops.remember_(memory, x_adv, x, slots, epsilon, placed=place)
    limits = ops.Limits(epsilon, 0.0, 1.0)
    _, start = ops.recall(x, memory, slots, torch.tensor([1, 2]), limits, noise=0.0, placed=place)
    inner = start != x  # what lies outside of the frame starts at x
    quantum = epsilon / 254 if stored == torch.int8 else 1e-4
    assert (start - x_adv)[inner].abs().max() <= quantum * 1.001
    assert inner.double().mean() > 0.2
    shifted = tuple(values.clone() for values in place)
    shifted[0].add_(1)
    _, moved = ops.recall(x, memory, slots, torch.tensor([1, 2]), limits, noise=0.0, placed=shifted)
    delta, down = (start - x)[:, :, 1:], (moved - x)[:, :, :-1]
    assert torch.allclose(delta, down, atol=1e-7)


def test_half_precision_is_enough_for_long_l2_perturbations():
    g = torch.Generator().manual_seed(0)
    x = torch.full((2, 3, 224, 224), 0.5)
    delta = torch.randn(x.shape, generator=g)
    delta = 3.0 * delta / delta.flatten(1).norm(dim=1).view(2, 1, 1, 1)
    memory = torch.zeros(x.shape, dtype=torch.float16)
    ops.remember_(memory, x + delta, x, torch.arange(2), 3.0, l2=True)
    limits = ops.Limits(3.0, -9.0, 9.0, True)
    _, start = ops.recall(x, memory, torch.arange(2), torch.tensor([0, 0]), limits, noise=0.0)
    assert ((start - x - delta).flatten(1).norm(dim=1) < 3.0 * 4e-4).all()
    assert ((start - x).flatten(1).norm(dim=1) < 3.0 * (1 + 1e-6)).all()


def test_the_noise_is_that_of_the_random_start():
    x, state = torch.full((3, 2, 3, 3), 0.5), torch.tensor([5, 6])
    memory, slots = torch.zeros(0, 2, 3, 3, dtype=torch.int8), torch.full((3,), -1)
    numbers = torch.tensor([9, 2, 4])
    _, start = ops.recall(x, memory, slots, state.clone(), ops.Limits(1.0), samples=numbers)
    _, expected = ops.gather_start(x, None, None, state, "normal", 0.001, samples=numbers)
    assert torch.equal(start, expected)


@pytest.mark.parametrize("options", [{"placed": True}, {"last": True, "l2": True, "ordered": False, "counted": False}])
def test_opcheck(options):
    case = cases.recall_case(3, cases.SHAPES[0], torch.float32, torch.int8, 0, **options)
    torch.library.opcheck(cases.recall_op._recall, (), case.arguments)
    case = cases.remember_case(3, cases.SHAPES[0], torch.float32, torch.int8, 0, **options)
    torch.library.opcheck(cases.remember_op._remember, (), case.arguments)


def test_the_references_wait_for_nothing():
    def there(case):
        return {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in case.arguments.items()}

    recalling, remembering = (
        there(make(3, cases.SHAPES[2], torch.float32, torch.int8, 0, placed=True, own=True))
        for make in (cases.recall_case, cases.remember_case)
    )
    with pretended_device():
        cases.recall_op.recall_reference(**recalling)
        cases.recall_op._recall(**recalling)
        cases.remember_op.remember_reference(**remembering)
        cases.remember_op._remember(**remembering)


def test_what_the_kernels_take():
    pytest.importorskip("triton")
    x, memory = torch.empty(4, 3, 8, 8, device=DEVICE), torch.empty(9, 3, 8, 8, dtype=torch.int8, device=DEVICE)
    takes = cases.recall_op._kernel_takes, lambda x, memory: cases.remember_op._kernel_takes(memory, x)
    for kernel_takes in takes:
        assert not kernel_takes(x, memory)
        with pretended_device():
            for images in (x, x.half(), x.bfloat16(), x.contiguous(memory_format=torch.channels_last), x[:0]):
                assert kernel_takes(images, memory)
            deep = torch.empty(2, 3, 4, 4, 4, device=DEVICE).contiguous(memory_format=torch.channels_last_3d)
            for images in (x.double(), x[..., ::2], deep):
                assert not kernel_takes(images, memory)
            assert not kernel_takes(x, memory.double())


WRONG = [
    ("x", torch.ones(3, 2, 3, 4, dtype=torch.int64), TypeError, "x"),
    ("memory", torch.zeros(9, 2, 5, 3, dtype=torch.bfloat16), TypeError, "memory"),
    ("memory", torch.zeros(9, 1, 5, 3), ValueError, "memory"),
    ("memory", torch.zeros(9, 2, 5), ValueError, "memory"),
    ("memory", torch.zeros(9, 2, 5, 6)[..., ::2], ValueError, "memory"),
    ("slots", torch.zeros(3), TypeError, "slots"),
    ("slots", torch.zeros(2, dtype=torch.int64), ValueError, "slots"),
    ("state", torch.zeros(2), TypeError, "state"),
    ("order", torch.arange(2), ValueError, "order"),
    ("steps", torch.rand(3), TypeError, "steps"),
    ("samples", torch.arange(4), ValueError, "samples"),
    ("epsilons", torch.arange(3), TypeError, "epsilon"),
    ("top", torch.zeros(3), TypeError, "top"),
    ("left", torch.zeros(2, dtype=torch.int64), ValueError, "left"),
    ("mirrored", torch.zeros(3, dtype=torch.int64), TypeError, "mirrored"),
    ("mirrored", None, ValueError, "placed"),
]


@pytest.mark.parametrize(("name", "value", "error", "named"), WRONG)
def test_an_error_names_the_argument_and_changes_nothing(name, value, error, named):
    case = cases.recall_case(3, SMALL[0], torch.float32, torch.int8, 0, placed=True)
    state = case.arguments["state"].clone()
    with pytest.raises(error, match=rf"^{named} must "):
        cases.recall_op._recall(**case.arguments | {name: value})
    assert torch.equal(case.arguments["state"], state)
    if name in ("memory", "slots", "order", "steps", "epsilons", "top", "left", "mirrored"):
        case = cases.remember_case(3, SMALL[0], torch.float32, torch.int8, 0, placed=True)
        with pytest.raises(error, match=rf"^{named} must "):
            cases.remember_op._remember(**case.arguments | {name: value})
