"""The drop-ins with a memory are the classes with one, to the bit."""

import copy
from functools import partial

import pytest
import small_models
import torch

from bt_fast import PGD, BulletTrain, MARTLoss, Memory, PGDLoss, Placement, TRADESLoss, mart_loss, pgd_loss, trades_loss

KINDS = {TRADESLoss: trades_loss, MARTLoss: mart_loss, PGDLoss: pgd_loss}
SAMPLES, OWN, EPSILON = 12, (1, 8, 9), 0.1


def minibatches(epochs=2):
    """Yields images, labels, numbers and places of crops, and a seed, in shuffled epochs."""
    (x, y), g = small_models.batch(SAMPLES), torch.Generator().manual_seed(0)
    for epoch in range(epochs):
        for k, indices in enumerate(torch.randperm(SAMPLES, generator=g).split(6)):
            place = Placement(*torch.randint(-1, 3, (2, 6), generator=g), torch.rand(6, generator=g) < 0.5)
            yield x[indices], y[indices], {"indices": indices, "placement": place}, 10 * epoch + k


def memory_of(**options):
    return Memory(SAMPLES, OWN, dtype=torch.float64, **options)


def trained(call, model, memory, bullet):
    """All that a script can see of two epochs."""
    seen = []
    for x, y, where, seed in minibatches():
        loss = call(model, x, y, **where, generator=torch.Generator().manual_seed(seed))
        loss.backward()
        seen += [loss.detach(), *(p.grad.clone() for p in model.parameters()), *(b.clone() for b in model.buffers())]
        seen += [memory.perturbations.clone(), *(b.clone() for b in bullet.buffers())]
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.05 * p.grad
                p.grad = None
    return [*seen, memory.written, memory.clock]


@pytest.mark.parametrize("mined", [False, True])
@pytest.mark.parametrize(
    ("kind", "distance"), [(TRADESLoss, "l_inf"), (TRADESLoss, "l_2"), (MARTLoss, "l_inf"), (PGDLoss, "l_inf")]
)
def test_with_a_memory_a_function_is_its_class_to_the_bit(kind, distance, mined):
    seen = []
    for as_function in (False, True):
        model, memory = small_models.build("conv_bn"), memory_of(steps=(2, 1, 0))
        bullet = BulletTrain(momentum=0.5)
        mining, beta = bullet if mined else None, {} if kind is PGDLoss else {"beta": 2.0}
        if as_function:
            given = {"optimizer": None, "step_size": 0.03, "epsilon": EPSILON, "distance": distance} | beta
            call = partial(KINDS[kind], **given, bullet=mining, memory=memory)
        else:
            attack = PGD(EPSILON, 0.01, 7, "linf" if distance == "l_inf" else "l2")
            call = kind(attack, mining=mining, memory=memory, engine="exact", **beta)
        seen.append(trained(call, model, memory, bullet))
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert memory.perturbations.any()


def given_to(**changed):
    """Arguments of a drop-in with a memory, of the first minibatch."""
    x, y, where, _ = next(minibatches())
    given = {"model": small_models.build("conv_bn"), "x_natural": x, "y": y, "optimizer": None, "epsilon": EPSILON}
    return given | {"step_size": 0.03, "memory": memory_of(), "bullet": BulletTrain()} | where | changed


@pytest.mark.parametrize("steps", [10, 1])
def test_the_steps_are_the_memorys_also_where_the_default_number_is_given(steps):
    given = given_to(perturb_steps=steps)
    for _ in range(2):
        trades_loss(**given)
    assert given["bullet"].boundary_steps == 1


def test_a_further_pass_remembers_nothing():
    given = given_to()
    trades_loss(**given)
    before = copy.deepcopy(given["memory"])
    with given["bullet"].again():
        trades_loss(**given)
    assert torch.equal(given["memory"].perturbations, before.perturbations)
    assert given["memory"].clock == before.clock == 6


def test_without_a_memory_numbers_decide_about_the_starts():
    x, y, where, _ = next(minibatches())
    model, losses = small_models.build("conv_bn"), []
    for loss in (pgd_loss, PGDLoss(PGD(EPSILON, 0.03, 10), engine="exact")):
        given = {} if isinstance(loss, PGDLoss) else {"optimizer": None, "step_size": 0.03, "epsilon": EPSILON}
        generator = torch.Generator().manual_seed(3)
        losses.append(loss(copy.deepcopy(model), x, y, **given, indices=where["indices"], generator=generator))
    assert torch.equal(*losses)


@pytest.mark.parametrize("loss", KINDS.values())
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"memory": 12}, TypeError, r"^memory must be a Memory or None, got int: write memory=Memory"),
        ({"indices": None}, ValueError, r"^indices must be given with a memory, got none: .* indices=numbers"),
        ({"indices": torch.full((6,), 3)}, ValueError, r"^indices must be all different, but 5 of 6"),
        ({"indices": torch.rand(6)}, TypeError, r"^indices must be integers"),
        ({"placement": 3}, TypeError, r"^placement must be a Placement"),
        ({"memory": None}, ValueError, r"^placement is for a loss with a memory"),
        ({"samples": torch.arange(6)}, ValueError, r"^indices and samples are the same .* leave samples out"),
        ({"perturb_steps": 0}, ValueError, r"^perturb_steps must be at least 1"),
        ({"perturb_steps": 7}, ValueError, r"^perturb_steps is 7, but memory takes 1 .*steps=\(7, 1, 0\)\)$"),
        ({"bullet": BulletTrain(7)}, ValueError, r"^bullet's steps must be those of the memory, \(1, 1, 0\), got"),
        (
            {"memory": Memory(SAMPLES, OWN, dtype=torch.int8), "distance": "l_2"},
            ValueError,
            r"^memory's dtype must be floating point in l2",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:the argument samples=")
def test_what_does_not_go_together_is_an_error_that_names_the_argument(loss, changed, error, message):
    given = given_to(**changed)
    before = copy.deepcopy((given["model"].state_dict(), given["bullet"].state_dict()))
    counts = repr(given["bullet"])
    with pytest.raises(error, match=message):
        loss(**given)
    assert repr(given["bullet"]) == counts
    for old, new in zip(before, (given["model"].state_dict(), given["bullet"].state_dict()), strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old if isinstance(old[name], torch.Tensor))
    assert getattr(given["memory"], "clock", 0) == 0
