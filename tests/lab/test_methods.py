import dataclasses
import json

import pytest

from bt_fast.lab.config import PRESETS, RunConfig
from bt_fast.lab.methods import CHANGES, Method
from bt_fast.lab.report import label

DIGITS = PRESETS["digits"]


@pytest.mark.parametrize(
    ("name", "algorithm", "engine", "numbers", "changes"),
    [
        ("reference", "reference", "", (), {}),
        ("optimised-bf16", "optimised", "bf16", (), {}),
        ("bullet-fast,robust-steps=0", "bullet", "fast", (), {"robust_steps": 0}),
        ("bullet,gamma=0.7,policy=gaussian", "bullet", "", (), {"gamma": 0.7, "policy": "gaussian"}),
        ("bullet,memory=on", "bullet", "", (), {"memory": True}),
        ("bullet-frozen", "bullet", "fast", (), {}),  # its name in the first version
        ("optimised-exact", "optimised", "exact", (), {}),
        ("no-jsd-bf16", "no-jsd", "bf16", (), {}),
        ("fast", "fast", "", (1,), {}),
        ("fast-3-fast,step-size=0.1", "fast", "fast", (3,), {"step_size": 0.1}),
        ("yopo-2-5,beta=1", "yopo", "", (2, 5), {"beta": 1.0}),
        ("no-jsd", "no-jsd", "", (), {}),
    ],
)
def test_a_name_says_algorithm_engine_and_options(name, algorithm, engine, numbers, changes):
    assert Method.parse(name) == Method(name, algorithm, engine, numbers, changes)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("trades", "no such method; write one of reference, optimised, bullet, fast"),
        ("", "no such method"),
        ("fast-", "no such method"),
        ("yopo-2", "no such method"),
        ("bullet-fp8", "no such method"),
        ("fast-0", "counts must be at least 1"),
        ("yopo-5-0", "counts must be at least 1"),
        ("reference-frozen", "reference runs as it was written, on no engine; leave -frozen away"),
        ("yopo-2-5-bf16", "yopo runs as it was written, on no engine; leave -bf16 away"),
        ("bullet,robust-steps", "expected NAME=VALUE with a name of step-size"),
        ("bullet,epsilon=0.1", "expected NAME=VALUE"),
        ("bullet,robust-steps=two", "robust-steps must be an integer, got 'two'"),
        ("bullet,gamma=", "gamma must be a number, got ''"),
        ("bullet,memory=yes", "memory must be on or off, got 'yes'"),
        ("bullet,gamma=0.7,gamma=0.8", "an option is given twice"),
    ],
)
def test_a_name_that_is_none_says_why(name, message):
    with pytest.raises(ValueError, match=message) as error:
        Method.parse(name)
    assert str(error.value).startswith(f"--method {name}: ")


def test_what_a_method_may_have_for_itself_are_options_of_a_run():
    fields = {field.name for field in dataclasses.fields(RunConfig)}
    assert {name.replace("-", "_") for name in CHANGES} <= fields


def test_a_methods_options_replace_those_of_the_run_for_it_alone():
    config = dataclasses.replace(DIGITS, methods=("bullet", "bullet,gamma=0.5"))
    assert config.of_method("bullet")[1] == config
    assert config.of_method("bullet,gamma=0.5")[1] == dataclasses.replace(config, gamma=0.5)


@pytest.mark.parametrize(
    ("loss", "method", "message"),
    [
        ("augmix", "reference", "augmix has optimised, bullet, no-jsd"),
        ("trades", "no-jsd", "trades has reference, optimised, bullet, fast, yopo"),
    ],
)
def test_a_method_that_the_objective_has_not_is_refused(loss, method, message):
    config = dataclasses.replace(DIGITS, loss=loss, methods=(method,))
    with pytest.raises(ValueError, match=message):
        RunConfig.from_json(config.to_json())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"metric": "entropy"}, "metric in the run configuration must be one of signed_variance"),
        ({"policy": "all"}, "policy in the run configuration must be one of three_groups"),
        ({"methods": ("bullet", "bullet")}, "methods must be at least one, each once"),
        ({"methods": ()}, "methods must be at least one"),
        ({"engine": "quick"}, "engine must be one of exact, fast, bf16, got 'quick'"),
    ],
)
def test_a_choice_that_there_is_not_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        RunConfig.from_json(dataclasses.replace(DIGITS, **changed).to_json())


def test_a_configuration_from_before_the_policies_means_what_it_meant():
    fields = dataclasses.asdict(DIGITS)
    later = ("metric", "policy", "grad_align", "memory", "memory_storage", "memory_dtype")
    old = {name: value for name, value in fields.items() if name not in later}
    assert RunConfig.from_json(json.dumps(old)) == DIGITS


def test_a_configuration_from_before_the_engines_ran_exactly():
    fields = {name: value for name, value in dataclasses.asdict(DIGITS).items() if name != "engine"}
    assert RunConfig.from_json(json.dumps(fields)) == dataclasses.replace(DIGITS, engine="exact")


@pytest.mark.parametrize(
    ("loss", "method", "name"),
    [
        ("trades", "reference", "TRADES, authors'"),
        ("pgd", "reference", "PGD, plain"),
        ("mart", "optimised-fast", "MART, ours, fast"),
        ("trades", "bullet", "+ BulletTrain"),
        ("trades", "bullet-fast,robust-steps=0", "+ BT, fast, N_R=0"),
        ("trades", "fast", "+ FAST"),
        ("trades", "fast-3", "+ FAST-3"),
        ("trades", "yopo-2-5,beta=1", "+ YOPO-2-5, β=1"),
        ("pgd", "bullet,policy=oracle", "+ BulletTrain, oracle"),
        ("mart", "optimised,memory=on", "MART, ours, memory"),
        ("mart", "optimised,memory=off", "MART, ours, no memory"),
        ("augmix", "optimised", "AugMix"),
        ("augmix", "no-jsd", "AugMix - JSD"),
    ],
)
def test_a_method_has_a_name_for_readers(loss, method, name):
    assert label(method, loss) == name
