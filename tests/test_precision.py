"""Mixed precision, gradient scaling and all else between a loss and a step give the plain result."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from reference_trades import trades_loss as reference_trades_loss
from small_models import assert_unchanged, batch, build, snapshot
from tolerances import AUTOCAST, UPDATES, assert_near, assert_near_nested
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from bt_fast import (
    BulletTrain,
    Frozen,
    Plan,
    ThreatModel,
    augmix_loss,
    generate,
    mart_loss,
    ops,
    pgd_loss,
    trades_loss,
)
from bt_fast.attack.folded import attack_model
from bt_fast.attack.forward import in_float16
from bt_fast.attack.runners import input_gradient
from bt_fast.baselines.fast import fast_loss
from bt_fast.baselines.grad_align import grad_align
from bt_fast.baselines.yopo import yopo_loss
from bt_fast.evaluation import evaluate

DTYPES = list(AUTOCAST)
THREE, ONE = BulletTrain(3, 1, 0), BulletTrain(1, 0, 0)
VIEW = Frozen(fold=False, channels_last=False)


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def attacked(loss, **options):
    return lambda model, x, y, bullet=None: loss(
        model, x, y, None, perturb_steps=3, bullet=bullet, generator=seeded(), **options
    )


def other(loss, **options):
    return lambda model, x, y, bullet=None: loss(model, x, y, generator=seeded(), **options)


def augmix(model, x, y, bullet=None):
    return augmix_loss(model, x, y, bullet=bullet, generator=seeded())


YOPO = {"optimizer": None, "propagations": 2, "layer_steps": 2}
LOSSES = {
    "trades": (attacked(trades_loss, beta=6.0, start="uniform"), None),
    "trades, bullet": (attacked(trades_loss, beta=6.0), THREE),
    "trades, bullet, folded": (attacked(trades_loss, frozen=Frozen()), THREE),
    "mart": (attacked(mart_loss), None),
    "mart, bullet": (attacked(mart_loss), THREE),
    "pgd": (attacked(pgd_loss), None),
    "pgd, bullet, folded": (attacked(pgd_loss, frozen=Frozen()), THREE),
    "augmix": (augmix, None),
    "augmix, bullet": (augmix, ONE),
    "fast": (other(functools.partial(fast_loss, trades_loss), optimizer=None, epsilon=0.03), None),
    "yopo": (other(yopo_loss, **YOPO), None),
    "yopo, mart": (other(yopo_loss, objective="mart", **YOPO), None),
    "grad_align": (other(grad_align, epsilon=0.03), None),
}
EACH = pytest.mark.parametrize("name", LOSSES)


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def far(a, b):
    """Returns the length of the difference, relative to b's length."""
    return float((a - b).norm() / b.norm())


def smooth():
    """A model without kinks: a ReLU that opens only in 16 bits would have another gradient, not a less exact one."""
    model = build(dtype=torch.float32)
    for name, module in model.named_children():
        if isinstance(module, nn.ReLU):
            setattr(model, name, nn.Softplus())
    return model


# Autocast, with gradient scaling where it is float16


@pytest.mark.parametrize("dtype", DTYPES)
@EACH
def test_a_step_under_autocast_is_that_of_single_precision(name, dtype):
    loss, bullet = LOSSES[name]
    x, y = batch(dtype=torch.float32)
    result = []
    for enabled in (False, True):
        # near a smooth model's minimum 16 bits cannot resolve 1 - cos, so this needs kinks
        model = build(dtype=torch.float32) if name == "grad_align" else smooth()
        mining, optimizer = copy.deepcopy(bullet), torch.optim.SGD(model.parameters(), lr=0.1)
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        scaler = torch.amp.GradScaler("cpu", enabled=enabled and dtype == torch.float16)
        with torch.autocast("cpu", dtype, enabled=enabled):
            value = loss(model, x, y, mining)
        assert value.dtype == torch.float32
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        gradients = gradient(model)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        step = nn.utils.parameters_to_vector(model.parameters()).detach() - before
        buffers = torch.cat([b.flatten().float() for n, b in model.named_buffers() if "running" in n])
        result.append((value.detach(), gradients, step, buffers))
    for ours, plain in zip(*reversed(result), strict=True):
        assert far(ours, plain) < AUTOCAST[dtype]
    assert not torch.equal(result[0][1], result[1][1])


class Watching(nn.Module):
    """Records in its forwards whether a cast of a weight would be cached: without gradient, or at all."""

    def __init__(self):
        super().__init__()
        self.body, self.seen = build(dtype=torch.float32), []

    def forward(self, x):
        if torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled():
            self.seen.append(torch.is_grad_enabled())
        return self.body(x)


