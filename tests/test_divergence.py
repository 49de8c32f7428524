import math
from unittest import mock

import divergence_cases
import pytest
import torch
import torch.nn.functional as F
from divergence_cases import BETA, LOSSES, assert_right
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended_device import DEVICE, pretended_device
from tolerances import DTYPES, assert_near

from bt_fast import ops
from bt_fast.ops import divergence
from bt_fast.ops.launch import KERNEL_DTYPES

quick = settings(max_examples=30, deadline=None)
ROWS = {name: getattr(divergence, f"{name}_rows") for name in LOSSES}


def trades(adversarial, clean):
    return F.kl_div(F.log_softmax(adversarial, dim=1), F.softmax(clean, dim=1), reduction="sum")


def mart(clean, adversarial, labels, beta):
    """Computes the loss by the code of MART's authors."""
    probs = F.softmax(adversarial, dim=1)
    last_two = torch.argsort(probs, dim=1)[:, -2:]
    runner_up = torch.where(last_two[:, -1] == labels, last_two[:, -2], last_two[:, -1])
    boosted = F.cross_entropy(adversarial, labels) + F.nll_loss(torch.log(1.0001 - probs + 1e-12), runner_up)
    natural = F.softmax(clean, dim=1)
    true_probs = torch.gather(natural, 1, labels[:, None]).squeeze(1)
    kl = torch.nn.KLDivLoss(reduction="none")(torch.log(probs + 1e-12), natural)
    return boosted + beta * (1.0 / len(clean)) * torch.sum(torch.sum(kl, dim=1) * (1.0000001 - true_probs))


def augmix(clean, first, second):
    """Computes the loss by the code of AugMix's authors, summed over the rows."""
    views = [F.softmax(z, dim=1) for z in (clean, first, second)]
    mixture = torch.clamp((views[0] + views[1] + views[2]) / 3.0, 1e-7, 1).log()
    return len(clean) * sum(F.kl_div(mixture, p, reduction="batchmean") for p in views) / 3.0


LITERALLY = {"trades_kl": trades, "mart_loss": mart, "js_divergence": augmix}


def loss_and_gradients(loss, case, **options):
    """Returns the loss and its gradients with respect to fresh leaves of the case's logits."""
    leaves = [z.clone().requires_grad_() for z in case.logits]
    value = loss(*with_logits(case, leaves), **options)
    return value, torch.autograd.grad(value, leaves)


def with_logits(case, logits):
    return [*logits, *case.arguments[len(logits) :]]


def random_case(name, n, classes, seed, dtype=torch.float64, spread=2.0):
    g = torch.Generator().manual_seed(seed)
    logits = [(spread * torch.randn(n, classes, generator=g, dtype=torch.float64)).to(dtype) for _ in range(3)]
    others = [torch.randint(classes, (n,), generator=g), BETA] if name == "mart_loss" else []
    return divergence_cases.Case(name, (*logits[: 3 if name == "js_divergence" else 2], *others))


# Values


