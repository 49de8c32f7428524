"""Every inner loss, APGD, best iterates and a selected output, on two ranks sharing the attack, as in one process."""

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import run_ranks
from small_models import CLASSES, batch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bt_fast import APGD, PGD, Balance, BulletTrain, Costs, Logits, TRADESLoss, perturb

M = 12
sharding = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this torch's fully_shard runs on CUDA only"
)
ALWAYS = Balance(Costs(1.0, 0.0, 1.0, 1e-9, 1e9))


class Net(nn.Module):
    """Returns its features, too, and counts what a wrapper's forward would have it do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.Flatten())
        self.head = nn.Linear(64, CLASSES)
        self.double()
        with torch.no_grad():  # no class wins everywhere
            self.head.bias -= self(batch(64, seed=9)[0])["logits"].mean(dim=0)

    def forward(self, x):
        features = self.body(x)
        return {"logits": self.head(features), "features": features}


def logits(output):
    return output["logits"]


def by_label(outputs, rows):
    return (outputs - rows.clean_outputs).square().sum(dim=1) * (1 + rows.labels)


ATTACKS = {
    **{inner: PGD(0.1, 0.03, 3, inner=inner) for inner in ("margin", "dlr", "lse")},
    "a function of labels": PGD(0.1, 0.03, 3, inner=by_label),
    "the best": PGD(0.1, 0.08, 3, inner="margin", keep="best"),
    "APGD": APGD(0.1, 3, inner=by_label),
    "APGD towards a class": APGD(0.1, 3, inner="dlr_targeted"),
}


def trained(inner, model, rows, **of_ranks):
    """Loss, x' and the state of mining after two minibatches."""
    mining = BulletTrain(3, 1, 0, gamma=1.0, momentum=0.5, **of_ranks)
    criterion = TRADESLoss(ATTACKS[inner], mining=mining, engine="exact", logits=logits)
    optimizer, result = torch.optim.SGD(model.parameters(), lr=0.03), []
    generator = torch.Generator().manual_seed(0 if not of_ranks else dist.get_rank())  # rank 0's is everyone's
    for seed in (1, 2):
        x, y = batch(M, seed=seed)
        right = logits(Net()(x)).argmax(dim=1)
        y = torch.where(torch.arange(M) < 7, right, (right + 1 + y) % CLASSES)  # those of the first rank are attacked
        x, y = x[rows], y[rows]
        optimizer.zero_grad()
        loss = criterion(model, x, y, generator=generator)
        loss.backward()
        optimizer.step()
        result += [
            loss.detach(),
            criterion.last.x_adv,
            criterion.last.steps,
            mining.state_dict()["robust_fraction"].clone(),
        ]
    front, mining = Logits(model, logits), BulletTrain(3, 1, 0, gamma=1.0, momentum=0.5, **of_ranks)
    result.append(perturb(front, x, y, criterion.attack, mining, generator=generator))
    return result


def on_a_rank(inner):
    rank = dist.get_rank()
    model = DistributedDataParallel(Net())
    return trained(
        inner, model, slice(rank * M // 2, (rank + 1) * M // 2), process_group=dist.group.WORLD, balance=ALWAYS
    )


def on_a_rank_sharded(inner):
    from torch.distributed.fsdp import fully_shard

    rank, model = dist.get_rank(), Net()
    fully_shard(model.body)
    fully_shard(model)
    return trained(inner, model, slice(rank * M // 2, (rank + 1) * M // 2), process_group=dist.group.WORLD)


@sharding
@pytest.mark.parametrize("inner", ["dlr", "APGD towards a class"])
def test_a_net_that_is_sharded_over_two_ranks_returns_a_dict_too(inner):
    assert_as_one_process(inner, *run_ranks(2, on_a_rank_sharded, inner))


@pytest.mark.parametrize("inner", ATTACKS)
def test_two_ranks_that_share_the_attack_out_find_what_one_process_finds(inner):
    assert_as_one_process(inner, *run_ranks(2, on_a_rank, inner))


def assert_as_one_process(inner, first, second):
    expected, close = trained(inner, Net(), slice(None)), {"rtol": 0, "atol": 1e-10}
    for one, a, b in zip(expected, first, second, strict=True):
        if one.dim() == 0 and one.is_floating_point():
            torch.testing.assert_close((a + b) / 2, one, **close)
        else:
            torch.testing.assert_close(torch.cat([a, b]), one, **close)
    assert len(set(expected[6].tolist())) > 1
