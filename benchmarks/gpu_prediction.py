"""The time of one TRADES iteration on a GPU: measured if there is one, else PREDICTED by the model.

The groups have the paper's sizes (Table 2: .28 boundary, .54 robust, .18 outlier; 10 / 2 / 0 steps).
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from benchmarks.engine_parts import trades_by
from benchmarks.gpu_model import Action, Gpu, Kernel, kernels_of, simulate
from benchmarks.gpu_trace import NOWHERE, trace
from bt_fast import PGD, BulletTrain, Engine, Memory, Placement, TRADESLoss, trades_loss
from bt_fast.attack.auto import now
from bt_fast.attack.forward import clean_logits, eval_mode
from bt_fast.attack.graphs import GraphRunner
from bt_fast.attack.streams import StreamRunner
from bt_fast.baselines.trades_reference import trades_reference_loss
from bt_fast.lab.models import build_model
from bt_fast.speedup import Fractions, theoretical_speedup
from bt_fast.validation import step_count

PAPER = Fractions(boundary=0.28, robust=0.54, outlier=0.18)
STEPS = (10, 2, 0)  # boundary, robust, outlier
LABELS = {
    "reference": "TRADES, authors'",
    "optimised": "TRADES, ours",
    "optimised, graphs": "TRADES, ours, graphs",
    "bullet": "+ BulletTrain",
    "bullet, graphs": "+ BulletTrain, graphs",
    "bullet, streams": "+ BulletTrain, streams",
}


class Workload:
    """A network, a minibatch, and one iteration of each method on them.

    Args:
        model: a name for `build_model`. batch_size: m ≥ 1.
        device: the device it runs on; on `NOWHERE` it can only be traced.

    Raises:
        TypeError or ValueError: the network is unknown, or the batch size is not an integer of at least 1.
    """

    def __init__(self, model: str, batch_size: int, device: torch.device) -> None:
        m = step_count("batch_size", batch_size, least=1)
        channels, size = (1, 28) if model == "small-cnn" else (3, 32)
        with device:
            self.model = build_model(model, in_channels=channels, image_size=size, num_classes=10)
            last = list(self.model.modules())[-1]
            if isinstance(last, torch.nn.Linear):
                torch.nn.init.normal_(last.weight, std=0.3)  # SmallCNN starts with logits that are all 0
            self.x = torch.rand(m, channels, size, size)
            self.y = torch.zeros(m, dtype=torch.int64)
        # lr = 0: the optimizer works, but the weights stay. Launches are grouped, the default on a GPU
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.0, momentum=0.9, weight_decay=2e-4, foreach=device.type != "cpu"
        )
        self.bullet = BulletTrain(*STEPS).to(device)
        self.outliers = round(PAPER.outlier * m)
        self.robust = round(PAPER.robust * m)
        self.boundary = m - self.outliers - self.robust

    def prepare(self) -> None:
        """Restores the sizes of the groups, which follow from the labels and F_R."""
        with eval_mode(self.model):
            self.y.copy_(clean_logits(self.model, self.x).argmax(dim=1))
        self.y[: self.outliers] = (self.y[: self.outliers] + 1) % 10
        self.bullet.robust_fraction.fill_(PAPER.robust)

    def variants(self) -> dict[str, Callable[[], None]]:
        """Returns an iteration of each method, by the names of `LABELS`."""
        arguments = (self.model, self.x, self.y, self.optimizer)
        setting: dict[str, Any] = {"step_size": 0.007, "epsilon": 0.031, "beta": 6.0}

        def iteration(loss_of: Callable[..., Tensor], **options: Any) -> Callable[[], None]:
            def run() -> None:
                loss_of(*arguments, **setting, **options).backward()
                self.optimizer.step()

            return run

        return {
            "reference": iteration(trades_reference_loss),
            "optimised": iteration(trades_loss),
            "optimised, graphs": iteration(trades_by(GraphRunner())),
            "bullet": iteration(trades_loss, bullet=self.bullet),
            "bullet, graphs": iteration(trades_by(GraphRunner(), bullet=self.bullet)),
            "bullet, streams": iteration(trades_by(StreamRunner(), bullet=self.bullet)),
        }

    def counts(self) -> list[int]:
        """Returns the numbers that a device would give for the counts: those active at each step, the group sizes."""
        steps = (self.boundary, STEPS[0]), (self.robust, STEPS[1]), (self.outliers, STEPS[2])
        active = [sum(size for size, count in steps if count > t) for t in range(max(STEPS))]
        return [*active, self.outliers, self.boundary, self.robust]


@dataclass(frozen=True)
class Row:
    """The figures of one method's iteration.

    Attributes:
        seconds: of the iteration.
        flops: its FLOPs, without the padding of graphs.
        busy: the share of the time in which the device computed; None if the time was measured.
    """

    seconds: float
    flops: int
    busy: float | None


@dataclass(frozen=True)
class Iterations:
    """The iterations of all methods on one device, by the names of `LABELS`.

    Attributes:
        predicted: whether the times are predicted by the model, rather than measured.
    """

    device: str
    model: str
    batch_size: int
    predicted: bool
    rows: dict[str, Row]

    def speedup(self, name: str, over: str) -> float:
        """Returns how many times as fast as the method `over` it is."""
        return self.rows[over].seconds / self.rows[name].seconds

    def limit(self, name: str, over: str) -> float:
        """The ratio of the two methods' floating-point operations."""
        return self.rows[over].flops / self.rows[name].flops


