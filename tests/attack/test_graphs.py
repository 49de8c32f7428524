"""An attack from graphs and on streams gives the eager result, in every order of work that CUDA permits."""

import functools
import gc
import warnings
import weakref
from dataclasses import replace
from unittest import mock

import ordinary_loops
import pytest
import small_models
import torch
from emulated_device import UNWINDS, EmulatedDevice, NotPermittedError, capturing
from planted import Bug, left_out, planted
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from bt_fast import BulletTrain, Frozen, Plan, ThreatModel, trades_loss
from bt_fast.attack import captures, graphs, streams
from bt_fast.attack.auto import AutoRunner
from bt_fast.attack.batch import AttackBatch
from bt_fast.attack.folded import attack_model
from bt_fast.attack.graphs import GraphRunner
from bt_fast.attack.runners import run_eager, start_of
from bt_fast.attack.streams import StreamRunner

THREAT = ThreatModel(0.1)
COUNTS = [[3, 3, 1, 0], [2, 3, 2, 1, 3], [0, 3, 2], [1, 2, 1, 0, 1]]


class Training:
    """Attacks several batches, and after each updates the weights and overwrites the batch's memory."""

    def __init__(self, build, counts=COUNTS, threat=THREAT, inner="kl", own=False):
        torch.manual_seed(0)
        self.inner = inner
        self.model = build().double().eval()
        self.batches, self.threat, self.own = [], threat, own  # whether each sample has an ε of its own
        for steps in counts:
            steps = torch.tensor(steps)
            schedule = Plan.from_steps(steps, torch.linspace(0.01, 0.03, len(steps)))
            clean = torch.rand(len(steps), *small_models.SHAPE, dtype=torch.float64)
            target = torch.rand(len(steps), small_models.CLASSES, dtype=torch.float64).softmax(dim=1)
            self.batches.append((clean, target, schedule))

    def run(self, runner, frozen=None):
        result, generator = [], torch.Generator().manual_seed(0)
        for clean, target, schedule in self.batches:
            x_adv, clean, target = clean + 0.001, clean.clone(), target.clone()
            with attack_model(self.model, frozen, clean) as view:
                faulty = torch.zeros(len(x_adv), dtype=torch.int32)
                batch = AttackBatch.of(schedule, x_adv, clean, target, faulty)
                if self.inner != "kl":
                    batch = replace(batch, inner=self.inner, labels=clean.flatten(1)[:, :5].argmax(dim=1))
                if self.own:
                    batch = replace(batch, epsilon=torch.linspace(0.02, 0.004, len(x_adv)).double())
                runner(view, batch, self.threat, generator)
            result += [x_adv.clone(), faulty.clone()]
            for memory in (x_adv, clean, target):
                memory.fill_(float("nan"))  # the caller no longer needs this memory
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.mul_(1.1)
        return result


def same(result, expected):
    return all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 6), nn.ReLU(), nn.Linear(6, small_models.CLASSES))


class Troubled(nn.Module):
    """A model with an input gradient of 0 for darker samples and of NaN for brighter ones."""

    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x):
        level = x.flatten(1).mean(dim=1, keepdim=True)
        logits = self.body(x)
        logits = torch.where(level < 0.4, logits.detach(), logits)
        return logits + 0.0 * torch.where(level > 0.51, level - level.detach(), 1.0).sqrt()


@pytest.mark.parametrize(
    ("model", "frozen", "norm", "orders"),
    [
        (mlp, None, "l_inf", 1000),
        (small_models.conv_bn, None, "l_inf", 20),
        (small_models.conv_bn, Frozen(), "l_inf", 20),
        (small_models.conv_bn, None, "l_2", 20),
        (Troubled, None, "l_inf", 20),
        (Troubled, None, "l_2", 20),
    ],
)
@pytest.mark.parametrize("runner", [GraphRunner, StreamRunner])
def test_the_eager_result_in_any_order(runner, model, frozen, norm, orders):
    threat = ThreatModel(0.1, norm)
    expected = Training(model, threat=threat).run(run_eager, frozen)
    training = Training(model, threat=threat)
    with EmulatedDevice() as emulated:
        result = training.run(runner(bucket=2), frozen)
    if norm == "l_inf":
        assert same(result, expected)
    else:  # ℓ2 takes no sign, so the last bit of a library's result, which depends on the batch size, shows
        for a, b in zip(result, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-14)
    assert emulated.captures > 1
    assert emulated.replays > emulated.captures
    for seed in range(orders):
        assert same(emulated.shuffled(seed, result), result), seed


