"""Half of the robust samples stand for all: against the update written out, one sample at a time, in float64."""

import copy
import itertools
import math
import pickle
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gloo_ranks import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_cases import DISTANCES, EACH, OBJECTIVES, moved_one_at_a_time
from small_models import Undefined, batch, gradients, with_bright
from test_objectives import assert_same_update, confident, own_labels, recorded, seeded, sgd
from tolerances import assert_near, assert_near_nested
from torch import distributed as dist
from torch import nn

from bt_fast import (
    AWP,
    PGD,
    AdversarialLoss,
    AugMixLoss,
    BulletTrain,
    HalfDrawn,
    MARTLoss,
    Memory,
    PGDLoss,
    TRADESLoss,
    perturb,
)
from bt_fast.ops import GROUPS
from bt_fast.robust_half import weights_of_half

HALVES = ["all", "half"]  # who of the robust samples is attacked


def halving(boundary, robust, outlier, attacked, **options):
    return BulletTrain(boundary, HalfDrawn(robust, attacked), outlier, **options)


def judged(model, x, y, f_r):
    """The group of each sample by Eq. 4 to 6."""
    model.eval()
    svar = []
    for x_i, y_i in zip(x, y, strict=True):
        p = model(x_i[None]).softmax(dim=1)[0].detach().numpy()
        svar.append((1 if p.argmax() == y_i else -1) * p.var())
    threshold = max(0.0, np.quantile(svar, 1 - f_r))
    return ["outlier" if s < 0 else "robust" if f_r > 0 and s >= threshold else "boundary" for s in svar]


def permutation(m, generator):
    """The order in which samples are drawn."""
    return torch.rand(m, dtype=torch.float64, generator=generator).argsort()


def permuted(order):
    """In the block samples are drawn in this order."""
    return mock.patch.object(torch, "rand", return_value=torch.tensor(order).argsort().double())


def weights_of(groups, order):
    """The first half of the robust samples in the order count n/⌈n/2⌉ times, the others not at all."""
    robust = [i for i in order.tolist() if groups[i] == "robust"]
    half = math.ceil(len(robust) / 2)
    counts = {i: len(robust) / half if place < half else 0.0 for place, i in enumerate(robust)}
    return [counts.get(i, 1.0) for i in range(len(groups))]


def mart_of_one(z, z_adv, y, beta):
    """MART's loss of one sample, of logits [K]."""
    p, q = z.softmax(0), z_adv.softmax(0)
    runner_up = max(q[k] for k in range(len(q)) if k != y)
    kl = sum(p[k] * (p[k].log() - (q[k] + 1e-12).log()) for k in range(len(q)))
    return -q[y].log() - (1.0001 - runner_up + 1e-12).log() + beta * kl * (1.0000001 - p[y])


def written_out(objective, model, x, x_adv, y, taken, weights, beta):
    """The loss and z' of the update, in which the samples `taken` run the adversarial forward."""
    m = len(x)
    joined = taken if len(taken) != 1 else taken + [i for i in range(m) if i not in taken][:1]
    if objective.name == "pgd":
        z_adv = dict(zip(joined, model(x_adv[joined]), strict=True))
        return sum(weights[i] * F.cross_entropy(z_adv[i], y[i]) for i in taken) / m, z_adv
    z = model(x)
    z_adv = dict(enumerate(z)) | (dict(zip(taken, model(x_adv[joined]), strict=False)) if taken else {})
    if objective.name == "mart":
        return sum(weights[i] * mart_of_one(z[i], z_adv[i], y[i], beta) for i in range(m)) / m, z_adv
    model(x)
    kl = [F.kl_div(z_adv[i].log_softmax(0), z[i].softmax(0), reduction="sum") for i in range(m)]
    return F.cross_entropy(z, y) + beta / m * sum(w * k for w, k in zip(weights, kl, strict=True)), z_adv


