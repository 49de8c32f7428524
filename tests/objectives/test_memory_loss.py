"""A loss with a memory attacks, remembers and updates as a plain loop over samples does, for three epochs."""

import contextlib
import copy
import dataclasses
import math
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from emulated_device import EmulatedDevice
from pretended_device import DEVICE, pretended_device
from small_models import CLASSES, conv_bn
from tolerances import assert_near

from bt_fast import PGD, BulletTrain, HalfDrawn, MARTLoss, Memory, PGDLoss, Placement, TRADESLoss, ops
from bt_fast.attack.graphs import GraphRunner
from bt_fast.attack.streams import StreamRunner
from bt_fast.objectives import execution
from bt_fast.ops.gather_start import unit_noise

SAMPLES, OWN, VIEW, EPSILON = 12, (1, 8, 9), (1, 6, 6), 0.1
DOUBLE = torch.float64
ATTACK = PGD(EPSILON, step_size=EPSILON / 4, steps=10)


def data_set():
    g = torch.Generator().manual_seed(1)
    return torch.rand(SAMPLES, *OWN, generator=g, dtype=DOUBLE), torch.randint(CLASSES, (SAMPLES,), generator=g)


def network(sharper=6.0):
    torch.manual_seed(0)
    model = conv_bn().double()
    list(model.parameters())[-2].data *= sharper
    return model


def views(images, place, indices):
    """Crops, padded with 0 and mirrored, one image at a time."""
    result = torch.zeros(len(indices), *VIEW, dtype=images.dtype)
    for k, number in enumerate(indices.tolist()):
        for i, j, own in shown(place, k):
            result[k, :, i, j] = images[number][:, own[0], own[1]]
    return result


def shown(place, k):
    """Yields each pixel (i, j) of a view that shows a pixel of its image, and this."""
    for i in range(VIEW[1]):
        for j in range(VIEW[2]):
            column = VIEW[2] - 1 - j if place.mirrored[k] else j
            own = int(place.top[k]) + i, int(place.left[k]) + column
            if 0 <= own[0] < OWN[1] and 0 <= own[1] < OWN[2]:
                yield i, j, own


def minibatches(epochs=3, size=4):
    """Yields indices, placement and seed of shuffled minibatches."""
    g = torch.Generator().manual_seed(2)
    for epoch in range(epochs):
        for k, indices in enumerate(torch.randperm(SAMPLES, generator=g).split(size)):
            top, left = (torch.randint(-2, n - 3, (size,), generator=g) for n in OWN[1:])
            mirrored = torch.rand(size, generator=g) < 0.5
            yield indices, Placement(top, left, mirrored), 100 * epoch + k


class Oracle:
    """The training loop, written plainly."""

    def __init__(self, model, l2, inner, mined, stored, beta=6.0):
        self.model, self.l2, self.inner, self.mined, self.stored, self.beta = model, l2, inner, mined, stored, beta
        self.memory = torch.zeros(SAMPLES, *OWN, dtype=DOUBLE)
        self.robust_fraction = 0.0

    def steps_of(self, logits, y):
        """Returns the number of steps and their size for each sample."""
        if not self.mined:
            return [(1, EPSILON)] * len(y)
        p = logits.softmax(dim=1)
        correct = logits.argmax(dim=1) == y
        svar = (p.var(dim=1, unbiased=False) * torch.where(correct, 1.0, -1.0)).tolist()
        threshold = max(0.0, np.quantile(svar, 1 - self.robust_fraction))
        if self.robust_fraction == 0:
            threshold = math.inf
        boundary, robust, outlier = [(n, EPSILON * {0: 0.0, 1: 1.0, 2: 0.5}[n]) for n in self.mined]
        if self.mined[:2] == (2, 1):
            robust = 1, 0.6 * EPSILON
        return [outlier if s < 0 else boundary if s < threshold else robust for s in svar]

    def attack(self, x, y, z, steps_and_size, place, k, number, seed):
        steps, size = steps_and_size
        if steps == 0:
            self.memory[number] = 0.0
            return x
        delta = torch.zeros(VIEW, dtype=DOUBLE)
        for i, j, own in shown(place, k):
            delta[:, i, j] = self.memory[number][:, own[0], own[1]] * EPSILON
        noise = unit_noise(torch.tensor([number]), x.numel(), torch.tensor([seed, 0]), "normal").mul(0.001)
        delta = delta + noise.double().view(VIEW)
        start = (x + self.projected(delta)).clamp(0, 1)
        x_adv = start
        for _ in range(steps):
            x_adv = x_adv.detach().requires_grad_()
            output = self.model(x_adv[None])
            if self.inner == "kl":
                loss = F.kl_div(output.log_softmax(dim=1), z.softmax(dim=0)[None], reduction="sum")
            else:
                loss = F.cross_entropy(output, y[None])
            (g,) = torch.autograd.grad(loss, x_adv)
            moved = x_adv.detach() + size * (g / g.norm() if self.l2 else g.sign())
            if self.l2:
                delta = moved.clamp(0, 1) - x
                shrink = EPSILON / (delta.norm() + 1e-7) if delta.norm() > EPSILON else 1.0
                x_adv = (x + delta * shrink).clamp(0, 1)
            else:
                x_adv = moved.clamp(x - EPSILON, x + EPSILON).clamp(0, 1)
        for i, j, own in shown(place, k):
            fraction = ((x_adv - x) / EPSILON).clamp(-1, 1)[:, i, j]
            if self.stored == torch.int8:
                fraction = (fraction * 127).round() / 127
            self.memory[number][:, own[0], own[1]] = fraction.to(self.stored if self.stored != torch.int8 else DOUBLE)
        return x_adv

    def projected(self, delta):
        if self.l2:
            return delta * (EPSILON / delta.norm() if delta.norm() > EPSILON else 1.0)
        return delta.clamp(-EPSILON, EPSILON)

    def minibatch(self, x, y, indices, place, seed):
        self.model.eval()
        with torch.no_grad():
            logits = self.model(x)
        steps = self.steps_of(logits, y)
        each = zip(x, y, logits, steps, indices.tolist(), strict=True)
        x_adv = torch.stack([self.attack(*four, place, k, n, seed) for k, (*four, n) in enumerate(each)])
        self.model.train()
        if self.inner == "kl":
            z, z_adv, again = self.model(x), self.model(x_adv), self.model(x)
            loss = F.cross_entropy(z, y) + self.beta / len(x) * F.kl_div(
                z_adv.log_softmax(dim=1), again.softmax(dim=1), reduction="sum"
            )
        else:
            z_adv = self.model(x_adv)
            loss = F.cross_entropy(z_adv, y)
        if self.mined:
            hits = (z_adv.argmax(dim=1) == y).double().mean().item()
            self.robust_fraction = 0.9 * self.robust_fraction + 0.1 * 0.8 * hits
        return loss, x_adv, [n for n, _ in steps]


