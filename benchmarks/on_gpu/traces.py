"""Reads from a trace of torch's profiler how long a GPU was busy, and on how many streams at once."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from bt_fast.device import synchronize

WORK = ("kernel", "gpu_memcpy", "gpu_memset")
PERSONAL = ("host_name", "traceName")  # these identify a machine's owner

Event = dict[str, Any]


def traced(parts: dict[str, Callable[[], object]], device: torch.device, *, host: bool) -> dict[str, Any]:
    """Returns a chrome trace of some pieces of work, each in a range of its name that ends when the device is done.

    Args:
        host: also traces the host's operations, which slows the host.
    """
    activities = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    if host or not activities:
        activities.append(ProfilerActivity.CPU)
    with torch.profiler.profile(activities=activities) as profiled:
        for name, work in parts.items():
            with record_function(name):
                work()
                synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        trace: dict[str, Any] = json.loads(path.read_text())
    for name in PERSONAL:
        trace.pop(name, None)
    return trace


def work_of(trace: dict[str, Any], name: str | None = None) -> list[Event]:
    """Returns the GPU's work in a trace; with a name, only the work that began within the range of that name."""
    events: list[Event] = trace["traceEvents"]
    result = [e for e in events if e.get("cat") in WORK and e.get("ph") == "X"]
    if name is None:
        return result
    begin, end = range_of(trace, name)
    return [e for e in result if begin <= e["ts"] < end]


def range_of(trace: dict[str, Any], name: str) -> tuple[float, float]:
    """Returns begin and end of the host's range of that name, in microseconds.

    Raises:
        ValueError: there is no such range.
    """
    for e in trace["traceEvents"]:
        if e.get("cat") == "user_annotation" and e.get("ph") == "X" and e["name"] == name:
            return float(e["ts"]), float(e["ts"] + e["dur"])
    raise ValueError(f"the trace holds no range {name!r}")


def busy(events: Iterable[Event]) -> dict[str, float]:
    """Returns seconds with work on at least one stream (`busy`) or two (`overlapping`), and of all work (`work`)."""
    edges = []
    for e in events:
        stream = e.get("args", {}).get("stream", e.get("tid"))
        edges += [(float(e["ts"]), 1, stream), (float(e["ts"] + e["dur"]), -1, stream)]
    edges.sort(key=lambda edge: (edge[0], edge[1]))  # at the same time, ends come first
    open_: dict[Any, int] = {}
    result = {"busy": 0.0, "overlapping": 0.0, "work": 0.0}
    before = 0.0
    for time, change, stream in edges:
        streams = sum(count > 0 for count in open_.values())
        result["busy"] += (time - before) * (streams >= 1)
        result["overlapping"] += (time - before) * (streams >= 2)
        result["work"] += (time - before) * sum(open_.values())
        open_[stream] = open_.get(stream, 0) + change
        before = time
    return {name: microseconds / 1e6 for name, microseconds in result.items()}
