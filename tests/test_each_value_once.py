"""On a further torch, few cases of each test run, which together have every value of every parameter."""

import pytest
from each_value_once import each_value_once

pytestmark = pytest.mark.any_torch
PAIRS = [(1, 1), (1, 2), (2, 2)]
FILE = f"""
import pytest

@pytest.fixture(params=["r", "s"])
def fixture(request):
    return request.param

@pytest.mark.parametrize("letter", ["v", "w", "x", "y", "z"])
@pytest.mark.parametrize("a, b", {PAIRS})
def test_product(fixture, a, b, letter):
    pass

@pytest.mark.parametrize(("a", "b"), {PAIRS})
def test_list(a, b):
    pass

def test_alone():
    pass
"""


class Choosing:
    """A plugin of pytest that chooses among what has been collected and runs nothing."""

    def pytest_collection_modifyitems(self, items):
        self.chosen = [item for item in items if item in each_value_once(items)]
        items.clear()


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """By test, the parameters of its chosen cases."""
    path, plugin, result = tmp_path_factory.mktemp("chosen") / "test_cases.py", Choosing(), {}
    path.write_text(FILE)
    pytest.main([str(path), "-q", "-p", "no:cacheprovider", f"--rootdir={path.parent}"], plugins=[plugin])
    for item in plugin.chosen:
        result.setdefault(item.originalname, []).append(item.callspec.params if hasattr(item, "callspec") else {})
    return result


def test_of_a_product_each_value_is_in_a_case_and_no_case_is_more_than_that_needs(chosen):
    cases = [(v["fixture"], (v["a"], v["b"]), v["letter"]) for v in chosen["test_product"]]
    assert [set(values) for values in zip(*cases, strict=True)] == [{"r", "s"}, set(PAIRS), set("vwxyz")]
    assert len(cases) == 5


def test_the_further_cases_of_a_product_do_not_keep_to_the_first_values(chosen):
    fixtures = [v["fixture"] for v in chosen["test_product"]]
    assert sorted(fixtures.count(value) for value in "rs") == [2, 3]


def test_a_list_of_cases_stays_whole(chosen):
    assert [(v["a"], v["b"]) for v in chosen["test_list"]] == PAIRS


def test_a_test_without_parameters_stays(chosen):
    assert chosen["test_alone"] == [{}]