def criterion_of(kind, memory, mined, norm="linf", **options):
    mining = BulletTrain() if mined else None
    attack = PGD(EPSILON, step_size=EPSILON / 4, steps=10, norm=norm)
    return kind(attack, mining=mining, memory=memory, **{"engine": "exact"} | options)


def descend(model, loss):
    model.zero_grad()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.05 * parameter.grad


@pytest.mark.parametrize("engine", ["exact", "fast"])
@pytest.mark.parametrize(
    ("kind", "norm", "stored", "steps", "mined"),
    [
        (TRADESLoss, "linf", DOUBLE, (1, 1, 0), True),
        (TRADESLoss, "linf", torch.float32, (2, 1, 0), True),
        (TRADESLoss, "linf", torch.int8, (2, 1, 1), True),
        (TRADESLoss, "l2", DOUBLE, (1, 1, 0), True),
        (TRADESLoss, "linf", DOUBLE, (1, 1, 0), False),
        (PGDLoss, "linf", torch.int8, (1, 1, 0), False),
        (PGDLoss, "l2", torch.float16, (2, 2, 0), True),
    ],
)
def test_it_is_the_plain_loop(kind, norm, stored, steps, mined, engine):
    images, labels = data_set()
    model = network()
    memory = Memory(SAMPLES, OWN, dtype=stored, steps=steps)
    criterion = criterion_of(kind, memory, mined, norm, engine=engine)
    inner = "kl" if kind is TRADESLoss else "cross_entropy"
    oracle = Oracle(copy.deepcopy(model), norm == "l2", inner, steps if mined else None, stored)
    taken, generator = [], torch.Generator()
    for indices, place, seed in minibatches():
        x, y = views(images, place, indices), labels[indices]
        expected, x_adv, counts = oracle.minibatch(x, y, indices, place, seed)
        generator.manual_seed(seed)
        loss = criterion(model, x, y, indices=indices, placement=place, generator=generator)
        assert_near(loss.detach(), expected.detach(), "updates")
        assert criterion.last.steps.tolist() == counts
        assert_near(criterion.last.x_adv, x_adv, "updates")
        remembered = memory.perturbations.double() / (127 if stored == torch.int8 else 1)
        assert_near(remembered, oracle.memory, stored if stored == torch.float16 else "updates")
        delta = views(remembered * EPSILON, place, indices)
        seen = views(torch.ones(SAMPLES, *OWN, dtype=DOUBLE), place, indices) > 0
        quantum = EPSILON / 127 if stored == torch.int8 else EPSILON * 2e-3 if stored == torch.float16 else 1e-7
        moved = torch.tensor(counts)[:, None, None, None].expand_as(seen) > 0
        assert ((delta - (x_adv - x)).abs()[seen & moved] <= 0.5001 * quantum).all()
        taken += counts
        descend(model, loss)
        descend(oracle.model, expected)
    assert set(taken) == ({*steps} if mined else {steps[0]})
    assert memory.clock == 3 * SAMPLES
    assert (memory.ages() < 1).all()


