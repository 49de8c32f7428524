"""python -m tests.fuzz [--cases 100000] [--seed 0] [--out FILE.json] [--only TARGET ...] [--verbose]

Half of the cases are calls of public entry points, drawn by hypothesis; the other half are files for the readers, made
by atheris where it is installed (the `fuzz` extra) and by random mutation of valid files. All targets of a kind get the
same number of cases. The result file is rewritten after each target. Exit status: 1 if there is a failure.
"""

import argparse
import json
import resource
import sys
from dataclasses import asdict
from pathlib import Path

import hypothesis
import torch

from bt_fast.lab.files import write_text
from bt_fast.lab.report import machine
from tests.fuzz import api, readers
from tests.fuzz.campaign import Outcome, fuzz
from tests.fuzz.mutation import fuzz_by_coverage, fuzz_bytes, has_atheris

MOST_MEMORY = 16 * 2**30  # bytes of address space: a file that asks for more gets a MemoryError, not the machine


def outcomes(cases: int, seed: int, only: list[str], verbose: bool):
    """Yields the outcome of each target, one after another."""
    by_coverage = has_atheris() and not verbose
    shares = {name: -(-cases // 2 // len(api.TARGETS)) for name in api.TARGETS}
    shares |= {name: -(-cases // 2 // len(readers.READERS)) for name in readers.READERS}
    for name, count in shares.items():
        if only and name not in only:
            continue
        if name in api.TARGETS:
            yield fuzz(name, api.TARGETS[name], count, seed, verbose)
            continue
        # atheris finds new paths by coverage, mutation changes the values of valid JSON
        if by_coverage:
            yield fuzz_by_coverage(name, count // 2, seed)
        yield fuzz_bytes(name, count - by_coverage * (count // 2), seed, verbose)


def report(result: list[Outcome], seed: int) -> dict[str, object]:
    totals = {key: sum(getattr(o, key) for o in result) for key in ("cases", "accepted", "rejected")}
    versions = {"hypothesis": hypothesis.__version__, "atheris": "used" if has_atheris() else "not installed"}
    return {
        "machine": machine(torch.device("cpu")) | versions,
        "seed": seed,
        "total": totals | {"failures": sum(sum(o.failures.values()) for o in result)},
        "targets": [asdict(o) | {"seconds": round(o.seconds, 1)} for o in result],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", default=[], metavar="TARGET")
    parser.add_argument("--verbose", action="store_true", help="print the first case of each failure")
    given = parser.parse_args(arguments)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    result: list[Outcome] = []
    try:
        for outcome in outcomes(given.cases, given.seed, given.only, given.verbose):
            result.append(outcome)
            print(outcome, outcome.engine, flush=True)
            for failure, count in outcome.failures.items():
                print(f"  {count} x {failure}", flush=True)
            if given.out:
                write_text(given.out, json.dumps(report(result, given.seed), indent=1) + "\n")
    finally:
        readers.clean_up()
    print(report(result, given.seed)["total"])
    return 1 if any(outcome.failures for outcome in result) else 0


if __name__ == "__main__":
    sys.exit(main())