@pytest.mark.parametrize("name", LOSSES)
@quick
@given(st.integers(1, 6), st.integers(2, 12), st.integers(0, 2**31), st.sampled_from([0.1, 2.0, 6.0]))
def test_loss_and_gradients_are_the_authors(name, n, classes, seed, spread):
    case = random_case(name, n, classes, seed, spread=spread)
    value, gradients = loss_and_gradients(getattr(ops, name), case)
    expected, expected_gradients = loss_and_gradients(LITERALLY[name], case)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    for a, b in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_mixture_is_clamped_and_passes_no_gradient_there():
    z = torch.tensor([[0.0, -20.0, -16.0], [0.0, -15.0, -17.0], [0.0, -30.0, -1.0]], dtype=torch.float64)
    case = divergence_cases.Case("js_divergence", (z, z.flip(0) - 1.0, 1.1 * z))
    mean = sum(v.softmax(dim=1) for v in case.logits) / 3
    assert (mean < 1e-7).sum() == 3
    (value, gradients), (expected, others) = (
        loss_and_gradients(loss, case) for loss in (ops.js_divergence, LITERALLY["js_divergence"])
    )
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    for a, b in zip(gradients, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-15)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("special", [False, True])
def test_below_double_precision_it_is_rounded_once(name, dtype, special):
    for seed, (n, classes) in enumerate([(9, 10), (9, 2), (6, 1000)]):
        case = divergence_cases.case(name, n, classes, dtype, seed, special=special)
        assert_right(case, ROWS[name](*case.arguments))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows",
    [
        ([1e4, -1e4, 0.0], [1e4, -1e4, 0.0], [1e4, -1e4, 0.0]),
        ([-1e4, 1e4, 0.0], [1e4, -1e4, 0.0], [0.0, -1e4, 1e4]),
        ([0.0, -math.inf, 1.0], [0.0, -math.inf, 0.5], [0.0, -math.inf, 0.5]),
        ([0.0, -math.inf, -math.inf], [0.0, -math.inf, -math.inf], [0.0, -math.inf, -math.inf]),
    ],
)
def test_saturated_rows_are_finite(name, dtype, rows):
    case = random_case(name, 1, 3, 0, dtype)
    for z, row in zip(case.logits, rows, strict=False):
        z[:] = torch.tensor(row, dtype=dtype)
    if name == "mart_loss":
        case.arguments[2][:] = 0
    value, gradients = loss_and_gradients(getattr(ops, name), case)
    assert value.isfinite()
    assert all(g.isfinite().all() and g.dtype == dtype for g in gradients)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", LOSSES)
def test_a_row_without_numbers_is_nan_and_spoils_no_other(name, bad):
    for place in range(2):
        case = random_case(name, 3, 4, 0)
        case.logits[place][1, 2] = bad
        loss, *gradients = ROWS[name](*case.arguments)
        assert loss.isnan().tolist() == [False, True, False]
        assert all(g.isnan().all(dim=1).tolist() == g.isnan().any(dim=1).tolist() == [0, 1, 0] for g in gradients)


@pytest.mark.parametrize("label", [-1, 4, -100])
def test_a_label_outside_the_classes_is_nan(label):
    case = random_case("mart_loss", 3, 4, 0)
    case.arguments[2][1] = label
    for values in divergence.mart_loss_rows(*case.arguments):
        assert values.isnan().view(3, -1).all(dim=1).tolist() == [False, True, False]


def test_the_runner_up_is_the_first_of_equals_and_never_the_label():
    z = torch.tensor([[5.0, 2.0, 3.0, 3.0], [1.0, 1.0, 1.0, 1.0], [0.0, 4.0, -math.inf, -math.inf]]).double()
    labels = torch.tensor([0, 0, 1])
    gradient = divergence.mart_loss_rows(torch.zeros_like(z), z, labels, 0.0)[2]
    q = z.softmax(dim=1)
    for row, runner_up in enumerate([2, 1, 0]):
        one_hot = torch.eye(4).double()
        away = q[row, runner_up] / (1.0001 - q[row, runner_up] + 1e-12) * (one_hot[runner_up] - q[row])
        assert_near(gradient[row], q[row] - one_hot[labels[row]] + away)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows_are_0(name, dtype):
    value, gradients = loss_and_gradients(getattr(ops, name), random_case(name, 0, 5, 0, dtype))
    assert value.item() == 0.0
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    assert all(g.shape == (0, 5) for g in gradients)


# Derivatives


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_numerically_also_the_second(name):
    case = random_case(name, 3, 4, 0)
    weights = torch.rand(3, dtype=torch.float64, requires_grad=True)

    def loss(weights, *logits):
        return getattr(ops, name)(*with_logits(case, logits), weights=weights)

    leaves = (weights, *(z.requires_grad_() for z in case.logits))
    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