def literal(objective, model, x, y, seed, f_r, policy, attacked, skip, options, groups=None):
    """Loss, the weighted share of correct x', groups, weights and steps."""
    generator = seeded(seed)
    starts = objective.starts(x, generator, options)
    groups = groups or judged(model, x, y, f_r)
    weights = weights_of(groups, permutation(len(x), generator))
    by_group, x_adv, steps = dict(zip(("boundary", "robust", "outlier"), policy, strict=True)), x.clone(), []
    model.eval()
    for i, group in enumerate(groups):
        n = by_group[group] if weights[i] or attacked == "all" else 0
        alpha = objective.boundary_step(options, n) if group == "boundary" else 1.7 * options["epsilon"] / max(n, 1)
        if n:
            one = (x[i : i + 1], y[i : i + 1], starts[i : i + 1])
            x_adv[i] = moved_one_at_a_time(objective, model, *one, n, alpha, options)[0]
        steps.append(n)
    taken = [i for i, n in enumerate(steps) if weights[i] and (n or not skip)]
    model.train()
    model.zero_grad()
    loss, z_adv = written_out(objective, model, x, x_adv, y, taken, weights, options.get("beta"))
    right = sum(w for i, w in enumerate(weights) if w and z_adv[i].argmax() == y[i])
    return loss, right / len(x), groups, weights, steps


POLICIES = [(5, 2, 0), (1, 1, 0), (2, 4, 3), (3, 0, 1)]
CASES = [
    pytest.param(objective, policy, skip, id=f"{objective}-{policy}-{'skip' if skip else 'keep'}")
    for objective in OBJECTIVES
    for policy in POLICIES
    for skip in ((False, True) if objective.robust and policy[1] else (False,))
]


@pytest.mark.parametrize("attacked", HALVES)
@pytest.mark.parametrize(("objective", "policy", "skip"), CASES)
def test_an_update_is_the_weighted_loss_of_those_that_are_drawn(objective, policy, skip, attacked):
    distance = DISTANCES[policy == (5, 2, 0) and objective.name == "trades"]
    models = [confident(), confident()]
    optimizers = [sgd(m) for m in models]
    bullet = halving(*policy, attacked, unperturbed="skip" if skip else None if objective.robust else "keep")
    bullet.robust_fraction.fill_(0.5)
    options = objective.options(distance) | {"perturb_steps": policy[0]}
    f_r, total, counts = 0.5, 0, dict.fromkeys(GROUPS, 0)
    forwards = recorded(models[1])
    for k in range(3):
        x, _ = batch(11, seed=k)
        y = own_labels(models[0], x)
        case = (objective, models[0], x, y, k, f_r, policy, attacked, skip, options)
        loss, right, groups, weights, steps = literal(*case)
        forwards[True].clear()
        ours = objective.loss(models[1], x, y, optimizers[1], **options, bullet=bullet, generator=seeded(k))
        assert_same_update(models, loss, ours)
        f_r = 0.9 * f_r + 0.1 * 0.8 * right
        assert_near(bullet.robust_fraction, f_r)
        rows = sum(w > 0 and (n > 0 or not skip) for w, n in zip(weights, steps, strict=True))
        assert len(forwards[True][-1]) == rows
        for group in groups:
            counts[group] += 1
        total += (
            sum(steps)
            if attacked == "half"
            else sum(dict(zip(("boundary", "robust", "outlier"), policy, strict=True))[g] for g in groups)
        )
        for optimizer in optimizers:
            optimizer.step()
    assert counts["robust"] > 6
    assert bullet.group_counts.tolist() == [counts[g] for g in GROUPS]
    assert bullet.mean_steps == pytest.approx(total / 33, rel=1e-12)


