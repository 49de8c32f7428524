"""Images normalised by their loader give the result of the pixels."""

import copy
import functools
import gc
import warnings
import weakref
from unittest import mock

import pytest
import torch
from pretended_device import DEVICE, pretended_device
from small_models import assert_unchanged, build, snapshot
from tolerances import assert_near, assert_near_nested
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from bt_fast import (
    BulletTrain,
    Frozen,
    Normalization,
    Normalize,
    ThreatModel,
    augmix_loss,
    mart_loss,
    pgd_loss,
    trades_loss,
)
from bt_fast.attack import folded
from bt_fast.attack.folded import attack_model
from bt_fast.attack.pixels import on_pixels
from bt_fast.baselines.fast import fast_loss
from bt_fast.baselines.grad_align import grad_align
from bt_fast.baselines.yopo import yopo_loss
from bt_fast.evaluation import evaluate

IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
THREE, ONE = BulletTrain(3, 1, 0), BulletTrain(1, 0, 0)


def attacked(loss, **options):
    return lambda model, x, y, bullet, **more: loss(
        model, x, y, None, perturb_steps=3, bullet=bullet, generator=seeded(), **options, **more
    )


def other(loss, **options):
    """Wraps a loss that takes no BulletTrain."""
    return lambda model, x, y, bullet, **more: loss(model, x, y, generator=seeded(), **options, **more)


def augmix(model, x, y, bullet, **more):
    return augmix_loss(model, x, y, bullet=bullet, generator=seeded(), **more)


def seeded():
    return torch.Generator().manual_seed(1)


YOPO = {"optimizer": None, "propagations": 2, "layer_steps": 2}
LOSSES = {
    "trades": (attacked(trades_loss, beta=6.0), None),
    "trades, l_2": (attacked(trades_loss, epsilon=0.5, distance="l_2"), None),
    "trades, folded": (attacked(trades_loss, beta=6.0, frozen=Frozen()), None),
    "trades, bullet": (attacked(trades_loss, beta=6.0), THREE),
    "trades, bullet, folded": (attacked(trades_loss, frozen=Frozen()), THREE),
    "mart": (attacked(mart_loss), None),
    "mart, bullet": (attacked(mart_loss), THREE),
    "pgd": (attacked(pgd_loss), None),
    "pgd, bullet, folded": (attacked(pgd_loss, frozen=Frozen()), THREE),
    "augmix": (augmix, None),
    "augmix, bullet": (augmix, ONE),
    "fast": (other(functools.partial(fast_loss, pgd_loss), optimizer=None, epsilon=0.03), None),
    "yopo": (other(yopo_loss, **YOPO), None),
    "yopo, trades": (other(yopo_loss, objective="trades", **YOPO), None),
    "grad_align": (other(grad_align, epsilon=0.03), None),
}


def coloured():
    return nn.Sequential(nn.Conv2d(3, 1, 1), build("conv_bn"))


def model_of(dtype=torch.float64):
    return build(coloured, dtype=dtype)


