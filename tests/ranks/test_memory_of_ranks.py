"""Ranks that mine together, each with the memory of its own share, train and remember as one process does."""

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import run_ranks
from small_models import CLASSES, SHAPE, batch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bt_fast import PGD, BulletTrain, Memory, Placement, TRADESLoss

RANKS, SAMPLES, EACH = 2, 12, 3  # EACH of a rank in a minibatch
ATTACK = PGD(0.1, 0.03, 10)
CLOSE = {"rtol": 0, "atol": 1e-10}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, CLASSES)).double()


def share(rank):
    return torch.arange(rank, SAMPLES, RANKS)


def minibatches(ranks, epochs=2):
    """Yields the arguments of the loss of two epochs: each minibatch has EACH samples of the share of each rank."""
    x, y = batch(SAMPLES, seed=3)
    y = torch.where(torch.arange(SAMPLES) % 4 == 0, y, network()(x).argmax(dim=1))
    g = torch.Generator().manual_seed(1)
    for _ in range(epochs):
        shuffled = torch.stack([share(rank)[torch.randperm(len(share(rank)), generator=g)] for rank in range(RANKS)])
        top, left = torch.randint(-2, 3, (2, SAMPLES), generator=g)
        mirrored = torch.rand(SAMPLES, generator=g) < 0.5
        for numbers in shuffled.split(EACH, dim=1):
            n = numbers[ranks].flatten()
            place = Placement(top[n], left[n], mirrored[n])
            yield {"x": x[n], "y": y[n], "indices": n, "placement": place}


def criterion_of(memory, group):
    mining = BulletTrain(gamma=1.0, momentum=0.5, process_group=group)
    return TRADESLoss(ATTACK, beta=6.0, mining=mining, memory=memory, engine="exact")


def trained(model, criterion, ranks, seed):
    """Returns the losses, and what is in the loss and the model in the end."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.2), []
    for step, given in enumerate(minibatches(ranks)):
        loss = criterion(model, **given, generator=torch.Generator().manual_seed(seed + step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    memory, mining = criterion.memory, criterion.mining
    mining.finish()
    return {
        "losses": torch.stack(losses),
        "weights": [p.detach().clone() for p in model.parameters()],
        "F_R": mining.robust_fraction.clone(),
        "groups": mining.group_counts.clone(),
        "perturbations": memory.perturbations.clone(),
        "ages": memory.ages(),
    }


def on_a_rank():
    """Trains; then the second rank has a sample of the first one's share in its minibatch."""
    rank = dist.get_rank()
    memory = Memory(SAMPLES, SHAPE, dtype=torch.float64, share=share(rank), steps=(2, 1, 0))
    criterion, model = criterion_of(memory, dist.group.WORLD), DistributedDataParallel(network())
    result = trained(model, criterion, [rank], seed=100 * rank)  # all ranks use rank 0's
    given = next(iter(minibatches([rank])))
    if rank == 1:
        given["indices"][1] = share(0)[0]
    try:
        criterion(model, **given)
    except ValueError as error:
        result["error"] = str(error)
    result["unchanged"] = torch.equal(result["perturbations"], memory.perturbations)
    criterion(model, **next(iter(minibatches([rank]))))  # and goes on
    return result


@pytest.fixture(scope="module")
def of_ranks():
    return run_ranks(RANKS, on_a_rank)


def test_shares_of_ranks_are_the_whole_memory_of_one_process(of_ranks):
    memory = Memory(SAMPLES, SHAPE, dtype=torch.float64, steps=(2, 1, 0))
    one = trained(network(), criterion_of(memory, None), [0, 1], seed=0)
    assert one["groups"].min() > 4
    assert one["perturbations"].any()
    torch.testing.assert_close(sum(r["losses"] for r in of_ranks) / RANKS, one["losses"], **CLOSE)
    for rank, result in enumerate(of_ranks):
        torch.testing.assert_close(result["perturbations"], one["perturbations"][share(rank)], **CLOSE)
        torch.testing.assert_close(result["weights"], one["weights"], **CLOSE)
        assert torch.equal(result["ages"], one["ages"][share(rank)])
        assert torch.equal(result["groups"], one["groups"])
        assert torch.equal(result["F_R"], one["F_R"])


def test_a_wrong_number_on_one_rank_is_raised_on_both(of_ranks):
    first, second = of_ranks
    assert first["error"] == second["error"]
    assert first["error"].startswith("rank 1: indices must be of this rank's share of 6 samples, but 1 of 3 are not")
    assert first["unchanged"]
    assert second["unchanged"]
