"""The folded view of a model computes what the model computes, follows its changes, and explains why it cannot fold."""

import copy
import functools
import gc
import warnings
import weakref
from contextlib import nullcontext
from unittest import mock

import pytest
import small_models
import torch
import torch.nn.functional as F
from emulated_tf32 import EmulatedTf32
from torch import nn
from torch.nn.functional import avg_pool2d

from bt_fast import APGD, PGD, BulletTrain, Frozen, Plan, ThreatModel, TRADESLoss, generate, perturb, trades_loss
from bt_fast.attack import folded, folding
from bt_fast.attack.folded import FoldedModel, attack_model
from bt_fast.attack.forward import eval_mode
from bt_fast.attack.runners import input_gradient
from bt_fast.lab.models import build_model

RECIPES = [Frozen(), Frozen(channels_last=False)]


def trained(model):
    """Returns the model in double precision with norms and weights as after some training."""
    torch.manual_seed(0)
    model = model.double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.1, 3.0)
            if module.weight is not None:
                nn.init.uniform_(module.weight, -0.5, 1.5)  # some scales are negative
                nn.init.uniform_(module.bias, 0.0, 1.0)
    return model


class TwoReaders(nn.Module):
    """A convolution with a second reader besides its norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(144, 5)

    def forward(self, x):
        out = self.conv(x)
        return self.head((self.norm(out).relu() + out).flatten(1))


class RunTwice(nn.Module):
    """One convolution followed by two norms."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 1, 3, padding=1, bias=False), nn.Linear(36, 5)
        self.first, self.second = nn.BatchNorm2d(1), nn.BatchNorm2d(1, affine=False)

    def forward(self, x):
        x = self.first(self.conv(x)).relu()
        return self.head(self.second(self.conv(x)).flatten(1))


def strange_convolutions():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=2, padding_mode="reflect", dilation=2),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 8, 3, groups=2, stride=2, padding="valid"),
        nn.BatchNorm2d(8, eps=0.1),
        nn.Flatten(),
        nn.Linear(32, 6),
        nn.BatchNorm1d(6),
        nn.BatchNorm1d(6),
        nn.ReLU(inplace=True),
        nn.Linear(6, 5, bias=False),
    )


MODELS = {
    "conv_bn": small_models.conv_bn,
    "tied norm": small_models.TiedNorm,
    "normalising": small_models.Normalising,
    "own norm": small_models.OwnNorm,
    "two readers": TwoReaders,
    "run twice": RunTwice,
    "strange convolutions": strange_convolutions,
    "instance norm": small_models.instance_norm,
    "small-cnn": lambda: build_model("small-cnn", in_channels=1, image_size=16, num_classes=5),
    "wrn-10-1": lambda: build_model("wrn-10-1", in_channels=1, image_size=8, num_classes=5),
    "preactresnet-18": lambda: build_model("preactresnet-18", in_channels=1, image_size=8, num_classes=5),
}
SIDES = {"small-cnn": 16, "wrn-10-1": 8, "preactresnet-18": 8}


def images(name, n=5):
    return torch.rand(n, 1, *[SIDES.get(name, 6)] * 2, dtype=torch.float64)


def view_of(model, x, recipe=RECIPES[0]):
    with attack_model(model, recipe, x) as view:
        return view


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_input_gradient_are_the_models(name, recipe):
    model, x = trained(MODELS[name]()), images(name)
    target = torch.rand(5, 5, dtype=torch.float64).softmax(dim=1)
    with attack_model(model, recipe, x) as view:
        assert isinstance(view, FoldedModel)
        assert view.reason is None
        torch.testing.assert_close(view(x), model(x), rtol=0, atol=1e-9)
        result, expected = (input_gradient(m, x, target) for m in (view, model))
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "folded", "left"),
    [
        ("conv_bn", 2, 0),
        ("two readers", 0, 1),
        ("run twice", 2, 0),
        ("strange convolutions", 4, 0),
        ("wrn-10-1", 3, 4),
        ("preactresnet-18", 8, 8),
    ],
)
def test_every_norm_directly_behind_one_layer_is_folded(name, folded, left):
    model, x = trained(MODELS[name]()), images(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        view = view_of(model, x)
    assert view.reason is None
    calls = []
    for run in (view, model.eval()):
        with mock.patch("torch.batch_norm", wraps=torch.batch_norm) as batch_norm:
            run(x)
        calls.append(batch_norm.call_count)
    assert calls == [left, folded + left]


def pool_by_shape(x):
    return F.avg_pool2d(x, x.shape[-2:])


def pool_by_side(x):
    return F.avg_pool2d(x, x.size(3))


def pool_by_name(x):
    return avg_pool2d(x, kernel_size=(x.size(2), x.size(3)))


@pytest.mark.parametrize("pool", [pool_by_shape, pool_by_side, pool_by_name])
def test_a_pool_over_whatever_size_is_traced(pool):
    class Pooling(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)), nn.Linear(4, 5)

        def forward(self, x):
            return self.head(pool(self.body(x)).flatten(1))

    model = trained(Pooling())
    view = view_of(model, images("conv_bn"))
    assert view.reason is None
    for side in (6, 9):
        x = torch.rand(2, 1, side, side, dtype=torch.float64)
        torch.testing.assert_close(view(x), model.eval()(x), rtol=0, atol=1e-9)