def images(m=8, dtype=torch.float64):
    """Returns pixels, some exactly 0 and 1."""
    x = torch.randn(m, 3, 6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return x.mul(0.5).add(0.5).clamp(0, 1).to(dtype), torch.arange(m) % 5


def loaded(x, normalization=IMAGENET):
    """Normalises pixels like a loader, in their dtype (torchvision's own code)."""
    mean, std = (torch.as_tensor(v, dtype=x.dtype).view(-1, 1, 1) for v in (normalization.mean, normalization.std))
    return x.clone().sub_(mean).div_(std)


def behind(model, normalization=IMAGENET):
    """Returns the model behind a normaliser, so that it takes pixels."""
    return nn.Sequential(Normalize(normalization.mean, normalization.std), model).to(next(model.parameters()).dtype)


def outcome(loss, run, model, x, y, bullet, **options):
    """Returns the loss, the gradients, the buffers and F_R after two calls."""
    bullet = copy.deepcopy(bullet)
    for _ in range(2):
        value = loss(run, x, y, bullet, **options)
        value.backward()
    result = {"loss": value.detach(), **dict(model.named_buffers())}
    result |= {f"{name}.grad": p.grad for name, p in model.named_parameters()}
    return result if bullet is None else result | {f"bullet.{k}": v for k, v in bullet.state_dict().items()}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_gradients_and_buffers_are_those_of_the_pixels(name, dtype):
    (loss, bullet), (x, y) = LOSSES[name], images(dtype=dtype)
    ours, theirs = model_of(dtype), model_of(dtype)
    result = outcome(loss, ours, ours, loaded(x), y, bullet, normalization=IMAGENET)
    expected = outcome(loss, behind(theirs), theirs, x, y, bullet)
    assert_near_nested(result, expected, "normalised" if dtype == torch.float32 else None)


@pytest.mark.parametrize("name", ["trades", "trades, folded", "augmix, bullet", "yopo"])
def test_what_it_is_compared_with_is_not_the_loss_of_the_images_as_they_come(name):
    (loss, bullet), (x, y) = LOSSES[name], images()
    ours, theirs = model_of(), model_of()
    result = outcome(loss, ours, ours, loaded(x), y, bullet, normalization=IMAGENET)
    expected = outcome(loss, theirs, theirs, x, y, bullet)
    assert (result["loss"] - expected["loss"]).abs() > 1e-3


@pytest.mark.parametrize("frozen", [None, Frozen()])
@pytest.mark.parametrize("norm", ["l_inf", "l_2"])
def test_every_sample_falls_where_it_does_on_pixels(norm, frozen):
    model, (x, y) = model_of(), images(20)
    with torch.no_grad():
        y = behind(model).eval()(x).argmax(dim=1)
    y[:3] = (y[:3] + 1) % 5
    threat = ThreatModel(0.02 if norm == "l_inf" else 0.2, norm)
    options = {"steps": 3, "restarts": 2, "frozen": frozen}
    result = evaluate(
        model, zip(loaded(x).split(6), y.split(6), strict=True), threat,
        generator=seeded(), normalization=IMAGENET, **options,
    )  # fmt: skip
    expected = evaluate(behind(model), zip(x.split(6), y.split(6), strict=True), threat, generator=seeded(), **options)
    assert torch.equal(result.restart, expected.restart)
    assert torch.equal(result.step, expected.step)
    assert 0 < result.robust < result.clean < 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_images_in_16_bits(dtype):
    model, (x, y) = model_of(dtype), images(dtype=dtype)
    loss = pgd_loss(model, loaded(x), y, None, epsilon=0.1, perturb_steps=2, normalization=IMAGENET)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["trades", "augmix", "yopo", "evaluate"])
def test_under_inference_mode_before_and_with_gradients_after(name):
    model, (x, y) = model_of(), images()
    with torch.inference_mode():
        evaluate(model, [(loaded(x), y)], ThreatModel(0.03), steps=1, normalization=IMAGENET)
    if name in LOSSES:
        LOSSES[name][0](model, loaded(x), y, None, normalization=IMAGENET).backward()
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("normalization", [None, IMAGENET])
def test_an_evaluation_holds_no_batch_longer_than_until_it_is_read(normalization):
    model, (x, y) = model_of(), images(24)
    memory = []

    def stream():
        for pixels, labels in zip(x.split(4), y.split(4), strict=True):
            assert sum(not m.expired() for m in memory) <= 1  # the previous one, which is freed next
            batch = pixels.clone() if normalization is None else loaded(pixels)
            memory.append(StorageWeakRef(batch.untyped_storage()))
            yield batch, labels

    assert evaluate(model, stream(), ThreatModel(0.03), steps=1, normalization=normalization).total == 24


# Pixels from images


ANY = [IMAGENET, Normalization((0.5,) * 3, (0.5,) * 3), Normalization((0.9, 0.01, 1.0), (0.05, 0.01, 3.0))]


