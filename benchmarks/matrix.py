"""Enters the result of a whole run of the tests in the table of environments; `noxfile.py` calls it.

python -m benchmarks.matrix NAME RESULTS.xml   # of pytest's --junit-xml, in the environment in which they ran
"""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bt_fast.lab.files import parse_json, write_text

FOLDER = Path(__file__).parent / "results"
VERSIONS = ("torch", "triton", "numpy")
HEAD = """# The whole test suite, environment by environment

Made by `nox`, which says what each environment is made of (`noxfile.py`). A skipped test's reason is listed below.

| environment | Python | torch | triton | numpy | passed | failed | skipped | minutes | date | commit |
| --- | --- | --- | --- | --- | ---: | ---: | ---: | ---: | --- | --- |
"""


def outcome(results: Path) -> dict[str, Any]:
    """Returns what pytest's XML holds: counts, minutes, the failed tests, and the number of each reason to skip."""
    suite = ElementTree.parse(results).getroot().find("testsuite")
    if suite is None:
        raise ValueError(f"{results}: no results of pytest, expected what --junit-xml writes")
    cases = list(suite.iter("testcase"))
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [result for c in cases if (result := c.find("skipped")) is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": len(failed),
        "skipped": len(skipped),
        "minutes": round(float(suite.get("time", "nan")) / 60, 1),
        "failures": sorted(f"{c.get('classname')}::{c.get('name')}" for c in failed),
        "reasons": dict(Counter(s.get("message", "").partition("\n")[0] for s in skipped).most_common()),
    }


def described(results: Path) -> dict[str, Any]:
    """Returns a row of the table: where the tests ran, and their outcome."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in VERSIONS},
        "date": datetime.date.today().isoformat(),
        "commit": revision(),
        **outcome(results),
    }


def revision() -> str:
    """Returns the tested commit, with `-dirty` appended if files other than results were changed."""
    if not (FOLDER.parents[1] / ".git").exists():
        return "unknown"
    result = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return f"{result}-dirty" if changed else result


def git(*command: str) -> str:
    """Returns git's output for this repository."""
    result = subprocess.run(["git", *command], cwd=FOLDER.parents[1], capture_output=True, text=True, check=True)
    return result.stdout.strip()


def page(rows: dict[str, dict[str, Any]]) -> str:
    """Returns the table, the failed tests, and the reasons for skipped ones."""
    columns = ("python", *VERSIONS, "passed", "failed", "skipped", "minutes", "date", "commit")
    lines = [f"| {name} | {' | '.join(str(row[c]) for c in columns)} |" for name, row in rows.items()]
    for name, row in rows.items():
        lines += ["", f"## {name}", ""]
        lines += [f"- failed: `{test}`" for test in row["failures"]]
        lines += [f"- {count} skipped: {reason}" for reason, count in row["reasons"].items()]
    return HEAD + "\n".join(lines) + "\n"


def main(name: str, results: Path) -> None:
    """Replaces the environment's row."""
    stored = FOLDER / "matrix.json"
    rows = parse_json(stored.read_text(encoding="utf-8")) if stored.exists() else {}
    rows[name] = described(results)
    write_text(stored, json.dumps(rows, indent=1) + "\n")
    write_text(FOLDER / "matrix.md", page(rows))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
