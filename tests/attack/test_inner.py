"""The inner losses' directions: the gradients of the losses as they are written in the papers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_pgd import loss_of
from tolerances import DTYPES

from bt_fast import PGD
from bt_fast.attack.inner import NAMES, Rows, check_enough_classes, direction_of


def case(n, k, seed=0, dtype=torch.float64):
    """Logits, targets and labels: the targets a distribution, or for losses of the label its one-hot row."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, k, generator=g, dtype=torch.float64).to(dtype)
    return (
        logits,
        torch.randn(n, k, generator=g, dtype=torch.float64).softmax(dim=1),
        torch.randint(k, (n,), generator=g),
    )


def targets(inner, target, labels):
    return target if inner in ("kl", "lse") else F.one_hot(labels, target.shape[1]).double()


def autograd(inner, logits, target, labels):
    probe = logits.detach().clone().requires_grad_()
    return torch.autograd.grad(loss_of(inner, probe, labels, target), probe)[0]


@pytest.mark.parametrize("inner", NAMES)
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(3, 8), st.integers(0, 1000))
def test_the_direction_is_the_gradient_of_the_loss(inner, n, k, seed):
    logits, target, labels = case(n, k, seed)
    target = targets(inner, target, labels)
    result = direction_of(inner, logits, target, labels)
    torch.testing.assert_close(result, autograd(inner, logits, target, labels), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("inner", NAMES)
@pytest.mark.parametrize("together", [False, True])
def test_scaled_it_is_the_same_direction_with_a_largest_entry_from_1_to_2_in_each_row_or_in_all(inner, together):
    logits, target, labels = case(5, 4)
    target = targets(inner, target, labels)
    plain = direction_of(inner, logits, target, labels)
    result = direction_of(inner, logits, target, labels, scaled=True, together=together)
    factors = (result * plain).sum(dim=1) / plain.square().sum(dim=1)
    torch.testing.assert_close(result, factors[:, None] * plain)
    assert (factors.log2() == factors.log2().round()).all()
    largest = result.abs().amax(dim=1)
    if together:
        assert factors.unique().numel() == 1
        assert 1 <= largest.max() < 2
    elif inner != "margin":
        assert ((largest >= 1) & (largest < 2)).all()


def test_the_margin_is_between_the_true_logit_and_the_first_largest_wrong_one():
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0], [0.0, -torch.inf, -1.0]])
    result = direction_of("margin", logits, logits, torch.tensor([1, 1, 0]))
    assert result.tolist() == [[0, -1, 1], [1, -1, 0], [-1, 0, 1]]


