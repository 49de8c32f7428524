"""Starts several processes on one run folder and kills some of them: the run must end as if only one had written it.

    python tests/crowded_runs.py --rounds 20

The processes are forks, as in `killed_runs.py`. Exit code 1 if a run does not end with the same bits and records, if a
refused process prints more than one line, or if a reader is disturbed.
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
from pathlib import Path

import torch
from killed_runs import METHODS, OPTIONS, command, outcome, same, start, to_the_end, wait, write_data

WRITERS = 3
LIMIT = 400.0  # seconds for a process to end while all others run
REFUSALS = ("writes there", "already holds a run")
EARLY = ("no epoch has ended", "no run folder", "no such folder", "no such checkpoint file")


def ended(process):
    code = wait(process, LIMIT)
    if code is None:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    return code


def judged(code, log, killed, lines):
    """Returns what is wrong with how a process ended, or None."""
    reported = log.read_text() if log.exists() else ""
    errors = [line for line in reported.splitlines() if line.startswith("bt-fast: ")]
    if code == 0 or (killed and code == -signal.SIGKILL):
        return None
    if code == 2 and len(errors) == 1 and any(line in errors[0] for line in lines) and "Traceback" not in reported:
        return None
    return f"exit code {code}: {reported[-1500:] or log.name}"


def crowded(place, data, epochs, whole, rng):
    """Lets several processes begin a run at once, of which all may be killed, and then several resume it at once."""
    place.mkdir()
    folder, wrong, refused, number = place / "run", [], 0, 0
    for first in (True, False):
        begun = []
        for _ in range(WRITERS):
            log = place / f"{(number := number + 1)}.log"
            begun.append((start(command(data, folder, epochs), log, True), log, first and rng.random() < 0.7, REFUSALS))
        for reader in (["report", folder, "--out", place / "page.html"], ["evaluate", folder / "checkpoint.pt"]):
            log = place / f"{(number := number + 1)}.log"
            begun.append((start([str(a) for a in reader], log, False), log, False, EARLY))
        while first and not (folder / "checkpoint.pt").exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        for process, _, kill, _ in begun:
            if kill:
                os.kill(process, signal.SIGKILL)  # it may have ended, but nobody has waited for it yet
        for process, log, kill, lines in begun:
            code = ended(process)
            refused += code == 2
            wrong += [problem] if (problem := judged(code, log, kill, lines)) else []
    code = to_the_end(command(data, folder, epochs), place / "last.log", False)
    identical = code == 0 and same(outcome(folder), whole)
    if not identical:
        wrong.append((place / "last.log").read_text()[-1500:])
    left = sorted(path.name for path in folder.iterdir() if path.name.startswith(".") or path.suffix == ".lock")
    return {"identical": identical, "refused": refused, "left": left, "wrong": wrong}


def unnamed(place, data, epochs, whole):
    """Begins runs at the same moment without --out: each must get its own folder."""
    place.mkdir()
    os.chdir(place)
    options = ["compare", *METHODS, "--data", str(data), "--epochs", str(epochs), *OPTIONS]
    begun = [start(options, place / f"{i}.log", False) for i in range(WRITERS)]
    codes = [ended(process) for process in begun]
    folders = sorted((place / "runs").iterdir())
    identical = codes == [0] * WRITERS and all(same(outcome(folder), whole) for folder in folders)
    wrong = [
        f"exit code {code}: {(place / f'{i}.log').read_text()[-1500:]}" for i, code in enumerate(codes) if code != 0
    ]
    return {"identical": identical and len(folders) == WRITERS, "refused": 0, "left": [], "wrong": wrong}


def rounds(place, count, epochs, seed):
    """Yields the result of each round."""
    data, rng = place / "data.npz", random.Random(seed)
    write_data(data)
    assert to_the_end(command(data, place / "whole", epochs), place / "log", False) == 0, (place / "log").read_text()
    whole = outcome(place / "whole")
    yield unnamed(place / "unnamed", data, epochs, whole)
    for i in range(count):
        yield crowded(place / f"round{i}", data, epochs, whole, rng)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=16, help="of three iterations each")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    actual = []
    with tempfile.TemporaryDirectory() as place:
        for result in rounds(Path(place), given.rounds, given.epochs, given.seed):
            actual.append(result)
            print(json.dumps(result), flush=True)
        os.chdir("/")
    failed = [result for result in actual if not result["identical"] or result["wrong"] or result["left"]]
    print(f"{len(actual)} rounds, {sum(result['refused'] for result in actual)} refusals, {len(failed)} failed")
    sys.exit(1 if failed or not actual else 0)


if __name__ == "__main__":
    main()
