"""`benchmarks.compare` on result files written by hand."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import compare
from benchmarks.compare import Times, change, main
from bt_fast.lab.report import machine

pytestmark = pytest.mark.any_torch
NAME = "benchmarks/test_x.py::test_y[small-cnn]"
STEADY = [1.0, 1.001, 0.999, 1.002, 0.998]


def entry(seconds=None, name=NAME, rounds=STEADY, **info):
    """Returns a benchmark in pytest-benchmark's format; `seconds` by variant."""
    variants = {} if seconds is None else {"seconds": seconds}
    return {"fullname": name, "stats": {"data": rounds}, "extra_info": {**info, **variants}}


def times(factor):
    return [factor * t for t in STEADY]


@pytest.fixture
def compared(tmp_path, capsys):
    """Returns exit status and output for the benchmarks of two files."""

    def run(old, new, *options):
        paths = [tmp_path / "old.json", tmp_path / "new.json"]
        for path, benchmarks in zip(paths, (old, new), strict=True):
            path.write_text(json.dumps({"benchmarks": benchmarks}))
        status = main([*map(str, paths), *options])
        return status, capsys.readouterr().out

    return run


def test_what_takes_longer_in_every_round_is_slower_and_fails(compared):
    status, out = compared([entry()], [entry(rounds=times(1.1))])
    assert status == 1
    assert "slower  round: 1 s -> 1.1 s, 1.100x" in out
    assert out.endswith("1 slower, 0 faster, 0 same, 0 unclear\n")


def test_what_takes_less_is_faster_and_passes(compared):
    status, out = compared([entry()], [entry(rounds=times(0.5))])
    assert status == 0
    assert "faster  round: 1 s -> 500 ms, 0.500x" in out


@pytest.mark.parametrize(("noise", "status"), [("0.05", 1), ("0.2", 0)])
def test_a_difference_below_the_noise_is_none(compared, noise, status):
    assert compared([entry()], [entry(rounds=times(1.1))], "--noise", noise)[0] == status


def test_by_default_the_noise_is_3_percent(compared):
    assert compared([entry()], [entry(rounds=times(1.02))])[0] == 0
    assert compared([entry()], [entry(rounds=times(1.04))])[0] == 1


def test_rounds_that_overlap_are_the_same_though_their_medians_differ(compared):
    status, out = compared([entry(rounds=[1.0, 1.3, 1.1, 1.0, 1.3])], [entry(rounds=[1.3, 1.0, 1.3, 1.2, 1.0])])
    assert status == 0
    assert "same    round: 1.1 s -> 1.2 s" in out


def test_two_rounds_tell_nothing(compared):
    status, out = compared([entry(rounds=[1.0, 1.0])], [entry(rounds=[2.0, 2.0])])
    assert status == 0
    assert "unclear round: 1 s -> 2 s, 2.000x, too few rounds to tell" in out


def test_without_single_rounds_the_quartiles_decide(compared):
    def summed(median, iqr, rounds=20):
        return {"fullname": NAME, "stats": {"median": median, "iqr": iqr, "rounds": rounds}}

    assert compared([summed(1.0, 0.01)], [summed(1.1, 0.01)])[0] == 1
    assert compared([summed(1.0, 0.5)], [summed(1.1, 0.5)])[0] == 0
    assert compared([entry()], [summed(1.1, 0.01)])[0] == 1
    assert "too few rounds" in compared([summed(1.0, 0.0, rounds=1)], [summed(2.0, 0.0, rounds=1)])[1]


def test_the_variants_are_compared_one_by_one(compared):
    old, new = {"reference": times(2), "bullet": times(1)}, {"reference": times(2), "bullet": times(1.5)}
    status, out = compared([entry(old)], [entry(new)])
    assert status == 1
    assert "same    reference: 2 s -> 2 s" in out
    assert "slower  bullet: 1 s -> 1.5 s" in out
    assert "less    speedup of bullet over reference: 2.00x -> 1.33x" in out


def test_on_a_slower_machine_the_speedups_stay(compared):
    old, new = {"reference": times(2), "bullet": times(1)}, {"reference": times(6), "bullet": times(3)}
    status, out = compared([entry(old)], [entry(new)])
    assert status == 1
    assert "speedup" not in out


def test_a_greater_speedup_is_reported(compared):
    old, new = {"reference": times(2), "bullet": times(1)}, {"reference": times(2), "bullet": times(0.5)}
    assert "more    speedup of bullet over reference: 2.00x -> 4.00x" in compared([entry(old)], [entry(new)])[1]


def test_every_change_of_a_whole_number_is_reported_exactly(compared):
    old = entry(launches=10, flops={"bullet": 10**12}, gone=1, kept=3, share=0.5, ok=True)
    new = entry(launches=11, flops={"bullet": 10**12 + 1}, kept=3, share=0.6, ok=False)
    status, out = compared([old], [new])
    assert status == 0
    assert [line for line in out.splitlines() if "count" in line] == [
        "  count   launches: 10 -> 11",
        "  count   flops, bullet: 1000000000000 -> 1000000000001",
        "  count   gone: 1 -> none",
    ]


