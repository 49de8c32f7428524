"""Figures from the stages' records, with the standard library alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Records = Sequence[Mapping[str, Any]]
BASELINES = ("reference", "optimised")


def cases_of(records: Records) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns by case and variant: median seconds and host seconds, and for each baseline the median of the pairwise
    ratios (`over NAME`), the ratio of FLOPs (`limit over NAME`) and the reached share of it (`of limit over NAME`).
    """
    result: dict[str, dict[str, dict[str, Any]]] = {}
    rounds: dict[str, list[Mapping[str, Any]]] = {}
    for record in of_kind(records, "round"):
        rounds.setdefault(record["case"], []).append(record)
    flops = {(r["model"], r["method"]): r["flops"] for r in of_kind(records, "flops")}
    for case, taken in rounds.items():
        model, rows = case.split("/")[0], {}
        for name in taken[0]["seconds"]:
            times = [r["seconds"][name] for r in taken]
            row: dict[str, Any] = {
                "rounds": len(times),
                "seconds": statistics.median(times),
                "fastest": min(times),
                "host": statistics.median(r["host"][name] for r in taken),
                "flops": flops.get((model, method_of(name))),
            }
            for base in BASELINES:
                if base in taken[0]["seconds"]:
                    row[f"over {base}"] = statistics.median(r["seconds"][base] / r["seconds"][name] for r in taken)
                    slow, fast = flops.get((model, base)), row["flops"]
                    if slow and fast:
                        row[f"limit over {base}"] = slow / fast
                        row[f"of limit over {base}"] = row[f"over {base}"] / (slow / fast)
            rows[name] = row
        result[case] = rows
    for kind in ("memory", "busy", "joules"):
        for record in of_kind(records, kind):
            row = result.get(record["case"], {}).get(record["variant"], {})
            row |= {k: v for k, v in record.items() if k not in ("kind", "case", "variant")}
    return result


def of_kind(records: Iterable[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    """Returns the records of a kind."""
    return [r for r in records if r["kind"] == kind]


def method_of(variant: str) -> str:
    """Returns the method in a variant's name."""
    return variant.partition(",")[0]


def best(rows: Mapping[str, Mapping[str, Any]], method: str) -> str | None:
    """Returns the fastest variant of a method."""
    names = [name for name in rows if method_of(name) == method]
    return min(names, key=lambda name: rows[name]["seconds"], default=None)


def headline(case: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Describes a case in a line: BulletTrain's fastest variant over the authors' and ours."""
    name = best(rows, "bullet")
    if name is None:
        return f"{case.replace('/', ' ')}: BulletTrain was not measured"
    row = rows[name]
    ratios = []
    for base, label in zip(BASELINES, ("the authors'", "ours"), strict=True):
        if f"over {base}" in row:
            share = row.get(f"of limit over {base}")
            limit = "" if share is None else f" ({share:.2f} of the FLOP limit)"
            ratios.append(f"{row[f'over {base}']:.2f}x over {label}{limit}")
    return f"{case.replace('/', ' ')}: {name} {1e3 * row['seconds']:.1f} ms, {', '.join(ratios) or 'no baseline'}"


def idle(row: Mapping[str, Any]) -> float | None:
    """Returns the share of an iteration in which the GPU is idle: work as traced, time as measured without tracing."""
    if not row.get("launches"):
        return None
    return max(0.0, 1.0 - float(row["busy"]) / float(row["seconds"]))