@pytest.mark.parametrize("inner", ["cross_entropy", "margin", "dlr", "lse"])
@pytest.mark.parametrize("runner", [GraphRunner, StreamRunner])
def test_every_inner_loss_with_a_name_is_captured(runner, inner):
    expected = Training(mlp, inner=inner).run(run_eager)
    training = Training(mlp, inner=inner)
    with EmulatedDevice() as emulated:
        result = training.run(runner(bucket=2))
    assert same(result, expected)
    if inner != "cross_entropy":  # for one target it is the direction of "kl"
        assert not same(result, Training(mlp).run(run_eager))
    assert emulated.replays > emulated.captures > 1
    for seed in range(20):
        assert same(emulated.shuffled(seed, result), result), seed


def test_one_model_has_graphs_for_each_inner_loss_and_keeps_them_apart():
    training, runner, result = Training(mlp), GraphRunner(bucket=2), []
    twin, expected = Training(mlp), []
    for inner in ("margin", "kl", "margin", "dlr"):
        twin.inner = inner
        expected += twin.run(run_eager)
    with EmulatedDevice() as emulated:
        for inner in ("margin", "kl", "margin", "dlr"):
            training.inner = inner
            result += training.run(runner)
    assert emulated.replays
    assert same(result, expected)


def scheduled(runner, norm="l_inf", epsilons=10):
    """Trains with one ε after the other."""
    training, result = Training(mlp, threat=ThreatModel(0.1, norm)), []
    for k in range(epsilons):
        training.threat = replace(training.threat, epsilon=0.004 * (k + 1))
        result += training.run(runner)
    return result


@pytest.mark.parametrize("norm", ["l_inf", "l_2"])
@pytest.mark.parametrize("runner", [GraphRunner, StreamRunner])
def test_one_capture_serves_a_whole_schedule_of_epsilon(runner, norm):
    captures = []
    for epsilons in (2, 10):
        with EmulatedDevice() as emulated:
            result = scheduled(runner(bucket=2), norm, epsilons)
        captures.append(emulated.captures)
    assert captures[0] == captures[1] > 0
    assert near(result, scheduled(run_eager, norm))
    assert norm == "l_2" or same(result, scheduled(run_eager))
    for seed in range(5):
        assert same(emulated.shuffled(seed, result), result), seed


@pytest.mark.parametrize("counts", [COUNTS, [(1, 1, 1)]], ids=["many steps", "one step, not captured"])
def test_the_buffers_of_a_few_forms_of_attack_are_kept(counts):
    def trained(runner):
        training, result = Training(mlp, counts), []
        for k in range(8):
            training.threat = ThreatModel(0.1, upper=0.6 + 0.05 * k)
            result += training.run(runner)
            if runner is not run_eager:
                (graphs,) = runner._graphs.values()
                assert len(graphs.captured) == min(k + 1, 4)
        return result

    expected = trained(run_eager)
    with EmulatedDevice():
        assert same(trained(GraphRunner()), expected)


@pytest.mark.parametrize("runner", [GraphRunner, StreamRunner, AutoRunner])
def test_an_inner_loss_of_ones_own_runs_eagerly_and_says_so(runner):
    def inner(z, rows):
        return (z - rows.clean_outputs).square().sum(dim=1)

    expected = Training(mlp, inner=inner).run(run_eager)
    training, run = Training(mlp, inner=inner), runner()
    with EmulatedDevice() as emulated, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        result = training.run(run)
    assert len(warned) == (runner is not AutoRunner)
    assert all("the inner loss is a function of your own" in str(w.message) for w in warned)
    assert "eager" in run.explain(training.model)
    assert "since the inner loss is a function of your own" in run.explain(training.model)
    assert emulated.replays == 0
    assert same(result, expected)