def test_it_follows_the_model_without_being_traced_again():
    model, x = trained(small_models.conv_bn()), images("conv_bn")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    first = view_of(model, x)
    for _ in range(2):
        model.train()
        F.cross_entropy(model(x), torch.arange(5)).backward()  # changes the running statistics
        optimizer.step()
        with attack_model(model, RECIPES[0], x) as view:
            assert view is first
            torch.testing.assert_close(view(x), model(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("attack", [PGD(0.1, 0.03, 3), PGD(0.1, 0.03, 3, keep="best"), APGD(0.1, 3)])
def test_a_view_made_under_inference_mode_attacks_there_and_later(attack):
    """As a validation loop may attack before the first update, of images that are made there."""
    model, (x, y) = trained(small_models.conv_bn()), small_models.batch(6)
    results = []
    for mode in (torch.inference_mode(), torch.no_grad(), nullcontext()):
        with mode:
            generator = torch.Generator().manual_seed(0)
            given = x.clone(), y.clone()
            results.append(perturb(model, *given, attack, engine="fast", generator=generator))
    for result in results:
        assert torch.equal(result, results[0])
        assert not result.is_inference()
    with torch.inference_mode():
        TRADESLoss(attack, mining=BulletTrain(3, 1, 0))(model, x.clone(), y.clone())
    TRADESLoss(attack, mining=BulletTrain(3, 1, 0))(model, x, y).backward()


@pytest.mark.parametrize("change", ["parameter", "module", "dtype"])
def test_a_model_that_was_rebuilt_is_traced_again(change):
    model, x = trained(small_models.conv_bn()), images("conv_bn")
    view_of(model, x)
    if change == "parameter":
        model[0].weight = nn.Parameter(model[0].weight.detach() + 1.0)
    elif change == "module":
        model[8] = nn.Linear(16, 5).double()
    else:
        model.float()
        x = x.float()
    with attack_model(model, RECIPES[0], x) as view:
        torch.testing.assert_close(view(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_model_without_buffers_that_was_cast_is_traced_again():
    model, x = trained(MODELS["small-cnn"]()), images("small-cnn")
    view_of(model, x)
    model.float()
    with attack_model(model, RECIPES[0], x.float()) as view:
        torch.testing.assert_close(view(x.float()), model(x.float()), rtol=1e-5, atol=1e-5)


def test_a_parameter_whose_storage_moved_is_followed():
    model, x = trained(small_models.conv_bn()), images("conv_bn")
    view_of(model, x)
    with torch.no_grad():
        model[0].weight.data = model[0].weight.data * 2
    with attack_model(model, RECIPES[0], x) as view:
        torch.testing.assert_close(view(x), model(x), rtol=0, atol=1e-9)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = small_models.conv_bn()

    def forward(self, x):
        return self.body(x if x.sum() > 0 else -x)


class Drawing(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = small_models.conv_bn()

    def forward(self, x):
        return self.body(F.dropout(x, 0.5, training=True))


def hooked():
    model = small_models.conv_bn()
    model[2].register_forward_hook(lambda module, given, out: out * 2)
    return model


class WithOptions(nn.Module):
    """A model with forward arguments besides the images that change its result, as many published models have."""

    def __init__(self):
        super().__init__()
        self.features, self.head = small_models.conv_bn()[:8], small_models.conv_bn()[8]

    def forward(self, x, return_features=False, *, scale: float | None = None, **more):
        h = self.features(x)
        if return_features:
            return self.head(h), h
        return self.head(h) if scale is None else self.head(h) * scale


@pytest.mark.parametrize(
    "around", [lambda m: m, torch.compile, nn.Sequential], ids=["bare", "compiled", "in a Sequential"]
)
def test_what_a_forward_takes_beside_images_has_its_defaults(around):
    model, x = trained(WithOptions()), images("conv_bn")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with attack_model(around(model), RECIPES[0], x) as view:
            assert view.reason is None
            torch.testing.assert_close(view(x), model(x), rtol=0, atol=1e-9)


def test_a_view_of_such_a_model_does_not_keep_it():
    model = trained(WithOptions())
    with attack_model(model, RECIPES[0], images("conv_bn")):
        pass
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_the_line_that_cannot_be_traced_is_reported_and_what_to_do():
    with (
        pytest.warns(UserWarning, match="cannot be traced") as reported,
        attack_model(trained(Branching()), RECIPES[0], images("conv_bn")),
    ):
        pass
    line = Branching.forward.__code__.co_firstlineno + 1
    message = str(reported[0].message)
    assert f"line {line} of test_folded.py, `return self.body(x if x.sum() > 0 else -x)`: TraceError" in message
    assert message.endswith("decide by their shape, or put what decides into a function marked by torch.fx.wrap")


@torch.fx.wrap
def brighter(x):
    return x if x.sum() > 0 else -x


class Wrapped(Branching):
    def forward(self, x):
        return self.body(brighter(x))


def test_what_the_message_says_is_a_way_out():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attack_model(trained(Wrapped()), RECIPES[0], images("conv_bn")) as view:
            assert view.reason is None


@pytest.mark.parametrize(
    ("build", "reason"),
    [(Branching, "cannot be traced: line"), (Drawing, "gives other logits"), (hooked, "2 has a hook")],
)
def test_a_model_that_cannot_be_folded_runs_as_it_is_and_says_why_once(build, reason):
    model, x = trained(build()), images("conv_bn")
    with pytest.warns(UserWarning, match=reason), attack_model(model, RECIPES[0], x) as view:
        pass
    assert reason in view.reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attack_model(model, RECIPES[0], x) as view:
            torch.manual_seed(1)
            result = view(x)
            torch.manual_seed(1)
            assert torch.equal(result, model(x))


def test_a_hook_that_came_later_is_run():
    model, x = trained(small_models.conv_bn()), images("conv_bn")
    view_of(model, x)
    model[2].register_forward_hook(lambda module, given, out: out * 2)
    with pytest.warns(UserWarning, match="hook"), attack_model(model, RECIPES[0], x) as view:
        assert torch.equal(view(x), model(x))


def test_what_the_model_raises_reaches_the_caller():
    model = small_models.conv_bn()
    with pytest.raises(RuntimeError, match="channels"), attack_model(model, RECIPES[0], torch.rand(2, 3, 6, 6)):
        pass
    assert model.training


def test_nan_pixels_are_no_reason_to_give_up_folding():
    model, x = trained(small_models.conv_bn()), images("conv_bn")
    x[0] = float("nan")
    assert view_of(model, x).reason is None


def test_a_view_does_not_keep_its_model_alive():
    model = trained(small_models.conv_bn())
    view_of(model, images("conv_bn"))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_modes_parameters_and_gradients_are_left_alone():
    model, x = trained(small_models.conv_bn(dropout=0.5)).train(), images("conv_bn")
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    with attack_model(model, RECIPES[0], x) as view:
        input_gradient(view, x, torch.zeros(5, 5, dtype=torch.float64))
    assert [m.training for m in model] == [i != 1 for i in range(9)]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def attack(model, x, frozen, norm="l_inf"):
    threat = ThreatModel(0.1 if norm == "l_inf" else 1.0, norm)
    schedule = Plan.from_steps(torch.tensor([3, 0, 1, 3, 2]), torch.full((5,), 0.03))
    clean, target = schedule.sort(x), torch.eye(5, dtype=x.dtype)
    return generate(model, clean, clean, target, schedule, threat, frozen=frozen)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("norm", ["l_inf", "l_2"])
def test_the_attack_finds_the_same_perturbation(norm, recipe):
    model, x = trained(small_models.conv_bn()), images("conv_bn")
    result, expected = attack(model, x, recipe, norm), attack(model, x, None, norm)
    assert result.is_contiguous()
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_no_gradient_is_lost(dtype):
    model, x = trained(small_models.conv_bn()).float(), images("conv_bn").float()
    with attack_model(model, Frozen(autocast=dtype), x) as view:
        assert {b.dtype for layer in view._layers for b in layer.buffers()} == {dtype}
        start = x + 1e-6 * torch.randn_like(x)
        result = input_gradient(view, start, model(x).softmax(dim=1).detach())
    assert result.dtype == torch.float32
    assert result.isfinite().all()
    assert (result.flatten(1).abs().amax(dim=1) > 0).all()


def test_the_training_loss_with_and_without_a_view_is_the_same():
    result, x, original = [], images("conv_bn"), trained(small_models.conv_bn()).train()
    for frozen in (None, Frozen()):
        model = copy.deepcopy(original)
        bullet, generator = BulletTrain(3, 1, 0), torch.Generator().manual_seed(0)
        bullet.robust_fraction.fill_(0.5)
        loss = trades_loss(model, x, torch.arange(5), None, bullet=bullet, generator=generator, frozen=frozen, beta=6.0)
        loss.backward()
        result.append([loss.detach(), *(p.grad for p in model.parameters()), *model.buffers()])
    for ours, exact in zip(*result, strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-8)


def test_compiled_it_finds_the_same_perturbation():
    model, x = trained(small_models.conv_bn()), images("conv_bn")
    expected = attack(model, x, None)
    for fold in (True, False):
        with mock.patch("torch.compile", side_effect=functools.partial(torch.compile, backend="aot_eager")) as compiled:
            result = attack(model, x, Frozen(fold=fold, compile=True))
        assert compiled.call_count == 1
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-9)


def test_what_cannot_be_compiled_runs_uncompiled_and_says_why_once():
    model, x = trained(small_models.conv_bn()), images("conv_bn")
    expected = attack(model, x, None)

    def failing(*_):
        raise RuntimeError("no compiler")

    broken = functools.partial(torch.compile, backend=failing)
    with mock.patch("torch.compile", side_effect=broken), pytest.warns(UserWarning, match="no compiler") as warned:
        result = [attack(model, x, Frozen(compile=True)) for _ in range(2)]
    assert len(warned) == 1
    for x_adv in result:
        torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "recipe", "independent"),
    [
        ("conv_bn", Frozen(), True),
        ("wrn-10-1", Frozen(), True),  # the norms that stay have their own numbers
        ("normalising", Frozen(), True),  # reads buffers, but not those of a norm
        ("instance norm", Frozen(), False),
        ("conv_bn", Frozen(fold=False), False),
    ],
)
def test_it_knows_whether_it_reads_statistics_that_a_training_forward_moves(name, recipe, independent):
    model, x = trained(MODELS[name]()), images(name)
    view = view_of(model, x, recipe)
    assert view.independent == independent
    with eval_mode(model):
        before = view(x)
    model.train()(x)
    with eval_mode(model):
        assert torch.equal(view(x), before) == independent


def test_a_wrong_recipe_is_refused():
    with pytest.raises(TypeError, match="autocast"):
        Frozen(autocast=torch.float32)
    with pytest.raises(TypeError, match="frozen"):
        trades_loss(nn.Linear(4, 2), torch.rand(3, 4), torch.zeros(3, dtype=torch.int64), None, frozen=True)
    with pytest.raises(TypeError, match="runner"):
        trades_loss(nn.Linear(4, 2), torch.rand(3, 4), torch.zeros(3, dtype=torch.int64), None, runner=3)


def in_tf32():
    """Returns a deep network with logits far from 0, images, and a device that computes float32 in TF32."""
    torch.manual_seed(0)
    model = build_model("preactresnet-18", in_channels=3, image_size=16, num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.5, 1.5)
    list(model.parameters())[-2].data *= 100.0
    x = torch.rand(8, 3, 16, 16)
    with torch.no_grad():
        model.train()(x)
    return model, x, EmulatedTf32()


def test_where_float32_is_tf32_a_sound_fold_is_distinguished_from_its_rounding():
    model, x, device = in_tf32()
    with device, attack_model(model, Frozen(), x) as view, torch.no_grad():
        assert (view.reason, view.independent) == (None, True)
        gap = (view(x) - model(x)).abs().max()
    assert gap > folded.AGREEMENT[torch.float32] * model(x).abs().max()
    with (
        mock.patch.object(folded, "full_precision", nullcontext),
        device,
        pytest.warns(UserWarning, match="not folded"),
    ):
        FoldedModel(model.eval(), Frozen(), x)


def test_where_float32_is_tf32_a_wrong_fold_is_refused():
    model, x, device = in_tf32()
    right = folding.affine_of
    wrong = mock.patch.object(folding, "affine_of", lambda *norm: (1.01 * right(*norm)[0], right(*norm)[1]))
    with wrong, device, pytest.warns(UserWarning, match="other logits than the model itself"):
        FoldedModel(model.eval(), Frozen(), x)


@pytest.mark.filterwarnings("ignore:.*not folded")  # since torch 2.9, where settings cannot be compared
def test_a_model_that_reads_the_old_setting_of_tf32_is_not_broken_by_the_comparison():
    model, x, device = in_tf32()
    reading = nn.Sequential(model, nn.Identity())
    reading[1].forward = lambda logits: logits * (1.0 + torch.backends.cudnn.allow_tf32)
    with device, attack_model(reading, Frozen(), x) as view:
        assert view(x).isfinite().all()
