"""The plan is a pure function, tested on arbitrary counts; the exchange runs in real processes joined by gloo."""

import dataclasses
import itertools
import time
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from gloo_ranks import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import nn

from bt_fast import Plan, ThreatModel
from bt_fast.attack import auto
from bt_fast.attack.balance import Costs, measured_costs, pays, plan, routes, sample_bytes, send_out
from bt_fast.attack.batch import AttackBatch
from bt_fast.attack.generate import generate
from bt_fast.attack.runners import run_eager
from bt_fast.plan import Known

SHAPES = st.tuples(st.integers(1, 13), st.integers(1, 6))
COUNTS = arrays.arrays(np.int64, SHAPES, elements=st.integers(0, 9)).map(torch.from_numpy)


def active(counts):
    """Returns [N, n]: for each rank the number of samples with more than t steps."""
    return counts.flip(1).cumsum(1).flip(1)[:, 1:]


def by_level(exchange, end):
    result = torch.zeros_like(exchange.counts)
    result.index_put_((end, exchange.level), exchange.number, accumulate=True)
    return result


# The plan


@settings(max_examples=150, deadline=None)
@given(COUNTS)
def test_at_each_step_the_ranks_samples_differ_by_at_most_one(counts):
    exchange = plan(counts)
    at_work = active(exchange.quotas)
    if at_work.numel():
        assert (at_work.amax(0) - at_work.amin(0)).max() <= 1


@settings(max_examples=150, deadline=None)
@given(COUNTS, st.integers(1, 5))
def test_every_sample_is_attacked_once_and_those_without_steps_stay(counts, near):
    exchange = plan(counts, near)
    assert (exchange.quotas >= 0).all()
    assert torch.equal(exchange.quotas.sum(0), counts.sum(0))
    assert torch.equal(exchange.quotas[:, 0], counts[:, 0])
    sent, received = by_level(exchange, exchange.source), by_level(exchange, exchange.target)
    assert torch.equal(counts - sent + received, exchange.quotas)


@settings(max_examples=150, deadline=None)
@given(COUNTS, st.integers(1, 5))
def test_only_a_surplus_moves_and_within_the_node_as_far_as_it_can(counts, near):
    exchange = plan(counts, near)
    surplus = counts - exchange.quotas
    sent, received = by_level(exchange, exchange.source), by_level(exchange, exchange.target)
    assert torch.equal(sent, surplus.clamp(min=0))
    assert torch.equal(received, (-surplus).clamp(min=0))
    node = torch.arange(len(counts)) // near
    within = node[exchange.source] == node[exchange.target]
    for level in range(counts.shape[1]):
        offers, needs = (torch.zeros(len(counts), dtype=torch.int64) for _ in range(2))
        offers.index_add_(0, node, surplus[:, level].clamp(min=0))
        needs.index_add_(0, node, (-surplus[:, level]).clamp(min=0))
        moved = exchange.number[within & (exchange.level == level)].sum()
        assert moved == torch.minimum(offers, needs).sum()


@settings(max_examples=50, deadline=None)
@given(COUNTS)
def test_the_moves_are_in_order_and_tell_each_rank_what_it_sends_and_receives(counts):
    exchange = plan(counts)
    moves = list(zip(exchange.source, exchange.target, -exchange.level, strict=True))
    assert moves == sorted(set(moves))
    assert (exchange.number > 0).all()
    sent = torch.stack([exchange.outgoing(r) for r in range(len(counts))])
    received = torch.stack([exchange.incoming(r) for r in range(len(counts))])
    assert torch.equal(sent, received.transpose(0, 1))
    assert sent.sum() == exchange.number.sum()


@settings(max_examples=30, deadline=None)
@given(COUNTS)
def test_the_same_counts_give_the_same_plan_however_they_lie_in_memory(counts):
    one, other = plan(counts), plan(counts.clone().t().contiguous().t())
    for name in ("quotas", "source", "target", "level", "number"):
        assert torch.equal(getattr(one, name), getattr(other, name))


