"""Adversarial weight perturbation: the authors' weights, and all that they come back from."""

import copy
import functools
import pickle
import weakref

import pytest
import reference_awp
import small_models
import torch
import torch.distributed as dist
import torch.nn.functional as F
from emulated_device import EmulatedDevice
from gloo_ranks import run_ranks
from small_models import CLASSES, assert_unchanged, batch, build, gradients, snapshot
from test_objectives import confident, own_labels, recorded, seeded, sgd
from tolerances import UPDATES, assert_near, assert_near_nested
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from bt_fast import (
    AWP,
    PGD,
    AugMixLoss,
    BulletTrain,
    Engine,
    Guard,
    MARTLoss,
    PGDLoss,
    TRADESLoss,
    augmix_loss,
    perturb,
    trades_loss,
)
from bt_fast.objectives import awp as module
from bt_fast.objectives import passes
from bt_fast.objectives.forwards import Forwards

ATTACK = PGD(0.1, 0.03, 4)
NUMBERS = {"epsilon": 0.1, "step_size": 0.03, "steps": 4}
KINDS = {"trades": TRADESLoss, "mart": MARTLoss, "pgd": PGDLoss}
EACH = pytest.mark.parametrize("name", KINDS)


def minibatches(count, m=8):
    return [batch(m, seed=k) for k in range(count)]


def loss_of(name="trades", mining=None, engine="exact"):
    return KINDS[name](ATTACK, mining=mining, engine=engine)


def mined(**options):
    return BulletTrain(4, 2, 1, **options)


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved_by(model, before):
    """How far each parameter is from what it was, as a share of its norm."""
    now = weights_of(model)
    return {name: float((now[name] - was).norm() / was.norm().clamp_min(1e-30)) for name, was in before.items()}


# The authors' numbers


def trained(name, model, awp_of, epochs=2, warm_up=0, seed=0):
    """A user's loop: weights and buffers after some epochs."""
    optimizer, criterion = sgd_of(model), loss_of(name)
    awp = awp_of(model)
    torch.manual_seed(seed)
    for epoch in range(epochs):
        awp.gamma = 0.0 if epoch < warm_up else 5e-3
        for x, y in minibatches(4):
            optimizer.zero_grad()
            with awp(criterion, x, y) as loss:
                loss.backward()
                optimizer.step()
    return model.state_dict()


sgd_of = reference_awp.sgd_of


def reference(name, model, epochs=2, warm_up=0, seed=0):
    optimizer, proxy = sgd_of(model), reference_awp.Proxy(model, 5e-3)
    torch.manual_seed(seed)
    for epoch in range(epochs):
        for x, y in minibatches(4):
            if name == "trades":
                this = None if epoch < warm_up else proxy
                reference_awp.trades_awp_step(this, x, y, optimizer, **NUMBERS, beta=6.0)
            else:
                reference_awp.at_awp_step(proxy, x, y, optimizer, **NUMBERS)
    return model.state_dict()


@pytest.mark.parametrize("network", ["conv_bn", "dropout", "tied norm", "cumulative average", "counter in place"])
@pytest.mark.parametrize("name", ["trades", "pgd"])
def test_weights_and_batch_norm_after_two_epochs_are_the_authors(name, network):
    """TRADES-AWP and AT-AWP, with momentum and weight decay; dropout draws the same numbers."""
    expected = reference(name, build(network))
    assert_near_nested(trained(name, build(network), AWP), expected, UPDATES)


def test_a_warm_up_sees_the_forwards_in_the_authors_order_too():
    expected = reference("trades", build(), warm_up=1)
    assert_near_nested(trained("trades", build(), AWP, warm_up=1), expected, UPDATES)


def fails(test, *arguments):
    with pytest.raises(AssertionError):
        test(*arguments)


def test_another_order_of_forwards_another_length_and_no_way_back_are_seen(monkeypatch):
    of_trades = functools.partial(fails, test_weights_and_batch_norm_after_two_epochs_are_the_authors, "trades")
    with monkeypatch.context() as planted:
        planted.setattr(Forwards, "clean_first", property(lambda forwards: forwards.of.clean_forwards > 0))
        of_trades("conv_bn")
        of_trades("dropout")
    with monkeypatch.context() as planted:
        planted.setattr(module._Moved, "take_back", lambda moved: None)
        of_trades("conv_bn")
    with monkeypatch.context() as planted:
        planted.setattr(module._Buffers, "put_back", lambda buffers: None)
        of_trades("conv_bn")
    with monkeypatch.context() as planted:
        planted.setattr(module, "_weights", lambda model, gamma: list(model.parameters()))
        of_trades("conv_bn")


def x_adv_of(model, x, y):
    return perturb(model, x, y, ATTACK, generator=seeded(3))


