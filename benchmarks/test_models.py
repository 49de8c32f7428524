"""What each option of the engine gains on networks that people train, at 224 pixels with random weights.

Of torchvision and timm, which have to be installed. A network's view is held against it in float64 first, logits and
gradient of the images; then an attack of two steps is timed in float32, in interleaved rounds. In 16 bits it is timed
where the processor computes in them. To record, and to print the table of docs/benchmarks.md:

python -m pytest benchmarks/test_models.py --full -s --benchmark-json benchmarks/results/models.json
python -m benchmarks.models_table benchmarks/results/models.json
"""

from __future__ import annotations

import copy
import os
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import quick_and_full, report
from published import published

from benchmarks.work_ratio import median_ratio
from bt_fast import Engine, Plan, ThreatModel, generate
from bt_fast.attack.folded import FoldedModel, attack_model
from bt_fast.attack.forward import clean_logits, eval_mode
from bt_fast.attack.graph_cache import view_of
from bt_fast.attack.runners import input_gradient
from bt_fast.objectives.execution import folded_in_words

SIDE, STEPS, ROUNDS = 224, 2, 7
IMAGES = {"cpu": 2, "cuda": 32}
THREAT = ThreatModel(4 / 255)
NETWORKS = [
    "torchvision/resnet50",
    "torchvision/convnext_tiny",
    "torchvision/vit_b_16",
    "torchvision/swin_t",
    "timm/resnet50",
    "timm/convnext_tiny",
    "timm/vit_small_patch16_224",
    "timm/swin_tiny_patch4_window7_224",
    "timm/efficientnet_b0",
    "timm/resnetv2_50",
]
FOLD, LAST = Engine(fold=True), Engine(fold=True, channels_last=True)


def engines(device: torch.device) -> dict[str, Engine]:
    """By name, each option beside those before it, as far as the device has it."""
    chosen = {"exact": Engine(), "fold": FOLD, "fold, channels last": LAST}
    if device.type == "cuda":
        chosen["fold, channels last, graphs"] = Engine(fold=True, channels_last=True, graphs=True)
        chosen["fast"] = Engine.of("fast")
    if device.type == "cuda" or computes_in_16_bits():
        chosen["bf16"] = Engine.of("bf16")
    return chosen


def computes_in_16_bits() -> bool:
    """Whether the processor multiplies in bfloat16."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text(encoding="utf-8") if info.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def check_exactness(model: torch.nn.Module, device: torch.device) -> FoldedModel:
    """The view, once it is that of the model in float64: its logits, and the gradient of the images."""
    exact, x = copy.deepcopy(model).double(), torch.rand(1, 3, SIDE, SIDE, dtype=torch.float64, device=device)
    with attack_model(exact, view_of(LAST), x) as view:
        assert isinstance(view, FoldedModel)
        assert view.reason is None
        logits = clean_logits(exact, x)
        torch.testing.assert_close(clean_logits(view, x), logits, rtol=1e-9, atol=1e-9 * float(logits.abs().max()))
        target = torch.eye(logits.shape[1], dtype=torch.float64, device=device)[:1]
        result, expected = (input_gradient(m, x, target) for m in (view, exact))
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-8 * float(expected.abs().max()))
    return view


@pytest.mark.parametrize("name", quick_and_full(["timm/vit_small_patch16_224"], NETWORKS))
def test_engine_options(name: str, interleaved: Any, benchmark: Any, device: torch.device) -> None:
    model = published(name).to(device)
    view = check_exactness(model, device)
    x = torch.rand(IMAGES[device.type], 3, SIDE, SIDE, device=device)
    with eval_mode(model):
        target = clean_logits(model, x).softmax(dim=1)
    plan = Plan.uniform(len(x), STEPS, 1 / 255, device)
    start = x + 0.001 * torch.randn_like(x)
    variants = {
        option: lambda engine=engine: generate(model, x, start, target, plan, THREAT, engine=engine)
        for option, engine in engines(device).items()
    }
    for work in variants.values():  # traced, and measured for streams
        work()
    load = os.getloadavg()[0]
    seconds = interleaved(variants, lambda _: None, ROUNDS)
    info: dict[str, Any] = {"view": folded_in_words(view), "images": len(x), "load before": round(load, 2)}
    info |= {f"{option}: ms": round(1e3 * statistics.median(times), 1) for option, times in seconds.items()}
    info |= {f"{o}: gain": round(median_ratio(seconds["exact"], t), 3) for o, t in seconds.items() if o != "exact"}
    report(benchmark, f"{name}, {len(x)} images of {SIDE} pixels, {STEPS} steps", info)