@EACH
def test_no_weight_cast_without_gradient_waits_in_the_cache_for_the_update(name):
    """Some versions of torch reuse such a cast in the update, and the weight then gets no gradient."""
    (loss, bullet), model = LOSSES[name], Watching()
    with torch.autocast("cpu", torch.bfloat16):
        loss(model, *batch(dtype=torch.float32), copy.deepcopy(bullet)).backward()
    assert all(model.seen)
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fold", [True, False])
def test_the_view_s_own_autocast_is_not_the_caller_s(fold, dtype):
    """The outer autocast's cache holds casts of the same weights to the other dtype."""
    model, (x, _) = build(dtype=torch.float32).eval(), batch(dtype=torch.float32)
    outer = next(d for d in DTYPES if d != dtype)
    with attack_model(model, Frozen(fold=fold, channels_last=False, autocast=dtype), x) as view:
        alone = view(x)
        with torch.autocast("cpu", outer):
            assert model(x).dtype == outer
            result = view(x)
    assert result.dtype == alone.dtype == dtype
    assert torch.equal(result, alone)


def perturbed(model, x, **options):
    target = torch.eye(5)[torch.arange(len(x)) % 5]
    schedule = Plan.uniform(len(x), 5, 0.02, x.device)
    return generate(model, x, x + 0.001, target, schedule, ThreatModel(0.05), **options)


