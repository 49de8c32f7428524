"""Where samples are dropped from batches, a model is reported if an image's logits depend on the rest of its batch."""

import re
import warnings

import pytest
import torch
from model_zoo import ACROSS, APART
from small_models import assert_unchanged, batch, build, snapshot
from torch import nn

from bt_fast import BulletTrain, Frozen, ThreatModel, mart_loss, trades_loss
from bt_fast.attack.neighbours import warn_of_neighbours
from bt_fast.evaluation import evaluate

TOLD = "the model's logits of an image depend on the other images of its batch"
THREAT = ThreatModel(0.1)


def told(run):
    """Runs `run` and returns the warnings about neighbours."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [w for w in caught if re.match(TOLD, str(w.message))]


def evaluated(model):
    x, y = batch()
    return lambda: evaluate(model, [(x[:6], y[:6]), (x[6:], y[6:])], THREAT, steps=2)


def trained(model, loss=trades_loss):
    x, y = batch()
    return lambda: loss(model, x, y, None, bullet=BulletTrain(3, 1, 0))


@pytest.mark.parametrize("name", ACROSS)
def test_it_is_reported_once_for_a_model(name):
    if name != "untracked norm, 1d":  # this norm refuses a single row, which a shrinking batch may leave
        model = build(ACROSS[name])
        assert len(told(trained(model))) == 1
        assert not told(evaluated(model))
        assert len(told(evaluated(build(ACROSS[name])))) == 1
    model, (x, _) = build(ACROSS[name]).eval(), batch(1)
    assert len(told(lambda: warn_of_neighbours(model, x, THREAT, "leave bullet out"))) == 1
    assert not told(lambda: warn_of_neighbours(model, x, THREAT, "leave bullet out"))


@pytest.mark.parametrize("name", APART)
def test_of_a_model_whose_samples_are_apart_nothing_is_reported(name):
    assert not told(trained(build(APART[name]), mart_loss))
    assert not told(evaluated(build(APART[name])))


@pytest.mark.parametrize("name", ["untracked norm", "centred"])
def test_without_bullettrain_nobody_is_dropped(name):
    x, y = batch()
    assert not told(lambda: trades_loss(build(ACROSS[name]), x, y, None))


class Smoothed(nn.Module):
    """Draws random numbers in eval mode too, and counts its forwards."""

    def __init__(self):
        super().__init__()
        self.body = build("conv_bn")
        self.register_buffer("forwards", torch.zeros(()))

    def forward(self, x):
        self.forwards += 1
        return self.body(x + 0.3 * torch.randn_like(x))


def test_random_numbers_are_no_neighbours_and_the_look_leaves_no_trace():
    model, (x, _) = Smoothed().eval(), batch()
    before, rng = snapshot(model), torch.get_rng_state()
    assert not told(lambda: warn_of_neighbours(model, x, THREAT, "leave bullet out"))
    assert_unchanged(before, model)
    assert torch.equal(torch.get_rng_state(), rng)


def test_a_look_that_fails_leaves_no_trace_and_is_repeated():
    model, (x, _) = Smoothed().eval(), batch()
    before, rng = snapshot(model), torch.get_rng_state()
    for _ in range(2):
        handle = model.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            warn_of_neighbours(model, x, THREAT, "leave bullet out")
        handle.remove()
        assert_unchanged(before, model)
        assert torch.equal(torch.get_rng_state(), rng)


def test_images_without_a_number_are_for_others_to_tell():
    model, (x, _) = build("conv_bn").eval(), batch()
    assert not told(lambda: warn_of_neighbours(model, torch.full_like(x, torch.nan), THREAT, "leave bullet out"))


def test_the_warning_points_at_the_callers_line():
    for run in (trained, evaluated):
        (result,) = told(run(build(ACROSS["centred"])))
        assert result.filename == __file__


def test_a_warning_from_behind_a_context_manager_points_at_the_callers_line_too():
    model, (x, y) = build("conv_bn"), batch()
    model[0].register_forward_hook(lambda module, given, out: out)
    with pytest.warns(UserWarning, match="not folded") as warned:
        trades_loss(model, x, y, None, perturb_steps=1, frozen=Frozen())
    assert [w.filename for w in warned] == [__file__]