def test_around_a_function_of_the_users_own():
    """Whatever it computes, on what is made before the block."""
    ours, theirs = build(), build()
    optimizers = sgd_of(ours), sgd_of(theirs)
    awp, proxy = AWP(ours, gamma=1e-2), reference_awp.Proxy(theirs, 1e-2)

    def objective(model, images, labels, weight):
        return weight * F.cross_entropy(model(images), labels) + 0.01 * model(images).square().mean()

    for x, y in minibatches(3):
        x_adv = x_adv_of(ours, x, y)
        with awp(objective, x_adv, y, weight=2.0) as loss:
            optimizers[0].zero_grad()
            loss.backward()
            optimizers[0].step()
        difference = proxy.difference(lambda of: objective(of, x_adv, y, 2.0))  # noqa: B023
        proxy.move(difference, 1)
        expected = objective(theirs, x_adv, y, 2.0)
        optimizers[1].zero_grad()
        expected.backward()
        optimizers[1].step()
        proxy.move(difference, -1)
        assert_near(loss.detach(), expected.detach(), UPDATES)
    assert_near_nested(ours.state_dict(), theirs.state_dict(), UPDATES)


@pytest.mark.parametrize("optimizer_of", [torch.optim.AdamW, torch.optim.SGD], ids=["adamw", "sgd"])
def test_the_optimizer_steps_at_the_moved_weights_with_clipped_gradients(optimizer_of):
    """Momenta and weight decay are those of the weights in the block, as with the authors."""
    ours, theirs = build(), build()
    optimizers = [optimizer_of(m.parameters(), lr=0.01, weight_decay=0.1) for m in (ours, theirs)]
    awp, proxy = AWP(ours), reference_awp.Proxy(theirs, 5e-3)
    for x, y in minibatches(3):
        optimizers[0].zero_grad()
        with awp(lambda model, x, y: F.cross_entropy(model(x), y), x, y) as loss:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(ours.parameters(), 0.1)
            optimizers[0].step()
        difference = proxy.difference(lambda of: F.cross_entropy(of(x), y))  # noqa: B023
        proxy.move(difference, 1)
        optimizers[1].zero_grad()
        F.cross_entropy(theirs(x), y).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
        optimizers[1].step()
        proxy.move(difference, -1)
    assert_near_nested(ours.state_dict(), theirs.state_dict(), UPDATES)


# What moves, and how it comes back


def test_trained_weights_of_two_dimensions_move_by_gamma_of_their_norm():
    model = build()
    model[0].weight.requires_grad_(False)
    before, (x, y) = weights_of(model), batch()
    with AWP(model, gamma=0.02)(loss_of(), x, y):
        moved = {name for name, share in moved_by(model, before).items() if share}
        for name in ("4.weight", "8.weight"):
            assert moved_by(model, before)[name] == pytest.approx(0.02)
    assert moved == {"4.weight", "8.weight"}  # the first is not trained, all others are vectors
    assert_near_nested(weights_of(model), before)


def test_a_parameter_with_another_name_than_weight_stays_as_with_the_authors():
    class WithPlaces(nn.Module):
        def __init__(self):
            super().__init__()
            self.places, self.body = nn.Parameter(0.1 * torch.randn(1, 1, 6, 6)), build()

        def forward(self, x):
            return self.body(x + self.places)

    model, (x, y) = build(WithPlaces), batch()
    before = weights_of(model)
    with AWP(model, gamma=0.02)(loss_of(), x, y):
        shares = moved_by(model, before)
    assert shares["places"] == 0
    assert shares["body.0.weight"] == pytest.approx(0.02)


def test_a_shared_weight_moves_once():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.head = nn.Linear(36, 36), nn.Linear(36, CLASSES)
            self.other = nn.Linear(36, 36)
            self.other.weight = self.one.weight

        def forward(self, x):
            return self.head(self.other(self.one(x.flatten(1)).relu()))

    model, theirs = build(Shared), build(Shared)
    before, (x, y) = weights_of(model), batch()
    with AWP(model)(lambda model, x, y: F.cross_entropy(model(x), y), x, y):
        proxy = reference_awp.Proxy(theirs, 5e-3)
        proxy.move(proxy.difference(lambda of: F.cross_entropy(of(x), y)), 1)
        assert_near_nested(weights_of(model), weights_of(theirs))
        assert moved_by(model, before)["one.weight"] == pytest.approx(5e-3)
    assert_near_nested(weights_of(model), before)


def test_a_weight_without_use_and_one_without_gradient_stay():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.unused, self.dead = build(), nn.Linear(2, 2), nn.Parameter(torch.ones(2, 2))
            self.register_parameter("dead_weight", nn.Parameter(torch.ones(2, 2)))

        def forward(self, x):
            return self.body(x) + 0 * self.dead_weight.sum()

    model = build(Idle)
    before, (x, y) = weights_of(model), batch()
    with AWP(model)(loss_of(), x, y) as loss:
        share = moved_by(model, before)
        assert share["unused.weight"] == share["dead_weight"] == 0
        assert share["body.0.weight"] > 0
        loss.backward()
    assert_near_nested(weights_of(model), before)


