"""Attacks on the batch's statistics through `SyncBatchNorm`: the batch is that of all ranks."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as across
from gloo_ranks import run_ranks
from small_models import CLASSES, assert_unchanged, batch, snapshot
from torch import nn

from bt_fast import PGD, PGDLoss, TRADESLoss, perturb

M = 8  # samples of the whole minibatch
CLOSE = {"rtol": 0, "atol": 1e-10}
HOW = pytest.mark.parametrize("statistics", ["batch", "tracked"])


class Synchronised(nn.SyncBatchNorm):
    """Torch's with the same buffers, but on the CPU too."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        sums = torch.cat([x.sum((0, 2, 3)), x.square().sum((0, 2, 3)), x.new_full((1,), x.numel() / x.shape[1])])
        if dist.is_initialized():
            sums = across.all_reduce(sums)
        mean, square = (sums[:-1] / sums[-1]).chunk(2)
        variance = square - mean.square()
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * sums[-1] / (sums[-1] - 1), self.momentum)
        scale = (self.weight / (variance + self.eps).sqrt()).view(-1, 1, 1)
        return (x - mean.view(-1, 1, 1)) * scale + self.bias.view(-1, 1, 1)


def convolutional(norm):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), norm(4), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(16, CLASSES),
    ).double()  # fmt: skip


def trained(statistics, norm, kind, rows):
    """x' and the loss of some samples, whose starts go by number, and buffers and gradients: the mean of the ranks."""
    model, (x, y) = convolutional(norm), batch(M, seed=3)
    criterion = kind(PGD(0.1, 0.03, 3, statistics=statistics, start="uniform"), engine="exact")
    generator = torch.Generator().manual_seed(0)
    loss = criterion(model, x[rows], y[rows], torch.arange(M)[rows], generator=generator)
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    if dist.is_initialized():  # by hand, since DistributedDataParallel takes a SyncBatchNorm on a GPU only
        for gradient in gradients:
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
    return [criterion.last.x_adv, loss.detach()], [*model.buffers(), *gradients]


def rows_of_rank():
    each = M // dist.get_world_size()
    return slice(dist.get_rank() * each, (dist.get_rank() + 1) * each)


def on_a_rank(statistics, kind):
    return trained(statistics, Synchronised, kind, rows_of_rank())


@HOW
@pytest.mark.parametrize("kind", [PGDLoss, TRADESLoss])
def test_ranks_attack_as_one_process_on_all_of_their_samples(kind, statistics):
    (x_adv, loss), state = trained(statistics, nn.BatchNorm2d, kind, slice(0, M))
    first, second = run_ranks(2, on_a_rank, statistics, kind)
    torch.testing.assert_close(torch.cat([first[0][0], second[0][0]]), x_adv, **CLOSE)
    torch.testing.assert_close((first[0][1] + second[0][1]) / 2, loss, **CLOSE)
    for of_rank in (first[1], second[1]):
        torch.testing.assert_close(of_rank, state, **CLOSE)
    moves = {"batch": 0, "tracked": 3 + (kind is TRADESLoss)}[statistics] + (3 if kind is TRADESLoss else 1)
    assert state[2] == moves


def refused_on_a_rank(dtype):
    """The messages of all entrances; the model, its modes and its tracking are as before."""
    norm = Synchronised if dtype == torch.float16 else nn.SyncBatchNorm
    model, (x, y) = convolutional(norm).to(dtype), batch(M, seed=3)
    model[1].track_running_stats = True
    x, before, messages = x.to(dtype), snapshot(model), []
    for statistics in ("batch", "tracked"):
        attack = PGD(0.1, 0.03, 3, statistics=statistics)
        for call in (perturb, PGDLoss(attack), TRADESLoss(attack)):
            for training in (True, False):
                model.train(training)
                with pytest.raises(ValueError, match="SyncBatchNorm") as error:
                    call(model, x, y, *([attack] if call is perturb else []))
                messages.append(str(error.value))
                assert all(module.training == training for module in model.modules())
        model.train()
        assert_unchanged(before, model)
        assert model[1].track_running_stats
    return messages


def test_on_the_cpu_it_is_refused_before_anything_has_changed():
    for messages in run_ranks(2, refused_on_a_rank, torch.float64):
        assert len(messages) == 12
        for statistics, some in (("batch", messages[:6]), ("tracked", messages[6:])):
            assert set(some) == {
                "attack's statistics must be 'running' for a model with SyncBatchNorm on the CPU, got "
                f"{statistics!r}: torch has none for the CPU in train mode: move model and images to a GPU, or leave "
                "statistics out"
            }


def test_in_float16_over_ranks_it_is_refused_since_their_factors_differ():
    for messages in run_ranks(2, refused_on_a_rank, torch.float16):
        assert all("with SyncBatchNorm in float16" in message for message in messages)


def frozen_on_a_rank():
    model, (x, y) = convolutional(nn.SyncBatchNorm), batch(M, seed=3)
    model[1].eval()
    before = snapshot(model)
    x_adv = perturb(model, x, y, PGD(0.1, 0.03, 3, statistics="tracked"))
    assert_unchanged(before, model)
    return (x_adv - x).abs().max().item()


def test_a_norm_that_is_frozen_waits_for_nobody_and_is_not_refused():
    assert run_ranks(1, frozen_on_a_rank)[0] > 0.05


@HOW
def test_in_one_process_it_is_batch_norm(statistics):
    expected = trained(statistics, nn.BatchNorm2d, PGDLoss, slice(0, M))
    for a, b in zip(trained(statistics, nn.SyncBatchNorm, PGDLoss, slice(0, M)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
