"""A long training run whose memory must stay flat: python -m tests.soak [--iterations 10000] [--out FILE.json]

Tiny networks, batches of changing sizes, every way of calling `trades_loss` in turn, frozen views, occasional
evaluations, and a running `PowerMonitor` over the stub of NVML (a new block each EVALUATE_EVERY iterations, since a
block keeps its samples). `--emulated N` also trains N times on the emulated device, from graphs and on streams.

After WARM_UP of the iterations the memory must be flat:
  - the resident set grows by at most MOST_KIB a thousand iterations. The slope is Theil and Sen's, the median of the
    slopes between all pairs of samples: single outliers do not move it;
  - there are as many live tensors at the end as after the warm-up, and at most MOST_OBJECTS more objects a thousand
    iterations.
Exit status: 1 if it is not.
"""

import argparse
import ctypes
import gc
import itertools
import json
import mmap
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from bt_fast import BulletTrain, Frozen, PowerMonitor, ThreatModel, Update, trades_loss
from bt_fast.attack.graphs import GraphRunner
from bt_fast.attack.streams import StreamRunner
from bt_fast.evaluation import evaluate
from bt_fast.lab.files import write_text
from bt_fast.lab.report import machine
from tests import nvml_stub
from tests.emulated_device import EmulatedDevice
from tests.small_models import CLASSES, SHAPE, conv_bn

WARM_UP = 0.2
MOST_KIB = 64.0  # in a thousand iterations; losing a tensor of 16 floats each iteration would be four times that
MOST_OBJECTS = 10.0  # in a thousand iterations
MOST_BATCH = 32
EVALUATE_EVERY = 250
GPU = "GPU-aaaaaaaa-0000"
SCRIPT = f"device {GPU}\nenergy 5000000 +100\npower 111000\nsm_util 50 100\ntemperature 60 71 65\n"

WAYS = (  # of calling the loss, in turn
    {"frozen": Frozen()},
    {"frozen": Frozen(), "unperturbed": "skip", "update": Update()},
    {"frozen": Frozen(autocast=torch.bfloat16), "start": "uniform"},
    {"frozen": Frozen(), "distance": "l_2"},
    {"runner": "auto"},
)


@dataclass(frozen=True)
class Sample:
    """A measurement after some iterations: KiB of resident memory, tensors, and objects known to the collector."""

    iteration: int
    resident_kib: float
    tensors: int
    objects: int


@dataclass(frozen=True)
class Growth:
    """The growth in a thousand iterations after the warm-up, and the number of tensors at both ends."""

    kib: float
    objects: float
    tensors: tuple[int, int]

    @classmethod
    def of(cls, samples):
        after = samples[int(WARM_UP * len(samples)) :]
        tensors = (after[0].tensors, after[-1].tensors)
        return cls(slope(after, "resident_kib"), slope(after, "objects"), tensors)

    @property
    def flat(self):
        return self.kib <= MOST_KIB and self.objects <= MOST_OBJECTS and self.tensors[0] == self.tensors[1]


def slope(samples, what):
    """Returns the slope by Theil and Sen in a thousand iterations."""
    pairs = itertools.combinations(samples, 2)
    return statistics.median(
        1000 * (getattr(b, what) - getattr(a, what)) / (b.iteration - a.iteration) for a, b in pairs
    )


def sample(iteration):
    """Returns a `Sample` as a plain tuple, which the collector does not count."""
    gc.collect()
    actual = gc.get_objects()
    tensors = sum(issubclass(type(o), torch.Tensor) for o in actual)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return iteration, pages * mmap.PAGESIZE / 1024, tensors, len(actual)


