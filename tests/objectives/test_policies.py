"""The objectives with other metrics and policies equal a literal computation, one sample at a time."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_cases import DISTANCES, EACH, OBJECTIVES, moved_one_at_a_time
from pretended_device import DEVICE, counted_waits, pretended_device
from small_models import (
    SHAPE,
    Undefined,
    assert_unchanged,
    batch,
    build,
    snapshot,
    with_bright,
)
from test_objectives import assert_same_update, confident, own_labels, recorded, seeded, sgd
from tolerances import UPDATES, assert_near

from bt_fast import METRICS, POLICIES, BulletTrain, Frozen, Gaussian, Oracle, augmix_loss, trades_loss
from bt_fast.ops import GROUPS

STEPS = (5, 2, 1)


def literal_update(objective, model, x, y, starts, steps, skip, options):
    """Runs the authors' update on x' of any step counts, one sample at a time: loss, and the share still correct."""
    model.eval()
    x_adv = x.clone()
    for i, n in enumerate(steps):
        one = (x[i : i + 1], y[i : i + 1], starts[i : i + 1])
        alpha = objective.boundary_step(options, n) if n == STEPS[0] else 1.7 * options["epsilon"] / max(n, 1)
        if n:
            x_adv[i] = moved_one_at_a_time(objective, model, *one, n, alpha, options)[0]
    model.train()
    model.zero_grad()
    taken = [i for i, n in enumerate(steps) if n or not skip]
    loss, z_adv = objective.update(model, x, x_adv, y, taken, options.get("beta"))
    return loss, (z_adv.argmax(dim=1) == y).double().mean().item()


def by_entropy(z, y):
    """A custom metric."""
    p = z.softmax(dim=1)
    return torch.where(z.argmax(dim=1) == y, 1.0, -1.0) * (2.0 + (p * p.log()).sum(dim=1))


RULES = {
    "uniform": {"policy": "uniform"},
    "gaussian": {"policy": "gaussian", "metric": "cross_entropy"},
    "wide": {"policy": Gaussian(3.0), "metric": "margin"},
    "own": {"policy": lambda judged: (judged.group * 2 + judged.correct) % 6, "metric": by_entropy},
    "ramp": {"policy": lambda judged: torch.arange(len(judged.group)) % 6},
}


CASES = [
    pytest.param(objective, unperturbed, id=f"{objective}-{unperturbed}")
    for objective in OBJECTIVES
    for unperturbed in (("keep", "skip") if objective.robust else (None,))
]


@pytest.mark.parametrize(("objective", "unperturbed"), CASES)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("rule", RULES)
def test_any_counts_are_the_authors_update_one_sample_at_a_time(objective, rule, distance, unperturbed):
    models, bullet = [confident(), confident()], BulletTrain(*STEPS, **RULES[rule])
    bullet.robust_fraction.fill_(0.4)
    options = objective.options(distance) | {"perturb_steps": STEPS[0]}
    chosen = {"unperturbed": unperturbed} if unperturbed else {}
    x, _ = batch(9)
    y, total = own_labels(models[0], x), 0
    f_r = bullet.robust_fraction.item()
    for seed in (0, 1):
        models[0].eval()
        steps = copy.deepcopy(bullet).plan(models[0](x).detach(), y).steps.tolist()
        starts = objective.starts(x, seeded(seed), options)
        loss, held = literal_update(objective, models[0], x, y, starts, steps, unperturbed == "skip", options)
        ours = objective.loss(
            models[1], x, y, sgd(models[1]), **options, **chosen, bullet=bullet, generator=seeded(seed)
        )
        assert_same_update(models, loss, ours)
        f_r = 0.9 * f_r + 0.1 * 0.8 * held
        assert_near(bullet.robust_fraction, f_r)
        total += sum(steps)
    assert bullet.steps_assigned.item() == total
    assert bullet.mean_steps == total / 18


# The oracle


def told_by_attack(objective, model, x, y, starts, k, options):
    """Returns the groups of Fig. 2, one sample at a time: is it right before, and under a k-step attack?"""
    model.eval()
    groups = []
    for i in range(len(x)):
        one = (x[i : i + 1], y[i : i + 1], starts[i : i + 1])
        moved = moved_one_at_a_time(objective, model, *one, k, 1.7 * options["epsilon"] / k, options)
        right = [model(image).argmax().item() == y[i] for image in (x[i : i + 1], moved)]
        groups.append("outlier" if not right[0] else "robust" if right[1] else "boundary")
    return groups


@pytest.mark.parametrize("k", [10, 3])
@pytest.mark.parametrize("distance", DISTANCES)
@EACH
def test_the_oracle_s_groups_come_from_an_attack_and_its_update_is_algorithm_2(objective, distance, k):
    """One generator draws the training attack's start first, the oracle's next."""
    models, bullet = [confident(), confident()], BulletTrain(*STEPS, policy=Oracle(k))
    options = objective.options(distance) | {"perturb_steps": STEPS[0]}
    options["epsilon"] *= {"l_inf": 4, "l_2": 2}[distance]  # so that all three groups occur
    x, _ = batch(12)
    y, generator = own_labels(models[0], x), seeded(3)
    starts, of_oracle = (objective.starts(x, generator, options) for _ in range(2))
    groups = told_by_attack(objective, models[0], x, y, of_oracle, k, options)
    steps = [dict(zip(("boundary", "robust", "outlier"), STEPS, strict=True))[g] for g in groups]
    loss, held = literal_update(objective, models[0], x, y, starts, steps, False, options)
    ours = objective.loss(models[1], x, y, None, **options, bullet=bullet, generator=seeded(3))
    assert set(groups) == set(GROUPS)
    assert bullet.group_counts.tolist() == [groups.count(g) for g in GROUPS]
    assert_same_update(models, loss, ours)
    assert_near(bullet.robust_fraction, 0.1 * 0.8 * held)


def test_the_oracle_without_a_seeded_generator_repeats_with_the_seed_of_torch():
    def once(seed):
        model = confident()
        torch.manual_seed(seed)
        return trades_loss(model, *batch(), None, bullet=BulletTrain(policy="oracle")).item()

    assert once(1) == once(1) != once(2)


@EACH
def test_the_oracle_costs_its_steps_and_one_forward_more(objective):
    model = confident()
    forwards = recorded(model)
    objective.loss(model, *batch(), None, perturb_steps=3, bullet=BulletTrain(3, 0, 0, policy=Oracle(4)))
    rows = [len(x) for x in forwards[False]]
    assert rows[:6] == [8] * 6  # the clean forward, four steps, the attacked forward
    assert all(n < 8 for n in rows[6:])
    assert len(rows) <= 6 + 3


@EACH
def test_a_gradient_with_nan_in_the_oracle_s_attack_is_an_error_and_nothing_changes(objective):
    model, bullet = build(Undefined), BulletTrain(3, 0, 0, policy="oracle")
    x, _ = with_bright([1, 4])
    before = snapshot(model, bullet)
    wrong = (model.eval()(x).argmax(dim=1) + 1) % 5  # only outliers: without the oracle they take no step
    model.train()
    with pytest.raises(ValueError, match=r"input gradient must be finite, but held NaN for 2 of 8 samples"):
        objective.loss(model, x, wrong, None, perturb_steps=3, bullet=bullet)
    assert_unchanged(before, model, bullet)


# One read; bad input; AugMix


@pytest.mark.parametrize("policy", POLICIES)
@EACH
def test_one_read_a_call_on_a_device(objective, policy):
    model = build("conv_bn", dtype=torch.float32).to(DEVICE)
    x, y = torch.empty(8, *SHAPE, device=DEVICE), torch.zeros(8, dtype=torch.int64, device=DEVICE)
    bullet = BulletTrain(3, 1, 0, metric="gradient_norm", policy=policy).to(DEVICE)
    with pretended_device(plan=[5, 2, 2, 3, 2, 3]) as reads:
        objective.loss(model, x, y, sgd(model), perturb_steps=3, bullet=bullet).backward()
        assert reads.started == reads.waited == 1


@pytest.mark.parametrize("policy", POLICIES)
def test_reads_on_the_cpu(policy):
    with counted_waits() as waits:
        trades_loss(confident(), *batch(), None, bullet=BulletTrain(policy=policy))
    assert len(waits) == 3


@pytest.mark.parametrize("policy", ["oracle", "gaussian", "uniform"])
@EACH
def test_bad_input_is_reported_as_with_three_groups(objective, policy):
    model, bullet = build(), BulletTrain(policy=policy)
    x, y = batch()
    before = snapshot(model, bullet)
    spoilt = build()
    with torch.no_grad():
        spoilt[-1].bias.fill_(torch.nan)
    for images, labels, body, message in [
        (x + 1, y, model, "x_natural must lie in"),
        (x, y + 3, model, "y must lie in 0..4"),
        (x, y, spoilt, "the model's logits must be finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            objective.loss(body, images, labels, None, bullet=bullet)
    assert_unchanged(before, model, bullet)


@pytest.mark.parametrize(
    "options", [{"policy": lambda judged: judged.group + 11}, {"metric": lambda z, y: z[:, 0] * torch.nan}]
)
@EACH
def test_a_metric_or_policy_that_is_wrong_changes_nothing(objective, options):
    model, bullet = build(), BulletTrain(**options)
    optimizer = sgd(model)
    before = snapshot(model, bullet)
    with pytest.raises(ValueError, match=next(iter(options))):
        objective.loss(model, *batch(), optimizer, bullet=bullet)
    assert_unchanged(before, model, bullet)


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(OBJECTIVES), st.sampled_from(list(METRICS)), st.sampled_from(list(POLICIES)))
def test_with_a_frozen_view_the_update_is_the_same_up_to_rounding(objective, metric, policy):
    losses = []
    for frozen in (None, Frozen()):
        bullet = BulletTrain(3, 1, 0, metric=metric, policy=policy)
        x, y = batch()
        given_ = {"perturb_steps": 3, "bullet": bullet, "generator": seeded(1), "frozen": frozen}
        losses.append(objective.loss(confident(), x, y, None, **given_).detach())
    assert_near(losses[1], losses[0], UPDATES)


def images(m=6):
    return torch.rand(m, 3, 8, 8, generator=seeded(0)), torch.arange(m) % 5


def classifier():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5))


@pytest.mark.parametrize("metric", METRICS)
def test_augmix_augments_whom_any_policy_gives_a_step(metric):
    x, y = images()
    for policy, share in [("three_groups", None), ("uniform", 1.0), (lambda judged: 1 - judged.group % 2, None)]:
        bullet, model = BulletTrain(1, 0, 0, metric=metric, policy=policy), classifier()
        forwards = recorded(model)
        augmix_loss(model, x, y, bullet=bullet).backward()
        views = sum(map(len, forwards[True])) - len(x)
        assert views == 2 * len(x) * (bullet.fractions.boundary if policy == "three_groups" else bullet.mean_steps)
        assert share is None or bullet.mean_steps == share


def test_augmix_has_no_attack_for_an_oracle():
    model, bullet = classifier(), BulletTrain(1, 0, 0, policy="oracle")
    before = snapshot(model, bullet)
    with pytest.raises(ValueError, match="bullet's policy must not be an Oracle"):
        augmix_loss(model, *images(), bullet=bullet)
    assert_unchanged(before, model, bullet)


def test_augmix_gives_the_counts_back_when_a_view_s_logits_fail():
    class Failing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.calls = classifier(), 0

        def forward(self, x):
            self.calls += 1
            if self.calls > 1:
                raise ArithmeticError("the model's own")
            return self.body(x)

    model, bullet = Failing(), BulletTrain(1, 0, 0, policy="uniform")
    before = snapshot(model, bullet)
    with pytest.raises(ArithmeticError):
        augmix_loss(model, *images(), bullet=bullet)
    assert_unchanged(before, model, bullet)
