import copy
import inspect
import math

import numpy as np
import pytest
import reference_trades
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended_device import DEVICE, counted_waits, pretended_device
from small_models import (
    CLASSES,
    MODELS,
    SHAPE,
    Dead,
    Frozen,
    Undefined,
    assert_unchanged,
    batch,
    build,
    gradients,
    snapshot,
    with_bright,
)
from tolerances import UPDATES, assert_near, assert_near_nested
from torch import nn

from bt_fast import BulletTrain, ops, trades_loss
from bt_fast.attack.start import random_state
from bt_fast.ops import GROUPS

DISTANCES = ["l_inf", "l_2"]
OPTIONS = {
    "l_inf": {"step_size": 0.007, "epsilon": 0.031, "perturb_steps": 10, "beta": 6.0, "distance": "l_inf"},
    "l_2": {"epsilon": 0.3, "perturb_steps": 5, "beta": 6.0, "distance": "l_2"},
}


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def recorded(model):
    """Inputs of the model's forwards, in train mode and in eval mode."""
    forwards = {True: [], False: []}
    model.register_forward_pre_hook(lambda m, args: forwards[m.training].append(args[0].detach().clone()))
    return forwards


def confident(name="conv_bn", seed=0, dtype=torch.float64):
    """A model whose logits are spread enough for all three groups to occur."""
    model = build(name, seed, dtype)
    with torch.no_grad():
        next(m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear)).weight.mul_(4.0)
    return model


def own_labels(model, x, wrong=2):
    """The model's own decisions, the first `wrong` of them falsified."""
    with torch.no_grad():
        y = copy.deepcopy(model).eval()(x).argmax(dim=1)
    y[:wrong] = (y[:wrong] + 1) % CLASSES
    return y


# Without BulletTrain: what the authors' code computes


def run_both(model, x_of, options, steps=3):
    """Loss, gradients and state after each of some updates, of the reference and of ours."""
    twins = [model, copy.deepcopy(model)]
    optimizers = [sgd(m) for m in twins]
    for k in range(steps):
        x, y = x_of(k)
        results = []
        for loss_of, m, optimizer in zip((reference_trades.trades_loss, trades_loss), twins, optimizers, strict=True):
            torch.manual_seed(k)
            loss = loss_of(m, x, y, optimizer, **options)
            loss.backward()
            results.append((loss.detach(), gradients(m), copy.deepcopy(m.state_dict()), torch.get_rng_state()))
            optimizer.step()
        yield results


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("name", MODELS)
def test_loss_gradients_buffers_and_random_numbers_are_the_authors(name, distance):
    for (loss, grads, state, rng), ours in run_both(build(name), lambda k: batch(seed=k), OPTIONS[distance]):
        assert_near(ours[0], loss, UPDATES)
        assert_near_nested(ours[1], grads, UPDATES)
        assert_near_nested(ours[2], state, UPDATES)
        assert torch.equal(ours[3], rng)


@pytest.mark.parametrize("distance", DISTANCES)
def test_in_single_precision_the_loss_is_the_authors_within_its_noise(distance):
    model = build("conv_bn", dtype=torch.float32)
    for (loss, *_), ours in run_both(model, lambda k: batch(seed=k, dtype=torch.float32), OPTIONS[distance], steps=1):
        assert ours[0].item() == pytest.approx(loss.item(), rel=1e-3)


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_single_sample(distance):
    for (loss, grads, state, _), ours in run_both(build("conv_bn"), lambda k: batch(1, k), OPTIONS[distance], steps=1):
        assert_near(ours[0], loss)
        assert_near_nested(ours[1], grads)
        assert_near_nested(ours[2], state)


