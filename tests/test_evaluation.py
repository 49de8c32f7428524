import pytest
import torch
import torch.nn.functional as F
from small_models import Undefined, assert_unchanged, batch, build, snapshot, with_bright

from bt_fast.attack.threat import ThreatModel
from bt_fast.evaluation import Accuracy, evaluate, uniform_start

LINF, L2 = ThreatModel(0.1), ThreatModel(0.5, "l_2")


class Thresholds(torch.nn.Module):
    """Class 1 where the only pixel exceeds 1/2: what breaks, and by how much, is known."""

    def forward(self, x):
        z = 10 * (x.flatten(1) - 0.5)
        return torch.cat([-z, z], dim=1)


def pixels(*values):
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)


def plain_pgd(model, x, y, threat, steps, step_size, restarts, generator):
    """The plain loop on all samples, restart by restart, in float64."""
    model.eval()
    robust = model(x).argmax(dim=1) == y
    clean = int(robust.sum())
    for _ in range(restarts):
        rows = robust.nonzero().flatten()
        x0, labels = x[rows], y[rows]
        x_adv = (x0 + (2 * torch.rand(x0.shape, dtype=x.dtype, generator=generator) - 1) * threat.epsilon).clamp(0, 1)
        for _ in range(steps):
            x_adv.requires_grad_()
            (grad,) = torch.autograd.grad(F.cross_entropy(model(x_adv), labels, reduction="sum"), x_adv)
            x_adv = x_adv.detach() + step_size * grad.sign()
            x_adv = torch.minimum(torch.maximum(x_adv, x0 - threat.epsilon), x0 + threat.epsilon).clamp(0, 1)
        robust[rows] = model(x_adv).argmax(dim=1) == labels
    return Accuracy(clean, int(robust.sum()), len(y))


def test_a_sample_is_robust_if_its_margin_exceeds_epsilon():
    x = pixels(0.0, 0.39, 0.45, 0.55, 0.61, 1.0, 0.7)
    y = torch.tensor([0, 0, 0, 1, 1, 1, 0])
    found = evaluate(Thresholds(), [(x, y)], LINF, steps=5)
    assert found == Accuracy(clean_correct=6, robust_correct=4, total=7)
    assert (found.clean, found.robust) == (6 / 7, 4 / 7)


def test_l2_breaks_what_lies_within_the_radius():
    x, y = pixels(0.01, 0.2, 0.99), torch.tensor([0, 0, 1])
    assert evaluate(Thresholds(), [(x, y)], L2, steps=5).robust_correct == 0
    assert evaluate(Thresholds(), [(x, y)], ThreatModel(0.4, "l_2"), steps=5).robust_correct == 2


@pytest.mark.parametrize("restarts", [1, 3])
def test_counts_are_those_of_the_plain_loop(restarts):
    model = build("conv_bn")
    x, _ = batch(32)
    model.eval()
    model[-1].bias.data -= model(x).mean(dim=0).detach()  # so that no class wins everywhere
    y = model(x).argmax(dim=1)
    y[:5] = (y[:5] + 1) % 5
    model.train()
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    found = evaluate(model, [(x, y)], LINF, steps=4, restarts=restarts, generator=generators[0])
    assert found == plain_pgd(model, x, y, LINF, 4, 0.05, restarts, generators[1])
    assert 0 < found.robust_correct < found.clean_correct == 27


def test_batches_add_up():
    x, y = pixels(0.0, 0.45, 1.0, 0.9), torch.tensor([0, 0, 1, 0])
    whole = evaluate(Thresholds(), [(x, y)], LINF)
    assert whole == evaluate(Thresholds(), [(x[:1], y[:1]), (x[1:], y[1:])], LINF) == Accuracy(3, 2, 4)


def test_nothing_is_attacked_that_has_fallen():
    calls = []
    model = Thresholds()
    model.register_forward_hook(lambda _, args, __: calls.append(len(args[0])))
    evaluate(model, [(pixels(0.9, 0.9), torch.tensor([0, 0]))], LINF, steps=3, restarts=4)
    assert calls == [2]


def test_the_model_comes_back_as_it_was():
    model, (x, y) = build("conv_bn"), batch(6)
    model[1].eval()
    before = snapshot(model)
    evaluate(model, [(x, y)], LINF, steps=2, generator=torch.Generator().manual_seed(0))
    assert_unchanged(before, model)


@pytest.mark.parametrize("threat", [LINF, L2])
def test_starts_fill_the_ball(threat):
    x = torch.full((4000, 1, 1, 2), 0.5, dtype=torch.float64)
    delta = uniform_start(x, threat, torch.Generator().manual_seed(0)) - x
    size = delta.abs().amax(dim=(1, 2, 3)) if threat.norm == "l_inf" else delta.flatten(1).norm(dim=1)
    inside = (size <= threat.epsilon / 2).double().mean()
    assert size.max() <= threat.epsilon * (1 + 1e-12)
    assert inside.item() == pytest.approx(0.25, abs=0.03)  # in two dimensions half the radius holds a quarter


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 1.5}, TypeError, "steps.*1.5"),
        ({"restarts": 0}, ValueError, "restarts must be at least 1, got 0"),
        ({"step_size": -0.1}, ValueError, "step_size.*-0.1"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        evaluate(Thresholds(), [(pixels(0.1), torch.tensor([0]))], LINF, **options)


X, Y = torch.rand(6, 1, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 0])


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (X, Y + 5, ValueError, r"labels must lie in 0\.\.4, but 6 of 6"),
        (X, Y - 9, ValueError, r"labels must lie in 0\.\.4, but 6 of 6"),
        (X, Y[:3], ValueError, r"labels must have shape \[6\].*\[3\]"),
        (X, Y.double(), TypeError, "labels must be integers.*float64"),
        (X + 1, Y, ValueError, r"images must lie in \[0, 1\]"),
        (X * float("nan"), Y, ValueError, "images.*NaN"),
        (X.mul(255).byte(), Y, TypeError, "images must be floating point.*uint8"),
        (X[:0], Y[:0], ValueError, "images must be at least 1"),
    ],
)
def test_bad_batches_are_named(x, y, error, message):
    with pytest.raises(error, match=message):
        evaluate(build("conv_bn"), [(x, y)], LINF, steps=1)


def test_a_model_that_gives_nan_is_not_robust_but_an_error():
    model = build("conv_bn")
    model[-1].bias.data[2] = float("nan")
    with pytest.raises(ValueError, match="the model's logits must be finite, but 6 of 6"):
        evaluate(model, [(X, Y)], LINF, steps=1)


@pytest.mark.parametrize("threat", [LINF, L2])
def test_a_gradient_with_nan_is_not_robust_but_an_error(threat):
    model = build(Undefined)
    x, _ = with_bright([0, 6])
    y = model.eval()(x).argmax(dim=1)
    with pytest.raises(ValueError, match=r"input gradient must be finite, but held NaN for 2 of 8 samples"):
        evaluate(model, [(x, y)], threat, steps=1, step_size=1e-3)


def test_inference_mode_is_no_obstacle():
    with torch.inference_mode():
        found = evaluate(Thresholds(), [(pixels(0.0, 0.45, 1.0), torch.tensor([0, 0, 1]))], LINF, steps=5)
    assert found == Accuracy(3, 2, 3)


def test_no_samples_are_an_error():
    with pytest.raises(ValueError, match="batches must hold at least 1 sample"):
        evaluate(Thresholds(), [], LINF)