@pytest.mark.parametrize("runner", [GraphRunner, StreamRunner])
@pytest.mark.parametrize("bullet", [False, True])
def test_the_training_loss_of_either_runner_is_the_eager_one(bullet, runner):
    result = []
    for run in (run_eager, runner(bucket=2)):
        torch.manual_seed(0)
        model = small_models.conv_bn().double()
        x, y = torch.rand(6, *small_models.SHAPE, dtype=torch.float64), torch.arange(6) % small_models.CLASSES
        mining = BulletTrain(3, 1, 0) if bullet else None
        with EmulatedDevice() as emulated:
            for _ in range(3):
                options = {"generator": torch.Generator().manual_seed(1), "bullet": mining, "runner": run}
                loss = trades_loss(model, x, y, None, perturb_steps=10 if bullet else 2, **options)
        result.append([loss.detach(), *model.buffers()])
    assert emulated.replays
    assert same(*result)


@pytest.mark.parametrize("runner", [GraphRunner, StreamRunner])
def test_under_the_caller_s_autocast_a_graph_reads_the_weights_of_its_replay_not_casts_of_its_capture(runner):
    """The cache of cast weights is freed when the autocast ends."""
    result = []
    for run in (run_eager, runner(bucket=2)):
        torch.manual_seed(0)
        model, x, y = mlp(), torch.rand(6, *small_models.SHAPE), torch.arange(6) % small_models.CLASSES
        losses = []
        with EmulatedDevice() as emulated:
            for _ in range(3):
                with torch.autocast("cpu", torch.bfloat16):
                    generator = torch.Generator().manual_seed(1)
                    loss = trades_loss(model, x, y, None, perturb_steps=2, generator=generator, runner=run)
                losses.append(loss.detach())
                with torch.no_grad():
                    model[1].weight.mul_(1.3)
        result.append(losses)
    assert emulated.replays
    assert same(*result)


@pytest.mark.parametrize("runner", [GraphRunner, StreamRunner])
@pytest.mark.parametrize("build", ["conv_bn", ordinary_loops.BesideALoader])
def test_in_an_ordinary_loop_with_an_earlier_loss_alive_and_a_loader_at_work_it_is_captured(build, runner):
    expected = ordinary_loops.iterations("cpu", build)
    with EmulatedDevice() as emulated:
        result = ordinary_loops.iterations("cpu", build, runner=runner(bucket=2))
    assert emulated.replays == 7  # of 8 steps; a size first runs once eagerly
    assert all(same(*pair) for pair in zip(result, expected, strict=True))
    for seed in range(5):
        assert same(emulated.shuffled(seed, result[-1]), expected[-1]), seed


@pytest.mark.parametrize("runner", [GraphRunner, StreamRunner])
@pytest.mark.parametrize("as_torch", UNWINDS)
def test_after_a_capture_that_broke_off_numbers_are_drawn_and_another_model_is_captured(as_torch, runner):
    builds, run = (ordinary_loops.Waiting, "dropout"), runner(bucket=2)
    expected = [ordinary_loops.iterations("cpu", build) for build in builds]
    with EmulatedDevice(as_torch) as emulated, pytest.warns(UserWarning, match="_local_scalar_dense") as warned:
        result = [ordinary_loops.iterations("cpu", build, runner=run) for build in builds]
    assert len(warned) == 1
    assert emulated.replays == 7
    for mine, theirs in zip(result, expected, strict=True):
        assert all(same(*pair) for pair in zip(mine, theirs, strict=True))
    assert not emulated.under_way


# Planted bugs


def replaced_weights(runner, model=Troubled):
    """Trains twice, and replaces every weight by another tensor in between."""
    training = Training(model)
    result = training.run(runner)
    for layer in training.model.body:
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(layer.weight.detach() * 2)
    return result + training.run(runner)


class Tempered(nn.Module):
    """Divides its logits by a number; if asked, records how many rows each forward gets."""

    def __init__(self, noting=False):
        super().__init__()
        self.body, self.temperature, self.noting = mlp(), 1.0, noting

    def forward(self, x):
        if self.noting:
            self.rows = len(x)
        return self.body(x) / self.temperature