def test_the_defaults_are_the_authors():
    for (loss, *_), ours in run_both(build("conv_bn"), lambda k: batch(seed=k), {}, steps=1):
        assert_near(ours[0], loss)


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_zero_gradient_gives_the_authors_images(distance):
    images = []
    for loss_of in (reference_trades.trades_loss, trades_loss):
        torch.manual_seed(0)
        model = build(Dead)
        forwards = recorded(model)
        torch.manual_seed(0)
        loss_of(model, *batch(), sgd(model), **OPTIONS[distance])
        images.append(forwards[True][1])
    assert_near(images[1], images[0])


def test_13_forwards_of_the_batch_where_the_authors_take_23():
    counts = []
    for loss_of in (trades_loss, reference_trades.trades_loss):
        model = build("conv_bn")
        forwards = recorded(model)
        loss_of(model, *batch(), sgd(model), **OPTIONS["l_inf"])
        assert all(len(x) == 8 for x in forwards[True] + forwards[False])
        counts.append((len(forwards[False]), len(forwards[True])))
    assert counts == [(11, 2), (20, 3)]


def test_a_generator_replaces_the_global_random_numbers():
    torch.manual_seed(0)
    model, (x, y) = build("conv_bn"), batch()
    state = torch.get_rng_state()

    def once(seed, bullet=None):
        twin = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(seed)
        return trades_loss(twin, x, y, None, bullet=bullet, generator=generator, epsilon=0.3, distance="l_2").item()

    for bullet in (lambda: None, BulletTrain):
        assert once(1, bullet()) == once(1, bullet())
        assert once(1, bullet()) != once(2, bullet())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_seeded_script_repeats_its_numbers_with_bullettrain():
    x, y = batch()
    found = []
    for seed in (1, 1, 2):
        model = build("conv_bn", 0)
        torch.manual_seed(seed)
        found.append([trades_loss(model, x, y, None, bullet=BulletTrain()).item() for _ in range(2)])
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]
    assert found[0] != found[2]


# With BulletTrain: Algorithm 2


def algorithm_2(model, x, y, optimizer, noise, f_r, policy, skip, options, gamma=0.8, momentum=0.9):
    """Paper, Algorithm 2 and section 3.2, one sample at a time, with the authors' update: loss, F_R, groups, x'."""
    epsilon, distance, (n_b, n_r, n_o) = options["epsilon"], options["distance"], policy
    alpha_b = options["step_size"] if distance == "l_inf" else 2 * epsilon / max(n_b, 1)
    model.eval()
    svar = []
    for x_i, y_i in zip(x, y, strict=True):
        p = model(x_i[None]).softmax(dim=1)[0].detach().numpy()
        svar.append((1 if p.argmax() == y_i else -1) * p.var())
    threshold = max(0.0, np.quantile(svar, 1 - f_r))
    groups, x_adv = [], []
    for x_i, s, start in zip(x, svar, x + noise, strict=True):
        group = "outlier" if s < 0 else "robust" if f_r > 0 and s >= threshold else "boundary"
        n = {"boundary": n_b, "robust": n_r, "outlier": n_o}[group]
        alpha = alpha_b if group == "boundary" else 1.7 * epsilon / max(n, 1)
        x_i, one = x_i[None], start[None] if n else x_i[None]
        for _ in range(n):
            if distance == "l_inf":
                one = reference_trades.linf_attack(model, x_i, one, alpha, epsilon, 1)
            else:  # the authors' step is 2ε/N: N = 1 and the ball apart
                probe = one.detach().requires_grad_()
                (g,) = torch.autograd.grad(reference_trades.divergence(model, probe, x_i), probe)
                one = x_i + ((one + alpha * g / g.norm()).clamp(0, 1) - x_i).renorm(2, 0, epsilon)
        groups.append(group)
        x_adv.append((n, one))
    taken = [i for i, (n, _) in enumerate(x_adv) if n or not skip]

    model.train()
    optimizer.zero_grad()
    z, corrupted = model(x), None
    z_adv = z.detach().clone()
    robust = torch.zeros((), dtype=x.dtype)
    if taken:
        # a single row takes the first unperturbed one along into the batch statistics, and nowhere else
        others = [i for i in range(len(x)) if i not in taken][: len(taken) == 1]
        corrupted = torch.cat([x_adv[i][1] for i in taken + others])
        q = model(corrupted)[: len(taken)]
        z_adv[taken] = q.detach()
        robust = F.kl_div(q.log_softmax(1), z[taken].softmax(1), reduction="sum")
    model(x)  # batch norm sees the clean batch twice, as in the authors' code
    accuracy = (z_adv.argmax(dim=1) == y).double().mean().item()
    loss = F.cross_entropy(z, y) + options["beta"] / len(x) * robust
    return loss, momentum * f_r + (1 - momentum) * gamma * accuracy, groups, corrupted


