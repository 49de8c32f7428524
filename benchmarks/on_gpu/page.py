"""Makes the page: a line for each stage, then its tables, from results.json and with the standard library alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.on_gpu.figures import BASELINES, Records, cases_of, idle, method_of, of_kind

REHEARSAL = "REHEARSAL on a CPU, with tiny sizes and emulated streams: nothing here was measured on a GPU"
LABELS = {"reference": "TRADES, authors'", "optimised": "TRADES, ours", "bullet": "BulletTrain"}
MOST_FAILURES = 20


def verdict_line(state: Mapping[str, Any]) -> str:
    """Returns the line of a stage."""
    verdict = f"{state['letter']}  {state['title']}: {state['verdict'].upper()} ({state['seconds']:.0f} s)"
    return f"{verdict}: {state['message']}" if state["message"] else verdict


def page(content: Mapping[str, Any]) -> str:
    """Returns the page in Markdown."""
    rehearsal, stages = content["rehearsal"], content["stages"]
    lines = [f"# {REHEARSAL if rehearsal else 'On a GPU'}", "", *about(content), ""]
    lines += [f"- {verdict_line(state)}" for state in stages.values()]
    for name, of_stage in TABLES.items():
        if name not in stages:
            continue
        try:
            reported = of_stage(stages[name]["records"], stages)
        except Exception as error:  # the remaining stages matter more than a table
            reported = [f"No table: {type(error).__name__}: {error}. The records are in results.json."]
        if reported:
            lines += [
                "",
                f"## {headed(stages[name]['title'])}",
                "",
                *(without_figures(reported) if rehearsal else reported),
            ]
    return "\n".join(lines) + "\n"


def headed(title: str) -> str:
    """Returns a title as a heading."""
    return title[0].upper() + title[1:]


def about(content: Mapping[str, Any]) -> list[str]:
    """Describes the machine, and when and how long it was used."""
    machine, done = content["machine"] or {}, "to the end" if content["finished"] else "not to the end"
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("packages", {}).items() if version)
    result = [
        f"{content['began']}, {content['minutes']:g} minutes asked for, {content.get('seconds', 0):.0f} s used, {done}"
        f"{'; ' + content['stopped'] if content['stopped'] else ''}. Sources {content['source_sha256'][:12]}."
    ]
    if machine.get("device"):
        result.append(
            f"{machine['device']}, compute capability {machine['capability']}, {machine['sms']} SMs, "
            f"{machine['memory_bytes'] / 2**30:.0f} GiB, driver and clocks: {machine.get('nvidia_smi') or 'not known'}."
        )
    if machine.get("unfit"):
        result.append(f"Nothing could run: {machine['unfit']}.")
    return [*result, f"{versions}; {machine.get('cores')} cores."]


def without_figures(lines: Sequence[str]) -> list[str]:
    """Replaces each figure by a dot: all cells of a table except its first column and its headings."""
    result = []
    for number, line in enumerate(lines):
        cells = line.split("|")
        below = line.startswith("|") and number and not set(line) <= set("|-: ") and lines[number - 1].startswith("|")
        result.append("|".join([*cells[:2], *(" · " for _ in cells[2:-1]), cells[-1]]) if below else line)
    return result


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns a table in Markdown; nothing without rows."""
    if not rows:
        return []
    line = "| --- |" + " ---: |" * (len(head) - 1)
    return [f"| {' | '.join(head)} |", line, *(f"| {' | '.join(row)} |" for row in rows)]


def formatted(form: str, value: float | None) -> str:
    """Formats the value, or returns a dash."""
    return "–" if value is None else form.format(value)


# The stages


def examination(records: Records, _: Any) -> list[str]:
    """Lists the doctor's findings that are not fine."""
    wrong = [f for r in of_kind(records, "doctor") for f in r["findings"] if f["status"] == "FAILED"]
    return [f"- {f['section']}: {f['name']}: {f['text']}" for f in wrong]


