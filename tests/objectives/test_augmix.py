import copy
import math

import numpy as np
import pytest
import reference_augmix
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended_device import DEVICE, counted_waits, pretended_device
from small_models import CLASSES, MODELS, SHAPE, Frozen, assert_unchanged, batch, build, gradients, snapshot
from tolerances import UPDATES, assert_near, assert_near_nested
from torch import nn

from bt_fast import BulletTrain, augmix_loss
from bt_fast.augment.mix import augment_and_mix, draw_choices
from bt_fast.ops import GROUPS

CPU = torch.device("cpu")
BULLETS = pytest.mark.parametrize("bullet", [None, BulletTrain(1, 0, 0)], ids=["all", "bullet"])
KINDS = pytest.mark.parametrize(
    "options", [{}, {"jsd": False}, {"bullet": BulletTrain(1, 0, 0)}], ids=["all", "no jsd", "bullet"]
)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def views(x, count, seed, severity=3):
    """Returns what `augmix_loss` draws for these samples with this seed: first views, then second views."""
    choices = draw_choices(count * len(x), CPU, severity=severity, generator=seeded(seed))
    return augment_and_mix(x.repeat(count, 1, 1, 1), choices).chunk(count) if len(x) else [x] * count


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def recorded(model):
    """Records inputs and modes of the model's forwards."""
    forwards = []
    model.register_forward_pre_hook(lambda m, args: forwards.append((m.training, args[0].detach().clone())))
    return forwards


def confident(name="conv_bn", seed=0, dtype=torch.float64):
    """A model with logits that spread enough for all three groups to occur."""
    model = build(name, seed, dtype)
    with torch.no_grad():
        next(m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear)).weight.mul_(4.0)
    return model


def own_labels(model, x, wrong=2):
    """Returns the model's own decisions in train mode, the first `wrong` of them falsified."""
    with torch.no_grad():
        y = copy.deepcopy(model).train()(x).argmax(dim=1)
    y[:wrong] = (y[:wrong] + 1) % CLASSES
    return y


def assert_same_update(models, expected, ours):
    """Asserts that the reference model and ours have the same loss, gradients and buffers."""
    expected.backward()
    ours.backward()
    assert_near(ours.detach(), expected.detach())
    assert_near_nested(gradients(models[1]), gradients(models[0]))
    assert_near_nested(models[1].state_dict(), models[0].state_dict())


# Without BulletTrain: the authors' computation


@pytest.mark.parametrize("severity", [3, 7])
@pytest.mark.parametrize("name", MODELS)
def test_loss_gradients_and_buffers_are_the_authors(name, severity):
    models = [build(name), build(name)]
    (x, y), first_and_second = batch(), views(batch()[0], 2, 5, severity)
    torch.manual_seed(0)
    expected = reference_augmix.loss(models[0], x, *first_and_second, y)
    torch.manual_seed(0)
    ours = augmix_loss(models[1], x, y, generator=seeded(5), severity=severity)
    assert_same_update(models, expected, ours)


def test_several_updates_are_the_authors():
    models = [build(), build()]
    optimizers = [sgd(m) for m in models]
    for k in range(4):
        x, y = batch(seed=k)
        for optimizer in optimizers:
            optimizer.zero_grad()
        reference_augmix.loss(models[0], x, *views(x, 2, k), y).backward()
        augmix_loss(models[1], x, y, generator=seeded(k)).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert_near_nested(models[1].state_dict(), models[0].state_dict(), UPDATES)


def test_without_the_divergence_it_is_the_cross_entropy_of_one_view():
    models, (x, y) = [build(), build()], batch()
    expected = F.cross_entropy(models[0](views(x, 1, 3)[0]), y)
    assert_same_update(models, expected, augmix_loss(models[1], x, y, jsd=False, generator=seeded(3)))


@pytest.mark.parametrize(("jsd", "rows"), [(True, 24), (False, 8)])
def test_one_forward_of_three_views_or_of_one(jsd, rows):
    model = build()
    forwards = recorded(model)
    augmix_loss(model, *batch(), jsd=jsd)
    assert [(training, len(x)) for training, x in forwards] == [(True, rows)]


