"""What a memory of perturbations costs: its share of an iteration, and its growth with the data set.

The price is that of an iteration of TRADES with BulletTrain in 1 / 1 / 0 steps, at the paper's fractions, on the engine
"fast": with a memory over without one, in interleaved pairs, with and without a placement. The share is recalling and
remembering alone over the iteration without a memory; "noise alone" is the share of the random start that an iteration
without a memory draws, too. "CPU" are the processor's own seconds, which other processes add less to. What is not exact
is not timed: a memory of which nothing is remembered must give the loss of an iteration without one, and what is
remembered must be where the attack ended.

Growth is the time of a shuffled minibatch of 128 CIFAR-size rows in memories of 10^4 to 10^7 samples, by
`memory_growth`, each in its own process. Sizes that do not fit are named in the result. The figures of GPUs are
PREDICTED. Each part of benchmarks/results/memory.json says when, where and how busy the machine was ("share of a
core": CPU seconds over seconds). To record:

pytest benchmarks/test_memory.py -s --full
"""

from __future__ import annotations

import copy
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import quick_and_full, report
from test_training_iteration import Case, Workload

from benchmarks.gpu_model import GPUS
from benchmarks.gpu_prediction import price_of_a_memory
from benchmarks.memory_growth import BATCH, PHASES, ROW, quartiles, result
from bt_fast import PGD, BulletTrain, Memory, Placement, ThreatModel, TRADESLoss
from bt_fast.attack.forward import clean_logits, eval_mode
from bt_fast.lab.files import write_text
from bt_fast.lab.report import machine

RESULTS = Path(__file__).parent / "results" / "memory.json"
COMMAND = "pytest benchmarks/test_memory.py -s --full"
SAMPLES, EPSILON, ROBUST = 50_000, 0.031, 0.54
MOST_SHARE = 0.02  # of an iteration
ATTACK = PGD(EPSILON, EPSILON, 1)
CASES = {"small-cnn": Case("small-cnn", 128, 41), "wrn-10-1": Case("wrn-10-1", 128, 21)}
CASES |= {"wrn-16-2": Case("wrn-16-2", 128, 9)}
STORED = {"int8": torch.int8, "float16": torch.float16, "float32": torch.float32}
SIZES = [10**4, 10**5, 10**6, 3 * 10**6, 10**7]
SPARE = 4 * 2**30  # bytes of memory, and of the disk, that are left to others


def store(part: str, figures: dict[str, Any]) -> None:
    """Writes one part of the result file, in place of what was there."""
    kept = json.loads(RESULTS.read_text())["parts"] if RESULTS.exists() else {}
    when: dict[str, Any] = {"date": datetime.date.today().isoformat(), "load": [round(n, 2) for n in os.getloadavg()]}
    when["busy"] = when["load"][0] > 1.5  # other processes than this one: the times are noisy
    parts = dict(sorted({**kept, part: when | figures}.items()))
    text = json.dumps({"what": (__doc__ or "").splitlines()[0], "command": COMMAND, "parts": parts}, indent=1)
    write_text(RESULTS, text + "\n")


