import math

import pgd_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended_device import DEVICE, pretended_device
from tolerances import DTYPES

from bt_fast import ops
from bt_fast.ops.pgd_step import linf_reference, pgd_linf_step_

quick = settings(max_examples=40, deadline=None)
flag = st.booleans()
options = st.fixed_dictionaries({"last": flag, "counts": flag, "flags": flag, "own": flag})


def literally(x, grad, clean, step_size, epsilon, lower, upper, steps, step, faulty, epsilons):
    """The step, one number at a time, in double precision."""
    for i in range(len(x)):
        width = torch.tensor(epsilon if epsilons is None else epsilons[i].item(), dtype=x.dtype).item()
        if steps is not None and not steps[i] > step:
            continue
        if any(map(math.isnan, grad[i].flatten().tolist())):
            if faulty is not None:
                faulty[i] = 1
            continue
        for place, g in enumerate(grad[i].flatten().tolist()):
            at = (i, *(k.item() for k in torch.unravel_index(torch.tensor(place), grad[i].shape)))
            c, v = clean[at].item(), x[at].item() + math.copysign(g != 0, g) * step_size[i].item()
            for bound, beyond in ((c - width, min), (c + width, max), (lower, min), (upper, max)):
                outside = v < bound if beyond is min else v > bound
                v = math.nan if math.isnan(bound) else bound if outside else v
            x[at] = v


@quick
@given(
    st.integers(0, 3),
    st.sampled_from([(3, 2, 2), (5,), (1,), (2, 1, 1), (2, 3, 1, 2)]),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
    options,
)
def test_linf_is_its_equation(n, shape, dtype, seed, options):
    case = pgd_cases.case(n, shape, dtype, seed, **options)
    result, expected = case.run(pgd_linf_step_), case.run(literally)
    if dtype == torch.float64:
        pgd_cases.assert_same(result, expected)
    else:  # the sum is rounded once more
        assert torch.equal(result[0].isnan(), expected[0].isnan())
        torch.testing.assert_close(result[0], expected[0], rtol=torch.finfo(dtype).eps, atol=1e-7, equal_nan=True)
        assert result[1] is None or torch.equal(result[1], expected[1])


def before_there_was_a_kernel(x_adv, grad, clean, step_size, epsilon, lower, upper, **_):
    x_adv.add_(grad.sign().mul_(step_size.view(-1, *[1] * (grad.dim() - 1))))
    torch.maximum(x_adv, clean - epsilon, out=x_adv)
    torch.minimum(x_adv, clean + epsilon, out=x_adv)
    x_adv.clamp_(lower, upper)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 16, 16), (7,)])
def test_linf_is_to_the_bit_what_it_was_before_there_was_a_kernel(dtype, shape):
    case = pgd_cases.case(5, shape, dtype, seed=1, special=False)
    pgd_cases.assert_same(case.run(pgd_linf_step_), case.run(before_there_was_a_kernel))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [False, True])
def test_one_epsilon_of_each_sample_is_the_same_number_for_all(dtype, wide):
    case = pgd_cases.case(5, (3, 4, 4), dtype, 0)
    own = pgd_cases.as_own(case, torch.promote_types(dtype, torch.float32) if wide else dtype)
    pgd_cases.assert_same(own.run(pgd_linf_step_), case.run(pgd_linf_step_))


def test_a_sample_with_an_epsilon_of_0_is_its_clean_image():
    case = pgd_cases.case(4, (3, 4, 4), torch.float32, 0, special=False)
    arguments = {k: v for k, v in case.arguments.items() if k not in ("epsilon", "epsilons")}
    x, rest = case.buffer[:4].clone(), ("grad", "clean", "step_size")
    ops.linf_step_(x, *(arguments[name] for name in rest), torch.tensor([0.0, 0.1, 0.0, 0.2]), 0.0, 1.0)
    assert [torch.equal(a, b) for a, b in zip(x, arguments["clean"], strict=True)] == [True, False, True, False]


def test_nan_in_a_gradient_spares_its_whole_sample_and_is_counted():
    case = pgd_cases.case(4, (3, 4, 4), torch.float32, 0, special=False, flags=True)
    grad = case.arguments["grad"]
    grad[1], grad[3, 0, 0, 0] = math.nan, math.nan
    before = case.buffer.clone()
    after, faulty = case.run(pgd_linf_step_)
    assert [torch.equal(a, b) for a, b in zip(after, before, strict=True)][:4] == [False, True, False, True]
    assert faulty.tolist() == [0, 1, 0, 1]
    idle = case.but(steps=torch.tensor([1, 0, 1, 1]), step=torch.tensor(0))
    assert idle.run(pgd_linf_step_)[1].tolist() == [0, 0, 0, 1]
    kept = case.but(faulty=torch.tensor([1, 0, 0, 0], dtype=torch.int32))
    assert kept.run(pgd_linf_step_)[1].tolist() == [1, 1, 0, 1]