def test_the_two_views_differ_from_each_other_and_from_the_image():
    model = build()
    forwards = recorded(model)
    augmix_loss(model, *batch(), generator=seeded(0))
    clean, first, second = forwards[0][1].chunk(3)
    for a, b in ((clean, first), (clean, second), (first, second)):
        assert (a - b).abs().flatten(1).amax(dim=1).gt(0.01).sum() >= 6


# With BulletTrain: Algorithm 2 at one step for boundary samples and none for others


def algorithm_2(model, x, y, seed, f_r, gamma=0.8, momentum=0.9):
    """Paper, Algorithm 2 with section 4's steps for AugMix, one sample at a time: the loss, F_R, the groups."""
    z, m = model(x), len(x)
    svar = []
    for z_i, y_i in zip(z.detach(), y, strict=True):
        p = z_i.softmax(dim=0).numpy()
        svar.append((1 if p.argmax() == y_i else -1) * p.var())
    threshold = max(0.0, np.quantile(svar, 1 - f_r))
    groups = ["outlier" if s < 0 else "robust" if f_r > 0 and s >= threshold else "boundary" for s in svar]
    boundary = [i for i in range(m) if groups[i] == "boundary"]
    first, second = views(x[boundary], 2, seed)
    z_corrupted, divergence = z.detach().clone(), 0.0
    if boundary:
        z1, z2 = model(torch.cat([first, second])).chunk(2)
        z_corrupted[boundary] = z1.detach()
        for i, a, b in zip(boundary, z1, z2, strict=True):
            ps = [v.softmax(dim=0) for v in (z[i], a, b)]
            mixture = (sum(ps) / 3).clamp(1e-7, 1)
            divergence = divergence + sum((p * (p / mixture).log()).sum() for p in ps) / 3
    accuracy = (z_corrupted.argmax(dim=1) == y).double().mean().item()
    loss = F.cross_entropy(z, y) + 12 / m * divergence
    return loss, momentum * f_r + (1 - momentum) * gamma * accuracy, groups


@pytest.mark.parametrize("start", [0.0, 0.4, 1.0])
def test_updates_are_algorithm_2(start):
    models = [confident(), confident()]
    optimizers = [sgd(m) for m in models]
    bullet = BulletTrain(1, 0, 0)
    bullet.robust_fraction.fill_(start)
    f_r, counts, seen = start, dict.fromkeys(GROUPS, 0), set()
    for k in range(4):
        x, _ = batch(9, seed=k)
        y = own_labels(models[0], x)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss, f_r, groups = algorithm_2(models[0], x, y, k, f_r)
        ours = augmix_loss(models[1], x, y, bullet=bullet, generator=seeded(k))
        loss.backward()
        ours.backward()
        assert_near(ours.detach(), loss.detach(), UPDATES)
        assert_near(bullet.robust_fraction, f_r)
        for optimizer in optimizers:
            optimizer.step()
        assert_near_nested(models[1].state_dict(), models[0].state_dict(), UPDATES)
        for group in groups:
            counts[group] += 1
        seen |= set(groups)
    assert bullet.group_counts.tolist() == [counts[g] for g in GROUPS]
    assert seen >= {0.0: {"outlier", "boundary"}, 0.4: set(GROUPS), 1.0: {"outlier", "robust"}}[start]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 10), st.floats(0, 1), st.integers(0, 99))
def test_any_batch(m, f_r, seed):
    models = [confident(seed=seed), confident(seed=seed)]
    x, y = batch(m, seed)
    bullet = BulletTrain(1, 0, 0)
    bullet.robust_fraction.fill_(f_r)
    loss, moved, _ = algorithm_2(models[0], x, y, seed, f_r)
    assert_same_update(models, loss, augmix_loss(models[1], x, y, bullet=bullet, generator=seeded(seed)))
    assert_near(bullet.robust_fraction, moved)


