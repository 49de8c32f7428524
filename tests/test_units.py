"""Sizes in another unit than the pixels' give a warning with the correct line; common sizes give none."""

import inspect
import math
import re
import sys
import warnings
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from click.testing import CliRunner
from small_models import batch, build

from bt_fast import BulletTrain, Plan, ThreatModel, generate, mart_loss, pgd_loss, trades_loss, units
from bt_fast.autoattack import autoattack
from bt_fast.baselines.fast import fast_loss
from bt_fast.baselines.grad_align import grad_align
from bt_fast.baselines.yopo import yopo_loss
from bt_fast.evaluation import evaluate
from bt_fast.lab.cli import cli
from bt_fast.lab.config import PRESETS

X, Y = batch(dtype=torch.float32)


@pytest.fixture(autouse=True)
def nothing_told_yet(monkeypatch):
    monkeypatch.setattr(units, "_warned", set())


def objective(loss, **options):
    return lambda epsilon, step_size: loss(
        build(dtype=torch.float32), X, Y, None, epsilon=epsilon, step_size=step_size, **options
    )


def generated(epsilon, step_size):
    schedule = Plan.from_steps(torch.ones(8, dtype=torch.int64), torch.full((8,), step_size))
    return generate(build(dtype=torch.float32), X, X, torch.eye(5)[Y], schedule, ThreatModel(epsilon))


def attacked(epsilon, step_size):
    """Calls `autoattack` with a fake of AutoAttack's package."""
    attack = SimpleNamespace(run_standard_evaluation=lambda x, y, bs: x)
    package = SimpleNamespace(AutoAttack=lambda *_, **__: attack)
    with mock.patch.dict(sys.modules, {"autoattack": package}):
        autoattack(build(dtype=torch.float32), X, Y, ThreatModel(epsilon))


CALLS = {
    "trades": objective(trades_loss, perturb_steps=1),
    "mart": objective(mart_loss, perturb_steps=1),
    "pgd": objective(pgd_loss, perturb_steps=1),
    "with bullet": objective(trades_loss, bullet=BulletTrain(1, 0, 0)),
    "fast": lambda epsilon, step_size: fast_loss(
        pgd_loss, build(dtype=torch.float32), X, Y, None, epsilon=epsilon, step_size=step_size
    ),
    "yopo": objective(yopo_loss, propagations=1, layer_steps=1),
    "evaluate": lambda epsilon, step_size: evaluate(
        build(dtype=torch.float32), [(X, Y)], ThreatModel(epsilon), steps=1, step_size=step_size
    ),
}
OF_EPSILON_ALONE = {
    "generate": generated,
    "autoattack": attacked,
    "grad_align": lambda epsilon, step_size: grad_align(build(dtype=torch.float32), X, Y, epsilon=epsilon),
}


@pytest.mark.parametrize("call", [*CALLS.values(), *OF_EPSILON_ALONE.values()], ids=[*CALLS, *OF_EPSILON_ALONE])
def test_an_epsilon_of_the_whole_range_is_reported_with_the_likely_one(call):
    with pytest.warns(UserWarning, match=r"^epsilon=8 covers the whole range \[0, 1\].* write epsilon=8/255"):
        call(8, 2.0)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_step_longer_than_the_ball_is_reported_with_the_likely_one(call):
    with pytest.warns(UserWarning, match=r"^step_size=2 is more than twice epsilon=0\.03.*write step_size=2/255$"):
        call(0.03, 2.0)


@pytest.mark.parametrize("call", [*CALLS.values(), *OF_EPSILON_ALONE.values()], ids=[*CALLS, *OF_EPSILON_ALONE])
def test_everyday_sizes_are_no_warning(call):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for epsilon, step_size in ((8 / 255, 2 / 255), (0.3, 0.01), (0.031, 0.062), (0.99, 0.1)):
            call(epsilon, step_size)


@pytest.mark.parametrize("call", [*CALLS.values(), *OF_EPSILON_ALONE.values()], ids=[*CALLS, *OF_EPSILON_ALONE])
def test_an_epsilon_of_0_is_no_warning(call):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(0.0, 0.03)
        if call is not generated:  # its plan is made with a step size
            call(0.0, 0.0)


def test_both_are_reported_in_one_sentence():
    with pytest.warns(UserWarning, match=r"write epsilon=8/255, .*, and step_size=2/255$"):
        units.warn_of_units(8, step_size=2)
    with pytest.warns(UserWarning, match=r"write epsilon=1/255, if it is meant in steps of 8-bit images$"):
        units.warn_of_units(1, step_size=0.007)


def test_a_step_that_is_no_number_of_bytes_is_reported_with_a_quarter_of_epsilon():
    with pytest.warns(UserWarning, match=r"write step_size=0\.0005$"):
        units.warn_of_units(0.002, step_size=1.5)


def test_the_range_is_that_of_the_bounds_and_of_the_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        units.warn_of_units(8, bounds=(0, 255), step_size=2)
        units.warn_of_units(8, "l_2", pixels=3072)
    with pytest.warns(UserWarning, match=r"epsilon=300 covers the whole range \[0, 255\] .*write one below 255$"):
        units.warn_of_units(300, bounds=(0, 255))
    with pytest.warns(UserWarning, match=r"epsilon=128 covers .*write epsilon=128/255, if"):
        units.warn_of_units(128, "l_2", pixels=3072)
    for norm in ("l_2", "l_inf"):
        with pytest.warns(UserWarning, match="epsilon=20 covers"):
            pgd_loss(build(dtype=torch.float32), X, Y, None, epsilon=20, distance=norm)


def test_it_is_reported_once_and_of_the_callers_line():
    with warnings.catch_warnings(record=True) as reported:
        warnings.simplefilter("always")
        for _ in range(3):
            line = inspect.currentframe().f_lineno + 1
            pgd_loss(build(dtype=torch.float32), X, Y, None, epsilon=8, perturb_steps=1)
    (warning,) = reported
    assert (warning.filename, warning.lineno) == (__file__, line)


SMALL = ["--data", "digits", "--train-size", "8", "--test-size", "8", "--epochs", "1", "--steps", "1"]
SMALL += ["--eval-steps", "1", "--curve-size", "8", "--batch-size", "8", "--device", "cpu"]


def test_the_command_line_tells_it_before_it_trains(tmp_path):
    options = [*SMALL, "--epsilon", "8", "--step-size", "2", "--out", str(tmp_path / "run")]
    with pytest.warns(UserWarning, match=r"write epsilon=8/255, .*, and step_size=2/255$"):
        result = CliRunner().invoke(cli, ["train", "--method", "bullet", *options])
    assert result.exit_code == 0, result.output


@pytest.mark.filterwarnings("error:.*(epsilon|step_size)")
@pytest.mark.parametrize("method", ["reference", "bullet", "fast"])
def test_the_command_line_trains_and_evaluates_at_an_epsilon_of_0(method, tmp_path):
    run = tmp_path / "run"
    result = CliRunner().invoke(cli, ["train", "--method", method, *SMALL, "--epsilon", "0", "--out", str(run)])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(cli, ["evaluate", str(run / "checkpoint.pt"), "--epsilon", "0", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert re.search(r"clean (\S+) %, robust \1 %", result.output)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_the_presets_are_none(preset):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        preset.check()
        units.warn_of_units(preset.epsilon, step_size=preset.step_size)
    assert math.isfinite(preset.epsilon)