def tests(records: Records, _: Any) -> list[str]:
    """Lists the failed tests and their messages."""
    why = {r["id"]: r["message"] for r in of_kind(records, "failure")}  # first without, later with the reason
    result = [
        f"- `{test}`: {message or 'the time was up before the reason was known'}" for test, message in why.items()
    ]
    for r in of_kind(records, "test"):
        if r["outcome"] != "passed":
            lines = [line.strip() for line in r["message"].splitlines() if line.strip()]
            message = next((line for line in lines if line.startswith("E ")), lines[-1] if lines else "")
            result.append(f"- `{r['id']}`: {r['outcome']} after {r['seconds']:.0f} s: {message}")
    more = [f"- and {len(result) - MOST_FAILURES} more"] if len(result) > MOST_FAILURES else []
    return result[:MOST_FAILURES] + more


def iterations(records: Records, _: Any) -> list[str]:
    """Returns a table for each case."""
    lines: list[str] = []
    batch = {r["case"]: r["batch"] for r in of_kind(records, "case")}
    for case, rows in cases_of(records).items():
        head = ["", "ms", "over authors'", "over ours", "GFLOP", "host ms", "GPU idle", "J", "peak GiB"]
        body = []
        for name, row in rows.items():
            cells = [label(name), f"{1e3 * row['seconds']:.1f}"]
            for base in BASELINES:
                share = row.get(f"of limit over {base}")
                cells.append(
                    formatted("{:.2f}×", row.get(f"over {base}")) + formatted(" ({:.2f})", share).replace("–", "")
                )
            peak = row.get("peak")
            cells += [
                formatted("{:.0f}", None if row["flops"] is None else row["flops"] / 1e9),
                f"{1e3 * row['host']:.1f}",
            ]
            cells += [formatted("{:.0%}", idle(row)), formatted("{:.1f}", row.get("joules"))]
            body.append([*cells, formatted("{:.2f}", None if peak is None else peak / 2**30)])
        number = min(row["rounds"] for row in rows.values())
        message = f"{case.replace('/', ', ')}, batch {batch.get(case)}, {number} rounds"
        lines += [f"{message}; in brackets the share of the FLOP limit.", ""]
        lines += [*table(head, body), ""]
    lines += groups(records)
    exact = of_kind(records, "exact")
    if exact:
        largest = max(r["difference"] for r in exact)
        lines.append(f"Exact in float64 up to {largest:.1g} (relative): {len(exact)} variants.")
    for r in [*of_kind(records, "left_out"), *of_kind(records, "broke"), *of_kind(records, "ended")]:
        lines.append(f"- {r['case']}: {r.get('variant') or 'the case'}: {r['message']}")
    late = [f"{r['case']}: {r['variant']}" for r in of_kind(records, "no_time")]
    if late:
        lines.append(f"- no time was left for {'; '.join(late)}")
    for reason in dict.fromkeys(r["reason"] for r in of_kind(records, "joules") if r.get("reason")):
        lines.append(f"- joules: {reason}")
    return lines


def groups(records: Records) -> list[str]:
    """Lists the sizes of BulletTrain's groups in each case, by variant if a view's rounding has moved a sample."""
    result: dict[str, dict[str, list[str]]] = {}
    for r in of_kind(records, "groups"):
        sizes = " / ".join(f"{size:g}" for size in r["sizes"])
        result.setdefault(r["case"], {}).setdefault(sizes, []).append(label(r["variant"]))
    lines = []
    for case, by_sizes in result.items():
        groups_of = [
            sizes + (f" ({'; '.join(names)})" if len(by_sizes) > 1 else "") for sizes, names in by_sizes.items()
        ]
        lines.append(f"- {case}: outliers / boundary / robust samples: {', '.join(groups_of)}")
    return lines


def label(variant: str) -> str:
    """Returns a variant's name for readers."""
    method = method_of(variant)
    return LABELS[method] + variant.removeprefix(method)


def bandwidth(records: Records, _: Any) -> list[str]:
    """Compares the kernels with copies of the same bytes."""
    lines = [
        f"A copy of 1 GiB: {r['bytes_per_second'] / 1e12:.2f} TB/s, read and written." for r in of_kind(records, "copy")
    ]
    rates = [f"{r['precision']} {r['flops_per_second'] / 1e12:.0f} TFLOP/s" for r in of_kind(records, "product")]
    lines += [f"A product of 8192 × 8192 matrices: {', '.join(rates)}.", ""] if rates else []
    head = ["kernel, images, dtype", "MB", "cold us", "cold TB/s", "of a copy", "warm us", "warm TB/s", "of a copy"]
    body = []
    for r in of_kind(records, "kernel"):
        cells = [f"{r['name']}, {r['m']}, {r['dtype']}", f"{r['bytes'] / 1e6:.1f}"]
        for how in ("cold", "warm"):
            seconds = r[f"{how}_seconds"]
            cells += [f"{1e6 * seconds:.1f}", f"{r['bytes'] / seconds / 1e12:.2f}"]
            cells.append(f"{r[f'copy_{how}_seconds'] / seconds:.2f}")
        body.append(cells)
    return lines + table(head, body)


