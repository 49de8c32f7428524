"""The losses as modules give the functions' numbers; what modules add is tested here."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import numpy as np
import pytest
import small_models
import torch
from emulated_device import EmulatedDevice
from torch import nn

from bt_fast import (
    PGD,
    AdversarialLoss,
    AugMixLoss,
    BulletTrain,
    Engine,
    MARTLoss,
    Normalization,
    Normalize,
    PGDLoss,
    TRADESLoss,
    augmix_loss,
    mart_loss,
    ops,
    perturb,
    pgd_loss,
    trades_loss,
)

KINDS = {TRADESLoss: trades_loss, MARTLoss: mart_loss, PGDLoss: pgd_loss}
NORMS = {"linf": "l_inf", "l2": "l_2"}
EACH = pytest.mark.parametrize("kind", KINDS)
ATTACK = PGD(0.1, 0.03, 4)


def mined(steps=4, **options):
    return BulletTrain(steps, 1, 0, **options)


def state(model, *more):
    values = [*(b for b in model.buffers()), *(p.grad for p in model.parameters()), *more]
    return [torch.get_rng_state(), *(None if v is None else v.detach().clone() for v in values)]


def same(a, b):
    return all((x is None) == (y is None) and (x is None or torch.equal(x, y)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("mining", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@EACH
def test_with_the_engine_exact_it_is_the_function_to_the_bit(kind, norm, mining):
    result = []
    for as_module in (False, True):
        torch.manual_seed(0)
        model, (x, y) = small_models.build("conv_bn"), small_models.batch(8)
        bullet = mined() if mining else None
        if as_module:
            size = 0.03 if norm == "linf" or kind is PGDLoss else 2 * 0.1 / 4  # the authors' own in l2
            beta = {} if kind is PGDLoss else {"beta": 2.0}
            loss = kind(PGD(0.1, size, 4, norm), mining=bullet, engine="exact", **beta)(model, x, y)
        else:
            beta = {} if kind is PGDLoss else {"beta": 2.0}
            steps = {} if mining else {"perturb_steps": 4}
            loss = KINDS[kind](model, x, y, None, 0.03, 0.1, distance=NORMS[norm], bullet=bullet, **beta, **steps)
        loss.backward()
        result.append(state(model, loss, *([] if bullet is None else bullet.buffers())))
    assert same(*result)


@pytest.mark.parametrize("mining", [False, True])
@EACH
def test_fast_is_exact_up_to_rounding_and_bf16_keeps_weights_loss_and_gradients_in_float32(kind, mining):
    losses = {}
    for engine in ("exact", "fast", "bf16"):
        torch.manual_seed(0)
        model, (x, y) = small_models.build("conv_bn", dtype=torch.float32), small_models.batch(8, dtype=torch.float32)
        loss = kind(ATTACK, mining=mined() if mining else None, engine=engine)(model, x, y)
        loss.backward()
        assert {loss.dtype, *(p.dtype for p in model.parameters()), *(p.grad.dtype for p in model.parameters())} == {
            torch.float32
        }
        losses[engine] = loss.item()
    assert losses["fast"] == pytest.approx(losses["exact"], rel=1e-4)
    assert losses["bf16"] == pytest.approx(losses["exact"], rel=0.05)
    assert losses["bf16"] != losses["fast"]


@EACH
def test_what_there_is_to_log_is_in_the_callers_order(kind):
    model, (x, y) = small_models.build("conv_bn"), small_models.batch(12)
    mining = mined()
    criterion = kind(ATTACK, mining=mining, engine="exact")
    with pytest.raises(RuntimeError, match=r"call the loss first, criterion\(model, x, y\)"):
        _ = criterion.last
    criterion(model, x, y)
    last = criterion.last
    moved = (last.x_adv - x).flatten(1).abs().amax(dim=1)
    assert torch.equal(moved > 0, last.steps > 0)
    assert 0 < (last.steps > 0).sum() < 12, "the case has both"
    assert bool((moved <= 0.1 + 1e-12).all())
    model.eval()
    clean = model(x)
    assert torch.equal(last.steps == 4, clean.argmax(dim=1) == y)  # at F_R = 0
    assert (last.logits is None) == (kind is PGDLoss)
    assert last.adversarial_logits.shape == clean.shape


class Margin(AdversarialLoss):
    """A custom loss."""

    weight = 1.0

    def objective(self, clean_logits, adversarial_logits, y):
        at, others = adversarial_logits.gather(1, y[:, None]), adversarial_logits.scatter(1, y[:, None], -1e9)
        return self.weight * (1 + others - at).clamp(min=0).mean() + nn.functional.cross_entropy(clean_logits, y)


@pytest.mark.parametrize("mining", [None, mined()])
@pytest.mark.parametrize("engine", ["exact", "fast", Engine(graphs=True)])
def test_a_loss_of_ones_own_is_its_objective(engine, mining):
    torch.manual_seed(0)
    model, (x, y) = small_models.build("conv_bn"), small_models.batch(8)
    criterion = Margin(ATTACK, mining=copy.deepcopy(mining), engine=engine)
    loss = criterion(model, x, y)
    loss.backward()
    last = criterion.last
    expected = Margin.objective(criterion, last.logits, last.adversarial_logits, y)
    torch.testing.assert_close(loss, expected)
    assert all(p.grad is not None for p in model.parameters())


def test_without_an_objective_there_is_no_loss():
    with pytest.raises(TypeError, match="objective"):
        AdversarialLoss(ATTACK)


# As an nn.Module


def test_mining_is_a_part_of_it():
    model, (x, y) = small_models.build("conv_bn"), small_models.batch(8)
    criterion = TRADESLoss(ATTACK, mining=mined())
    criterion(model, x, y)
    assert criterion.mining.group_counts.sum() == 8
    file = io.BytesIO()
    torch.save(criterion.state_dict(), file)
    other = TRADESLoss(ATTACK, mining=mined())
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert torch.equal(other.mining.group_counts, criterion.mining.group_counts)
    assert next(criterion.to("meta").buffers()).is_meta


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["copy", "pickle"])
def test_a_copy_has_its_numbers_and_nothing_of_its_last_minibatch(copied):
    model, (x, y) = small_models.build("conv_bn"), small_models.batch(8)
    criterion = MARTLoss(ATTACK, beta=3.0, mining=mined(), engine="fast")
    criterion(model, x, y)
    twin = copied(criterion)
    assert (twin.beta, twin.attack, twin.engine) == (3.0, ATTACK, criterion.engine)
    assert torch.equal(twin.mining.robust_fraction, criterion.mining.robust_fraction)
    with pytest.raises(RuntimeError):
        _ = twin.last
    twin(model, x, y)


@pytest.mark.parametrize("kind", [*KINDS, AugMixLoss])
def test_a_loss_that_was_saved_before_there_were_these_options_loads(kind):
    model, x, y = small_models.build("conv_bn").float(), torch.rand(4, *small_models.SHAPE), torch.tensor([0, 1, 2, 0])
    criterion = kind() if kind is AugMixLoss else kind(ATTACK)
    state = dict(criterion.__reduce_ex__(2)[2])
    for name in ("_passes", "extra", "_selection", "cross_entropy"):
        state.pop(name, None)
    loaded = kind.__new__(kind)
    loaded.__setstate__(state)
    losses = []
    for one in (criterion, loaded):
        torch.manual_seed(0)
        losses.append(one(copy.deepcopy(model), x, y))
    assert torch.equal(*losses)


def test_it_holds_no_model_alive():
    criterion = TRADESLoss(ATTACK, mining=mined(), engine="fast")
    model, (x, y) = small_models.build("conv_bn"), small_models.batch(8)
    gone = weakref.ref(model)
    criterion(model, x, y).backward()
    del model
    gc.collect()
    assert gone() is None


def test_the_repr_is_how_it_would_be_written():
    shown = repr(TRADESLoss(ATTACK, mining=mined(unperturbed="skip"), engine=Engine(fold=True)))
    assert "PGD(epsilon=0.1, step_size=0.03, steps=4" in shown
    assert "engine='Engine(fold=True)'" in shown
    assert "BulletTrain(4, 1, 0, gamma=0.8, momentum=0.9, unperturbed='skip')" in shown


# Options


@pytest.mark.parametrize("kind", [TRADESLoss, MARTLoss])
def test_unperturbed_is_an_option_of_mining(kind):
    result = {}
    for unperturbed in ("keep", "skip", None):
        torch.manual_seed(0)
        model, (x, y) = small_models.build("conv_bn"), small_models.batch(12)
        result[unperturbed] = kind(ATTACK, mining=BulletTrain(4, 0, 0, unperturbed=unperturbed))(model, x, y).item()
    assert result[None] == result["skip"] != result["keep"]


@EACH
def test_normalised_images_are_attacked_as_their_pixels(kind):
    mean, std = (0.4,), (0.25,)
    model, (x, y) = small_models.build("conv_bn"), small_models.batch(8)
    twin = copy.deepcopy(model)
    shape = (1, 1, 1, 1)
    loader = (x - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    torch.manual_seed(0)
    attack = PGD(0.1, 0.03, 4, normalization=Normalization(mean, std))
    result = kind(attack, engine="exact")(model, loader, y)
    torch.manual_seed(0)
    expected = kind(ATTACK, engine="exact")(nn.Sequential(Normalize(mean, std).double(), twin), x, y)
    assert result.item() == pytest.approx(expected.item(), rel=1e-5)


def test_other_bounds_of_pixels():
    model, (x, y) = small_models.build("conv_bn"), small_models.batch(8)
    criterion = PGDLoss(PGD(0.5, 0.2, 4, bounds=(-1, 1)), engine="exact")
    criterion(model, 2 * x - 1, y)
    assert -1 <= criterion.last.x_adv.min() < criterion.last.x_adv.max() <= 1
    with pytest.raises(ValueError, match=r"x must lie in \[-1, 1\]"):
        criterion(model, 4 * x, y)


@EACH
def test_starts_by_the_samples_numbers_do_not_depend_on_the_batch(kind):
    model, (x, y) = small_models.build("conv_bn"), small_models.batch(8)
    generator, indices = torch.Generator().manual_seed(3), torch.arange(100, 108)
    criterion = kind(ATTACK, engine="exact")
    criterion(copy.deepcopy(model), x, y, indices, generator=generator)  # on a copy, since batch norm moves
    whole = criterion.last.x_adv
    criterion(copy.deepcopy(model), x[3:5], y[3:5], indices[3:5], generator=generator)
    torch.testing.assert_close(criterion.last.x_adv, whole[3:5], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attack": 3}, TypeError, "attack must be a PGD, got int"),
        ({"mining": 3}, TypeError, "mining must be a BulletTrain or None, got int"),
        ({"engine": "quick"}, ValueError, "engine must be one of exact, fast, bf16, got 'quick'"),
        ({"engine": None}, TypeError, "engine must be a name or an Engine, got NoneType"),
        ({"beta": -1.0}, ValueError, "beta must be a finite number of at least 0, got -1.0"),
        ({"mining": BulletTrain(7)}, ValueError, "attack takes 4 steps, but mining 7 boundary steps"),
    ],
)
def test_what_does_not_fit_is_named(options, error, message):
    with pytest.raises(error, match=message):
        TRADESLoss(**{"attack": ATTACK} | options)


def test_options_of_mining_that_mean_nothing_to_a_loss_are_refused():
    x, y = small_models.batch(4)
    with pytest.raises(ValueError, match="mining's unperturbed must be 'keep' or None for PGDLoss"):
        PGDLoss(ATTACK, mining=mined(unperturbed="skip"))
    criterion = PGDLoss(ATTACK, mining=mined())
    criterion.mining = mined(unperturbed="skip")
    with pytest.raises(ValueError, match="mining's unperturbed must be 'keep' or None for PGDLoss"):
        criterion(small_models.build("conv_bn"), *small_models.batch(8))
    with pytest.raises(ValueError, match="mining's unperturbed and balance must be None: AugMix"):
        AugMixLoss(BulletTrain(1, 0, 0, unperturbed="skip"))
    with pytest.raises(ValueError, match="attack takes 3 steps, but mining 4 boundary steps"):
        perturb(small_models.build("conv_bn"), x, y, PGD(0.1, 0.03, 3), mined())


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0], torch.tensor([0])), {}, TypeError, "x must be a tensor of images, got list"),
        ((torch.rand(2, 1, 6, 6).double(), [0, 1]), {}, TypeError, "y must be"),
        ((torch.rand(2, 1, 6, 6), torch.tensor([0, 1]), torch.tensor([1])), {}, ValueError, "indices must"),
        ((torch.rand(2, 1, 6, 6), torch.tensor([0, 1])), {"generator": 3}, TypeError, "generator must be"),
        ((torch.rand(2, 1, 6, 6) + 1, torch.tensor([0, 1])), {}, ValueError, r"x must lie in \[0, 1\]"),
    ],
)
def test_what_a_call_cannot_take_is_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        TRADESLoss(ATTACK)(small_models.build("conv_bn", dtype=torch.float32), *arguments, **options)


# Texts


def test_it_explains_what_ran_and_what_did_not():
    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = small_models.build("conv_bn")

        def forward(self, x):
            return self.body(x if float(x.sum()) > 0 else -x)

    x, y = small_models.batch(8)
    criterion = TRADESLoss(ATTACK, mining=mined())
    assert criterion.explain() == "TRADESLoss, engine 'fast': not called yet"
    criterion(model := small_models.build("conv_bn"), x, y)
    assert "folded view: yes" in criterion.explain()
    assert "attack steps: eagerly, since graphs and streams are CUDA's" in criterion.explain()
    with pytest.warns(UserWarning, match="not folded"):
        criterion(model := Untraceable(), x, y)
    assert "folded view: no, it cannot be traced" in criterion.explain()
    del model
    gc.collect()
    assert "the model of the last call is gone" in criterion.explain()
    exact = TRADESLoss(ATTACK, engine="exact")
    model = small_models.build("conv_bn")
    exact(model, x, y)
    assert "folded view: no, not asked for" in exact.explain()


def test_under_graphs_it_is_the_eager_loss_in_any_order_and_says_what_it_captured():
    def run(engine):
        model, bullet, result = small_models.build("conv_bn"), mined(), []
        criterion = TRADESLoss(ATTACK, mining=bullet, engine=engine)
        for k in range(4):
            torch.manual_seed(k)
            x, y = small_models.batch(6, seed=k)
            loss = criterion(model, x, y)
            loss.backward()
            result += [v.detach().clone() for v in (loss, *(p.grad for p in model.parameters()), *model.buffers())]
            model.zero_grad()
        return result, criterion.explain()

    expected, _ = run("exact")
    with EmulatedDevice() as emulated:
        result, explained = run(Engine(graphs=True))
    assert emulated.replays
    assert "attack steps: from CUDA graphs" in explained
    for seed in range(5):
        shuffled = emulated.shuffled(seed, result)
        assert all(torch.equal(a, b) for a, b in zip(shuffled, expected, strict=True)), seed


def under_graphs(make, change, engine):
    """Returns losses of six minibatches; `change` changes the loss before the fourth."""
    model, result, criterion = small_models.build("conv_bn"), [], make(engine)
    for k in range(6):
        if k == 3:
            change(criterion)
        torch.manual_seed(k)
        loss = criterion(model, *small_models.batch(6, seed=k))
        loss.backward()
        model.zero_grad()
        result.append(loss.detach().clone())
    return result, criterion.explain()


class Keyed(Margin):
    """A loss that declares what its objective reads."""

    def objective(self, clean_logits, adversarial_logits, y):
        return super().objective(clean_logits, adversarial_logits, y)

    def graph_key(self):
        return (self.weight,)


@pytest.mark.parametrize(
    ("kind", "name", "captured"),
    [(TRADESLoss, "beta", True), (MARTLoss, "beta", True), (Margin, "weight", False), (Keyed, "weight", True)],
)
@pytest.mark.parametrize("number", [6.0, np.float64(6.0)])
def test_a_number_that_changes_is_no_longer_that_of_a_graph(kind, name, captured, number):
    options = {"beta": 1.0} if name == "beta" else {}
    arguments = (lambda engine: kind(ATTACK, engine=engine, **options), lambda loss: setattr(loss, name, number))
    expected, _ = under_graphs(*arguments, "exact")
    with EmulatedDevice(), warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        result, explained = under_graphs(*arguments, Engine(graphs=True))
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    assert ("update: from CUDA graphs" in explained) == captured
    assert any("without a graph_key" in str(w.message) for w in messages) == (not captured)


def test_beta_and_engine_may_be_set_and_are_checked():
    criterion = TRADESLoss(ATTACK)
    criterion.beta, criterion.engine = 3, "exact"
    assert (criterion.beta, criterion.engine) == (3.0, Engine())
    with pytest.raises(ValueError, match="beta must be a finite number of at least 0"):
        criterion.beta = -1.0
    with pytest.raises(ValueError, match="engine must be one of"):
        criterion.engine = "quick"


@EACH
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("attack", PGD(0.1, 0.03, 3), "attack takes 3 steps, but mining 4 boundary steps"),
        ("attack", PGD(0.1, 0.03, 4, statistics="batch"), "attack's statistics must be 'running' with BulletTrain"),
        ("attack", PGD(0.1, 0.03, 4, start="clean", inner="lse"), "attack must not start at x with the inner loss"),
        ("attack", 0.1, "attack must be a PGD, got float"),
        ("mining", mined(5), "attack takes 4 steps, but mining 5 boundary steps"),
        ("extra", 3, "extra must be a function of an UpdateBatch, got int"),
    ],
)
def test_attack_mining_and_extra_may_be_set_and_are_checked_by_the_next_call(kind, name, value, message):
    model, (x, y) = small_models.build("conv_bn"), small_models.batch(6)
    criterion = kind(ATTACK, mining=mined(), extra=len)
    setattr(criterion, name, value)
    before = state(model, *criterion.mining.buffers())
    with pytest.raises((TypeError, ValueError), match=message):
        criterion(model, x, y)
    assert same(before, state(model, *criterion.mining.buffers()))


def test_a_schedule_of_epsilon_sets_the_attack():
    model, (x, y) = small_models.build("conv_bn"), small_models.batch(6)
    criterion = PGDLoss(PGD(0.0, 0.0, 4))
    for epsilon in (0.0, 0.02, 0.1):
        criterion.attack = PGD(epsilon, epsilon / 2, 4)
        criterion(model, x, y)
        assert (criterion.last.x_adv - x).abs().max().item() == pytest.approx(epsilon, rel=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_a_schedule_of_epsilon_and_step_size_is_captured_once(norm):
    attacks = [PGD(0.01 * k, 0.004 * k, 3, norm) for k in range(1, 11)]

    def run(engine, schedule):
        model, criterion, result = small_models.build("conv_bn"), PGDLoss(attacks[0], engine=engine), []
        for k, attack in enumerate(schedule):
            torch.manual_seed(k)
            criterion.attack = attack
            criterion(model, *small_models.batch(8, seed=k)).backward()  # eight, the rows of a graph: no row pads it
            result.append(criterion.last.x_adv.clone())
        return result

    captures = []
    for schedule in ([attacks[0]] * 10, attacks):
        with EmulatedDevice() as emulated:
            result = run(Engine(graphs=True), schedule)
        captures.append(emulated.captures)
        assert same(result, run("exact", schedule))
    assert captures[0] == captures[1] > 0


def test_what_stopped_once_is_not_why_the_next_runs():
    model, (x, y) = small_models.build("conv_bn"), small_models.batch(6)
    criterion = TRADESLoss(ATTACK, engine=Engine(graphs=True))
    with EmulatedDevice(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            criterion(model, x, y).backward()
        with torch.no_grad():
            criterion(model, x, y)
        assert "update: eagerly, since there is no gradient to take" in criterion.explain()
        criterion(model, x, y).backward()
        assert "update: from CUDA graphs" in criterion.explain()


# AugMix


@pytest.mark.parametrize("mining", [None, BulletTrain(1, 0, 0)])
def test_augmix_with_the_engine_exact_is_the_function_to_the_bit(mining):
    result = []
    for as_module in (False, True):
        model, (x, y) = small_models.build("conv_bn"), small_models.batch(8)
        bullet, generator = copy.deepcopy(mining), torch.Generator().manual_seed(0)
        if as_module:
            loss = AugMixLoss(bullet, engine="exact")(model, x, y, generator=generator)
        else:
            loss = augmix_loss(model, x, y, bullet=bullet, generator=generator)
        loss.backward()
        result.append(state(model, loss, *([] if bullet is None else bullet.buffers())))
    assert same(*result)


# perturb


@pytest.mark.parametrize("norm", NORMS)
def test_perturb_draws_and_attacks_as_the_authors_trades_does(norm):
    model, (x, y) = small_models.build("conv_bn"), small_models.batch(8)
    attack = PGD(0.1, 0.03 if norm == "linf" else 2 * 0.1 / 4, 4, norm)
    criterion = TRADESLoss(attack, engine="exact")
    torch.manual_seed(0)
    criterion(copy.deepcopy(model), x, y)
    torch.manual_seed(0)
    result = perturb(model, x, y, attack)
    assert torch.equal(result, criterion.last.x_adv)
    assert all(p.grad is None for p in model.parameters())


def test_perturb_with_mining_is_in_the_callers_order_and_tells_the_rest():
    model, (x, y) = small_models.build("conv_bn"), small_models.batch(12)
    mining = mined()
    result = perturb(model, x, y, ATTACK, mining, return_details=True)
    model.eval()
    assert torch.equal(result.logits, model(x))
    assert torch.equal(result.steps == 4, model(x).argmax(dim=1) == y)
    assert torch.equal((result.x_adv != x).flatten(1).any(dim=1), result.steps > 0)
    assert torch.equal(result.group == ops.OUTLIER, model(x).argmax(dim=1) != y)
    assert not mining.group_counts.any()
    mining.observe(model(result.x_adv), y)
    assert mining.group_counts.sum() == 12


def test_a_minibatch_that_is_not_observed_is_warned_of():
    model, (x, y) = small_models.build("conv_bn"), small_models.batch(8)
    mining = mined()
    perturb(model, x, y, ATTACK, mining)
    with pytest.warns(UserWarning, match=r"call mining.observe\(adversarial_logits, y\) once"):
        x_adv = perturb(model, x, y, ATTACK, mining)
    mining.observe(model(x_adv), y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        perturb(model, x, y, ATTACK, mining)
    mining.observe(model(x_adv), y)
    with pytest.raises(ValueError, match="must lie in"):
        TRADESLoss(ATTACK, mining=mining, engine="exact")(model, 2 * x, y)
    with warnings.catch_warnings():  # a failed call was no minibatch
        warnings.simplefilter("error")
        perturb(model, x, y, ATTACK, mining)


def test_perturbed_images_are_in_the_units_of_those_given():
    mean, std = (0.4,), (0.25,)
    shape = (1, 1, 1, 1)
    model, (x, y) = small_models.build("conv_bn"), small_models.batch(8)
    loader = (x - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    attack, mining = PGD(0.1, 0.03, 4, normalization=Normalization(mean, std)), mined()
    result = perturb(model, loader, y, attack, mining)
    moved = ((result - loader).abs() * torch.tensor(std).view(shape)).flatten(1).amax(dim=1)
    assert 0.09 < moved.max() <= 0.1 + 1e-6
    assert (moved == 0).any(), "a sample without steps is itself, to the bit"
    criterion = TRADESLoss(attack, mining=mined(), engine="exact")
    criterion(model, loader, y)
    last = criterion.last
    moved = ((last.x_adv - loader).abs() * torch.tensor(std).view(shape)).flatten(1).amax(dim=1)
    assert torch.equal(moved > 0, last.steps > 0)
    assert moved.max() <= 0.1 + 1e-6