@pytest.mark.parametrize("name", LOSSES)
def test_a_second_derivative_is_finite_for_saturated_rows(name):
    case = divergence_cases.case(name, 9, 5, torch.float32, 0)
    leaves = [z.requires_grad_() for z in case.logits]
    gradients = torch.autograd.grad(getattr(ops, name)(*case.arguments), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)
    assert all(g.isfinite().all() for g in second)


@pytest.mark.parametrize("name", LOSSES)
def test_used_twice_and_beside_a_cross_entropy(name):
    case = random_case(name, 4, 5, 0)
    labels = torch.arange(4)

    def objective(loss):
        def value(*arguments):
            term = loss(*arguments)
            return term.square() + 3 * term + F.cross_entropy(arguments[0], labels)

        return value

    ours, theirs = (loss_and_gradients(objective(loss), case)[1] for loss in (getattr(ops, name), LITERALLY[name]))
    for a, b in zip(ours, theirs, strict=True):
        assert_near(a, b)


@pytest.mark.parametrize("name", LOSSES)
def test_backward_twice_and_for_a_part_of_the_logits(name):
    case = random_case(name, 4, 5, 0)
    leaves = [z.requires_grad_() for z in case.logits]
    value = getattr(ops, name)(*case.arguments)
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(value, leaves, retain_graph=True), strict=True):
        assert torch.equal(a, b)
    value.backward(inputs=leaves[1:])
    assert leaves[0].grad is None
    assert torch.equal(leaves[1].grad, first[1])
    detached = getattr(ops, name)(leaves[0].detach(), *case.arguments[1:])
    assert torch.equal(torch.autograd.grad(detached, leaves[1])[0], first[1])


@pytest.mark.parametrize("name", LOSSES)
def test_weights_scale_the_rows(name):
    case = random_case(name, 4, 5, 0, torch.float32)
    weights = torch.tensor([0.5, 0.0, 2.0, 1.0])
    value, gradients = loss_and_gradients(getattr(ops, name), case, weights=weights)
    rows, *of_rows = ROWS[name](*case.arguments)
    share = 4 if name == "mart_loss" else 1
    assert_near(value, (rows * weights).sum() / share)
    for a, b in zip(gradients, of_rows, strict=True):
        assert_near(a, b * weights[:, None] / share)


@pytest.mark.parametrize("name", LOSSES)
def test_in_16_bits_a_loss_scale_beyond_their_range_is_applied_in_single_precision(name):
    case = random_case(name, 4, 5, 0, torch.float16, spread=0.01)
    scaled, plain = (
        loss_and_gradients(lambda *a, s=scale: s * getattr(ops, name)(*a), case)[1] for scale in (2.0**17, 2.0**10)
    )
    for a, b in zip(scaled, plain, strict=True):
        torch.testing.assert_close(a.float(), (2.0**7 * b.float()).clamp(-torch.inf, torch.inf).half().float())


@pytest.mark.parametrize("name", LOSSES)
def test_strides_do_not_matter(name):
    dense = divergence_cases.case(name, 4, 5, torch.float32, 0)
    for strides in ("apart", "columns"):
        other = divergence_cases.case(name, 4, 5, torch.float32, 0, strides=strides)
        for a, b in zip(ROWS[name](*other.arguments), ROWS[name](*dense.arguments), strict=True):
            torch.testing.assert_close(a, b)


# Registration


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(name, dtype):
    case = random_case(name, 4, 5, 0, dtype)
    for grad in (False, True):
        torch.library.opcheck(ROWS[name], with_logits(case, [z.requires_grad_(grad) for z in case.logits]))


@pytest.mark.parametrize("name", LOSSES)
def test_a_compiled_loss_is_one_op(name):
    case, targets = random_case(name, 4, 5, 0), []

    def backend(graph, _):
        targets.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    plain = getattr(ops, name)(*case.arguments)
    compiled = torch.compile(getattr(ops, name), fullgraph=True, backend=backend)(*case.arguments)
    assert torch.equal(plain, compiled)
    assert [t for t in targets if "bt_fast" in str(t)] == [getattr(torch.ops.bt_fast, name).default]
    assert len(targets) <= 4  # the op, its first result, the sum, and for MART the division


