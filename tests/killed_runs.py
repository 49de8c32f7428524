"""Kills runs (SIGKILL) at random moments and in the middle of file operations; each must resume to the same end.

    python tests/killed_runs.py --moments 50 --out benchmarks/results/killed-runs.json

The process that starts and kills the runs has torch loaded, and each run is a fork of it: it starts with the command
line instead of seconds of imports. Exit code 1 if a run does not resume, or not to the same bits.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch

from bt_fast.lab import files, training
from bt_fast.lab.checkpoint import load_checkpoint
from bt_fast.lab.cli import cli
from bt_fast.lab.files import write_text
from bt_fast.lab.provenance import machine

OPTIONS = ["--width=2", "--batch-size=16", "--curve-size=8", "--eval-steps=2", "--steps=3", "--non-finite=skip"]
METHODS = ["--method", "bullet", "--method", "optimised,memory=on"]
LIMIT = 120.0  # seconds for a run to end


def write_data(path):
    """Writes two noisy classes, black and white."""
    rng = np.random.default_rng(0)
    y = np.arange(64) % 2
    x = np.clip(y[:, None, None] * 255 + rng.normal(0, 60, (64, 16, 16)), 0, 255).astype(np.uint8)
    np.savez(path, x_train=x[:48], y_train=y[:48], x_test=x[48:], y_test=y[48:])


# File operations


class Operations:
    """Counts a run's file operations as (kind, file), and dies in one of them.

    A write is cut off in the middle; a sync or rename dies before it happens; "renamed" dies after the rename.
    """

    def __init__(self, dies_at=None):
        self.dies_at, self.seen, self.file = dies_at, [], None
        self._fsync, self._replace = os.fsync, os.replace

    def install(self):
        files.open = self._open
        os.fsync, os.replace = self._counted_fsync, self._counted_replace

    def _open(self, path, *arguments, **options):
        self.file = Path(path).name.removesuffix(".part").split(f".{os.getpid()}")[0].lstrip(".")
        return _File(open(path, *arguments, **options), self)

    def reached(self, kind):
        self.seen.append((kind, self.file))
        return len(self.seen) - 1 == self.dies_at

    def _counted_fsync(self, descriptor):
        if self.reached("fsync"):
            die()
        self._fsync(descriptor)

    def _counted_replace(self, source, target):
        if self.reached("rename"):
            die()
        self._replace(source, target)
        if self.reached("renamed"):
            die()


class _File:
    def __init__(self, file, operations):
        self._file, self._operations = file, operations

    def write(self, content):
        if self._operations.reached("write"):
            self._file.write(content[: len(content) // 2])
            self._file.flush()
            die()
        return self._file.write(content)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


# Runs


def start(arguments, log, every_iteration, operations=None):
    """Starts a process that runs the command line and returns its id; it logs its operations if it lives to its end."""
    process = os.fork()
    if process:
        return process
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if every_iteration:
            training.CHECKPOINT_SECONDS = 0.0
        if operations is not None:
            operations.install()
        try:
            cli.main(args=[str(a) for a in arguments])
        except SystemExit as end:
            if operations is not None:
                log.with_suffix(".operations").write_text(json.dumps(operations.seen))
            os._exit(end.code or 0)
    except BaseException:
        traceback.print_exc()
    os._exit(70)


def wait(process, seconds):
    """Returns the exit code, negative for the signal of a killed process, or None if it still runs after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        result, status = os.waitpid(process, os.WNOHANG)
        if result:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.001)


def to_the_end(arguments, log, every_iteration, operations=None):
    process = start(arguments, log, every_iteration, operations)
    code = wait(process, LIMIT)
    if code is None:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    return code


def command(data, folder, epochs):
    """Returns the command that a user or a cluster repeats after a kill."""
    if (folder / "checkpoint.pt").exists():
        return ["compare", "--resume", folder]
    return ["compare", *METHODS, "--data", data, "--out", folder, "--epochs", epochs, *OPTIONS]


