"""Whole training loops as fourteen published scripts have them: ours in at most five changed lines, and their weights.

Each is a pair of functions, `theirs` a plain loop. A line counts as changed if it is not in theirs, indented as there.
"""

import difflib
import inspect
from dataclasses import replace

import pytest
import reference_apgd
import torch
import torch.nn.functional as F
from mixed_images import cutmix, mixup
from plain_pgd import loss_of
from reference_awp import Proxy, sgd_of, trades_of
from reference_forks import ascended, divergence, spread_over_all, spread_over_the_others, trades_attack
from reference_pgd import uniform_start
from reference_trades import divergence as divergence_of_images
from small_models import CLASSES, batch, build
from tolerances import UPDATES, assert_near, assert_near_nested
from torch import nn

from bt_fast import APGD, AWP, PGD, PerSample, PGDLoss, TRADESLoss, perturb

MOST_CHANGED_LINES = 5
EPSILON, SIZE, STEPS = 0.1, 0.03, 4


def changed_lines(theirs, ours):
    sources = [inspect.getsource(script).splitlines()[1:] for script in (theirs, ours)]
    return [line for line in difflib.ndiff(*sources) if line.startswith("+ ") and line.strip("+ ")]


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_training(theirs, ours, batches, networks=1, **options):
    """Weights, buffers, random numbers and what the scripts return (numbers to log), for as many networks."""
    results = []
    for script in (theirs, ours):
        models = [build("conv_bn", seed=k) for k in range(networks)]
        torch.manual_seed(0)
        logged = script(*models, batches, **options)
        results.append(
            ([state_of(m) for m in models], torch.tensor(logged or 0.0, dtype=torch.float64), torch.get_rng_state())
        )
    (states, logged, random), (their_states, their_logged, their_random) = results[::-1]
    for state, their_state in zip(states, their_states, strict=True):
        assert_near_nested(state, their_state, UPDATES)
    assert_near(logged, their_logged, UPDATES)
    assert torch.equal(random, their_random)
    assert len(changed_lines(theirs, ours)) <= MOST_CHANGED_LINES


def minibatches(n=4, mix=None):
    given = [batch(seed=k) for k in range(n)]
    return given if mix is None else [mix(x, y, CLASSES) for x, y in given]


def accuracy(logits, y):
    classes = y if y.dim() == 1 else y.argmax(dim=1)
    return (logits.argmax(dim=1) == classes).double().mean().item()


def soft_cross_entropy(logits, y):
    return -(y * logits.log_softmax(dim=1)).sum(dim=1).mean()


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, **options)


def linf(model, x, start, inner):
    return ascended(model, x, start, inner, SIZE, EPSILON, STEPS).detach()


# TRADES-AWP, with its warm-up


def trades_awp(model, batches):
    optimizer = sgd_of(model)
    proxy = Proxy(model, gamma=5e-3)
    for epoch, (x, y) in enumerate(batches):
        x_adv = trades_attack(model, x, EPSILON, SIZE, STEPS).detach()
        model.train()
        if epoch >= 2:
            difference = proxy.difference(lambda of, x=x, x_adv=x_adv, y=y: trades_of(of, x, x_adv, y, 6.0))
            proxy.move(difference, 1)
        robust = divergence_of_images(model, x_adv, x) / len(x)
        loss = F.cross_entropy(model(x), y) + 6.0 * robust
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if epoch >= 2:
            proxy.move(difference, -1)


def trades_awp_by_ours(model, batches):
    optimizer = sgd_of(model)
    criterion, awp = TRADESLoss(PGD(EPSILON, SIZE, STEPS), 6.0, engine="exact"), AWP(model)
    for epoch, (x, y) in enumerate(batches):
        awp.gamma = 5e-3 if epoch >= 2 else 0.0
        optimizer.zero_grad()
        with awp(criterion, x, y) as loss:
            loss.backward()
            optimizer.step()


def test_trades_awp():
    assert_same_training(trades_awp, trades_awp_by_ours, minibatches())


# DM-Improves-AT: batch statistics without tracking, two moves of batch norm, smoothing or CutMix, EMA, Nesterov


def track(model, on):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = on


def average_in(average, model, k):
    decay = min(0.995, (1 + k) / (10 + k))
    for kept, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        kept.copy_(decay * kept + (1 - decay) * value if kept.is_floating_point() else value)


