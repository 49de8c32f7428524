"""Compares every op's launches and bytes with eager torch, and on CUDA its time with the memory's speed.

Counted for batches of 128 images of CIFAR-10's shape and 10 classes, on tensors without values. Eager torch is the
usual code (the authors' losses with their backward; without the kernels' guards against NaN). Each of its operations
counts as one launch, which is the minimum (a sort is several), and moves its arguments and results once. A fused kernel
moves what its compiled code loads and stores when the tests execute it; on a device there are also a launch for the sum
of a loss's rows, one for the offset of the random numbers, and one for each gradient that backward scales. To record:

pytest benchmarks/test_kernels.py --benchmark-json benchmarks/results/kernels.json
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from launches import Traffic, traffic

from bt_fast.device import synchronize
from bt_fast.lab.report import machine
from bt_fast.ops import divergence
from bt_fast.ops.ascent_direction import launch_ascent_direction
from bt_fast.ops.assign_steps import assign_reference, launch_assign
from bt_fast.ops.pgd_l2_step import launch_l2
from bt_fast.ops.pgd_step import launch_linf
from bt_fast.ops.signed_variance import launch_signed_variance
from bt_fast.ops.update_fraction import launch_update_fraction

start = importlib.import_module("bt_fast.ops.gather_start")  # the op of this name hides the file

M, SHAPE, CLASSES = 128, (3, 32, 32), 10
PIXELS, LOGITS = 4 * M * 3 * 32 * 32, 4 * M * CLASSES  # bytes


@dataclass(frozen=True)
class Op:
    """One op, in eager torch and as its launch.

    Attributes:
        arguments: makes the arguments.
        moved: bytes that the kernels move; compared with images and logits, tensors of [m] are left out, as in `least`.
        least: bytes that have to be moved.
    """

    eager: Callable[..., object]
    fused: Callable[..., object]
    arguments: Callable[[], tuple[Any, ...]]
    moved: int
    least: int


def images(*, like_gradient: bool = False) -> torch.Tensor:
    return torch.randn(M, *SHAPE) * 1e-3 if like_gradient else torch.rand(M, *SHAPE)


def logits() -> torch.Tensor:
    return torch.randn(M, CLASSES)


def labels() -> torch.Tensor:
    return torch.randint(CLASSES, (M,))


def step() -> tuple[Any, ...]:
    clean, faulty = images(), torch.zeros(M, dtype=torch.int32)
    steps, t = torch.full((M,), 10), torch.tensor(0)
    return clean.clone(), images(like_gradient=True), clean, torch.full((M,), 0.007), 0.031, 0.0, 1.0, steps, t, faulty


def linf() -> tuple[Any, ...]:
    *first, steps, t, faulty = step()
    return (*first, steps, t, faulty)


def l2() -> tuple[Any, ...]:
    *first, steps, t, faulty = step()
    return (*first, torch.tensor(7), steps, t, faulty)


def assignment() -> tuple[Any, ...]:
    svar, correct = torch.rand(M) * 0.09, torch.rand(M) < 0.8
    fraction = torch.tensor(0.54, dtype=torch.float64)
    unfit, faults = torch.zeros(M, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)
    return svar, correct, fraction, (0, 10, 2), (0.0, 0.007, 0.026), unfit, faults, torch.zeros(3, dtype=torch.int64)


# The usual code in eager torch


def eager_variance(z: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    p = z.softmax(dim=1)
    correct, variance = z.argmax(dim=1) == y, p.var(dim=1, unbiased=False)
    return torch.where(correct, variance, -variance), correct, p


def eager_start(
    x: torch.Tensor, order: torch.Tensor, steps: torch.Tensor, state: torch.Tensor, noise: str, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    noisy = x + scale * torch.randn_like(x)
    return x[order], torch.where((steps > 0).view(-1, 1, 1, 1), noisy, x)[order]


def eager_linf(x_adv: Any, grad: Any, clean: Any, size: Any, epsilon: float, low: float, high: float, *_: Any) -> None:
    moved = x_adv + size.view(-1, 1, 1, 1) * grad.sign()
    moved = torch.min(torch.max(moved, clean - epsilon), clean + epsilon).clamp(low, high)
    x_adv.copy_(moved)


def eager_l2(x_adv: Any, grad: Any, clean: Any, size: Any, epsilon: float, low: float, high: float, *_: Any) -> None:
    norm = grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    direction = torch.where(norm == 0, torch.randn_like(grad), grad / norm)
    delta = (x_adv + size.view(-1, 1, 1, 1) * direction).clamp(low, high) - clean
    x_adv.copy_((clean + delta.renorm(p=2, dim=0, maxnorm=epsilon)).clamp(low, high))


def with_backward(loss: Callable[..., torch.Tensor]) -> Callable[..., object]:
    """Returns the loss and its gradient with respect to all logits."""

    def run(*arguments: Any) -> object:
        given = [a.detach().requires_grad_() if getattr(a, "dim", int)() == 2 else a for a in arguments]
        return torch.autograd.grad(loss(*given), [a for a in given if getattr(a, "requires_grad", False)])

    return run


def eager_kl(adversarial: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    return F.kl_div(adversarial.log_softmax(dim=1), clean.softmax(dim=1), reduction="sum")


def eager_mart(clean: torch.Tensor, adversarial: torch.Tensor, y: torch.Tensor, beta: float) -> torch.Tensor:
    p, q = clean.softmax(dim=1), adversarial.softmax(dim=1)
    first_two = torch.argsort(q, dim=1)[:, -2:]
    other = torch.where(first_two[:, -1] == y, first_two[:, -2], first_two[:, -1])
    boosted = F.cross_entropy(adversarial, y) + F.nll_loss(torch.log(1.0001 - q + 1e-12), other)
    true = torch.gather(p, 1, y[:, None])[:, 0]
    divergences = F.kl_div(torch.log(q + 1e-12), p, reduction="none").sum(dim=1)
    return boosted + beta / len(y) * (divergences * (1.0000001 - true)).sum()


def eager_js(*views: torch.Tensor) -> torch.Tensor:
    p = [z.softmax(dim=1) for z in views]
    mixture = ((p[0] + p[1] + p[2]) / 3.0).clamp(1e-7, 1).log()
    return sum(F.kl_div(mixture, each, reduction="batchmean") for each in p) / 3.0  # type: ignore[return-value]


def eager_fraction(fraction: Any, faults: Any, z: torch.Tensor, y: torch.Tensor, gamma: float, p: float) -> None:
    fraction.mul_(p).add_((1 - p) * gamma * (z.argmax(dim=1) == y).double().mean())


OPS = {
    "signed_variance": Op(eager_variance, launch_signed_variance, lambda: (logits(), labels()), 2 * LOGITS, 2 * LOGITS),
    "assign_steps": Op(assign_reference, launch_assign, assignment, 38 * M, 38 * M),  # 6 read, 32 written
    "gather_start": Op(
        eager_start,
        start.launch_gather_start,
        lambda: (images(), torch.randperm(M), torch.full((M,), 10), torch.tensor([1, 2]), "normal", 0.001),
        3 * PIXELS,
        3 * PIXELS,
    ),
    "ascent_direction": Op(
        lambda z, target: z.softmax(dim=1) - target,
        launch_ascent_direction,
        lambda: (logits(), logits().softmax(dim=1)),
        3 * LOGITS,
        3 * LOGITS,
    ),
    "pgd_linf_step_": Op(eager_linf, launch_linf, linf, 4 * PIXELS, 4 * PIXELS),
    "pgd_l2_step_": Op(eager_l2, launch_l2, l2, 4 * PIXELS, 4 * PIXELS),
    "trades_kl": Op(
        with_backward(eager_kl),
        divergence.launch_trades_kl,
        lambda: (logits(), logits()),
        4 * LOGITS,
        4 * LOGITS,
    ),
    "mart_loss": Op(
        with_backward(eager_mart),
        divergence.launch_mart_loss,
        lambda: (logits(), logits(), labels(), 6.0),
        4 * LOGITS,
        4 * LOGITS,
    ),
    "js_divergence": Op(
        with_backward(eager_js),
        divergence.launch_js_divergence,
        lambda: (logits(), logits(), logits()),
        6 * LOGITS,
        6 * LOGITS,
    ),
    "update_fraction_": Op(
        eager_fraction,
        launch_update_fraction,
        lambda: (torch.zeros((), dtype=torch.float64), torch.tensor(0), logits(), labels(), 0.8, 0.9),
        LOGITS,
        LOGITS,
    ),
}


@pytest.mark.parametrize("name", OPS)
def test_op(name: str, benchmark: Any, device: torch.device) -> None:
    op = OPS[name]
    eager, fused = (traffic(run, *op.arguments()) for run in (op.eager, op.fused))
    info = counts(op, eager, fused)
    if device.type == "cuda":
        info |= times(op, device)
    arguments = on(device, op.arguments())
    run = op.fused if device.type == "cuda" else op.eager
    benchmark.pedantic(lambda: (run(*arguments), synchronize(device)), rounds=20, warmup_rounds=3)
    benchmark.extra_info.update(machine(device) | info)
    print(f"\n{name}: " + ", ".join(f"{key} {value}" for key, value in info.items()))
    assert fused.launches < eager.launches


def counts(op: Op, eager: Traffic, fused: Traffic) -> dict[str, Any]:
    return {
        "launches, eager": eager.launches,
        "launches, fused": fused.launches,
        "bytes, eager": eager.bytes,
        "bytes, fused": op.moved,
        "bytes, least": op.least,
    }


def times(op: Op, device: torch.device) -> dict[str, Any]:
    """Returns microseconds with flushed caches and gaps between launches, and without; and the share of the floor."""
    from triton.testing import do_bench, do_bench_cudagraph

    result: dict[str, Any] = {}
    floor = op.least / bandwidth(device)
    for variant, run in (("eager", op.eager), ("fused", op.fused)):
        arguments = on(device, op.arguments())
        cold, warm = (1e3 * bench(lambda: run(*arguments)) for bench in (do_bench, do_bench_cudagraph))  # noqa: B023
        result |= {f"us, {variant}, cold": cold, f"us, {variant}, graph": warm}
    return result | {"share of the bandwidth floor, cold": 1e6 * floor / result["us, fused, cold"]}


def bandwidth(device: torch.device) -> float:
    """Returns the bytes per second of a large copy, read and written."""
    source = torch.empty(2**28, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(10):
        target.copy_(source)
    synchronize(device)
    return 10 * 2 * source.nbytes / (time.perf_counter() - begin)


def on(device: torch.device, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments)