@EACH
@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 10),
    st.floats(0, 1),
    st.tuples(*[st.integers(0, 3)] * 3),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_any_batch_and_policy(objective, m, f_r, policy, skip, before, seed):
    skip = skip and objective.robust and policy[1] > 0
    models, attacked = [confident(seed=seed), confident(seed=seed)], "half" if before else "all"
    x, y = batch(m, seed)
    bullet = halving(*policy, attacked, unperturbed="skip" if skip else "keep")
    bullet.robust_fraction.fill_(f_r)
    options = objective.options("l_inf") | {"perturb_steps": policy[0]}
    loss, right, *_ = literal(objective, models[0], x, y, seed, f_r, policy, attacked, skip, options)
    ours = objective.loss(models[1], x, y, None, **options, bullet=bullet, generator=seeded(seed))
    assert_same_update(models, loss, ours)
    assert_near(bullet.robust_fraction, 0.9 * f_r + 0.08 * right)


RULES = {
    "any counts": {"policy": lambda judged: torch.arange(len(judged.group)) % 4},
    "the group's": {"policy": lambda judged: judged.group + 1, "metric": "margin"},
}


@pytest.mark.parametrize(
    ("objective", "skip"),
    [(objective, skip) for objective in OBJECTIVES for skip in (False, True) if objective.robust or not skip],
    ids=str,
)
@pytest.mark.parametrize("rule", RULES)
def test_a_policy_s_robust_samples_are_halved_whatever_their_steps(objective, rule, skip):
    models = [confident(), confident()]
    bullet = halving(3, 2, 1, "all", unperturbed="skip" if skip else "keep", **RULES[rule])
    bullet.robust_fraction.fill_(0.5)
    options = objective.options("l_inf") | {"perturb_steps": 3}
    x, _ = batch(11)
    y = own_labels(models[0], x)
    models[0].eval()
    plan = copy.deepcopy(bullet).plan(models[0](x).detach(), y)
    groups = [GROUPS[g] for g in plan.group.tolist()]
    generator = seeded(3)
    starts = objective.starts(x, generator, options)
    weights = weights_of(groups, permutation(11, generator))
    x_adv, steps = x.clone(), plan.steps.tolist()
    for i, n in enumerate(steps):
        alpha = objective.boundary_step(options, n) if n == 3 else 1.7 * options["epsilon"] / max(n, 1)
        one = (x[i : i + 1], y[i : i + 1], starts[i : i + 1])
        x_adv[i] = moved_one_at_a_time(objective, models[0], *one, n, alpha, options)[0] if n else x[i]
    models[0].train()
    taken = [i for i, n in enumerate(steps) if weights[i] and (n or not skip)]
    loss, _ = written_out(objective, models[0], x, x_adv, y, taken, weights, options.get("beta"))
    assert any(n > 0 and not w for n, w in zip(steps, weights, strict=True))
    ours = objective.loss(models[1], x, y, None, **options, bullet=bullet, generator=seeded(3))
    assert_same_update(models, loss, ours)
    assert bullet.steps_assigned == sum(steps)


# What the draw is worth


