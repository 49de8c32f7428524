"""The training step of each example in examples/, against the same step written plainly.

Plain is a loop of forwards and `autograd.grad`, as published scripts have it; ours is the example's criterion. Nothing
is timed before ours, without mining and on the engine "exact", has taken the plain steps in float64: weights and batch
norm's buffers to 1e-6. "example" is what the example runs, "without mining" the same without BulletTrain. The groups
have the paper's sizes (.28 boundary, .54 robust, .18 outlier, with 10 / 2 / 0 steps; AugMix .35 boundary). Speedups are
medians of the ratios of interleaved pairs. Networks are the examples' own, narrow; with --full wider ones, too. The
plain AugMix augments as ours does, in a batch, so that its ratio is of mining alone. To record:

pytest benchmarks/test_examples.py --full -s --benchmark-json benchmarks/results/examples.json
"""

from __future__ import annotations

import copy
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import quick_and_full, report
from published import package
from test_awp_iteration import ATTACK, BETA
from test_awp_iteration import Reference as PlainAWP
from test_training_iteration import count_flops
from torch import Tensor, nn

from benchmarks.exactness import same_noise
from benchmarks.gpu_prediction import PAPER, STEPS
from benchmarks.work_ratio import work_ratio
from bt_fast import APGD, AWP, AugMixLoss, BulletTrain, PGDLoss, TRADESLoss, perturb
from bt_fast.attack.forward import eval_mode
from bt_fast.augment.mix import augment_and_mix, draw_choices
from bt_fast.baselines.trades_reference import trades_reference_loss
from examples import augmix_corruptions, clip_embeddings, generated_data, trades_awp, trades_cifar10

CLASSES = 10
APGD_2 = APGD(epsilon=4 / 255, steps=2, start="clean")
AUGMIX_BOUNDARY = 0.35  # the paper's F_B for CIFAR-10
GOAL = 1.8  # of "example" over "plain", for an attack of ten steps with mining, on a CPU

Iterate = Callable[[Tensor, Tensor, torch.optim.Optimizer], None]  # of images [m, 3, H, W] in [0, 1], and labels