def test_a_rank_with_one_more_boundary_sample_gets_fewer_robust_ones():
    counts = torch.zeros(2, 11, dtype=torch.int64)
    counts[:, 10], counts[:, 2] = torch.tensor([2, 1]), torch.tensor([3, 1])
    assert plan(counts).quotas[:, [10, 2]].tolist() == [[2, 1], [1, 3]]


def test_all_samples_on_one_rank_are_dealt_out():
    counts = torch.tensor([[0, 0, 8], [0, 0, 0], [5, 0, 0], [0, 0, 0]])
    exchange = plan(counts)
    assert exchange.quotas[:, 2].tolist() == [2, 2, 2, 2]
    assert exchange.outgoing(0)[:, 2].tolist() == [0, 2, 2, 2]
    assert exchange.incoming(2)[:, 2].tolist() == [2, 0, 0, 0]


@pytest.mark.parametrize(
    "counts",
    [[[3, 1, 4]], [[1, 2, 3], [4, 2, 3]], [[7], [2]], [[5, 0, 0], [0, 0, 0]], [[0, 3], [0, 2]], [[0, 2], [0, 3]]],
    ids=["one rank", "even", "no levels", "no steps", "a remainder at the first", "a remainder at the last"],
)
def test_where_nothing_can_be_gained_nothing_moves(counts):
    exchange = plan(torch.tensor(counts))
    assert len(exchange.number) == 0
    assert torch.equal(exchange.quotas, exchange.counts)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 13), st.integers(0, 9), st.data())
def test_no_rank_attacks_more_samples_than_it_has_where_all_have_as_many(ranks, m, data):
    steps = data.draw(arrays.arrays(np.int64, (ranks, m), elements=st.integers(0, 4)))
    counts = torch.from_numpy(np.stack([(steps == k).sum(1) for k in range(5)], axis=1))
    assert plan(counts).quotas[:, 1:].sum(1).max() <= m


@pytest.mark.parametrize(
    ("counts", "near", "error", "message"),
    [
        ([[1, 2]], 1, TypeError, "counts.*list"),
        (torch.ones(2, 2), 1, TypeError, r"counts.*int64.*float32"),
        (torch.ones(2, dtype=torch.int64), 1, ValueError, r"counts.*\[N, n\+1\].*\[2\]"),
        (torch.ones(0, 2, dtype=torch.int64), 1, ValueError, r"counts.*\[0, 2\]"),
        (torch.ones(2, 2, dtype=torch.int64, device="meta"), 1, ValueError, "counts.*CPU.*meta"),
        (torch.tensor([[1, -2]]), 1, ValueError, "counts.*at least 0.*-2"),
        (torch.ones(2, 2, dtype=torch.int64), 0, ValueError, "ranks_per_node.*0"),
    ],
)
def test_bad_counts_are_reported(counts, near, error, message):
    with pytest.raises(error, match=message):
        plan(counts, near)


# The decision


COUNTS_OF_TWO = torch.tensor([[4, 2, 6], [8, 2, 2]])  # 14 and 6 row-steps; balanced 10 and 10, with 2 moved
FREE = {"row_seconds": 1.0, "step_seconds": 10.0, "sample_bytes": 0.0, "latency_seconds": 0.0, "bytes_per_second": 1.0}


def test_the_attacks_time_is_affine_in_the_rows_and_a_step_without_rows_is_free():
    counts = torch.tensor([[4, 2, 6], [8, 2, 0], [3, 0, 0]])
    assert Costs(**FREE).attack_seconds(counts).tolist() == [14 + 20, 2 + 10, 0]


def test_an_exchange_takes_two_latencies_and_the_busiest_ranks_bytes():
    costs = Costs(**FREE | {"sample_bytes": 30.0, "latency_seconds": 1.0, "bytes_per_second": 20.0})
    assert costs.exchange_seconds(plan(COUNTS_OF_TWO)) == 2 * 1.0 + 2 * 30.0 / 20.0
    assert costs.exchange_seconds(plan(torch.tensor([[0, 9], [0, 0], [0, 0]]))) == 2 * 1.0 + 6 * 30.0 / 20.0
    assert costs.exchange_seconds(plan(COUNTS_OF_TWO[:1])) == 0.0