class StopError(Exception):
    """Something of the user's."""


@EACH
def test_without_a_step_every_weight_comes_back_to_the_bit(name):
    """Where there was none, or an exception was earlier; in float32, in which x + d - d is not x."""
    model = build(dtype=torch.float32)
    awp, criterion, (x, y) = AWP(model), loss_of(name), batch(dtype=torch.float32)
    before = weights_of(model)
    with awp(criterion, x, y) as loss:
        assert any((p != before[n]).any() for n, p in model.named_parameters())
        loss.backward()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with pytest.raises(StopError), awp(criterion, x, y):
        raise StopError
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with awp(criterion, x, y) as loss:  # and it may be used again
        loss.backward()


def test_a_plain_subtraction_would_not_bring_them_back(monkeypatch):
    def subtract(moved):
        with torch.no_grad():
            moved._weight.sub_(moved._move)

    monkeypatch.setattr(module._Moved, "take_back", subtract)
    fails(test_without_a_step_every_weight_comes_back_to_the_bit, "pgd")


def test_a_step_stays_up_to_a_rounding_of_the_weight():
    model = build(dtype=torch.float32)
    before, (x, y) = weights_of(model), batch(dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with AWP(model)(loss_of("pgd"), x, y) as loss:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, p in model.named_parameters():
        largest = float(torch.maximum(before[name].abs().max(), p.abs().max()))
        off = (p - (before[name] - 1e-3 * p.grad)).abs().max()
        assert float(off) <= 1.5 * torch.finfo(torch.float32).eps * largest


class FailsLater(nn.Module):
    """Raises in its n-th forward from now."""

    def __init__(self):
        super().__init__()
        self.body, self.left = build(), 10**6

    def forward(self, x):
        self.left -= 1
        if self.left == 0:
            raise StopError
        return self.body(x)


@EACH
@pytest.mark.parametrize("mining", [False, True])
def test_an_error_in_any_forward_leaves_weights_and_gradients_as_they_were(name, mining):
    model, (x, y) = FailsLater(), batch()
    small_models.looked_at(model)
    awp, criterion = AWP(model), loss_of(name, mined() if mining else None)
    left = model.left
    with awp(criterion, x, y):
        forwards = left - model.left
    before = weights_of(model)
    for n in range(1, forwards + 1):
        model.left = n
        with pytest.raises(StopError), awp(criterion, x, y):
            pytest.fail("it was entered")
        model.left = 10**6
        assert all(torch.equal(p, before[k]) and p.grad is None for k, p in model.named_parameters())
        with awp(criterion, x, y):
            pass


def test_an_error_in_the_first_pass_changes_no_buffer():
    model, (x, y) = FailsLater(), batch()
    model.left = 2

    def objective(model, x, y):
        return F.cross_entropy(model(x), y) + model(x).mean()

    before = snapshot(model)
    with pytest.raises(StopError), AWP(model)(objective, x, y):
        pytest.fail("it was entered")
    assert_unchanged(before, model)


def test_an_error_in_the_first_pass_takes_back_what_an_attack_did_to_the_buffers():
    model, (x, y) = build("conv_bn"), batch()
    criterion = PGDLoss(PGD(0.05, 0.02, 2, statistics="tracked"), extra=lambda batch: batch.y)
    before = snapshot(model)
    with pytest.raises(TypeError, match="extra must return a floating-point tensor"), AWP(model)(criterion, x, y):
        pytest.fail("it was entered")
    assert_unchanged(before, model)


@EACH
def test_neither_gradients_nor_buffers_keep_anything_of_the_first_pass(name):
    """A buffer that the forward replaces is the model's own again."""
    for network in ("conv_bn", "counter in place", "counter replaced", "own norm"):
        model, (x, y) = build(network), batch()
        twin, buffers, calls = copy.deepcopy(model), dict(model.named_buffers()), []
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        criterion = loss_of(name)

        def first_pass_alone(model, x, y, criterion=criterion, calls=calls):
            calls.append(None)
            if len(calls) == 2:
                raise StopError
            return criterion(model, x, y)

        with pytest.raises(StopError), AWP(model)(first_pass_alone, x, y):
            pytest.fail("it was entered")
        assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
        assert all(b is buffers[key] for key, b in model.named_buffers())
        assert_near_nested(model.state_dict(), twin.state_dict())


def test_a_gradient_that_is_no_number_moves_nothing():
    model, (x, y) = build(), batch()
    before = weights_of(model)

    def objective(model, x, y):
        value = F.cross_entropy(model(x), y)
        if torch.equal(model[0].weight, before["0.weight"]):  # in the first pass
            value = value + model[0].weight.sum() * 0 * torch.inf + 0 * model[0].weight.abs().sum()
        return value

    with AWP(model)(objective, x, y) as loss:
        assert moved_by(model, before)["0.weight"] == 0
        loss.backward()
    assert all(p.isfinite().all() for p in model.parameters())
    assert_near_nested(weights_of(model), before)


# With everything that a loop has


def accumulated(model, awp, criterion, halves):
    for x, y in halves:
        with awp(criterion, x, y) as loss:
            (loss / 2).backward()


def test_gradients_accumulate_over_blocks():
    """The weights come back to the bit in between; each block adds the gradients at its own moved weights."""
    model, halves = build(), minibatches(2)
    criterion, awp = loss_of("pgd"), AWP(model)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for k, (x, y) in enumerate(halves):
        twin = copy.deepcopy(model)
        torch.manual_seed(k)
        with AWP(twin)(loss_of("pgd"), x, y) as loss:
            (loss / 2).backward()
        for name, p in twin.named_parameters():
            expected[name] += p.grad
        model.load_state_dict(twin.state_dict())  # batch norm's
    model = build()
    awp = AWP(model)
    for k, half in enumerate(halves):
        torch.manual_seed(k)
        accumulated(model, awp, criterion, [half])
    assert_near_nested(gradients(model), expected)


@pytest.mark.parametrize("overflow", [False, True])
def test_a_scaler_scales_both_passes_and_may_skip_the_step(overflow):
    model, twin, (x, y) = build(dtype=torch.float32), build(dtype=torch.float32), batch(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=float("inf") if overflow else 1024.0)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)]
    before, scaled = weights_of(model), []

    def objective(model, x, y):
        value = F.cross_entropy(model(x), y)
        value.register_hook(lambda gradient: scaled.append(float(gradient)))
        return value

    with AWP(model, scaler=scaler)(objective, x, y) as loss:
        scaler.scale(loss).backward()
        scaler.step(optimizers[0])
        scaler.update()
    assert scaled == [float("inf")] * 2 if overflow else scaled == [1024.0] * 2
    if overflow:
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        return
    with AWP(twin)(objective, x, y) as loss:
        loss.backward()
        optimizers[1].step()
    assert_near_nested(weights_of(model), weights_of(twin))