def test_the_fraction_moves_by_the_first_view_and_not_by_the_second():
    """The second half of the second batch has misclassified second views only."""

    class Scripted(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.calls = nn.Parameter(torch.tensor(1.0)), 0

        def forward(self, x):
            self.calls += 1
            right = torch.zeros(len(x), 2)
            right[:, 0] = 5.0
            if self.calls == 2:
                right[len(x) // 2 :] = right[len(x) // 2 :].flip(1)  # all second views are misclassified
            return right * self.scale

    bullet = BulletTrain(1, 0, 0)
    augmix_loss(Scripted(), torch.rand(6, *SHAPE), torch.zeros(6, dtype=torch.int64), bullet=bullet)
    assert bullet.group_counts.tolist() == [0, 6, 0]
    assert bullet.robust_fraction.item() == pytest.approx(0.1 * 0.8)


def test_only_boundary_samples_are_augmented_and_run_a_second_forward():
    model = confident()
    x, _ = batch(9)
    y = own_labels(model, x, wrong=3)
    bullet = BulletTrain(1, 0, 0)
    bullet.robust_fraction.fill_(0.4)
    clean, twin = copy.deepcopy(model)(x), copy.deepcopy(bullet)
    boundary = (twin.plan(clean, y).steps > 0).nonzero().flatten()
    forwards = recorded(model)
    augmix_loss(model, x, y, bullet=bullet, generator=seeded(2))
    assert 0 < len(boundary) < 6
    assert [len(rows) for _, rows in forwards] == [9, 2 * len(boundary)]
    assert torch.equal(forwards[0][1], x)
    assert torch.equal(forwards[1][1], torch.cat(views(x[boundary], 2, 2)))
    assert all(training for training, _ in forwards)


def test_without_a_boundary_sample_it_is_the_clean_cross_entropy():
    models = [confident(), confident()]
    x, _ = batch(6)
    y = own_labels(models[0], x, wrong=6)
    bullet = BulletTrain(1, 0, 0)
    assert_same_update(models, F.cross_entropy(models[0](x), y), augmix_loss(models[1], x, y, bullet=bullet))
    assert bullet.group_counts.tolist() == [6, 0, 0]
    assert bullet.robust_fraction.item() == 0.0


@pytest.mark.parametrize("boundary", [0, 1, 2])
def test_few_boundary_samples_where_batch_norm_sees_one_value_a_channel(boundary):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES)).double()
    x, _ = batch(8)
    y = own_labels(model, x, wrong=8 - boundary)
    bullet = BulletTrain(1, 0, 0)
    loss = augmix_loss(model, x, y, bullet=bullet)
    loss.backward()
    assert bullet.group_counts.tolist() == [8 - boundary, boundary, 0]
    assert loss.isfinite()


def test_the_measured_fraction_gives_the_theoretical_speedup():
    bullet = BulletTrain(1, 0, 0)
    assert math.isnan(bullet.theoretical_speedup_augmix())
    bullet.group_counts.copy_(torch.tensor([5, 7, 8]))
    assert bullet.theoretical_speedup_augmix() == pytest.approx(3 / (1 + 2 * 0.35))


# Gradients, modes and random numbers of the caller


@KINDS
def test_gradients_accumulate(options):
    result = []
    for start in (0.0, 0.5):
        model = build()
        for p in model.parameters():
            p.grad = torch.full_like(p, start)
        augmix_loss(model, *batch(), generator=seeded(0), **copy.deepcopy(options)).backward()
        result.append(gradients(model))
    assert_near_nested(result[1], {name: g + 0.5 for name, g in result[0].items()})


@KINDS
def test_only_the_backward_of_the_caller_touches_gradients(options):
    model, (x, y) = build(), batch()
    x.requires_grad_()
    loss = augmix_loss(model, x, y, **copy.deepcopy(options))
    assert loss.shape == ()
    assert all(p.grad is None for p in model.parameters())
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert x.grad is None


@KINDS
def test_modes_are_kept_module_by_module(options):
    model = build()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    frozen = copy.deepcopy(model[1].state_dict())
    augmix_loss(model, *batch(), **copy.deepcopy(options)).backward()
    assert [m.training for m in model.modules()] == modes
    assert_near_nested(model[1].state_dict(), frozen)
    assert model[5].num_batches_tracked == (2 if options.get("bullet") else 1)


@KINDS
def test_a_model_found_in_eval_mode_trains_and_goes_back(options):
    model = build().eval()
    forwards = recorded(model)
    augmix_loss(model, *batch(), **copy.deepcopy(options)).backward()
    assert all(training for training, _ in forwards)
    assert not any(m.training for m in model.modules())


