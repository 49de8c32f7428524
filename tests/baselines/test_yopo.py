import math

import pytest
import reference_mart
import torch
import torch.nn.functional as F
from pretended_device import DEVICE, pretended_device
from small_models import (
    CLASSES,
    SHAPE,
    TiedNorm,
    assert_unchanged,
    batch,
    build,
    gradients,
    snapshot,
    with_bright,
)
from tolerances import assert_near, assert_near_nested
from torch import nn

from bt_fast.baselines.yopo import yopo_loss
from bt_fast.speedup import trades_reference_cost, yopo_cost

X, Y = batch()
SIZES = {"epsilon": 0.1, "step_size": 0.03}


def plain():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(16, CLASSES),
    )  # fmt: skip


def in_place():
    """A model that changes the output of its first layer in place."""
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, CLASSES))


def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, CLASSES))


def halves(model):
    """Splits a sequential model into f₀ and the rest."""
    if hasattr(model, "offset"):
        return (lambda x: model.body[0]((x - model.offset) / model.scale)), model.body[1:]
    k = 1 if isinstance(model[0], nn.Conv2d) else 2
    return model[:k], copied_out_of_place(model[k:])


def copied_out_of_place(rest):
    return nn.Sequential(*(nn.ReLU() if isinstance(m, nn.ReLU) else m for m in rest))


MODELS = {"plain": plain, "conv_bn": "conv_bn", "normalising": "normalising", "in place": in_place, "linear": linear}
EACH_MODEL = pytest.mark.parametrize("name", MODELS)


# The authors' lines, on a model split by hand; all gradients accumulate in `.grad`


def step(f0, inp, p, eta, inner_steps, sigma, eps):
    p = p.detach()
    for _ in range(inner_steps):
        tmp_inp = torch.clamp(inp + eta, 0, 1)
        hamiltonian = torch.sum(f0(tmp_inp) * p)
        eta_grad_sign = torch.autograd.grad(hamiltonian, eta)[0].sign()
        eta = eta - eta_grad_sign * sigma
        eta = torch.clamp(eta, -1.0 * eps, eps)
        eta = torch.clamp(inp + eta, 0.0, 1.0) - inp
        eta = eta.detach().requires_grad_()
    yofo_inp = torch.clamp(eta + inp, 0, 1)
    loss = -1.0 * torch.sum(f0(yofo_inp) * p)
    if loss.requires_grad:
        loss.backward()
    return yofo_inp, eta


def authors_pgd(model, x, y, m, n):
    """The authors' CIFAR-10 code without the forward that only reports accuracy; leaves the gradients in `.grad`."""
    f0, rest = halves(model)
    model.train()
    eta = ((2.0 * torch.rand(x.shape, dtype=x.dtype) - 1.0) * SIZES["epsilon"]).requires_grad_()
    total = 0.0
    for _ in range(m):
        layer_one_out = f0(x + eta.detach())
        if not layer_one_out.requires_grad:
            layer_one_out.requires_grad_()
        layer_one_out.retain_grad()
        loss = F.cross_entropy(rest(layer_one_out), y)
        loss.backward()
        p = -1.0 * layer_one_out.grad
        _, eta = step(f0, x, p, eta, n, SIZES["step_size"], SIZES["epsilon"])
        total = total + loss.detach()
    return total


def authors_images(model, x, y, m, n, objective):
    f0, rest = halves(model)
    model.eval()
    rest.eval()
    eta = (0.001 * torch.randn(x.shape)).to(x.dtype).requires_grad_()
    soft = rest(f0(x)).softmax(dim=1).detach()
    for _ in range(m):
        layer_one_out = f0(x + eta.detach())
        logits = rest(layer_one_out)
        if objective == "trades":
            loss = F.kl_div(F.log_softmax(logits, dim=1), soft, reduction="sum")
        else:
            loss = F.cross_entropy(logits, y)
        p = -1.0 * torch.autograd.grad(loss, [layer_one_out])[0]
        _, eta = step(f0, x, p, eta, n, SIZES["step_size"], SIZES["epsilon"])
    model.train()
    for parameter in model.parameters():
        parameter.grad = None
    return torch.clamp(x + eta.detach(), 0.0, 1.0)