def assert_same_update(models, loss, ours):
    """The reference model and ours have the same loss, gradients, weights and buffers."""
    loss.backward()
    ours.backward()
    assert_near(ours.detach(), loss.detach(), UPDATES)
    assert_near_nested(gradients(models[1]), gradients(models[0]), UPDATES)
    assert_near_nested(models[1].state_dict(), models[0].state_dict(), UPDATES)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def noise_of(x, generator):
    """What `trades_loss` adds to each sample with this generator, in the batch's own order."""
    return ops.gather_start(torch.zeros_like(x), None, None, random_state(x, generator), "normal", 0.001)[1]


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(
    ("policy", "unperturbed"),
    [
        ((5, 2, 0), "keep"),
        ((5, 2, 0), "skip"),
        ((5, 0, 0), "keep"),
        ((5, 0, 0), "skip"),
        ((5, 2, 1), "skip"),
        ((2, 4, 3), "keep"),
        ((0, 0, 0), "skip"),
        ((0, 0, 0), "keep"),
    ],
)
@pytest.mark.parametrize("start", [0.0, 0.4, 1.0])
def test_updates_are_algorithm_2(distance, policy, unperturbed, start):
    models = [confident(), confident()]
    optimizers = [sgd(m) for m in models]
    bullet = BulletTrain(*policy)
    bullet.robust_fraction.fill_(start)
    options = {"step_size": 0.007, **OPTIONS[distance], "perturb_steps": policy[0] or 10}
    f_r, seen = start, set()
    for k in range(3):
        x, _ = batch(9, seed=k)
        y = own_labels(models[0], x)
        noise = noise_of(x, seeded(k))
        assert 0.0005 < noise.std() < 0.0015
        skip = unperturbed == "skip"
        loss, f_r, groups, _ = algorithm_2(models[0], x, y, optimizers[0], noise, f_r, policy, skip, options)
        drawn = {"bullet": bullet, "unperturbed": unperturbed, "generator": seeded(k)}
        ours = trades_loss(models[1], x, y, optimizers[1], **options, **drawn)
        assert_same_update(models, loss, ours)
        assert_near(bullet.robust_fraction, f_r)
        for optimizer in optimizers:
            optimizer.step()
        seen |= set(groups)
    assert seen >= {0.0: {"outlier", "boundary"}, 0.4: set(GROUPS), 1.0: {"outlier", "robust"}}[start]


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 10), st.floats(0, 1), st.tuples(*[st.integers(0, 3)] * 3), st.booleans(), st.integers(0, 99))
def test_any_batch_and_policy(m, f_r, policy, skip, seed):
    models = [confident(seed=seed), confident(seed=seed)]
    x, y = batch(m, seed)
    bullet = BulletTrain(*policy)
    bullet.robust_fraction.fill_(f_r)
    options = OPTIONS["l_inf"] | {"perturb_steps": policy[0]}
    noise = noise_of(x, seeded(seed))
    loss, moved, *_ = algorithm_2(models[0], x, y, sgd(models[0]), noise, f_r, policy, skip, options)
    drawn = {"bullet": bullet, "unperturbed": "skip" if skip else "keep", "generator": seeded(seed)}
    ours = trades_loss(models[1], x, y, None, **options, **drawn)
    assert_same_update(models, loss, ours)
    assert_near(bullet.robust_fraction, moved)