def outcome(folder):
    """Returns all that a run must end with, bit for bit: its state without clocks, and its records."""
    state = load_checkpoint(folder / "checkpoint.pt")[1]
    for contestant in state["contestants"].values():
        del contestant["seconds"]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return state, [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def same(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other


class Trial:
    """One run that is killed and resumed.

    Attributes:
        whole: the outcome of a run that is not killed.
    """

    def __init__(self, place, data, epochs, whole, every_iteration):
        self.folder, self.log, self.epochs = place / "run", place / "log", epochs
        self.data, self.whole, self.every_iteration = data, whole, every_iteration
        place.mkdir()

    def _start(self, operations=None):
        return start(command(self.data, self.folder, self.epochs), self.log, self.every_iteration, operations)

    def killed_after(self, seconds):
        process = self._start()
        if wait(process, seconds) is None:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        return self._resume({"moment_s": round(seconds, 4)})

    def killed_in(self, number, operation):
        process = self._start(Operations(number))
        code = wait(process, LIMIT)
        return self._resume({"operation": " ".join(operation), "died": code == -signal.SIGKILL})

    def killed_again_and_again(self, seconds):
        """Kills the run after `seconds`, and again after each restart, a little later each time, until it ends."""
        kills = 0
        while wait(process := self._start(), seconds * 1.1**kills) is None:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            kills += 1
        return self._resume({"moment_s": round(seconds, 4), "kills": kills})

    def _resume(self, result):
        left = sorted(path.name for path in self.folder.iterdir()) if self.folder.exists() else []
        result["half_written_temporary_file"] = any(name.endswith(".part") for name in left)
        result["checkpoint"] = None
        if "checkpoint.pt" in left:
            result["checkpoint"] = load_checkpoint(self.folder / "checkpoint.pt")[1]["iteration"]
        again = command(self.data, self.folder, self.epochs)
        result["exit_code"] = to_the_end(again, self.log, self.every_iteration)
        result["identical"] = result["exit_code"] == 0 and same(outcome(self.folder), self.whole)
        result["nothing_left"] = not [*self.folder.glob(".*"), *self.folder.glob("*.lock")]
        result["ok"] = result["identical"] and result["nothing_left"] and result.get("died", True)
        return result


def pick(operations, count, only, rng):
    """Picks numbers of operations: each kind on each file in turn (or only some), at random points of the run."""
    kinds = {}
    for number, operation in enumerate(operations):
        kinds.setdefault(" ".join(operation), []).append(number)
    order = list(only) or sorted(kinds)
    return [rng.choice(kinds[order[i % len(order)]]) for i in range(count)]


def trials(place, epochs, moments, operations, only, seed):
    """Yields the result of each killed run, one after another."""
    rng = random.Random(seed)
    data = place / "data.npz"
    write_data(data)
    whole, seconds, seen = {}, {}, {}
    for every_iteration in (False, True) if moments else (False,):
        home = place / f"whole{every_iteration}"
        home.mkdir()
        began = time.monotonic()
        code = to_the_end(command(data, home / "run", epochs), home / "log", every_iteration, Operations())
        seconds[every_iteration] = time.monotonic() - began
        assert code == 0, (home / "log").read_text()
        whole[every_iteration] = outcome(home / "run")
        seen[every_iteration] = json.loads((home / "log.operations").read_text())
    for i in range(moments):
        often = i % 2 == 1  # with a checkpoint after every iteration, so that many kills happen during a save
        trial = Trial(place / f"moment{i}", data, epochs, whole[often], often)
        yield trial.killed_after(rng.uniform(0, seconds[often]))
    if moments:
        yield Trial(place / "again", data, epochs, whole[True], True).killed_again_and_again(0.3 * seconds[True])
    for i, number in enumerate(pick(seen[False], operations, only, rng)):
        trial = Trial(place / f"operation{i}", data, epochs, whole[False], False)
        yield trial.killed_in(number, seen[False][number])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=50, help="runs killed at a random moment")
    parser.add_argument("--operations", type=int, default=50, help="runs killed in the middle of a file operation")
    parser.add_argument("--only", action="append", default=[], help='such as "write checkpoint.pt" (repeatable)')
    parser.add_argument("--epochs", type=int, default=16, help="of three iterations each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    actual = []
    with tempfile.TemporaryDirectory() as place:
        which = (given.epochs, given.moments, given.operations, given.only, given.seed)
        for result in trials(Path(place), *which):
            actual.append(result)
            print(json.dumps(result), flush=True)
            if not result["ok"]:
                home = max(Path(place).iterdir(), key=lambda path: path.stat().st_mtime)
                print((home / "log").read_text()[-2000:], file=sys.stderr)
    failed = sum(not result["ok"] for result in actual)
    print(f"{len(actual)} runs killed, {failed} failed")
    if given.out:
        content = {"machine": machine(torch.device("cpu")), "seed": given.seed, "failed": failed, "runs": actual}
        write_text(given.out, json.dumps(content, indent=1) + "\n")
    sys.exit(1 if failed or not actual else 0)


if __name__ == "__main__":
    main()