@pytest.mark.parametrize("engine", ["exact", "fast"])
def test_under_autocast_no_weight_is_cast_as_it_was_before_its_move(engine):
    """The caller's autocast keeps casts of the weights, from one pass to the next and beyond the block."""
    model, (x, y) = build(dtype=torch.float32), batch(dtype=torch.float32)
    criterion, pairs = TRADESLoss(ATTACK, mining=mined(), engine=engine), []

    def look():  # not in no_grad, whose casts torch 2.6 keeps, too, without a gradient
        pairs.append((model[0](x).detach(), copy.deepcopy(model[0])(x).detach()))

    def watched(model, x, y):
        look()
        return criterion(model, x, y, generator=seeded(0))

    with torch.autocast("cpu", torch.bfloat16):
        with AWP(model)(watched, x, y) as loss:
            loss.backward()
        look()
    assert all(torch.equal(kept, new) for kept, new in pairs)
    assert not torch.equal(pairs[0][0], pairs[1][0])
    assert torch.equal(pairs[0][0], pairs[2][0])


def test_an_average_after_the_block_is_of_the_weights_that_came_back():
    model, (x, y) = build(), batch()
    average = torch.optim.swa_utils.AveragedModel(model)
    with AWP(model)(loss_of(), x, y) as loss:
        loss.backward()
    average.update_parameters(model)
    assert_near_nested(dict(average.module.named_parameters()), dict(model.named_parameters()))


def test_a_guard_skips_a_faulty_minibatch_with_its_weights_in_place():
    model, (x, y) = build(), batch()
    optimizer = sgd(model)
    guard, before = Guard(optimizer, model, non_finite="skip"), snapshot(model)
    with guard.minibatch(), AWP(model)(loss_of("pgd"), x, y) as loss:
        (loss * torch.nan).backward()
        guard.step(loss * torch.nan)
    optimizer.zero_grad()
    assert len(guard.skipped) == 1
    assert_unchanged(before, model)


def test_a_compiled_model_is_not_compiled_anew_for_its_moves():
    compiled_for = []

    def backend(graph, _):
        compiled_for.append(graph)
        return graph.forward

    plain, inner, counts = build(), build(), []
    model = torch.compile(inner, backend=backend)
    for m, optimizer in ((plain, sgd_of(plain)), (model, sgd_of(inner))):
        criterion, awp = loss_of("pgd"), AWP(m)
        for k, (x, y) in enumerate(minibatches(3)):
            torch.manual_seed(k)
            optimizer.zero_grad()
            with awp(criterion, x, y) as loss:
                loss.backward()
                optimizer.step()
            counts.append(len(compiled_for))
    assert 0 == counts[2] < counts[3] == counts[5]
    assert_near_nested(inner.state_dict(), plain.state_dict(), UPDATES)


