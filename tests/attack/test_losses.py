import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_pgd import loss_of
from tolerances import DTYPES

from bt_fast.attack.losses import LOSSES, direction_of


@pytest.mark.parametrize("loss", LOSSES)
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(2, 7), st.integers(0, 1000), st.booleans())
def test_the_direction_is_the_losses_gradient_if_scaled_up_to_a_factor_for_each_row(loss, n, k, seed, scaled):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, k, generator=g, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(k, (n,), generator=g)
    (grad,) = torch.autograd.grad(loss_of(loss, logits, labels), logits)
    result = direction_of(loss, logits.detach(), labels, scaled)
    torch.testing.assert_close(F.normalize(result, dim=1), F.normalize(grad, dim=1))
    if not scaled:
        torch.testing.assert_close(result, grad)
    assert ((result * grad).sum(dim=1) > 0).all()


def test_the_margin_is_between_the_true_logit_and_the_first_largest_wrong_one():
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0], [0.0, -torch.inf, -1.0]])
    result = direction_of("margin", logits, torch.tensor([1, 1, 0]), False)
    assert result.tolist() == [[0, -1, 1], [1, -1, 0], [-1, 0, 1]]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_direction_has_the_logits_dtype_and_is_never_zero(loss, dtype):
    logits = torch.tensor([[100.0, -100.0, 0.0], [0.0, 1.0, 2.0]], dtype=dtype)
    result = direction_of(loss, logits, torch.tensor([0, 1]), scaled=True)
    assert result.dtype == dtype
    assert result.abs().amax(dim=1).gt(0).all()
    assert result.isfinite().all()