def frozen_norms(model):
    """In train mode, but for its batch norms: each forward has the same statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


LOSSES = {
    "TRADES": lambda **o: TRADESLoss(PGD(0.1, 0.03, 3), 6.0, engine="exact", **o),
    "MART": lambda **o: MARTLoss(PGD(0.1, 0.03, 3), 5.0, engine="exact", **o),
    "MART, smoothed": lambda **o: MARTLoss(PGD(0.1, 0.03, 3), 5.0, engine="exact", label_smoothing=0.1, **o),
    "PGD": lambda **o: PGDLoss(PGD(0.1, 0.03, 3), engine="exact", **o),
    "PGD, smoothed": lambda **o: PGDLoss(PGD(0.1, 0.03, 3), engine="exact", label_smoothing=0.1, **o),
}


@pytest.mark.parametrize("attacked", HALVES)
@pytest.mark.parametrize("name", LOSSES)
def test_at_fixed_statistics_the_mean_over_all_draws_is_the_loss_of_all(name, attacked):
    x, _ = batch(9)
    model = frozen_norms(confident())
    y = own_labels(model, x)

    def once(bullet, order):
        twin = frozen_norms(copy.deepcopy(model))
        bullet.robust_fraction.fill_(0.6)
        with permuted(order):
            loss = LOSSES[name](mining=bullet)(twin, x, y, generator=seeded(0))
        loss.backward()
        return bullet, torch.cat([loss.detach()[None], *(p.grad.flatten() for p in twin.parameters())])

    bullet, whole = once(BulletTrain(3, 2, 0), range(9))
    robust_ones = [i for i, group in enumerate(judged(copy.deepcopy(model), x, y, 0.6)) if group == "robust"]
    assert len(robust_ones) == 5
    others = [i for i in range(9) if i not in robust_ones]
    results, moved = [], []
    for drawn in itertools.combinations(robust_ones, 3):
        half, values = once(halving(3, 2, 0, attacked), [*drawn, *others, *(i for i in robust_ones if i not in drawn)])
        results.append(values)
        moved.append(half.robust_fraction)
    assert_near(torch.stack(results).mean(dim=0), whole)
    assert_near(torch.stack(moved).mean(), bullet.robust_fraction)
    assert torch.stack(results).std(dim=0).max() > 1e-3


@pytest.mark.parametrize("n", range(8))
def test_each_robust_sample_is_drawn_alike(n):
    robust = torch.tensor([True, False] * n, dtype=torch.bool)
    weights = torch.stack([weights_of_half(robust, seeded(k)) for k in range(600)])
    half = math.ceil(n / 2)
    assert (weights[:, 1::2] == 1).all()
    assert ((weights[:, ::2] > 0).sum(dim=1) == half).all()
    assert_near(weights.sum(dim=1), torch.full((600,), 2.0 * n))
    if n:
        assert ((weights[:, ::2] > 0).double().mean(dim=0) - half / n).abs().max() < 0.09  # more than four deviations


def test_the_draw_is_the_generator_s_also_of_numbered_samples_and_nothing_is_drawn_without_the_option():
    x, _ = batch(9)
    model = confident()
    y = own_labels(model, x)

    def once(seed, robust_steps=None, indices=None):
        bullet, generator = BulletTrain(3, robust_steps or HalfDrawn(2), 0), seeded(seed)
        bullet.robust_fraction.fill_(0.8)
        criterion = TRADESLoss(PGD(0.1, 0.03, 3), mining=bullet)
        losses = [criterion(copy.deepcopy(model), x, y, indices, generator=generator).item() for _ in range(2)]
        return losses, generator.get_state()

    assert once(1)[0] == once(1)[0] != once(2)[0]
    number = torch.arange(9)
    first, second = once(1, indices=number)[0]
    assert [first, second] == once(1, indices=number)[0]
    assert torch.equal(once(1, 2, number)[1], seeded(1).get_state())
    generator = seeded(1)
    for _ in range(2):
        torch.randint(torch.iinfo(torch.int64).max, (2,), generator=generator)
    assert torch.equal(once(1, 2)[1], generator.get_state())


# What goes on around it


@pytest.mark.parametrize("attacked", HALVES)
@pytest.mark.parametrize("kind", [TRADESLoss, MARTLoss, PGDLoss])
def test_a_further_pass_has_the_same_half_and_the_same_x(kind, attacked):
    x, _ = batch(9)
    model = frozen_norms(confident())
    y = own_labels(model, x)
    bullet = halving(3, 2, 0, attacked)
    bullet.robust_fraction.fill_(0.8)
    criterion = kind(PGD(0.1, 0.03, 3), mining=bullet, engine="exact")
    numbers, generator = torch.arange(9), seeded(0)  # these and its seed decide the starts: only the half is drawn
    first = criterion(model, x, y, numbers, generator=generator)
    seen, f_r = criterion.last, bullet.robust_fraction.clone()
    with criterion.again():
        assert_near(criterion(model, x, y, numbers, generator=generator), first.detach())
    assert torch.equal(criterion.last.x_adv, seen.x_adv)
    with criterion.again(reuse=False):
        losses = {round(criterion(model, x, y, numbers, generator=generator).item(), 9) for _ in range(6)}
    assert len(losses) > 1
    assert torch.equal(bullet.robust_fraction, f_r)


def test_weights_and_x_of_a_further_term_are_in_the_caller_s_order():
    x, _ = batch(11)
    model = confident()
    y, seen = own_labels(model, x), []
    for attacked, kind in itertools.product(HALVES, (TRADESLoss, PGDLoss)):
        bullet = halving(3, 2, 0, attacked)
        bullet.robust_fraction.fill_(0.8)

        def extra(batch):
            seen.append(batch)
            return batch.adversarial_logits.mean() * 0

        groups = judged(copy.deepcopy(model), x, y, 0.8)
        criterion = kind(PGD(0.1, 0.03, 3), mining=bullet, extra=extra, engine="exact")
        criterion(model, x, y).backward()
        given, last = seen.pop(), criterion.last
        if kind is TRADESLoss:
            assert torch.equal(given.x, x)
            assert torch.equal(given.x_adv, last.x_adv)
            assert torch.equal(given.y, y)
            assert [w == 1 for w in given.weights] == [g != "robust" for g in groups]
            assert torch.equal(last.adversarial_logits[given.weights == 0], last.logits[given.weights == 0])
        else:
            assert (given.weights > 0).all()
            assert len(given.weights) == 11 - groups.count("robust") // 2
            places = [(x == one).flatten(1).all(dim=1).nonzero().item() for one in given.x]
            assert torch.equal(given.x_adv, last.x_adv[places])
            assert torch.equal(given.adversarial_logits.detach(), last.adversarial_logits[places])


@pytest.mark.parametrize(("attacked", "order"), [("all", (7, 6, 5, 3, 2, 1, 0, 4)), ("half", (4, 7, 6, 5, 3, 2, 1, 0))])
@pytest.mark.parametrize("outlier", [0, 2])
def test_nan_in_a_gradient_is_reported_of_the_sample_that_has_it(attacked, order, outlier):
    """Also of one that is attacked, and then left out."""
    x, y = with_bright([4])
    model = confident(Undefined)
    y = own_labels(model, x)
    bullet = halving(3, 2, outlier, attacked)
    bullet.robust_fraction.fill_(0.9)
    criterion = TRADESLoss(PGD(0.1, 0.03, 3), mining=bullet, engine="exact")
    with permuted(list(order)), pytest.raises(ValueError, match=r"input gradient must be finite.*samples?:? ?4$"):
        criterion(model, x, y, generator=seeded(0))


def test_a_script_gets_the_weights_and_f_r_moves_by_them():
    x, _ = batch(11)
    model = confident()
    y = own_labels(model, x)
    bullet = halving(3, 2, 0, "all")
    bullet.robust_fraction.fill_(0.5)
    made = perturb(model, x, y, PGD(0.1, 0.03, 3), bullet, generator=seeded(1), return_details=True)
    z_adv = copy.deepcopy(model).eval()(made.x_adv)
    bullet.observe(z_adv, y)
    right = (made.weights * (z_adv.argmax(dim=1) == y)).sum() / 11
    assert_near(bullet.robust_fraction, 0.45 + 0.08 * right)
    assert set(made.weights[made.group == 2].tolist()) > {0.0}
    assert (made.weights[made.group != 2] == 1).all()
    made = perturb(model, x, y, PGD(0.1, 0.03, 3), BulletTrain(3, 2, 0), return_details=True)
    assert made.weights is None
    made = perturb(model, x, y, PGD(0.1, 0.03, 3), bullet, return_details=True)
    with pytest.raises(ValueError, match="adversarial_logits must have a row for each of the 11 planned"):
        bullet.observe(z_adv[:4], y[:4])


def test_awp_around_it_is_the_two_passes_on_one_half():
    x, _ = batch(9)
    model = confident()
    y = own_labels(model, x)
    bullet = halving(3, 2, 0, "all", unperturbed="skip")
    bullet.robust_fraction.fill_(0.8)
    criterion = TRADESLoss(PGD(0.1, 0.03, 3), mining=bullet, engine="exact")
    seen = []
    original = TRADESLoss.weighted_objective

    def watched(self, clean, adversarial, y, weights):
        seen.append(weights)
        return original(self, clean, adversarial, y, weights)

    with mock.patch.object(TRADESLoss, "weighted_objective", watched), AWP(model)(criterion, x, y) as loss:
        loss.backward()
    assert len(seen) == 2
    assert torch.equal(*seen)
    f_r = bullet.robust_fraction.clone()
    with (
        pytest.raises(
            ValueError, match=r"robust_steps must be a number with AWP's samples='moved'.*write samples='all'"
        ),
        AWP(model, samples="moved")(criterion, x, y),
    ):
        pass
    assert torch.equal(bullet.robust_fraction, f_r)


class Plain(AdversarialLoss):
    def objective(self, clean_logits, adversarial_logits, y):
        return F.cross_entropy(adversarial_logits, y)


class Changed(TRADESLoss):
    """TRADES with another objective, but the weighted one of TRADES."""

    def objective(self, clean_logits, adversarial_logits, y):
        return super().objective(clean_logits, adversarial_logits, y) * 2


class Weighted(Plain):
    def weighted_objective(self, clean_logits, adversarial_logits, y, weights):
        return (F.cross_entropy(adversarial_logits, y, reduction="none") * weights).mean()


def test_bad_input():
    attack, half = PGD(0.1, 0.03, 10), BulletTrain(10, HalfDrawn(2))
    with pytest.raises(ValueError, match="attacked must be one of 'all', 'half', got 'none'"):
        HalfDrawn(2, "none")
    with pytest.raises(ValueError, match="steps must be at least 0, got -1"):
        HalfDrawn(-1)
    with pytest.raises(TypeError, match="steps must be an integer, got"):
        HalfDrawn(0.5)
    assert HalfDrawn(np.int64(2)) == HalfDrawn(2)
    for options in ({}, {"unperturbed": "skip"}):
        with pytest.raises(ValueError, match="robust_steps must be a number where robust samples take no steps"):
            BulletTrain(10, HalfDrawn(0), 0, **options)
    BulletTrain(10, HalfDrawn(0), 0, unperturbed="keep")
    BulletTrain(10, HalfDrawn(0), 0, policy="gaussian")
    for kind in (Plain, Changed):
        with pytest.raises(ValueError, match=f"robust_steps must be a number for {kind.__name__}, got HalfDrawn"):
            kind(attack, mining=half)
    Weighted(attack, mining=half)
    with pytest.raises(ValueError, match=r"mining's robust_steps must be 0, got HalfDrawn\(0\): AugMix"):
        AugMixLoss(BulletTrain(1, HalfDrawn(0), 0, policy="uniform"))
    x, y = batch()
    with pytest.raises(ValueError, match=r"robust_steps must be a number for x' alone.*return_details=True"):
        perturb(confident(), x, y, attack, half)


def test_it_is_written_and_copied_with_the_rest():
    bullet = halving(10, 2, 0, "half")
    assert "BulletTrain(10, HalfDrawn(2, attacked='half'), 0, gamma" in repr(bullet)
    assert repr(HalfDrawn(1)) == "HalfDrawn(1)"
    assert pickle.loads(pickle.dumps(bullet)).half_drawn == HalfDrawn(2, "half")
    assert BulletTrain(10, HalfDrawn(2)).robust_steps == 2
    bullet.robust_steps = 1
    assert "HalfDrawn(1, attacked='half')" in repr(bullet)
    old = BulletTrain().__getstate__()
    del old["_attacked"]
    loaded = BulletTrain.__new__(BulletTrain)
    loaded.__setstate__(old)
    assert loaded.half_drawn is None


# Ranks


def of_a_rank():
    """One minibatch of this rank: what its loss, gradients and F_R are."""
    rank = dist.get_rank()
    x, _ = batch(11, seed=rank)
    model = confident()
    y = own_labels(model, x)
    bullet = halving(3, 2, 1, "all", process_group=dist.group.WORLD, unperturbed="skip")
    bullet.robust_fraction.fill_(0.5)
    criterion = TRADESLoss(PGD(0.1, 0.03, 3), mining=bullet, engine="exact")
    plans = []
    original = BulletTrain.start_plan
    with mock.patch.object(BulletTrain, "start_plan", lambda *a, **k: plans.append(original(*a, **k)) or plans[0]):
        loss = criterion(model, x, y, generator=seeded(rank))
    loss.backward()
    bullet.finish()
    plan, last = plans[0], criterion.last
    kl = (last.logits.softmax(1) * (last.logits.log_softmax(1) - last.adversarial_logits.log_softmax(1))).sum(1)
    expected = F.cross_entropy(last.logits, y) + 6.0 / 11 * (plan.weights * kl).sum()
    right = (plan.weights * (last.adversarial_logits.argmax(1) == y)).sum()
    sizes = (plan.weights > 1).sum(), (plan.weights == 0).sum(), (plan.group == 2).sum()
    refused = ""
    try:
        halving(10, 2, 0, "half", process_group=dist.group.WORLD)
    except ValueError as error:
        refused = str(error)
    return loss.detach(), expected, right, bullet.robust_fraction, bullet.group_counts, *sizes, refused


def test_each_rank_draws_half_of_its_own_and_f_r_is_of_all():
    results = run_ranks(2, of_a_rank)
    right = sum(result[2] for result in results)
    for loss, expected, _, f_r, counts, drawn, left, robust, refused in results:
        assert_near(loss, expected)
        assert_near(f_r, 0.45 + 0.08 * right / 22)
        assert counts.sum() == 22
        assert (drawn, left) == (math.ceil(robust / 2), robust // 2) if robust > 1 else left == 0
        assert "robust_steps must have attacked='all' in a process group" in refused
    assert sum(result[7] for result in results) > 4


# Engines


@pytest.mark.parametrize("attacked", HALVES)
@EACH
def test_fast_is_exact_up_to_rounding(objective, attacked):
    x, _ = batch(11)
    result = {}
    for engine in ("exact", "fast"):
        model = confident()
        y = own_labels(model, x)
        bullet = halving(3, 2, 0, attacked)
        bullet.robust_fraction.fill_(0.6)
        options = objective.options("l_inf") | {"perturb_steps": 3}
        loss = objective.loss(model, x, y, None, **options, bullet=bullet, engine=engine, generator=seeded(0))
        loss.backward()
        result[engine] = {
            "loss": loss.detach(),
            "f_r": bullet.robust_fraction,
            **gradients(model),
            **dict(model.named_buffers()),
        }
    assert_near_nested(result["fast"], result["exact"], "updates")


def test_other_steps_are_taken_all_or_none():
    def steps():
        return bullet.boundary_steps, bullet.half_drawn, bullet.robust_steps, bullet.outlier_steps

    bullet = BulletTrain(10, HalfDrawn(2), 0, unperturbed="skip")
    attack, before = PGD(0.1, 0.03, 10), steps()
    for wrong in (
        lambda: bullet.take_steps(1, 0, 0),
        lambda: TRADESLoss(attack, mining=bullet, memory=Memory(9, steps=(1, 0, 0))),
    ):
        with pytest.raises(ValueError, match=r"^robust_steps must be a number where robust samples take no steps"):
            wrong()
        assert steps() == before
    for wrong, message in (((1.5, 1, 0), "^boundary_steps must be an int"), ((1, 1, -1), "^outlier_steps must be at")):
        with pytest.raises((TypeError, ValueError), match=message):
            bullet.take_steps(*wrong)
        assert steps() == before
    TRADESLoss(attack, mining=bullet, memory=Memory(9, steps=(2, 1, 0)))
    assert steps() == (2, HalfDrawn(1), 1, 0)