def dm_improves_at(model, average, batches):
    optimizer, log = sgd(model, nesterov=True), []
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=len(batches))
    for k, (x, y) in enumerate(batches):
        model.train()
        track(model, False)
        start, soft = uniform_start(x, EPSILON, "l_inf"), y.is_floating_point()
        target = y if soft else model(x).softmax(dim=1).detach()
        x_adv = linf(model, x, start, lambda z, t=target: F.kl_div(z.log_softmax(dim=1), t, reduction="batchmean"))
        track(model, True)
        z, z_adv = model(x), model(x_adv)
        natural = F.kl_div(z.log_softmax(dim=1), y, reduction="batchmean") if soft else spread_over_all(z, y, 0.1)
        loss = natural + 5.0 * divergence(z_adv, z)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average_in(average, model, k)
        log += [accuracy(z, y), accuracy(z_adv, y)]
    return log


def dm_improves_at_by_ours(model, average, batches):
    optimizer, log = sgd(model, nesterov=True), []
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=len(batches))
    soft, options = batches[0][1].is_floating_point(), {"clean_updates": 1, "engine": "exact"}
    attack = PGD(EPSILON, SIZE, STEPS, start="uniform", inner="cross_entropy" if soft else "kl", statistics="batch")
    criterion = TRADESLoss(attack, 5.0, label_smoothing=0.0 if soft else 0.1, **options)
    for k, (x, y) in enumerate(batches):
        loss = criterion(model, x, y)
        z, z_adv = criterion.last.logits, criterion.last.adversarial_logits
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average_in(average, model, k)
        log += [accuracy(z, y), accuracy(z_adv, y)]
    return log


@pytest.mark.parametrize("mix", [None, cutmix])
def test_dm_improves_at(mix):
    assert_same_training(dm_improves_at, dm_improves_at_by_ours, minibatches(mix=mix), networks=2)


# HAT and LBGAT: a further term, by helper samples or a teacher