class Remembering:
    """A workload, the loss without a memory, and one with a memory of each number type; all of them mine alike."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.work, m = Workload(case, device), case.batch
        shape = tuple(self.work.x.shape[1:])
        with device:
            self.criteria = {"without": self._loss(None)}
            for name, dtype in STORED.items():
                self.criteria[name] = self._loss(Memory(SAMPLES, shape, dtype=dtype))
            shifts = (torch.randint(-4, 5, (m,)) for _ in range(2))
            self.placement = Placement(*shifts, torch.rand(m) < 0.5)
            self.state, self.threat = torch.tensor([1, 2]), ThreatModel(EPSILON)
        self.draw()
        self.check_exactness()
        for name, criterion in self.criteria.items():
            self.loss(name)  # makes the memory
            if criterion.memory is not None:
                values = criterion.memory.perturbations
                values.random_(-127, 128) if values.dtype == torch.int8 else values.uniform_(-1, 1)
        self.work.prepare()
        mining = self.criteria["without"].mining
        mining.robust_fraction.fill_(ROBUST)
        with eval_mode(self.work.model):
            self.plan = mining.plan(clean_logits(self.work.model, self.work.x), self.work.y, epsilon=EPSILON)
        mining.reset_fractions()
        self.clean = self.work.x[self.plan.order]
        self.x_adv = (self.clean + EPSILON * (2 * torch.rand_like(self.clean) - 1)).clamp_(0, 1)

    @staticmethod
    def _loss(memory: Memory | None) -> TRADESLoss:
        return TRADESLoss(ATTACK, mining=BulletTrain(1, 1, 0), memory=memory, engine="fast")

    def draw(self) -> None:
        """Draws the samples of the next minibatch, whose rows are nowhere near those of the last one."""
        self.indices = torch.randint(SAMPLES, (8 * len(self.work.x),), device=self.work.x.device).unique()
        self.indices = self.indices[torch.randperm(len(self.indices), device=self.work.x.device)[: len(self.work.x)]]

    def prepare(self, variant: str) -> None:
        """Draws samples, and gives the groups their sizes."""
        self.draw()
        self.work.prepare()
        for criterion in self.criteria.values():
            criterion.mining.robust_fraction.fill_(ROBUST)

    def loss(self, name: str, placed: bool = False) -> torch.Tensor:
        options = {"placement": self.placement} if placed else {}
        return self.criteria[name](self.work.model, self.work.x, self.work.y, indices=self.indices, **options)

    def iteration(self, name: str, placed: bool = False) -> Callable[[], None]:
        def run() -> None:
            self.work.optimizer.zero_grad()
            self.loss(name, placed).backward()
            self.work.optimizer.step()

        return run

    def alone(self, name: str, placed: bool = False) -> Callable[[], None]:
        """Recalls and remembers a minibatch, without what is between."""

        def run() -> None:
            memory, x, plan = self.criteria[name].memory, self.work.x, self.plan
            recalled = memory.recall(x, self.indices, self.placement if placed else None, l2=False)
            recalled.starts(x, self.threat, self.state, None, plan.order, plan.steps)
            memory.remember(recalled, self.x_adv, self.clean, plan, EPSILON, l2=False)

        return run

    def noise(self) -> None:
        """Draws the start of an iteration without a memory."""
        order, steps = self.plan.order, self.plan.steps
        torch.ops.bt_fast.gather_start(self.work.x, order, steps, self.state, "normal", 0.001, 0.0, 1.0, None)

    def check_exactness(self) -> None:
        """Compares losses before anything is remembered, and what is remembered with x' - x; without mining."""
        losses, x = [], 0.1 + 0.8 * self.work.x  # the authors' start, unlike that at a memory, may leave [0, 1]
        for dtype in (None, *STORED.values()):
            memory = None if dtype is None else Memory(SAMPLES, dtype=dtype).to(self.work.x.device)
            criterion = TRADESLoss(ATTACK, memory=memory, engine="fast")
            torch.manual_seed(1)  # of the network's dropout
            generator = torch.Generator(self.work.x.device).manual_seed(1)
            batch = copy.deepcopy(self.work.model), x, self.work.y
            losses.append(criterion(*batch, indices=self.indices, generator=generator).detach())
            if memory is not None:
                quantum, unit = {torch.int8: (0.51, 127), torch.float16: (1e-3, 1)}.get(memory.dtype, (1e-5, 1))
                moved = ((criterion.last.x_adv - x) / EPSILON).double().clamp(-1, 1)
                assert (memory.perturbations[self.indices].double() - unit * moved).abs().max() <= quantum
                assert moved.any()
        for loss in losses[1:]:
            torch.testing.assert_close(loss, losses[0], rtol=1e-5, atol=1e-6)


def counted(work: Callable[[], object], seconds: list[float]) -> Callable[[], None]:
    """The work, which notes the processor's seconds: other processes do not count, though they slow it down."""

    def run() -> None:
        begin = time.process_time()
        work()
        seconds.append(time.process_time() - begin)

    return run


def compared(times: list[float], without: list[float], what: str) -> dict[str, list[float]]:
    """Quartiles of the milliseconds, and of the pairs' ratios to an iteration without a memory."""
    ratios = quartiles([a / b for a, b in zip(times, without, strict=True)])
    return {
        f"{what}ms": [round(1e3 * t, 3) for t in quartiles(times)],
        f"{what}over without": [round(r, 4) for r in ratios],
    }


