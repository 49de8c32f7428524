"""What people's networks ask and do in their forwards is traced and folded, or runs as it is inside the view."""

import builtins
import copy
import random
import warnings
from unittest import mock

import pytest
import small_models
import torch
import torch.nn.functional as F
from model_zoo import (
    BLOCKS,
    PUBLISHED,
    ByCount,
    FrozenNormAct,
    HandMadeNorm,
    LayerScale,
    NormAct,
    Windows,
    features,
    head,
)
from small_models import CLASSES, batch, conv_bn
from torch import nn
from torch.optim.swa_utils import AveragedModel

from bt_fast import PGD, Frozen, TRADESLoss, perturb, trades_loss
from bt_fast.attack.folded import attack_model, known_view
from bt_fast.attack.runners import input_gradient
from bt_fast.attack.tracing import as_written
from bt_fast.attack.wrapped import SPREAD, unwrapped


def trained(model):
    """The model in double precision, with weights and statistics as after some training."""
    model = model.double()
    for name, buffer in model.named_buffers():
        if name.endswith("mean"):
            buffer.normal_(0.0, 0.3)
        if name.endswith("var"):
            buffer.uniform_(0.3, 2.0)
    for p in model.parameters():
        with torch.no_grad():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def built(name):
    torch.manual_seed(0)
    return trained(PUBLISHED[name][0]())


def images(n=5, side=6):
    return torch.rand(n, 1, side, side, dtype=torch.float64)


def check(model, view, x):
    target = torch.rand(len(x), CLASSES, dtype=torch.float64).softmax(dim=1)
    torch.testing.assert_close(view(x), model(x), rtol=0, atol=1e-9)
    result, expected = (input_gradient(m, x, target) for m in (view, model))
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-12)


@pytest.fixture(autouse=True)
def _no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.mark.parametrize("name", PUBLISHED)
def test_logits_and_gradients_are_the_models_for_any_number_of_images(name):
    _, folded, kept, as_it_is = PUBLISHED[name]
    model = built(name)
    with attack_model(model, Frozen(), images()) as view:
        assert view.reason is None
        assert view.norms == (folded, kept)
        assert list(view.kept) == ([as_it_is] if as_it_is else [])
        for n in (5, 2, 3, 1, 8):
            check(model, view, images(n))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_view_follows_training_without_being_traced_again(name):
    model, (x, y) = built(name), batch(6)
    with attack_model(model, Frozen(), x) as view:
        first = view
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(2):
        logits = model.train()(x)
        F.cross_entropy(logits[0] if isinstance(logits, tuple) else logits, y).backward()
        optimizer.step()
        model.eval()
        with attack_model(model, Frozen(), x) as view:
            assert view is first
            check(model, view, x)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_model_is_as_it_was(name):
    model = built(name)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    spaces = [type(module).forward.__globals__ for module in model.modules()]
    with attack_model(model, Frozen(), images()):
        pass
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert all(space.get("len", builtins.len) is builtins.len for space in spaces)


@pytest.mark.parametrize("name", ["asks for its shape", "relative positions", "norm with an activation"])
def test_images_of_another_shape_have_a_view_of_their_own_where_the_shape_decides(name):
    model = nn.Sequential(
        *built("asks for its shape")[:4], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)
    )
    model = model.double().eval()
    views = []
    for side in (6, 8, 7, 7):
        with attack_model(model, Frozen(), images(side=side)) as view:
            check(model, view, images(3, side))
            views.append(view)
    assert len({id(view) for view in views}) == 3


def test_only_a_question_makes_a_view_one_of_a_shape():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    model = trained(model)
    with (
        attack_model(model, Frozen(), images(side=6)) as first,
        attack_model(model, Frozen(), images(side=9)) as second,
    ):
        assert first is second
        check(model, second, images(side=9))


# Wrappers


