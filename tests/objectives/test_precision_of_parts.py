"""16 bits in the update alone, or in the attack alone: each part is what it is in an engine of its own precision."""

import copy

import pytest
import torch
from small_models import batch, build
from tolerances import AUTOCAST, TOLERANCES, assert_near
from torch import nn

from bt_fast import PGD, AugMixLoss, BulletTrain, Engine, MARTLoss, PGDLoss, TRADESLoss, perturb
from bt_fast.evaluation import evaluate

KINDS = {"trades": TRADESLoss, "mart": MARTLoss, "pgd": PGDLoss}
EACH = pytest.mark.parametrize("name", KINDS)
ATTACK = PGD(0.3, 0.1, 3, "l2")  # of which the least rounding moves x'
FOLD = pytest.mark.parametrize("fold", [False, True])
HALF, FULL = torch.bfloat16, torch.float32


def mined():
    bullet = BulletTrain(3, 2, 0)
    bullet.robust_fraction.fill_(0.5)
    return bullet


def dtypes_of(model):
    """Records the dtype of the logits in train and in eval mode."""
    seen = {True: set(), False: set()}
    model[-1].register_forward_hook(lambda module, _, out: seen[module.training].add(out.dtype))
    return seen


def called(name, engine, mining=None, seed=0, **options):
    """A loss after its call, with its model."""
    model, (x, y) = build(dtype=FULL), batch(12, dtype=FULL)
    criterion = KINDS[name](ATTACK, mining=mining, engine=engine, **options)
    loss = criterion(model, x, y, generator=torch.Generator().manual_seed(seed))
    loss.backward()
    return criterion.last, loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def by_hand(name, dtype, last):
    """The loss and its gradient of this x' by forwards in train mode in this precision."""
    model, (x, y) = build(dtype=FULL), batch(12, dtype=FULL)
    with torch.autocast("cpu", HALF, enabled=dtype == HALF):
        clean = None if name == "pgd" else model(x)
        logits = model(last.x_adv)
        loss = KINDS[name](ATTACK).objective(clean, logits, y)
    loss.backward()
    return logits.detach(), loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("mining", [None, mined])
@FOLD
@EACH
def test_the_attack_is_that_of_its_precision_and_the_update_that_of_its_own(name, fold, mining):
    """The x' to the bit; the update as its x' run by hand, up to the order of the samples."""
    whole = {}
    for precision in (None, "bf16"):
        whole[precision] = called(name, Engine(precision, fold=fold), mining and mining())[0].x_adv
    assert not torch.equal(whole[None], whole["bf16"])
    for part, of_attack, dtype in (("update", None, HALF), ("attack", "bf16", FULL)):
        engine = Engine("bf16", fold=fold, precision_of=part)
        last, loss, gradient = called(name, engine, mining and mining())
        assert torch.equal(last.x_adv, whole[of_attack])
        assert last.adversarial_logits.dtype == dtype
        logits, expected, gradient_by_hand = by_hand(name, dtype, last)
        assert_near(last.adversarial_logits, logits)
        assert_near(loss, expected, dtype)
        room = AUTOCAST[HALF] if dtype == HALF else TOLERANCES[FULL]["rtol"]
        assert (gradient - gradient_by_hand).norm() < room * gradient_by_hand.norm()
        assert loss.dtype == gradient.dtype == FULL


def test_mining_looks_in_the_attack_s_precision_and_a_shared_forward_is_the_update_s():
    for part, of_update, of_attack in (("update", HALF, FULL), ("attack", FULL, HALF), ("both", HALF, HALF)):
        for clean_updates in (1, "shared"):
            model, (x, y) = build(dtype=FULL), batch(12, dtype=FULL)
            seen = dtypes_of(model)
            engine = Engine("bf16", precision_of=part)
            criterion = TRADESLoss(ATTACK, mining=mined(), engine=engine, clean_updates=clean_updates)
            criterion(model, x, y).backward()
            assert seen == {True: {of_update}, False: {of_attack}}