@pytest.mark.parametrize("name", quick_and_full(["small-cnn"], CASES))
def test_price(name: str, interleaved: Any, benchmark: Any, device: torch.device, request: Any) -> None:
    work = Remembering(CASES[name], device)
    kinds = {f"{dtype}{', placed' if placed else ''}": (dtype, placed) for dtype in STORED for placed in (False, True)}
    variants: dict[str, Callable[[], object]] = {"without": work.iteration("without"), "noise alone": work.noise}
    variants |= {kind: work.iteration(*of) for kind, of in kinds.items()}
    variants |= {f"{kind}, alone": work.alone(*of) for kind, of in kinds.items()}
    cpu: dict[str, list[float]] = {variant: [] for variant in variants}
    begin, before = time.perf_counter(), time.process_time()
    seconds = interleaved({v: counted(work, cpu[v]) for v, work in variants.items()}, work.prepare, CASES[name].rounds)
    busy = (time.process_time() - before) / (time.perf_counter() - begin)
    rows: dict[str, Any] = {}
    for variant, times in seconds.items():
        rows[variant] = compared(times, seconds["without"], "")
        rows[variant] |= compared(cpu[variant][-len(times) :], cpu["without"][-len(times) :], "CPU ")
    line = "{:.2f} ms, {:.4f} of an iteration; of the processor's time {:.2f} ms, {:.4f}"
    info = {variant: line.format(*(figures[1] for figures in row.values())) for variant, row in rows.items()}
    report(benchmark, f"price of a memory, {name}, batch {CASES[name].batch}", info)
    if not benchmark.enabled or not request.config.getoption("--full"):
        return
    within: dict[str, Any] = {"at most": MOST_SHARE}
    for what in ("over without", "CPU over without"):
        within[f"alone, largest, {what}"] = max(rows[f"{kind}, alone"][what][1] for kind in kinds)
        within[f"price, largest, {what}"] = max(rows[kind][what][1] for kind in kinds)
    here = {"machine": machine(device), "share of a core": round(busy, 2), "rounds": len(seconds["without"])}
    store(f"price, {name}", {**here, "batch": CASES[name].batch, "samples": SAMPLES, **within, "variants": rows})


def grown(samples: int, storage: str, path: Path | None, phase: str | None, rounds: int) -> dict[str, Any]:
    """Runs `memory_growth` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory_growth", "--samples", str(samples), "--storage", storage]
    command += ["--rounds", str(rounds)] + ([] if path is None else ["--path", str(path), "--phase", str(phase)])
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    figures: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return figures


def free_memory() -> int:
    """Bytes of memory that a process may take."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def test_operations_on_ever_more_samples(benchmark: Any, tmp_path: Path, request: Any) -> None:
    full = request.config.getoption("--full")
    sizes, rounds, measure = (SIZES, 60, grown) if full else ([500], 2, result)  # in this process, to see that it runs
    rows, left_out = [], []
    benchmark.pedantic(lambda: None, rounds=1)
    for samples in sizes:
        if samples * ROW > free_memory() - SPARE:
            left_out.append(f"device, {samples}: {samples * ROW / 1e9:.1f} GB are more than the free memory")
        else:
            rows.append(measure(samples, "device", None, None, rounds))
        written = 3 * rounds * BATCH * 4096 + samples * 8  # of a file only the pages that are written are on the disk
        if written > shutil.disk_usage(tmp_path).free - SPARE:
            left_out.append(f"file, {samples}: the disk has no room for {written / 1e9:.1f} GB")
            continue
        path = tmp_path / f"{samples}.mem"
        rows += [measure(samples, "file", path, phase, rounds) for phase in PHASES]
        path.unlink()
    info = {
        f"{r['samples']}, {r['storage']}, {r['phase']}": f"{r['recall: ms'][1]} + {r['remember: ms'][1]} ms"
        for r in rows
    }
    report(benchmark, "growth with the samples", {**machine(torch.device("cpu")), **info, "left out": left_out})
    assert all(row["bytes"] == row["samples"] * (ROW + 8) for row in rows)
    if full:
        store("growth", {"machine": machine(torch.device("cpu")), "batch": BATCH, "left out": left_out, "rows": rows})


@pytest.mark.full
def test_prediction_for_gpus() -> None:
    rows = []
    for gpu in GPUS.values():
        for model in ("small-cnn", "wrn-16-2", "wrn-34-10"):
            rows += [
                price_of_a_memory(gpu, model, 128, dtype, placed)
                for dtype in STORED.values()
                for placed in (False, True)
            ]
    store("PREDICTED for GPUs, nobody measured it", {"rows": rows})
