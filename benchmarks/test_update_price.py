"""One iteration of TRADES with few attack steps, where the update is most of the cost: its options alone and together.

One step for boundary and robust samples, none for outliers (1 / 1 / 0, from x itself, by the cross-entropy, as from a
remembered perturbation), at two mixtures of the groups: .18 / .32 / .50, as a small network has them in CIFAR-10, and
the paper's .28 / .54 / .18. All run by the engine "fast" without graphs, against the authors' ten steps. What is not
exact is not timed: each set of options in full precision has to give, in float64, the weights and batch-norm buffers of
the same iteration written plainly. F is the count of operations over that of a forward of the whole batch. To record:

pytest benchmarks/test_update_price.py --full -s --benchmark-json benchmarks/results/update-price.json
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import quick_and_full, report
from test_training_iteration import CASES, SETTING, Case, Workload, compared, costs, count_flops, engine_of
from torch import Tensor, nn

from bt_fast import PGD, BulletTrain, HalfDrawn, TRADESLoss
from bt_fast.attack.forward import eval_mode, training_modes
from bt_fast.baselines.trades_reference import trades_reference_loss

BETA, EPSILON = 6.0, SETTING["epsilon"]
ATTACK = PGD(EPSILON, EPSILON, 1, start="clean", inner="cross_entropy")
GROUPS = {"small network": (0.18, 0.32, 0.50), "paper": (0.28, 0.54, 0.18)}  # boundary, robust, outlier


@dataclass(frozen=True)
class Options:
    """A set of options of the update, with its name in the results."""

    skip: bool = True  # samples without steps run no adversarial forward
    robust: int | HalfDrawn = 1  # N_R, or half of the robust samples stand for all
    shared: bool = False  # one clean forward for mining, target and update
    precision_of: str | None = None  # what runs in 16 bits

    def criterion(self, engine: str, device: torch.device) -> TRADESLoss:
        chosen = engine_of(engine, "eager")
        if self.precision_of is not None:
            chosen = replace(chosen, precision="bf16", precision_of=self.precision_of)
        mining = BulletTrain(1, self.robust, 0, unperturbed="skip" if self.skip else "keep")
        updates: Any = "shared" if self.shared else 1
        return TRADESLoss(ATTACK, BETA, mining=mining, engine=chosen, clean_updates=updates).to(device)


HALF, BEFORE = HalfDrawn(1), HalfDrawn(1, "half")
VARIANTS = {
    "none": Options(skip=False),
    "skip": Options(),
    "half": Options(skip=False, robust=HALF),
    "shared": Options(skip=False, shared=True),
    "16-bit update": Options(skip=False, precision_of="update"),
    "skip, half": Options(robust=HALF),
    "skip, half before": Options(robust=BEFORE),
    "skip, half, shared": Options(robust=HALF, shared=True),
    "skip, half before, shared": Options(robust=BEFORE, shared=True),
    "skip, half, shared, 16-bit update": Options(robust=HALF, shared=True, precision_of="update"),
    "skip, half, shared, 16 bits": Options(robust=HALF, shared=True, precision_of="both"),
}


class Mixture(Workload):
    """A workload with these shares of the groups, for a network that draws nothing in its forward."""

    def __init__(self, case: Case, shares: tuple[float, float, float], device: torch.device) -> None:
        super().__init__(case, device)
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self.share, self.outliers = shares[1], round(shares[2] * case.batch)

    def set(self, mining: BulletTrain, shared: bool) -> None:
        """Gives the groups their sizes: by labels that fit the logits that mining will see, and by F_R."""
        buffers = copy.deepcopy(list(self.model.buffers()))
        with torch.no_grad(), (training_modes if shared else eval_mode)(self.model):
            self.y.copy_(self.model(self.x).argmax(dim=1))
        for buffer, value in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(value)
        self.y[: self.outliers] = (self.y[: self.outliers] + 1) % 10
        mining.robust_fraction.fill_(self.share)


def written_plainly(model: nn.Module, x: Tensor, y: Tensor, options: Options, share: float, seed: int) -> Tensor:
    """The loss of these options, in 1 / 1 / 0 steps."""
    m, generator = len(x), torch.Generator(x.device).manual_seed(seed)
    model.train(options.shared)
    z = model(x)
    p = z.detach().softmax(dim=1)
    correct = p.argmax(dim=1) == y
    svar = torch.where(correct, 1.0, -1.0) * p.var(dim=1, correction=0)
    robust = correct & (svar >= svar.quantile(1.0 - share).clamp(min=0.0))
    weights = torch.ones(m, dtype=x.dtype, device=x.device)
    if isinstance(options.robust, HalfDrawn):
        torch.randint(torch.iinfo(torch.int64).max, (2,), device=x.device, generator=generator)  # of the start
        drawn = torch.rand(m, dtype=torch.float64, device=x.device, generator=generator).argsort()
        ours = [i for i in drawn.tolist() if robust[i]]
        half = -(-len(ours) // 2)
        weights[ours[:half]], weights[ours[half:]] = len(ours) / max(half, 1), 0.0
    model.eval()
    probe = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(probe), y, reduction="sum"), probe)
    moved = torch.minimum(torch.maximum(x + 1.7 * EPSILON * gradient.sign(), x - EPSILON), x + EPSILON).clamp(0, 1)
    attacked = correct if options.robust != BEFORE else correct & (weights > 0)
    x_adv = torch.where(attacked.view(-1, 1, 1, 1), moved, x)
    model.train()
    z = z if options.shared else model(x)
    taken = ((weights > 0) & (attacked | (not options.skip))).nonzero().flatten()
    robust_term = F.kl_div(model(x_adv[taken]).log_softmax(1), z[taken].softmax(1), reduction="none").sum(dim=1)
    return F.cross_entropy(z, y) + BETA / m * (weights[taken] * robust_term).sum()


def check_exactness(workload: Mixture, options: Options) -> None:
    """Nothing is timed of which loss, weights and buffers are not those of the plain iteration."""
    x, results = workload.x[:16].double(), []
    for engine in (None, "exact", "fast"):
        model, criterion = copy.deepcopy(workload.model).double(), options.criterion(engine or "exact", x.device)
        criterion.mining.robust_fraction.fill_(0.5)
        with torch.no_grad():
            y = copy.deepcopy(model).train(options.shared)(x).argmax(dim=1)
        y[:4] = (y[:4] + 1) % 10
        if engine is None:
            loss = written_plainly(model, x, y, options, 0.5, seed=1)
        else:
            loss = criterion(model, x, y, generator=torch.Generator(x.device).manual_seed(1))
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters()), *model.buffers()])
    for result in results[1:]:
        for ours, plain in zip(result, results[0], strict=True):
            torch.testing.assert_close(ours, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("groups", quick_and_full(["small network"], GROUPS))
@pytest.mark.parametrize("name", quick_and_full(["small-cnn"], CASES))
def test_update_price(name: str, groups: str, interleaved: Any, benchmark: Any, device: torch.device) -> None:
    workload = Mixture(CASES[name], GROUPS[groups], device)
    for options in VARIANTS.values():
        if options.precision_of is None:
            check_exactness(workload, options)
    model, x, y, optimizer = workload.model, workload.x, workload.y, workload.optimizer
    criteria = {variant: options.criterion("fast", device) for variant, options in VARIANTS.items()}

    def iteration(variant: str) -> Callable[[], None]:
        def run() -> None:
            optimizer.zero_grad()
            criteria[variant](model, x, y).backward()
            optimizer.step()

        return run

    def reference() -> None:
        trades_reference_loss(model, x, y, optimizer, **SETTING, beta=BETA).backward()
        optimizer.step()

    def prepare(variant: str = "none") -> None:
        if variant in criteria:
            workload.set(criteria[variant].mining, VARIANTS[variant].shared)

    variants = {"reference": reference, **{variant: iteration(variant) for variant in VARIANTS}}
    flops, peaks = {}, {}
    for variant, work in variants.items():
        found = costs({variant: work}, {variant: work}, workload, lambda variant=variant: prepare(variant))
        flops, peaks = flops | found[0], peaks | found[1]
    with eval_mode(model), torch.no_grad():
        forward = count_flops(lambda: model(x))
    for criterion in criteria.values():
        criterion.mining.reset_fractions()
    seconds = interleaved(variants, prepare, rounds=CASES[name].rounds)
    info = {}
    for variant, line in compared(seconds, flops, peaks, ("reference", "none")).items():
        shares = criteria[variant].mining.fractions if variant in criteria else None
        of_groups = f"; {shares.boundary:.2f} / {shares.robust:.2f} / {shares.outlier:.2f}" if shares else ""
        info[variant] = f"{flops[variant] / forward:.2f} F, {line}{of_groups}"
    benchmark.extra_info.update({"flops": flops, "peak bytes": peaks, "forward flops": forward})
    report(benchmark, f"update's price, {groups}, {name}, batch {CASES[name].batch}", info)