@pytest.mark.parametrize("statistics", ["batch", "tracked"])
def test_an_attack_on_the_batch_s_statistics_has_its_precision_too(statistics):
    model, (x, y) = build(dtype=FULL), batch(dtype=FULL)
    seen = []
    model[-1].register_forward_hook(lambda module, _, out: seen.append(out.dtype))
    attack = PGD(0.1, 0.03, 3, statistics=statistics, start="normal")
    MARTLoss(attack, engine=Engine("bf16", precision_of="attack"))(model, x, y).backward()
    assert seen[-5:] == [HALF] * 3 + [FULL] * 2


def test_the_caller_s_autocast_holds_for_the_other_part():
    """Also where it has cast the weights to another dtype, which the part of 16 bits does not take."""
    model, (x, y) = build(dtype=FULL), batch(dtype=FULL)
    seen = dtypes_of(model)
    with torch.autocast("cpu", torch.float16):
        model(x)
        for values in seen.values():
            values.clear()
        criterion = TRADESLoss(ATTACK, mining=mined(), engine=Engine("bf16", precision_of="update"))
        criterion(model, x, y)
    assert seen == {True: {HALF}, False: {torch.float16}}


def test_perturb_and_evaluate_have_the_attack_s():
    model, (x, y) = build(dtype=FULL), batch(dtype=FULL)
    for part in ("update", "attack"):
        seen, twin = None, copy.deepcopy(model)
        seen = dtypes_of(twin)
        perturb(twin, x, y, ATTACK, engine=Engine("bf16", precision_of=part))
        assert seen[False] == ({FULL} if part == "update" else {HALF})
    evaluate(model, [(x, y)], ATTACK, engine=Engine("bf16", precision_of="update"))
    with pytest.raises(ValueError, match="engine must have the model's own precision"):
        evaluate(model, [(x, y)], ATTACK, engine=Engine("bf16", precision_of="attack"))


def test_augmix_has_the_update_s():
    for part, dtype in (("update", HALF), ("attack", FULL)):
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 36, 5))
        seen = dtypes_of(model.train())
        criterion = AugMixLoss(engine=Engine("bf16", precision_of=part))
        criterion(model, torch.rand(4, 3, 6, 6), torch.arange(4)).backward()
        assert seen[True] == {dtype}
        assert ("torch.bfloat16" in criterion.explain()) == (part == "update")


def test_explain_says_which():
    for part in ("update", "attack"):
        model = build(dtype=FULL)
        criterion = TRADESLoss(ATTACK, engine=Engine("bf16", precision_of=part))
        criterion(model, *batch(dtype=FULL))
        assert f"precision: the {part} in torch.bfloat16, under autocast" in criterion.explain()


def learnt(engine):
    """The losses of some iterations of SGD."""
    model, (x, y) = build(dtype=FULL), batch(12, dtype=FULL)
    criterion = TRADESLoss(ATTACK, mining=mined(), engine=engine)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for k in range(8):
        optimizer.zero_grad()
        loss = criterion(model, x, y, generator=torch.Generator().manual_seed(k))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_16_bit_updates_learn_as_those_in_full_precision_do():
    ours, full = learnt(Engine("bf16", precision_of="update")), learnt(Engine())
    assert full[-1] < 0.7 * full[0]
    torch.testing.assert_close(ours, full, rtol=AUTOCAST[HALF], atol=0)


def test_it_is_written_parsed_and_checked():
    engine = Engine.parse("bf16,precision_of=update")
    assert (engine.attack_precision, engine.update_precision) == (None, "bf16")
    assert eval(repr(engine)) == engine
    assert (Engine.of("bf16").attack_precision, Engine.of("bf16").update_precision) == ("bf16", "bf16")
    assert Engine("bf16", precision_of="attack").update_precision is None
    with pytest.raises(ValueError, match="precision_of must be one of 'both', 'attack', 'update', got 'mining'"):
        Engine("bf16", precision_of="mining")
    with pytest.raises(ValueError, match=r"precision_of='update' needs a precision.*write Engine\(precision='bf16'"):
        Engine(precision_of="update")
    with pytest.raises(ValueError, match="precision_of must be one of"):
        Engine.parse("bf16,precision_of=on")
    with pytest.raises(ValueError, match="precision_of='update' needs a precision"):
        Engine.parse("fast,precision_of=update")
