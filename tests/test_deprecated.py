"""Names of the first version still work in this one, and their warnings show the new line."""

import importlib
import warnings

import pytest
import small_models
import torch

import bt_fast
from bt_fast import (
    PGD,
    BulletTrain,
    Engine,
    Frozen,
    MinedPlan,
    Normalization,
    PGDLoss,
    Plan,
    ThreatModel,
    TRADESLoss,
    Update,
    deprecated,
    evaluate,
    generate,
    mart_loss,
    pgd_loss,
    trades_loss,
)
from bt_fast.attack import folded, forward, wrapped
from bt_fast.baselines.fast import fast_loss
from bt_fast.warning import warn_deprecated


@pytest.fixture(autouse=True)
def loud_keywords(monkeypatch):
    monkeypatch.setattr(deprecated, "warn_deprecated", warn_deprecated)


Z, Y = torch.tensor([[9.0, 0.0], [1.0, 0.9], [0.0, 5.0]]), torch.tensor([0, 0, 0])


@pytest.mark.parametrize(("old", "new"), [("Schedule", Plan), ("Assignment", MinedPlan)])
def test_classes_by_their_old_names(old, new):
    with pytest.warns(DeprecationWarning, match=f"bt_fast.{old} .*write bt_fast.{new.__name__}") as warned:
        assert getattr(bt_fast, old) is new
    assert warned[0].filename == __file__


def test_names_in_their_old_modules():
    with pytest.warns(DeprecationWarning, match="write bt_fast.Plan"):
        from bt_fast.attack.schedule import Schedule
    with pytest.warns(DeprecationWarning, match="write bt_fast.MinedPlan"):
        from bt_fast.mining import Assignment
    with pytest.warns(DeprecationWarning, match="write bt_fast.deciding.STEP_FACTOR"):
        from bt_fast.mining import STEP_FACTOR
    with pytest.warns(DeprecationWarning, match="write bt_fast.attack.forward.eval_mode"):
        from bt_fast.attack.frozen import eval_mode
    assert (Schedule, Assignment, STEP_FACTOR) == (Plan, MinedPlan, 1.7)
    with pytest.warns(DeprecationWarning, match="write bt_fast.attack.wrapped.gathered"):
        from bt_fast.attack.sharded import gathered
    with pytest.warns(DeprecationWarning, match="write bt_fast.attack.folded.FoldedModel"):
        from bt_fast.attack.folded import FrozenModel
    assert (eval_mode, gathered, FrozenModel) == (forward.eval_mode, wrapped.gathered, folded.FoldedModel)
    for module in ("mining", "attack.schedule", "attack.frozen", "attack.sharded", "attack.folded"):
        with pytest.raises(AttributeError, match="has no attribute 'Scheduler'"):
            _ = importlib.import_module(f"bt_fast.{module}").Scheduler


def test_a_name_that_never_was():
    with pytest.raises(AttributeError, match="has no attribute 'Scheduler'"):
        _ = bt_fast.Scheduler


def test_assign_counts_at_once_and_update_moves_the_fraction():
    old, new = BulletTrain(), BulletTrain()
    with pytest.warns(DeprecationWarning, match=r"write bullet.plan\(...\)"):
        assignment = old.assign(Z, Y)
    assert old.group_counts.tolist() == [1, 2, 0]
    with pytest.warns(DeprecationWarning, match=r"write bullet.observe\("):
        old.update(Z, Y)
    assert torch.equal(new.plan(Z, Y).steps, assignment.steps)
    new.observe(Z, Y)
    for name, value in new.state_dict().items():
        assert torch.equal(old.state_dict()[name], value), name


def test_an_assignments_schedule():
    model = torch.nn.Linear(4, 2)
    x, target, plan = torch.rand(3, 4), Z.softmax(dim=1), BulletTrain().plan(Z, Y)
    with pytest.warns(DeprecationWarning, match=r"what bullet.plan returns"):
        schedule = Plan.from_assignment(plan)
    rows = [schedule.sort(t) for t in (x, x, target)]
    result = generate(model, *rows, schedule, ThreatModel(0.1))
    assert torch.equal(result, generate(model, *rows, plan, ThreatModel(0.1)))


# Keywords

X, LABELS = torch.rand(6, 1, 6, 6, dtype=torch.float64), torch.arange(6) % 5
SMALL = (0.03, 0.1)  # step size and epsilon


ATTACK = PGD(0.1, 0.03, 10)


def ours(kind, attack=ATTACK, mining=None, **call):
    def run(model):
        beta = {} if kind is PGDLoss else {"beta": 1.0 if kind is TRADESLoss else 6.0}
        return kind(attack, mining=mining, engine="exact", **beta)(model, X, LABELS, **call)

    return run


def bullet(**options):
    return BulletTrain(10, 0, 0, **options)