# On a GPU


@pytest.mark.parametrize("runner", [GraphRunner, StreamRunner])
@pytest.mark.parametrize("mined", [False, True])
def test_from_graphs_and_on_streams_it_remembers_the_same(runner, mined):
    images, labels = data_set()
    memories, run, of = [], runner(bucket=2), execution.Execution.of
    for emulates in (False, True):
        model, memory = network(), Memory(SAMPLES, OWN, dtype=DOUBLE, steps=(2, 1, 0))
        criterion = criterion_of(TRADESLoss, memory, mined)
        here = EmulatedDevice() if emulates else contextlib.nullcontext()
        chosen = mock.patch.object(execution.Execution, "of", lambda *a: dataclasses.replace(of(*a), runner=run))
        with chosen if emulates else contextlib.nullcontext(), here as emulated:
            for indices, place, seed in minibatches():
                x, generator = views(images, place, indices), torch.Generator().manual_seed(seed)
                criterion(model, x, labels[indices], indices=indices, placement=place, generator=generator)
        memories.append(memory.perturbations)
    assert emulated.replays
    assert_near(*memories)


@pytest.mark.parametrize("mined", [False, True])
def test_the_host_waits_once_for_each_minibatch(mined, monkeypatch):
    monkeypatch.setattr(torch.cuda, "initial_seed", lambda: 5)
    model, memory = network().float().to(DEVICE), Memory(SAMPLES, OWN, reset_after=3)
    criterion = criterion_of(TRADESLoss, memory, mined).to(DEVICE)
    x, y = torch.rand(5, *VIEW, device=DEVICE), torch.zeros(5, dtype=torch.int64, device=DEVICE)
    place = Placement(*(torch.zeros(5, dtype=kind, device=DEVICE) for kind in (torch.int64, torch.int64, torch.bool)))
    indices = torch.arange(5, device=DEVICE)
    for _ in range(2):  # the second has rows to read
        with pretended_device(plan=[3, 3, 1, 1] if mined else []) as reads:
            criterion(model, x, y, indices=indices, placement=place).backward()
        assert reads.waited == (1 if mined else 2)  # as without a memory
    assert memory.perturbations.shape == (SAMPLES, *OWN)


# With the options of the update


@pytest.mark.parametrize("storage", ["device", "host"])
@pytest.mark.parametrize("attacked", ["all", "half"])
def test_samples_that_others_stand_for_remember_their_attack_or_what_they_had(attacked, storage):
    images, labels = data_set()
    images = images[..., : VIEW[1], : VIEW[2]]
    memory = Memory(SAMPLES, VIEW, dtype=DOUBLE, storage=storage)
    mining = BulletTrain(1, HalfDrawn(1, attacked=attacked), 0)
    model, criterion = network(), TRADESLoss(ATTACK, mining=mining, memory=memory, engine="exact")
    criterion(model, images, labels, indices=torch.arange(SAMPLES))
    mining.robust_fraction.fill_(0.9)
    memory.perturbations.copy_(2 * torch.rand(memory.perturbations.shape, dtype=DOUBLE) - 1)
    before, written = memory.perturbations.clone(), memory.written.clone()
    indices = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0))
    x, plans, start = images[indices], [], mining.start_plan
    mining.start_plan = lambda *given, **options: plans.append(start(*given, **options)) or plans[-1]
    criterion(model, x, labels[indices], indices=indices)
    x_adv, robust = criterion.last.x_adv, plans[0].group == ops.ROBUST
    assert robust.sum() > 1
    out = robust & (plans[0].steps == 0)
    assert out.any() == (attacked == "half")
    expected = torch.where(out[:, None, None, None], before[indices], (x_adv - x) / EPSILON)
    assert_near(memory.perturbations[indices], expected)
    assert torch.equal(memory.written[indices] == written[indices], out)


@pytest.mark.parametrize("kind", [TRADESLoss, MARTLoss])
def test_a_shared_clean_forward_changes_neither_start_nor_what_is_remembered_of_it(kind):
    images, labels = data_set()
    images = images[..., : VIEW[1], : VIEW[2]]
    memory, model = Memory(SAMPLES, VIEW, dtype=DOUBLE), network()
    criterion = kind(ATTACK, mining=BulletTrain(), memory=memory, engine="exact", clean_updates="shared")
    for _ in range(2):
        criterion(model, images, labels, indices=torch.arange(SAMPLES)).backward()
        moved = (criterion.last.x_adv - images) / EPSILON
        assert_near(memory.perturbations, moved)
    assert moved.any()
