"""What the caller's backward recomputes, it computes in the modes of the update."""

import pytest
import torch
from model_zoo import TrainNoise, checkpointed
from objective_cases import EACH
from small_models import assert_unchanged, batch, build, gradients, snapshot
from tolerances import assert_near_nested
from torch import nn

from bt_fast import BulletTrain, Normalization, ThreatModel, augmix_loss, trades_loss
from bt_fast.baselines.fast import fast_loss
from bt_fast.baselines.grad_align import grad_align
from bt_fast.baselines.yopo import yopo_loss
from bt_fast.evaluation import evaluate
from bt_fast.objectives.recomputed import Recomputing


def noisy():
    return checkpointed(nn.GroupNorm(2, 4), TrainNoise(), nn.Tanh())


def normed():
    return checkpointed(nn.BatchNorm2d(4), nn.Tanh())


YOPO = {"epsilon": 0.03, "propagations": 2, "layer_steps": 2}
LOSSES = {
    "trades, bullet": lambda m, x, y: trades_loss(m, x, y, None, bullet=BulletTrain(3, 1, 0)),
    "trades, normalised": lambda m, x, y: trades_loss(m, x, y, None, normalization=Normalization((0.0,), (1.0,))),
    "augmix": lambda m, x, y: augmix_loss(m, x, y),
    "augmix, bullet": lambda m, x, y: augmix_loss(m, x, y, bullet=BulletTrain(1, 0, 0)),
    "fast": lambda m, x, y: fast_loss(trades_loss, m, x, y, None, epsilon=0.03),
    "grad_align": lambda m, x, y: grad_align(m, x, y, epsilon=0.03),
    "yopo, trades": lambda m, x, y: yopo_loss(m, x, y, None, objective="trades", **YOPO),
    "yopo, mart": lambda m, x, y: yopo_loss(m, x, y, None, objective="mart", **YOPO),
    "yopo": lambda m, x, y: yopo_loss(m, x, y, None, **YOPO),
}


@pytest.mark.parametrize("model", [noisy, normed])
@pytest.mark.parametrize("name", LOSSES)
def test_a_model_found_in_eval_mode_has_the_gradient_of_one_found_in_train_mode(name, model):
    result = []
    x, y = batch()
    for training in (True, False):
        m = build(model).train(training)
        torch.manual_seed(0)
        loss = LOSSES[name](m, x, y)
        assert all(module.training == training for module in m.modules())
        loss.backward()
        assert all(module.training == training for module in m.modules())
        result.append({"loss": loss.detach()} | gradients(m) | dict(m.named_buffers()))
    assert_near_nested(*result)


def test_a_norm_in_a_checkpoint_sees_as_many_batches_as_in_the_authors_code():
    """Each of the three forwards runs again in the backward."""
    model, (x, y) = build(normed), batch()
    before = int(model[1][0].num_batches_tracked)
    trades_loss(model, x, y, None).backward()
    assert model[1][0].num_batches_tracked - before == 6


class Breaks(nn.Module):
    """Raises in its backward."""

    def forward(self, x):
        if self.training and x.requires_grad:
            x.register_hook(self.fail)
        return x

    @staticmethod
    def fail(gradient):
        raise RuntimeError("broken in the backward")


def test_a_backward_that_raises_leaves_the_modes_as_it_found_them():
    model, (x, y) = build(lambda: nn.Sequential(*checkpointed(nn.BatchNorm2d(4), nn.Tanh()), Breaks())).eval(), batch()
    loss = trades_loss(model, x, y, None)
    with pytest.raises(RuntimeError, match="broken in the backward"):
        loss.backward()
    assert not any(module.training for module in model.modules())


def test_two_losses_in_one_backward_and_a_second_backward():
    model, (x, y) = build(noisy), batch()
    expected = []
    for result in (True, False):
        model.train(result)
        torch.manual_seed(0)
        total = sum(trades_loss(model, x, y, None, perturb_steps=n) for n in (1, 2))
        model.zero_grad()
        total.backward(retain_graph=True)
        total.backward()
        assert all(module.training == result for module in model.modules())
        expected.append(gradients(model))
    assert_near_nested(*expected)


def test_modes_that_the_caller_changes_before_the_backward_are_kept():
    model, (x, y) = build(noisy).eval(), batch()
    loss = trades_loss(model, x, y, None)
    model[1].train()
    before = snapshot(model)
    torch.autograd.grad(loss, list(model.parameters()))
    assert_unchanged(before, model)


def test_a_checkpoint_is_seen_and_nothing_else():
    for factory, seen in ((noisy, True), ("conv_bn", False)):
        model, (x, _) = build(factory), batch()
        with Recomputing() as watched:
            model(x)
        assert watched.seen == seen
        with Recomputing() as watched, torch.no_grad():
            model(x)
        assert not watched.seen


def reentrant():
    model = checkpointed(nn.BatchNorm2d(4), nn.Tanh())
    model[1].reentrant = True
    return model


REFUSED = r"model must not recompute activations by a reentrant checkpoint.*use_reentrant=False"


@EACH
@pytest.mark.parametrize("bullet", [False, True])
def test_a_reentrant_checkpoint_is_refused_by_name_and_nothing_has_changed(objective, bullet):
    model, (x, y) = build(reentrant), batch()
    y = model.eval()(x).argmax(dim=1)
    mining = BulletTrain(3, 1, 0) if bullet else None
    before = snapshot(model, *([mining] if bullet else []))
    with pytest.raises(ValueError, match=REFUSED):
        objective.loss(model, x, y, None, bullet=mining)
    assert_unchanged(before, model, *([mining] if bullet else []))


@pytest.mark.parametrize(
    "run",
    [
        *(LOSSES[name] for name in ("fast", "grad_align", "yopo", "yopo, mart")),
        lambda m, x, y: evaluate(m, [(x, m.eval()(x).argmax(dim=1))], ThreatModel(0.1), steps=2),
    ],
)
def test_a_reentrant_checkpoint_is_refused_elsewhere_too(run):
    model, (x, y) = build(reentrant), batch()
    with pytest.raises(ValueError, match=REFUSED):
        run(model, x, y)
