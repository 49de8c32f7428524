"""Without BulletTrain, loss, gradients, buffers and random numbers are the authors', for all kinds of models."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_zoo import BLOCKS, ZOO, of_blocks
from objective_cases import DISTANCES, EACH, OBJECTIVES
from small_models import batch, build, gradients
from tolerances import UPDATES, assert_near, assert_near_nested

FOUND = ("train", "eval", "mixed", "mixed in eval")


def put_into(model, found):
    """Sets the modes of a model before the call; mixed: the whole in one mode, every second part in the other."""
    whole = found in ("train", "mixed")
    model.train(whole)
    if "mixed" in found:
        for part in list(model.children())[1::2]:
            part.train(not whole)


def with_authors_modes(model, found):
    """The twin for the authors' code: its `train()` sets the modes in which our update runs."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if hasattr(module, "out_of_place"):
            module.out_of_place = True
    if "mixed" in found:
        modes = [module.training for module in model.modules()]

        def train(mode=True):
            for module, training in zip(twin.modules(), modes, strict=True):
                module.training = mode and training
            return twin

        twin.train = train
    return twin


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_parity(objective, model, found, distance, steps=2):
    put_into(model, found)
    modes = [module.training for module in model.modules()]
    twin = with_authors_modes(model, found)
    options = objective.options(distance)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, twin)]
    for k in range(steps):
        x, y = batch(seed=k)
        untouched = x.clone()
        results = []
        for loss_of, m, optimizer in zip((objective.loss, objective.reference), (model, twin), optimizers, strict=True):
            torch.manual_seed(k)
            loss = loss_of(m, x, y, optimizer, **options)
            if m is model:
                assert [module.training for module in m.modules()] == modes
            loss.backward()
            results.append((loss.detach(), gradients(m), state_of(m), torch.get_rng_state()))
            optimizer.step()
        assert torch.equal(x, untouched)
        assert [module.training for module in model.modules()] == modes
        ours, authors = results
        assert_near(ours[0], authors[0], UPDATES)
        assert_near_nested(ours[1], authors[1], UPDATES)
        assert_near_nested(ours[2], authors[2], UPDATES)
        assert torch.equal(ours[3], authors[3])


@pytest.mark.parametrize("found", FOUND)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("name", ZOO)
@EACH
def test_parity(objective, name, distance, found):
    assert_parity(objective, build(ZOO[name]), found, distance)


@settings(max_examples=40, deadline=None)
@given(
    objective=st.sampled_from(OBJECTIVES),
    blocks=st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=4),
    found=st.sampled_from(FOUND),
    distance=st.sampled_from(DISTANCES),
    seed=st.integers(0, 100),
)
def test_parity_of_combinations(objective, blocks, found, distance, seed):
    assert_parity(objective, build(lambda: of_blocks(blocks), seed), found, distance, steps=1)


@EACH
def test_parity_at_an_epsilon_of_0(objective):
    options = objective.options("l_inf") | {"epsilon": 0.0}
    result = []
    for loss_of in (objective.loss, objective.reference):
        model, (x, y) = build(), batch()
        torch.manual_seed(0)
        loss = loss_of(model, x, y, torch.optim.SGD(model.parameters(), lr=0.1), **options)
        loss.backward()
        result.append((loss.detach(), gradients(model), state_of(model), torch.get_rng_state()))
    ours, authors = result
    assert_near(ours[0], authors[0])
    assert_near_nested(ours[1], authors[1])
    assert_near_nested(ours[2], authors[2])
    assert torch.equal(ours[3], authors[3])
