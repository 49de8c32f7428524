"""Ranges for profilers: their names and numbers; they are balanced and nearly free."""

import timeit
from unittest import mock

import pytest
import small_models
import torch
from emulated_device import EmulatedDevice, capturing
from torch.profiler import ProfilerActivity, profile

from bt_fast import (
    BulletTrain,
    GraphRunner,
    StreamRunner,
    Update,
    augmix_loss,
    mart_loss,
    pgd_loss,
    ranges,
    trades_loss,
)
from bt_fast.baselines.mart_reference import mart_reference_loss
from bt_fast.baselines.pgd_reference import pgd_reference_loss
from bt_fast.baselines.trades_reference import trades_reference_loss
from bt_fast.ranges import ATTACK_STEP, MINING, PHASES, UPDATE, range_

M, STEPS = 6, 4


def loss(loss_of, bullet=None, **options):
    """Computes a loss of one minibatch, in the same state each time."""
    torch.manual_seed(0)
    model = options.pop("model", None) or small_models.conv_bn()
    x, y = torch.rand(M, *small_models.SHAPE), torch.arange(M) % small_models.CLASSES
    if loss_of is augmix_loss:
        return loss_of(model, x.expand(M, 3, 6, 6).contiguous(), y, bullet=bullet)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    given = options | ({"bullet": bullet} if bullet else {})
    return loss_of(model, x, y, optimizer, perturb_steps=STEPS, **given)


def bullet():
    return BulletTrain(STEPS, 2, 1)


def counts(work):
    """Returns how often each range occurs in a trace of the CPU."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        work()
    result = {event.key: event.count for event in profiled.key_averages() if event.key.startswith("bt_fast::")}
    return {name: result[name] for name in PHASES if name in result}


class Nvtx:
    """Replaces torch.cuda.nvtx: records the ranges in order, their depth, and whether a capture is active."""

    def __init__(self):
        self.pushed, self.open = [], []

    def range_push(self, name):
        self.pushed.append((name, len(self.open), capturing()))
        self.open.append(name)

    def range_pop(self):
        self.open.pop()


@pytest.fixture
def nvtx(monkeypatch):
    fake = Nvtx()
    monkeypatch.setattr(ranges, "nvtx", fake)
    monkeypatch.setattr(ranges, "_NVTX", {name: ranges._NvtxRange(name) for name in PHASES})
    return fake


@pytest.mark.parametrize("loss_of", [trades_loss, mart_loss, pgd_loss])
def test_a_trace_of_the_cpu_shows_mining_each_attack_step_and_the_update(loss_of):
    assert counts(lambda: loss(loss_of, bullet())) == {MINING: 1, ATTACK_STEP: STEPS, UPDATE: 1}
    assert counts(lambda: loss(loss_of)) == {ATTACK_STEP: STEPS, UPDATE: 1}


@pytest.mark.parametrize("loss_of", [trades_reference_loss, mart_reference_loss, pgd_reference_loss])
def test_the_authors_losses_show_the_same_phases(loss_of):
    assert counts(lambda: loss(loss_of)) == {ATTACK_STEP: STEPS, UPDATE: 1}


def test_augmix_has_mining_and_an_update():
    model = small_models.conv_bn()
    model[0] = torch.nn.Conv2d(3, 4, 3, padding=1)
    result = counts(lambda: loss(augmix_loss, BulletTrain(1, 0, 0), model=model))
    assert (result[MINING], result.keys()) == (1, {MINING, UPDATE})
    assert counts(lambda: loss(augmix_loss, model=model)) == {UPDATE: 1}


def test_without_a_torch_profiler_the_ranges_are_nvtx(nvtx):
    loss(trades_loss, bullet())
    names = [(name, depth) for name, depth, _ in nvtx.pushed]
    assert names == [(MINING, 0), *[(ATTACK_STEP, 0)] * STEPS, (UPDATE, 0)]
    assert nvtx.open == []


def test_a_range_goes_to_one_place(nvtx):
    assert counts(lambda: loss(trades_loss, bullet()))[UPDATE] == 1
    assert nvtx.pushed == []


def test_an_exception_leaves_no_range_open(nvtx):
    with pytest.raises(KeyError), range_(UPDATE), range_(ATTACK_STEP):
        raise KeyError
    assert nvtx.open == []
    assert [name for name, _, _ in nvtx.pushed] == [UPDATE, ATTACK_STEP]


@pytest.mark.parametrize("runner", [GraphRunner, StreamRunner])
def test_ranges_stand_around_replays_and_never_inside_a_capture(nvtx, runner):
    attacking, model, mining = runner(bucket=M), small_models.conv_bn(), BulletTrain(*[STEPS] * 3)
    with EmulatedDevice() as emulated:
        for _ in range(4):
            nvtx.pushed.clear()
            loss(trades_loss, mining, model=model, runner=attacking, update=Update(graphs=True)).backward()
            steps = [name for name, _, _ in nvtx.pushed if name == ATTACK_STEP]
            assert len(steps) == STEPS
            assert not any(within for _, _, within in nvtx.pushed)
            assert nvtx.open == []
    assert emulated.replays > 0


def test_where_torch_has_no_nvtx_a_range_does_nothing(monkeypatch):
    monkeypatch.setattr(ranges, "_NVTX", {})
    monkeypatch.setattr(ranges, "nvtx", mock.Mock(range_push=mock.Mock(side_effect=RuntimeError("no NVTX"))))
    loss(trades_loss, bullet())


def test_a_range_without_a_profiler_costs_microseconds_at_most():
    def one():
        with range_(ATTACK_STEP):
            pass

    assert (
        min(timeit.repeat(one, number=1000, repeat=5)) / 1000 < 20e-6
    )  # measured: 0.3e-6, and 2e-6 on a very busy machine
