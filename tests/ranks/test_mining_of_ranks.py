"""N ranks that mine together make the same assignments as one process with all of their samples."""

import copy
import io
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import RankError, run_ranks
from pretended_device import DEVICE, pretended_device
from small_models import Undefined, batch, build, with_bright

from bt_fast import BulletTrain, Gaussian, Guard, ranks, trades_loss
from bt_fast.ranks import Ranks

EPSILON = 0.1
RULES = {
    "the paper's": {},
    "margin and Gaussian": {"metric": "margin", "policy": Gaussian(0.7)},
    "uniform": {"policy": "uniform"},
}


def minibatches(sizes, seed, dtype=torch.float32):
    """Returns clean and adversarial logits and labels of ranks with these numbers of samples."""
    g = torch.Generator().manual_seed(seed)
    result = []
    for m in sizes:
        z, y = torch.randn(m, 5, generator=g, dtype=torch.float64).to(dtype) * 2, torch.randint(5, (m,), generator=g)
        z = torch.where(torch.rand(m, 1, generator=g) < 0.6, z + 3 * torch.nn.functional.one_hot(y, 5), z)
        result.append((z, z.flip(0), y))
    return result


def mined(bullet, z, z_adv, y):
    """Returns a plan and the state after its minibatch, as plain values."""
    a = bullet.plan(z, y, epsilon=EPSILON)
    bullet.observe(z_adv, y)
    bullet.finish()
    return {
        "group": a.group,
        "steps": a.steps,
        "step_size": a.step_size,
        "threshold": a.threshold,
        "order": a.order,
        "active": a.active_counts,
        "sizes": a.group_sizes,
        "spread": a.steps_of_ranks,
    }


def states(bullet):
    return {**{k: v.clone() for k, v in bullet.state_dict().items()}, "mean_steps": bullet.mean_steps}


def together(rule, rounds, dtype):
    bullet = BulletTrain(4, 2, 1, **RULES[rule], process_group=dist.group.WORLD)
    result = []
    for seed, sizes in enumerate(rounds):
        own = minibatches(sizes, seed, dtype)[dist.get_rank()]
        result.append(mined(bullet, *own) | states(bullet))
    return result


def alone(rule, rounds, dtype):
    bullet = BulletTrain(4, 2, 1, **RULES[rule])
    result = []
    for seed, sizes in enumerate(rounds):
        whole = [torch.cat(parts) for parts in zip(*minibatches(sizes, seed, dtype), strict=True)]
        result.append(mined(bullet, *whole) | states(bullet))
    return result


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("rounds", "dtype"),
    [
        ([(8, 8)] * 5, torch.float32),
        ([(7, 9), (9, 3), (1, 9)], torch.float64),
        ([(6, 6, 6, 6)] * 3 + [(6, 1, 2, 5)], torch.float64),
    ],
    ids=["2 ranks", "2 uneven ranks", "4 ranks"],
)
def test_the_groups_are_those_of_one_process_with_all_samples(rule, rounds, dtype):
    count = len(rounds[0])
    of_ranks, expected = run_ranks(count, together, rule, rounds, dtype), alone(rule, rounds, dtype)
    for step, one in enumerate(expected):
        each = [of_rank[step] for of_rank in of_ranks]
        for name in ("group", "steps", "step_size"):
            assert torch.equal(torch.cat([e[name] for e in each]), one[name])
        for e, m in zip(each, rounds[step], strict=True):
            assert torch.equal(e["threshold"], one["threshold"])
            assert torch.equal(e["order"], e["steps"].sort(descending=True, stable=True).indices)
            assert e["active"] == tuple(int((e["steps"] > t).sum()) for t in range(4))
            assert e["sizes"] == tuple(int((e["group"] == group).sum()) for group in range(3))
            assert e["spread"].tolist() == [torch.bincount(other["steps"], minlength=5).tolist() for other in each]
            assert e["spread"].sum(dim=1).tolist() == list(rounds[step])
            assert m == len(e["group"])
            for name in ("robust_fraction", "group_counts", "unreported_faults", "mean_steps"):
                assert e[name] == one[name] if name == "mean_steps" else torch.equal(e[name], one[name])


# An error on one rank is raised on all


def with_a_fault(where, rank_of_fault):
    """Returns the errors of three assignments, of which the second is faulty on one rank."""
    bullet, messages = BulletTrain(process_group=dist.group.WORLD), []
    for step in range(3):
        z, z_adv, y = minibatches((4, 4), step)[dist.get_rank()]
        faulty = step == 1 and dist.get_rank() == rank_of_fault
        if faulty and where == "logits":
            z[2] = torch.nan
        if faulty and where == "labels":
            y[1] = 7
        if faulty and where == "corrupted logits":
            z_adv[0] = torch.nan
        if faulty and where == "too many":
            z, z_adv, y = (torch.cat([v, v]) for v in (z, z_adv, y))
        before = states(bullet)
        try:
            bullet.plan(z, y)
            messages.append(None)
        except ValueError as error:
            messages.append(str(error))
        bullet.observe(z_adv, y.clamp(max=4))
        if messages[-1] is not None:
            assert torch.equal(states(bullet)["group_counts"], before["group_counts"])
    bullet.finish()
    return messages, float(bullet.robust_fraction)