def test_the_counter_moves_without_the_host():
    case = pgd_cases.case(3, (4,), torch.float32, 0, special=False)
    case = case.but(steps=torch.tensor([2, 0, 1]), step=torch.tensor(0))
    moved = []
    for _ in range(3):
        moved.append((case.run(pgd_linf_step_)[0] != case.buffer)[:3].any(dim=1).tolist())
        case.arguments["step"].add_(1)
    assert moved == [[True, False, True], [True, False, False], [False, False, False]]


# Registration


def some(options, dtype=torch.float32):
    return pgd_cases.case(2, (3, 4, 4), dtype, 0, special=False, **options)


@pytest.mark.parametrize("options", [{}, {"counts": True, "flags": True, "last": True}, {"own": True}])
def test_opcheck(options):
    case = some(options)
    torch.library.opcheck(pgd_linf_step_, (case.buffer[:2],), case.arguments)


def test_a_compiled_step_is_one_op():
    targets = []

    def backend(graph, _):
        targets.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def step(x, grad, clean, sizes):
        ops.linf_step_(x, grad, clean, sizes, 0.03, 0.0, 1.0)

    torch._dynamo.reset()
    case = some({})
    inputs = [case.arguments[name] for name in ("grad", "clean", "step_size")]
    plain, compiled = case.buffer[:2].clone(), case.buffer[:2].clone()
    step(plain, *inputs)
    torch.compile(step, fullgraph=True, backend=backend)(compiled, *inputs)
    assert torch.equal(plain, compiled)
    assert targets == [torch.ops.bt_fast.pgd_linf_step_.default]


def test_the_reference_waits_for_nothing():
    case = some({"counts": True, "flags": True, "own": True})
    on_device = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in case.arguments.items()}
    x = case.buffer[:2].to(DEVICE)
    with pretended_device():
        linf_reference(x, **on_device)


WRONG = [
    ("grad", torch.rand(2, 3, 4), ValueError),
    ("grad", torch.rand(2, 3, 4, 4).double(), TypeError),
    ("clean", torch.rand(1, 3, 4, 4), ValueError),
    ("clean", torch.rand(2, 3, 4, 4, device="meta"), ValueError),
    ("step_size", torch.rand(3), ValueError),
    ("step_size", torch.rand(2).double(), TypeError),
    ("steps", torch.rand(2), TypeError),
    ("steps", torch.ones(3, dtype=torch.int64), ValueError),
    ("step", torch.ones(1, dtype=torch.int64), ValueError),
    ("step", None, ValueError),
    ("faulty", torch.zeros(2), TypeError),
    ("faulty", torch.zeros(1, dtype=torch.int32), ValueError),
    ("faulty", torch.zeros(4, dtype=torch.int32)[::2], ValueError),
]


@pytest.mark.parametrize(
    ("epsilon", "error"),
    [
        (torch.rand(3), ValueError),
        (torch.rand(()), ValueError),
        (torch.rand(2).double(), TypeError),
        (torch.ones(2).long(), TypeError),
        (torch.rand(2, device="meta"), ValueError),
    ],
)
def test_an_epsilon_of_each_sample_must_fit(epsilon, error):
    x = torch.rand(2, 3)
    with pytest.raises(error, match=r"^epsilon must "):
        ops.linf_step_(x, x, x, torch.ones(2), epsilon, 0.0, 1.0)
    with pytest.raises(error, match=r"^epsilon must "):
        ops.l2_step_(x, x, x, torch.ones(2), epsilon, 0.0, 1.0, torch.tensor(0))


@pytest.mark.parametrize(("name", "value", "error"), WRONG)
def test_an_error_names_the_argument(name, value, error):
    case = some({"counts": True, "flags": True})
    with pytest.raises(error, match=rf"^{name}|{name} must be given"):
        pgd_linf_step_(case.buffer[:2], **case.arguments | {name: value})


def test_images_must_be_floating_point_and_a_batch():
    one = torch.ones(2)
    with pytest.raises(TypeError, match="x_adv"):
        ops.linf_step_(one.int(), one.int(), one.int(), one, 0.1, 0.0, 1.0)
    with pytest.raises(ValueError, match="x_adv"):
        ops.linf_step_(one[0], one[0], one[0], one, 0.1, 0.0, 1.0)
