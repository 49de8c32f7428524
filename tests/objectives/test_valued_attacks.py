"""APGD and the best iterate with all else that an attack may have: own sizes, soft labels, functions, statistics."""

import copy
from dataclasses import replace

import pytest
import reference_apgd
import torch
import torch.nn.functional as F
from plain_pgd import loss_of, projected_step
from small_models import assert_unchanged, batch, build, looked_at, snapshot

from bt_fast import APGD, PGD, BulletTrain, PerSample, PGDLoss, ThreatModel, TRADESLoss, perturb, units
from bt_fast.attack.start import given_start

RADII = {"linf": 0.1, "l2": 0.5}
NAMES = {"linf": "l_inf", "l2": "l_2"}
CLOSE = {"linf": {"rtol": 0, "atol": 1e-12}, "l2": {"rtol": 0, "atol": 1e-6}}  # in l2 rounding grows from step to step
M = 6


@pytest.fixture(autouse=True)
def no_warning_yet(monkeypatch):
    monkeypatch.setattr(units, "_warned", set())


def network(seed=0):
    model, (x, _) = looked_at(build("conv_bn", seed)).eval(), batch(M, seed)
    with torch.no_grad():
        model[-1].weight.mul_(2.0)
        model[-1].bias.sub_(model(x).mean(dim=0))
        y = model(x).argmax(dim=1)
    y[::4] = (y[::4] + 1) % 5
    return model, x, y


def away(z, rows):
    """An inner loss of one's own."""
    return (z - rows.clean_outputs).square().sum(dim=1) * (1 + rows.labels) - z[:, 0]


def reference_loss(inner, clean):
    """That of one sample with these clean logits, as the reference takes it."""
    if inner is away:
        return lambda z, y, goal=None: (z - clean).square().sum() * (1 + y) - z[0]
    if inner == "lse":
        return lambda z, y, goal=None: (z.softmax(dim=0) - clean.softmax(dim=0)).square().sum()
    return reference_apgd.kl_from(clean) if inner == "kl" else reference_apgd.LOSSES[inner]


def apgd_alone(model, x, y, start, norm, inner, steps, radii):
    """x' of the reference, one sample after another."""
    result, clean = [], model(x).detach()
    for i in range(len(x)):
        one, label = x[i : i + 1], int(y[i])
        goal = reference_apgd.ranked(clean[i].tolist(), label)[0]
        loss = reference_loss(inner, clean[i])
        begin = start[i : i + 1]
        if steps[i] == 0:
            result.append(begin)
            continue
        run = reference_apgd.apgd(model, one, label, begin, float(radii[i]), steps[i], norm, loss, goal=goal)
        result.append(run.best)
    return torch.cat(result)


def best_alone(model, x, y, start, norm, inner, steps, radii, size):
    """The best iterates of plain PGD, one sample after another."""
    result, clean = [], model(x).detach()
    for i in range(len(x)):
        loss, x_adv, seen = reference_loss(inner, clean[i]), start[i : i + 1], []
        threat = ThreatModel(float(radii[i]), NAMES[norm])
        for t in range(steps[i] + 1):
            x_adv = x_adv.detach().requires_grad_()
            value = loss(model(x_adv)[0], int(y[i]))
            seen.append((float(value.detach()), x_adv.detach()))
            if t < steps[i]:
                x_adv = projected_step(
                    x_adv.detach(), torch.autograd.grad(value, x_adv)[0], x[i : i + 1], threat, size[i]
                )
        result.append(max(seen, key=lambda pair: pair[0])[1])
    return torch.cat(result)


def inside(start, x, norm, radii):
    return torch.cat(
        [given_start(start[i : i + 1], x[i : i + 1], ThreatModel(float(radii[i]), NAMES[norm])) for i in range(len(x))]
    )


def noisy(x, seed=1):
    g = torch.Generator().manual_seed(seed)
    return (x + 0.02 * (2 * torch.rand(x.shape, generator=g, dtype=x.dtype) - 1)).clamp(0, 1)


# Samples' own steps, radii and starts