@pytest.mark.parametrize(("latency", "expected"), [(1.99, True), (2.0, False)])
def test_an_exchange_pays_where_it_takes_less_than_the_slowest_rank_gains(latency, expected):
    assert pays(plan(COUNTS_OF_TWO), Costs(**FREE | {"latency_seconds": latency})) is expected


def test_no_exchange_never_pays():
    assert not pays(plan(torch.tensor([[1, 2], [1, 2]])), Costs(**FREE))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"row_seconds": -1.0}, "row_seconds.*-1"),
        ({"bytes_per_second": 0.0}, "bytes_per_second.*above 0"),
        ({"latency_seconds": float("nan")}, "latency_seconds.*nan"),
        ({"step_seconds": "1"}, "step_seconds.*'1'"),
    ],
)
def test_bad_costs_are_reported(changed, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Costs(**FREE | changed)


def test_a_samples_bytes_are_three_images_out_and_home_its_target_its_size_and_its_flag():
    assert sample_bytes(torch.empty(7, 3, 32, 32), torch.empty(7, 10)) == 3 * 3 * 32 * 32 * 4 + 40 + 8 + 4


# The exchange


@settings(max_examples=100, deadline=None)
@given(COUNTS)
def test_the_routes_lead_out_and_home_again(counts):
    exchange = plan(counts)
    ways = [routes(exchange, rank) for rank in range(len(counts))]
    rows = [[(rank, i) for i in range(int(counts[rank].sum()))] for rank in range(len(counts))]
    steps = [torch.arange(counts.shape[1]).flip(0).repeat_interleave(own.flip(0)).tolist() for own in counts]
    attacked = carried([there for there, _ in ways], rows)
    for rank, batch in enumerate(attacked):
        taken = [(-steps[source][i], source != rank, source, i) for source, i in batch]
        assert taken == sorted(taken)  # by descending steps; first the rank's own samples, then those of others by rank
        result = [sum(steps[source][i] == k for source, i in batch) for k in range(1, counts.shape[1])]
        assert result == exchange.quotas[rank, 1:].tolist()
    moving = [(rank, i) for rank, i in itertools.chain(*rows) if steps[rank][i]]
    assert sorted(itertools.chain(*attacked)) == moving
    behind = [[(*sample, "x'") for sample in batch] + own for batch, own in zip(attacked, rows, strict=True)]
    expected = [[(rank, i, "x'") if steps[rank][i] else (rank, i) for rank, i in own] for own in rows]
    assert carried([home for _, home in ways], behind) == expected


def carried(ways, batches):
    """Simulates the all-to-all for all ranks at once."""
    parcels = [[batches[rank][i] for i in way.leaving.tolist()] for rank, way in enumerate(ways)]
    arrived = []
    for rank, way in enumerate(ways):
        inbox = []
        for source, other in enumerate(ways):
            begin = sum(other.sent[:rank])
            assert other.sent[rank] == way.received[source]
            inbox += parcels[source][begin : begin + other.sent[rank]]
        behind = batches[rank] + inbox
        arrived.append([behind[i] for i in way.order.tolist()])
    return arrived


def exact_attack(clean, start, target, schedule):
    """Attacks by sums and products alone, so that a sample gets the same bits in any batch.

    Flags the attacked samples with a start pixel below the image.
    """
    x = start.clone(memory_format=torch.preserve_format)
    for n in schedule.active_counts:
        size = schedule.step_size[:n].to(x.dtype).view(-1, 1, 1, 1)
        x[:n] = x[:n] + size * (clean[:n] - x[:n] * target[:n, :1].to(x.dtype).view(-1, 1, 1, 1))
    moving = schedule.active_counts[0] if schedule.active_counts else 0
    faulty = (start < clean).flatten(1).any(dim=1).int()
    faulty[moving:] = 0
    return x, faulty


def samples(rank, own, dtype, memory_format):
    """Returns a rank's clean images, starts, targets and schedule for its counts [n+1], in sorted order."""
    generator = torch.Generator().manual_seed(rank)
    m = int(own.sum())
    clean = torch.rand(m, 3, 8, 8, dtype=torch.float64, generator=generator)
    start = (clean + 0.01 * torch.rand(clean.shape, generator=generator) - 0.002).to(dtype)
    steps = torch.arange(len(own)).flip(0).repeat_interleave(own.flip(0))
    sizes = 0.1 * torch.rand(m, dtype=torch.float64, generator=generator) + 0.01
    target = torch.rand(m, 4, dtype=torch.promote_types(dtype, torch.float32), generator=generator)
    images = [t.to(dtype).contiguous(memory_format=memory_format) for t in (clean, start)]
    return *images, target, Plan.from_steps(steps, sizes)


def counts_of(ranks):
    """Returns cases of counts: three groups, every level, all on one rank, and one with nothing to attack."""
    generator = torch.Generator().manual_seed(ranks)
    groups = torch.zeros(ranks, 6, dtype=torch.int64)
    groups[:, [0, 2, 5]] = torch.randint(0, 7, (ranks, 3), generator=generator)
    levels = torch.randint(0, 4, (ranks, 4), generator=generator)
    lonely = torch.zeros(ranks, 3, dtype=torch.int64)
    lonely[ranks - 1, 2], lonely[:, 0] = 2 * ranks + 1, 1
    return [groups, levels, lonely]


def test_each_rank_gets_what_it_would_have_got_itself():
    run_ranks(4, exchange_among_four_and_in_pairs)


def exchange_among_four_and_in_pairs():
    all_is_as_if_nobody_had_helped(None)
    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    pair = pairs[dist.get_rank() // 2]
    all_is_as_if_nobody_had_helped(pair)
    the_attack_of_a_network_is_the_same(pair)
    each_sample_keeps_its_own_epsilon(pair)
    what_does_not_fit_is_told(pair)
    measured_costs_are_those_of_all_ranks()


def sent_out(clean, start, target, schedule, exchange, group):
    flags = torch.zeros(len(clean), dtype=torch.int32)
    return send_out(AttackBatch.of(schedule, start, clean, target, flags), exchange, group)


def all_is_as_if_nobody_had_helped(group):
    rank = dist.get_rank(group)
    for counts in counts_of(dist.get_world_size(group)):
        exchange = plan(counts, ranks_per_node=2)
        assert len(exchange.number)
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for memory_format in (torch.contiguous_format, torch.channels_last):
                clean, start, target, schedule = samples(rank, counts[rank], dtype, memory_format)
                before = [t.clone() for t in (clean, start, target)]
                there = sent_out(clean, start, target, schedule, exchange, group)
                away = there.batch
                assert away.steps.tolist() == by_descending(exchange.quotas[rank])
                again = Plan.from_steps(away.steps, away.step_size)
                assert away.active == again.active_counts
                assert away.clean.dtype == away.x_adv.dtype == dtype
                assert away.clean.is_contiguous(memory_format=memory_format)
                result, flags = there.bring_home(*exact_attack(away.clean, away.x_adv, away.target, again))
                expected, expected_flags = exact_attack(clean, start, target, schedule)
                assert torch.equal(result, expected)
                assert torch.equal(flags, expected_flags)
                assert result.is_contiguous(memory_format=memory_format)
                assert all(torch.equal(a, b) for a, b in zip((clean, start, target), before, strict=True))


def by_descending(quotas):
    """Lists the step counts above 0 of quotas [n+1], in descending order."""
    return [k for k in range(len(quotas) - 1, 0, -1) for _ in range(int(quotas[k]))]


def the_attack_of_a_network_is_the_same(group):
    counts, rank = counts_of(dist.get_world_size(group))[0], dist.get_rank(group)
    clean, start, target, schedule = samples(rank, counts[rank], torch.float64, torch.contiguous_format)
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 4)).double()
    target, threat = target.softmax(dim=1), ThreatModel(epsilon=0.05)
    expected = generate(model, clean, start, target, schedule, threat)
    there = sent_out(clean, start, target, schedule, plan(counts), group)
    away = there.batch
    of_away = Plan(away.steps, away.step_size, None, Known(away.active), len(away.active))
    x_adv = generate(model, away.clean, away.x_adv, away.target, of_away, threat, faulty=away.faulty)
    result, flags = there.bring_home(x_adv, away.faulty)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)
    assert not flags.any()


