"""A few cases of every target of `python -m tests.fuzz`; and the campaign detects what it should."""

import importlib
import pickle

import pytest
import torch
from hypothesis import strategies as st

import bt_fast
from bt_fast.lab import checkpoint
from bt_fast.ops import frames
from tests.fuzz import api, readers
from tests.fuzz.campaign import Case, Run, fuzz
from tests.fuzz.mutation import fuzz_bytes


@pytest.fixture(scope="module", autouse=True)
def imported():
    """Imports what an op's first call would: cut by a case's time limit it would stay half imported in this process."""
    importlib.import_module("torch._dynamo")


@pytest.fixture(scope="module", autouse=True)
def folders():
    yield
    readers.clean_up()


@pytest.mark.parametrize("name", api.TARGETS)
def test_entry_points_accept_or_refuse_by_name(name):
    outcome = fuzz(name, api.TARGETS[name], 20, seed=1)
    assert outcome.accepted + outcome.rejected == outcome.cases > 0, outcome.failures


@pytest.mark.parametrize("name", readers.READERS)
def test_readers_accept_or_refuse_by_name(name):
    outcome = fuzz_bytes(name, 60, seed=1)
    assert outcome.accepted + outcome.rejected == outcome.cases, outcome.failures
    assert outcome.accepted, "not even the valid file was read"


# The campaign itself


def failures_of(run, **given):
    result = Run("planted")
    result(Case(run, ("x",), **given))
    return list(result.outcome.failures)


def raising(error):
    def run():
        raise error

    return run


def test_an_error_that_names_its_argument_is_a_rejection():
    assert not failures_of(raising(ValueError("x must be at least 0: write x=1")))


@pytest.mark.parametrize(
    ("error", "how"),
    [
        (ValueError("expected a number"), "names no argument"),
        (KeyError("x"), "raised"),
        (RuntimeError("x"), "raised"),
        (ValueError("x is bad"), "has no way out"),
    ],
)
def test_other_errors_are_failures(error, how):
    (failure,) = failures_of(raising(error))
    assert failure.startswith(how)


def test_a_change_before_an_error_is_a_failure():
    state = torch.zeros(2)

    def run():
        state[0] = float("nan")
        raise ValueError("x is bad: give another")

    (failure,) = failures_of(run, state=lambda: (state,))
    assert failure.startswith("changed state")


def test_a_broken_invariant_is_a_failure():
    (failure,) = failures_of(lambda: 3, check=lambda found: api.expect(found == 2, "it is another"))
    assert "it is another" in failure


def test_a_case_without_end_is_a_failure(monkeypatch):
    monkeypatch.setattr("tests.fuzz.campaign.SLOW", 0.05)

    def run():
        while True:
            pass

    (failure,) = failures_of(run)
    assert "HangError" in failure


def test_a_model_s_own_error_is_its_own():
    assert not failures_of(lambda: api.Bad("raises")(torch.rand(1, 16)))


def test_what_a_pickle_runs_is_a_failure(monkeypatch):
    monkeypatch.setattr(checkpoint, "read_tensors", lambda path: pickle.loads(path.read_bytes()))
    result = Run("load_checkpoint")
    result(readers.case_of("load_checkpoint", readers.MALICIOUS))
    (failure,) = result.outcome.failures
    assert "ExecutedError" in failure


def test_a_planted_bug_is_caught(monkeypatch):
    monkeypatch.setattr(bt_fast.deciding, "STEP_FACTOR", 0.0)
    failures = fuzz("plan", api.TARGETS["plan"], 50, seed=0).failures
    assert any("or of no step" in failure for failure in failures)


def test_a_mirror_that_is_forgotten_when_a_perturbation_is_stored_is_caught(monkeypatch):
    def unmirrored(placed, rows, layout):
        return frames.places(placed._replace(mirrored=torch.zeros_like(placed.mirrored)), rows, layout)

    monkeypatch.setattr("bt_fast.ops.remember.places", unmirrored)
    assert any(fuzz("memory_ops", api.TARGETS["memory_ops"], 20, seed=seed).failures for seed in range(30))


def test_cases_are_those_of_the_seed():
    drawn = []
    for seed in (0, 0, 1):
        numbers = []
        fuzz("numbers", st.integers().map(lambda n, to=numbers: Case(lambda: to.append(n), ())), 50, seed)
        drawn.append(numbers)
    assert drawn[0] == drawn[1] != drawn[2]
