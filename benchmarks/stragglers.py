"""SIMULATES how long ranks of a data-parallel training wait for the slowest one, with and without balancing.

Each rank's minibatch has some samples of each group, and all ranks wait for the longest attack. The variation of the
counts comes from records of real trainings, the plan and the decision are those of `attack.balance`, and the seconds of
an iteration on a GPU are PREDICTED by `gpu_model`. The network's figures are assumed. Nothing was measured on several
GPUs.

    iteration    mining, update and what else does not depend on the counts, and the longest attack of all ranks
    balanced     the same with the attack as planned, and: a gather of the counts, the plan on the host, the exchange
    lost         the share of the iteration that is over what it would be if all ranks attacked the mean
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_model import Gpu, simulate
from benchmarks.gpu_prediction import STEPS, Workload
from benchmarks.gpu_trace import NOWHERE, trace
from bt_fast.attack.balance import Costs, Exchange, pays, plan, routes
from bt_fast.speedup import Fractions

Threshold = Literal["global", "own"]
LOST_GOAL = 0.03  # of an iteration, at 1,024 ranks with 128 samples each


@dataclass(frozen=True)
class IterationTime:
    """One rank's iteration: PREDICTED seconds, affine in the rows of each attack step.

    Attributes:
        row_seconds: for one sample in one attack step. step_seconds: the constant time of an attack step.
        other_seconds: for everything except the attack.
        worst_fit: the largest error of the affine times, relative to the predicted iteration.
    """

    row_seconds: float
    step_seconds: float
    other_seconds: float
    worst_fit: float


def predicted_time(gpu: Gpu, model: str, batch_size: int) -> IterationTime:
    """Predicts eager TRADES with BulletTrain on `gpu`: a line through iterations with few and many attacked samples.

    Raises:
        TypeError or ValueError: see `Workload`.
    """
    workload = Workload(model, batch_size, NOWHERE)
    work = workload.variants()["bullet"]
    rows = sorted({round(batch_size * share / 8) for share in range(9)})
    seconds = []
    for boundary in rows:
        workload.boundary, workload.robust, workload.outliers = boundary, 0, batch_size - boundary
        seconds.append(simulate(trace(work, reads=workload.counts()), gpu).seconds)
    other, steps = seconds[0], max(STEPS)
    of_steps = [(s - other) / steps for s in seconds[1:]]
    per_row, per_step = np.polyfit(rows[1:], of_steps, 1)
    off = [steps * abs(per_step + per_row * a - s) for a, s in zip(rows[1:], of_steps, strict=True)]
    worst = max(error / whole for error, whole in zip(off, seconds[1:], strict=True))
    return IterationTime(float(per_row), float(per_step), other, float(worst))


@dataclass(frozen=True)
class Network:
    """The network between the GPUs. ASSUMED.

    Attributes:
        bytes_per_second: of a rank, out and in at the same time.
        latency_seconds: of a collective that carries almost nothing.
    """

    bytes_per_second: float
    latency_seconds: float


# The groups


@dataclass(frozen=True)
class Groups:
    """The shares of the groups over a training, and how much more minibatches differ than they would by chance.

    Attributes:
        fractions: one for each of some moments of the training; all ranks share the moment.
        overdispersion: the variance of a minibatch's outliers over that of a binomial. Only the outliers are
            informative: within one process the percentile threshold fixes the robust share.
    """

    fractions: tuple[Fractions, ...]
    overdispersion: float


def measured_groups(runs: Sequence[Sequence[Fractions]], samples: int) -> Groups:
    """Estimates `Groups` from records of trainings.

    The overdispersion compares neighbouring records of the later half of each run. It includes what the model learns
    between two records, which the ranks of one training share: it is an upper bound. At one moment the ranks'
    minibatches are random parts of one shuffled data set, whose counts differ by chance alone.

    Args:
        runs: the records of each run, in order: the shares in `samples` consecutive samples.

    Raises:
        ValueError: there is no run, or one has fewer than 4 records or no outliers in its later half.
    """
    if not runs or min(map(len, runs)) < 4:
        raise ValueError(f"runs must hold at least 4 records each, got {[len(run) for run in runs]}: measure longer")
    ratios = []
    for run in runs:
        shares = np.array([f.outlier for f in run[len(run) // 2 :]])
        chance = float((shares * (1 - shares)).mean()) / samples
        if chance == 0:
            raise ValueError("runs must have outliers in their later halves: measure longer")
        ratios.append(float((np.diff(shares) ** 2).mean()) / 2 / chance)
    return Groups(tuple(f for run in runs for f in run), statistics.mean(ratios))


def draw_counts(
    fractions: Fractions,
    overdispersion: float,
    ranks: int,
    batch_size: int,
    threshold: Threshold,
    generator: np.random.Generator,
) -> Tensor:
    """Draws the counts [N, n+1] int64 of one iteration, where n is the largest of `STEPS`.

    Args:
        threshold: "global": each rank's groups are Dirichlet-multinomial (multinomial at an overdispersion of 1).
            "own": so are its outliers, but its robust samples are the same share of each minibatch, as far as
            possible, since each rank takes the percentile of its own samples.
    """
    shares = np.array([fractions.boundary, fractions.robust, fractions.outlier])
    shares = np.maximum(shares, 1e-9) / np.maximum(shares, 1e-9).sum()
    if overdispersion > 1:
        drawn = generator.dirichlet(shares * (batch_size - overdispersion) / (overdispersion - 1), ranks)
    else:
        drawn = np.broadcast_to(shares, (ranks, 3))
    boundary, robust, outlier = generator.multinomial(batch_size, drawn).T
    if threshold == "own":
        robust = np.minimum(round(float(shares[1]) * batch_size), batch_size - outlier)
        boundary = batch_size - outlier - robust
    counts = torch.zeros(ranks, max(STEPS) + 1, dtype=torch.int64, device="cpu")
    for steps, group in zip(STEPS, (boundary, robust, outlier), strict=True):
        counts[:, steps] += torch.from_numpy(group)
    return counts


# The ranks


@dataclass(frozen=True)
class Straggling:
    """The results of some SIMULATED iterations of N ranks: means over the iterations, except for maxima.

    Attributes:
        ranks: N.
        lost, lost_balanced: the share of the time that is lost to stragglers; with balancing, including its cost.
        left: the part of `lost_balanced` that the exchange does not cause: remainders that cannot be distributed.
        exchanged: the share of iterations in which the exchange paid.
        sent_bytes: by all ranks together, there and back. busiest_bytes: the most of one rank in any iteration.
        most_partners: ranks that one rank sends to, the most in any iteration.
        plan_seconds: on this machine's CPU, MEASURED: the plan, the decision and a rank's routes; the median.
        latency_limit: the latency of a collective (of the two all-to-alls and of the gather) at which `lost_balanced`
            would be `LOST_GOAL`, if it still exchanged as often; below 0 if there is none.
    """

    ranks: int
    lost: float
    lost_balanced: float
    left: float
    exchanged: float
    sent_bytes: float
    busiest_bytes: float
    most_partners: int
    plan_seconds: float
    latency_limit: float


def straggling(
    groups: Groups,
    threshold: Threshold,
    ranks: int,
    batch_size: int,
    iteration: IterationTime,
    network: Network,
    sample_bytes: int,
    *,
    ranks_per_node: int = 8,
    iterations: int = 100,
    seed: int = 0,
) -> Straggling:
    """Simulates iterations at moments drawn from `groups`.

    Args:
        threshold: see `draw_counts`. sample_bytes: see `Costs`. ranks_per_node: see `plan`.
    """
    generator = np.random.default_rng(seed)
    costs = Costs(
        iteration.row_seconds, iteration.step_seconds, sample_bytes, network.latency_seconds, network.bytes_per_second
    )
    result, planning = [], []
    for _ in range(iterations):
        moment = groups.fractions[generator.integers(len(groups.fractions))]
        counts = draw_counts(moment, groups.overdispersion, ranks, batch_size, threshold, generator)
        began = time.perf_counter()
        exchange = plan(counts, ranks_per_node)
        paid = pays(exchange, costs)
        routes(exchange, 0)
        planning.append(time.perf_counter() - began)
        result.append(_Iteration.of(exchange, costs, paid))
    other = iteration.other_seconds
    mean, slowest, balanced = (
        other + statistics.mean(getattr(f, name) for f in result) for name in ("mean", "slowest", "balanced")
    )
    plan_seconds = statistics.median(planning)
    whole = balanced + statistics.mean(f.exchange for f in result) + network.latency_seconds + plan_seconds
    exchanged = statistics.mean(float(f.paid) for f in result)
    room = mean / (1 - LOST_GOAL) - whole
    return Straggling(
        ranks=ranks,
        lost=1 - mean / slowest,
        lost_balanced=1 - mean / whole,
        left=1 - mean / balanced,
        exchanged=exchanged,
        sent_bytes=sample_bytes * statistics.mean(f.moved for f in result),
        busiest_bytes=sample_bytes * max(f.busiest for f in result),
        most_partners=max(f.partners for f in result),
        plan_seconds=plan_seconds,
        latency_limit=network.latency_seconds + room / (1 + 2 * exchanged),
    )


@dataclass(frozen=True)
class _Iteration:
    """Seconds of the ranks' attack: the mean, the longest, the longest after balancing, if it paid; and what moved."""

    mean: float
    slowest: float
    balanced: float
    exchange: float
    paid: bool
    moved: int
    busiest: int
    partners: int

    @classmethod
    def of(cls, exchange: Exchange, costs: Costs, paid: bool) -> _Iteration:
        attacks = costs.attack_seconds(exchange.counts)
        mean, slowest = float(attacks.mean()), float(attacks.max())
        if not paid:
            return cls(mean, slowest, slowest, 0.0, False, 0, 0, 0)
        pairs = torch.unique(exchange.source * exchange.ranks + exchange.target)
        return cls(
            mean,
            slowest,
            float(costs.attack_seconds(exchange.quotas).max()),
            costs.exchange_seconds(exchange),
            True,
            int(exchange.number.sum()),
            exchange.busiest,
            int(torch.bincount(pairs // exchange.ranks).max()),
        )


def table(results: Sequence[Straggling]) -> list[str]:
    """Returns lines of Markdown; every figure except the plan's time is SIMULATED."""
    lines = [
        "| ranks | lost | lost, balanced | of it remainders | exchange paid | sent by all | busiest rank | partners "
        "| plan (measured) | a collective may take |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for s in results:
        cells = [f"{s.ranks:,}", f"{s.lost:.1%}", f"{s.lost_balanced:.2%}", f"{s.left:.2%}", f"{s.exchanged:.0%}"]
        cells += [f"{s.sent_bytes / 1e6:.1f} MB", f"{s.busiest_bytes / 1e3:.0f} kB", f"{s.most_partners}"]
        cells += [f"{1e3 * s.plan_seconds:.2f} ms", f"{1e3 * s.latency_limit:.1f} ms"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def as_dict(result: Straggling) -> dict[str, Any]:
    """Returns the entry of a result file."""
    return dict(vars(result))