def authors_trades(model, x, y, m, n, beta):
    x_adv = authors_images(model, x, y, m, n, "trades")
    raw_pred = model(x)
    adv_pred = model(x_adv)
    kl = F.kl_div(F.log_softmax(adv_pred, dim=1), F.softmax(raw_pred, dim=1), reduction="sum") / x.shape[0]
    loss = F.cross_entropy(raw_pred, y) + beta * kl
    loss.backward()
    return loss.detach()


def natural_mart(model, x, y, m, n, beta):
    x_adv = authors_images(model, x, y, m, n, "mart")
    logits = model(x)
    loss = reference_mart.loss_of_logits(logits, model(x_adv), y, beta)
    loss.backward()
    return loss.detach()


def ours(model, m, n, **options):
    loss = yopo_loss(model, X, Y, None, propagations=m, layer_steps=n, **SIZES, **options)
    assert loss.shape == ()
    assert all(p.grad is None for p in model.parameters())
    loss.backward()
    return loss.detach()


def compared(name, of_ours, of_theirs, frozen=()):
    results = []
    for run in (of_ours, of_theirs):
        model = build(MODELS[name])
        for k, parameter in enumerate(model.parameters()):
            parameter.requires_grad_(k not in frozen)
        torch.manual_seed(7)
        results.append((run(model), gradients(model), model.state_dict(), torch.get_rng_state()))
    (loss, grads, state, rng), (their_loss, their_grads, their_state, their_rng) = results
    assert_near(loss, their_loss)
    assert_near_nested(grads, their_grads)
    assert_near_nested(state, their_state)
    assert torch.equal(rng, their_rng)
    assert any((g != 0).any() for g in grads.values() if g is not None)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (5, 3), (2, 5)])
@EACH_MODEL
def test_pgd_is_the_authors(name, m, n):
    compared(name, lambda model: ours(model, m, n), lambda model: authors_pgd(model, X, Y, m, n))


@pytest.mark.parametrize("frozen", [{0}, {0, 1}])
def test_pgd_with_a_first_layer_that_is_not_trained(frozen):
    compared("conv_bn", lambda model: ours(model, 3, 2), lambda model: authors_pgd(model, X, Y, 3, 2), frozen)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (2, 5), (3, 4)])
@EACH_MODEL
def test_trades_is_the_authors(name, m, n):
    compared(
        name,
        lambda model: ours(model, m, n, objective="trades"),
        lambda model: authors_trades(model, X, Y, m, n, 1.0),
    )


@EACH_MODEL
def test_mart_is_built_as_their_trades(name):
    compared(
        name, lambda model: ours(model, 2, 5, objective="mart"), lambda model: natural_mart(model, X, Y, 2, 5, 6.0)
    )


@pytest.mark.parametrize(("objective", "theirs"), [("trades", authors_trades), ("mart", natural_mart)])
def test_beta(objective, theirs):
    compared(
        "conv_bn",
        lambda model: ours(model, 2, 2, objective=objective, beta=2.5),
        lambda model: theirs(model, X, Y, 2, 2, 2.5),
    )


# What runs


@pytest.mark.parametrize(("objective", "full"), [("pgd", 3), ("trades", 6), ("mart", 5)])
def test_the_steps_run_the_first_layer_alone(objective, full):
    """A check at the beginning adds a forward of two rows.

    With "pgd", each propagation computes H once more, for its gradient.
    """
    model = build("conv_bn")
    rows = {k: [] for k in range(len(model))}
    for k, layer in enumerate(model):
        layer.register_forward_pre_hook(lambda _, args, k=k: rows[k].append(len(args[0])))
    yopo_loss(model, X, Y, None, propagations=3, layer_steps=4, objective=objective).backward()
    alone = 3 * 4 + (3 if objective == "pgd" else 0)
    assert rows[0] == [2, *[8] * (full + alone)]
    for k in range(1, len(model)):
        assert rows[k] == [2, *[8] * full]


def test_a_propagation_runs_one_backward():
    model = build("conv_bn")
    calls = []
    model[4].register_full_backward_hook(lambda *_: calls.append(1))
    yopo_loss(model, X, Y, None, propagations=3, layer_steps=4).backward()
    assert len(calls) == 3


def test_a_layer_of_ones_own_choice():
    """With `first` set to the second convolution, all layers before it belong to f₀."""
    model = build(plain)
    counts = [0] * len(model)
    for k, layer in enumerate(model):
        layer.register_forward_pre_hook(lambda _, __, k=k: counts.__setitem__(k, counts[k] + 1))
    yopo_loss(model, X, Y, None, propagations=2, layer_steps=3, first=model[2]).backward()
    full, alone = 1 + 2, 2 * (3 + 1)
    assert counts == [full + alone] * 3 + [full] * 3
    assert model[0].weight.grad.isfinite().all()