def another_number(runner):
    """Trains twice, and changes a number of the model in between."""
    training = Training(Tempered)
    result = training.run(runner)
    training.model.temperature = -0.5
    return result + training.run(runner)


class Untraced(nn.Module):
    """Its last layer decides by the number of its rows, and so runs as it is in a folded view."""

    def __init__(self):
        super().__init__()
        self.body, self.last = mlp(), Divided()

    def forward(self, x):
        return self.last(self.body(x))


class Divided(nn.Module):
    def __init__(self):
        super().__init__()
        self.temperature = 1.0

    def forward(self, z):
        return z / self.temperature if len(z) else z


def another_number_beside_a_fold(runner, frozen=None):
    """Trains twice on a view, and changes a number of a module that runs as it is in it."""
    training = Training(Untraced)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = training.run(runner, frozen or Frozen())
        training.model.last.temperature = -0.5
        return result + training.run(runner, frozen or Frozen())


def another_number_without_a_fold(runner):
    return another_number_beside_a_fold(runner, Frozen(fold=False))


def zero_gradients(runner):
    return Training(Troubled, threat=ThreatModel(0.1, "l_2")).run(runner)


def own_radii(runner):
    """Each sample has an ε of its own, and then one is all samples' again."""
    training = Training(mlp, own=True)
    result = training.run(runner)
    training.own = False
    return result + training.run(runner)


def other_bounds(runner):
    """Trains with one upper bound, and then with another."""
    training = Training(mlp)
    result = training.run(runner)
    training.threat = replace(THREAT, upper=0.5)
    return result + training.run(runner)


def broken_capture(runner):
    """Breaks off the capture of the second size; the attack goes on eagerly in memory that has become free."""
    training = Training(lambda: Uncapturable(rows=2), [[4, 4, 4, 2, 2]])
    return training.run(runner) + training.run(runner)


def exception(runner):
    """Raises in the first step of the second chain; the caller then reuses the memory of its tensors."""
    training = Training(lambda: Failing(-1), [[3, 3, 0, 0], [3, 3, 1, 1]])
    clean, target, schedule = training.batches.pop()
    first = training.run(runner)
    x_adv, training.model.left = clean.clone(), 1
    batch = AttackBatch.of(schedule, x_adv, clean, target, torch.zeros(len(clean), dtype=torch.int32))
    with pytest.raises(ArithmeticError):
        runner(training.model, batch, THREAT, None)
    x_adv.fill_(7.0)
    training.model.left = -1
    return [*first, *training.run(runner), x_adv]


def drawn(runner):
    torch.manual_seed(0)
    return [*Training(Drawing).run(runner), torch.rand(3)]


def side_by_side(runner):
    """Repeats the same chains again and again."""
    return Training(Troubled, [[3, 3, 2, 2, 1]] * 4).run(runner)