@pytest.mark.parametrize(
    ("where", "step", "message"),
    [
        ("logits", 1, "rank 1: logits must be finite, but 1 of 4 rows"),
        ("labels", 1, "rank 1: labels must lie in 0..4, but 1 of 4 do not"),
        ("corrupted logits", 2, "an earlier update met NaN logits"),
        ("too many", 1, "rank 1: minibatches must have at most 4 samples"),
    ],
)
def test_a_fault_of_one_rank_is_raised_on_all_and_the_next_minibatch_is_sound(where, step, message):
    (first, f_r), (second, same) = run_ranks(2, with_a_fault, where, 1)
    assert [result and result.split(": samples")[0] for result in second] == first
    assert (where == "logits") == str(second[step]).endswith(": samples 2")  # only the rank itself knows the samples
    assert f_r == same
    assert [result is not None for result in first] == [k == step for k in range(3)]
    assert first[step].startswith(message)


# Its state


def saved_by_one_rank():
    """Lets rank 0 alone save, copy and print while a sum is in progress; then both go on."""
    bullet = BulletTrain(process_group=dist.group.WORLD)
    z, z_adv, y = minibatches((4, 4), 0)[dist.get_rank()]
    bullet.plan(z, y)
    bullet.observe(z_adv, y)
    result = {}
    if dist.get_rank() == 0:
        file = io.BytesIO()
        torch.save(bullet.state_dict(), file)
        result["saved"] = torch.load(io.BytesIO(file.getvalue()), weights_only=True)["robust_fraction"]
        twin = copy.deepcopy(bullet)
        assert twin.ranks is bullet.ranks
        result["copied"] = twin.robust_fraction.clone()
    bullet.plan(z, y)
    return result | {"robust_fraction": bullet.robust_fraction.clone()}


def test_one_rank_saves_what_all_have():
    first, second = run_ranks(2, saved_by_one_rank)
    assert first["saved"] == first["copied"] == first["robust_fraction"] == second["robust_fraction"] > 0


def after_a_skipped_minibatch(group):
    """Returns F_R, the groups and the pending errors after six minibatches, of which the fourth has NaN gradients."""
    model, mining = build("conv_bn"), BulletTrain(2, 1, 0, process_group=group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    guard = Guard(optimizer, model, mining, non_finite="skip", process_group=group)
    for k in range(6):
        x, y = batch(8, seed=k)
        with guard.minibatch():
            loss = trades_loss(model, x, y, optimizer, 0.02, 0.05, bullet=mining)
            loss.backward()
            if k == 3:
                next(model.parameters()).grad.fill_(torch.nan)
            guard.step(loss)
    guard.settle()
    mining.finish()
    assert len(guard.skipped) == 1
    return {name: value.clone() for name, value in mining.state_dict().items()}


def guarded_together():
    return after_a_skipped_minibatch(dist.group.WORLD)


def test_a_minibatch_that_is_skipped_moves_nothing_with_a_group_either():
    expected = after_a_skipped_minibatch(None)
    (result,) = run_ranks(1, guarded_together)
    assert all(torch.equal(result[name], value) for name, value in expected.items())


def test_what_is_no_process_group_is_refused():
    with pytest.raises(TypeError, match="process_group must be"):
        BulletTrain(process_group="world")


def with_an_oracle():
    BulletTrain(policy="oracle", process_group=dist.group.WORLD)


def test_an_oracle_has_no_group():
    with pytest.raises(RankError, match="policy must not be an Oracle in a process group"):
        run_ranks(1, with_an_oracle)


def with_a_gradient_of_nan():
    """Returns the errors of three minibatches; in the second, rank 1 has images without a gradient."""
    model, messages = build(Undefined), []
    bullet = BulletTrain(2, 1, 0, process_group=dist.group.WORLD)
    for step in range(3):
        x, y = with_bright([1, 2] if dist.get_rank() == 1 and step == 1 else [])
        try:
            trades_loss(model, x, y, None, 0.02, 0.05, bullet=bullet)
            messages.append(None)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_gradients_of_nan_on_one_rank_are_raised_on_all_by_the_next_minibatch():
    first, second = run_ranks(2, with_a_gradient_of_nan)
    assert first[:2] == second[:2] == [None, None]
    assert second[2] == f"{first[2]}: samples 2"
    assert first[2].startswith("the model's input gradient must be finite, but held NaN for ")


# On a device the host waits only for the counts


class Told(Ranks):
    """Pretends two ranks without processes: the collectives are queued and never looked at."""

    def __init__(self):
        self.group, self.rank, self.count, self.rows = None, 1, 2, 6

    def start_sum(self, numbers):
        return lambda: numbers


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_ranks_together_wait_for_their_device_once(rules):
    bullet = BulletTrain(3, 2, 0, **rules).to(DEVICE)
    bullet.ranks = Told()
    z, y = torch.randn(6, 4, device=DEVICE), torch.zeros(6, dtype=torch.int64, device=DEVICE)
    with mock.patch.object(ranks, "_all_gather"), pretended_device([4, 3, 1, 2, 3, 1]) as reads:
        for count in (1, 2):
            waited = reads.waited
            started = bullet.start_plan(z, y)
            assert (reads.started, reads.waited) == (count, waited)
            assert started.active_counts == (4, 3, 1)
            assert started.group_sizes == (2, 3, 1)
            bullet.observe(z, y, faulty=torch.zeros(6, dtype=torch.int32, device=DEVICE))
        bullet.observe(z, y)
    assert reads.started == 2
    assert {t.device for t in (started.order, started.steps, started.step_size, started.threshold)} == {DEVICE}
