"""A further pass of a loss over its last minibatch, `criterion.again()`: with mining and without."""

import copy
import pickle
import weakref
from functools import partial

import pytest
import reference_trades
import torch
import torch.nn.functional as F
from reference_awp import trades_of
from reference_mart import linf_attack as away_from_the_label
from reference_pgd import uniform_start
from test_again import another, climbed, gradient_of, minibatch, moved, state_of
from test_objectives import confident, recorded, seeded, sgd
from tolerances import UPDATES, assert_near_nested

from bt_fast import (
    AWP,
    PGD,
    AugMixLoss,
    BulletTrain,
    MARTLoss,
    NonFiniteError,
    PGDLoss,
    TRADESLoss,
    mart_loss,
    perturb,
    trades_loss,
)

KINDS = {
    "trades": lambda mining: TRADESLoss(PGD(0.03, 0.01, 3), mining=mining, engine="exact"),
    "mart": lambda mining: MARTLoss(PGD(0.03, 0.01, 3), mining=mining, engine="exact"),
    "pgd": lambda mining: PGDLoss(PGD(0.03, 0.01, 3), mining=mining, engine="exact"),
    "augmix": lambda mining: AugMixLoss(mining, engine="exact"),
    "augmix of one view": lambda mining: AugMixLoss(jsd=False, engine="exact"),
}
EACH = pytest.mark.parametrize("name", KINDS)
WAYS = pytest.mark.parametrize("reuse", [True, False], ids=["reused", "anew"])
MINING = pytest.mark.parametrize("mining", [False, True], ids=["plain", "mined"])


def criterion_of(name, mining):
    steps = (1, 0, 0) if name.startswith("augmix") else (3, 2, 1)
    return KINDS[name](BulletTrain(*steps) if mining else None)


@EACH
@MINING
@WAYS
def test_at_the_same_weights_a_further_pass_is_the_first(name, mining, reuse):
    model, criterion = confident(), criterion_of(name, mining)
    x, y = minibatch(0, model)
    buffers = [(b, b.clone()) for b in model.buffers()]
    first = criterion(model, x, y, generator=seeded(0))
    expected = gradient_of(model, first)
    before = {key: value.clone() for key, value in criterion.state_dict().items()}
    for buffer, value in buffers:  # batch norm's have moved, and the attack sees them
        buffer.copy_(value)
    with criterion.again(reuse=reuse):
        second = criterion(model, x, y, generator=seeded(0))
    assert torch.equal(first, second)
    result = gradient_of(model, second)
    assert all(torch.equal(result[name], expected[name]) for name in expected)
    assert_near_nested(criterion.state_dict(), before)


@EACH
@MINING
def test_reused_images_cost_no_attack_and_no_random_number(name, mining):
    model, criterion, generator = confident(), criterion_of(name, mining), seeded(0)
    x, y = minibatch(0, model)
    forwards = recorded(model)
    criterion(model, x, y, generator=generator)
    state, trained = generator.get_state(), list(forwards[True])
    for _ in range(2):
        forwards[True].clear(), forwards[False].clear()
        moved(model)
        with criterion.again():
            criterion(model, x, y, generator=generator)
        assert forwards[False] == []
        assert torch.equal(generator.get_state(), state)
        assert len(forwards[True]) == len(trained) > 0
        assert all(torch.equal(a, b) for a, b in zip(forwards[True], trained, strict=True))


@pytest.mark.parametrize("name", ["trades", "mart", "pgd"])
def test_made_anew_they_are_those_of_the_weights_as_they_are_now(name):
    model, criterion = confident(), criterion_of(name, False)
    x, y = minibatch(0, model)
    criterion(model, x, y, generator=seeded(0))
    first = criterion.last.x_adv
    moved(model)
    twin = copy.deepcopy(model)
    with criterion.again(reuse=False):
        result = criterion(model, x, y, generator=seeded(1))
    assert torch.equal(result, criterion_of(name, False)(twin, x, y, generator=seeded(1)))
    assert not torch.equal(criterion.last.x_adv, first)
    with criterion.again():  # which are those of the first pass, not of the last
        criterion(model, x, y)
    assert torch.equal(criterion.last.x_adv, first)


def plain_pass(name, model, x, x_adv, y):
    model.train()
    return trades_of(model, x, x_adv, y, 6.0) if name == "trades" else F.cross_entropy(model(x_adv), y)


