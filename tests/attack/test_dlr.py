"""The difference of logits ratio against its definition, row by row."""

import pytest
import reference_apgd
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import DTYPES

from bt_fast.attack.dlr import dlr, ranked_wrong, with_goal
from bt_fast.attack.inner import check_enough_classes


def rows(n, k, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=g, dtype=torch.float64).mul(3), torch.randint(k, (n,), generator=g)


def by_rows(logits, labels, goals=None):
    """Values and gradients of the reference's loss, one row after another."""
    values, gradients = [], []
    for i, (z, y) in enumerate(zip(logits, labels.tolist(), strict=True)):
        z = z.clone().requires_grad_()
        value = reference_apgd.dlr(z, y) if goals is None else reference_apgd.dlr_targeted(z, y, int(goals[i]))
        gradients += torch.autograd.grad(value, z)
        values.append(value.detach())
    return torch.stack(values), torch.stack(gradients)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(3, 12), st.integers(0, 1000))
def test_the_values_and_gradients_are_those_of_the_definition(n, k, seed):
    logits, labels = rows(n, k, seed)
    torch.testing.assert_close(dlr(logits, labels), by_rows(logits, labels), rtol=1e-10, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(4, 12), st.integers(0, 1000))
def test_towards_a_goal_too(n, k, seed):
    logits, labels = rows(n, k, seed)
    goals = (labels + 1 + torch.arange(n) % (k - 1)) % k
    torch.testing.assert_close(dlr(logits, labels, goals), by_rows(logits, labels, goals), rtol=1e-10, atol=1e-12)


def test_neither_shift_nor_scale_of_the_logits_changes_the_value():
    logits, labels = rows(8, 10, 0)
    for goals in (None, (labels + 3) % 10):
        value, gradient = dlr(logits, labels, goals)
        scaled_value, scaled = dlr(7 * logits + 2, labels, goals)
        torch.testing.assert_close(scaled_value, value)
        torch.testing.assert_close(7 * scaled, gradient)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sixteen_bits_are_computed_in_float32(dtype):
    logits, labels = rows(5, 6, 1)
    logits = logits.to(dtype)
    value, gradient = dlr(logits, labels)
    wide = torch.promote_types(dtype, torch.float32)
    assert (value.dtype, gradient.dtype) == (wide, dtype)
    torch.testing.assert_close(value, dlr(logits.to(wide), labels)[0])


def test_equal_logits_give_numbers():
    value, gradient = dlr(torch.ones(2, 5, dtype=torch.float64), torch.tensor([0, 4]))
    assert value.tolist() == [0, 0]
    assert gradient.isfinite().all()


def test_wrong_classes_are_ranked_without_the_label():
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 5.0, 4.0, 6.0]])
    labels = torch.tensor([0, 2])
    assert ranked_wrong(logits, labels, 3).tolist() == [[2, 1, 3], [3, 1, 0]]
    one_hot = torch.nn.functional.one_hot(labels, 4).float()
    assert with_goal(one_hot, logits).tolist() == [[1, 0, -1, 0], [0, 0, 1, -1]]


@pytest.mark.parametrize(("inner", "least"), [("dlr", 3), ("dlr_targeted", 4)])
def test_a_loss_says_how_many_classes_it_needs(inner, least):
    check_enough_classes(inner, least)
    with pytest.raises(ValueError, match=f"inner='{inner}' divides .* must have K >= {least} classes, got {least - 1}"):
        check_enough_classes(inner, least - 1)
