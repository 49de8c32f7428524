import math

import pgd_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended_device import DEVICE, pretended_device
from tolerances import DTYPES

from bt_fast import ops
from bt_fast.ops.pgd_l2_step import l2_reference, pgd_l2_step_, seeded_normal

quick = settings(max_examples=40, deadline=None)
flag = st.booleans()
options = st.fixed_dictionaries({"last": flag, "counts": flag, "flags": flag, "seeded": flag, "own": flag})


def literal_normal(seed, i, place):
    """Computes Philox-4x32-10 (Salmon et al., 2011) with 32-bit words, in Python's integers."""
    c, k = [place, i, 0, 0], [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return (sum(b"".join(word.to_bytes(4, "little") for word in c)) - 2040) / math.sqrt(16 * (256**2 - 1) / 12)


def literally(x, grad, clean, step_size, epsilon, lower, upper, stand_in, steps, step, faulty, epsilons):
    """The step of one sample after the other, in double precision."""
    for i in range(len(x)):
        if steps is not None and not steps[i] > step:
            continue
        g, c = grad[i].double(), clean[i].double()
        if not g.isfinite().all():
            if faulty is not None:
                faulty[i] = 1
            continue
        if (g == 0).all() and stand_in.dim():
            direction = stand_in[i].double()
        elif (g == 0).all():
            direction = torch.empty_like(g)
            for place, at in enumerate(sorted(places(g), key=lambda at: offset(x[i], at))):
                direction[at] = literal_normal(stand_in.item(), i, place)
        else:
            direction = g / g.norm()
        delta = (x[i].double() + step_size[i].double() * direction).clamp(lower, upper) - c
        radius = epsilon if epsilons is None else epsilons[i].double()
        delta *= radius / (delta.norm() + 1e-7) if delta.norm() > radius else 1.0
        x[i] = (c + delta).clamp(lower, upper).to(x.dtype)


def places(x):
    return [tuple(k.item() for k in torch.unravel_index(torch.tensor(p), x.shape)) for p in range(x.numel())]


def offset(x, at):
    return sum(k * stride for k, stride in zip(at, x.stride(), strict=True))


@quick
@given(
    st.integers(0, 8),
    st.sampled_from([(3, 2, 2), (5,), (1,), (2, 1, 1), (2, 3, 1, 2)]),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
    options,
)
def test_l2_is_its_equation(n, shape, dtype, seed, options):
    case = pgd_cases.l2_case(n, shape, dtype, seed, **options)
    result, expected = case.run(pgd_l2_step_), case.run(literally)
    if dtype == torch.float64 and options["seeded"]:  # its noise is in single precision
        torch.testing.assert_close(result[0], expected[0], rtol=0, atol=1e-6, equal_nan=True)
    else:
        pgd_cases.assert_near(result, expected)


@quick
@given(st.sampled_from(DTYPES), st.integers(0, 100), st.floats(0.01, 3.0))
def test_a_perturbation_is_in_the_ball_to_rounding(dtype, seed, epsilon):
    case = pgd_cases.l2_case(7, (3, 6, 6), dtype, seed, seeded=True).but(epsilon=epsilon)
    moved = case.arguments["grad"].flatten(1).isfinite().all(dim=1)
    delta = case.run(pgd_l2_step_)[0][:7].double() - case.arguments["clean"].double()
    rounding = torch.finfo(dtype).eps * 108**0.5
    assert (delta.flatten(1).norm(dim=1)[moved] <= epsilon * (1 + 1e-6) + rounding).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_of_any_magnitude_gives_the_same_step(dtype):
    g = torch.Generator().manual_seed(0)
    signs = torch.randn(1, 50, generator=g).sign().to(dtype)
    info = torch.finfo(dtype)
    result = []
    for size in (1.0, info.smallest_normal, info.max):
        x = torch.full((1, 50), 0.5, dtype=dtype)
        ops.l2_step_(x, signs * size, x.clone(), torch.ones(1, dtype=dtype), 10.0, 0.0, 1.0, torch.tensor(0))
        result.append(x)
    assert not torch.equal(result[0], torch.full((1, 50), 0.5, dtype=dtype))
    torch.testing.assert_close(result[1], result[0], rtol=0, atol=info.eps)
    torch.testing.assert_close(result[2], result[0], rtol=0, atol=info.eps)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 15, 37), (3, 32, 32), (3, 8, 8, 4), (7,)])