class Front(nn.Sequential):
    def __init__(self, model):
        super().__init__(nn.Identity(), model)


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "a module around it": lambda model: Front(nn.DataParallel(model)),
    "it around a compiled model": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    "an average of it": lambda model: AveragedModel(nn.DataParallel(model)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_data_parallel_on_one_device_is_folded(wrapper):
    model = trained(conv_bn())
    wrapped = WRAPPERS[wrapper](copy.deepcopy(model)).eval()
    with attack_model(wrapped, Frozen(), images()) as view:
        assert view.reason is None
        assert view.norms == (2, 0)
        check(model, view, images())


class WithoutLength(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = conv_bn()

    def forward(self, x):
        return self.body(x)


def test_a_loss_on_data_parallel_is_that_on_the_model():
    x, y = batch(8)
    result = []
    for wrap in (nn.DataParallel, WRAPPERS["it around a compiled model"], lambda model: model):
        model = small_models.build(WithoutLength)
        loss = trades_loss(wrap(model), x, y, None, engine="fast", generator=torch.Generator().manual_seed(0))
        loss.backward()
        result.append([loss.detach(), *(p.grad for p in model.parameters()), *model.buffers()])
    for of_wrapped, of_compiled, expected in zip(*result, strict=True):
        torch.testing.assert_close(of_wrapped, expected, rtol=0, atol=0)
        torch.testing.assert_close(of_compiled, expected)


def test_the_update_goes_through_data_parallel():
    model, (x, y) = nn.DataParallel(small_models.build()), batch(8)
    with mock.patch.object(nn.DataParallel, "forward", autospec=True, side_effect=nn.DataParallel.forward) as through:
        trades_loss(model, x, y, None, engine="fast")
    assert through.call_count == 1


class TwoDevices(nn.DataParallel):
    """Copies its module to two devices, as far as can be seen without them."""

    def __init__(self, module):
        super().__init__(module)
        self.device_ids, self.calls = [0, 1], 0

    def forward(self, x):
        self.calls += 1
        return self.module(x)


def test_on_several_devices_the_attack_goes_through_the_wrapper_and_says_so():
    model, (x, y) = TwoDevices(small_models.build()), batch(8)
    assert unwrapped(model) is model
    loss = TRADESLoss(PGD(0.1, 0.05, 3), engine="fast")
    with pytest.warns(UserWarning, match="DataParallel copies the model to all of its devices"):
        loss(model, x, y).backward()
    assert model.calls >= 3 + 2
    assert f"folded view: no, {SPREAD}" in loss.explain()
    plain = TRADESLoss(PGD(0.1, 0.05, 3))(small_models.build(), x, y)
    assert plain.isfinite()


def test_inside_another_module_such_a_wrapper_is_left_as_it_is():
    model = nn.Sequential(trained(conv_bn())[:3], TwoDevices(nn.Identity()), trained(conv_bn())[3:]).double().eval()
    with attack_model(model, Frozen(), images()) as view:
        assert view.reason is None
        before = model[1].calls
        check(model, view, images())
        assert model[1].calls == before + 4


def test_a_subclass_of_data_parallel_with_a_forward_of_its_own_is_no_wrapper():
    class Scaling(nn.DataParallel):
        def forward(self, x):
            return 2 * super().forward(x)

    model = Scaling(trained(conv_bn())).eval()
    assert unwrapped(model) is model
    assert as_written(model) is model
    with attack_model(model, Frozen(), images()) as view:
        check(model, view, images())


# What is asked


def answered(ask, x=None):
    """A network that asks for something of its features in its forward, and the view of it."""

    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.last = features(nn.BatchNorm2d(4), nn.ReLU()), nn.Linear(144, CLASSES)

        def forward(self, x):
            x = self.body(x)
            return self.last(ask(x).flatten(1))

    model = trained(Asking())
    return model, attack_model(model, Frozen(), images() if x is None else x)


ASKED = {
    "is_cuda": lambda x: x.cpu() if x.is_cuda else x + 1,
    "device and dtype": lambda x: x + torch.arange(6, device=x.device, dtype=x.dtype),
    "a dictionary by dtype": lambda x: {torch.float64: x, torch.float32: -x}[x.dtype],
    "ndim": lambda x: x if x.ndim == 4 else x[None],
    "dim": lambda x: x if x.dim() == 4 else x[None],
    "size as a number": lambda x: x * int(x.size(1) ** 0.5),
    "range of a size": lambda x: torch.stack([x[:, k] * k for k in range(x.shape[1])], dim=1),
    "sizes of an assertion": lambda x: x if min(x.shape[1:]) > 3 else 1 / 0,
    "a constant of sizes": lambda x: x + torch.zeros((x.shape[1], 1, 1)).fill_(0.5).to(x),
    "two shapes": lambda x: x + x.relu() if x.shape == x.relu().shape else x,
    "rest of the shape": lambda x: x.reshape(x.shape[0], *x.shape[1:]),
    "iteration over parts": lambda x: (
        sum(part * k for k, part in enumerate(x.unbind(1))).expand(4, -1, 6, 6).transpose(0, 1)
    ),
    "numel of an image": lambda x: x / (x[0].numel() / 100 if x[0].numel() > 10 else 1),
    "rounded": lambda x: F.interpolate(x, size=(round(x.size(2) * 1.01), x.size(3))),
    "floating point": lambda x: x if x.is_floating_point() else x.double(),
    "new tensors": lambda x: x + x.new_zeros(x.shape[0], 1, 1, 1) + torch.ones_like(x),
}


@pytest.mark.parametrize("name", ASKED)
def test_a_forward_may_ask(name):
    model, opened = answered(ASKED[name])
    with opened as view:
        assert view.reason is None
        assert view.norms == (1, 0)
        for n in (5, 1, 2):
            check(model, view, images(n))


REFUSED = {
    "a pixel": lambda x: x if x.max() > 0 else -x,
    "the number of images": lambda x: x if x.shape[0] > 1 else -x,
    "what is computed of their number": lambda x: x if x.size(0) // 64 == 0 else -x,
    "the number of numbers": lambda x: x if x.numel() > 10 else -x,
    "how many pixels fulfil something": lambda x: x if x[x > 1e9].shape[0] == 0 else -x,
    "an item": lambda x: x if x.max().item() > 0 else -x,
    "a whole shape": lambda x: x if x.shape == torch.Size([5, 4, 6, 6]) else -x,
    "a gradient": lambda x: x if x.requires_grad else 1.0 * x,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_images_or_their_number_decide_is_not_fixed(name):
    model, opened = answered(REFUSED[name])
    with pytest.warns(UserWarning, match="cannot be traced"):
        view = opened.__enter__()
    assert view.reason.startswith("it cannot be traced: line")
    for n in (1, 5):
        check(model, view, images(n))
    inner = trained(nn.Sequential(nn.Identity(), answered(REFUSED[name])[0]))  # inside another module
    with attack_model(inner, Frozen(), images()) as view:
        assert view.reason is None
        assert list(view.kept) == ["1"]
        for n in (1, 5):
            check(inner, view, images(n))


def test_under_autocast_a_dtype_is_that_of_the_call():
    class ByDtype(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.last = nn.Linear(36, 8), nn.Linear(8, CLASSES)

        def forward(self, x):
            x = self.body(x.flatten(1))
            return self.last(x if x.dtype == torch.bfloat16 else -x)

    model, x = ByDtype().eval(), images().float()
    for autocast in (False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), attack_model(model, Frozen(), x) as view:
            assert view.reason is None
            torch.testing.assert_close(view(x), model(x), rtol=0.02, atol=0.02)
    with attack_model(model, Frozen(autocast=torch.bfloat16), x) as view, torch.autocast("cpu", torch.bfloat16):
        assert (view(x) - model(x)).abs().max() < 0.02


# What is computed of weights alone


def test_weights_that_are_computed_in_the_forward_are_computed_once_for_an_attack():
    model = built("standardised weights")
    with (
        attack_model(model, Frozen(), images()) as view,
        mock.patch("torch.batch_norm", wraps=torch.batch_norm) as norm,
    ):
        view(images())
        assert norm.call_count == 0


def test_a_cast_of_a_weight_without_gradient_is_not_kept_for_the_update():
    class LowRank(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(36, 2)), nn.Parameter(torch.randn(2, CLASSES))

        def forward(self, x):
            return x.flatten(1) @ (self.a @ self.b)

    model, x = LowRank(), images().float()
    with torch.autocast("cpu", torch.bfloat16):
        with attack_model(model, Frozen(), x) as view:
            view(x)
        model(x).float().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_what_the_forward_changes_of_its_own_is_not_taken_out_of_it():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = conv_bn()
            self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

        def forward(self, x):
            return self.body(x) + 0 * self.calls.add_(1)

    model = Counting().double().eval()
    with attack_model(model, Frozen(), images()) as view:
        before = model.calls.item()
        view(images())
        assert model.calls.item() == before + 1


def test_random_numbers_are_drawn_in_each_call():
    class Noise(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.scale = conv_bn(), nn.Parameter(torch.ones(CLASSES))

        def forward(self, x):
            return self.body(x) + 1e-12 * torch.randn_like(self.scale)

    model = trained(Noise())
    with attack_model(model, Frozen(), images()) as view, torch.no_grad():
        assert view.reason is None
        x = images(1)
        assert not torch.equal(view(x), view(x))


# What is told


def test_explain_says_what_is_folded_and_what_is_left():
    x, y = batch(8)
    loss = TRADESLoss(PGD(0.1, 0.05, 2), engine="fast")
    for name, expected in {
        "pre-activation": "folded view: yes, 1 of 2 batch norms\n",
        "group norm": "folded view: yes, without a batch norm\n",
        "decides by pixels": "folded view: yes, 1 of 2 batch norms; 2.part runs as it is, not traced: line",
    }.items():
        model = small_models.build(PUBLISHED[name][0])
        loss(model, x, y)
        assert expected in loss.explain() + "\n"


def test_of_several_modules_that_are_left_the_first_is_named():
    model = trained(features(ByCount(), ByCount(), ByCount(), *head()))
    x, y = batch(4)
    perturb(model, x, y, PGD(0.1, 0.05, 1), engine="fast")
    loss = TRADESLoss(PGD(0.1, 0.05, 1), engine="fast")
    loss(model, x, y)
    assert "1 runs as it is, not traced: line" in loss.explain()
    assert "so do 2 more modules" in loss.explain()


def test_a_hook_inside_is_refused_before_anything_is_traced():
    model = built("asks for its shape")
    model[2].mix.register_forward_hook(lambda module, given, out: out)
    with pytest.warns(UserWarning, match="2.mix has a hook"), attack_model(model, Frozen(), images()) as view:
        check(model, view, images())


def test_a_part_that_is_left_reads_the_statistics_of_its_norms():
    for name, independent in {"decides by pixels": False, "norm with an activation": True, "own norm": True}.items():
        model = built(name)
        with attack_model(model, Frozen(), images()) as view:
            assert view.independent == independent


# Nets of such parts


PARTS = {
    **{name: BLOCKS[name] for name in ("batch norm", "convolution", "spectral norm", "weight norm", "relu", "frozen")},
    "norm with an activation": lambda: NormAct(4, nn.ReLU),
    "frozen norm": lambda: FrozenNormAct(4),
    "own norm": HandMadeNorm,
    "windows": lambda: Windows(side=3),
    "layer scale": LayerScale,
    "group norm": lambda: nn.GroupNorm(2, 4),
    "in place": lambda: nn.ReLU(inplace=True),
    "dropout": lambda: nn.Dropout2d(0.5),
    "by number": ByCount,
    "circular": lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
    "grouped": lambda: nn.Conv2d(4, 4, 3, padding="same", groups=2, bias=False),
    "1x1": lambda: nn.Conv2d(4, 4, 1),
}


class Random(nn.Module):
    """Parts in a row, some of them twice, some beside a skip connection, some behind arithmetic."""

    def __init__(self, draw):
        super().__init__()
        names = [draw.choice(list(PARTS)) for _ in range(draw.randint(2, 7))]
        made = nn.ModuleDict({name.replace(" ", "_"): PARTS[name]() for name in names})
        self.first, self.parts, self.last = nn.Conv2d(1, 4, 3, padding=1), made, nn.Linear(144, CLASSES)
        self.order = [(name.replace(" ", "_"), draw.choice(("row", "row", "row", "skip", "scaled"))) for name in names]
        self.gain = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x):
        x = self.first(x)
        for name, how in self.order:
            if how == "row":
                x = self.parts[name](x)
            elif how == "skip":
                x = x + self.parts[name](x.clone())
            else:
                x = self.parts[name](x) * self.gain - 0.1
        return self.last(torch.tanh(x).flatten(1))


@pytest.mark.parametrize("seed", range(40))
def test_random_networks(seed):
    torch.manual_seed(seed)
    model = trained(Random(random.Random(seed)))
    with attack_model(model, Frozen(channels_last=seed % 2 == 0), images(4)) as view:
        assert view.reason is None
        assert set(view.kept) <= {"parts.by_number"}
        check(model, view, images(4))
        check(model, view, images(1))
    model.train()(images(4))
    with attack_model(model.eval(), Frozen(channels_last=seed % 2 == 0), images(4)) as again:
        assert again is view
        check(model, view, images(3))
    assert known_view(model, Frozen(channels_last=seed % 2 == 0)) is view