@pytest.mark.parametrize("name", LOSSES)
def test_a_compiled_loss_has_the_gradients(name):
    case = random_case(name, 4, 5, 0)
    torch._dynamo.reset()
    compiled = torch.compile(getattr(ops, name), fullgraph=True, backend="aot_eager")
    for a, b in zip(*(loss_and_gradients(f, case)[1] for f in (compiled, getattr(ops, name))), strict=True):
        assert_near(a, b)


@pytest.mark.parametrize("name", LOSSES)
def test_on_a_device_nothing_waits(name):
    case = random_case(name, 4, 5, 0, torch.float32)
    arguments = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in case.arguments]
    with pretended_device():
        leaves = [a.requires_grad_() for a in arguments if isinstance(a, torch.Tensor) and a.is_floating_point()]
        value = getattr(ops, name)(*arguments, weights=torch.empty(4, device=DEVICE))
        value.backward()
        getattr(divergence, f"{name}_reference")(*arguments)
    assert all(z.grad.shape == (4, 5) for z in leaves)


@pytest.mark.parametrize("name", LOSSES)
def test_on_cuda_the_kernel_runs_where_it_can(name):
    case = random_case(name, 4, 5, 0, torch.float32)
    with mock.patch.object(divergence, "kernel_takes", return_value=True):
        run = mock.Mock(side_effect=getattr(divergence, f"{name}_reference"))
        with mock.patch.object(divergence, f"launch_{name}", run):
            getattr(ops, name)(*case.arguments)
    assert run.call_count == 1


WRONG = [
    (0, lambda z: z.int(), TypeError),
    (0, lambda z: z[0], ValueError),
    (0, lambda z: z[:, :0], ValueError),
    (1, lambda z: z.float(), TypeError),
    (1, lambda z: z[:2], ValueError),
    (1, lambda z: z[:, :3], ValueError),
    (1, lambda z: z.to("meta"), ValueError),
]
NAMES = {
    "trades_kl": ("adversarial_logits", "clean_logits"),
    "mart_loss": ("clean_logits", "adversarial_logits", "labels"),
    "js_divergence": ("clean_logits", "first_logits", "second_logits"),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("place", "change", "error"), WRONG)
def test_an_error_names_the_argument(name, place, change, error):
    arguments = list(random_case(name, 4, 5, 0).arguments)
    arguments[place] = change(arguments[place])
    with pytest.raises(error, match=f"^{NAMES[name][place]} must"):
        getattr(ops, name)(*arguments)


@pytest.mark.parametrize(
    ("labels", "error"),
    [
        (torch.zeros(4, dtype=torch.int32), TypeError),
        (torch.zeros(3, dtype=torch.int64), ValueError),
        (torch.zeros(4, dtype=torch.int64, device="meta"), ValueError),
    ],
)
def test_labels_that_do_not_fit(labels, error):
    clean, adversarial, *_ = random_case("mart_loss", 4, 5, 0).arguments
    with pytest.raises(error, match=r"^labels must"):
        ops.mart_loss(clean, adversarial, labels, BETA)
    with pytest.raises(ValueError, match="2 classes"):
        ops.mart_loss(clean[:, :1], clean[:, :1], torch.zeros(4, dtype=torch.int64), BETA)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("weights", "error"),
    [
        (torch.ones(4), TypeError),
        (torch.ones(3, dtype=torch.float64), ValueError),
        (torch.ones(4, 1, dtype=torch.float64), ValueError),
        (torch.ones(4, dtype=torch.float64, device="meta"), ValueError),
    ],
)
def test_weights_that_do_not_fit(name, weights, error):
    with pytest.raises(error, match=r"^weights must"):
        getattr(ops, name)(*random_case(name, 4, 5, 0).arguments, weights=weights)