def test_a_model_may_change_between_minibatches():
    model, (x, y) = build(), batch()
    awp, criterion = AWP(model), loss_of()
    with awp(criterion, x, y) as loss:
        loss.backward()
    model[8] = nn.Linear(16, CLASSES).double()
    model[0].weight.requires_grad_(False)
    before = weights_of(model)
    with awp(criterion, x, y):
        share = moved_by(model, before)
        assert share["8.weight"] == pytest.approx(5e-3)
        assert share["0.weight"] == 0
    assert_near_nested(weights_of(model), before)


class Recomputing(nn.Module):
    """Computes its body again in the backward, batch norm included."""

    def __init__(self):
        super().__init__()
        self.body = build()

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False)


def test_what_a_backward_computes_again_is_of_its_own_pass():
    plain, model, (x, y) = build(), build(Recomputing), batch()
    model.body.load_state_dict(plain.state_dict())
    result = []
    for m in (plain, model):
        torch.manual_seed(0)
        with AWP(m)(loss_of("pgd"), x, y) as loss:
            loss.backward()
        result.append([loss.detach(), *(p.grad for p in m.parameters())])
    for mine, other in zip(*result, strict=True):
        assert_near(mine, other)


# x' once, and the mining once


@EACH
@pytest.mark.parametrize("mining", [False, True])
def test_x_is_attacked_once_by_the_weights_as_they_are(name, mining):
    model, (x, y) = confident(), batch()
    criterion, plain = loss_of(name, mined() if mining else None), loss_of(name, mined() if mining else None)
    expected = copy.deepcopy(model)
    torch.manual_seed(0)
    plain(expected, x, y)
    x_adv = plain.last.x_adv
    forwards = recorded(model)
    torch.manual_seed(0)
    with AWP(model)(criterion, x, y):
        attack = len(forwards[False])
    twin = recorded(expected)
    torch.manual_seed(0)
    plain(expected, x, y)
    assert attack == len(twin[False])
    assert torch.equal(criterion.last.x_adv, x_adv)
    seen = {tuple(images.flatten().tolist()) for images in forwards[True]}
    assert len(seen) == (1 if name == "pgd" else 2)  # x' and, where there is a clean forward, x


@EACH
@pytest.mark.parametrize("samples", ["all", "moved"])
def test_the_mining_moves_once(name, samples):
    model, awped, plain = confident(), loss_of(name, mined()), loss_of(name, mined())
    awp = AWP(model, samples=samples)
    for criterion in (awped, plain):
        criterion.mining.robust_fraction.fill_(0.4)
    for k in range(3):
        x, _ = batch(9, seed=k)
        y = own_labels(model, x)
        plain(copy.deepcopy(model), x, y, generator=seeded(k))
        with awp(awped, x, y, generator=seeded(k)) as loss:
            loss.backward()
        assert_near_nested(awped.state_dict(), plain.state_dict())
    assert 0 < float(plain.mining.robust_fraction) != 0.4
    assert int(awped.mining.group_counts.sum()) == 27


def test_with_mining_the_update_is_the_authors_on_its_x():
    """Of all samples, and of the samples that moved: their loss alone moves the weights."""
    for samples in ("all", "moved"):
        ours, theirs = confident(), confident()
        optimizers = sgd_of(ours), sgd_of(theirs)
        criterion = TRADESLoss(ATTACK, mining=BulletTrain(4, 2, 0, unperturbed="keep"), engine="exact")
        criterion.mining.robust_fraction.fill_(0.4)
        awp, proxy = AWP(ours, samples=samples), reference_awp.Proxy(theirs, 5e-3)
        for k in range(3):
            x, _ = batch(9, seed=k)
            y = own_labels(ours, x)
            optimizers[0].zero_grad()
            with awp(criterion, x, y, generator=seeded(k)) as loss:
                loss.backward()
                optimizers[0].step()
            record = criterion.last
            taken = record.steps > 0 if samples == "moved" else torch.ones_like(y, dtype=torch.bool)
            assert samples == "all" or 2 <= int(taken.sum()) < 9
            literal(proxy, x, record.x_adv, y, taken, optimizers[1])
            assert_near_nested(ours.state_dict(), theirs.state_dict(), UPDATES)