@KINDS
def test_a_model_with_its_own_train_method_keeps_its_frozen_part(options):
    model = build(Frozen)
    frozen = copy.deepcopy(model.body[1].state_dict())
    augmix_loss(model, *batch(), **copy.deepcopy(options)).backward()
    assert_near_nested(model.body[1].state_dict(), frozen)


@KINDS
def test_a_generator_replaces_the_global_random_numbers(options):
    def once(seed):
        return augmix_loss(copy.deepcopy(model), *batch(), generator=seeded(seed), **copy.deepcopy(options)).item()

    model = build()
    state = torch.get_rng_state()
    assert once(1) == once(1)
    assert once(1) != once(2)
    assert torch.equal(torch.get_rng_state(), state)


@KINDS
def test_a_seeded_script_repeats_its_numbers(options):
    losses = []
    for _ in range(2):
        model = build()
        torch.manual_seed(3)
        losses.append(augmix_loss(model, *batch(), **copy.deepcopy(options)).item())
    assert losses[0] == losses[1]


@KINDS
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_of_any_integer_type(options, dtype):
    x, y = batch()
    losses = [
        augmix_loss(build(), x, labels, generator=seeded(0), **copy.deepcopy(options)) for labels in (y, y.to(dtype))
    ]
    assert losses[0] == losses[1]


@KINDS
def test_saturated_logits_give_finite_gradients(options):
    model = build(dtype=torch.float32)
    with torch.no_grad():
        model[-1].weight.mul_(1e4)
    loss = augmix_loss(model, *batch(dtype=torch.float32), **copy.deepcopy(options))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision(options, dtype):
    model, (x, y) = build(dtype=torch.float32), batch(dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        loss = augmix_loss(model, x, y, **copy.deepcopy(options))
    loss.backward()
    half = build(dtype=dtype)
    half_loss = augmix_loss(half, x.to(dtype), y, **copy.deepcopy(options))
    half_loss.backward()
    for result, trained in ((loss, model), (half_loss, half)):
        assert result.isfinite()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.parameters())


# The host waits once


@KINDS
def test_one_read_a_call_on_a_device(options):
    model = build(dtype=torch.float32).to(DEVICE)
    x, y = torch.empty(8, *SHAPE, device=DEVICE), torch.zeros(8, dtype=torch.int64, device=DEVICE)
    options = {name: value.to(DEVICE) if name == "bullet" else value for name, value in copy.deepcopy(options).items()}
    with pretended_device(plan=[5, 2, 5, 1] if "bullet" in options else []) as reads:
        loss = augmix_loss(model, x, y, **options)
        assert reads.started == reads.waited == 1
        loss.backward()
    assert loss.device == DEVICE


@KINDS
def test_reads_on_the_cpu(options):
    """BulletTrain's update checks its logits at once where a read costs nothing."""
    with counted_waits() as waits:
        augmix_loss(confident(), *batch(), **copy.deepcopy(options))
    assert len(waits) == (2 if "bullet" in options else 1)


# Bad input: the error names it, and nothing changes


class Wrapped(nn.Module):
    """A good model with a corrupted output."""

    def __init__(self, spoil):
        super().__init__()
        self.body, self.spoil = build(), spoil

    def forward(self, x):
        return self.spoil(self.body(x))


def with_pixel(value):
    x, _ = batch()
    x[3, 0, 2, 2] = value
    return x


