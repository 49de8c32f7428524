"""One iteration of TRADES-AWP: as its authors write it, with a proxy network, and ours, with and without BulletTrain.

At the paper's fractions for TRADES, as in `test_training_iteration`, of which the columns are. The two passes of ours
differ from the authors' only in what runs them; "moved" takes the first pass over the samples with steps alone, which
are .82 of them, and .28 at 10 / 0 / 0 steps ("boundary alone"); "no AWP" is the same iteration without that pass. What
is not exact is not timed: ours has to give the reference's weights and batch-norm buffers in float64. To record:

pytest benchmarks/test_awp_iteration.py --full -s --benchmark-json benchmarks/results/awp-iteration.json
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import quick_and_full, report
from test_training_iteration import CASES, SETTING, Workload, compared, costs, engine_of
from torch import Tensor, nn

from bt_fast import AWP, PGD, BulletTrain, TRADESLoss

ATTACK = PGD(SETTING["epsilon"], SETTING["step_size"], 10)
BETA, GAMMA = 6.0, 5e-3


class Reference:
    """TRADES-AWP's iteration, written plainly."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._proxy = model, copy.deepcopy(model)
        self._ascent = torch.optim.SGD(self._proxy.parameters(), lr=0.01)

    def __call__(self, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer) -> None:
        model = self._model.eval()
        x_adv = x + 0.001 * torch.randn(x.shape).to(x)
        for _ in range(ATTACK.steps):
            x_adv = x_adv.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(_kl(model(x_adv), model(x), "sum"), x_adv)
            x_adv = x_adv.detach() + ATTACK.step_size * gradient.sign()
            x_adv = torch.minimum(torch.maximum(x_adv, x - ATTACK.epsilon), x + ATTACK.epsilon).clamp(0, 1)
        model.train()
        difference = self._difference(x, x_adv.detach(), y)
        self._move(difference, GAMMA)
        robust = _kl(model(x_adv.detach()), model(x), "batchmean")
        loss = F.cross_entropy(model(x), y) + BETA * robust
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        self._move(difference, -GAMMA)

    def _difference(self, x: Tensor, x_adv: Tensor, y: Tensor) -> dict[str, Tensor]:
        proxy = self._proxy
        proxy.load_state_dict(self._model.state_dict())
        proxy.train()
        natural = F.cross_entropy(proxy(x), y)
        loss = -(natural + BETA * _kl(proxy(x_adv), proxy(x), "batchmean"))
        self._ascent.zero_grad()
        loss.backward()
        self._ascent.step()
        result, stepped = {}, proxy.state_dict()
        for name, old in self._model.state_dict().items():
            if old.dim() > 1 and "weight" in name:
                change = stepped[name] - old
                result[name] = old.norm() / (change.norm() + 1e-20) * change
        return result

    @torch.no_grad()
    def _move(self, difference: dict[str, Tensor], by: float) -> None:
        for name, p in self._model.named_parameters():
            if name in difference:
                p.add_(difference[name], alpha=by)


def _kl(adversarial: Tensor, clean: Tensor, reduction: str) -> Tensor:
    return F.kl_div(F.log_softmax(adversarial, dim=1), F.softmax(clean, dim=1), reduction=reduction)


def ours(
    model: nn.Module, engine: str, mining: BulletTrain | None = None, **options: Any
) -> Callable[[Tensor, Tensor, torch.optim.Optimizer], None]:
    """Our iteration."""
    criterion = TRADESLoss(ATTACK, beta=BETA, mining=mining, engine=engine_of(engine, "eager"))
    awp = AWP(model, **{"gamma": GAMMA, **options})

    def run(x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        with awp(criterion, x, y) as loss:
            loss.backward()
            optimizer.step()

    return run


def check_exactness(workload: Workload) -> None:
    """No speedup is reported of a path whose weights differ from the reference's."""
    x, y, results = workload.x[:4].double(), workload.y[:4], []
    for iteration_of in (Reference, lambda model: ours(model, "exact"), lambda model: ours(model, "fast")):
        model = copy.deepcopy(workload.model).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        torch.manual_seed(0)
        for _ in range(2):
            iteration_of(model)(x, y, optimizer)
        results.append(model.state_dict())
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", quick_and_full(["small-cnn"], CASES))
def test_awp_iteration(name: str, interleaved: Any, benchmark: Any, device: torch.device) -> None:
    workload = Workload(CASES[name], device)
    workload.prepare()
    check_exactness(workload)
    model, bullet = workload.model, workload.bullet
    boundary_alone = BulletTrain(10, 0, 0, unperturbed="skip").to(device)
    iterations = {
        "reference": Reference(model),
        "optimised": ours(model, "exact"),
        "optimised, fast": ours(model, "fast"),
        "bullet, fast": ours(model, "fast", bullet),
        "bullet, fast, moved": ours(model, "fast", bullet, samples="moved"),
        "bullet, fast, no AWP": ours(model, "fast", bullet, gamma=0.0),
        "boundary alone, fast": ours(model, "fast", boundary_alone),
        "boundary alone, fast, moved": ours(model, "fast", boundary_alone, samples="moved"),
    }

    def prepare() -> None:
        workload.prepare()
        boundary_alone.robust_fraction.copy_(bullet.robust_fraction)

    def bound(iteration: Callable[[Tensor, Tensor, torch.optim.Optimizer], None]) -> Callable[[], None]:
        return lambda: iteration(workload.x, workload.y, workload.optimizer)

    variants = {variant: bound(iteration) for variant, iteration in iterations.items()}
    flops, peaks = costs(variants, variants, workload, prepare)
    bullet.reset_fractions()
    seconds = interleaved(variants, lambda _: prepare(), rounds=CASES[name].rounds)
    fractions = bullet.fractions
    info = {"fractions (B/R/O)": f"{fractions.boundary:.3f} / {fractions.robust:.3f} / {fractions.outlier:.3f}"}
    info |= compared(seconds, flops, peaks, ("reference", "optimised, fast"))
    benchmark.extra_info.update({"flops": flops, "peak bytes": peaks})
    report(benchmark, f"trades-awp, {name}, batch {CASES[name].batch}", info)