def hat(model, helper, batches):
    optimizer = sgd(model)
    helper.eval()
    for x, y in batches:
        x_adv = trades_attack(model, x, EPSILON, SIZE, STEPS).detach()
        model.train()
        z, z_adv, z_help = model(x), model(x_adv), model(x + 2.0 * (x_adv - x))
        of_helper = helper(x_adv).argmax(dim=1)
        loss = F.cross_entropy(z, y) + 2.5 * divergence(z_adv, z) + 0.5 * F.cross_entropy(z_help, of_helper)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def hat_by_ours(model, helper, batches):
    optimizer = sgd(model)
    helper.eval()
    beyond = lambda b: F.cross_entropy(model(b.x + 2.0 * (b.x_adv - b.x)), helper(b.x_adv).argmax(dim=1))  # noqa: E731
    options = {"clean_updates": 1, "engine": "exact", "extra": lambda b: 0.5 * beyond(b)}
    criterion = TRADESLoss(PGD(EPSILON, SIZE, STEPS), 2.5, **options)
    for x, y in batches:
        loss = criterion(model, x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def lbgat(model, teacher, batches):
    optimizer, log = torch.optim.SGD([*model.parameters(), *teacher.parameters()], lr=0.1, momentum=0.9), []
    for x, y in batches:
        x_adv = trades_attack(model, x, EPSILON, SIZE, STEPS).detach()
        model.train()
        z_adv, z, of_teacher = model(x_adv), model(x), teacher(x)
        loss = F.mse_loss(z_adv, of_teacher) + F.cross_entropy(of_teacher, y) + 3.0 * divergence(z_adv, z)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log += [accuracy(z, y), accuracy(z_adv, y)]
    return log


def lbgat_by_ours(model, teacher, batches):
    optimizer, log = torch.optim.SGD([*model.parameters(), *teacher.parameters()], lr=0.1, momentum=0.9), []
    for x, y in batches:
        x_adv = perturb(model, x, y, PGD(EPSILON, SIZE, STEPS))
        model.train()
        z_adv, z, of_teacher = model(x_adv), model(x), teacher(x)
        loss = F.mse_loss(z_adv, of_teacher) + F.cross_entropy(of_teacher, y) + 3.0 * divergence(z_adv, z)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log += [accuracy(z, y), accuracy(z_adv, y)]
    return log


@pytest.mark.parametrize(("theirs", "ours"), [(hat, hat_by_ours), (lbgat, lbgat_by_ours)], ids=["hat", "lbgat"])
def test_hat_and_lbgat(theirs, ours):
    assert_same_training(theirs, ours, minibatches(), networks=2)


# Bag of Tricks and robust_overfitting: attacks in train mode with tracking, smoothing, Mixup, margins, early stops, and
# the best checkpoint by PGD


def overfitting(model, batches, inner):
    optimizer, best, log = sgd(model), 0.0, []
    for x, y in batches:
        model.train()
        start = uniform_start(x, EPSILON, "l_inf")
        x_adv = linf(model, x, start, lambda z, y=y: loss_of(inner, z, y))
        loss = spread_over_the_others(model(x_adv), y, 0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.eval()
        x_val, y_val = batches[0]
        start = uniform_start(x_val, EPSILON, "l_inf")
        x_adv = linf(model, x_val, start, lambda z, y=y_val: F.cross_entropy(z, y))
        robust = accuracy(model(x_adv), y_val)
        best = max(best, robust)
        log += [loss.item(), robust, best]
    return log


def overfitting_by_ours(model, batches, inner):
    optimizer, best, log = sgd(model), 0.0, []
    attack = PGD(EPSILON, SIZE, STEPS, start="uniform", inner=inner, statistics="tracked")
    criterion = PGDLoss(attack, label_smoothing=0.2, smoothing="others", engine="exact")
    judge = PGD(EPSILON, SIZE, STEPS, start="uniform", inner="cross_entropy")
    for x, y in batches:
        loss = criterion(model.train(), x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.eval()
        x_val, y_val = batches[0]
        x_adv = perturb(model, x_val, y_val, judge)
        robust = accuracy(model(x_adv), y_val)
        best = max(best, robust)
        log += [loss.item(), robust, best]
    return log


@pytest.mark.parametrize("inner", ["cross_entropy", "margin"])
def test_bag_of_tricks_and_robust_overfitting(inner):
    assert_same_training(overfitting, overfitting_by_ours, minibatches(), inner=inner)


def mixed_up(model, batches):
    optimizer, log = sgd(model), []
    for x, y, other, share in batches:
        model.eval()
        start = uniform_start(x, EPSILON, "l_inf")
        mixed = lambda z, f, y=y, o=other, s=share: s * f(z, y) + (1.0 - s) * f(z, o)  # noqa: E731
        x_adv = linf(model, x, start, lambda z, mixed=mixed: mixed(z, F.cross_entropy))
        model.train()
        loss = mixed(model(x_adv), lambda z, y: spread_over_the_others(z, y, 0.2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log.append(loss.item())
    return log


def mixed_up_by_ours(model, batches):
    optimizer, log = sgd(model), []
    criterion = PGDLoss(PGD(EPSILON, SIZE, STEPS), label_smoothing=0.2, smoothing="others", engine="exact")
    for x, y, other, share in batches:
        first, second = (F.one_hot(labels, CLASSES).double() for labels in (y, other))
        loss = criterion(model, x, share * first + (1.0 - share) * second)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log.append(loss.item())
    return log


def test_bag_of_tricks_with_mixup():
    batches = [(0.7 * x + 0.3 * x.roll(1, 0), y, y.roll(1, 0), 0.7) for x, y in minibatches()]
    assert_same_training(mixed_up, mixed_up_by_ours, batches)


def stopped_early(model, batches):
    optimizer, log = sgd(model), []
    for x, y in batches:
        model.eval()
        x_adv = uniform_start(x, EPSILON, "l_inf")
        for _ in range(STEPS):
            right = model(x_adv).argmax(dim=1) == y
            inner = lambda z, y=y[right]: F.cross_entropy(z, y)  # noqa: E731
            x_adv[right] = ascended(model, x[right], x_adv[right], inner, SIZE, EPSILON, 1).detach()
        model.train()
        loss = F.cross_entropy(model(x_adv), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log.append(right.double().mean().item())
    return log


def stopped_early_by_ours(model, batches):
    optimizer, log = sgd(model), []
    one = PGD(EPSILON, SIZE, 1, inner="cross_entropy")
    for x, y in batches:
        model.eval()
        x_adv = uniform_start(x, EPSILON, "l_inf")
        for _ in range(STEPS):
            right = model(x_adv).argmax(dim=1) == y
            x_adv = perturb(model, x, y, one, per_sample=PerSample(steps=right.long(), start=x_adv))
        model.train()
        loss = F.cross_entropy(model(x_adv), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log.append(right.double().mean().item())
    return log


def test_pgd_that_stops_early():
    batches = minibatches()
    model = build("conv_bn").eval()
    with torch.no_grad():
        labelled = [(x, torch.where(torch.arange(len(y)) < 5, model(x).argmax(dim=1), y)) for x, y in batches]
    assert_same_training(stopped_early, stopped_early_by_ours, labelled)


# MadryLab's robustness: from x, the best iterate, ε by a schedule that begins at 0, (x, target) in and out


class Attacker:
    """Their step projects once, in l2 before the bounds; the best is of the greatest loss, the earliest of equals."""

    def __init__(self, model, norm, size, steps):
        self.model, self.norm, self.size, self.steps = model, norm, size, steps

    def __call__(self, x, target, epsilon):
        training = self.model.training
        self.model.eval()
        here, best, greatest = x, x, torch.full((len(x),), -torch.inf, dtype=x.dtype)
        for t in range(self.steps + 1):
            here = here.detach().requires_grad_()
            losses = F.cross_entropy(self.model(here), target, reduction="none")
            better = losses.detach() > greatest
            best = torch.where(better.view(-1, 1, 1, 1), here.detach(), best)
            greatest = torch.where(better, losses.detach(), greatest)
            if t < self.steps:
                (grad,) = torch.autograd.grad(losses.sum(), here)
                here = self.inside(here.detach() + self.size * self.direction(grad), x, epsilon)
        self.model.train(training)
        return best

    def direction(self, grad):
        return grad.sign() if self.norm == "linf" else grad / (grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 1e-10)

    def inside(self, moved, x, epsilon):
        delta = moved - x
        delta = delta.clamp(-epsilon, epsilon) if self.norm == "linf" else delta.renorm(p=2, dim=0, maxnorm=epsilon)
        return (x + delta).clamp(0.0, 1.0)


def madry(model, batches, norm, size):
    optimizer, log = sgd(model), []
    attacker = Attacker(model, norm, size, STEPS)
    for epoch, (x, target) in enumerate(batches):
        x_adv = attacker(x, target, 2.0 * size * epoch)
        loss = F.cross_entropy(model(x_adv), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log += [loss.item(), (x_adv - x).abs().max().item()]
    return log


def madry_by_ours(model, batches, norm, size):
    optimizer, log = sgd(model), []
    attack = PGD(0.0, size, STEPS, norm, start="clean", inner="cross_entropy", keep="best")
    for epoch, (x, target) in enumerate(batches):
        x_adv = perturb(model, x, target, replace(attack, epsilon=2.0 * size * epoch))
        loss = F.cross_entropy(model(x_adv), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log += [loss.item(), (x_adv - x).abs().max().item()]
    return log


@pytest.mark.parametrize(("norm", "size"), [("linf", 0.05), ("l2", 0.1)])
def test_madrylabs_robustness(norm, size):
    """In l2 of images off the bounds, where their step and that of the TRADES code are the same."""
    batches = [(0.35 + 0.3 * x if norm == "l2" else x, y) for x, y in minibatches(3)]
    assert_same_training(madry, madry_by_ours, batches, norm=norm, size=size)


# revisiting-at: APGD-2 from x, labels of Mixup or CutMix with smoothing, accumulation, a scaler, EMA


def apgd_2(model, x, y):
    """The best of three iterates of the soft cross-entropy, one sample at a time."""
    of = [lambda z, _y, goal=None, p=p: -(p * z.log_softmax(dim=0)).sum() for p in y]
    ones = x.split(1)
    runs = [reference_apgd.apgd(model, one, 0, one, EPSILON, 2, "linf", f) for one, f in zip(ones, of, strict=True)]
    return torch.cat([run.best for run in runs])


def revisiting(model, average, batches):
    optimizer, scaler, log = sgd(model), torch.amp.GradScaler("cpu", init_scale=1024.0), []
    for k, (x, y) in enumerate(batches):
        model.eval()
        x_adv = apgd_2(model, x, y)
        model.train()
        loss = soft_cross_entropy(model(x_adv), y) / 2
        scaler.scale(loss).backward()
        if k % 2:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            average_in(average, model, k)
        log.append(loss.item())
    return log


def revisiting_by_ours(model, average, batches):
    optimizer, scaler, log = sgd(model), torch.amp.GradScaler("cpu", init_scale=1024.0), []
    criterion = PGDLoss(APGD(EPSILON, 2, start="clean"), engine="exact")
    for k, (x, y) in enumerate(batches):
        loss = criterion(model, x, y) / 2
        scaler.scale(loss).backward()
        if k % 2:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            average_in(average, model, k)
        log.append(loss.item())
    return log


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_revisiting_at(mix):
    smoothed = [(x, 0.9 * y.double() + 0.1 / CLASSES) for x, y in minibatches(mix=mix)]
    assert_same_training(revisiting, revisiting_by_ours, smoothed, networks=2)


# RobustVLM: embeddings move away from those of the network as it was, without labels


def robust_vlm(tower, original, batches):
    optimizer, log = sgd(tower), []
    original.eval()
    for x, _ in batches:
        target = original(x).detach()
        start = uniform_start(x, EPSILON, "l_inf")
        x_adv = linf(tower.eval(), x, start, lambda z, t=target: (z - t).square().sum(dim=1).mean())
        loss = (tower.train()(x_adv) - target).square().sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log.append(loss.item())
    return log


def robust_vlm_by_ours(tower, original, batches):
    optimizer, log = sgd(tower), []
    original.eval()
    for x, _ in batches:
        target = original(x).detach()
        away = lambda z, rows, t=target: (z - t[rows.labels]).square().sum(dim=1)  # noqa: E731
        attack = PGD(EPSILON, SIZE, STEPS, start="uniform", inner=away)
        x_adv = perturb(tower, x, torch.arange(len(x)), attack)
        loss = (tower.train()(x_adv) - target).square().sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log.append(loss.item())
    return log


def test_robust_vlm():
    assert_same_training(robust_vlm, robust_vlm_by_ours, minibatches(), networks=2)


# torchattacks and MAIR: x' = attack(x, y), then a minimiser whose loss is called twice


def climb(model, rho=0.05):
    """SAM's first step; returns the function that takes it back."""
    moves = [rho * p.grad / torch.stack([q.grad.norm() for q in model.parameters()]).norm() for p in model.parameters()]
    with torch.no_grad():
        for p, move in zip(model.parameters(), moves, strict=True):
            p.add_(move)

    def back():
        with torch.no_grad():
            for p, move in zip(model.parameters(), moves, strict=True):
                p.sub_(move)

    return back


def sharpness_aware(model, batches):
    optimizer, log = sgd(model), []
    for x, y in batches:
        model.eval()
        x_adv = linf(model, x, uniform_start(x, EPSILON, "l_inf"), lambda z, y=y: F.cross_entropy(z, y))
        model.train()
        optimizer.zero_grad()
        F.cross_entropy(model(x_adv), y).backward()
        back = climb(model)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x_adv), y)
        loss.backward()
        back()
        optimizer.step()
        log.append(loss.item())
    return log


def sharpness_aware_by_ours(model, batches):
    optimizer, log = sgd(model), []
    criterion = PGDLoss(PGD(EPSILON, SIZE, STEPS), engine="exact")
    for x, y in batches:
        optimizer.zero_grad()
        criterion(model, x, y).backward()
        back = climb(model)
        optimizer.zero_grad()
        with criterion.again():
            loss = criterion(model, x, y)
        loss.backward()
        back()
        optimizer.step()
        log.append(loss.item())
    return log


def test_minimisers_of_two_passes():
    assert_same_training(sharpness_aware, sharpness_aware_by_ours, minibatches())


def torchattacks(model, batches):
    optimizer, log = sgd(model), []
    for x, y in batches:
        model.eval()
        x_adv = linf(model, x, uniform_start(x, EPSILON, "l_inf"), lambda z, y=y: F.cross_entropy(z, y))
        model.train()
        loss = F.cross_entropy(model(x_adv), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log.append(loss.item())
    return log


def torchattacks_by_ours(model, batches):
    optimizer, log = sgd(model), []
    for x, y in batches:
        model.eval()
        x_adv = perturb(model, x, y, PGD(EPSILON, SIZE, STEPS, start="uniform", inner="cross_entropy"))
        model.train()
        loss = F.cross_entropy(model(x_adv), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log.append(loss.item())
    return log


def test_torchattacks():
    assert_same_training(torchattacks, torchattacks_by_ours, minibatches())
