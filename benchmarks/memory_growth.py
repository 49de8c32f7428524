"""The bytes of a `Memory`, and the time of recalling and remembering a minibatch in it, of so many samples.

    python -m benchmarks.memory_growth --samples 1000000 --storage file --path perturbations.mem --phase write

A size has a process of its own, so that it neither finds the pages of another one nor leaves it any. With a file there
are three: "write" makes it and writes the rows of its minibatches, whose page faults are those of rows that have never
been written; "cold" reads them after the kernel was asked to drop the file from its page cache, and "warm" again, from
there. The rows are drawn from all of the data set, as in a shuffled epoch. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from bt_fast import Memory, Plan, ThreatModel
from bt_fast.memory_file import header_of

SHAPE, BATCH, EPSILON = (3, 32, 32), 128, 8 / 255
ROW = 3 * 32 * 32  # bytes in int8
PHASES = ("write", "cold", "warm")
CHUNK = 2**14  # rows that are filled at once


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper one."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def drop_from_cache(path: Path) -> None:
    """Writes the file's pages to the disk, and asks the kernel to keep none of them."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory_of(samples: int, storage: str, path: Path | None) -> Memory:
    """A memory in which something is remembered of all rows; in a file of those alone that were written."""
    if storage == "file":
        return Memory(samples, SHAPE, dtype=torch.int8, storage="file", path=path)
    memory = Memory(samples, SHAPE, dtype=torch.int8)
    memory._allocate(SHAPE, torch.int8)
    assert memory.perturbations is not None
    filling = torch.randint(-127, 128, (min(CHUNK, samples), *SHAPE), dtype=torch.int8)
    for rows in memory.perturbations.split(CHUNK):  # a page that nobody has written is no page
        rows.copy_(filling[: len(rows)])
    memory.written.zero_()
    return memory


def measured(memory: Memory, rounds: int, seed: int) -> dict[str, list[float]]:
    """Seconds of recalling (with the noise of the start) and remembering, of each minibatch."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(BATCH, *SHAPE, generator=g)
    x_adv, plan = x + EPSILON * (2 * torch.rand(x.shape, generator=g) - 1), Plan.uniform(BATCH, 1, EPSILON, x.device)
    state, threat = torch.tensor([1, 2]), ThreatModel(EPSILON)
    seconds: dict[str, list[float]] = {"recall": [], "remember": []}
    for _ in range(rounds):
        indices = torch.randint(memory.samples, (2 * BATCH,), generator=g).unique()
        indices = indices[torch.randperm(len(indices), generator=g)[:BATCH]]
        start = time.perf_counter()
        recalled = memory.recall(x, indices, None, l2=False)
        recalled.starts(x, threat, state, None)
        middle = time.perf_counter()
        memory.remember(recalled, x_adv, x, plan, EPSILON, l2=False)
        seconds["recall"].append(middle - start)
        seconds["remember"].append(time.perf_counter() - middle)
    return seconds


def result(samples: int, storage: str, path: Path | None, phase: str | None, rounds: int) -> dict[str, Any]:
    """The figures of one size and phase."""
    if phase == "cold" and path is not None:
        drop_from_cache(path)
    faults = resource.getrusage(resource.RUSAGE_SELF)
    memory = memory_of(samples, storage, path)
    if storage == "device":
        measured(memory, 3, seed=0)  # the first calls make what the ops keep
    elif memory.perturbations is None:
        memory._allocate(SHAPE, torch.int8)
    begin, cpu = time.perf_counter(), time.process_time()
    seconds = measured(memory, rounds, seed=1)
    share = (time.process_time() - cpu) / (time.perf_counter() - begin)
    assert memory.perturbations is not None
    sizes = memory.perturbations.nbytes + memory.written.nbytes
    figures: dict[str, Any] = {"samples": samples, "storage": storage, "phase": phase, "bytes": sizes}
    for name, times in seconds.items():
        figures[f"{name}: ms"] = [round(1e3 * t, 3) for t in quartiles(times)]
    after = resource.getrusage(resource.RUSAGE_SELF)
    figures |= {"minibatches": rounds, "share of a core": round(share, 2)}
    figures["pages read from the disk"] = after.ru_majflt - faults.ru_majflt
    figures["resident MiB"] = round(after.ru_maxrss / 1024)
    if path is not None and storage == "file":
        memory.state_dict()  # flushes
        figures["bytes on the disk"] = 512 * path.stat().st_blocks
    return figures


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.memory_growth", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--storage", choices=("device", "file"), default="device")
    parser.add_argument("--path", type=Path)
    parser.add_argument("--phase", choices=PHASES)
    parser.add_argument("--rounds", type=int, default=60)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.phase == "write" and header_of(given.path).exists():
        raise SystemExit(f"{given.path} is there already")
    print(json.dumps(result(given.samples, given.storage, given.path, given.phase, given.rounds)))


if __name__ == "__main__":
    main()
