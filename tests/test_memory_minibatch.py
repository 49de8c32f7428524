"""A loop with an attack of its own, and a memory: where it begins and what is remembered are those of a plain loop."""

import copy
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from pretended_device import DEVICE, pretended_device
from small_models import CLASSES, SHAPE, build
from tolerances import UPDATES, assert_near

from benchmarks.remembered import PlainMemory, project
from bt_fast import PGD, Memory, PerSample, Placement, ThreatModel, TRADESLoss, perturb
from bt_fast.ops.gather_start import unit_noise

SAMPLES, EPSILON, DOUBLE = 12, 0.1, torch.float64
BALL = ThreatModel(EPSILON)
GUIDE = Path(__file__).parents[1] / "docs" / "guide.md"


def data_set(seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(SAMPLES, *SHAPE, generator=g, dtype=DOUBLE), torch.randint(CLASSES, (SAMPLES,), generator=g)


def minibatches(epochs=2, size=4):
    """Yields images, labels, numbers, places of crops and a seed, in shuffled epochs."""
    (images, labels), g = data_set(), torch.Generator().manual_seed(2)
    for epoch in range(epochs):
        for k, indices in enumerate(torch.randperm(SAMPLES, generator=g).split(size)):
            place = Placement(*torch.randint(-2, 3, (2, size), generator=g), torch.rand(size, generator=g) < 0.5)
            yield images[indices], labels[indices], indices, place, 10 * epoch + k


def own_attack(model, x, y, start, size=EPSILON):
    """One step along the sign of the cross-entropy's gradient, as scripts have it."""
    model.eval()
    at = start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(at), y), [at])
    return project(start + size * gradient.sign(), x, EPSILON)


def descend(model, x_adv, y):
    model.train()
    model.zero_grad()
    F.cross_entropy(model(x_adv), y).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.05 * parameter.grad


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_two_epochs_are_those_of_the_prototypes_plain_memory():
    ours, theirs = build(), build()
    memory, plain = Memory(SAMPLES, dtype=DOUBLE), PlainMemory((SAMPLES, *SHAPE), EPSILON)
    plain.stored = plain.stored.double()
    for x, y, indices, place, seed in minibatches():
        minibatch = memory.minibatch(x, indices, BALL, place, generator=seeded(seed))
        x_adv = own_attack(ours, x, y, minibatch.start)
        minibatch.keep(x_adv)
        descend(ours, x_adv, y)

        noise = unit_noise(indices, x[0].numel(), torch.tensor([seed, 0]), "normal").mul(0.001).double()
        delta = (plain.read(indices, place) + noise.view_as(x)).clamp(-EPSILON, EPSILON)
        expected = own_attack(theirs, x, y, (x + delta).clamp(0.0, 1.0))
        plain.write(indices, place, expected - x, torch.ones(len(x), dtype=torch.bool))
        descend(theirs, expected, y)

        assert_near(minibatch.start, (x + delta).clamp(0.0, 1.0))
        assert_near(x_adv, expected)
        assert_near(memory.perturbations, plain.stored / EPSILON)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_near(a, b, UPDATES)
    assert delta.abs().max() == EPSILON, "the last epoch began where the first had ended"
    assert memory.clock == 2 * SAMPLES


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_with_perturb_it_is_a_loss_with_this_memory(norm):
    """To the bit in the norm of the maximum; in l2 a start that rounding has put outside is put back."""
    model, attack = build(), PGD(EPSILON, EPSILON, 1, norm)
    memory, of_loss = (Memory(SAMPLES, dtype=DOUBLE) for _ in range(2))
    criterion = TRADESLoss(attack, memory=of_loss, engine="exact")
    for x, y, indices, place, seed in minibatches():
        minibatch = memory.minibatch(x, indices, attack.threat, place, generator=seeded(seed))
        x_adv = perturb(model, x, y, attack, per_sample=PerSample(start=minibatch.start))
        minibatch.keep(x_adv)
        criterion(copy.deepcopy(model), x, y, indices, placement=place, generator=seeded(seed))
        if norm == "linf":
            assert torch.equal(x_adv, criterion.last.x_adv)
            assert torch.equal(memory.perturbations, of_loss.perturbations)
        assert_near(x_adv, criterion.last.x_adv)
        assert_near(memory.perturbations, of_loss.perturbations)
    assert torch.equal(memory.written, of_loss.written)
    assert memory.perturbations.any()


def test_the_guides_loop_begins_its_second_epoch_where_the_first_ended():
    text = GUIDE.read_text(encoding="utf-8").split("## A memory in a loop of your own")[1]
    script = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert len(script.splitlines()) == 6
    starts = []

    def one_step(model, x, y, start):
        starts.append((start - x).abs().max())
        return own_attack(model, x, y, start)

    loader = [(x, y, indices, place) for x, y, indices, place, _ in minibatches()]
    given = {"Memory": lambda _: Memory(SAMPLES), "ThreatModel": lambda _: BALL, "device": "cpu", "model": build()}
    given |= {"loader": loader, "one_step": one_step, "update": lambda model, x, x_adv, y: descend(model, x_adv, y)}
    exec(script, given)
    assert max(starts[:3]) < 0.01
    assert min(starts[3:]) > 0.09