@pytest.mark.parametrize("norm", RADII)
@pytest.mark.parametrize("inner", ["kl", "cross_entropy", "dlr_targeted", away])
@pytest.mark.parametrize("engine", ["exact", "fast"])
def test_apgd_with_steps_radii_and_starts_of_the_samples_own(norm, inner, engine):
    model, x, y = network()
    steps = [4, 0, 9, 1, 6, 3]
    radii = torch.tensor([0.5, 1.0, 0.2, 2.0, 0.0, 1.3], dtype=x.dtype) * RADII[norm]
    start = noisy(x)
    own = PerSample(torch.tensor(steps), radii, start=start)
    result = perturb(model, x, y, APGD(RADII[norm], 5, norm, inner=inner), per_sample=own, engine=engine)
    begin = inside(start, x, norm, radii)
    taken = [n if r > 0 else 0 for n, r in zip(steps, radii.tolist(), strict=True)]
    expected = apgd_alone(model, x, y, begin, norm, inner, taken, radii)
    torch.testing.assert_close(result, expected, **CLOSE["l2" if engine == "fast" else norm])
    assert torch.equal(result[4], x[4])
    assert not torch.equal(result[0], begin[0])


@pytest.mark.parametrize("norm", RADII)
@pytest.mark.parametrize("inner", ["cross_entropy", "lse", "dlr", away])
def test_the_best_iterate_with_all_of_the_samples_own(norm, inner):
    model, x, y = network()
    steps = [4, 0, 9, 1, 6, 3]
    radii = torch.tensor([0.5, 1.0, 0.2, 2.0, 0.0, 1.3], dtype=x.dtype) * RADII[norm]
    sizes = 1.2 * radii
    start = noisy(x)
    own = PerSample(torch.tensor(steps), radii, sizes, start)
    attack = PGD(RADII[norm], 0.03, 5, norm, inner=inner, keep="best")
    result = perturb(model, x, y, attack, per_sample=own)
    taken = [n if r > 0 else 0 for n, r in zip(steps, radii.tolist(), strict=True)]
    begin = inside(start, x, norm, radii)
    expected = best_alone(model, x, y, begin, norm, inner, taken, radii, sizes.tolist())
    torch.testing.assert_close(result, expected, **CLOSE[norm])


@pytest.mark.parametrize("norm", RADII)
@pytest.mark.parametrize("numbered", [False, True])
def test_apgds_uniform_start_is_on_the_surface_of_each_samples_own_ball(norm, numbered):
    class Still(torch.nn.Module):
        def forward(self, images):
            return images.flatten(1)[:, :5] * 0

    x = torch.full((4, 1, 6, 6), 0.5, dtype=torch.float64)
    radii = torch.tensor([0.1, 0.0, 0.2, 0.05], dtype=x.dtype)
    options = {"per_sample": PerSample(epsilon=radii), "indices": torch.arange(4) if numbered else None}
    start = perturb(Still(), x, torch.zeros(4, dtype=torch.int64), APGD(0.3, 1, norm, "uniform", "margin"), **options)
    delta = (start - x).flatten(1)
    size = delta.abs().amax(dim=1) if norm == "linf" else delta.norm(dim=1)
    torch.testing.assert_close(size, radii)


@pytest.mark.parametrize("mined", [False, True])
def test_with_radii_of_the_samples_own_no_step_size_is_warned_of(mined, recwarn):
    """2ε of the attack is no step size of a sample with a smaller ball."""
    model, x, y = network()
    mining = BulletTrain(3, 1, 0) if mined else None
    own = PerSample(epsilon=torch.full((M,), 0.01))
    perturb(model, x, y, APGD(0.2, 3), mining, per_sample=own)
    assert not [w for w in recwarn if "step_size" in str(w.message)]


