"""Measures the cost of keeping the folded view of a model up to date, and the effect of its rounding on the attack.

python -m pytest benchmarks/test_folded_view.py --full -s --benchmark-json benchmarks/results/folded-view.json
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import quick_and_full, report
from test_training_iteration import CASES, Workload, count_flops
from torch.profiler import profile

from benchmarks.work_ratio import work_ratio
from bt_fast import BulletTrain, Frozen, Plan, ThreatModel, generate, trades_loss
from bt_fast.attack.auto import now
from bt_fast.attack.folded import attack_model
from bt_fast.attack.forward import clean_logits, eval_mode
from bt_fast.attack.runners import input_gradient
from bt_fast.lab.data import images, load_dataset, minibatches
from bt_fast.lab.models import build_model
from bt_fast.lab.report import machine

MOST_SHARE = 0.01  # of an iteration, for the refresh
EPSILON, STEP_SIZE, STEPS = 0.2, 0.04, 10
KINDS = {
    "convolutions and products": ("convolution", "mm", "linear", "conv"),
    "norms": ("batch_norm",),
    "activations and sums": ("threshold", "clamp", "relu", "add", "max_pool"),
    "copies": ("copy", "clone", "contiguous"),
}
VIEWS = {
    "as it is": None,
    "folded": Frozen(),
    "bf16": Frozen(autocast=torch.bfloat16),
    "fp16": Frozen(autocast=torch.float16),
}


@pytest.mark.parametrize("name", quick_and_full(["small-cnn"], ["small-cnn", "wrn-16-2"]))
def test_the_refresh_is_a_small_share_of_an_iteration(
    name: str, interleaved: Any, benchmark: Any, device: torch.device
) -> None:
    workload = Workload(CASES[name], device)
    with attack_model(workload.model, Frozen(), workload.x[:8]) as view:
        work = {"refresh": view.refresh, "iteration": workload.variants()["bullet, bf16"]}
        seconds = interleaved(work, lambda _: workload.prepare(), rounds=CASES[name].rounds)
    share = work_ratio(("refresh", "iteration"), work, lambda _: workload.prepare(), seconds, device)
    info = {f"{variant}: ms": round(1e3 * statistics.median(times), 3) for variant, times in seconds.items()}
    report(benchmark, f"refresh, {name}, batch {CASES[name].batch}", info | {"share": f"{100 * share:.2f} %"})
    if benchmark.enabled:
        assert share <= MOST_SHARE


@pytest.mark.parametrize("view", ["folded", "bf16"])
@pytest.mark.parametrize("name", quick_and_full(["small-cnn"], ["small-cnn", "wrn-16-2"]))
def test_where_a_step_of_the_attack_goes(name: str, view: str, benchmark: Any, device: torch.device) -> None:
    """Reports shares of a step's time, and the rate of its convolutions relative to a large matrix product."""
    workload = Workload(CASES[name], device)
    x, dtype = workload.x, torch.bfloat16 if view == "bf16" else torch.float32
    target = torch.rand(len(x), 10, device=device).softmax(dim=1)
    with attack_model(workload.model, VIEWS[view], x[:8]) as model:
        for _ in range(3):
            input_gradient(model, x, target)
        flops = count_flops(lambda: input_gradient(model, x, target))
        with profile() as profiled:
            input_gradient(model, x, target)
    spent: dict[str, float] = {}
    for row in profiled.key_averages():
        kind = next((kind for kind, names in KINDS.items() if any(n in row.key for n in names)), "other")
        spent[kind] = spent.get(kind, 0.0) + (row.self_device_time_total if x.is_cuda else row.self_cpu_time_total)
    total = sum(spent.values())
    rate = flops / spent["convolutions and products"] / 1e3
    matrix = torch.rand(2048, 2048, device=device, dtype=dtype)
    matrix @ matrix
    start = now(matrix)
    matrix @ matrix
    peak = 2 * 2048**3 / (now(matrix) - start) / 1e9
    info = {kind: f"{100 * us / total:.1f} %" for kind, us in sorted(spent.items(), key=lambda i: -i[1])}
    info["rate"] = f"{rate:.0f} GFLOP/s in convolutions and products; a 2048 x 2048 product runs at {peak:.0f}"
    benchmark.pedantic(lambda: None)
    benchmark.extra_info.update(machine(device))
    report(benchmark, f"a step of {name}, {view}, batch {len(x)}", info)


def trained_on_digits(device: torch.device, iterations: int) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """Trains a small CNN by some TRADES with BulletTrain; returns it with test images and their labels."""
    data = load_dataset("digits")
    torch.manual_seed(0)
    model = build_model("small-cnn", in_channels=1, image_size=28, num_classes=10, width=16).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    bullet = BulletTrain().to(device)
    for _, batch in zip(range(iterations), _endless(len(data.x_train)), strict=False):
        x, y = images(data.x_train[batch], device), data.y_train[batch].to(device)
        trades_loss(model, x, y, optimizer, STEP_SIZE, EPSILON, beta=6.0, bullet=bullet).backward()
        optimizer.step()
    return model, images(data.x_test[:500], device), data.y_test[:500].to(device)


def _endless(n: int) -> Any:
    epoch = 0
    while True:
        yield from minibatches(n, 50, seed=0, epoch=epoch)
        epoch += 1


def attacked(model: torch.nn.Module, x: torch.Tensor, recipe: Frozen | None) -> torch.Tensor:
    plan = Plan.uniform(len(x), STEPS, STEP_SIZE, x.device)
    start = x + 0.001 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    with attack_model(model, recipe, x[:8]) as view:
        target = clean_logits(view, x).to(x.dtype).softmax(dim=1)
        return generate(view, x, start, target, plan, ThreatModel(EPSILON))


@pytest.mark.full
@pytest.mark.parametrize("iterations", [300])
def test_what_rounding_does_to_the_attack(iterations: int, benchmark: Any, device: torch.device) -> None:
    model, x, y = trained_on_digits(device, iterations if benchmark.enabled else 5)
    exact = copy.deepcopy(model).double()
    with eval_mode(exact):
        target = clean_logits(exact, x.double()).softmax(dim=1)

    def reached(x_adv: torch.Tensor) -> tuple[float, float]:
        """Returns the inner loss and the robust accuracy, both in float64."""
        with eval_mode(exact):
            logits = clean_logits(exact, x_adv.double())
        kl = F.kl_div(logits.log_softmax(dim=1), target, reduction="batchmean")
        return float(kl), float((logits.argmax(dim=1) == y).double().mean())

    result: dict[str, Callable[[], torch.Tensor]] = {
        "float64": lambda: attacked(exact, x.double(), None),
        **{name: lambda view=view: attacked(model, x, view) for name, view in VIEWS.items()},
    }
    yardstick, info = None, {}
    for name, attack in result.items():
        x_adv = attack().double()
        yardstick = x_adv if yardstick is None else yardstick
        differing = ((x_adv - yardstick).abs() > STEP_SIZE / 2).double().mean()
        kl, robust = reached(x_adv)
        info[name] = f"{100 * differing:.2f} % of pixels elsewhere, KL {kl:.5f}, robust {100 * robust:.1f} %"
    benchmark.pedantic(lambda: None)
    benchmark.extra_info.update(machine(device))
    report(benchmark, f"x' after {STEPS} steps, small-cnn after {iterations} iterations, {len(x)} test digits", info)