def eq7() -> float:
    """Returns the paper's theoretical speedup at its fractions."""
    boundary, robust, outlier = STEPS
    return theoretical_speedup(PAPER, boundary_steps=boundary, robust_steps=robust, outlier_steps=outlier)


@functools.cache
def programs(model: str, batch_size: int) -> dict[str, Sequence[Action]]:
    """Returns what each method's iteration would launch on a GPU."""
    workload = Workload(model, batch_size, NOWHERE)
    reads = {"bullet": workload.counts()}
    return {
        name: tuple(trace(work, reads=reads.get(name.split(",")[0], ()))) for name, work in workload.variants().items()
    }


def predict(gpu: Gpu, model: str, batch_size: int) -> Iterations:
    """Predicts the times by the model of `gpu`, without measuring anything.

    Raises:
        TypeError or ValueError: see `Workload`.
    """
    rows = {}
    for name, program in programs(model, batch_size).items():
        result = simulate(program, gpu)
        rows[name] = Row(result.seconds, _flops(model, batch_size, name), result.device_seconds / result.seconds)
    return Iterations(gpu.name, model, batch_size, True, rows)


def price_of_a_memory(gpu: Gpu, model: str, batch_size: int, dtype: torch.dtype, placed: bool) -> dict[str, Any]:
    """PREDICTS an iteration of TRADES with BulletTrain in 1 / 1 / 0 steps with a memory, and one without.

    By the bytes that are moved: of the memory those of the minibatch's rows, which are all that is traced.

    Args:
        dtype: of the memory. placed: whether the images have a placement.
    """
    work = Workload(model, batch_size, NOWHERE)
    m, shape = len(work.x), tuple(work.x.shape[1:])
    options: dict[str, Any] = {"indices": torch.arange(m, device=NOWHERE)}
    attack, engine = PGD(0.031, 0.031, 1), Engine(graphs=True)
    seconds: dict[str, float] = {}
    kernels: dict[str, list[Kernel]] = {}
    for name, memory in (("without", None), ("with", Memory(m, shape, dtype=dtype).to(NOWHERE))):
        if memory is not None and placed:
            zeros = torch.zeros(m, dtype=torch.int64, device=NOWHERE)
            options["placement"] = Placement(zeros, zeros, zeros.bool())
        criterion = TRADESLoss(attack, mining=BulletTrain(1, 1, 0), memory=memory, engine=engine).to(NOWHERE)

        def run(criterion: TRADESLoss = criterion) -> None:
            criterion(work.model, work.x, work.y, **options).backward()
            work.optimizer.step()

        active = work.boundary + work.robust
        program = trace(run, reads=[active, work.outliers, work.boundary, work.robust], warm=2)
        seconds[name], kernels[name] = simulate(program, gpu).seconds, kernels_of(program)
    fused = [kernel for kernel in kernels["with"] if kernel.name in ("recall", "remember_")]
    moved = {name: sum(k.bytes for k in fused if k.name == name) for name in ("recall", "remember_")}
    moved["recall"] += 2 * work.x.nbytes  # what is new besides a state that is changed is not in the trace's sum
    return {
        "predicted": True,
        "device": gpu.name,
        "model": model,
        "batch_size": batch_size,
        "dtype": str(dtype).removeprefix("torch."),
        "placed": placed,
        "seconds without": seconds["without"],
        "over without": seconds["with"] / seconds["without"],
        "launches more": len(kernels["with"]) - len(kernels["without"]),
        "bytes": moved,
        "seconds of these bytes": sum(moved.values()) / (gpu.bandwidth * gpu.memory_efficiency),
    }