def literal(proxy, x, x_adv, y, taken, optimizer):
    model, parts = optimizer.model, (x[taken], x_adv[taken], y[taken])
    difference = proxy.difference(lambda of: reference_awp.trades_of(of, *parts, 6.0))
    proxy.move(difference, 1)
    reference_awp.trades_awp_update(None, x, x_adv, y, optimizer, 6.0)
    proxy.move(difference, -1)
    return model


def rows(model):
    """The numbers of samples of the model's forwards in train mode."""
    seen = []
    small_models.looked_at(model)
    model.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])) if m.training else None)
    return seen


@EACH
def test_the_pass_of_the_moved_costs_their_share(name):
    model = confident()
    criterion = loss_of(name, BulletTrain(4, 0, 0, unperturbed="keep"))
    criterion.mining.robust_fraction.fill_(0.4)
    x, _ = batch(9)
    y, seen = own_labels(model, x), rows(model)
    with AWP(model, samples="moved")(criterion, x, y):
        n = int((criterion.last.steps > 0).sum())
    assert 2 <= n < 9
    forwards = 1 if name == "pgd" else 2
    assert seen == [n] * forwards + [9] * forwards


def test_of_the_others_f_r_sees_the_logits_that_judged_them(monkeypatch):
    model, seen, observe = confident(), [], BulletTrain.observe

    def watched(bullet, logits, y, order, faulty):
        seen.append((logits, order))
        observe(bullet, logits, y, order=order, faulty=faulty)

    monkeypatch.setattr(BulletTrain, "observe", watched)
    x, _ = batch(9)
    y = own_labels(model, x)
    with torch.no_grad():
        clean = copy.deepcopy(model).eval()(x)
    criterion = loss_of("trades", BulletTrain(4, 2, 0))
    with AWP(model, samples="moved")(criterion, x, y):
        logits, order = seen[0]
    still = criterion.last.steps[order] == 0
    assert still.sum() == 2
    assert torch.equal(logits[still], clean[order][still])


def test_where_less_than_two_have_moved_the_pass_takes_all():
    """Batch norm cannot train on one."""
    model, (x, _) = confident(), batch(6)
    y, seen = own_labels(model, x, wrong=6), rows(model)  # all are outliers
    with AWP(model, samples="moved")(loss_of("pgd", BulletTrain(4, 2, 0)), x, y):
        assert seen == [6, 6]


def test_losses_within_a_function_go_over_their_minibatch_twice_too():
    x, y = batch()
    mining = [mined() for _ in range(4)]

    def objective_of(inner, bullet):
        criterion = loss_of("trades", inner)

        def objective(model, x, y):
            other = trades_loss(model, x, y, None, epsilon=0.1, step_size=0.03, perturb_steps=4, bullet=bullet)
            return criterion(model, x, y) + other

        return objective

    once, twice = confident(), confident()
    forwards = recorded(once), recorded(twice)
    objective_of(*mining[:2])(once, x, y)
    with AWP(twice)(objective_of(*mining[2:]), x, y):
        assert len(forwards[1][False]) == len(forwards[0][False]) > 0
        assert len(forwards[1][True]) == 2 * len(forwards[0][True])
    assert [int(bullet.group_counts.sum()) for bullet in mining] == [8] * 4