@pytest.mark.parametrize("objective", ["pgd", "trades", "mart"])
def test_the_host_waits_twice(objective):
    """The host waits once to check the input, before anything else, and once to check the gradients."""
    model = build("conv_bn", dtype=torch.float32).to(DEVICE)
    x = torch.empty(8, *SHAPE, device=DEVICE)
    y = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    with pretended_device() as reads:
        loss = yopo_loss(model, x, y, None, propagations=3, layer_steps=2, objective=objective)
        loss.backward()
    assert (reads.started, reads.waited) == (2, 2)


def test_cost():
    assert yopo_cost(5) == 15
    assert yopo_cost(2, "trades") == 11  # 1 + 2 · 2 + 2 · 3
    assert yopo_cost(2, "mart") == 10
    assert trades_reference_cost(10) / yopo_cost(2, "trades") == pytest.approx(3.5, abs=0.05)
    with pytest.raises(ValueError, match="objective must be one of 'pgd', 'trades', 'mart', got 'free'"):
        yopo_cost(2, "free")


# The loss behaves like any other


@pytest.mark.parametrize("objective", ["pgd", "trades", "mart"])
def test_backward_adds_what_it_is_scaled_by(objective):
    model = build("conv_bn")
    expected = []
    for scale in (1.0, 64.0):
        model.load_state_dict(build("conv_bn").state_dict())
        model.zero_grad()
        torch.manual_seed(0)
        loss = yopo_loss(model, X, Y, None, propagations=2, layer_steps=2, objective=objective)
        (scale * loss).backward()
        expected.append({name: g / scale for name, g in gradients(model).items()})
    assert_near_nested(expected[1], expected[0])
    model.load_state_dict(build("conv_bn").state_dict())
    torch.manual_seed(0)
    yopo_loss(model, X, Y, None, propagations=2, layer_steps=2, objective=objective).backward()
    assert_near_nested(gradients(model), {name: 65 * g for name, g in expected[0].items()})