@pytest.mark.parametrize(
    ("policy", "skips"), [((5, 2, 0), False), ((5, 0, 0), True), ((5, 0, 1), False), ((0, 0, 0), True)]
)
def test_samples_without_steps_are_skipped_by_default_only_where_only_boundary_samples_move(policy, skips):
    model = confident()
    x, _ = batch(9)
    y = own_labels(model, x)
    bullet = BulletTrain(*policy)
    bullet.robust_fraction.fill_(0.4)
    forwards = recorded(model)
    trades_loss(model, x, y, None, bullet=bullet)
    outlier, boundary, robust = bullet.group_counts.tolist()
    sizes = (boundary, robust, outlier)
    moving = sum(size for size, n in zip(sizes, policy, strict=True) if n)
    assert [len(f) for f in forwards[True]] == [n for n in (9, moving if skips else 9) if n]
    steps = sum(size * n for size, n in zip(sizes, policy, strict=True))
    assert sum(len(f) for f in forwards[False]) == 9 + steps
    assert len(forwards[False]) == 1 + max(n for n, size in [*zip(policy, sizes, strict=True), (0, 1)] if size)


def test_a_sample_without_steps_enters_the_update_exactly_clean():
    model = confident()
    x, _ = batch(9)
    y = own_labels(model, x, wrong=4)
    forwards = recorded(model)
    trades_loss(model, x, y, None, bullet=BulletTrain())
    clean, corrupted = forwards[True]
    assert (clean == corrupted).flatten(1).all(dim=1).tolist() == [False] * 5 + [True] * 4
    assert (clean - corrupted).abs().max() <= 0.031 + 1e-12


def test_the_fraction_and_the_counts_move_once_a_call():
    model, bullet = confident(), BulletTrain()
    x, _ = batch(9)
    y = own_labels(model, x)
    trades_loss(model, x, y, None, bullet=bullet)
    assert bullet.group_counts.tolist() == [2, 7, 0]
    assert 0.0 < bullet.robust_fraction.item() <= 0.1 * 0.8


VECTOR_NORMS = {
    "BatchNorm1d": lambda: [nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.ReLU()],
    "BatchNorm2d of 1×1 maps": lambda: [nn.Conv2d(1, 8, 6), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()],
}


@pytest.mark.parametrize("name", VECTOR_NORMS)
@pytest.mark.parametrize("moving", [0, 1, 2])
def test_few_samples_left_to_corrupt_where_batch_norm_sees_one_value_a_channel(name, moving):
    """Batch norm cannot train on one row of one value: the caller's batch is not 1, so that is no error of theirs."""
    torch.manual_seed(0)
    model = nn.Sequential(*VECTOR_NORMS[name](), nn.Linear(8, CLASSES)).double()
    x, _ = batch(8)
    y = own_labels(model, x, wrong=8 - moving)
    bullet = BulletTrain(3, 0, 0)
    loss = trades_loss(model, x, y, None, bullet=bullet, perturb_steps=3)
    loss.backward()
    assert bullet.group_counts.tolist() == [8 - moving, moving, 0]
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_with_dropout_the_loss_is_finite_and_trains():
    model, bullet = confident("dropout"), BulletTrain()
    x, y = batch(9)
    loss = trades_loss(model, x, y, None, bullet=bullet)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("name", "updates"), [("conv_bn", 3), ("dropout", 2)])
def test_with_bullettrain_the_clean_forward_of_the_update_is_replayed_or_left_out_but_never_run_again(name, updates):
    model = confident(name)
    forwards = recorded(model)
    trades_loss(model, *batch(), None, bullet=BulletTrain())
    assert len(forwards[True]) == 2
    assert model[1].num_batches_tracked == updates


# Gradients and modes of the caller


BULLETS = pytest.mark.parametrize("bullet", [None, BulletTrain(3, 1, 0)], ids=["uniform", "bullet"])