def test_dlr_does_not_change_with_the_scale_of_the_logits():
    logits, target, labels = case(6, 5)
    result = direction_of("dlr", logits, target, labels)
    torch.testing.assert_close(7.0 * direction_of("dlr", 7.0 * logits, target, labels), result, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close((result * logits).sum(dim=1), torch.zeros(6).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("inner", ["kl", "lse"])
def test_at_the_clean_point_the_direction_is_exactly_0(inner):
    logits, _, labels = case(5, 4, dtype=torch.float32)
    clean = logits.double().softmax(dim=1).float()
    assert (direction_of(inner, logits, clean, labels) == 0).all()


@pytest.mark.parametrize("inner", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_direction_has_the_logits_dtype_and_scaled_is_never_zero(inner, dtype):
    logits = torch.tensor([[10.0, -9.0, 0.0], [0.0, 1.0, 2.0]], dtype=dtype)
    labels = torch.tensor([0, 1])
    target = targets(inner, torch.full((2, 3), 1 / 3), labels).to(
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    result = direction_of(inner, logits, target, labels, scaled=True)
    assert result.dtype == dtype
    assert result.abs().amax(dim=1).gt(0).all()
    assert result.isfinite().all()


@pytest.mark.parametrize("inner", [*NAMES, "a function"])
def test_a_row_without_a_softmax_has_no_direction_and_the_others_do(inner):
    logits, target, labels = case(4, 5)
    whole = direction_of(function_of(inner), logits, target, labels)
    spoilt = logits.clone()
    spoilt[2, 3] = torch.nan
    result = direction_of(function_of(inner), spoilt, target, labels)
    assert result[2].isnan().all()
    assert torch.equal(result[[0, 1, 3]], whole[[0, 1, 3]])


def function_of(inner):
    return (lambda z, rows: z.sum(dim=1)) if inner == "a function" else inner


def test_a_function_is_given_outputs_clean_outputs_and_labels():
    logits, clean, labels = case(4, 5)
    given_rows = []

    def inner(z, rows):
        given_rows.append((z.detach().clone(), rows))
        return (z - rows.clean_outputs).square().sum(dim=1) * (1 + rows.labels)

    result = direction_of(inner, logits, clean, labels)
    torch.testing.assert_close(result, 2 * (logits - clean) * (1 + labels)[:, None])
    ((z, rows),) = given_rows
    assert isinstance(rows, Rows)
    assert torch.equal(z, logits)
    assert rows.clean_outputs is clean
    assert rows.labels is labels


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_function_computes_in_32_bits(dtype):
    seen = []

    def inner(z, rows):
        seen.append(z.dtype)
        return (1e-6 * z).sum(dim=1)

    logits = torch.zeros(2, 3, dtype=dtype)
    assert direction_of(inner, logits, torch.zeros(2, 3), None, scaled=True).dtype == dtype
    assert seen == [torch.float32]


WRONG = {
    "no tensor": (
        lambda z, rows: 3.0,
        TypeError,
        r"inner must return a floating-point tensor, got float: let it return",
    ),
    "integers": (lambda z, rows: z.argmax(dim=1), TypeError, r"got torch\.int64"),
    "one number": (
        lambda z, rows: z.sum(),
        ValueError,
        r"inner must return shape \[2\], one loss for each row, got \[\]",
    ),
    "a table": (lambda z, rows: z, ValueError, r"got \[2, 3\]: let it sum over the outputs only, with \.sum\(dim=1\)"),
    "a constant": (
        lambda z, rows: z.detach().sum(dim=1),
        ValueError,
        r"inner must return a loss with a gradient.*: take",
    ),
    "sparse": (lambda z, rows: z.sum(dim=1).to_sparse(), TypeError, r"got torch\.float32, torch\.sparse_coo"),
    "elsewhere": (lambda z, rows: z.sum(dim=1).to("meta"), ValueError, "inner's result must be on cpu like"),
    "a leaf": (lambda z, rows: torch.ones(2, requires_grad=True) * 2, ValueError, "inner must return a loss with a"),
}


@pytest.mark.parametrize(("inner", "error", "message"), WRONG.values(), ids=WRONG)
def test_a_function_of_another_kind_is_reported_as_what_it_returns(inner, error, message):
    with pytest.raises(error, match=message):
        direction_of(inner, torch.zeros(2, 3), torch.zeros(2, 3), None)


def test_dlr_needs_three_classes():
    check_enough_classes("dlr", 3)
    check_enough_classes("margin", 2)
    with pytest.raises(ValueError, match=r"inner='dlr'.*K >= 3 classes, got 2: write inner='margin'"):
        check_enough_classes("dlr", 2)


@pytest.mark.parametrize(
    ("inner", "error"), [("hinge", ValueError), ("ce", ValueError), (3, TypeError), (torch.nn.Module, TypeError)]
)
def test_an_inner_loss_that_is_none_is_refused_with_those_that_there_are(inner, error):
    with pytest.raises(
        error, match=r"inner must be one of 'kl', 'cross_entropy', 'margin', 'dlr', 'lse' or a function"
    ):
        PGD(0.1, 0.03, 3, inner=inner)


def test_an_attack_with_a_function_is_still_plain_data():
    attack = PGD(0.1, 0.03, 3, inner=function_of("a function"))
    assert copy.copy(attack) == attack
    assert len({attack, copy.copy(attack)}) == 1