@pytest.mark.parametrize("inner", ["cross_entropy", "dlr_targeted", away])
@pytest.mark.parametrize("keep", ["apgd", "best"])
def test_with_mining_and_radii_of_the_samples_own(inner, keep):
    if (keep, inner) == ("best", "dlr_targeted"):
        return
    model, x, y = network()
    radii = torch.tensor([0.05, 0.1, 0.02, 0.2, 0.0, 0.13], dtype=x.dtype)
    start = noisy(x)
    mining = BulletTrain(6, 2, 1)
    mining.robust_fraction.fill_(0.5)
    attack = APGD(0.1, 6, inner=inner) if keep == "apgd" else PGD(0.1, 0.03, 6, inner=inner, keep="best")
    own = PerSample(epsilon=radii, start=start)
    details = perturb(model, x, y, attack, mining, per_sample=own, return_details=True)
    steps = details.steps.tolist()
    assert len(set(steps)) > 1
    begin = inside(start, x, "linf", radii)
    if keep == "apgd":
        expected = apgd_alone(model, x, y, begin, "linf", inner, steps, radii)
    else:
        sizes = [0.03 if g == 1 else 1.7 * float(r) / n for g, r, n in zip(details.group, radii, steps, strict=True)]
        expected = best_alone(model, x, y, begin, "linf", inner, steps, radii, sizes)
    torch.testing.assert_close(details.x_adv, expected, **CLOSE["linf"])


def test_a_step_size_of_the_samples_own_is_refused_with_apgd():
    model, x, y = network()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"per_sample must have no step_size with an APGD, .* got one: leave it out"):
        perturb(model, x, y, APGD(0.1, 3), per_sample=PerSample(step_size=torch.ones(M)))
    assert_unchanged(before, model)
    perturb(model, x, y, APGD(0.0, 3), per_sample=PerSample(epsilon=torch.full((M,), 0.1)))  # which needs none


# Functions, the squared error, embeddings


@pytest.mark.parametrize("norm", RADII)
@pytest.mark.parametrize("inner", ["lse", away])
def test_apgd_ascends_the_squared_error_and_functions(norm, inner):
    model, x, y = network()
    start = noisy(x)
    result = perturb(model, x, y, APGD(RADII[norm], 8, norm, inner=inner), per_sample=PerSample(start=start))
    expected = apgd_alone(model, x, y, start, norm, inner, [8] * M, [RADII[norm]] * M)
    torch.testing.assert_close(result, expected, **CLOSE[norm])


@pytest.mark.parametrize("attack", [APGD(0.1, 4, start="clean"), PGD(0.1, 0.05, 4, start="clean", keep="best")])
@pytest.mark.parametrize("width", [1, 7])
def test_outputs_need_be_no_logits_and_there_may_be_no_labels(attack, width):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, width)).double()
    x, _ = batch(M)
    start = noisy(x)

    def away_from_clean(z, rows):
        assert rows.labels is None
        return (z - rows.clean_outputs).square().sum(dim=1)

    result = perturb(model, x, None, replace(attack, inner=away_from_clean), per_sample=PerSample(start=start))
    moved = [(model(images) - model(x)).square().sum(dim=1) for images in (start, result)]
    assert (moved[1] > 2 * moved[0]).all()


def test_each_iterate_asks_a_function_once():
    model, x, y = network()
    asked = []

    def inner(z, rows):
        asked.append(len(z))
        return away(z, rows)

    perturb(model, x, y, APGD(0.1, 3, start="clean", inner=inner))
    perturb(model, x, y, PGD(0.1, 0.03, 3, start="clean", inner=inner, keep="best"))
    assert asked == [M] * 8


def test_a_wrong_function_is_reported_with_nothing_changed():
    model, x, y = network()
    before = snapshot(model)
    for attack in (APGD(0.1, 3, inner=lambda z, rows: z.sum()), PGD(0.1, 0.1, 3, inner=lambda z, r: z, keep="best")):
        with pytest.raises(ValueError, match=r"inner must return shape \[6\], one loss for each row"):
            PGDLoss(attack)(model, x, y)
        assert_unchanged(before, model)


# Soft labels


