"""Runs with TRITON_INTERPRET=1, in a process of its own: see test_interpreted.py."""

from unittest import mock

import divergence_cases
import pytest
import torch
from divergence_cases import LOSSES, assert_right
from hypothesis import given, settings
from hypothesis import strategies as st

from bt_fast.ops import divergence

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WHOLE, LOOPED = [2, 3, 10, 31, 32, 33, 200], [1025, 2048, 2049, 5000]


@pytest.fixture(autouse=True)
def _poisoned():
    """Fills with NaN the memory that the kernels are to write."""
    empty = divergence._empty_results
    with mock.patch.object(divergence, "_empty_results", lambda *z: tuple(t.fill_(torch.nan) for t in empty(*z))):
        yield


def check(name, n, classes, dtype, seed, **options):
    case = divergence_cases.case(name, n, classes, dtype, seed, **options)
    assert_right(case, case.run("launch"))


options = st.fixed_dictionaries(
    {
        "spread": st.sampled_from([0.0, 0.5, 3.0]),
        "special": st.booleans(),
        "strides": st.sampled_from(["rows", "apart", "columns", "one"]),
    }
)


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.sampled_from(WHOLE), st.sampled_from(DTYPES), st.integers(0, 2**31), options)
def test_whole_rows(name, n, classes, dtype, seed, options):
    check(name, n, classes, dtype, seed, **options)


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=8, deadline=None)
@given(st.integers(1, 3), st.sampled_from(LOOPED), st.sampled_from(DTYPES), st.integers(0, 2**31), options)
def test_rows_in_blocks(name, n, classes, dtype, seed, options):
    check(name, n, classes, dtype, seed, **options)


@pytest.mark.parametrize("name", LOSSES)
def test_a_hundred_thousand_classes(name):
    check(name, 1, 100_000, torch.float32, 0)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("classes", [10, 3000])
def test_rows_whose_loss_is_infinite_or_without_a_class(name, classes):
    case = divergence_cases.case(name, 6, classes, torch.float32, 0, special=True)
    case.logits[0 if name != "mart_loss" else 1][2, 1] = -torch.inf
    if name == "mart_loss":
        case.arguments[2][:4] = torch.tensor([-1, classes, 1, 2**40])
    case.logits[0][4] = -torch.inf
    result, expected = case.run("launch"), case.run("reference")
    assert result[0][2].isinf() == (name != "js_divergence")
    for a, b in zip(result, expected, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.isinf(), b.isinf())
        torch.testing.assert_close(a[[1, 3]], b[[1, 3]], rtol=1e-5, atol=2e-2, equal_nan=True)


@pytest.mark.parametrize("classes", [4, 2100])
def test_the_runner_up_of_wrong_classes_that_are_all_ruled_out(classes):
    clean, adversarial = torch.zeros(3, classes), torch.full((3, classes), -torch.inf)
    labels = torch.tensor([0, 1, classes - 1])
    adversarial[torch.arange(3), labels] = 2.0
    case = divergence_cases.Case("mart_loss", (clean, adversarial, labels, 0.0))
    assert_right(case, case.run("launch"))
    assert case.run("launch")[0].tolist() == pytest.approx([-1e-4] * 3, rel=1e-3)


@pytest.mark.parametrize("classes", [5, 2100])
def test_of_equal_runner_ups_the_first(classes):
    adversarial = torch.zeros(2, classes)
    adversarial[:, [2, classes - 2]] = 5.0
    labels = torch.tensor([0, 2])
    case = divergence_cases.Case("mart_loss", (torch.zeros(2, classes), adversarial, labels, 0.0))
    result = case.run("launch")
    assert_right(case, result)
    assert result[2].argmax(dim=1).tolist() == [2, classes - 2]


@pytest.mark.parametrize("name", LOSSES)
def test_nothing(name):
    case = divergence_cases.case(name, 0, 10, torch.float32, 0)
    assert [len(t) for t in case.run("launch")] == [0] * (1 + len(case.logits))