def test_what_is_in_one_file_only_is_listed(compared):
    old = [entry({"a": STEADY, "b": STEADY}), entry(name="old")]
    new = [entry({"a": STEADY, "c": STEADY}), entry(name="new")]
    lines = compared(old, new)[1].splitlines()
    assert [line for line in lines if "only" in line] == [
        "  only in the old file: b",
        "  only in the new file: c",
        "only in the old file: old",
        "only in the new file: new",
    ]


def test_a_different_machine_is_warned_of_once(compared):
    old = [entry(name=name, torch="2.6", threads=2) for name in "ab"]
    new = [entry(name=name, torch="2.13", threads=1, device="cpu", driver=None) for name in "ab"]
    lines = compared(old, new)[1].splitlines()
    assert [line for line in lines if "warning" in line] == [
        "warning: torch was 2.6, is 2.13",
        "warning: threads was 2, is 1",
        "warning: device was not known, is cpu",
    ]


def test_all_that_a_result_says_of_its_machine_is_looked_at():
    assert set(compare.MACHINE) == machine(torch.device("cpu")).keys()


@given(
    st.lists(st.floats(0.1, 10), min_size=1, max_size=12),
    st.lists(st.floats(0.1, 10), min_size=1, max_size=12),
)
def test_swapping_the_files_inverts_the_ratio_and_its_interval(old, new):
    there, back = change(Times.of(old), Times.of(new)), change(Times.of(new), Times.of(old))
    assert (there.interval is None) == (back.interval is None)
    if there.interval:
        assert there.interval[0] <= there.ratio <= there.interval[1]
        assert there.interval == pytest.approx((1 / back.interval[1], 1 / back.interval[0]))


@pytest.mark.parametrize(("n", "m", "critical"), [(3, 3, None), (4, 4, 0), (5, 5, 2), (8, 10, 17), (20, 20, 127)])
def test_the_interval_is_mann_and_whitneys(n, m, critical):
    """The critical values are those of printed tables, two-sided at 5 %."""
    old, new = [1.0 + 1e-3 * k for k in range(n)], [2.0 + 7e-5 * k for k in range(m)]
    ratios = sorted(b / a for a in old for b in new)
    result = change(Times.of(old), Times.of(new)).interval
    assert result == (None if critical is None else (ratios[critical], ratios[-critical - 1]))


def test_of_many_rounds_some_are_taken_from_all_over_the_run():
    taken = Times.of([float(k) for k in range(1, 1001)]).rounds
    assert (len(taken), taken[0], taken[-1]) == (50, 1.0, 981.0)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"benchmarks": 3}',
        '{"benchmarks": [{}]}',
        '{"benchmarks": [{"fullname": "a", "stats": {}}]}',
        '{"benchmarks": [{"fullname": "a", "stats": {"data": [1.0, 0.0]}}]}',
        '{"benchmarks": [{"fullname": "a", "stats": {"data": ["1.0"]}}]}',
        '{"benchmarks": [{"fullname": "a", "stats": {"data": [NaN]}}]}',
        '{"benchmarks": [{"fullname": "a", "stats": {}, "extra_info": {"seconds": {"a": []}}}]}',
        '{"benchmarks": [{"fullname": "a", "stats": {"data": [1]}}, {"fullname": "a", "stats": {"data": [1]}}]}',
    ],
)
@pytest.mark.parametrize("bad", ["old", "new"])
def test_a_file_that_is_no_result_is_named_in_one_line(tmp_path, capsys, content, bad):
    paths = {name: tmp_path / f"{name}.json" for name in ("old", "new")}
    for name, path in paths.items():
        path.write_text(content if name == bad else json.dumps({"benchmarks": [entry()]}))
    assert main([str(path) for path in paths.values()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"{paths[bad]}: found ")
    assert err.count("\n") == 1


def test_a_missing_file_is_named(tmp_path, capsys):
    assert main([str(tmp_path / "none.json")] * 2) == 2
    assert capsys.readouterr().err == f"{tmp_path / 'none.json'}: No such file or directory\n"


def test_files_with_nothing_in_common_cannot_be_compared(tmp_path, capsys):
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path in paths:
        path.write_text(json.dumps({"benchmarks": [entry(name=path.name)]}))
    assert main(list(map(str, paths))) == 2
    assert capsys.readouterr().err == f"{paths[1]}: no benchmark of {paths[0]} is there\n"


@pytest.mark.parametrize("noise", ["-0.1", "nan", "inf", "much"])
def test_the_noise_must_be_a_share(capsys, noise):
    with pytest.raises(SystemExit) as stopped:
        main(["old.json", "new.json", f"--noise={noise}"])
    assert stopped.value.code == 2
    assert f"expected a share of at least 0, such as 0.03, got '{noise}'" in capsys.readouterr().err
