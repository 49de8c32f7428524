"""A model that `fully_shard` has spread over the ranks trains like the whole model."""

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import run_ranks
from small_models import CLASSES, batch
from torch import nn

from bt_fast import BulletTrain, Frozen, ThreatModel, mart_loss, pgd_loss, trades_loss
from bt_fast.attack.wrapped import gathered, sharded_parts
from bt_fast.evaluation import evaluate

LOSSES = {"trades": trades_loss, "mart": mart_loss, "pgd": pgd_loss}
CLOSE = {"rtol": 0, "atol": 1e-10}
sharding = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this torch's fully_shard runs on CUDA only"
)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 4, 3, stride=2), nn.ReLU()), nn.Flatten(), nn.Linear(16, CLASSES),
    ).double()  # fmt: skip


def sharded():
    from torch.distributed.fsdp import fully_shard

    model = network()
    fully_shard(model[3])
    fully_shard(model)
    return model


def whole(parameter):
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach().clone()


def trained(model, x, y, loss_of, group):
    """Returns losses of three iterations, the accuracy under attack, and the parameters."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    bullet = BulletTrain(4, 1, 0, gamma=1.0, momentum=0.5, process_group=group)
    losses, steps = [], []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        loss = loss_of(model, x, y, optimizer, 0.03, 0.1, bullet=bullet, generator=generator)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        steps.append(bullet.mean_steps)
    return {
        "losses": losses,
        "steps": steps,
        "robust": [stood(model, x[rows : rows + 6], y[rows : rows + 6]) for rows in range(0, len(x), 6)],
        "parameters": [whole(p) for p in model.parameters()],
    }


def stood(model, x, y):
    seed = torch.Generator().manual_seed(0)
    return evaluate(model, [(x, y)], ThreatModel(0.05), steps=3, generator=seed).robust_correct


def on_a_rank(name):
    x, y = batch(12, seed=3)
    own = slice(dist.get_rank() * 6, dist.get_rank() * 6 + 6)
    return trained(sharded(), x[own], y[own], LOSSES[name], dist.group.WORLD)


@sharding
@pytest.mark.parametrize("name", LOSSES)
def test_a_sharded_model_trains_as_one_process_with_all_samples(name):
    expected = trained(network(), *batch(12, seed=3), LOSSES[name], None)
    first, second = run_ranks(2, on_a_rank, name)
    assert first["steps"] == second["steps"] == expected["steps"]
    assert [*first["robust"], *second["robust"]] == expected["robust"]
    for a, b, one in zip(first["losses"], second["losses"], expected["losses"], strict=True):
        torch.testing.assert_close((a + b) / 2, one, **CLOSE)
    for result in (first, second):
        torch.testing.assert_close(result["parameters"], expected["parameters"], **CLOSE)


def uneven_attacks(frozen):
    """Only rank 0 attacks for long: rank 1 has no sample that takes a step, and must not be waited for."""
    model, (x, y) = sharded(), batch(6, seed=3)
    with torch.no_grad():
        y = model(x).argmax(dim=1)  # this forward is collective
    if dist.get_rank() == 1:
        y = (y + 1) % CLASSES
    bullet = BulletTrain(5, 2, 0)
    loss = trades_loss(model, x, y, None, 0.03, 0.1, bullet=bullet, frozen=frozen)
    loss.backward()
    return bullet.mean_steps


@sharding
@pytest.mark.filterwarnings("ignore:the attack runs on the model as it is")
@pytest.mark.parametrize("frozen", [None, Frozen()])
def test_no_rank_waits_for_anothers_attack(frozen):
    assert run_ranks(2, uneven_attacks, frozen) == [5.0, 0.0]


def settings_after_an_attack():
    model = sharded()
    before = [_settings(part) for part in sharded_parts(model)]
    with pytest.raises(KeyError):
        _raise_inside(model)
    assert all(hasattr(p, "full_tensor") for p in model.parameters())
    return before == [_settings(part) for part in sharded_parts(model)]


def _raise_inside(model):
    with gathered(model):
        assert all(not hasattr(p, "full_tensor") for p in model.parameters())
        raise KeyError


def _settings(part):
    group = part._get_fsdp_state()._fsdp_param_group
    return group.post_forward_mesh_info is None, group.reshard_after_backward


@sharding
def test_a_sharded_model_is_as_it_was_after_an_attack_even_one_that_raised():
    assert all(run_ranks(2, settings_after_an_attack))


def test_a_model_that_is_not_sharded_is_left_alone():
    model = network()
    with gathered(model):
        assert sharded_parts(model) == []