class Training:
    """Trains one model, in all of the ways in turn."""

    def __init__(self):
        torch.manual_seed(0)
        self.model, self.bullet = conv_bn(), BulletTrain(3, 1, 0)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.generator = torch.Generator().manual_seed(0)
        self.losses = 0.0

    def batch(self, size):
        x = torch.rand(size, *SHAPE, generator=self.generator)
        return x, torch.randint(CLASSES, (size,), generator=self.generator)

    def step(self, iteration):
        size = int(torch.randint(2, MOST_BATCH + 1, (), generator=self.generator))
        x, y = self.batch(size)
        way = WAYS[iteration % len(WAYS)]
        loss = trades_loss(self.model, x, y, self.optimizer, 0.05, 0.1, bullet=self.bullet, **way)
        loss.backward()
        self.optimizer.step()
        self.losses += loss.item()

    def evaluate(self):
        batches = [self.batch(MOST_BATCH) for _ in range(2)]
        return evaluate(self.model, batches, ThreatModel(0.1), steps=3, restarts=2, frozen=Frozen()).robust


class Emulated:
    """Trains on the emulated device, each time with a new model and runner."""

    def step(self, iteration):
        torch.manual_seed(iteration)
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 6), nn.ReLU(), nn.Linear(6, CLASSES))
        runner = (GraphRunner, StreamRunner)[iteration % 2](bucket=2)
        bullet = BulletTrain(3, 1, 1)  # every sample is attacked
        with EmulatedDevice() as emulated:
            for size in (4, 6, 4, 6):
                x, y = torch.rand(size, *SHAPE), torch.arange(size) % CLASSES
                trades_loss(model, x, y, None, bullet=bullet, runner=runner).backward()
        assert emulated.replays

    def evaluate(self):
        return None


def soak(training, iterations, every, monitored):
    """Returns samples of memory, evaluations, and the number of samples of power."""
    samples, robust, powers = [], [], 0
    for begin in range(0, iterations, EVALUATE_EVERY):
        with PowerMonitor(GPU if monitored else torch.device("cpu")) as monitor:
            for iteration in range(begin, min(begin + EVALUATE_EVERY, iterations)):
                training.step(iteration)
                if (iteration + 1) % every == 0:
                    samples.append(sample(iteration + 1))
            robust.append(training.evaluate())
        powers += len(monitor.samples)
        del monitor
        if samples:
            print(Sample(*samples[-1]), flush=True)
    return [Sample(*taken) for taken in samples], robust, powers


def with_stub():
    """Loads the stub of NVML as the library of that name; returns False without a C compiler."""
    if nvml_stub.COMPILER is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        nvml_stub.compile_stub(Path(folder))
        stub = ctypes.CDLL(str(Path(folder) / nvml_stub.SONAME), mode=ctypes.RTLD_GLOBAL)
    return stub.stub_script(SCRIPT.encode()) == 0


def result(name, training, iterations, monitored=False):
    start = time.perf_counter()
    samples, robust, powers = soak(training, iterations, max(iterations // 100, 1), monitored)
    growth = Growth.of(samples)
    print(f"{name}: {growth}, {'flat' if growth.flat else 'NOT FLAT'}", flush=True)
    return {
        "iterations": iterations,
        "seconds": round(time.perf_counter() - start, 1),
        "flat": growth.flat,
        "growth_per_1000_iterations": {"resident_kib": round(growth.kib, 2), "objects": round(growth.objects, 2)},
        "tensors_after_warm_up_and_at_the_end": growth.tensors,
        "evaluations": sum(r is not None for r in robust),
        "power_samples": powers,
        "samples": [list(asdict(s).values()) for s in samples],
    }


def main(arguments=None):
    parser = argparse.ArgumentParser("python -m tests.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=10_000)
    parser.add_argument("--emulated", type=int, default=0, help="trainings on the emulated device (default: none)")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    stub = with_stub()
    actual = {}
    if given.iterations:
        actual["training"] = result("training", Training(), given.iterations, monitored=stub)
    if given.emulated:
        actual["emulated graphs and streams"] = result("emulated", Emulated(), given.emulated)
    if given.out:
        criterion = {"warm_up": WARM_UP, "most_kib_per_1000": MOST_KIB, "most_objects_per_1000": MOST_OBJECTS}
        columns = ["iteration", "resident_kib", "tensors", "objects"]
        head = {"machine": machine(torch.device("cpu")), "criterion": criterion, "columns": columns}
        write_text(given.out, json.dumps(head | actual, indent=1) + "\n")
    return 0 if all(one["flat"] for one in actual.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