@pytest.mark.parametrize("mining", [False, True])
def test_augmix_views_are_drawn_once(mining):
    model = confident()
    x, _ = batch(9)
    y = own_labels(model, x)
    criterion = AugMixLoss(BulletTrain(1, 0, 0) if mining else None, engine="exact")
    generator, forwards = seeded(0), recorded(model)
    with AWP(model)(criterion, x, y, generator=generator) as loss:
        loss.backward()
    first, second = forwards[True][: len(forwards[True]) // 2], forwards[True][len(forwards[True]) // 2 :]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    state = generator.get_state()
    twin = seeded(0)
    criterion(model, x, y, generator=twin)
    assert mining or torch.equal(twin.get_state(), state)
    assert not mining or int(criterion.mining.group_counts.sum()) == 18


# However it is executed


@EACH
@pytest.mark.parametrize("samples", ["all", "moved"])
def test_the_fast_engine_gives_the_exact_ones_weights(name, samples):
    """The folded view follows the weights that came back, not those of the block."""
    results = []
    for engine in ("exact", "fast"):
        model = confident()
        criterion, optimizer = loss_of(name, mined(), engine), sgd_of(model)
        awp = AWP(model, samples=samples)
        for k in range(3):
            x, y = batch(9, seed=k)
            optimizer.zero_grad()
            with awp(criterion, x, y, generator=seeded(k)) as loss:
                loss.backward()
                optimizer.step()
        results.append({**model.state_dict(), "F_R": criterion.mining.robust_fraction})
    assert_near_nested(results[1], results[0], UPDATES)


def with_graphs(name, engine):
    """Losses, gradients, weights and F_R of some minibatches; x' and memory are spoilt in between."""
    model, mining, result = build("conv_bn"), BulletTrain(2, 1, 0), []
    criterion = KINDS[name](PGD(0.03, 0.01, 2), mining=mining, engine=engine)
    awp = AWP(model)
    for k in range(4):
        x, y = batch(6, seed=k)
        model.zero_grad()
        with awp(criterion, x, y, generator=seeded(k)) as loss:
            loss.backward()
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(0.1 * p.grad)
        result += [loss.detach().clone(), *(p.grad.clone() for p in model.parameters()), *weights_of(model).values()]
        result.append(mining.robust_fraction.clone())
        x.fill_(-1), y.fill_(-1)
    return result


@EACH
def test_from_graphs_it_is_the_same_in_every_order(name):
    with torch.autograd.set_multithreading_enabled(False):
        expected = with_graphs(name, Engine(fold=True))
        with EmulatedDevice() as emulated:
            result = with_graphs(name, Engine(fold=True, graphs=True))
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    for seed in range(3):
        shuffled = emulated.shuffled(seed, result)
        assert all(torch.equal(a, b) for a, b in zip(shuffled, expected, strict=True)), seed


def on_ranks(mining):
    """Weights of a rank before, in and after the blocks, with other samples on each."""
    rank, states = dist.get_rank(), []
    model = DistributedDataParallel(confident("conv_bn"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    bullet = BulletTrain(4, 2, 1, process_group=dist.group.WORLD) if mining else None
    criterion, awp = TRADESLoss(ATTACK, mining=bullet, engine="exact"), AWP(model)
    for k in range(3):
        x, y = batch(6, seed=2 * k + rank)
        optimizer.zero_grad()
        with awp(criterion, x, y, generator=seeded(2 * k + rank)) as loss:
            states.append(weights_of(model.module))
            loss.backward()
            optimizer.step()
        states.append(weights_of(model.module))
    return states


@pytest.mark.parametrize("mining", [False, True])
def test_ranks_move_alike(mining):
    one, other = run_ranks(2, on_ranks, mining)
    for mine, theirs in zip(one, other, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    expected = ranks_in_one() if not mining else None
    assert mining or all(torch.allclose(one[0][name], value, atol=1e-10) for name, value in expected.items())


def ranks_in_one():
    """The weights in the first block, by the mean of both ranks' gradients."""
    model = confident("conv_bn")
    weights = [p for name, p in model.named_parameters() if p.dim() > 1]
    both = []
    for rank in range(2):
        twin = copy.deepcopy(model)
        x, y = batch(6, seed=rank)
        loss = TRADESLoss(ATTACK, engine="exact")(twin, x, y, generator=seeded(rank))
        both.append(torch.autograd.grad(loss, [p for p in twin.parameters() if p.dim() > 1]))
    with torch.no_grad():
        for p, one, other in zip(weights, *both, strict=True):
            g = (one + other) / 2
            p.add_(5e-3 * p.norm() / g.norm() * g)
    return weights_of(model)


# What is kept


def test_it_is_saved_and_copied_with_its_model_but_not_within_a_block():
    model, (x, y) = build(), batch()
    awp = AWP(model, gamma=0.01, samples="moved")
    for twin in (copy.deepcopy(awp), pickle.loads(pickle.dumps(awp))):
        assert (twin.gamma, twin.samples) == (0.01, "moved")
        assert_near_nested(twin.model.state_dict(), model.state_dict())
    awp.samples = "all"
    with awp(loss_of(), x, y):
        for copied in (copy.deepcopy, pickle.dumps):
            with pytest.raises(RuntimeError, match="would have moved weights: wait until"):
                copied(awp)
    copy.deepcopy(awp)


def test_nothing_of_a_block_stays_in_memory():
    model, (x, y) = build(), batch()
    awp = AWP(model)
    with awp(lambda model, x, y: F.cross_entropy(model(x), y), x, y) as loss:
        kept = weakref.ref(loss)
    del loss
    assert kept() is None


def test_it_says_what_it_is():
    assert repr(AWP(build(), gamma=0.01)) == "AWP(Sequential, gamma=0.01, samples='all')"


# Bad input


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"model": lambda x: x}, TypeError, "model must be a torch.nn.Module"),
        ({"gamma": "5e-3"}, TypeError, "gamma must be a number"),
        ({"gamma": -1e-3}, ValueError, "gamma must be a finite number of at least 0, got -0.001: write gamma=5e-3"),
        ({"gamma": float("nan")}, ValueError, "gamma must be a finite number"),
        ({"samples": "some"}, ValueError, "samples must be one of 'all', 'moved', got 'some'"),
        ({"scaler": True}, TypeError, "scaler must be a torch.amp.*GradScaler or None, got bool"),
    ],
)
def test_bad_options(options, kind, message):
    with pytest.raises(kind, match=message):
        AWP(**{"model": build(), **options})
    if "gamma" in options:
        awp = AWP(build())
        with pytest.raises(kind, match=message):
            awp.gamma = options["gamma"]