def attacked(name, model, x, y):
    model.eval()
    if name == "trades":
        return reference_trades.linf_attack(model, x, x + 0.001 * torch.randn(x.shape), 0.01, 0.03, 3)
    return away_from_the_label(model, x, y, uniform_start(x, 0.03, "l_inf"), 0.01, 0.03, 3)


@pytest.mark.parametrize("name", ["trades", "pgd"])
def test_sharpness_aware_minimisation_gives_the_weights_of_the_two_passes_written_out(name):
    models, criterion = [confident(), confident()], criterion_of(name, False)
    optimizers = [sgd(m) for m in models]
    for k in range(4):
        x, y = minibatch(k, models[0])
        torch.manual_seed(k)
        x_adv = attacked(name, models[0], x, y)
        optimizers[0].zero_grad()
        plain_pass(name, models[0], x, x_adv, y).backward()
        back = climbed(models[0])
        optimizers[0].zero_grad()
        plain_pass(name, models[0], x, x_adv, y).backward()
        back()
        optimizers[0].step()

        torch.manual_seed(k)
        optimizers[1].zero_grad()
        criterion(models[1], x, y).backward()
        back = climbed(models[1])
        optimizers[1].zero_grad()
        with criterion.again():
            criterion(models[1], x, y).backward()
        back()
        optimizers[1].step()
        assert_near_nested(models[1].state_dict(), models[0].state_dict(), UPDATES)


@pytest.mark.parametrize("name", ["trades", "pgd"])
def test_an_attack_at_the_moved_weights_is_seen(name, monkeypatch):
    """So the test above sees it."""
    monkeypatch.setattr("bt_fast.objectives.passes.Passes.begin", lambda passes: None)
    with pytest.raises(AssertionError):
        test_sharpness_aware_minimisation_gives_the_weights_of_the_two_passes_written_out(name)


@EACH
@MINING
def test_under_autocast_no_weight_is_cast_as_it_was_in_the_first_pass(name, mining):
    """The caller's autocast keeps casts of the weights from one pass to the next."""
    model, criterion = confident(dtype=torch.float32), criterion_of(name, mining)
    x, y = minibatch(0, model.double())
    model, x = model.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        first = criterion(model, x, y)
        moved(model)
        with criterion.again() if criterion.mining is None else criterion.mining.again():
            second = criterion(model, x, y)
    with torch.autocast("cpu", torch.bfloat16), criterion.again():
        assert torch.equal(criterion(model, x, y), second)
    assert not torch.equal(first, second)


# What may go wrong in between


@EACH
@MINING
@WAYS
def test_where_there_is_no_minibatch_to_go_over_it_is_reported(name, mining, reuse):
    model, criterion = confident(), criterion_of(name, mining)
    x, y = minibatch(0, model)

    def entered(criterion):
        with (
            pytest.raises(RuntimeError, match="none that ended without an error: call the"),
            criterion.again(reuse=reuse),
        ):
            pytest.fail("it was entered")

    entered(criterion)
    with pytest.raises(ValueError, match="must lie in"):
        criterion(model, x + 2, y)
    entered(criterion)
    criterion(model, x, y)
    entered(copy.deepcopy(criterion))
    entered(pickle.loads(pickle.dumps(criterion)))
    with pytest.raises(ValueError, match="must lie in"):  # the minibatch before it is not the last one any more
        criterion(model, x + 2, y)
    entered(criterion)


OTHERS = {
    "trades": lambda mining: MARTLoss(PGD(0.03, 0.01, 3), mining=mining, engine="exact"),
    "mart": KINDS["trades"],
    "pgd": KINDS["pgd"],  # another one of the same kind
    "augmix": KINDS["augmix"],
}


@pytest.mark.parametrize("name", OTHERS)
@WAYS
def test_the_last_minibatch_of_a_shared_mining_belongs_to_the_loss_that_was_called_last(name, reuse):
    model, mining = confident(), BulletTrain(*((1, 0, 0) if name == "augmix" else (3, 2, 1)))
    first, second = KINDS[name](mining), OTHERS[name](mining)
    x, y = minibatch(0, model)
    first(model, x, y)
    second(model, x, y)
    before = state_of(mining)
    with pytest.raises(RuntimeError, match=r"was that of another loss.*BulletTrain of its own"):  # noqa: SIM117
        with first.again(reuse=reuse):
            pytest.fail("it was entered")
    with second.again(reuse=reuse):
        second(model, x, y)
    assert_near_nested(state_of(mining), before)
    first(model, x, y)
    with first.again(reuse=reuse):
        first(model, x, y)