@BULLETS
def test_an_optimizer_is_zeroed_and_none_accumulates(bullet):
    found = {}
    for start, with_optimizer in ((0.0, False), (0.5, False), (0.5, True)):
        model, own = build("conv_bn"), copy.deepcopy(bullet)
        for p in model.parameters():
            p.grad = torch.full_like(p, start)
        torch.manual_seed(0)
        trades_loss(model, *batch(), sgd(model) if with_optimizer else None, perturb_steps=3, bullet=own).backward()
        found[start, with_optimizer] = gradients(model)
    fresh = found[0.0, False]
    assert_near_nested(found[0.5, False], {name: g + 0.5 for name, g in fresh.items()})
    assert_near_nested(found[0.5, True], fresh)


@BULLETS
@pytest.mark.parametrize("error", [False, True])
def test_modes_are_kept_module_by_module(bullet, error):
    model = build("conv_bn")
    model[1].eval()
    model[3].eval()
    modes = [m.training for m in model.modules()]
    frozen = copy.deepcopy(model[1].state_dict())
    if error:
        trainings = []
        model.register_forward_hook(lambda m, *_: trainings.append(m.training) or (1 / 0 if m.training else None))
        with pytest.raises(ZeroDivisionError):
            trades_loss(model, *batch(), None, perturb_steps=3, bullet=copy.deepcopy(bullet))
    else:
        trades_loss(model, *batch(), None, perturb_steps=3, bullet=copy.deepcopy(bullet)).backward()
        assert model[5].num_batches_tracked == 3
    assert [m.training for m in model.modules()] == modes
    assert_near_nested(model[1].state_dict(), frozen)


@BULLETS
def test_a_model_found_in_eval_mode_updates_in_train_mode_and_goes_back(bullet):
    model = build("conv_bn").eval()
    forwards = recorded(model)
    trades_loss(model, *batch(), None, perturb_steps=3, bullet=copy.deepcopy(bullet)).backward()
    assert len(forwards[True]) == 2
    assert not any(m.training for m in model.modules())
    assert model[1].num_batches_tracked == 3


@BULLETS
def test_a_model_with_its_own_train_method_keeps_its_frozen_part(bullet):
    model = build(Frozen)
    frozen = copy.deepcopy(model.body[1].state_dict())
    trades_loss(model, *batch(), None, perturb_steps=3, bullet=copy.deepcopy(bullet)).backward()
    assert_near_nested(model.body[1].state_dict(), frozen)


@BULLETS
def test_only_the_backward_of_the_caller_touches_gradients(bullet):
    model = build("conv_bn")
    x, y = batch()
    x.requires_grad_()
    loss = trades_loss(model, x, y, None, perturb_steps=3, bullet=copy.deepcopy(bullet))
    assert loss.shape == ()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert x.grad is None


@BULLETS
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_of_any_integer_type(bullet, dtype):
    losses = []
    for labels in (batch()[1], batch()[1].to(dtype)):
        torch.manual_seed(0)
        model = build("conv_bn")
        torch.manual_seed(0)
        losses.append(trades_loss(model, batch()[0], labels, None, perturb_steps=3, bullet=copy.deepcopy(bullet)))
    assert losses[0] == losses[1]


@BULLETS
def test_saturated_logits_give_finite_gradients(bullet):
    model = build("conv_bn", dtype=torch.float32)
    with torch.no_grad():
        model[-1].weight.mul_(1e4)
    loss = trades_loss(model, *batch(dtype=torch.float32), None, perturb_steps=3, bullet=copy.deepcopy(bullet))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# Reduced precision