X, Y = batch()
BAD = {
    "label too large": ({"y": Y.clone().index_fill(0, torch.tensor(2), CLASSES)}, ValueError, r"y .*0\.\.4.*1 of 8"),
    "label negative": ({"y": Y.clone().index_fill(0, torch.tensor(2), -1)}, ValueError, r"y .*0\.\.4.*1 of 8"),
    "ignored label": ({"y": Y.clone().index_fill(0, torch.tensor(2), -100)}, ValueError, r"y .*0\.\.4.*1 of 8"),
    "too few labels": ({"y": Y[:7]}, ValueError, r"y.*\[8\].*\[7\]"),
    "float labels": ({"y": Y.double()}, TypeError, "y.*integers.*float64"),
    "labels elsewhere": ({"y": Y.to(DEVICE)}, ValueError, "y.*cpu.*meta"),
    "byte images": ({"x": (X * 255).byte()}, TypeError, "x must be floating-point.*uint8"),
    "images in numpy": ({"x": X.numpy()}, TypeError, "x must be.*ndarray"),
    "pixel above 1": ({"x": with_pixel(1.001)}, ValueError, r"x must lie in \[0, 1\]"),
    "pixel below 0": ({"x": with_pixel(-0.001)}, ValueError, r"x must lie in \[0, 1\]"),
    "pixel NaN": ({"x": with_pixel(math.nan)}, ValueError, r"x must lie in \[0, 1\].*NaN"),
    "empty batch": ({"x": X[:0], "y": Y[:0]}, ValueError, r"x must hold at least 1 image.*\[0, 1, 6, 6\]"),
    "flat images": ({"x": X.flatten(1)}, ValueError, r"x.*\[n, C, H, W\].*\[8, 36\]"),
    "severity 0": ({"severity": 0.0}, ValueError, r"severity.*\(0.1, 10\], got 0.0"),
    "severity in words": ({"severity": "high"}, TypeError, "severity must be a number, got 'high'"),
    "no generator": ({"generator": 5}, TypeError, "generator must be a torch.Generator.*int"),
    "NaN logits": ({"spoil": lambda z: z / 0 * 0}, ValueError, "the model's logits must be finite"),
    "infinite logits": ({"spoil": lambda z: z.abs() / 0}, ValueError, "the model's logits must be finite"),
    "a tuple of logits": ({"spoil": lambda z: (z, z)}, TypeError, "model.*tensor.*tuple"),
    "one logit": ({"spoil": lambda z: z[:, :1]}, ValueError, r"model.*K >= 2.*, 1\]"),
    "rows missing": ({"spoil": lambda z: z[1:]}, ValueError, r"model must return logits of shape"),
}


@KINDS
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, options):
    changed, error, message = BAD[name]
    given_ = {"x": X, "y": Y, **copy.deepcopy(options), **changed}
    model = Wrapped(given_.pop("spoil", lambda z: z))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.body[1].eval()
    state = [model, *([given_["bullet"]] if "bullet" in given_ else [])]
    before, random = snapshot(*state), torch.get_rng_state()
    with pytest.raises(error, match=message):
        augmix_loss(model, given_.pop("x"), given_.pop("y"), **given_)
    assert_unchanged(before, *state)
    assert torch.equal(torch.get_rng_state(), random)


def test_nan_logits_of_the_views_change_nothing():
    calls = []
    model = Wrapped(lambda z: z * math.nan if calls.append(1) or len(calls) == 2 else z)
    bullet = BulletTrain(1, 0, 0)
    bullet.robust_fraction.fill_(0.3)
    y = own_labels(model.body, X)
    before = snapshot(model, bullet)
    with pytest.raises(ValueError, match="logits must be finite"):
        augmix_loss(model, X, y, bullet=bullet)
    assert len(calls) == 2
    assert_unchanged(before, model, bullet)


@pytest.mark.parametrize("name", MODELS)
@BULLETS
def test_an_error_in_the_last_forward_gives_every_kind_of_buffer_its_value_back(bullet, name):
    model, bullet = build(name), copy.deepcopy(bullet)
    y = own_labels(model, X)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1) or (1 / 0 if len(calls) == (2 if bullet else 1) else None))
    state = [model, *([bullet] if bullet else [])]
    before = snapshot(*state)
    with pytest.raises(ZeroDivisionError):
        augmix_loss(model, X, y, bullet=bullet)
    assert_unchanged(before, *state)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bullet": BulletTrain()}, ValueError, r"bullet must be BulletTrain\(1, 0, 0\).*Got \(10, 2, 0\)"),
        ({"bullet": BulletTrain(1, 0, 1)}, ValueError, r"Got \(1, 0, 1\)"),
        ({"bullet": BulletTrain(1, 0, 0), "jsd": False}, ValueError, "jsd=False.*nothing for bullet to save"),
        ({"bullet": 3}, TypeError, "bullet must be a BulletTrain or None, got int"),
        ({"bullet": BulletTrain(1, 0, 0).to(DEVICE)}, ValueError, "BulletTrain is on meta.*cpu"),
    ],
)
def test_options_that_do_not_fit_each_other(options, error, message):
    model = build()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        augmix_loss(model, X, Y, **options)
    assert_unchanged(before, model)