@pytest.mark.parametrize("normalization", ANY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_value_of_8_bits_comes_back_within_the_bounds(normalization, dtype):
    x = (torch.arange(256, dtype=torch.float64) / 255).to(dtype).expand(3, 256).view(1, 3, 16, 16)
    module = Normalize(normalization.mean, normalization.std).to(dtype)
    result = module.pixels(loaded(x, normalization), 0.0, 1.0)
    assert result.dtype == dtype
    assert 0 <= result.min() <= result.max() <= 1
    assert (result - x).abs().max() <= 4 * torch.finfo(dtype).eps


def test_a_pixel_outside_by_rounding_is_moved_and_one_beyond_is_an_error_before_anything_changes():
    model, bullet, (x, y) = model_of(torch.float32), copy.deepcopy(THREE), images(dtype=torch.float32)
    before = snapshot(model, bullet)
    x[0, 0, 0, 0], x[0, 1, 0, 0] = 1.0 + 2e-7, -2e-7
    trades_loss(copy.deepcopy(model), loaded(x), y, None, bullet=copy.deepcopy(bullet), normalization=IMAGENET)
    for pixel in (1.0 + 2e-6, -2e-6, float("nan")):
        x[0, 0, 0, 0] = pixel
        for bullets in (None, bullet):
            with pytest.raises(ValueError, match=r"x_natural must lie in \[0, 1\]"):
                trades_loss(model, loaded(x), y, None, bullet=bullets, normalization=IMAGENET)
        with pytest.raises(ValueError, match=r"x must lie in \[0, 1\]"):
            augmix_loss(model, loaded(x), y, normalization=IMAGENET)
        with pytest.raises(ValueError, match=r"the images must lie in \[0, 1\]"):
            evaluate(model, [(loaded(x), y)], ThreatModel(0.03), normalization=IMAGENET)
    assert_unchanged(before, model, bullet)


def test_the_bounds_of_an_evaluation_are_those_of_its_threat():
    model, (x, y) = model_of(), images()
    x = 255 * x
    normalization = Normalization([255 * v for v in IMAGENET.mean], [255 * v for v in IMAGENET.std])
    threat = ThreatModel(4.0, lower=0.0, upper=255.0)
    assert evaluate(model, [(loaded(x, normalization), y)], threat, steps=1, normalization=normalization).total == 8


# State kept for a model


def test_a_view_is_traced_once_and_follows_the_weights():
    model, (x, y) = model_of(), images()
    with mock.patch.object(folded, "_traced", wraps=folded._traced) as traced:
        for _ in range(3):
            same = Normalization(list(IMAGENET.mean), torch.tensor(IMAGENET.std, dtype=torch.float64))
            loss = trades_loss(model, loaded(x), y, None, perturb_steps=2, frozen=Frozen(), normalization=same)
            loss.backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.5 * p.grad
    assert traced.call_count == 1


def test_two_normalizations_of_one_model_do_not_meet():
    model, (x, y) = model_of(), images()
    model.train()(x)
    result = []
    for n in (IMAGENET, ANY[1], IMAGENET):
        twin = copy.deepcopy(model)
        loss = pgd_loss(model, loaded(x, n), y, None, generator=seeded(), normalization=n, frozen=Frozen())
        assert_near(loss, pgd_loss(behind(twin, n), x, y, None, generator=seeded()).detach())
        result.append(loss.detach())
    assert (result[0] - result[1]).abs() > 1e-3


@pytest.mark.parametrize("error", [False, True])
def test_the_model_is_as_it_was_and_not_kept(error):
    model, (x, y) = model_of(), images()
    model[1][1].eval()
    attributes, modes = set(vars(model)), [m.training for m in model.modules()]
    names = list(model.state_dict())
    if error:
        x[0] = 3.0
    try:
        trades_loss(model, loaded(x), y, None, perturb_steps=1, frozen=Frozen(), normalization=IMAGENET).backward()
    except ValueError:
        assert error
    assert set(vars(model)) == attributes
    assert [m.training for m in model.modules()] == modes
    assert list(model.state_dict()) == names
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_model_found_in_eval_mode_trains_and_goes_back():
    model, (x, y) = model_of().eval(), images()
    before = {name: b.clone() for name, b in model.named_buffers() if name.endswith("mean")}
    pgd_loss(model, loaded(x), y, None, perturb_steps=1, normalization=IMAGENET)
    assert not any(m.training for m in model.modules())
    assert all((b != before[name]).all() for name, b in model.named_buffers() if name in before)


@pytest.mark.parametrize(("bullet", "reads"), [(None, 2), (THREE, 1)])
def test_nothing_more_waits_for_the_device(bullet, reads):
    model, (x, y) = model_of(torch.float32), images(dtype=torch.float32)
    trades_loss(model, loaded(x), y, None, perturb_steps=1, normalization=IMAGENET)  # inspects the model's forward once
    model, x, y = model.to(DEVICE), x.to(DEVICE), y.to(DEVICE)
    bullet = bullet and copy.deepcopy(bullet).to(DEVICE)
    with on_pixels(model, x, IMAGENET):
        pass  # the numbers are copied to the device once for each model
    with pretended_device(plan=[5, 2, 2, 3, 2, 3] if bullet else []) as result:
        trades_loss(model, x, y, None, perturb_steps=3, bullet=bullet, normalization=IMAGENET)
    assert result.started == result.waited == reads


# Normalize


def test_the_module_is_what_a_loader_does_and_adds_nothing_to_checkpoints():
    model, (x, _) = model_of(), images()
    front = behind(model)
    assert torch.equal(front[0](x), loaded(x))
    assert torch.equal(front.float().double()[0](x), loaded(x))  # casting back and forth does not accumulate rounding
    assert torch.equal(front.half()[0](x.half()), loaded(x.half()))
    assert list(front.state_dict()) == [f"1.{name}" for name in model.state_dict()]
    assert not list(front[0].parameters())
    assert "0.485" in repr(front)


def test_the_module_is_traced():
    model, (x, _) = behind(model_of()), images()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attack_model(model, Frozen(), x) as view:
            assert_near(view(x), model(x))


def test_samples_that_are_no_images():
    model, x = build(lambda: nn.Linear(4, 3)), torch.rand(5, 4, dtype=torch.float64)
    normalization = Normalization((0.5, 0.4, 0.3, 0.2), (0.1, 0.2, 0.3, 0.4))
    given = (x - torch.tensor(normalization.mean).double()) / torch.tensor(normalization.std).double()
    front = nn.Sequential(Normalize(normalization.mean, normalization.std, dims=2), model).double()
    assert_near(front[0](x), given, torch.float32)
    y = torch.arange(5) % 3
    result = mart_loss(model, front[0](x), y, None, generator=seeded(), normalization=normalization)
    assert_near(result, mart_loss(front, x, y, None, generator=seeded()).detach())


# Bad input


@pytest.mark.parametrize(
    ("mean", "std", "error", "message"),
    [
        (0.5, (0.5,), TypeError, "mean must be a sequence"),
        ("0.5", (0.5,), TypeError, "mean must be a sequence"),
        ((0.5,), ("a",), TypeError, "std must be a number"),
        ((), (), ValueError, "one number for each channel"),
        ((0.5, 0.5), (0.5,), ValueError, "one number for each channel"),
        ((float("nan"),), (0.5,), ValueError, "mean must hold finite"),
        ((0.5,), (float("inf"),), ValueError, "std must hold finite"),
        ((0.5,), (0.0,), ValueError, "std must hold numbers above 0"),
    ],
)
@pytest.mark.parametrize("kind", [Normalization, Normalize])
def test_wrong_numbers_are_refused(kind, mean, std, error, message):
    with pytest.raises(error, match=message):
        kind(mean, std)


@pytest.mark.parametrize("name", ["trades", "mart", "pgd", "augmix", "fast", "yopo", "grad_align"])
def test_what_does_not_fit_is_refused_and_nothing_changes(name):
    loss, (x, y) = LOSSES[name][0], images()
    model = model_of()
    before = snapshot(model)
    with pytest.raises(TypeError, match="normalization must be a Normalization or None, got tuple"):
        loss(model, x, y, None, normalization=(IMAGENET.mean, IMAGENET.std))
    with pytest.raises(ValueError, match=r"x(_natural)? must have 1 channels as normalization has.*\[8, 3, 6, 6\]"):
        loss(model, x, y, None, normalization=Normalization((0.5,), (0.5,)))
    assert_unchanged(before, model)


def test_an_evaluation_refuses_what_does_not_fit():
    batches = [images()]
    with pytest.raises(TypeError, match="normalization must be a Normalization"):
        evaluate(model_of(), batches, ThreatModel(0.03), normalization=0.5)
    with pytest.raises(ValueError, match="the images must have 1 channels as normalization has"):
        evaluate(model_of(), batches, ThreatModel(0.03), normalization=Normalization((0.5,), (0.5,)))