@BULLETS
@pytest.mark.parametrize("distance", DISTANCES)
def test_autocast(bullet, distance):
    model, (x, y) = confident(dtype=torch.float32), batch(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = trades_loss(
            model, x, y, sgd(model), perturb_steps=3, epsilon=0.1, distance=distance, bullet=copy.deepcopy(bullet)
        )
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@BULLETS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("distance", DISTANCES)
def test_a_model_in_half_precision(bullet, dtype, distance):
    model, (x, _) = confident(dtype=dtype), batch(dtype=dtype)
    y = own_labels(model, x, wrong=0)
    forwards = recorded(model)
    torch.manual_seed(0)
    loss = trades_loss(model, x, y, None, 0.02, 0.1, 3, distance=distance, bullet=copy.deepcopy(bullet))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    clean, corrupted = forwards[True]
    moved = (clean - corrupted).abs().flatten(1).amax(dim=1)
    # bfloat16 rounds most of the start's noise away, so that now and then a sample stays at x, where no gradient is
    assert (moved > 0.01).double().mean() >= (0.5 if dtype == torch.bfloat16 else 1)


# The host waits once


@BULLETS
@pytest.mark.parametrize("distance", DISTANCES)
def test_one_read_a_call_on_a_device_and_one_more_without_bullettrain(bullet, distance):
    """Without state there is no later call that could raise what is wrong with an attack's gradients."""
    model = build("conv_bn", dtype=torch.float32).to(DEVICE)
    x = torch.empty(8, *SHAPE, device=DEVICE)
    y = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    bullet = bullet and copy.deepcopy(bullet).to(DEVICE)
    with pretended_device(plan=[5, 2, 2, 3, 2, 3] if bullet else []) as reads:
        loss = trades_loss(model, x, y, sgd(model), perturb_steps=3, bullet=bullet, distance=distance)
        assert reads.started == reads.waited == (1 if bullet else 2)
        loss.backward()
    assert loss.device == DEVICE


def test_buffers_that_never_change_are_compared_on_the_first_call_only():
    model = build("normalising", dtype=torch.float32)
    x, y = batch(dtype=torch.float32)
    trades_loss(model, x, y, None, perturb_steps=3)
    model.to(DEVICE)
    x, y = x.to(DEVICE), y.to(DEVICE)
    with pretended_device() as reads:
        trades_loss(model, x, y, None, perturb_steps=3)
    assert (reads.started, reads.waited) == (2, 2)


@pytest.mark.parametrize(("bullet", "reads"), [(None, 2), (BulletTrain(3, 1, 0), 2)])
def test_reads_on_the_cpu(bullet, reads):
    """On the CPU a read costs nothing, and BulletTrain's update checks its logits at once."""
    with counted_waits() as waits:
        trades_loss(build("conv_bn"), *batch(), None, perturb_steps=3, bullet=copy.deepcopy(bullet))
    assert len(waits) == reads


# Bad input: the error names it, and nothing has changed


class Wrapped(nn.Module):
    """A good model whose output is spoilt on the way out."""

    def __init__(self, spoil):
        super().__init__()
        self.body, self.spoil = build("conv_bn"), spoil

    def forward(self, x):
        return self.spoil(self.body(x))


def with_pixel(value):
    x, _ = batch()
    x[3, 0, 2, 2] = value
    return x


X, Y = batch()
BAD = {
    "label too large": ({"y": Y.clone().index_fill(0, torch.tensor(2), CLASSES)}, ValueError, r"0\.\.4.*1 of 8"),
    "label negative": ({"y": Y.clone().index_fill(0, torch.tensor(2), -1)}, ValueError, r"0\.\.4.*1 of 8"),
    "too few labels": ({"y": Y[:7]}, ValueError, r"y.*\[8\].*\[7\]"),
    "one-hot labels": ({"y": F.one_hot(Y, CLASSES)}, ValueError, r"y.*\[8\].*\[8, 5\]"),
    "float labels": ({"y": Y.double()}, TypeError, "y.*integers.*float64"),
    "labels in a list": ({"y": Y.tolist()}, TypeError, "y.*tensor.*list"),
    "labels elsewhere": ({"y": Y.to(DEVICE)}, ValueError, "y.*cpu.*meta"),
    "byte images": ({"x": (X * 255).byte()}, TypeError, "x_natural.*floating-point.*uint8"),
    "images in numpy": ({"x": X.numpy()}, TypeError, "x_natural.*ndarray"),
    "pixel above 1": ({"x": with_pixel(1.001)}, ValueError, r"x_natural.*\[0, 1\]"),
    "pixel below 0": ({"x": with_pixel(-0.001)}, ValueError, r"x_natural.*\[0, 1\]"),
    "pixel NaN": ({"x": with_pixel(math.nan)}, ValueError, r"x_natural.*\[0, 1\].*NaN"),
    "pixel infinite": ({"x": with_pixel(math.inf)}, ValueError, r"x_natural.*\[0, 1\]"),
    "empty batch": ({"x": X[:0], "y": Y[:0]}, ValueError, r"x_natural.*m >= 1.*\[0, 1, 6, 6\]"),
    "one-dimensional images": ({"x": X[:, 0, 0, 0]}, ValueError, r"x_natural.*\[m, ...\].*\[8\]"),
    "epsilon 0": ({"epsilon": 0.0}, ValueError, "epsilon.*greater than 0.*0.0"),
    "epsilon negative": ({"epsilon": -0.031}, ValueError, "epsilon.*greater than 0.*-0.031"),
    "epsilon NaN": ({"epsilon": math.nan}, ValueError, "epsilon.*nan"),
    "step size 0": ({"step_size": 0.0}, ValueError, "step_size.*greater than 0.*0.0"),
    "step size negative": ({"step_size": -0.1}, ValueError, "step_size.*greater than 0.*-0.1"),
    "step size NaN": ({"step_size": math.nan}, ValueError, "step_size.*nan"),
    "negative steps": ({"perturb_steps": -1}, ValueError, "perturb_steps.*-1"),
    "fractional steps": ({"perturb_steps": 2.5}, (TypeError, ValueError), "perturb_steps.*2.5"),
    "epsilon in words": ({"epsilon": "x"}, TypeError, "epsilon must be a number, got 'x'"),
    "beta negative": ({"beta": -1.0}, ValueError, "beta.*at least 0, got -1.0"),
    "beta NaN": ({"beta": math.nan}, ValueError, "beta.*nan"),
    "no generator": ({"generator": 5}, TypeError, "generator must be a torch.Generator.*int"),
    "unknown distance": ({"distance": "l_1"}, ValueError, "distance.*'l_inf', 'l_2'.*'l_1'"),
    "unknown option": ({"unperturbed": "drop"}, ValueError, "unperturbed.*'keep'.*'skip'.*'drop'"),
    "NaN logits": ({"spoil": lambda z: z / 0 * 0}, ValueError, "logits.*finite.*8 of 8"),
    "infinite logits": ({"spoil": lambda z: z.abs() / 0}, ValueError, "logits.*finite.*8 of 8"),
    "a tuple of logits": ({"spoil": lambda z: (z, z)}, TypeError, "model.*tensor.*tuple"),
    "one logit": ({"spoil": lambda z: z[:, :1]}, ValueError, r"model.*K >= 2.*\[8, 1\]"),
    "no class dimension": ({"spoil": lambda z: z[:, 0]}, ValueError, r"model.*\[8, K\].*\[8\]"),
    "a map of logits": ({"spoil": lambda z: z[..., None]}, ValueError, r"model.*\[8, K\].*\[8, 5, 1\]"),
    "rows missing": ({"spoil": lambda z: z[1:]}, ValueError, r"model.*\[8, K\].*\[7, 5\]"),
    "decisions": ({"spoil": lambda z: z.argmax(dim=1)}, TypeError, "model.*int64"),
}


def identity(z):
    return z


@BULLETS
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, bullet):
    changed, error, message = BAD[name]
    options = {"x": X, "y": Y, "perturb_steps": 3, **changed}
    model = Wrapped(options.pop("spoil", identity))
    bullet = copy.deepcopy(bullet)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.body[1].eval()
    state = [model] if bullet is None else [model, bullet]
    before = snapshot(*state)
    with pytest.raises(error, match=message):
        trades_loss(model, options.pop("x"), options.pop("y"), sgd(model), **options, bullet=bullet)
    assert_unchanged(before, *state)


