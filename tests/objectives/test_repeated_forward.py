import copy

import pytest
import torch
from small_models import MODELS, batch, build
from tolerances import assert_near, assert_near_nested

from bt_fast.objectives.repeated_forward import RepeatedForward, moves_batch_norm_alone, watched_forward

REPLAYABLE = {
    "conv_bn",
    "cumulative average",
    "tied norm",
    "tied norm, cumulative average",
    "normalising",
    "frozen norm",
}


def repeated(model, first, between):
    """Runs a watched forward and one of other images; returns the first logits and the watcher."""
    repeat = RepeatedForward(model, first.device)
    with repeat.first():
        logits = model(first).detach()
    model(between)
    return logits, repeat


@pytest.mark.parametrize("name", MODELS)
def test_a_replay_is_offered_only_where_it_leaves_the_model_as_a_forward_does(name):
    model, first, between = build(name), batch(seed=0)[0], batch(seed=1)[0]
    twin = copy.deepcopy(model)
    logits, repeat = repeated(model, first, between)
    assert repeat.replayable >= (name in REPLAYABLE)
    if repeat.replayable:
        repeat.replay()
        twin(first), twin(between)
        assert_near(logits, twin(first).detach())
        assert_near_nested(model.state_dict(), twin.state_dict())


def test_dropout_that_is_off_can_be_replayed():
    model, x = build("dropout"), batch()[0]
    model[3].eval()
    assert repeated(model, x, x)[1].replayable


@pytest.mark.parametrize("name", sorted(REPLAYABLE))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seen", [0, 100_000])
def test_a_replay_moves_the_buffers_as_a_forward_does_late_in_training_too(name, dtype, seen):
    model = build(name, dtype=dtype)
    for buffer in model.buffers():
        if not buffer.is_floating_point():
            buffer.fill_(seen)
    first, between = (batch(seed=k, dtype=dtype)[0] for k in (0, 1))
    twin = copy.deepcopy(model)
    repeated(model, first, between)[1].replay()
    for x in (first, between, first):
        twin(x)
    assert_near_nested(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("momentum", [0.0, 1.0, None])
def test_momentum_at_its_ends(momentum):
    model = build("tied norm")
    model.norm.momentum = momentum
    twin = copy.deepcopy(model)
    first, between = (batch(seed=k)[0] for k in (0, 1))
    repeated(model, first, between)[1].replay()
    for x in (first, between, first):
        twin(x)
    assert_near_nested(model.state_dict(), twin.state_dict())


def test_a_backward_through_all_forwards_still_works():
    model, (x, _) = build("conv_bn"), batch()
    repeat = RepeatedForward(model, x.device)
    with repeat.first():
        loss = model(x).sum()
    loss = loss + model(1 - x).square().sum()
    repeat.replay()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_norm_that_no_forward_uses_stays_as_it_is(momentum):
    model, x = build("conv_bn"), batch()[0]
    model.idle = torch.nn.BatchNorm2d(4, momentum=momentum).double()
    forward = torch.nn.Sequential(*list(model)[:-1])  # the same layers without the last
    model.forward = forward.forward
    before = copy.deepcopy(model.idle.state_dict())
    repeat = repeated(model, x, x)[1]
    repeat.replay()
    assert_near_nested(model.idle.state_dict(), before)


def test_where_the_answer_is_known_nothing_is_looked_at_and_the_buffers_move_alike():
    first, between = (batch(seed=k)[0] for k in (0, 1))
    states = []
    for known in (None, True):
        model = build("conv_bn")
        repeat = RepeatedForward(model, first.device, known)
        with repeat.first():
            model(first)
            torch.rand(1)  # a watched forward would have drawn this number
        assert repeat.replayable == bool(known)
        model(between)
        repeat.replay()
        states.append(model.state_dict())
    assert_near_nested(*states)


@pytest.mark.parametrize(
    ("name", "alone"), [("conv_bn", True), ("normalising", True), ("counter in place", False), ("own norm", False)]
)
def test_a_watched_forward_is_the_forward_and_knows_what_it_moves_from_the_first_time_on(name, alone):
    model, (x, _) = build(name), batch()
    plain = copy.deepcopy(model)
    assert not moves_batch_norm_alone(model)
    for _ in range(2):
        assert torch.equal(watched_forward(model, x), plain(x))
        assert moves_batch_norm_alone(model) == alone
    assert_near_nested(model.state_dict(), plain.state_dict())