@pytest.mark.parametrize("mined", [False, True])
@pytest.mark.parametrize("inner", ["dlr", "dlr_targeted", "margin", "cross_entropy"])
def test_of_distributions_the_largest_part_counts_and_for_the_cross_entropy_all(inner, mined):
    model, x, y = network()
    soft = (0.7 * F.one_hot(y, 5) + 0.3 * F.one_hot((y + 2) % 5, 5)).to(x.dtype)
    mining = BulletTrain(6, 6, 6) if mined else None
    result = perturb(model, x, soft, APGD(0.1, 6, start="clean", inner=inner), mining)
    if inner == "cross_entropy":
        expected = []
        for i in range(M):

            def loss(z, y, goal=None, p=soft[i]):
                return -(p * z.log_softmax(dim=0)).sum()

            one = x[i : i + 1]
            expected.append(reference_apgd.apgd(model, one, int(y[i]), one, 0.1, 6, "linf", loss).best)
        expected = torch.cat(expected)
    else:
        expected = apgd_alone(model, x, y, x, "linf", inner, [6] * M, [0.1] * M)
    torch.testing.assert_close(result, expected, **CLOSE["linf"])


# The batch's statistics


@pytest.mark.parametrize("norm", RADII)
@pytest.mark.parametrize("statistics", ["batch", "tracked"])
@pytest.mark.parametrize("inner", ["kl", "cross_entropy", "margin"])
def test_the_best_iterate_by_the_batchs_statistics_is_that_of_a_loop_in_train_mode(norm, statistics, inner):
    model, x, y = network()
    model.train()
    twin = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    start = noisy(x)
    size = 0.8 * RADII[norm]
    attack = PGD(RADII[norm], size, 4, norm, inner=inner, keep="best", statistics=statistics)
    result = perturb(model, x, y, attack, per_sample=PerSample(start=start), engine="fast")
    target = None
    if inner == "kl":
        with torch.no_grad():
            target = twin(x).softmax(dim=1)
    x_adv, best, value = start, start, torch.full((M,), -torch.inf, dtype=x.dtype)
    for t in range(5):
        x_adv = x_adv.detach().requires_grad_()
        z = twin(x_adv)
        now = torch.stack(
            [
                loss_of(inner, z[i : i + 1], y[i : i + 1], None if target is None else target[i : i + 1])
                for i in range(M)
            ]
        )
        better = now.detach() > value
        best = torch.where(better.view(-1, 1, 1, 1), x_adv.detach(), best)
        value = torch.where(better, now.detach(), value)
        if t < 4:
            (grad,) = torch.autograd.grad(now.sum(), x_adv)
            x_adv = projected_step(x_adv.detach(), grad, x, attack.threat, size)
    torch.testing.assert_close(result, best, rtol=0, atol=1e-9)
    assert not torch.equal(result, x_adv.detach()), "the last is not the best for all"
    expected = twin.state_dict() if statistics == "tracked" else before
    for name, values in model.state_dict().items():
        torch.testing.assert_close(values, expected[name], rtol=0, atol=1e-9, msg=name)
    assert model.training


def test_what_keeps_the_best_by_the_batchs_statistics_says_why_it_is_eager():
    model, x, y = network()
    criterion = TRADESLoss(PGD(0.1, 0.03, 3, keep="best", statistics="batch"))
    criterion(model.train(), x, y).backward()
    assert "attack steps: eagerly, since statistics='batch' runs the model itself" in criterion.explain()


# ε of 0


@pytest.mark.parametrize("mined", [False, True])
@pytest.mark.parametrize("start", ["normal", "uniform", "clean"])
@pytest.mark.parametrize("kind", [APGD, PGD])
def test_at_a_radius_of_0_it_is_x_and_no_step_is_run(kind, start, mined):
    model, x, y = network()
    inner = "cross_entropy"
    attack = APGD(0.0, 3, "linf", start, inner) if kind is APGD else PGD(0.0, 0.1, 3, "linf", start, inner, "best")
    seen = []
    model.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    result = perturb(model, x, y, attack, BulletTrain(3, 1, 0) if mined else None)
    assert torch.equal(result, x)
    assert seen == [False]
