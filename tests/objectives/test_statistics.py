"""Attacks on the batch's statistics: the plain loops of scripts that attack in train mode, their buffers included."""

import copy

import pytest
import torch
import torch.nn.functional as F
from plain_pgd import loss_of, projected_step
from small_models import MODELS, Undefined, assert_unchanged, batch, build, snapshot, with_bright
from torch import nn

from bt_fast import PGD, BulletTrain, MARTLoss, PGDLoss, TRADESLoss, perturb
from bt_fast.attack.inner import NAMES
from bt_fast.attack.runners import input_gradient

EPSILON, SIZE, STEPS = 0.06, 0.02, 4
CLOSE = {"rtol": 0, "atol": 1e-9}
HOW = ["batch", "tracked"]


def attack(statistics, norm="linf", **options):
    size = {"linf": (EPSILON, SIZE), "l2": (0.4, 0.15)}[norm]
    return PGD(*size, STEPS, norm, statistics=statistics, **options)


def track(model, on):
    """As DM-Improves-AT's `track_bn_stats`."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = on


def plain_attack(model, x, y, start, pgd, inner):
    """In train mode throughout: with "batch" tracking is off."""
    model.train()
    track(model, pgd.statistics == "tracked")
    target = None
    if inner in ("kl", "lse"):
        with torch.no_grad():
            target = model(x).softmax(dim=1)
    x_adv = start
    for _ in range(pgd.steps):
        x_adv = x_adv.detach().requires_grad_()
        (grad,) = torch.autograd.grad(loss_of(inner, model(x_adv), y, target), x_adv)
        x_adv = projected_step(x_adv.detach(), grad, x, pgd.threat, pgd.step_size)
    track(model, True)
    return x_adv.detach()


def uniform(x):
    return (x + (2 * torch.rand(x.shape, dtype=x.dtype) - 1) * EPSILON).clamp(0, 1)


def assert_same_training(model, loss, twin, expected):
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, **CLOSE)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, **CLOSE)
    for b, c in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(b, c, **CLOSE)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("inner", NAMES)
@pytest.mark.parametrize("statistics", HOW)
def test_x_adv_and_buffers_are_those_of_a_plain_loop_in_train_mode(statistics, inner, norm):
    model, (x, y) = build("conv_bn"), batch()
    twin = copy.deepcopy(model)
    start = x + 0.001 * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    result = perturb(model, x, y, attack(statistics, norm, inner=inner), generator=generator)
    expected = plain_attack(twin, x, y, start, attack(statistics, norm), inner)
    torch.testing.assert_close(result, expected, **CLOSE)
    for b, c in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(b, c, **CLOSE)


@pytest.mark.parametrize("engine", ["exact", "fast"])
def test_robust_overfittings_step_moves_batch_norm_in_each_attack_forward(engine):
    """x' by PGD in train mode from a uniform start, then one forward of x': N + 1 moves of the buffers."""
    model, (x, y) = build("conv_bn"), batch()
    twin = copy.deepcopy(model)
    seen = model[1].num_batches_tracked.item()
    torch.manual_seed(1)
    loss = PGDLoss(attack("tracked"), engine=engine)(model, x, y)
    torch.manual_seed(1)
    x_adv = plain_attack(twin, x, y, uniform(x), attack("tracked"), "cross_entropy")
    expected = F.cross_entropy(twin(x_adv), y)
    assert_same_training(model, loss, twin, expected)
    assert model[1].num_batches_tracked.item() == seen + STEPS + 1


def test_trades_on_the_batchs_statistics_with_tracking_off_as_dm_improves_at_has_it():
    model, (x, y) = build("conv_bn"), batch()
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    loss = TRADESLoss(attack("batch", start="uniform"), beta=5.0, engine="exact")(model, x, y)
    torch.manual_seed(1)
    x_adv = plain_attack(twin, x, y, uniform(x), attack("batch"), "kl")
    z, z_adv, again = twin(x), twin(x_adv), twin(x)  # the authors of TRADES run x twice
    robust = F.kl_div(z_adv.log_softmax(dim=1), again.softmax(dim=1), reduction="sum")
    assert_same_training(model, loss, twin, F.cross_entropy(z, y) + 5.0 / len(x) * robust)


@pytest.mark.parametrize("statistics", HOW)
def test_dropout_draws_in_the_order_of_the_plain_loop(statistics):
    model, (x, y) = build("dropout"), batch()
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    loss = PGDLoss(attack(statistics), engine="exact")(model, x, y)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    x_adv = plain_attack(twin, x, y, uniform(x), attack(statistics), "cross_entropy")
    expected = F.cross_entropy(twin(x_adv), y)
    assert torch.equal(drawn, torch.rand(3))
    assert_same_training(model, loss, twin, expected)


@pytest.mark.parametrize("name", MODELS)
def test_with_batch_every_buffer_is_as_before_whatever_the_norm(name):
    model, (x, y) = build(name), batch()
    before, buffers = snapshot(model), list(model.buffers())
    for engine in ("exact", "fast"):
        perturb(model, x, y, attack("batch"), engine=engine)
        assert_unchanged(before, model)
    assert all(a is b for a, b in zip(buffers, model.buffers(), strict=True))


def test_the_modes_are_those_of_the_update_module_by_module():
    """A frozen norm keeps its running statistics; a model in eval mode as a whole is attacked in train mode."""
    (x, y), drawn = batch(), lambda: torch.Generator().manual_seed(1)
    frozen, twin = build("conv_bn"), build("conv_bn")
    frozen[1].eval()
    twin[1].running_mean.add_(0.3)
    frozen[1].running_mean.add_(0.3)
    kept = frozen[1].running_mean.clone()
    result = [perturb(m, x, y, attack("tracked"), generator=drawn()) for m in (frozen, twin)]
    assert not torch.equal(*result)
    assert torch.equal(frozen[1].running_mean, kept)
    assert (frozen.training, frozen[1].training, frozen[5].training) == (True, False, True)
    models = [build("conv_bn"), build("conv_bn").eval()]
    assert torch.equal(*[perturb(m, x, y, attack("batch"), generator=drawn()) for m in models])
    assert not models[1][1].training


def test_an_earlier_loss_may_still_await_its_backward():
    model, (x, y) = build("conv_bn"), batch()
    criterion = TRADESLoss(attack("batch"), engine="exact")
    first = criterion(model, x, y)
    criterion(model, x, y).backward()
    first.backward()


def test_explain_says_that_nothing_is_folded_or_from_graphs_and_why():
    model, (x, y) = build("conv_bn"), batch()
    criterion = TRADESLoss(attack("batch"), engine="fast")
    criterion(model, x, y)
    shown = criterion.explain()
    why = "since statistics='batch' runs the model itself, in the modes of the update"
    assert f"folded view: no, {why}" in shown
    assert f"attack steps: eagerly, {why}" in shown
    assert "channels last: attack no, update yes" in shown


def test_in_float16_all_rows_are_scaled_by_one_factor_since_each_pixel_depends_on_them_all():
    model, (x, y) = build("conv_bn", dtype=torch.float32), batch(dtype=torch.float32)
    z = model(x).detach()
    sizes = torch.logspace(-3, 0, 8)[:, None]  # of the rows' gradients, which the model's float16 must not equalise
    target = z.softmax(dim=1).lerp(F.one_hot(y, 5).float(), sizes)
    exact = input_gradient(model, x, target)
    half = copy.deepcopy(model).half()
    close = {
        together: F.cosine_similarity(
            input_gradient(half, x.half(), target, together=together).float().flatten(), exact.flatten(), dim=0
        )
        for together in (True, False)
    }
    assert close[True] > 0.99
    assert close[False] < 0.9


@pytest.mark.parametrize("kind", [TRADESLoss, MARTLoss, PGDLoss])
@pytest.mark.parametrize("statistics", HOW)
def test_an_error_leaves_the_buffers_as_they_were(kind, statistics):
    model, (x, y) = build(Undefined), with_bright([2, 5])
    before = snapshot(model)
    with pytest.raises(ValueError, match="must be finite, but held NaN"):
        kind(attack(statistics), engine="exact")(model, x, y)
    assert_unchanged(before, model)
    model = build("conv_bn")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"y must lie in 0\.\.4"):
        kind(attack(statistics), engine="exact")(model, x, y + 5)
    with pytest.raises(ValueError, match=r"x must lie in \[0, 1\]"):
        kind(attack(statistics), engine="exact")(model, x + 5, y)
    assert_unchanged(before, model)


# Bad input


def test_mining_is_refused_since_samples_would_depend_on_their_neighbours():
    model, (x, y) = build("conv_bn"), batch()
    message = (
        r"statistics must be 'running' with BulletTrain, got 'batch': samples leave the batch.*: leave statistics or"
    )
    with pytest.raises(ValueError, match=message):
        TRADESLoss(attack("batch"), mining=BulletTrain(STEPS, 1, 0))
    with pytest.raises(ValueError, match=message):
        perturb(model, x, y, attack("batch"), BulletTrain(STEPS, 1, 0))


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="statistics must be one of 'running', 'batch', 'tracked', got 'train': write"):
        PGD(0.1, 0.03, 3, statistics="train")
