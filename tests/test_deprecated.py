"""What the first version called by another name works for this one, and its warning shows the new line."""

import pytest
import torch

import bt_fast
from bt_fast import BulletTrain, MinedPlan, Plan, ThreatModel, generate

Z, Y = torch.tensor([[9.0, 0.0], [1.0, 0.9], [0.0, 5.0]]), torch.tensor([0, 0, 0])


@pytest.mark.parametrize(("old", "new"), [("Schedule", Plan), ("Assignment", MinedPlan)])
def test_classes_by_their_old_names(old, new):
    with pytest.warns(DeprecationWarning, match=f"bt_fast.{old} .*write bt_fast.{new.__name__}") as warned:
        assert getattr(bt_fast, old) is new
    assert warned[0].filename == __file__


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
    found = generate(model, *rows, schedule, ThreatModel(0.1))
    assert torch.equal(found, generate(model, *rows, plan, ThreatModel(0.1)))
