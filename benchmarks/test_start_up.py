"""Measures start-up: what importing bt_fast adds to importing torch, in fresh interpreters, and first calls.

pytest benchmarks/test_start_up.py --full -s --benchmark-json benchmarks/results/start-up.json
"""

from __future__ import annotations

import functools
import statistics
import subprocess
import sys
from typing import Any

import torch
from conftest import report

IMPORTS = {"torch": "import torch", "bt_fast": "import bt_fast", "bt_fast.lab": "import bt_fast.lab.cli"}
FIRST_CALLS = """
import sys, time
import torch
from bt_fast import BulletTrain, trades_loss
from bt_fast.device import synchronize
from bt_fast.lab.models import build_model

device = torch.device(sys.argv[1])
model = build_model("small-cnn", in_channels=1, image_size=28, num_classes=10).to(device)
x, y = torch.rand(128, 1, 28, 28, device=device), torch.randint(10, (128,), device=device)
bullet = BulletTrain().to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
model(x).sum().backward()  # torch's own first calls are not ours
for _ in range(4):
    synchronize(device)
    start = time.perf_counter()
    trades_loss(model, x, y, optimizer, 0.007, 0.031, bullet=bullet).backward()
    synchronize(device)
    print(time.perf_counter() - start)
"""


def fresh(code: str, *arguments: str) -> str:
    """Runs the code in a new interpreter and returns its output."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def test_import(interleaved: Any, benchmark: Any) -> None:
    work = {"nothing": functools.partial(fresh, "")}
    work |= {name: functools.partial(fresh, code) for name, code in IMPORTS.items()}
    seconds = interleaved(work, lambda _: None, rounds=10)
    info: dict[str, Any] = {f"{name}: s": round(statistics.median(times), 3) for name, times in seconds.items()}
    for name in ("bt_fast", "bt_fast.lab"):
        beyond = [a - b for a, b in zip(seconds[name], seconds["torch"], strict=True)]
        info[f"{name} beyond torch: s"] = round(statistics.median(beyond), 3)
    report(benchmark, "import", info)


def test_first_calls(interleaved: Any, benchmark: Any, device: torch.device) -> None:
    """Times how much longer a process's first iteration takes: on a GPU, kernels are compiled or loaded."""
    reported: list[list[float]] = []
    work = {"process": lambda: reported.append([float(line) for line in fresh(FIRST_CALLS, str(device)).split()])}
    interleaved(work, lambda _: None, rounds=5)
    first, later = (statistics.median(f(times) for times in reported) for f in (lambda t: t[0], min))
    info = {"first iteration: s": round(first, 3), "later iteration: s": round(later, 3)}
    report(benchmark, "first calls", info | {"first beyond later: s": round(first - later, 3)})
