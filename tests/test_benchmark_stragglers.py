from dataclasses import replace

import numpy as np
import pytest

from benchmarks.gpu_model import GPUS, simulate
from benchmarks.gpu_prediction import PAPER, STEPS, Workload
from benchmarks.gpu_trace import NOWHERE, trace
from benchmarks.stragglers import (
    LOST_GOAL,
    Groups,
    IterationTime,
    Network,
    as_dict,
    draw_counts,
    measured_groups,
    predicted_time,
    straggling,
    table,
)
from bt_fast.speedup import Fractions

pytestmark = pytest.mark.any_torch
SECONDS = IterationTime(row_seconds=1.0, step_seconds=8.0, other_seconds=400.0, worst_fit=0.0)  # the plan takes no time
FREE = Network(bytes_per_second=1e12, latency_seconds=0.0)
GROUPS = Groups((PAPER, Fractions(0.4, 0.5, 0.1)), 1.3)


def lost(ranks=64, seconds=SECONDS, network=FREE, threshold="global"):
    return straggling(GROUPS, threshold, ranks, 128, seconds, network, 40_000, iterations=10)


@pytest.mark.parametrize("overdispersion", [1.0, 1.5, 4.0])
def test_drawn_counts_have_the_shares_and_the_variance_that_they_should(overdispersion):
    counts = draw_counts(PAPER, overdispersion, 20_000, 128, "global", np.random.default_rng(0)).numpy()
    assert (counts.sum(axis=1) == 128).all()
    for steps, share in zip(STEPS, (PAPER.boundary, PAPER.robust, PAPER.outlier), strict=True):
        assert counts[:, steps].mean() / 128 == pytest.approx(share, rel=0.02)
        assert counts[:, steps].var() / (128 * share * (1 - share)) == pytest.approx(overdispersion, rel=0.05)


def test_a_ranks_own_threshold_pins_its_robust_share():
    counts = draw_counts(PAPER, 1.3, 1000, 128, "own", np.random.default_rng(0)).numpy()
    assert set(counts[:, 2]) == {round(PAPER.robust * 128)}
    assert (counts.sum(axis=1) == 128).all()
    assert counts[:, 0].std() == pytest.approx(counts[:, 10].std())
    few_correct = draw_counts(Fractions(0.0, 0.5, 0.5), 1.3, 1000, 128, "own", np.random.default_rng(0))
    assert few_correct.min() >= 0


@pytest.mark.parametrize("overdispersion", [1.0, 2.0])
def test_records_tell_how_much_minibatches_differ(overdispersion):
    generator = np.random.default_rng(1)
    counts = draw_counts(PAPER, overdispersion, 4000, 100, "global", generator).numpy() / 100
    runs = [[Fractions(*row[list(STEPS)]) for row in half] for half in (counts[:2000], counts[2000:])]
    result = measured_groups(runs, 100)
    assert result.overdispersion == pytest.approx(overdispersion, rel=0.1)
    assert result.fractions == tuple(runs[0] + runs[1])


@pytest.mark.parametrize(
    ("runs", "message"),
    [([], r"4 records.*\[\]"), ([[PAPER] * 3], r"4 records.*\[3\]"), ([[Fractions(0.5, 0.5, 0.0)] * 9], "outliers")],
)
def test_records_that_tell_nothing_are_an_error(runs, message):
    with pytest.raises(ValueError, match=message):
        measured_groups(runs, 100)


@pytest.mark.parametrize("threshold", ["global", "own"])
def test_more_ranks_wait_longer_but_hardly_so_when_balanced(threshold):
    few, many = (lost(ranks, threshold=threshold) for ranks in (8, 512))
    assert 0.02 < few.lost < many.lost
    for result in (few, many):
        assert result.lost_balanced < 0.01
        assert result.lost_balanced == pytest.approx(result.left, abs=1e-4)  # the network takes no time
        assert result.exchanged == 1.0
        assert result.sent_bytes > result.busiest_bytes > 0
        assert 1 <= result.most_partners < result.ranks


def test_one_rank_waits_for_nobody():
    alone = lost(1)
    assert alone.lost == alone.exchanged == alone.sent_bytes == alone.busiest_bytes == alone.most_partners == 0
    assert alone.lost_balanced == pytest.approx(0, abs=1e-4)


def test_where_the_exchange_takes_too_long_ranks_do_not_exchange_but_have_planned():
    slow = lost(network=Network(bytes_per_second=1.0, latency_seconds=2.0))
    assert slow.exchanged == slow.sent_bytes == 0
    assert slow.lost < slow.lost_balanced < slow.lost + 0.01  # for the gather of the counts


def test_at_the_latency_limit_the_goal_is_just_reached():
    limit = lost().latency_limit
    at_limit = lost(network=replace(FREE, latency_seconds=limit))
    assert at_limit.exchanged == 1.0
    assert at_limit.lost_balanced == pytest.approx(LOST_GOAL, abs=1e-4)
    assert at_limit.latency_limit == pytest.approx(limit, rel=1e-2)


def test_the_same_seed_finds_the_same():
    one, other = (replace(lost(), plan_seconds=0.0, lost_balanced=0.0, latency_limit=0.0) for _ in range(2))
    assert one == other


def test_the_affine_time_is_near_that_of_an_iteration_which_it_has_not_seen():
    result = predicted_time(GPUS["h100"], "small-cnn", 32)
    workload = Workload("small-cnn", 32, NOWHERE)
    reported = simulate(trace(workload.variants()["bullet"], reads=workload.counts()), GPUS["h100"]).seconds
    row_steps = workload.boundary * 10 + workload.robust * 2
    affine = result.other_seconds + 10 * result.step_seconds + row_steps * result.row_seconds
    assert affine == pytest.approx(reported, rel=0.05)
    assert 0 < result.worst_fit < 0.1


def test_the_table_has_a_line_for_each_number_of_ranks():
    result = [lost(ranks) for ranks in (8, 1024)]
    head, rule, *rows = table(result)
    assert len({line.count("|") for line in (head, rule, *rows)}) == 1
    assert [row.split("|")[1].strip() for row in rows] == ["8", "1,024"]
    assert as_dict(result[0])["lost"] == result[0].lost