def captures(records: Records, _: Any) -> list[str]:
    """Tabulates the costs and the memory of captures."""
    eager = {r["model"]: r["seconds"] for r in of_kind(records, "eager")}
    head = [
        "captured",
        "captures",
        "seconds",
        "held MiB",
        "on the card MiB",
        "replayed ms",
        "eager ms",
        "paid back after",
    ]
    body = []
    for r in of_kind(records, "capture"):
        lost = sum(r["first_seconds"]) - len(r["first_seconds"]) * r["replayed_seconds"]
        gain = eager[r["model"]] - r["replayed_seconds"]
        after = f"{max(0.0, lost) / gain:.0f} iterations" if gain > 0 and r["variant"].startswith("bullet") else "–"
        body.append(
            [
                f"{r['model']}, {label(r['variant'])}",
                str(r["captures"]),
                f"{r['capture_seconds']:.2f}",
                f"{r['held_bytes'] / 2**20:.0f}",
                f"{r['driver_bytes'] / 2**20:.0f}",
                f"{1e3 * r['replayed_seconds']:.1f}",
                f"{1e3 * eager[r['model']]:.1f}" if r["variant"].startswith("bullet") else "–",
                after,
            ]
        )
    return table(head, body)


def prediction(records: Records, stages: Mapping[str, Any]) -> list[str]:
    """Compares predicted with measured times."""
    measured = cases_of(stages["iterations"]["records"]) if "iterations" in stages else {}
    head, body = ["", "PREDICTED ms", "measured ms", "off by", "PREDICTED busy", "measured busy"], []
    for r in of_kind(records, "predicted"):
        for name, seconds in r["seconds"].items():
            row = measured.get(r["case"], {}).get(name)
            busy = None if row is None or idle(row) is None else 1 - (idle(row) or 0.0)
            cells = [f"{r['case'].replace('/', ', ')}, {label(name)}", f"{1e3 * seconds:.1f}"]
            cells += [formatted("{:.1f}", None if row is None else 1e3 * row["seconds"])]
            cells += [formatted("{:+.0%}", None if row is None else seconds / row["seconds"] - 1)]
            body.append([*cells, formatted("{:.0%}", r["busy"][name]), formatted("{:.0%}", busy)])
    return table(head, body)


def overlap(records: Records, _: Any) -> list[str]:
    """Reports how long one and two streams worked."""
    head = ["traced (the profiler slows the host)", "launches", "streams", "busy ms", "two at a time ms", "share"]
    body = []
    for r in of_kind(records, "overlap"):
        share = r["overlapping"] / r["busy"] if r["busy"] else None
        numbers = [str(r["launches"]), str(r["streams"]), f"{1e3 * r['busy']:.1f}", f"{1e3 * r['overlapping']:.1f}"]
        body.append([f"{r['model']}, {label(r['variant'])}", *numbers, formatted("{:.0%}", share)])
    return table(head, body)


def training(records: Records, _: Any) -> list[str]:
    """Tabulates accuracy against the time of each method's own steps."""
    head, body = ["", "iterations", "epochs", "s", "clean", "robust"], []
    for r in sorted(of_kind(records, "accuracy"), key=lambda r: bool(r["method"] != "TRADES")):
        numbers = [str(r["iteration"]), f"{r['epochs']:.2f}", f"{r['seconds']:.1f}"]
        body.append([r["method"], *numbers, f"{r['clean']:.1%}", f"{r['robust']:.1%}"])
    return table(head, body)


TABLES: dict[str, Callable[[Records, Mapping[str, Any]], list[str]]] = {
    "examination": examination,
    "kernel_tests": tests,
    "engine_tests": tests,
    "iterations": iterations,
    "bandwidth": bandwidth,
    "captures": captures,
    "prediction": prediction,
    "overlap": overlap,
    "training": training,
}