def measure(device: torch.device, model: str, batch_size: int, *, rounds: int = 10, warm: int = 3) -> Iterations:
    """Measures the times: medians of rounds in which the methods alternate.

    A method that cannot run from graphs runs eagerly, with the runner's warning.

    Raises:
        TypeError or ValueError: see `Workload`.
    """
    workload = Workload(model, batch_size, device)
    seconds: dict[str, list[float]] = {name: [] for name in LABELS}
    variants = workload.variants()
    for _ in range(warm + rounds):
        for name, work in variants.items():
            workload.prepare()
            start = now(workload.x)
            work()
            seconds[name].append(now(workload.x) - start)
    rows = {
        name: Row(statistics.median(times[warm:]), _flops(model, batch_size, name), None)
        for name, times in seconds.items()
    }
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Iterations(name, model, batch_size, False, rows)


def measurable_device() -> torch.device | None:
    """Returns the GPU to measure on, or None."""
    return torch.device("cuda") if torch.cuda.is_available() else None


def _flops(model: str, batch_size: int, name: str) -> int:
    eagerly = programs(model, batch_size)[name.split(",")[0]]
    return sum(kernel.flops for kernel in kernels_of(eagerly))


def table(iterations: Iterations) -> Table:
    """Returns the table for the terminal."""
    label = "PREDICTED" if iterations.predicted else "measured"
    title = "PREDICTED, not measured" if iterations.predicted else "Measured"
    view = Table(
        title=f"{title}: one TRADES iteration,\n{iterations.model}, batch {iterations.batch_size}, {iterations.device}",
        caption=(
            f"Speedup / ratio of the FLOPs, and the share of it. Fractions {PAPER.boundary:.2f}/{PAPER.robust:.2f}/"
            f"{PAPER.outlier:.2f}, steps 10/2/0: Eq. 7 gives {eq7():.2f}x."
        ),
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        pad_edge=False,
    )
    view.add_column("", no_wrap=True)
    columns = ["ms", "vs authors'", "vs ours"]
    if iterations.predicted:
        columns.insert(1, "GPU busy")
    for name in columns:
        view.add_column(f"{label}\n{name}", justify="right", no_wrap=True)
    for name, row in iterations.rows.items():
        cells = [LABELS[name], f"{1e3 * row.seconds:.1f}"]
        if row.busy is not None:
            cells.append(f"{row.busy:.0%}")
        for over in ("reference", "optimised"):
            speedup, limit = iterations.speedup(name, over), iterations.limit(name, over)
            cells.append(f"{speedup:.2f}/{limit:.2f} {speedup / limit:.0%}")
        view.add_row(*cells)
    return view


def as_dict(iterations: Iterations) -> dict[str, Any]:
    """Returns the entry of a result file: seconds, and each method's speedups, their limits and the reached shares."""
    rows = {}
    for name, row in iterations.rows.items():
        rows[name] = {
            "seconds": row.seconds,
            "flops": row.flops,
            "busy": row.busy,
            **{
                f"over {over}": {
                    "speedup": iterations.speedup(name, over),
                    "flop_limit": iterations.limit(name, over),
                    "of_flop_limit": iterations.speedup(name, over) / iterations.limit(name, over),
                    "of_eq7": iterations.speedup(name, over) / eq7(),
                }
                for over in ("reference", "optimised")
            },
        }
    return {
        "predicted": iterations.predicted,
        "device": iterations.device,
        "model": iterations.model,
        "batch_size": iterations.batch_size,
        "eq7": eq7(),
        "methods": rows,
    }