def flat(scale, model=None):
    """A model with all input gradients about `scale` times as large."""
    model = (build(dtype=torch.float32) if model is None else model).eval()
    with torch.no_grad():
        model[-1].weight *= scale
    return model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_the_caller_s_autocast_gives_the_attack_of_the_view_s_own(dtype, scale):
    model, (x, _) = flat(scale), batch(m=32, dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        result = perturbed(model, x)
    assert torch.equal(result, perturbed(model, x, frozen=Frozen(False, False, dtype)))
    exact, double = perturbed(model, x), copy.deepcopy(model).double()
    labels = torch.arange(len(x)) % 5
    plain, full, ours = (F.cross_entropy(double(images.double()), labels).item() for images in (x, exact, result))
    assert ours - plain > 0.95 * (full - plain) > 0


def test_in_float16_no_sample_stands_still_near_its_clean_point():
    """Near the clean point, the KL divergence's gradient has the size of the random start, times a small weight."""
    model, (x, _) = flat(1e-2), batch(dtype=torch.float32)
    target = model(x).softmax(dim=1).detach()
    start = x + 1e-5 * torch.randn(x.shape, generator=seeded())
    with torch.autocast("cpu", torch.float16):
        result = input_gradient(model, start, target)
    assert result.isfinite().all()
    assert (result != 0).double().mean() > 0.9


class Prepared(nn.Module):
    """Computes in 16 bits by its own autocast and returns float32, as some libraries prepare a model."""

    def __init__(self, body, dtype):
        super().__init__()
        self.body, self.dtype = body, dtype

    def forward(self, x):
        with torch.autocast("cpu", self.dtype):
            return self.body(x).float()


def test_a_model_that_computes_in_float16_by_itself_loses_no_sample_either():
    model, (x, _) = Prepared(flat(1e-2), torch.float16), batch(dtype=torch.float32)
    target = model(x).softmax(dim=1).detach()
    start = x + 1e-5 * torch.randn(x.shape, generator=seeded())
    result = input_gradient(model, start, target)
    assert (result != 0).double().mean() > 0.9


@pytest.mark.parametrize(
    ("model", "scaled"),
    [
        (lambda: build(dtype=torch.float32), False),
        (lambda: build(dtype=torch.bfloat16), False),
        (lambda: build(dtype=torch.float16), True),
        (lambda: Prepared(build(dtype=torch.float32), torch.bfloat16), False),
        (lambda: Prepared(build(dtype=torch.float32), torch.float16), True),
    ],
)
def test_the_rows_of_the_gradient_are_scaled_where_it_passes_through_float16_and_nowhere_else(model, scaled):
    model = model().eval()
    x = batch(dtype=next(model.parameters()).dtype)[0].requires_grad_()
    assert in_float16(model, x, model(x)) == scaled


def test_the_callers_autocast_decides_anew_whether_rows_are_scaled():
    model, x = build(dtype=torch.float32).eval(), batch(dtype=torch.float32)[0].requires_grad_()
    for dtype, scaled in ((torch.float16, True), (torch.bfloat16, False)):
        with torch.autocast("cpu", dtype):
            assert in_float16(model, x, model(x).float()) == scaled
    assert not in_float16(model, x, model(x))


@pytest.mark.parametrize("objective", ["pgd", "trades"])
def test_in_float16_yopo_loses_no_sample_and_no_gradient(objective):
    """YOPO's gradients are computed within the call, out of reach of a gradient scaler."""
    x, y = batch(m=64, dtype=torch.float32)
    result = []
    for enabled in (False, True):
        model = flat(1e-3, smooth()).train()
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            loss = yopo_loss(model, x, y, None, propagations=2, layer_steps=2, objective=objective, generator=seeded())
        (2.0**16 * loss).backward()
        result.append(model[0].weight.grad)
    assert far(result[1], result[0]) < AUTOCAST[torch.float16]


# Gradient scaling


def test_a_step_that_the_scaler_leaves_out_moves_no_weight_while_f_r_and_the_buffers_have_moved():
    model, bullet, (x, y) = build(dtype=torch.float32), BulletTrain(3, 1, 0), batch(dtype=torch.float32)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    handle = model[0].weight.register_hook(lambda g: torch.full_like(g, torch.inf))
    weights, mean = [p.detach().clone() for p in model.parameters()], model[1].running_mean.clone()
    for left_out in (True, False):
        scaler.scale(trades_loss(model, x, y, optimizer, bullet=bullet, generator=seeded())).backward()
        scaler.step(optimizer)
        scaler.update()
        still = all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
        assert still == left_out
        handle.remove()
        assert bullet.robust_fraction > 0
        assert not torch.equal(model[1].running_mean, mean)
    assert scaler.get_scale() == 2.0**15
    assert bullet.group_counts.sum() == 2 * len(x)


# 16-bit logits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["trades", "trades, bullet", "pgd", "augmix", "augmix, bullet", "yopo", "yopo, mart"])
def test_the_loss_of_16_bit_logits_is_computed_in_single_precision(name, dtype):
    loss, bullet = LOSSES[name]
    model = build(dtype=dtype)
    value = loss(model, *batch(dtype=dtype), copy.deepcopy(bullet))
    value.backward()
    assert value.dtype == torch.float32
    assert value.to(dtype).float() != value  # a loss rounded to the dtype would be equal
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["trades_kl", "mart_loss", "js_divergence"])
def test_a_float16_gradient_is_rounded_before_it_is_scaled_and_once_more_after(name):
    """Entries of a row below 2^-25 are lost at any scale."""
    scale = 2.0**16 / 128
    logits = [3 * torch.randn(64, 10, generator=seeded(k)) for k in range(2 if name != "js_divergence" else 3)]
    logits = [(logits[0] + 1e-2 * z).half() for z in logits]  # near each other, some of them nearly certain
    labels = [torch.arange(64) % 10, 6.0] if name == "mart_loss" else []
    rows = 64 if name == "mart_loss" else 1

    def gradients(dtype):
        leaves = [z.to(dtype).requires_grad_() for z in logits]
        return torch.autograd.grad(scale * rows * getattr(ops, name)(*leaves, *labels), leaves)

    for ours, exact in zip(gradients(torch.float16), gradients(torch.float32), strict=True):
        assert ((ours.float() - exact).abs() <= 1.01 * (scale * 2.0**-25 + 2.0**-10 * exact.abs())).all()


class Exploding(nn.Module):
    """Returns logits beyond float16 in the given modes."""

    def __init__(self, training):
        super().__init__()
        self.body, self.when = build(dtype=torch.float32), training

    def forward(self, x):
        logits = self.body(x)
        return logits * 1e6 if self.training == self.when else logits


@pytest.mark.parametrize("loss", [trades_loss, mart_loss, pgd_loss])
@pytest.mark.parametrize("bullet", [None, THREE])
def test_logits_that_overflow_float16_before_the_attack_are_an_error_that_changes_nothing(loss, bullet):
    model, mining = Exploding(training=False), copy.deepcopy(bullet)
    before = snapshot(model, *([mining] if mining else []))
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match=r"logits.* must be finite.*Inf"):
        loss(model, *batch(dtype=torch.float32), None, bullet=mining)
    assert_unchanged(before, model, *([mining] if mining else []))


