"""The guard undoes a faulty minibatch, reports it with its indices, and makes the host wait for nothing."""

import copy
import math
from unittest import mock

import pytest
import torch
from pretended_device import DEVICE, pretended_device
from small_models import MODELS, assert_unchanged, batch, build, conv_bn, snapshot, with_bright
from small_models import Undefined as UndefinedGradient
from torch import nn

from bt_fast import BulletTrain, Guard, NonFiniteError, guard, mart_loss, pgd_loss, trades_loss

INDICES = torch.arange(100, 108)
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1),
}
NUMBERS = pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
X, Y = batch(dtype=torch.float32)


def a_training(optimizer="sgd", modules=(), **options):
    model = build(conv_bn, dtype=torch.float32)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    return model, optimizer, Guard(optimizer, model, *modules, **options)


def one_step(model, optimizer, guard, times=1.0, spoilt=()):
    """Updates by the cross-entropy times a number, then corrupts the gradients of some parameters."""
    with guard.minibatch(INDICES):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X), Y) * times
        loss.backward()
        for p in list(model.parameters())[:1] if spoilt else ():
            p.grad.view(-1)[-1] = spoilt
        guard.step(loss)


def state_of(optimizer):
    return copy.deepcopy(optimizer.state_dict())


def assert_same(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_same(value, other[key])
    else:
        assert one == other


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_sound_minibatches_are_learnt_as_without_a_guard(optimizer):
    model, guarded, guard = a_training(optimizer)
    plain = build(conv_bn, dtype=torch.float32)
    bare = OPTIMIZERS[optimizer](plain.parameters())
    for _ in range(3):
        one_step(model, guarded, guard)
        bare.zero_grad()
        nn.functional.cross_entropy(plain(X), Y).backward()
        bare.step()
    assert_same(model.state_dict(), plain.state_dict())
    assert not guard.skipped


@NUMBERS
@pytest.mark.parametrize("fault", ["loss", "gradient"])
@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_of_a_faulty_minibatch_nothing_stays_when_it_is_skipped(optimizer, at, fault, number):
    model, guarded, guard = a_training(optimizer, non_finite="skip")
    other, undisturbed, its_guard = a_training(optimizer, non_finite="skip")
    for i in range(4):
        if i == at:
            one_step(model, guarded, guard, **({"times": number} if fault == "loss" else {"spoilt": number}))
        one_step(model, guarded, guard)
        one_step(other, undisturbed, its_guard)
    guard.settle()
    assert_same(model.state_dict(), other.state_dict())
    assert_same(state_of(guarded), state_of(undisturbed))
    assert [result.minibatch for result in guard.skipped] == [at]
    assert guard.skipped[0].indices == guard.skipped[0].blamed == tuple(range(100, 108))
    assert guard.skipped[0].reason == guard_reason(fault)
    assert not its_guard.skipped


def guard_reason(fault):
    return guard.REASONS[0 if fault == "loss" else 1]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_when_it_raises_weights_buffers_and_the_optimizer_are_as_before(optimizer):
    model, guarded, guard = a_training(optimizer)
    one_step(model, guarded, guard)
    before, state = copy.deepcopy(model.state_dict()), state_of(guarded)
    with pytest.raises(NonFiniteError, match=r"minibatch 1: the loss is NaN or infinite: of the data 100, 101, .*107"):
        one_step(model, guarded, guard, times=math.nan)
    assert_same(model.state_dict(), before)
    assert_same(state_of(guarded), state)
    one_step(model, guarded, guard)
    assert not guard.skipped


def test_a_skipped_minibatch_leaves_the_mining_and_the_statistics_alone():
    bullet = BulletTrain(2, 1, 0)
    model, optimizer, guard = a_training(modules=(bullet,), non_finite="skip")
    before = snapshot(bullet), copy.deepcopy(model.state_dict())
    with guard.minibatch():
        loss = trades_loss(model, X, Y, optimizer, epsilon=0.1, bullet=bullet)
        assert bullet.group_counts.sum() == 8
        (loss * math.nan).backward()
        guard.step(loss)
    assert len(guard.skipped) == 1
    assert_unchanged(before[0], bullet)
    assert_same(model.state_dict(), before[1])


def misclassified_first(model):
    """Returns images with 1, 4 and 5 bright; the first four have wrong labels, so they come last in the schedule."""
    x, _ = with_bright([1, 4, 5])
    y = copy.deepcopy(model).eval()(x).argmax(dim=1)
    y[:4] = (y[:4] + 1) % 5
    return x, y


@pytest.mark.parametrize("loss_of", [trades_loss, mart_loss, pgd_loss])
@pytest.mark.parametrize("bullet", [None, BulletTrain(2, 1, 1)], ids=["all steps", "bullet"])
def test_an_error_of_the_objective_tells_the_samples_and_is_skipped(loss_of, bullet):
    model = build(UndefinedGradient)
    x, y = misclassified_first(model)
    bullet = copy.deepcopy(bullet)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = Guard(optimizer, model, *([bullet] if bullet else []), non_finite="skip")
    before = snapshot(model, *([bullet] if bullet else []))
    with guard.minibatch(INDICES):
        loss_of(model, x, y, optimizer, perturb_steps=2, bullet=bullet).backward()
        raise AssertionError("the objective went on")
    (result,) = guard.skipped
    assert result.samples == (1, 4, 5)
    assert result.blamed == (101, 104, 105)
    assert "held NaN for 3 of 8 samples" in result.reason
    assert result.reason.endswith(": samples 1, 4, 5")
    assert_unchanged(before, model, *([bullet] if bullet else []))


class NanLogits(nn.Module):
    """A model with NaN logits for samples that are bright at a pixel, from a given forward on."""

    def __init__(self, since):
        super().__init__()
        self.body, self.since, self.forwards = conv_bn(), since, 0

    def forward(self, x):
        self.forwards += 1
        bright = x.detach()[:, 0, 2, 2] > 0.5
        spoilt = bright[:, None] & (self.forwards >= self.since)
        return torch.where(spoilt, math.nan, self.body(x))


@pytest.mark.parametrize("since", [1, 5])  # the clean forward of the mining; the corrupted one, in the sorted order
def test_nan_logits_are_reported_with_their_samples_in_the_minibatchs_order(since):
    model = NanLogits(since).double()
    x, y = misclassified_first(model.body)
    with pytest.raises(NonFiniteError, match="samples 1, 4, 5") as raised:
        trades_loss(model, x, y, None, epsilon=1e-6, step_size=1e-6, bullet=BulletTrain(2, 2, 0))
    assert raised.value.samples == (1, 4, 5)


def test_the_views_of_augmix_are_reported_as_the_samples_that_they_are_of():
    from bt_fast import augmix_loss

    model = NanLogits(1).double()
    x, y = with_bright([1, 4])
    x[2, 0] = 0.0
    with pytest.raises(NonFiniteError) as raised:
        augmix_loss(model, x, y, generator=torch.Generator().manual_seed(0))
    assert {1, 4} <= set(raised.value.samples) <= set(range(8)) - {2}


def test_an_error_that_an_objective_tells_late_is_blamed_on_the_minibatch_before():
    _, _, guard = a_training(non_finite="skip")
    with guard.minibatch(range(8)):
        pass
    with guard.minibatch(INDICES):
        raise NonFiniteError("NaN in an earlier attack", [2], earlier=True)
    (result,) = guard.skipped
    assert (result.minibatch, result.blamed) == (1, (2,))
    assert str(result) == "minibatch 1: NaN in an earlier attack: of the data 2"


def test_other_errors_pass_through_and_change_no_count():
    _, _, guard = a_training(non_finite="skip")
    with pytest.raises(ValueError, match="labels"), guard.minibatch():
        raise ValueError("labels out of range")
    assert not guard.skipped


def test_a_hundred_minibatches_in_a_row_are_no_accident():
    model, optimizer, g = a_training(non_finite="skip")
    for _ in range(guard.MOST_IN_A_ROW - 1):
        one_step(model, optimizer, g, times=math.nan)
    with pytest.raises(NonFiniteError, match="100 minibatches in a row had to be skipped; the last is minibatch 99"):
        one_step(model, optimizer, g, times=math.nan)
    assert len(g.skipped) == 100


def test_a_guard_goes_on_counting_where_its_state_was():
    model, optimizer, guard = a_training(non_finite="skip")
    one_step(model, optimizer, guard)
    one_step(model, optimizer, guard, times=math.nan)
    _, _, other = a_training(non_finite="skip")
    other.load_state_dict(guard.state_dict())
    assert other.state_dict() == {"minibatches": 2, "in_a_row": 1}
    one_step(model, optimizer, other)
    assert other.state_dict() == {"minibatches": 3, "in_a_row": 0}


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_buffer_is_given_back(name):
    model = build(name, dtype=torch.float32)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    guard = Guard(optimizer, model, non_finite="skip")
    before = copy.deepcopy(model.state_dict())
    one_step(model, optimizer, guard, times=math.nan)
    assert_same(model.state_dict(), before)


# On a device


class OnDevice(torch.optim.SGD):
    """Replaces a fused optimizer, which torch lacks for the pretended device, and records its `found_inf`."""

    _step_supports_amp_scaling = True

    def step(self, closure=None):
        self.told = getattr(self, "told", [])
        self.told.append(getattr(self, "found_inf", None))


@pytest.mark.parametrize("found", [[0, 0], [1, 0], [0, 1]])
def test_on_a_device_a_fault_is_raised_one_step_late_without_a_wait(found):
    model = conv_bn().to(DEVICE)
    optimizer = OnDevice(model.parameters(), lr=0.1)
    x, y = X.to(DEVICE), Y.to(DEVICE)
    with pretended_device(found) as reads, mock.patch.object(guard, "HostRead", reads):
        g = Guard(optimizer, model)
        g._has_stepped = True

        def train():
            with g.minibatch():
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                g.step(loss)

        train()
        assert (reads.started, reads.waited) == (1, 0)
        assert optimizer.told[0].shape == ()
        assert not hasattr(optimizer, "found_inf")
        if any(found):
            with pytest.raises(NonFiniteError, match=f"minibatch 0: {guard.REASONS[found.index(1)]}") as raised:
                train()
            assert raised.value.earlier
            assert (reads.waited, len(optimizer.told)) == (1, 1)
        else:
            train()
            assert (reads.started, reads.waited, len(optimizer.told)) == (2, 1, 2)


# Arguments


def test_arguments_that_do_not_fit_are_named():
    model, optimizer, guard = a_training()
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim.Optimizer, got Sequential"):
        Guard(model)
    with pytest.raises(TypeError, match=r"modules must be torch\.nn\.Module, got SGD"):
        Guard(optimizer, optimizer)
    with pytest.raises(ValueError, match="non_finite must be one of 'raise', 'skip', got 'ignore'"):
        Guard(optimizer, non_finite="ignore")
    with pytest.raises(RuntimeError, match=r"with guard\.minibatch"):
        guard.step(torch.ones(()))
    before = copy.deepcopy(model.state_dict())
    for loss, error in ((1.0, TypeError), (torch.ones(2), ValueError), (torch.ones((), dtype=torch.long), TypeError)):
        with pytest.raises(error, match="loss must be"), guard.minibatch():
            guard.step(loss)
    assert_same(model.state_dict(), before)