def half_shown():
    """The places of two crops of the rows from 3 on."""
    return Placement(torch.tensor([3, 3]), torch.tensor([0, 0]), torch.tensor([False, False]))


def filled():
    """A memory of ones, of two samples."""
    memory, x = Memory(2, dtype=DOUBLE), torch.full((2, *SHAPE), 0.5, dtype=DOUBLE)
    memory.minibatch(x, torch.arange(2), BALL).keep(x + EPSILON)
    return memory, x


def test_a_sample_that_stayed_at_x_is_forgotten_and_what_a_crop_hides_of_another_is_not():
    memory, x = filled()
    x_adv = x.clone()
    x_adv[1] -= EPSILON
    memory.minibatch(x, torch.arange(2), BALL, half_shown()).keep(x_adv)
    assert not memory.perturbations[0].any()
    assert_near(memory.perturbations[1, :, :3], torch.ones(1, 3, 6))
    assert_near(memory.perturbations[1, :, 3:], -torch.ones(1, 3, 6))


@pytest.mark.parametrize("storage", ["device", "host"])
def test_of_a_minibatch_that_is_never_kept_nothing_changes_and_others_may_come_between(storage):
    memory, x = Memory(SAMPLES, dtype=DOUBLE, storage=storage), data_set()[0]
    first, second = (memory.minibatch(x[n], n, BALL) for n in torch.arange(6).split(3))
    assert memory.perturbations is None
    second.keep(x[3:6] + EPSILON)
    first.keep(x[:3] - EPSILON)
    memory.minibatch(x[:3], torch.arange(3), BALL)
    assert_near(memory.perturbations[:6, 0, 0, 0], torch.tensor([-1.0] * 3 + [1.0] * 3))
    assert memory.clock == 6


def test_on_a_gpu_its_values_are_read_when_the_attack_has_ended(monkeypatch):
    monkeypatch.setattr(torch.cuda, "initial_seed", lambda: 5)
    memory, x, indices = Memory(4, SHAPE).to(DEVICE), torch.rand(4, *SHAPE).to(DEVICE), torch.arange(4).to(DEVICE)
    for _ in range(2):  # the second has rows to read
        with pretended_device() as reads:
            minibatch = memory.minibatch(x, indices, BALL)
            assert (reads.started, reads.waited) == (1, 0)
            minibatch.keep(minibatch.start)
            assert reads.waited == 1


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": [0.5]}, TypeError, r"^x must be a tensor of images"),
        ({"x": torch.full((2, *SHAPE), 1.5, dtype=DOUBLE)}, ValueError, r"^x must lie in \[0, 1\]"),
        ({"x": torch.rand(2, 1, 5, 6)}, ValueError, r"^images must have the memory's shape"),
        ({"indices": None}, TypeError, r"^indices must be a tensor of integers"),
        ({"indices": torch.tensor([0, 2])}, ValueError, r"^indices must lie in 0..1, but 1 of 2 do not"),
        ({"indices": torch.tensor([1, 1])}, ValueError, r"^indices must be all different"),
        ({"threat": EPSILON}, TypeError, r"^threat must be a ThreatModel, got float: write ThreatModel\(epsilon\)"),
        ({"placement": 3}, TypeError, r"^placement must be a Placement"),
        ({"generator": 3}, TypeError, r"^generator must be a"),
    ],
)
def test_what_is_wrong_is_an_error_that_names_the_argument(changed, error, message):
    memory, x = filled()
    given = {"x": x, "indices": torch.arange(2), "threat": BALL} | changed
    with pytest.raises(error, match=message):
        memory.minibatch(**given)


def test_an_x_adv_that_does_not_fit_is_an_error_and_nothing_is_remembered():
    memory, x = filled()
    minibatch = memory.minibatch(x, torch.arange(2), BALL)
    for wrong, error in (([1.0], TypeError), (x[:1], ValueError), (x.float(), ValueError), (x.to("meta"), ValueError)):
        with pytest.raises(error, match=r"^x_adv must be"):
            minibatch.keep(wrong)
    assert memory.clock == 2
    minibatch.keep(x)
    with pytest.raises(RuntimeError, match=r"^keep has remembered this minibatch: call memory.minibatch"):
        minibatch.keep(x)
    assert memory.clock == 4


def test_int8_is_not_for_l2():
    x = torch.rand(2, *SHAPE)
    with pytest.raises(ValueError, match=r"^memory's dtype must be floating point in l2"):
        Memory(2, dtype=torch.int8).minibatch(x, torch.arange(2), ThreatModel(EPSILON, "l_2"))


@pytest.mark.parametrize("apart", [False, True])
def test_two_minibatches_may_be_open_at_once(apart):
    images, _ = data_set()
    memory, (first, last) = Memory(SAMPLES, dtype=DOUBLE, storage="host"), torch.arange(SAMPLES).split(SAMPLES // 2)
    with mock.patch.object(Memory, "_apart", return_value=apart):  # as with images on another device
        both = [memory.minibatch(images[indices], indices, BALL) for indices in (first, last)]
        moved = [(images[indices] + EPSILON).clamp(max=1.0) for indices in (first, last)]
        for minibatch, x_adv in zip(both, moved, strict=True):
            minibatch.keep(x_adv)
    memory.settle()
    torch.testing.assert_close(memory.perturbations, (torch.cat(moved) - images) / EPSILON)
