"""The table of docs/benchmarks.md of the results of test_models.py: python -m benchmarks.models_table FILE.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def table(results: dict[str, Any]) -> str:
    """The result file as a table."""
    runs = {run["param"]: run["extra_info"] for run in results["benchmarks"]}
    options = [key.removesuffix(": gain") for info in runs.values() for key in info if key.endswith(": gain")]
    options = list(dict.fromkeys(options))
    lines = [
        f"| network | folded | exact, ms | {' | '.join(options)} |",
        f"| --- | --- | ---: |{' ---: |' * len(options)}",
    ]
    for name, info in runs.items():
        gains = [f"{info[f'{o}: gain']:.2f}×" if f"{o}: gain" in info else "" for o in options]
        lines.append(
            f"| {name} | {info['view'].removeprefix('yes, ')} | {info['exact: ms']:.0f} | {' | '.join(gains)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