def test_bad_combinations_of_options():
    model, bullet = build("conv_bn"), BulletTrain(7, 2, 0)
    before = snapshot(model, bullet)
    with pytest.raises(ValueError, match=r"unperturbed.*bullet="):
        trades_loss(model, X, Y, None, unperturbed="keep")
    with pytest.raises(ValueError, match=r"perturb_steps is 5.*7 boundary steps"):
        trades_loss(model, X, Y, None, perturb_steps=5, bullet=bullet)
    with pytest.raises(ValueError, match=r"perturb_steps.*at least 1.*0"):
        trades_loss(model, X, Y, None, perturb_steps=0)
    with pytest.raises(ValueError, match=r"BulletTrain is on meta.*cpu"):
        trades_loss(model, X, Y, None, bullet=BulletTrain().to(DEVICE))
    assert_unchanged(before, model, bullet)


@BULLETS
@pytest.mark.parametrize("distance", DISTANCES)
def test_a_gradient_with_nan_is_an_error_that_counts_the_samples(bullet, distance):
    model, bullet = build(Undefined), copy.deepcopy(bullet)
    bright = [1, 4, 5]
    x, y = with_bright(bright)
    count = 3
    if bullet:
        y = own_labels(model, x)
        steps = copy.deepcopy(bullet).assign(model.eval()(x), y).steps
        count = int((steps[bright] > 0).sum())
        assert count
        model.train()
    state = [model] if bullet is None else [model, bullet]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = snapshot(*state)
    with pytest.raises(ValueError, match=f"input gradient must be finite, but held NaN for {count} of 8 samples"):
        trades_loss(model, x, y, sgd(model), perturb_steps=3, distance=distance, bullet=bullet)
    assert_unchanged(before, *state)