@pytest.mark.parametrize("loss", [trades_loss, mart_loss, pgd_loss])
def test_logits_that_overflow_float16_in_the_update_leave_the_step_to_the_scaler(loss):
    model, (x, y) = Exploding(training=True), batch(dtype=torch.float32)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    weights = [p.detach().clone() for p in model.parameters()]
    with torch.autocast("cpu", torch.float16):
        value = loss(model, x, y, optimizer)
    assert not value.isfinite()
    scaler.scale(value).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert scaler.get_scale() == 2.0**15


# Formats, accumulation, clipping, averages: the numbers of the plain path


@EACH
def test_channels_last_models_and_images(name):
    """With BulletTrain a sample's noise follows its pixels' memory order: there the images stay contiguous."""
    loss, bullet = LOSSES[name]
    x, y = batch()
    result = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model, images = build(widened).to(memory_format=memory_format), x.repeat(1, 3, 1, 1)
        if bullet is None or name.startswith("augmix"):
            images = images.contiguous(memory_format=memory_format)
        value = loss(model, images, y, copy.deepcopy(bullet))
        value.backward()
        result.append({"loss": value.detach(), **dict(model.named_buffers())})
        result[-1] |= {f"{n}.grad": p.grad for n, p in model.named_parameters()}
    assert_near_nested(*result, UPDATES)


def widened():
    return nn.Sequential(nn.Conv2d(3, 1, 3, padding=1), *build("conv_bn"))


def standing_norms():
    """A model that trains, with norms in eval mode."""
    model = build()
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def no_norm():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).double()


MICRO = {
    "trades": functools.partial(trades_loss, optimizer=None, epsilon=0.1, perturb_steps=3, beta=6.0),
    "mart": functools.partial(mart_loss, optimizer=None, epsilon=0.1, perturb_steps=3),
    "pgd": functools.partial(pgd_loss, optimizer=None, epsilon=0.1, perturb_steps=3),
    "fast": functools.partial(fast_loss, mart_loss, optimizer=None, epsilon=0.1),
    "yopo, trades": functools.partial(yopo_loss, objective="trades", **YOPO),
}


@pytest.mark.parametrize("frozen", [None, Frozen()])
@pytest.mark.parametrize("model_of", [no_norm, standing_norms])
@pytest.mark.parametrize("name", MICRO)
def test_micro_batches_add_up_to_the_gradient_of_one_batch(name, model_of, frozen):
    """Without batch norm, in float64 and from one generator, four batches of four get the noise of one batch of 16."""
    x, y = batch(m=16)
    options = {} if name.startswith("yopo") else {"frozen": frozen}
    result = []
    for parts in (1, 4):
        model, generator = model_of(), seeded()
        for images, labels in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (MICRO[name](model, images, labels, generator=generator, **options) / parts).backward()
        result.append(gradient(model))
    assert_near(*result)


@pytest.mark.parametrize("frozen", [None, Frozen()])
def test_clipped_steps_and_averaged_weights_are_the_authors(frozen):
    """Compares three updates with clipped gradients and an exponential average, in double precision."""
    result = []
    for loss in (trades_loss, reference_trades_loss):
        torch.manual_seed(0)
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
        options = {"frozen": frozen} if loss is trades_loss else {}
        for seed in range(3):
            loss(model, *batch(seed=seed), optimizer, perturb_steps=3, beta=6.0, **options).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            average.update_parameters(model)
        result.append(dict(average.module.state_dict()))
    assert_near_nested(*result, UPDATES)


@pytest.mark.parametrize("averaging", [None, get_ema_multi_avg_fn(0.5)])
def test_an_average_of_a_model_that_has_views_is_evaluated_with_its_own_weights(averaging):
    model, (x, y) = build(), batch(m=16)
    average = AveragedModel(model, multi_avg_fn=averaging)
    for seed in range(2):
        trades_loss(model, *batch(seed=seed), None, perturb_steps=2, frozen=Frozen()).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.5 * p.grad
        average.update_parameters(model)
        evaluate(average, [(x, y)], ThreatModel(0.05), steps=2, frozen=Frozen())  # a view of the current average
    update_bn([x, x + 0.1], average)
    plain = build()
    plain.load_state_dict(average.module.state_dict())
    assert not torch.equal(plain[0].weight, model[0].weight)
    for frozen in (None, Frozen()):
        result, expected = (
            evaluate(m, [(x, y)], ThreatModel(0.05), steps=5, frozen=f, generator=seeded())
            for m, f in ((average, frozen), (plain, None))
        )
        assert torch.equal(result.restart, expected.restart)
        assert torch.equal(result.step, expected.step)
        with attack_model(average, frozen, x) as view:
            assert_near(view(x), plain.eval()(x))