def each_sample_keeps_its_own_epsilon(group):
    counts, rank = counts_of(dist.get_world_size(group))[0], dist.get_rank(group)
    clean, start, target, schedule = samples(rank, counts[rank], torch.float64, torch.contiguous_format)
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 4)).double()
    radii = torch.linspace(0.08, 0.0, len(clean), dtype=torch.float64) + 0.01 * rank
    batch = AttackBatch.of(schedule, start.clone(), clean, target.softmax(dim=1))
    batch = dataclasses.replace(batch, epsilon=radii)
    there = send_out(batch, plan(counts), group)
    run_eager(model, there.batch, ThreatModel(9.0), None)
    result, _ = there.bring_home(there.batch.x_adv, there.batch.faulty)
    run_eager(model, batch, ThreatModel(9.0), None)
    torch.testing.assert_close(result, batch.x_adv, rtol=0, atol=1e-10)
    moved = (result - clean)[batch.steps > 0].flatten(1).abs().amax(dim=1)
    assert (moved <= radii[batch.steps > 0] + 1e-12).all()


def what_does_not_fit_is_told(group):
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    counts = counts_of(ranks)[0]
    clean, start, target, schedule = samples(rank, counts[rank], torch.float32, torch.contiguous_format)
    with pytest.raises(ValueError, match=rf"exchange.*{ranks} ranks.*{ranks - 1}"):
        sent_out(clean, start, target, schedule, plan(counts[1:]), group)
    with pytest.raises(ValueError, match=f"batch.*{len(clean)} samples"):
        sent_out(clean[1:], start[1:], target, schedule, plan(counts), group)
    there = sent_out(clean, start, target, schedule, plan(counts), group)
    away = there.batch
    with pytest.raises(ValueError, match=r"x_adv.*float32.*float64"):
        there.bring_home(away.x_adv.double(), away.faulty)
    with pytest.raises(ValueError, match=r"faulty.*int32.*int64"):
        there.bring_home(away.x_adv, away.faulty.long())