@pytest.mark.parametrize("objective", ["pgd", "trades", "mart"])
def test_the_optimizers_gradients_are_zeroed_and_modes_come_back(objective):
    model = build("frozen norm").eval()
    model.body[0].bias.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    result = snapshot(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images = X.clone().requires_grad_()
    loss = yopo_loss(model, images, Y, optimizer, propagations=2, layer_steps=2, objective=objective)
    assert all(p.grad is None for p in model.parameters())
    after = snapshot(model)
    assert all(after[k] is v for k, v in result.items() if k[1] in ("training", "requires_grad"))
    loss.backward()
    assert images.grad is None
    assert model.body[0].bias.grad is None
    assert model.body[0].weight.grad is not None


def test_a_second_backward_is_refused_and_gradients_are_ones_own():
    model = build("conv_bn")
    loss = yopo_loss(model, X, Y, None, propagations=1, layer_steps=1)
    loss.backward(retain_graph=True)
    once = {name: g.clone() for name, g in gradients(model).items()}
    loss.backward()
    assert_near_nested(gradients(model), {name: 2 * g for name, g in once.items()})
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("objective", ["pgd", "trades", "mart"])
def test_a_generator_decides_the_start(objective):
    losses = [
        yopo_loss(
            build("conv_bn"), X, Y, None, propagations=2, layer_steps=1, objective=objective,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (1, 1, 2)
    ]  # fmt: skip
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("objective", ["pgd", "trades", "mart"])
def test_autocast(objective):
    model = build("conv_bn", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = yopo_loss(model, X.float(), Y, None, propagations=2, layer_steps=2, objective=objective)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("objective", ["pgd", "trades", "mart"])
def test_training_lowers_the_loss(objective):
    model = build("conv_bn")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(15):
        loss = yopo_loss(model, X, Y, optimizer, propagations=2, layer_steps=2, objective=objective)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


# Bad input


class TwoPaths(nn.Module):
    """A model that calls its first convolution twice in a forward."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(64, CLASSES)

    def forward(self, x):
        return self.head((self.conv(x) + self.conv(x.flip(-1))).flatten(1))


class Pair(nn.Module):
    def forward(self, x):
        return x, x


class AfterAPair(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair, self.body = Pair(), build("conv_bn")

    def forward(self, x):
        return self.body(self.pair(x)[0])


def given(model, **changed):
    return {"model": model, "propagations": 2, "layer_steps": 2, **changed}


def unused():
    model = build("conv_bn")
    model.spare = nn.Conv2d(1, 1, 1)
    model.forward = lambda x: nn.Sequential(*list(model.children())[:-1])(x)
    return given(model, first=model.spare)


def pair():
    model = AfterAPair()
    return given(model, first=model.pair)


def tied():
    model = build(TiedNorm)
    return given(model, first=model.norm)


def of(**changed):
    return lambda: given(build("conv_bn"), **changed)


BAD = {
    "no propagation": (of(propagations=0), ValueError, "propagations must be at least 1, got 0"),
    "half a propagation": (of(propagations=1.5), TypeError, "propagations must be an integer, got 1.5"),
    "no layer step": (of(layer_steps=0), ValueError, "layer_steps must be at least 1, got 0"),
    "objective": (of(objective="free"), ValueError, "objective must be one of 'pgd', 'trades', 'mart', got 'free'"),
    "beta without a robust term": (of(beta=1.0), ValueError, "beta is an option of 'trades' and 'mart'"),
    "beta": (of(objective="trades", beta=-1.0), ValueError, "beta.*at least 0, got -1.0"),
    "epsilon": (of(epsilon=-0.1), ValueError, "epsilon.*at least 0.*-0.1"),
    "step size": (of(step_size=math.nan), ValueError, "step_size.*nan"),
    "generator": (of(generator=5), TypeError, "generator must be a torch.Generator"),
    "optimizer": (of(optimizer="sgd"), TypeError, "optimizer must be an optimizer or None, got str"),
    "pixels": (of(x_natural=X + 0.5), ValueError, r"x_natural must lie in \[0, 1\]"),
    "byte images": (of(x_natural=(X * 255).byte()), TypeError, "x_natural.*floating-point"),
    "labels": (of(y=Y.double()), TypeError, "y must be integers"),
    "label too large": (of(y=Y + CLASSES), ValueError, r"y must lie in 0\.\.4"),
    "first is no module": (of(first="conv1"), TypeError, "first must be a module or None, got str"),
    "first of another model": (of(first=nn.Conv2d(1, 4, 3)), ValueError, "first must be a layer of the model"),
    "first called twice": (lambda: given(TwoPaths()), ValueError, "exactly once in a forward, but was called 2 times"),
    "a norm called twice": (tied, ValueError, "exactly once in a forward, but was called 2 times"),
    "first never called": (unused, ValueError, "exactly once in a forward, but was called 0 times"),
    "first of two outputs": (pair, TypeError, "first must return a floating-point tensor, got tuple"),
    "no layer": (lambda: given(nn.Flatten()), ValueError, "first must be given"),
    "a model on devices": (lambda: given(nn.DataParallel(build("conv_bn"))), ValueError, "spread over devices"),
}


@pytest.mark.parametrize("objective", ["pgd", "trades"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, objective):
    make, error, message = BAD[name]
    options = {"x_natural": X, "y": Y, "optimizer": None, **make()}
    if "beta" not in options:
        options.setdefault("objective", objective)
    model = options["model"].double()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        yopo_loss(**options)
    assert_unchanged(before, model)
    assert not any(m._forward_hooks for m in model.modules())


class Broken(nn.Module):
    """A model with a NaN derivative, at bright images, before its first layer."""

    def __init__(self):
        super().__init__()
        self.body = build("conv_bn")

    def forward(self, x):
        bright = x[:, :1, 2:3, 2:3].detach() > 0.5
        return self.body(x + 0 * torch.where(bright, x[:, :1, :1, :1] * 0, 1.0).sqrt())


@pytest.mark.parametrize("objective", ["pgd", "trades", "mart"])
def test_a_gradient_with_nan_is_an_error_that_counts_the_samples(objective):
    model = Broken()
    x, y = with_bright([1, 4, 5])
    x[:, 0, 0, 0] = 0.5
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="input gradient must be finite, but held NaN for 3 of 8 samples"):
        yopo_loss(
            model, x, y, torch.optim.SGD(model.parameters(), lr=0.1), propagations=1, layer_steps=1, objective=objective
        )
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
