import sys
from unittest import mock

import pytest
import torch
from small_models import assert_unchanged, batch, build, snapshot

from bt_fast import ThreatModel
from bt_fast.autoattack import autoattack, for_autoattack

LINF = ThreatModel(0.1)
X, Y = batch(10, dtype=torch.float32)


def model_in_training():
    model = build("dropout", dtype=torch.float32)
    model[1].eval()
    model[4].weight.requires_grad_(False)
    return model


# The model that AutoAttack gets


def test_forwards_without_gradient_are_those_of_the_eval_mode():
    model = model_in_training()
    with for_autoattack(model) as classifier, torch.no_grad():
        result = [classifier(X) for _ in range(2)]
    assert torch.equal(*result)
    assert torch.equal(result[0], model.eval()(X))


def test_a_gradient_reaches_the_images_and_no_parameter():
    model = model_in_training()
    with for_autoattack(model) as classifier:
        x = X.clone().requires_grad_()
        with torch.enable_grad():
            z = classifier(x)
            z[:, 0].sum().backward(retain_graph=True)  # FAB's way
        (grad,) = torch.autograd.grad(z[:, 0].sum(), x)  # APGD's way
    assert torch.equal(x.grad, grad)
    assert grad.abs().max() > 0
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("raises", [False, True])
def test_modes_and_requires_grad_come_back(raises):
    model = model_in_training()
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError) if raises else mock.MagicMock(), for_autoattack(model) as classifier:
        classifier(X)
        _ = 1 / (not raises)
    assert_unchanged(before, model)


def test_what_is_no_classifier_is_named():
    with for_autoattack(torch.nn.Identity()) as classifier, pytest.raises(ValueError, match="model must return logits"):
        classifier(X)


# AutoAttack


class OneStep:
    """Replaces AutoAttack's class: makes the same calls, and moves images by one signed gradient."""

    def __init__(self, model, norm, eps, seed, version, verbose, device):
        self.calls.append((norm, eps, seed, version, verbose, device))
        self.model, self.eps = model, eps

    def run_standard_evaluation(self, x_orig, y_orig, bs):
        torch.manual_seed(1)
        moved = []
        for x, y in zip(x_orig.split(bs), y_orig.split(bs), strict=True):
            probe = x.clone().requires_grad_()
            with torch.enable_grad():
                z = self.model(probe)
                (z.gather(1, y[:, None]).sum()).backward()
            moved.append((x - self.eps * probe.grad.sign()).clamp(0, 1))
        return torch.cat(moved)


@pytest.fixture
def package(monkeypatch):
    monkeypatch.setitem(sys.modules, "autoattack", mock.Mock(AutoAttack=OneStep))
    monkeypatch.setattr(OneStep, "calls", [], raising=False)
    return OneStep


def test_the_package_is_run_and_its_images_are_judged(package):
    model = model_in_training()
    y = model.eval()(X).argmax(dim=1)
    y[:3] = (y[:3] + 1) % 5
    model.train()
    before, state = snapshot(model), torch.get_rng_state()
    result = autoattack(model, X, y, ThreatModel(0.3, "l_2"), batch_size=4, seed=5)
    assert_unchanged(before, model)
    assert package.calls == [("L2", 0.3, 5, "standard", False, "cpu")]
    model.eval()
    stood = (model(X).argmax(dim=1) == y) & (model(result.x_adv).argmax(dim=1) == y)
    assert torch.equal(result.stood, stood)
    assert (result.clean_correct, result.robust_correct, result.total) == (7, int(stood.sum()), 10)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "autoattack", None)
    with pytest.raises(ImportError, match=r"pip install git\+https://github.com/fra31/auto-attack"):
        autoattack(build(), X, Y, LINF)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": X.byte()}, TypeError, "x must be floating-point images.*uint8"),
        ({"x": X[0]}, ValueError, r"x must have shape \[total, C, H, W\]"),
        ({"x": X + 1}, ValueError, r"x must lie in \[0, 1\]"),
        ({"y": Y[:3]}, ValueError, r"y must have shape \[10\]"),
        ({"y": Y + 5}, ValueError, r"y must lie in 0\.\.4, but 10 of 10"),
        ({"threat": ThreatModel(0.1, lower=-1.0)}, ValueError, "threat must have AutoAttack's bounds 0 and 1"),
        ({"version": "fast"}, ValueError, "version must be one of 'standard', 'plus', 'rand', got 'fast'"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
    ],
)
def test_bad_input_is_named_before_anything_runs(package, changed, error, message):
    given = {"x": X, "y": Y, "threat": LINF} | changed
    with pytest.raises(error, match=message):
        autoattack(build(dtype=torch.float32), **given)
    assert package.calls == []


class Many(torch.nn.Module):
    """A model with as many classes as AutoAttack's targeted attacks need."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 10))

    def forward(self, x):
        return self.body(x)


def test_the_real_package_breaks_at_least_what_it_reports():
    pytest.importorskip("autoattack")
    model = build(Many, dtype=torch.float32)
    y = model(X).argmax(dim=1)
    before = snapshot(model)
    result = autoattack(model, X[:4], y[:4], ThreatModel(0.02))
    assert result.clean_correct == 4
    assert (result.x_adv - X[:4]).abs().max() <= 0.02 * (1 + 1e-5)
    assert torch.equal(result.stood, model(result.x_adv).argmax(dim=1) == y[:4])
    assert_unchanged(before, model)
