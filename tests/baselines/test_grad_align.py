import math

import pytest
import torch
import torch.nn.functional as F
from pretended_device import DEVICE, pretended_device
from small_models import CLASSES, SHAPE, Dead, assert_unchanged, batch, build, gradients, snapshot
from tolerances import assert_near, assert_near_nested
from torch import nn

from bt_fast import trades_loss
from bt_fast.baselines.fast import fast_loss
from bt_fast.baselines.grad_align import grad_align

EPSILON = 0.1
X, Y = batch()


def input_gradient(model, x, y, delta, backprop):
    delta = delta.requires_grad_()
    loss = F.cross_entropy(model(x + delta), y)
    grad = torch.autograd.grad(loss, delta, create_graph=backprop)[0]
    return grad if backprop else grad.detach()


def authors_term(model, x, y, epsilon):
    """The authors' term: it leaves out samples with a gradient of 0 and differentiates only the second gradient."""
    grad = input_gradient(model, x, y, torch.zeros_like(x), False)
    eta = (2.0 * torch.rand(x.shape, dtype=x.dtype) - 1.0) * epsilon
    grad2 = input_gradient(model, x, y, eta, True)
    nnz = ((grad**2).sum([1, 2, 3]) ** 0.5 != 0) * ((grad2**2).sum([1, 2, 3]) ** 0.5 != 0)
    grad1, grad2 = grad[nnz], grad2[nnz]
    grad1 = grad1 / ((grad1**2).sum([1, 2, 3]) ** 0.5)[:, None, None, None]
    grad2 = grad2 / ((grad2**2).sum([1, 2, 3]) ** 0.5)[:, None, None, None]
    return 1.0 - (grad1 * grad2).sum((1, 2, 3)).mean()


class Gated(nn.Module):
    """A model with constant logits for the images that are dark at one pixel."""

    def __init__(self):
        super().__init__()
        self.body = build("conv_bn")

    def forward(self, x):
        return torch.where(x[:, 0, 2, 2, None] > 0.5, self.body(x), self.body[-1].bias + 0 * self.body(x))


def computed(loss_of, model, seed=4):
    torch.manual_seed(seed)
    loss = loss_of(model, X, Y)
    loss.backward()
    return loss.detach(), gradients(model), model.state_dict()


def with_relus_smoothed(model):
    """Replaces ReLU by softplus: with ReLU the second derivative by the images is 0 except for batch norm."""
    for name, child in model.named_children():
        if isinstance(child, nn.ReLU):
            setattr(model, name, nn.Softplus())
    return model


@pytest.mark.parametrize("name", ["conv_bn", "normalising", "own norm", Gated])
def test_the_term_and_its_gradients_are_the_authors(name):
    ours = computed(lambda *given: grad_align(*given, epsilon=EPSILON), build(name))
    theirs = computed(lambda *given: authors_term(*given, EPSILON), build(name))
    assert ours[0] > 0.01
    assert_near(ours[0], theirs[0])
    assert_near_nested(ours[1], theirs[1])
    assert_near_nested(ours[2], theirs[2])
    assert any(g is not None and (g != 0).any() for g in ours[1].values())


def test_the_term_and_its_gradients_of_a_smooth_model():
    ours = computed(lambda *given: grad_align(*given, epsilon=EPSILON), with_relus_smoothed(build("conv_bn")))
    theirs = computed(lambda *given: authors_term(*given, EPSILON), with_relus_smoothed(build("conv_bn")))
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        assert_near_nested(a, b)
    assert_near(ours[0], theirs[0])


def zero_head():
    model = build("conv_bn")
    nn.init.zeros_(model[-1].weight)
    nn.init.zeros_(model[-1].bias)
    return model