def by(criterion: nn.Module, model: nn.Module) -> Iterate:
    """The step of a criterion."""

    def iterate(x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        criterion(model, x, y).backward()
        optimizer.step()

    return iterate


def ascended(x_adv: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
    x_adv = x_adv.detach() + ATTACK.step_size * gradient.sign()
    return torch.min(torch.max(x_adv, x - ATTACK.epsilon), x + ATTACK.epsilon).clamp(0, 1)


def uniform_start(x: Tensor) -> Tensor:
    noise = 2.0 * torch.rand(x.shape, dtype=x.dtype, device=x.device) - 1.0
    return (x + noise * ATTACK.epsilon).clamp(0, 1)


# TRADES


def plain_trades(model: nn.Module, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer) -> None:
    loss = trades_reference_loss(model, x, y, optimizer, ATTACK.step_size, ATTACK.epsilon, ATTACK.steps, BETA)
    loss.backward()
    optimizer.step()


def trades(model: nn.Module, engine: str, mining: BulletTrain | None) -> Iterate:
    return by(TRADESLoss(ATTACK, beta=BETA, mining=mining, engine=engine), model)


def awp(model: nn.Module, engine: str, mining: BulletTrain | None) -> Iterate:
    criterion, around = TRADESLoss(ATTACK, beta=BETA, mining=mining, engine=engine), AWP(model)

    def iterate(x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        with around(criterion, x, y) as loss:
            loss.backward()
            optimizer.step()

    return iterate


# Generated data: labels [m, K]


def plain_generated(model: nn.Module, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer) -> None:
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    kept = [(norm.running_mean, norm.running_var) for norm in norms]
    model.train()
    for norm in norms:  # the attack on the batch's statistics, which are not tracked
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    x_adv = uniform_start(x)
    for _ in range(ATTACK.steps):
        x_adv.requires_grad_()
        (gradient,) = torch.autograd.grad(F.kl_div(F.log_softmax(model(x_adv), 1), y, reduction="sum"), x_adv)
        x_adv = ascended(x_adv, x, gradient)
    for norm, (mean, variance) in zip(norms, kept, strict=True):
        norm.track_running_stats, norm.running_mean, norm.running_var = True, mean, variance
    optimizer.zero_grad()
    clean, adversarial = model(x), model(x_adv)
    target = 0.9 * y + 0.1 / (CLASSES - 1) * (1 - y)
    robust = F.kl_div(F.log_softmax(adversarial, 1), F.softmax(clean, 1), reduction="batchmean")
    (5.0 * robust - (target * F.log_softmax(clean, 1)).sum(dim=1).mean()).backward()
    optimizer.step()


def generated(model: nn.Module, engine: str, mining: BulletTrain | None) -> Iterate:
    running = "batch" if mining is None and engine == "exact" else "running"
    attack = replace(ATTACK, start="uniform", inner="cross_entropy", statistics=running)
    options: dict[str, Any] = {"label_smoothing": 0.1, "smoothing": "others", "clean_updates": 1}
    return by(TRADESLoss(attack, beta=5.0, mining=mining, engine=engine, **options), model)


# Embeddings: away from those of a copy of the model as it was, without labels


def plain_embeddings(model: nn.Module) -> Iterate:
    original = copy.deepcopy(model)

    def iterate(x: Tensor, _: Tensor, optimizer: torch.optim.Optimizer) -> None:
        target, x_adv = original(x).detach(), uniform_start(x)
        for _step in range(ATTACK.steps):
            x_adv.requires_grad_()
            (gradient,) = torch.autograd.grad((model(x_adv) - target).square().sum(), x_adv)
            x_adv = ascended(x_adv, x, gradient)
        optimizer.zero_grad()
        (model(x_adv) - target).square().sum(dim=1).mean().backward()
        optimizer.step()

    return iterate


def embeddings(model: nn.Module, engine: str, _: BulletTrain | None) -> Iterate:
    original = copy.deepcopy(model)

    def iterate(x: Tensor, _: Tensor, optimizer: torch.optim.Optimizer) -> None:
        target = original(x).detach()
        attack = replace(ATTACK, start="uniform", inner=clip_embeddings.away_from(target))
        x_adv = perturb(model, x, torch.arange(len(x), device=x.device), attack, engine=engine)
        optimizer.zero_grad()
        (model(x_adv) - target).square().sum(dim=1).mean().backward()
        optimizer.step()

    return iterate


# AugMix


def plain_augmix(model: nn.Module, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    views = augment_and_mix(x.repeat(2, 1, 1, 1), draw_choices(2 * len(x), x.device))
    logits = model.train()(torch.cat([x, views]))
    parts = logits.softmax(dim=1).chunk(3)
    mixture = (sum(parts) / 3).clamp(1e-7, 1).log()
    divergence = sum(F.kl_div(mixture, part, reduction="batchmean") for part in parts) / 3
    (F.cross_entropy(logits[: len(x)], y) + 12 * divergence).backward()
    optimizer.step()


def augmix(model: nn.Module, engine: str, mining: BulletTrain | None) -> Iterate:
    return by(AugMixLoss(mining, engine=engine), model)


# ImageNet: APGD of two steps from x, in which no step size has time to halve; labels [m, K]


def plain_apgd(model: nn.Module, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer) -> None:
    def look(x_adv: Tensor) -> tuple[Tensor, Tensor]:
        x_adv = x_adv.detach().requires_grad_()
        values = -(y * F.log_softmax(model(x_adv), 1)).sum(dim=1)
        return values.detach(), torch.autograd.grad(values.sum(), x_adv)[0]

    def inside(x_adv: Tensor) -> Tensor:
        return (x + (x_adv - x).clamp(-APGD_2.epsilon, APGD_2.epsilon)).clamp(0, 1)

    model.eval()
    before, gradient = look(x)
    first = inside(x + 2 * APGD_2.epsilon * gradient.sign())
    after, gradient = look(first)
    step = inside(first + 2 * APGD_2.epsilon * gradient.sign())
    second = inside(first + 0.75 * (step - first) + 0.25 * (first - x))
    with torch.no_grad():
        last = -(y * F.log_softmax(model(second), 1)).sum(dim=1)
    best = torch.where(per_image(after > before), first, x)
    best = torch.where(per_image(last > torch.maximum(before, after)), second, best)
    model.train()
    optimizer.zero_grad()
    F.cross_entropy(model(best), y, label_smoothing=0.1).backward()
    optimizer.step()


def per_image(rows: Tensor) -> Tensor:
    return rows[:, None, None, None]


def apgd(model: nn.Module, engine: str, mining: BulletTrain | None) -> Iterate:
    return by(PGDLoss(APGD_2, mining=mining, engine=engine, label_smoothing=0.1), model)


def convnext(width: int) -> nn.Module:
    """timm's ConvNeXt of few layers and channels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of initial weights that its next version will have
        sizes = [20 * width * factor for factor in (1, 2, 4, 8)]
        return package("timm").create_model("convnext_atto", num_classes=CLASSES, depths=(1, 1, 2, 1), dims=sizes)


# What is timed


@dataclass(frozen=True)
class Example:
    """A network of a width, its plain step, and ours in variants by name: the engine, and steps by group."""

    network: Callable[[int], nn.Module]
    plain: Callable[[nn.Module], Iterate]
    ours: Callable[[nn.Module, str, BulletTrain | None], Iterate]
    variants: dict[str, tuple[str, tuple[int, int, int] | None]]
    soft: bool = False  # whether labels are mixed
    boundary: float = PAPER.boundary
    goal: float | None = None
    pixels: int = 1  # a factor of the images' sides


MINED: dict[str, Any] = {"without mining": ("fast", None), "example": ("fast", STEPS)}
EXAMPLES = {
    "trades_cifar10": Example(
        lambda width: trades_cifar10.wide_resnet(10, width, 3, CLASSES),
        lambda model: partial(plain_trades, model),
        trades,
        MINED,
        goal=GOAL,
    ),
    "generated_data": Example(
        lambda width: generated_data.residual_network(3, CLASSES, 16 * width, 1),
        lambda model: partial(plain_generated, model),
        generated,
        MINED,
        soft=True,
        goal=GOAL,
    ),
    "trades_awp": Example(
        lambda width: trades_awp.preact_resnet18(3, CLASSES, 8 * width), PlainAWP, awp, MINED, goal=GOAL
    ),
    "imagenet_finetune": Example(
        convnext,
        lambda model: partial(plain_apgd, model),
        apgd,
        {"in float32": ("fast", None), "example": ("bf16", None), "example --mining": ("bf16", (2, 1, 0))},
        soft=True,
        pixels=2,
    ),
    "clip_embeddings": Example(
        lambda width: clip_embeddings.image_tower(3, 16 * width),
        plain_embeddings,
        embeddings,
        {"example": ("fast", None)},
    ),
    "augmix_corruptions": Example(
        lambda width: augmix_corruptions.all_conv(3, CLASSES, 16 * width),
        lambda model: partial(plain_augmix, model),
        augmix,
        {"without mining": ("fast", None), "example": ("fast", (1, 0, 0))},
        boundary=AUGMIX_BOUNDARY,
    ),
}
CASES = {"narrow": (1, 16, 64, 9), "wide": (2, 32, 64, 5)}  # width, pixels a side, images in a minibatch, rounds


class Workload:
    """A model and a minibatch whose groups have the paper's sizes after every call of `prepare`."""

    def __init__(self, example: Example, case: str, device: torch.device) -> None:
        torch.manual_seed(0)
        width, side, m, self.rounds = CASES[case]
        self.example = example
        self.model = example.network(width).to(device)
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # with it the groups would not be those of the labels
        self.x = torch.rand(m, 3, example.pixels * side, example.pixels * side, device=device)
        self.outliers = round(PAPER.outlier * m)
        self.y = torch.zeros(m, CLASSES, device=device) if example.soft else torch.zeros(m, device=device).long()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0, momentum=0.9)  # the weights stay
        self.mining = {
            name: None if steps is None else BulletTrain(*steps).to(device)
            for name, (_, steps) in example.variants.items()
        }

    def prepare(self, name: str) -> None:
        """Give the groups their sizes again: they follow from the labels and F_R."""
        set_statistics(self.model, self.x)
        with eval_mode(self.model), torch.no_grad():
            classes = self.model(self.x).argmax(dim=1) % CLASSES
        classes[: self.outliers] = (classes[: self.outliers] + 1) % CLASSES
        soft = F.one_hot(classes, CLASSES).float()
        self.y.copy_(0.7 * soft + 0.3 * soft.flip(0) if self.example.soft else classes)
        mining = self.mining.get(name)
        if mining is not None:
            mining.robust_fraction.fill_(1.0 - self.example.boundary - PAPER.outlier)

    def steps(self) -> dict[str, Callable[[], None]]:
        """The plain step and the variants, on the model."""
        result = {"plain": self.example.plain(self.model)}
        for name, (engine, _) in self.example.variants.items():
            result[name] = self.example.ours(self.model, engine, self.mining[name])
        return {name: partial(iterate, self.x, self.y, self.optimizer) for name, iterate in result.items()}

    def check_exactness(self) -> None:
        """Two steps in float64: nothing is timed whose result is another."""
        x, y, results = self.x[:6].double(), self.y[:6], []
        y = y.double() if self.example.soft else y
        for make in (self.example.plain, lambda model: self.example.ours(model, "exact", None)):
            model = copy.deepcopy(self.model).double()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
            iterate = make(model)
            torch.manual_seed(1)
            with same_noise():
                for _ in range(2):
                    iterate(x, y, optimizer)
            results.append(model.state_dict())
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-6)


@torch.no_grad()
def set_statistics(model: nn.Module, x: Tensor) -> None:
    """Batch norm's statistics as of these images."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(x)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("case", quick_and_full(["narrow"], CASES))
def test_step(case: str, name: str, interleaved: Any, benchmark: Any, device: torch.device) -> None:
    example = EXAMPLES[name]
    workload = Workload(example, case, device)
    workload.prepare("plain")
    workload.check_exactness()
    steps, flops = workload.steps(), {}
    for variant, step in steps.items():
        workload.prepare(variant)
        step()  # a view is traced at its first use
        workload.prepare(variant)
        flops[variant] = count_flops(step)
    seconds = interleaved(steps, workload.prepare, rounds=workload.rounds)
    info = {}
    for variant, times in seconds.items():
        ratio = work_ratio(("plain", variant), steps, workload.prepare, seconds, device)
        mining, limit = workload.mining.get(variant), flops["plain"] / flops[variant]
        shares = mining and mining.fractions
        groups = f", B/R/O {shares.boundary:.3f} / {shares.robust:.3f} / {shares.outlier:.3f}" if shares else ""
        info[variant] = f"{1e3 * statistics.median(times):.1f} ms, {ratio:.2f}x (FLOP limit {limit:.2f}x){groups}"
    if example.goal is not None:
        info["goal of the example"] = f"{example.goal}x"
    benchmark.extra_info["flops"] = flops
    report(benchmark, f"{name}, {case}, batch {len(workload.y)}", info)