def test_nan_logits_of_the_corrupted_batch_leave_the_fraction_alone():
    calls = []
    model = Wrapped(lambda z: z * math.nan if calls.append(1) or len(calls) == 6 else z)
    bullet = BulletTrain(3, 1, 0)
    bullet.robust_fraction.fill_(0.3)
    with pytest.raises(ValueError, match=r"adversarial_logits.*finite"):
        trades_loss(model, X, own_labels(model.body, X), None, perturb_steps=3, bullet=bullet)
    assert len(calls) == 6
    assert bullet.robust_fraction.item() == 0.3
    assert all(m.training for m in model.modules())


def test_the_optional_arguments_stay_where_the_authors_have_them():
    parameters = list(inspect.signature(trades_loss).parameters.values())
    theirs = list(inspect.signature(reference_trades.trades_loss).parameters.values())
    assert [(p.name, p.default) for p in parameters[: len(theirs)]][4:] == [(p.name, p.default) for p in theirs][4:]
    assert [p.name for p in parameters[:4]] == ["model", "x_natural", "y", "optimizer"]
    assert {p.kind for p in parameters[len(theirs) :]} == {inspect.Parameter.KEYWORD_ONLY}


def test_what_is_no_optimizer_or_bullet_is_named():
    model = build("conv_bn")
    with pytest.raises(TypeError, match="optimizer must be an optimizer or None, got str"):
        trades_loss(model, X, Y, "sgd")
    with pytest.raises(TypeError, match="bullet must be a BulletTrain or None, got int"):
        trades_loss(model, X, Y, None, bullet=3)


@pytest.mark.parametrize("bullet", [None, BulletTrain()], ids=["uniform", "bullet"])
def test_a_model_that_returns_something_else_in_train_mode_is_named_and_keeps_its_gradients(bullet):
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = build("conv_bn")

        def forward(self, x):
            return (self.body(x), x) if self.training else self.body(x)

    model = Auxiliary()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(TypeError, match="model must return a floating-point tensor of logits, got tuple"):
        trades_loss(model, X, Y, sgd(model), bullet=bullet)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