@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_epsilon_of_each_sample_is_to_the_bit_the_same_number_for_all(dtype, seeded, shape, last):
    case = pgd_cases.l2_case(7, shape, dtype, 0, seeded=seeded, last=last)
    pgd_cases.assert_same(pgd_cases.as_own(case).run(pgd_l2_step_), case.run(pgd_l2_step_))


def test_a_gradient_without_a_norm_spares_its_sample_and_is_counted():
    case = pgd_cases.l2_case(7, (3, 4, 4), torch.float32, 0, flags=True)
    after, faulty = case.run(pgd_l2_step_)
    stays = [kind in ("NaN", "infinite") for kind in pgd_cases.KINDS]
    assert [torch.equal(a, b) for a, b in zip(after, case.buffer, strict=True)][:7] == stays
    assert faulty.tolist() == [int(s) for s in stays]


def test_numbers_of_a_seed_are_standard_normal_and_differ_by_sample_and_seed():
    x = torch.zeros(50, 4, 50, 50)
    noise, other = seeded_normal(torch.tensor(7), x), seeded_normal(torch.tensor(8), x)
    assert noise.mean().abs() < 0.005
    assert (noise.std() - 1).abs() < 0.005
    assert ((noise.abs() < 1).float().mean() - 0.6827).abs() < 0.005
    assert ((noise.abs() < 2).float().mean() - 0.9545).abs() < 0.003
    flat = torch.cat([noise[:25], other[:25]]).flatten(1)
    products = flat @ flat.T / flat.shape[1]
    assert (products - torch.eye(50)).abs().max() < 0.06
    assert torch.equal(noise, seeded_normal(torch.tensor(7), x))


def test_nothing_is_a_batch_too():
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4)):
        x = torch.empty(shape)
        ops.l2_step_(x, x, x, torch.ones(len(x)), 0.1, 0.0, 1.0, torch.tensor(0))


# Registration


def some(options):
    return pgd_cases.l2_case(2, (3, 4, 4), torch.float32, 0, **options)


FULL = {"counts": True, "flags": True}


@pytest.mark.parametrize("options", [{}, FULL | {"last": True, "seeded": True}, {"own": True}])
def test_opcheck(options):
    case = some(options)
    torch.library.opcheck(pgd_l2_step_, (case.buffer[:2],), case.arguments)


def test_a_compiled_step_is_one_op():
    targets = []

    def backend(graph, _):
        targets.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def step(x, grad, clean, sizes, stand_in):
        ops.l2_step_(x, grad, clean, sizes, 0.5, 0.0, 1.0, stand_in)

    torch._dynamo.reset()
    case = some({})
    inputs = [case.arguments[name] for name in ("grad", "clean", "step_size", "stand_in")]
    plain, compiled = case.buffer[:2].clone(), case.buffer[:2].clone()
    step(plain, *inputs)
    torch.compile(step, fullgraph=True, backend=backend)(compiled, *inputs)
    assert torch.equal(plain, compiled)
    assert targets == [torch.ops.bt_fast.pgd_l2_step_.default]


@pytest.mark.parametrize("seeded", [False, True])
def test_the_reference_waits_for_nothing(seeded):
    case = some(FULL | {"seeded": seeded})
    on_device = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in case.arguments.items()}
    x = case.buffer[:2].to(DEVICE)
    with pretended_device():
        l2_reference(x, **on_device)


WRONG = [
    ("grad", torch.rand(2, 3, 4), ValueError),
    ("clean", torch.rand(2, 3, 4, 4).double(), TypeError),
    ("step_size", torch.rand(3), ValueError),
    ("stand_in", torch.rand(1, 3, 4, 4), ValueError),
    ("stand_in", torch.rand(2, 3, 4, 4).double(), TypeError),
    ("stand_in", torch.tensor([1]), ValueError),
    ("stand_in", torch.tensor(1, dtype=torch.int32), TypeError),
    ("stand_in", torch.tensor(1, device="meta"), ValueError),
    ("steps", torch.rand(2), TypeError),
    ("step", None, ValueError),
    ("faulty", torch.zeros(2), TypeError),
]


@pytest.mark.parametrize(("name", "value", "error"), WRONG)
def test_an_error_names_the_argument(name, value, error):
    case = some(FULL)
    with pytest.raises(error, match=rf"^{name}|{name} must be given"):
        pgd_l2_step_(case.buffer[:2], **case.arguments | {name: value})


def test_a_batch_of_numbers_has_no_norms():
    with pytest.raises(ValueError, match=r"x_adv.*at least two"):
        ops.l2_step_(*[torch.ones(2)] * 4, 0.1, 0.0, 1.0, torch.ones(2))
