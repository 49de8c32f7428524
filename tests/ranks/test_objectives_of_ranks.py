"""N ranks with m samples each train like one process with N·m."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as across
from gloo_ranks import run_ranks
from small_models import CLASSES, batch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bt_fast import (
    PGD,
    Balance,
    BulletTrain,
    Costs,
    Frozen,
    Normalization,
    PerSample,
    augmix_loss,
    mart_loss,
    perturb,
    pgd_loss,
    trades_loss,
)
from bt_fast.attack import balanced
from bt_fast.baselines.fast import fast_loss
from bt_fast.baselines.grad_align import grad_align

M = 12  # samples of the whole minibatch
CLOSE = {"rtol": 0, "atol": 1e-10}


class NormOfAll(nn.Module):
    """A batch norm over all ranks' samples, with gradient; `SyncBatchNorm` needs a GPU."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))

    def forward(self, x):
        mean, variance = self.mean, self.variance
        if self.training:
            sums = torch.cat([x.sum((0, 2, 3)), x.square().sum((0, 2, 3)), x.new_full((1,), x.numel() / x.shape[1])])
            if dist.is_initialized():
                sums = across.all_reduce(sums)
            mean, square = (sums[:-1] / sums[-1]).chunk(2)
            variance = square - mean.square()
            with torch.no_grad():
                self.mean.lerp_(mean, 0.1)
                self.variance.lerp_(variance, 0.1)
        scale = (self.weight / (variance + 1e-5).sqrt()).view(-1, 1, 1)
        return (x - mean.view(-1, 1, 1)) * scale + self.bias.view(-1, 1, 1)


def convolutional(norm):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), norm(4), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(16, CLASSES),
    ).double()  # fmt: skip


def plain():
    return convolutional(lambda channels: nn.GroupNorm(2, channels))


def normed():
    return convolutional(NormOfAll)


OPTIONS = {"epsilon": 0.1, "step_size": 0.03}
ALWAYS, NEVER = (Balance(Costs(seconds, 0.0, 1.0, 1e-9, 1e9)) for seconds in (1.0, 0.0))
LOSSES = {
    "trades": (trades_loss, {"beta": 6.0}),
    "trades, skip": (trades_loss, {"unperturbed": "skip"}),
    "trades, l_2 from a uniform start": (trades_loss, {"distance": "l_2", "epsilon": 0.5, "start": "uniform"}),
    "mart": (mart_loss, {}),
    "pgd, frozen": (pgd_loss, {"frozen": Frozen()}),
    "trades, normalised": (trades_loss, {"normalization": Normalization([0.4], [0.3]), "frozen": Frozen()}),
}


def trained(model, loss_of, x, y, numbers, bullet, generator, **options):
    """Returns losses, gradients and states of three iterations of SGD; ℓ2 also draws, so starts go by numbers."""
    optimizer, result = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9), []
    for step in range(3):
        given = OPTIONS | {"bullet": bullet, "generator": generator} | options
        images = x[step] if "normalization" not in options else (x[step] - 0.4) / 0.3
        if given.get("distance") == "l_2":
            given["samples"] = numbers[step]
        loss = loss_of(model, images, y[step], optimizer, **given)
        loss.backward()
        optimizer.step()
        result.append(
            {
                "loss": loss.detach(),
                "gradients": [p.grad.clone() for p in model.parameters()],
                "parameters": [p.detach().clone() for p in model.parameters()],
                "buffers": [b.clone() for b in model.buffers()],
                "bullet": {k: v.clone() for k, v in bullet.state_dict().items()},
            }
        )
    return result


def data(count, rank):
    """Returns three minibatches, or a rank's share of them."""
    x, y = batch(3 * M, seed=3)
    x, y = x.view(3, M, *x.shape[1:]), y.view(3, M)
    each = M // count
    own = slice(rank * each, rank * each + each)
    return x[:, own], y[:, own], torch.arange(100, 100 + 3 * M).view(3, M)[:, own]


def on_ranks(name, build, balance=None):
    loss_of, options = LOSSES[name]
    options = options | {"balance": balance}
    model = DistributedDataParallel(build())
    bullet = BulletTrain(3, 1, 0, gamma=1.0, momentum=0.5, process_group=dist.group.WORLD)
    generator = torch.Generator().manual_seed(dist.get_rank())  # all ranks use rank 0's
    return trained(model, loss_of, *data(dist.get_world_size(), dist.get_rank()), bullet, generator, **options)


# each rank decides whether it runs a corrupted forward, and only SyncBatchNorm itself is informed
BUILDS = [(name, build) for name in LOSSES for build in (plain, normed) if (name, build) != ("trades, skip", normed)]
RANKS = [
    *((name, build, 2, balance) for name, build in BUILDS for balance in (None, ALWAYS)),
    ("trades", normed, 4, None),
    ("trades, skip", plain, 4, ALWAYS),
    ("pgd, frozen", plain, 4, Balance()),
]


@pytest.mark.parametrize(("name", "build", "count", "balance"), RANKS)
def test_ranks_train_as_one_process(name, build, count, balance):
    loss_of, options = LOSSES[name]
    bullet = BulletTrain(3, 1, 0, gamma=1.0, momentum=0.5)
    expected = trained(build(), loss_of, *data(1, 0), bullet, torch.Generator().manual_seed(0), **options)
    of_ranks = run_ranks(count, on_ranks, name, build, balance)
    assert bullet.group_counts.min() > 0
    for step, one in enumerate(expected):
        each = [result[step] for result in of_ranks]
        torch.testing.assert_close(sum(e["loss"] for e in each) / count, one["loss"], **CLOSE)
        for e in each:
            torch.testing.assert_close(e["gradients"], one["gradients"], **CLOSE)
            torch.testing.assert_close(e["parameters"], one["parameters"], **CLOSE)
            torch.testing.assert_close(e["buffers"], one["buffers"], **CLOSE)
            for key, value in one["bullet"].items():
                assert torch.equal(e["bullet"][key], value), key