@pytest.mark.parametrize("make", [zero_head, lambda: build(Dead)], ids=["zero head", "dead"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_all_gradients_are_zero_the_term_is_zero_and_its_gradient_too(make, dtype):
    model = make().to(dtype)
    loss = grad_align(model, X.to(dtype), Y, epsilon=EPSILON)
    assert loss == 0
    loss.backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_gradients_too_small_to_be_squared_keep_their_direction():
    """Such gradients occur where a sample is classified with near certainty."""
    terms = []
    for factor in (1.0, 1e-25):
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.Softplus(), nn.Linear(4, CLASSES))
        torch.manual_seed(0)
        for p in model.parameters():
            nn.init.normal_(p)
        with torch.no_grad():
            model[3].weight.mul_(factor if factor < 1 else 1e-6)
        torch.manual_seed(1)
        loss = grad_align(model, X.float(), Y, epsilon=EPSILON)
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        terms.append(loss.detach())
    assert terms[0] > 1e-4
    torch.testing.assert_close(*terms, rtol=1e-3, atol=0)


def test_only_the_backward_of_the_caller_touches_gradients_and_modes_come_back():
    model = build("frozen norm")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.eval()
    result = snapshot(model)
    images = X.clone().requires_grad_()
    loss = grad_align(model, images, Y, epsilon=EPSILON)
    assert loss.shape == ()
    after = snapshot(model)
    assert all(after[k] is v for k, v in result.items() if k[1] in ("training", "requires_grad"))
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    loss.backward()
    assert images.grad is None


def test_it_adds_to_any_loss():
    model = build("conv_bn")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss = fast_loss(trades_loss, model, X, Y, optimizer, epsilon=EPSILON, beta=6.0)
    (loss + 0.2 * grad_align(model, X, Y, epsilon=EPSILON)).backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_training_by_it_aligns_the_gradients():
    model = with_relus_smoothed(build("conv_bn"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    terms = []
    for step in range(30):
        torch.manual_seed(step % 3)
        loss = grad_align(model, X, Y, epsilon=EPSILON)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        terms.append(loss.detach())
    assert sum(terms[-3:]) < 0.7 * sum(terms[:3])


def test_a_generator_decides_eta():
    terms = [
        grad_align(build("conv_bn"), X, Y, epsilon=EPSILON, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert terms[0] == terms[1] != terms[2]


def test_the_host_waits_once():
    model = build("conv_bn", dtype=torch.float32).to(DEVICE)
    x = torch.empty(8, *SHAPE, device=DEVICE)
    y = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    with pretended_device() as reads:
        grad_align(model, x, y, epsilon=EPSILON).backward()
    assert (reads.started, reads.waited) == (1, 1)


def test_autocast():
    model = build("conv_bn", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = grad_align(model, X.float(), Y, epsilon=EPSILON)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model[0].weight.grad is not None


BAD = {
    "epsilon": ({"epsilon": -0.1}, ValueError, "epsilon.*at least 0.*-0.1"),
    "epsilon NaN": ({"epsilon": math.nan}, ValueError, "epsilon.*nan"),
    "epsilon in words": ({"epsilon": "x"}, TypeError, "epsilon must be a number"),
    "generator": ({"generator": 5}, TypeError, "generator must be a torch.Generator"),
    "byte images": ({"x_natural": (X * 255).byte()}, TypeError, "x_natural.*floating-point"),
    "pixels": ({"x_natural": X + 0.5}, ValueError, r"x_natural must lie in \[0, 1\]"),
    "no images": ({"x_natural": X[:0], "y": Y[:0]}, ValueError, "x_natural.*m >= 1"),
    "labels": ({"y": Y.double()}, TypeError, "y must be integers"),
    "too few labels": ({"y": Y[1:]}, ValueError, r"y must have shape \[8\]"),
    "label too large": ({"y": Y + CLASSES}, ValueError, r"y must lie in 0\.\.4"),
    "NaN logits": ({"model": nn.Sequential(build("conv_bn"), nn.Threshold(math.inf, math.nan))}, ValueError, "logits"),
    "no logits": ({"model": nn.Flatten(0)}, ValueError, "model must return logits"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    changed, error, message = BAD[name]
    given = {"model": build("conv_bn"), "x_natural": X, "y": Y, "epsilon": EPSILON, **changed}
    before = snapshot(given["model"])
    with pytest.raises(error, match=message):
        grad_align(**given)
    assert_unchanged(before, given["model"])
