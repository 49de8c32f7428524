"""The table of environments reports pytest's results."""

import pytest

from benchmarks import matrix

pytestmark = pytest.mark.any_torch
RESULTS = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest" errors="1" failures="1" skipped="2" tests="6" time="90.0">
<testcase classname="tests.test_a" name="test_one"/><testcase classname="tests.test_a" name="test_two[0]"/>
<testcase classname="tests.test_a" name="test_three"><failure message="assert 0">trace</failure></testcase>
<testcase classname="tests.test_b" name="test_four"><error message="no fixture">trace</error></testcase>
<testcase classname="tests.test_b" name="test_five"><skipped message="needs a GPU">where</skipped></testcase>
<testcase classname="tests.test_b" name="test_six"><skipped message="needs a GPU">where</skipped></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "FOLDER", tmp_path)
    monkeypatch.setattr(matrix, "revision", lambda: "0123456789ab")
    file = tmp_path / "results.xml"
    file.write_text(RESULTS)
    return file


def test_counts_failures_and_reasons(results):
    result = matrix.outcome(results)
    assert [result[k] for k in ("passed", "failed", "skipped", "minutes")] == [2, 2, 2, 1.5]
    assert result["failures"] == ["tests.test_a::test_three", "tests.test_b::test_four"]
    assert result["reasons"] == {"needs a GPU": 2}


def test_an_environment_has_one_row_however_often_it_ran(results, tmp_path):
    matrix.main("oldest", results)
    results.write_text(RESULTS.replace('<failure message="assert 0">trace</failure>', ""))
    matrix.main("newest", results)
    matrix.main("oldest", results)
    lines = (tmp_path / "matrix.md").read_text().splitlines()
    (row,) = (line for line in lines if line.startswith("| oldest |"))
    assert "| 3 | 1 | 2 | 1.5 |" in row
    assert "0123456789ab" in row
    assert sum(line.startswith("| newest |") for line in lines) == 1
    assert lines.count("- 2 skipped: needs a GPU") == 2
    assert lines.count("- failed: `tests.test_b::test_four`") == 2


def test_another_file_is_refused(tmp_path):
    file = tmp_path / "other.xml"
    file.write_text("<html/>")
    with pytest.raises(ValueError, match="expected what --junit-xml writes"):
        matrix.outcome(file)