def evicted(runner):
    """Limits the runner to one graph, so that it must capture again and again."""
    training = Training(mlp, [[9] * 3 + [6] * 3 + [3] * 3] * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return training.run(runner if runner is run_eager else type(runner)(bucket=2, most_graphs=1))


def used_beside(runner):
    """Frees the tensors of an attack that is still running, and allocates memory for others."""
    training, result = Training(mlp, [[2, 2, 1]] * 3), []
    for clean, target, schedule in training.batches:
        x_adv = clean + 0.001
        flags = torch.zeros(len(clean), dtype=torch.int32)
        given = AttackBatch.of(schedule, x_adv, clean.clone(), target.clone(), flags)
        join = start_of(runner)(training.model, given, THREAT, None)
        del given, flags
        others = [torch.full_like(t, 3.0) for t in (clean, target, clean, target)]
        join()
        result += [x_adv, *others]
    return result


def by_label(runner):
    return Training(mlp, inner="margin").run(runner)


def by_another_loss(runner):
    training = Training(mlp, inner="margin")
    result = training.run(runner)
    training.inner = "dlr"
    return result + training.run(runner)


# and whether they end with graphs
SCENARIOS = {
    by_label: True,
    by_another_loss: True,
    replaced_weights: True,
    another_number: True,
    another_number_beside_a_fold: True,
    another_number_without_a_fold: True,
    zero_gradients: True,
    own_radii: True,
    scheduled: True,
    other_bounds: True,
    exception: True,
    used_beside: True,
    side_by_side: True,
    evicted: True,
    broken_capture: False,
    drawn: False,
}


@functools.cache
def eager(scenario):
    return scenario(run_eager)


def caught(changed, scenario):
    """Returns whether the changed module gives a non-eager result in some order of the work, or raises."""
    for runner in ("GraphRunner", "StreamRunner"):
        result, emulated = under_emulation(scenario, runner, changed)
        if result is None or (SCENARIOS[scenario] and not emulated.replays):
            return True
        if any(not near(emulated.shuffled(seed, result), eager(scenario)) for seed in range(20)):
            return True
    return False


def under_emulation(scenario, runner, changed):
    classes = {**vars(graphs), **vars(streams), **vars(changed)}
    pool = vars(changed).get("GraphPool", captures.GraphPool)
    with (
        EmulatedDevice() as emulated,
        mock.patch.object(streams, "GraphRunner", classes["GraphRunner"]),
        mock.patch.object(graphs, "GraphPool", pool),
        warnings.catch_warnings(record=True),
    ):
        try:
            return scenario(classes[runner](bucket=2)), emulated
        except (NotPermittedError, KeyError, ArithmeticError, AttributeError, UserWarning):
            return None, emulated


def near(result, expected):
    """Compares up to the last bits, which in ℓ2 depend on the batch size."""
    return all(torch.allclose(a, b, rtol=0, atol=1e-13, equal_nan=True) for a, b in zip(result, expected, strict=True))


CAPTURE = "with device.capture(pool) as graph:\n            "
IN_GRAPHS = [
    Bug("it does not wait for the caller", "self._stream.wait_stream(caller)"),
    Bug("the caller does not wait", "    caller.wait_stream(stream)", "    pass"),
    Bug("no wait after an exception", "        caller.wait_stream(self._stream)", "        pass", broken_capture),
    Bug("no stream of its own", "device.new_stream(x)", "device.current_stream(x)"),
    Bug("work goes to the caller's stream", "device.on(self._stream)", "device.on(caller)"),
    Bug("memory is not kept", "(self, batch, seeds))", "())", used_beside),
    Bug("NaN is not reported", "torch.maximum(batch.faulty, own.faulty, out=batch.faulty)"),
    Bug("x' is not copied in", "own.x_adv.copy_(batch.x_adv)"),
    Bug("x is not copied in", "own.clean.copy_(batch.clean)"),
    Bug("the target is not copied in", "own.target.copy_(batch.target)"),
    Bug("labels are not copied in", "own.labels.copy_(batch.labels)", scenario=by_label),
    Bug("graphs of another inner loss", "threat.upper, batch.inner)", "threat.upper)", by_another_loss),
    Bug("step sizes are not copied in", "own.step_size.copy_(batch.step_size)"),
    Bug("steps are not copied in", "own.steps.copy_(batch.steps)"),
    Bug("each sample's ε is not copied in", "own.epsilon.copy_(batch.epsilon)", scenario=own_radii),
    Bug("a schedule's ε is not copied in", "own.epsilon.copy_(batch.epsilon)", scenario=scheduled),
    Bug("a graph has the ε of its capture", "batch = batch.with_radii(threat)", scenario=scheduled),
    Bug("graphs of other bounds", "(threat.norm, threat.lower, threat.upper, ", "(threat.norm, ", other_bounds),
    Bug("the seed is not copied in", "self._seed.copy_(seeds[t])", scenario=zero_gradients),
    Bug("x' is not copied out", "batch.x_adv.copy_(own.x_adv)"),
    Bug("flags of an earlier attack", "own.faulty.zero_()"),
    Bug("the counter does not start again", "self._step.zero_()"),
    Bug("the counter stands still", "self._step.add_(1)"),
    Bug("padding moves", "self._seed, self._step)", "self._seed, self._step - 9)"),
    Bug("a bucket is too small", "-(-n // self._bucket) * self._bucket)", "n // self._bucket * self._bucket)"),
    Bug("a graph of another size is replayed", "self.graphs.use(n)", "next(iter(self.graphs.values()), None)"),
    Bug("a graph is not replayed", "graph.replay()"),
    Bug("a graph of nothing", f"{CAPTURE}self._take_step(model, n)", f"{CAPTURE}pass"),
    Bug("graphs of weights that are gone", "t.data_ptr() for t in _tensors(model)", "0 for t in _tensors(model)"),
    Bug("graphs of numbers that are gone", "values=_values(model)", "values=()", another_number),
    *(
        Bug(f"graphs of numbers that are gone from a view, {k}", "isinstance(module, nn.Module)", "module is model", of)
        for k, of in enumerate((another_number_beside_a_fold, another_number_without_a_fold))
    ),
    Bug("random numbers are drawn twice", "random.restore()", scenario=drawn),
    Bug("a model that draws is captured", "if random.moved:", "if False:", drawn),
]
IN_CAPTURES = [
    Bug("one pool for all chains", "device.new_pool()", "'the only one'", side_by_side),
    Bug("a pool that is gone", "if not self:", "if self._pool is None:", evicted),
]
IN_STREAMS = [
    Bug("the caller does not wait for the chains", "return partial(_join_all, joins)", "return joined"),
    Bug("it waits for the first chain only", "    for join in joins:", "    for join in joins[:1]:"),
    Bug("it waits for no chain", "        join()", "        pass"),
    Bug("no wait after an exception", "            _join_all(joins)", "            pass", exception),
    Bug("a model that draws runs chain by chain", "if join is None and not joins:", "if False:", drawn),
]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_runners_as_they_are_pass(scenario):
    assert not caught(graphs, scenario)


@pytest.mark.parametrize("bug", IN_GRAPHS, ids=str)
def test_a_bug_planted_into_graphs_is_caught(bug, tmp_path):
    assert caught(planted(graphs, bug, tmp_path), bug.scenario or replaced_weights)


@pytest.mark.parametrize("bug", IN_STREAMS, ids=str)
def test_a_bug_planted_into_streams_is_caught(bug, tmp_path):
    assert caught(planted(streams, bug, tmp_path), bug.scenario or replaced_weights)


@pytest.mark.parametrize("bug", IN_CAPTURES, ids=str)
def test_a_bug_planted_into_the_cache_of_graphs_is_caught(bug, tmp_path):
    assert caught(planted(captures, bug, tmp_path), bug.scenario)


@pytest.mark.parametrize(
    ("module", "bugs"),
    [(graphs, IN_GRAPHS), (captures, IN_CAPTURES), (streams, IN_STREAMS)],
    ids=["graphs", "cache", "streams"],
)
def test_no_call_that_orders_work_is_without_a_planted_bug(module, bugs):
    assert left_out(module, bugs) == []


# Models that cannot be captured, and faults


class Reading(nn.Module):
    """Makes the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x):
        return self.body(x) * (2.0 if x.sum().item() > 0 else 1.0)


def hooked():
    model = mlp()
    model[2].register_forward_hook(lambda module, given, out: out * 2)
    return model


def noting():
    return Tempered(noting=True)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (Reading, "item|_local_scalar_dense"),
        (hooked, "2 has a hook"),
        (noting, "changes a number of its own"),
    ],
)
def test_a_model_that_cannot_be_captured_runs_eagerly_and_says_why_once(build, reason):
    expected = Training(build).run(run_eager)
    training = Training(build)
    with EmulatedDevice() as emulated, pytest.warns(UserWarning, match=reason) as warned:
        result = training.run(GraphRunner(bucket=2))
    assert len(warned) == 1
    assert emulated.replays == 0
    assert same(result, expected)
    assert same(emulated.shuffled(0, result), expected)


def test_on_the_cpu_there_are_no_graphs_and_it_says_so():
    with pytest.warns(UserWarning, match="on cpu"):
        result = Training(mlp).run(GraphRunner())
    assert same(result, Training(mlp).run(run_eager))


class Drawing(nn.Module):
    """Draws random numbers in eval mode too."""

    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x):
        return self.body(x + 0.1 * torch.rand_like(x))


class Uncapturable(nn.Module):
    """Raises in a capture with a given number of rows."""

    def __init__(self, rows):
        super().__init__()
        self.body, self.rows = mlp(), rows

    def forward(self, x):
        if capturing() and len(x) == self.rows:
            raise ArithmeticError("the model's own")
        return self.body(x)


class Failing(nn.Module):
    """Raises in its nth forward."""

    def __init__(self, n):
        super().__init__()
        self.body, self.count = mlp(), [n]

    left = property(lambda self: self.count[0], lambda self, n: self.count.__setitem__(0, n))

    def forward(self, x):
        self.left -= 1
        if self.left == 0:
            raise ArithmeticError("the model's own")
        return self.body(x)


@pytest.mark.parametrize(("forward", "captured"), [(1, False), (2, True), (3, False)])
def test_an_exception_in_the_model_leaves_streams_joined_and_training_able_to_go_on(forward, captured):
    counts = [[4, 4, 2], [4, 4, 1]]
    training, runner = Training(lambda: Failing(forward), counts), GraphRunner(bucket=2)
    with EmulatedDevice() as emulated:
        caller = emulated.stream
        # an error that occurs only in the capture is reported as a failure of the capture
        expecting = pytest.warns(UserWarning, match="own") if captured else pytest.raises(ArithmeticError, match="own")
        with expecting:
            training.run(runner)
        assert emulated.stream is caller
        assert emulated.graph is None
        if captured:
            return
        result = training.run(runner)
        assert emulated.stream is caller
    expected = Training(lambda: Failing(-1), counts).run(run_eager)
    assert same(result, expected)
    for seed in range(20):
        assert same(emulated.shuffled(seed, result), expected)


class Exhausting(nn.Module):
    """Runs out of memory in its nth forward; records in each forward whether a watched object is still alive."""

    def __init__(self, n, error=RuntimeError):
        super().__init__()
        self.body, self.count, self.error = mlp(), [n], error
        self.watched, self.alive = None, []

    left = Failing.left

    def forward(self, x):
        self.left -= 1
        if self.watched is not None:
            self.alive.append(self.watched() is not None)
        if self.left == 0:
            raise self.error("CUDA error: out of memory")
        return self.body(x)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])  # the allocator's of torch, and the driver's
@pytest.mark.parametrize("forward", [3, 4])  # of the second attack: the first run of a new size, and its capture
@pytest.mark.parametrize("runner", [GraphRunner, StreamRunner])
def test_out_of_memory_frees_the_graphs_before_the_attack_goes_on_without(runner, forward, error):
    counts = [[3] * 4, [3] * 2]
    training, run = Training(lambda: Exhausting(forward, error), counts), runner(bucket=2)
    first, second = training.batches
    with EmulatedDevice() as emulated:
        training.batches = [first]
        result = training.run(run)
        (graph_runner,) = [run] if runner is GraphRunner else run._chains
        training.model.watched = weakref.ref(next(iter(graph_runner._graphs[training.model].captured.values())))
        training.batches = [second]
        with pytest.warns(UserWarning, match="CUDA error: out of memory") as warned:
            result += training.run(run)
        result += training.run(run)
    assert len(warned) == 1
    assert emulated.stream is emulated.default
    assert training.model.alive == [True] * (forward - 2) + [False] * 6
    training = Training(lambda: Exhausting(-1), counts)
    expected = training.run(run_eager)
    training.batches = training.batches[1:]
    expected += training.run(run_eager)
    for seed in range(20):
        assert same(emulated.shuffled(seed, result), expected), seed


def test_a_hook_counts_from_when_it_is_there_until_it_is_gone():
    expected, training, runner = Training(mlp), Training(mlp), GraphRunner(bucket=2)
    replays = []
    with EmulatedDevice() as emulated, warnings.catch_warnings(record=True) as warned:
        for hooked in (False, True, True, False):
            for each, run in ((expected, run_eager), (training, runner)):
                handle = each.model[2].register_forward_hook(lambda module, given, out: out * 2) if hooked else None
                each.found = each.run(run)
                if hooked:
                    handle.remove()
            assert same(training.found, expected.found)
            replays.append(emulated.replays)
    assert ["2 has a hook" in str(w.message) for w in warned] == [True]
    assert 0 < replays[0] == replays[1] == replays[2] < replays[3]


@pytest.mark.parametrize("runner", [GraphRunner, StreamRunner])
@pytest.mark.parametrize("norm", ["l_inf", "l_2"])
def test_a_model_that_draws_random_numbers_runs_eagerly_and_draws_the_same(runner, norm):
    result, run = [], runner(bucket=2)
    for each in (run_eager, run):
        torch.manual_seed(0)
        training = Training(Drawing, threat=ThreatModel(0.1, norm))
        with EmulatedDevice(), warnings.catch_warnings(record=True) as warned:
            result.append([*training.run(each), torch.rand(2)])
    assert [str(w.message) for w in warned] == [
        "the attack runs without graphs: the model draws random numbers, of which padding would take some"
    ]
    assert same(*result)


def test_graphs_are_bounded_and_the_least_recently_used_go():
    counts = [[9] * 3 + [6] * 3 + [3] * 3] * 3
    training, runner = Training(mlp, counts), GraphRunner(bucket=3, most_graphs=2)
    with EmulatedDevice() as emulated:
        result = training.run(runner)
        (session,) = runner._graphs[training.model].captured.values()
        assert list(session.graphs) == [6, 3]
    assert emulated.captures > 3
    assert same(result, Training(mlp, counts).run(run_eager))


def test_where_no_graph_is_left_the_next_is_captured_into_a_new_pool():
    counts = [[9] * 3 + [6] * 3 + [3] * 3] * 3
    training, runner = Training(mlp, counts), GraphRunner(bucket=3, most_graphs=1)
    with EmulatedDevice() as emulated:
        result = training.run(runner)
    assert emulated.captures > 3
    assert same(result, Training(mlp, counts).run(run_eager))


def test_a_smaller_last_batch_needs_no_new_buffers_and_a_larger_one_does():
    training, runner = Training(mlp, [[3] * 8, [3] * 5, [3] * 12]), GraphRunner(bucket=2)
    sessions = []
    with EmulatedDevice():
        for batch in list(training.batches):
            training.batches = [batch]
            training.run(runner)
            sessions.append(next(iter(runner._graphs[training.model].captured.values())))
    assert sessions[0] is sessions[1] is not sessions[2]


@pytest.mark.parametrize("change", ["mode", "norm", "bounds", "dtype", "memory format", "autocast"])
def test_what_a_graph_has_fixed_is_captured_anew(change):
    x, target = torch.rand(2, 3, 4, 4), torch.rand(2, 5)
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))

    def key(x_adv, threat=THREAT):
        schedule = Plan.uniform(2, 1, 0.1, x.device)
        batch = AttackBatch.of(schedule, x_adv, x.clone(), target.clone(), torch.zeros(2, dtype=torch.int32))
        return graphs._key(model, batch, threat)

    before = key(x)
    assert before == key(x.clone()) == key(x, ThreatModel(0.2))
    with torch.autocast("cpu", enabled=change == "autocast"):
        model.train(change != "mode")
        x_adv = x.double() if change == "dtype" else x
        if change == "memory format":
            x_adv = x.contiguous(memory_format=torch.channels_last)
        threats = {"norm": ThreatModel(0.1, "l_2"), "bounds": ThreatModel(0.1, lower=-1.0)}
        after = key(x_adv, threats.get(change, THREAT))
    assert before != after


def test_no_other_tensor_gets_the_address_of_a_captured_weight():
    training, runner = Training(mlp, [[3] * 4]), GraphRunner(bucket=2)
    weight = training.model[1].weight
    storage = StorageWeakRef(weight.untyped_storage())
    with EmulatedDevice():
        training.run(runner)
    weight.data = weight.data.clone()
    assert not storage.expired()


def test_a_runner_does_not_keep_the_model_alive():
    training, runner = Training(mlp, [[3] * 4]), GraphRunner(bucket=2)
    gone = weakref.ref(training.model)
    with EmulatedDevice():
        training.run(runner)
    del training
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(("options", "error"), [({"bucket": 0}, ValueError), ({"most_graphs": 1.5}, TypeError)])
def test_wrong_options_are_refused(options, error):
    with pytest.raises(error, match=next(iter(options))):
        GraphRunner(**options)
