"""AutoRunner keeps the fastest runner, leaves no trace of its trials, and explains its choice."""

import copy
import itertools
from unittest import mock

import pytest
import small_models
import torch
from emulated_device import EmulatedDevice

from bt_fast import RUNNERS, AutoRunner, BulletTrain, GraphRunner, Plan, StreamRunner, ThreatModel, trades_loss
from bt_fast.attack import auto
from bt_fast.attack.batch import AttackBatch
from bt_fast.attack.runners import run_eager

THREAT = ThreatModel(0.1)


class Slow:
    """Runs eagerly and reports a given number of seconds."""

    def __init__(self, seconds, clock):
        self.seconds, self.clock, self.runs = seconds, clock, 0

    def __call__(self, *arguments):
        self.runs += 1
        self.clock[0] += self.seconds
        run_eager(*arguments)


def attack(runner, model, n=4, threat=THREAT):
    torch.manual_seed(0)
    clean = torch.rand(n, *small_models.SHAPE, dtype=torch.float64)
    schedule = Plan.from_steps(torch.tensor([3, 1, 0, 2])[:n], torch.full((n,), 0.02))
    x_adv, faulty = clean + 0.001, torch.zeros(n, dtype=torch.int32)
    target = torch.eye(small_models.CLASSES, dtype=torch.float64)[:n]
    with EmulatedDevice():
        batch = AttackBatch.of(schedule, x_adv, clean, target, faulty)
        runner(model, batch, threat, torch.Generator().manual_seed(3))
    return x_adv


@pytest.fixture
def candidates():
    clock = [0.0]
    result = {"one": Slow(0.3, clock), "two": Slow(0.1, clock), "three": Slow(0.2, clock)}
    with mock.patch.object(auto, "now", side_effect=lambda x: clock[0]):
        yield result


@pytest.mark.parametrize("norm", ["l_inf", "l_2"])
def test_the_fastest_is_kept_and_the_result_is_the_eager_one(candidates, norm):
    model, runner = small_models.conv_bn().double().eval(), AutoRunner(candidates)
    result = [attack(runner, model, threat=ThreatModel(0.1, norm)) for _ in range(2)]
    assert all(torch.equal(x, attack(run_eager, model, threat=ThreatModel(0.1, norm))) for x in result)
    tried = auto.WARM + auto.ROUNDS
    assert [run.runs for run in candidates.values()] == [tried, tried + 2, tried]
    assert runner.reasons == ["4 x [1, 6, 6] torch.float64: two, since one 300 ms, two 100 ms, three 200 ms"]


def test_each_configuration_is_tried_once(candidates):
    model, runner = small_models.conv_bn().double().eval(), AutoRunner(candidates)
    for _ in range(2):
        attack(runner, model)
        attack(runner, model, n=3)  # a smaller last batch is not a new configuration
        attack(runner, model, threat=ThreatModel(0.2))  # nor is another ε, which a schedule may bring each time
        attack(runner, model, threat=ThreatModel(0.1, "l_2"))
    attack(runner, small_models.conv_bn().double().eval())
    assert len(runner.reasons) == 3


def test_without_candidates_of_one_s_own_graphs_and_streams_are_tried():
    model = small_models.conv_bn().double().eval()
    runner = AutoRunner()
    assert torch.equal(attack(runner, model), attack(run_eager, model))
    assert all(name in runner.reasons[0] for name in ("eager", "graphs", "streams"))


def test_what_was_not_chosen_keeps_no_graphs():
    model, graphs, streams = small_models.conv_bn().double().eval(), GraphRunner(), StreamRunner()
    clock = itertools.count()  # by this clock all candidates take the same time, so the first one wins
    with mock.patch.object(auto, "now", side_effect=lambda x: next(clock)):
        attack(AutoRunner({"eager": run_eager, "graphs": graphs, "streams": streams}), model)
    assert graphs.explain(model) == "eagerly, until a size comes again"
    assert not any(chain._graphs[model].captured for chain in streams._chains)


def test_on_the_cpu_it_runs_eagerly_and_says_so():
    original, result = small_models.conv_bn(), []
    x, y = torch.rand(6, *small_models.SHAPE), torch.arange(6) % small_models.CLASSES
    for runner in (run_eager, AutoRunner()):
        options = {"bullet": BulletTrain(2, 1, 0), "generator": torch.Generator().manual_seed(0)}
        result.append(trades_loss(copy.deepcopy(original), x, y, None, runner=runner, **options).detach())
    assert torch.equal(*result)
    assert "eager, since the images are on cpu" in runner.reasons[0]


def test_no_candidate_is_refused():
    with pytest.raises(ValueError, match="candidates"):
        AutoRunner({})


@pytest.mark.parametrize("name", RUNNERS)
def test_a_name_stands_for_a_runner_shared_by_all(name):
    x, y = torch.rand(6, *small_models.SHAPE, dtype=torch.float64), torch.arange(6) % small_models.CLASSES
    original, result = small_models.conv_bn().double(), []
    for runner in ("eager", name):
        model, bullet = copy.deepcopy(original), BulletTrain(2, 1, 0)
        with EmulatedDevice() as emulated:
            for _ in range(3):
                options = {"bullet": bullet, "generator": torch.Generator().manual_seed(0)}
                loss = trades_loss(model, x, y, None, runner=runner, **options)
        result.append([loss.detach(), *model.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*result, strict=True))
    assert bool(emulated.captures) == (name != "eager")


def test_the_runner_that_chooses_by_itself_says_why():
    before = len(RUNNERS["auto"].reasons)
    x, y = torch.rand(6, *small_models.SHAPE), torch.arange(6) % small_models.CLASSES
    trades_loss(small_models.conv_bn(), x, y, None, runner="auto")
    assert RUNNERS["auto"].reasons[before:] == [
        "6 x [1, 6, 6] torch.float32: eager, since the images are on cpu, and graphs are CUDA's"
    ]


@pytest.mark.parametrize(("runner", "error"), [("fast", ValueError), (True, TypeError), (None, TypeError)])
def test_what_is_no_runner_is_refused(runner, error):
    x, y = torch.rand(6, *small_models.SHAPE), torch.arange(6) % small_models.CLASSES
    with pytest.raises(error, match="runner must be a runner or"):
        trades_loss(small_models.conv_bn(), x, y, None, runner=runner)
