"""Makes bytes for the readers from valid files: by random mutation, or by atheris (libFuzzer), guided by coverage.

python -m tests.fuzz.mutation READER RUNS SEED OUT.json runs atheris on one reader. It needs a separate process, since
atheris ends its process.
"""

import copy
import importlib.util
import json
import random
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.fuzz.campaign import Outcome, Run

INTERESTING = (b"\x00", b"\xff", b"\x7f", b"\x80", b"\xff\xff\xff\xff", b"\x00" * 8, b"-1", b"1e999", b"NaN", b"null")
INTERESTING += (b"[", b"{", b'"', b"\n", b",", b".", b"9" * 40, b"\xed\xa0\x80", b"\xf0\x9f\x8c\xb1", b"c__main__\nf\n")


def has_atheris() -> bool:
    return importlib.util.find_spec("atheris") is not None


def mutated(seed: bytes, others: list[bytes], random: random.Random) -> bytes:
    """Makes a few changes: of bits and bytes, and of parts that are cut, doubled, moved, or taken from another file."""
    data = bytearray(seed)
    for _ in range(random.choice((1, 1, 2, 3, 8))):
        at = random.randrange(len(data) + 1)
        length = random.choice((1, 2, 4, 16, 200))
        match random.randrange(7):
            case 0 if data:
                data[at % len(data)] ^= 1 << random.randrange(8)
            case 1 if data:
                data[at % len(data)] = random.randrange(256)
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = data[at : at + length]
            case 4:
                new = random.choice(INTERESTING)
                data[at : at + random.choice((0, len(new)))] = new
            case 5:
                other = random.choice(others)
                begin = random.randrange(len(other) + 1)
                data[at : at + length] = other[begin : begin + length]
            case _:
                del data[at:]
    return bytes(data)


VALUES = (
    None,
    True,
    0,
    -1,
    1.5,
    10**30,
    10**400,
    float("nan"),
    float("inf"),
    "",
    "name",
    "1",
    [],
    [1],
    {},
    {"a": 1},
    [[1]],
)


def with_other_values(seed: bytes, random: random.Random) -> bytes | None:
    """Replaces, removes or repeats some values of JSON, or of lines of JSON; returns None for anything else."""
    lines = seed.decode(errors="replace").splitlines()
    try:
        content = [json.loads(line) for line in lines]
    except (ValueError, RecursionError):
        return None
    for _ in range(random.choice((1, 1, 2, 4))):
        places = [(holder, key) for line in content for holder, key in _places(line)]
        if not places:
            return None
        holder, key = random.choice(places)
        match random.randrange(5):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, list):
                holder.insert(key, copy.deepcopy(holder[key]))
            case 2 if isinstance(holder, dict):
                holder[random.choice(["name", "", key + "s"])] = holder.pop(key)
            case _:
                holder[key] = copy.deepcopy(random.choice(VALUES))
    return "".join(f"{line}\n" for line in map(json.dumps, content)).encode()


def _places(content: object) -> list[tuple[Any, Any]]:
    """Lists the place of every value in JSON as (container, key)."""
    if not isinstance(content, dict | list):
        return []
    keys = list(content) if isinstance(content, dict) else range(len(content))
    return [place for key in keys for place in ((content, key), *_places(content[key]))]


def fuzz_bytes(name: str, count: int, seed: int, verbose: bool = False) -> Outcome:
    """Fuzzes a reader with its seeds and mutations of them."""
    from tests.fuzz.readers import READERS, case_of

    source, seeds, run = random.Random(f"{seed}, {name}"), READERS[name].seeds, Run(name, "mutation", verbose)
    for k in range(count):
        data = seeds[k] if k < len(seeds) else source.choice(seeds)
        if k >= len(seeds):
            changed = with_other_values(data, source) if data[:1] == b"{" and source.random() < 0.7 else None
            data = mutated(data, seeds, source) if changed is None else changed
        run(case_of(name, data))
    return run.outcome


def fuzz_by_coverage(name: str, count: int, seed: int) -> Outcome:
    """Fuzzes a reader with atheris, in a separate process."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "outcome.json"
        command = [sys.executable, "-m", "tests.fuzz.mutation", name, str(count), str(seed), str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if not out.exists():
            raise RuntimeError(f"atheris ended without a result on {name}:\n{done.stderr[-2000:]}")
        return Outcome(**json.loads(out.read_text()))


def main(arguments: list[str]) -> None:
    import atheris

    name, count, seed, out = arguments[0], int(arguments[1]), int(arguments[2]), Path(arguments[3])
    with atheris.instrument_imports(include=["bt_fast.lab", "benchmarks.compare"]):
        from tests.fuzz.readers import READERS, case_of, clean_up
    run = Run(name, "atheris")

    def test_one(data: bytes) -> None:
        if run.outcome.cases == count:
            return
        run(case_of(name, data))
        if run.outcome.cases == count:
            out.write_text(json.dumps(asdict(run.outcome)))
            clean_up()

    with tempfile.TemporaryDirectory() as corpus:
        for k, content in enumerate(READERS[name].seeds):
            (Path(corpus) / f"seed{k}").write_bytes(content)
        options = [f"-runs={count + 10}", f"-seed={seed + 1}", "-max_len=8192", "-rss_limit_mb=0", "-timeout=60"]
        atheris.Setup([sys.argv[0], *options, corpus], test_one)
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
