"""Models that call `.view` on activations run with every engine: their own forwards on contiguous images."""

import copy
import warnings
from unittest import mock

import pytest
import torch
from torch import nn

from bt_fast import (
    PGD,
    AugMixLoss,
    BulletTrain,
    Engine,
    Frozen,
    Normalization,
    PGDLoss,
    ThreatModel,
    TRADESLoss,
    evaluate,
    perturb,
)
from bt_fast.attack.folded import attack_model
from bt_fast.attack.memory_format import CONTIGUOUS, takes_channels_last


class Viewing(nn.Module):
    """Flattens more than one pixel by `.view`; decides by pixels somewhere, if so."""

    def __init__(self, by_pixels=False, flatten="view"):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), Last(by_pixels, flatten)

    def forward(self, x):
        return self.last(self.norm(self.conv(x)).relu())


class Last(nn.Module):
    def __init__(self, by_pixels, flatten):
        super().__init__()
        self.linear, self.by_pixels, self.flatten = nn.Linear(144, 5), by_pixels, flatten

    def forward(self, x):
        x = x.view(x.size(0), -1) if self.flatten == "view" else x.flatten(1)
        return self.linear(-x if self.by_pixels and x.sum() < -1e9 else x)


def model_of(**options):
    torch.manual_seed(0)
    return Viewing(**options).double()


def batch(m=6):
    torch.manual_seed(1)
    return torch.rand(m, 3, 6, 6, dtype=torch.float64), torch.arange(m) % 5


@pytest.fixture(autouse=True)
def _no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


CHANNELS_LAST = {"fast": "fast", "alone": Engine(channels_last=True)}
LOSSES = {
    "trades": lambda engine: TRADESLoss(PGD(0.1, 0.05, 2), engine=engine),
    "trades, mining": lambda engine: TRADESLoss(PGD(0.1, 0.05, 2), mining=BulletTrain(2, 1, 0), engine=engine),
    "pgd": lambda engine: PGDLoss(PGD(0.1, 0.05, 2), engine=engine),
    "augmix": lambda engine: AugMixLoss(engine=engine),
    "augmix, mining": lambda engine: AugMixLoss(BulletTrain(1, 0, 0), engine=engine),
    "normalised": lambda engine: PGDLoss(
        PGD(0.1, 0.05, 2, normalization=Normalization((0.0,) * 3, (1.0,) * 3)), engine=engine
    ),
}


@pytest.mark.parametrize("engine", CHANNELS_LAST)
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_gives_what_the_exact_one_gives(name, engine):
    x, y = batch()
    if "augmix" in name:
        x = (255 * x).byte().double() / 255
    result = []
    for how in ("exact", CHANNELS_LAST[engine]):
        model, criterion = model_of(), LOSSES[name](how)
        if getattr(criterion, "mining", None) is not None:
            criterion.mining.robust_fraction.fill_(0.5)
        for _ in range(2):
            loss = criterion(model, x, y, generator=torch.Generator().manual_seed(0))
        loss.backward()
        result.append([loss.detach(), *(p.grad for p in model.parameters()), *model.buffers()])
    for ours, exact in zip(*result, strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-9)


@pytest.mark.parametrize("engine", CHANNELS_LAST)
def test_so_do_an_attack_and_an_evaluation(engine):
    x, y = batch()
    attack = PGD(0.1, 0.05, 2)
    made = [
        perturb(model_of(), x, y, attack, engine=how, generator=torch.Generator().manual_seed(0))
        for how in ("exact", CHANNELS_LAST[engine])
    ]
    torch.testing.assert_close(*made, rtol=0, atol=1e-9)
    for how in ("exact", CHANNELS_LAST[engine]):
        found = evaluate(model_of(), [(x, y)], attack, engine=how, generator=torch.Generator().manual_seed(0))
        made.append(found.step)
    assert torch.equal(*made[-2:])


def test_the_view_has_its_channels_last_all_the_same():
    model, (x, _) = model_of(), batch()
    with attack_model(model, Frozen(), x) as view:
        assert view.reason is None
        assert view.channels_last
        assert not takes_channels_last(model)
        torch.testing.assert_close(view(x), model(x), rtol=0, atol=1e-9)


def test_but_not_where_a_part_of_it_runs_as_it_is():
    model, (x, _) = model_of(by_pixels=True), batch()
    with attack_model(model, Frozen(), x) as view:
        assert view.reason is None
        assert list(view.kept) == ["last"]
        assert not view.channels_last
        torch.testing.assert_close(view(x), model(x), rtol=0, atol=1e-9)
        torch.testing.assert_close(view(x.contiguous(memory_format=torch.channels_last)), model(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "engine", "expected"),
    [
        ({}, "fast", f"channels last: attack yes, update no; {CONTIGUOUS}"),
        ({}, Engine(channels_last=True), f"channels last: attack no, update no; {CONTIGUOUS}"),
        ({"flatten": "flatten"}, "fast", "channels last: attack yes, update yes\n"),
        ({}, "exact", "channels last: attack no, update no\n"),
    ],
)
def test_explain_says_so(options, engine, expected):
    loss = TRADESLoss(PGD(0.1, 0.05, 1), engine=engine)
    model = model_of(**options)
    loss(model, *batch())
    assert expected in loss.explain()


def test_it_costs_no_forward_where_a_view_is_compared_anyway():
    x, y = batch()
    for options in ({}, {"flatten": "flatten"}):
        model, criterion = model_of(**options), TRADESLoss(PGD(0.1, 0.05, 1), engine="fast")
        calls = []
        for _ in range(2):
            with mock.patch.object(Viewing, "forward", autospec=True, side_effect=Viewing.forward) as forward:
                criterion(model, x, y)
            calls.append(forward.call_count)
        assert calls[1] == 2  # the update's


def test_another_error_reaches_the_caller():
    class Failing(nn.Module):
        def forward(self, x):
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        takes_channels_last(Failing(), batch()[0])


def test_what_is_known_is_the_models_not_its_copys():
    model, (x, _) = model_of(), batch()
    assert takes_channels_last(model)
    assert not takes_channels_last(model, x)
    assert not takes_channels_last(model)
    assert takes_channels_last(copy.deepcopy(model))
    assert model.training
    assert evaluate(model, [(x, batch()[1])], ThreatModel(0.1), steps=1, engine="fast").total == len(x)