NUMBERS, LOADER = torch.arange(6), Normalization((0.0,), (1.0,))
KEYWORDS = {
    "start": ({"start": "uniform"}, ours(TRADESLoss, PGD(0.1, 0.03, 10, start="uniform"))),
    "samples": ({"samples": NUMBERS}, ours(TRADESLoss, indices=NUMBERS)),
    "normalization": ({"normalization": LOADER}, ours(TRADESLoss, PGD(0.1, 0.03, 10, normalization=LOADER))),
    "unperturbed": (
        {"unperturbed": "keep", "bullet": bullet()},
        ours(TRADESLoss, mining=bullet(unperturbed="keep")),
    ),
    "runner": ({"runner": "eager"}, ours(TRADESLoss)),
}


@pytest.mark.parametrize("name", KEYWORDS)
def test_an_old_keyword_is_its_new_line(name):
    keywords, new = KEYWORDS[name]
    model, twin = small_models.build("conv_bn"), small_models.build("conv_bn")
    torch.manual_seed(0)
    with pytest.warns(DeprecationWarning, match=f"the argument {name}= of trades_loss .*: write ") as warned:
        result = trades_loss(model, X, LABELS, None, *SMALL, **keywords)
    assert warned[0].filename == __file__
    torch.manual_seed(0)
    assert torch.equal(result, new(twin))


@pytest.mark.parametrize("name", ["frozen", "update"])
def test_old_ways_of_execution_are_an_engine(name):
    old = {"frozen": Frozen(), "update": Update()}[name]
    new = {"frozen": Engine(fold=True, channels_last=True), "update": Engine(channels_last=True)}[name]
    model, twin = small_models.build("conv_bn"), small_models.build("conv_bn")
    torch.manual_seed(0)
    with pytest.warns(DeprecationWarning, match=f"{name}= .*write engine='fast', or engine=Engine"):
        result = trades_loss(model, X, LABELS, None, *SMALL, **{name: old})
    torch.manual_seed(0)
    torch.testing.assert_close(result, trades_loss(twin, X, LABELS, None, *SMALL, engine=new))


@pytest.mark.parametrize("loss", [trades_loss, mart_loss, pgd_loss])
def test_a_keyword_that_never_was_is_an_error_that_says_what_to_write(loss):
    with pytest.raises(TypeError, match=rf"{loss.__name__}\(\) has no argument 'steps': write one of its own"):
        loss(small_models.build(), X, LABELS, None, steps=10)


def test_keywords_of_generate_and_evaluate():
    model, target = small_models.build("conv_bn"), torch.eye(5, dtype=torch.float64)[LABELS]
    plan, threat = Plan.uniform(6, 3, 0.03, X.device), ThreatModel(0.1)
    with pytest.warns(DeprecationWarning, match="frozen= of generate .*write engine='fast'"):
        old = generate(model, X, X, target, plan, threat, frozen=Frozen())
    torch.testing.assert_close(old, generate(model, X, X, target, plan, threat, engine="fast"))
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    with pytest.warns(DeprecationWarning, match=r"steps= of evaluate .*write evaluate\(model, batches, PGD"):
        old = evaluate(model, [(X, LABELS)], threat, steps=5, step_size=0.03, generator=generators[0])
    new = evaluate(model, [(X, LABELS)], PGD(0.1, 0.03, 5), generator=generators[1])
    assert (old.robust_correct, old.step.tolist()) == (new.robust_correct, new.step.tolist())
    with pytest.raises(ValueError, match="attack must start anywhere in the ball"):
        evaluate(model, [(X, LABELS)], PGD(0.1, 0.03, 5, start="normal"))
    with pytest.raises(
        ValueError, match=r"steps is an option of the attack where that is a PGD: write PGD\(..., steps=3\)"
    ):
        evaluate(model, [(X, LABELS)], PGD(0.1, 0.03, 5), steps=3)


def test_an_engine_and_an_old_way_of_execution_are_not_mixed():
    model, plan = small_models.build("conv_bn"), Plan.uniform(6, 3, 0.03, X.device)
    with pytest.raises(ValueError, match="engine='fast' says already how it is executed"):
        trades_loss(model, X, LABELS, None, *SMALL, engine="fast", runner="eager")
    with pytest.raises(ValueError, match="engine='fast' says already how it is executed"):
        generate(model, X, X, torch.eye(5).double()[LABELS], plan, ThreatModel(0.1), engine="fast", frozen=Frozen())


def test_old_defaults_are_no_news():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trades_loss(small_models.build("conv_bn"), X, LABELS, None, *SMALL, frozen=None, unperturbed=None, start=None)


def test_a_keyword_that_pgd_never_had():
    with pytest.raises(TypeError, match=r"pgd_loss\(\) has no argument 'unperturbed'"):
        pgd_loss(small_models.build("conv_bn"), X, LABELS, None, unperturbed="skip")
    with pytest.raises(TypeError, match=r"fast_loss\(\) has no argument 'rounds'"):
        fast_loss(trades_loss, small_models.build("conv_bn"), X, LABELS, None, epsilon=0.1, rounds=3)