def cross_entropy(model, x, y):
    return F.cross_entropy(model(x), y)


BAD_LOSSES = {
    "no function": (5, TypeError, r"loss must be a loss or a function of \(model, x, y\), got int"),
    "no tensor": (lambda model, x, y: (cross_entropy(model, x, y),), TypeError, "tensor of one number, got tuple"),
    "integers": (lambda model, x, y: y.sum(), TypeError, "tensor of one number, got torch.int64"),
    "rows": (lambda model, x, y: model(x), ValueError, r"one number, got shape \[8, 5\]: let it end with .mean"),
    "no gradient": (lambda model, x, y: model(x).sum().detach(), ValueError, "with a gradient .* take .detach"),
    "perturb": (
        lambda model, x, y: cross_entropy(model, perturb(model, x, y, ATTACK), y),
        ValueError,
        "perturb would make a new x' in the second pass .* call it before the block",
    ),
    "drop-in": (
        lambda model, x, y: trades_loss(model, x, y, None),
        ValueError,
        "trades_loss .* write criterion = ",
    ),
    "augmix": (lambda model, x, y: augmix_loss(model, x, y), ValueError, "augmix_loss .* write criterion = AugMixLoss"),
}


@pytest.mark.parametrize(("loss", "kind", "message"), BAD_LOSSES.values(), ids=BAD_LOSSES)
@pytest.mark.parametrize("gamma", [5e-3, 0])
def test_a_loss_that_does_not_fit_moves_nothing(loss, kind, message, gamma):
    model, (x, y) = build(), batch()
    before = snapshot(model)
    with pytest.raises(kind, match=message), AWP(model, gamma=gamma)(loss, x, y):
        pytest.fail("it was entered")
    if gamma:  # else a forward is the only one, and moves batch norm
        assert_unchanged(before, model)


@pytest.mark.parametrize("loss", [cross_entropy, loss_of(), AugMixLoss(BulletTrain(1, 0, 0))], ids=["own", "loss", "x"])
def test_the_moved_are_known_to_mining_alone(loss):
    model, (x, y) = build(), batch()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"samples='moved' .* write samples='all', or"):  # noqa: SIM117
        with AWP(model, samples="moved")(loss, x, y):
            pytest.fail("it was entered")
    assert_unchanged(before, model)


def test_blocks_do_not_nest():
    model, (x, y) = build(), batch()
    awp = AWP(model)
    before = weights_of(model)
    with awp(cross_entropy, x, y):
        moved = weights_of(model)
        with pytest.raises(RuntimeError, match="a block of this AWP is open"), awp(cross_entropy, x, y):
            pytest.fail("it was entered")
        assert_near_nested(weights_of(model), moved)
    assert_near_nested(weights_of(model), before)


def test_without_gradients_the_loss_at_the_moved_weights_is_a_number():
    model, twin, (x, y) = build(), build(), batch()
    with AWP(twin)(cross_entropy, x, y) as loss:
        expected = loss.detach()
    before = weights_of(model)
    with torch.no_grad(), AWP(model)(cross_entropy, x, y) as loss:
        assert not loss.requires_grad
        assert torch.equal(loss, expected)
    assert_near_nested(weights_of(model), before)


def test_weights_that_cannot_move_are_reported(monkeypatch):
    model, (x, y) = build(), batch()
    for p in model.parameters():
        p.requires_grad_(p.dim() == 1)
    with pytest.raises(ValueError, match=r"must have a trained weight of two or more .* write gamma=0"):  # noqa: SIM117
        with AWP(model)(cross_entropy, x, y):
            pytest.fail("it was entered")
    with pytest.raises(ValueError, match=r"at least the rounding of the weights, 0.0078, got 0.005"):  # noqa: SIM117
        with AWP(build(dtype=torch.bfloat16))(cross_entropy, x.bfloat16(), y):
            pytest.fail("it was entered")
    monkeypatch.setattr(module, "sharded_parts", lambda model: [model])
    with pytest.raises(ValueError, match="must not be sharded by fully_shard"), AWP(build())(cross_entropy, x, y):
        pytest.fail("it was entered")


def test_errors_of_the_loss_are_the_loss_own():
    model, (x, y) = build(), batch()
    before = snapshot(model)
    with pytest.raises(ValueError, match="pixels are NaN"), AWP(model)(loss_of(mining=mined()), x * torch.nan, y):
        pytest.fail("it was entered")
    with pytest.raises(TypeError, match="x must be a tensor"), AWP(model)(loss_of(), [1], y):
        pytest.fail("it was entered")
    assert_unchanged(before, model)
    assert passes.wanted() is None