def measured_costs_are_those_of_all_ranks():
    rank, sizes = dist.get_rank(), set()
    rows = 64 - 8 * rank  # unequal shares: ranks that did not agree on the sizes would not meet in a collective

    work = 0.0  # its seconds: real ones would be longer beside other processes, and here count a millionth

    def attack(n):
        nonlocal work
        sizes.add(n)
        work += 0.002 + 1e-4 * n * (1 + rank)  # ranks differ: the mean is 2.5e-4 s a sample

    def clock(_):
        return work + 1e-6 * time.perf_counter()

    clean, target = torch.empty(1, 3, 8, 8), torch.empty(1, 4)
    with mock.patch.object(auto, "now", clock):
        result = measured_costs(attack, rows, clean, target)
    of_all = [None] * 4
    dist.all_gather_object(of_all, result)
    assert of_all == [result] * 4
    assert sizes == {rows // 4, rows}
    assert result.row_seconds == pytest.approx(2.5e-4, rel=0.05)
    assert result.step_seconds == pytest.approx(0.002, rel=0.2)
    assert result.sample_bytes == sample_bytes(clean, target)
    assert result.latency_seconds > 0
    assert result.bytes_per_second > 0
    with pytest.raises(ValueError, match="rows"):
        measured_costs(attack, 1, clean, target)
