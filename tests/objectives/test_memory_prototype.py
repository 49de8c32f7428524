"""A loss with a memory is the prototype of the experiments, which is written plainly and apart from the package."""

import pytest
import torch
from small_models import SHAPE, batch, build, gradients

from benchmarks import remembered
from bt_fast import PGD, BulletTrain, Memory, Placement, TRADESLoss, ops

EPSILON, SAMPLES, M = 0.1, 40, 24


@pytest.fixture(autouse=True)
def no_noise(monkeypatch):
    """Both start exactly at what is remembered, since their noise is drawn differently."""
    recall = ops.recall
    monkeypatch.setattr(ops, "recall", lambda *given, **options: recall(*given, **options | {"noise": 0.0}))
    monkeypatch.setattr(remembered, "NOISE", 0.0)


def minibatch_of(seed):
    """A minibatch with samples of all groups, their numbers, today's crops, and fractions of ε of all samples."""
    generator = torch.Generator().manual_seed(seed)
    (x, y), model = batch(M, seed=seed), build(seed=seed).eval()
    y = torch.where(torch.rand(M, generator=generator) < 0.7, model(x).argmax(dim=1), y)
    indices = torch.randperm(SAMPLES, generator=generator)[:M]
    top, left = torch.randint(-2, 3, (2, M), generator=generator)
    fractions = 2 * torch.rand(SAMPLES, *SHAPE, generator=generator, dtype=torch.float64) - 1
    return x, y, indices, Placement(top, left, torch.rand(M, generator=generator) < 0.5), fractions


def loss_with(memory, fractions, x, y, indices, seed, unperturbed):
    """TRADES with this memory, filled with these fractions of ε, at F_R = 1/2."""
    mining = BulletTrain(unperturbed=unperturbed)
    attack = PGD(EPSILON, 0.03, 10)
    criterion = TRADESLoss(attack, 6.0, mining=mining, memory=memory, engine="exact", clean_updates=1)
    criterion(build(seed=seed), x, y, indices=indices)  # makes the buffer
    memory.perturbations.copy_((127 * fractions).round() if memory.perturbations.dtype == torch.int8 else fractions)
    memory.written.fill_(0)
    mining.robust_fraction.fill_(0.5)
    return criterion


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("steps", "recipe"),
    [
        ((1, 1, 0), "1/1/0,remember"),
        ((1, 1, 0), "1/1/0,remember,skip"),
        ((1, 1, 0), "1/1/0,remember,skip,int8"),
        ((1, 1, 1), "1/1/1,remember,skip"),
        ((2, 1, 0), "2/1/0,remember,skip"),
        ((3, 2, 1), "3/2/1,remember,skip"),
    ],
)
def test_loss_gradients_images_and_memory_are_the_prototypes(steps, recipe, seed):
    x, y, indices, placement, fractions = minibatch_of(seed)
    ours, theirs, options = build(seed=seed), build(seed=seed), remembered.recipe_of(recipe)
    memory = Memory(SAMPLES, SHAPE, dtype=torch.int8 if options.int8 else torch.float64, steps=steps)
    criterion = loss_with(memory, fractions, x, y, indices, seed, "skip" if options.skip else "keep")
    loss = criterion(ours, x, y, indices=indices, placement=placement, generator=torch.Generator().manual_seed(1))
    loss.backward()

    plain = remembered.PlainMemory((SAMPLES, *SHAPE), EPSILON, int8=options.int8)
    plain.stored = (127 * fractions).round().to(torch.int8) if options.int8 else EPSILON * fractions
    delta = plain.read(indices, placement).to(x.dtype)
    given = {"epsilon": EPSILON, "fraction": 0.5, "delta": delta, "generator": torch.Generator()}
    expected = remembered.minibatch(theirs, x, y, options, **given)
    expected.loss.backward()
    plain.write(indices, placement, expected.perturbation(x, options, EPSILON), expected.moved)

    assert expected.group.bincount(minlength=3).all()
    close = {"rtol": 1e-6, "atol": 1e-7 if options.int8 else 1e-11}
    torch.testing.assert_close(criterion.last.x_adv, expected.x_adv, **close)
    torch.testing.assert_close(loss, expected.loss, **close)
    torch.testing.assert_close(gradients(ours), gradients(theirs), **close)
    torch.testing.assert_close(float(criterion.mining.robust_fraction), expected.fraction)
    stored = plain.stored if options.int8 else plain.stored / EPSILON
    torch.testing.assert_close(memory.perturbations, stored, rtol=0, atol=0 if options.int8 else 1e-11)