def test_a_minibatch_that_a_script_has_planned_itself_is_not_the_loss_s():
    model, criterion = confident(), criterion_of("trades", True)
    x, y = minibatch(0, model)
    criterion(model, x, y)
    perturb(model, x, y, criterion.attack, criterion.mining)
    criterion.mining.observe(model(x), y)
    with pytest.raises(RuntimeError, match="was that of another loss or script"), criterion.again(reuse=False):
        pytest.fail("it was entered")


@pytest.mark.parametrize("functions", [False, True])
def test_in_the_second_pass_of_awp_two_losses_of_one_mining_are_refused(functions):
    model, mining = confident(), BulletTrain(3, 2, 1)
    x, y = minibatch(0, model)
    trades, mart = KINDS["trades"](mining), KINDS["mart"](mining)
    if functions:
        trades, mart = (
            partial(loss, optimizer=None, bullet=mining, perturb_steps=3) for loss in (trades_loss, mart_loss)
        )
    weights = [p.detach().clone() for p in model.parameters()]
    with AWP(model)(trades, x, y):
        pass
    with pytest.raises(RuntimeError, match="was that of another loss"):  # noqa: SIM117
        with AWP(model)(lambda *given: trades(*given) + mart(*given), x, y):
            pytest.fail("it was entered")
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


@EACH
@MINING
@pytest.mark.parametrize("what", ["an image", "labels", "fewer", "dtype"])
def test_images_are_reused_for_their_own_minibatch_alone(name, mining, what):
    model, criterion = confident(), criterion_of(name, mining)
    if mining and criterion.mining is not None and name != "augmix":
        criterion = KINDS[name](BulletTrain(3, 2, 1, policy="uniform"))
    x, y = minibatch(0, model)
    criterion(model, x, y)
    before = None if criterion.mining is None else state_of(criterion.mining)
    x, y, message = another(x, y)[what]
    model.to(x.dtype)
    with pytest.raises(ValueError, match=f"again.*{message}.*reuse=False"), criterion.again():
        criterion(model, x, y)
    assert before is None or all(torch.equal(before[key], v) for key, v in criterion.mining.state_dict().items())


def test_images_are_reused_for_their_own_threat_alone():
    model, criterion = confident(), criterion_of("trades", False)
    x, y = minibatch(0, model)
    criterion(model, x, y)
    criterion.attack = PGD(0.1, 0.01, 3)
    with pytest.raises(ValueError, match=r"epsilon=0.03.*epsilon=0.1.*reuse=False"), criterion.again():
        criterion(model, x, y)


@EACH
@MINING
def test_nan_at_the_moved_weights_is_an_error_and_it_may_be_tried_again(name, mining):
    model, criterion = confident(), criterion_of(name, mining)
    x, y = minibatch(0, model)
    criterion(model, x, y)
    weights = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        list(model.parameters())[-1].fill_(torch.nan)
    if mining or name.startswith("augmix"):
        with pytest.raises(NonFiniteError), criterion.again():
            criterion(model, x, y)
    model.load_state_dict(weights)
    with criterion.again():
        criterion(model, x, y)


@EACH
@MINING
def test_the_images_are_let_go_when_the_next_minibatch_begins(name, mining):
    model, criterion = confident(), criterion_of(name, mining)
    x, y = minibatch(0, model)
    criterion(model, x, y)
    last = criterion._passes._last if criterion.mining is None else criterion.mining._last
    kept, seen = weakref.ref(last.kept), []
    del last
    model.register_forward_pre_hook(lambda *_: seen.append(kept() is None))
    criterion(model, x, y)
    assert seen
    assert all(seen)


@EACH
def test_whether_to_reuse_is_a_bool(name):
    with (
        pytest.raises(TypeError, match=r"reuse must be True .* or False .*got 'x'"),
        criterion_of(name, False).again(reuse="x"),
    ):
        pytest.fail("it was entered")


def test_a_loss_saved_by_a_version_without_passes_goes_on():
    criterion = criterion_of("trades", True)
    state = criterion.__getstate__()
    del state["_passes"]
    old = TRADESLoss.__new__(TRADESLoss)
    old.__setstate__(state)
    model = confident()
    x, y = minibatch(0, model)
    old(model, x, y)
    with old.again():
        old(model, x, y)