def with_own_sizes(group, balance, rows):
    """x' of some samples of a minibatch, each with an ε and a step size of its own, and their steps."""
    x, y = batch(M, seed=3)
    radii = torch.linspace(0.0, 0.3, M, dtype=torch.float64)
    own = PerSample(epsilon=radii[rows], step_size=0.4 * radii[rows])
    bullet = BulletTrain(3, 2, 1, process_group=group, balance=balance)
    bullet.robust_fraction.fill_(0.5)
    attack, generator = PGD(0.1, 0.03, 3), torch.Generator().manual_seed(0)
    result = perturb(
        plain(), x[rows], y[rows], attack, bullet, per_sample=own, generator=generator, return_details=True
    )
    return [result.x_adv, result.steps]


def own_sizes_on_ranks():
    half = M // 2
    rows = slice(dist.get_rank() * half, dist.get_rank() * half + half)
    return with_own_sizes(dist.group.WORLD, ALWAYS, rows)


def test_sizes_of_the_samples_own_are_theirs_on_any_rank():
    expected = with_own_sizes(None, None, slice(0, M))
    first, second = run_ranks(2, own_sizes_on_ranks)
    torch.testing.assert_close(torch.cat([first[0], second[0]]), expected[0], **CLOSE)
    assert torch.equal(torch.cat([first[1], second[1]]), expected[1])
    assert len(set(expected[1].tolist())) > 1


class Counted(nn.Module):
    """Counts the rows of its forwards with input gradients in eval mode, which are an attack's."""

    def __init__(self):
        super().__init__()
        self.body, self.rows = plain(), []

    def forward(self, x):
        if x.requires_grad and not self.training:
            self.rows.append(len(x))
        return self.body(x)


def rows_attacked(balance):
    """Attacks correct samples, at first boundary, on rank 0 and outliers on rank 1."""
    model, (x, y) = Counted(), batch(8)
    with torch.no_grad():
        y = model(x).argmax(dim=1)
    y = (y + dist.get_rank()) % CLASSES
    bullet = BulletTrain(3, 1, 0, process_group=dist.group.WORLD)
    trades_loss(model, x, y, None, 0.03, 0.1, bullet=bullet, balance=balance)
    return model.rows


@pytest.mark.parametrize(
    ("balance", "rows"), [(ALWAYS, [[4] * 3] * 2), (NEVER, [[8] * 3, []]), (None, [[8] * 3, []])],
)  # fmt: skip
def test_an_exchange_that_pays_evens_out_the_attack(balance, rows):
    assert run_ranks(2, rows_attacked, balance) == rows


def test_costs_are_measured_once_on_all_ranks_alike():
    costs = run_ranks(2, costs_measured)
    assert costs[0] == costs[1]
    assert all(value >= 0 for value in costs[0])


def costs_measured():
    model, (x, y) = Counted(), batch(8)
    y = (model(x).argmax(dim=1) + dist.get_rank()) % CLASSES
    bullet = BulletTrain(3, 1, 0, process_group=dist.group.WORLD)
    for _ in range(2):
        trades_loss(model, x, y, None, 0.03, 0.1, bullet=bullet, balance=Balance())
    (costs,) = balanced._measured[model].values()
    return list(vars(costs).values())


@pytest.mark.parametrize("bullet", [None, BulletTrain()])
def test_balance_needs_ranks(bullet):
    with pytest.raises(ValueError, match=r"needs a BulletTrain with process_group"):
        trades_loss(plain(), *batch(4), None, bullet=bullet, balance=Balance())


@pytest.mark.parametrize("wrong", [{"costs": 3}, {"ranks_per_node": 0}, {"ranks_per_node": 1.5}])
def test_a_balance_of_nonsense_is_refused(wrong):
    with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
        Balance(**wrong)


def wrapped_losses(build, wrap):
    """Yields the objectives without BulletTrain or with their own, and GradAlign's term."""
    torch.manual_seed(1)
    model = build()
    model = DistributedDataParallel(model, broadcast_buffers=True) if wrap else model
    x, y = batch(8)
    images = x.repeat(1, 1, 4, 4)[..., :16, :16].float()
    result = []
    for loss_of in (
        lambda: trades_loss(model, x, y, None, **OPTIONS),
        lambda: mart_loss(model, x, y, None, **OPTIONS),
        lambda: pgd_loss(model, x, y, None, **OPTIONS),
        lambda: fast_loss(pgd_loss, model, x, y, None, epsilon=0.1) + 0.2 * grad_align(model, x, y, epsilon=0.1),
        lambda: augmix_loss(model.float(), images[..., :6, :6], y, bullet=BulletTrain(1, 0, 0)),
    ):
        loss = loss_of()
        model.zero_grad()
        loss.backward()
        result.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    return result


def batch_norm():
    return convolutional(nn.BatchNorm2d)


@pytest.mark.parametrize("build", [plain, batch_norm])
def test_a_wrapped_model_of_one_rank_trains_as_the_model_itself(build):
    (wrapped,) = run_ranks(1, wrapped_losses, build, True)
    for result, expected in zip(wrapped, wrapped_losses(build, False), strict=True):
        torch.testing.assert_close(result, expected, **CLOSE)
