"""YOPO-m-n (Zhang et al., 2019a): an attack with m full propagations, and n steps against the first layer after each.

The gradient p with respect to the first layer's output comes with each full propagation. While it is held fixed, the
image climbs `H = Σ f₀(x + η)·p`, which needs only the first layer f₀.

"pgd", from the authors' CIFAR-10 and MNIST code: η starts uniform in [-ε, ε], at first not clipped to the pixel bounds.
Each of the m propagations runs forward and backward on x + η; the backward gives the parameters' gradient of the
cross-entropy and p at once; n steps `η + α·sign ∂H/∂η` follow, each clipped to ε and to the pixel bounds; then f₀ also
gets the gradient of H at the new η, in addition to that of the cross-entropy. (One of their scripts tries to restore
the latter, but restores the tensor to which the former has been added.) The loss is the sum of the m cross-entropies,
and its gradient the sum of all of these gradients: the authors divide their learning rate by m. (So f₀'s gradient is
not that of the loss's value.) The gradients are computed within the call, with the memory of one propagation, and
`backward()` adds them, times its own gradient; a gradient scaler does not scale what is computed there, but it is
scaled by 1024 on its way. The propagations run in train mode like the update of `trades_loss`, and batch norm sees m
batches. (The authors run one forward more, to report its accuracy.)

"trades", from their TRADES code: YOPO makes only x', in eval mode, from x and 0.001·N(0, 1) on the KL divergence from
the clean distribution. The update is `CE(h(x), y) + β · mean KL(softmax h(x) ‖ softmax h(x'))` of two forwards in train
mode: batch norm sees each batch once, whereas in the TRADES code it sees the clean one twice. "mart", which they do not
have, is built in the same way: x' from the cross-entropy, and MART's loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from bt_fast import faults, ops
from bt_fast.attack.forward import (
    clean_logits,
    eval_mode,
    in_float16,
    logits_of,
    reentrant_refused,
    uncompiled,
    without_gradient,
)
from bt_fast.attack.pixels import Normalization, on_pixels
from bt_fast.attack.start import normal_noise
from bt_fast.attack.threat import ThreatModel
from bt_fast.baselines.values import SCALE, check_values
from bt_fast.objectives import arguments
from bt_fast.objectives.recomputed import update_modes
from bt_fast.ranges import ATTACK_STEP, UPDATE, range_
from bt_fast.units import warn_of_units
from bt_fast.validation import (
    check_choice,
    check_generator,
    check_labels,
    check_model,
    size_of_step,
    step_count,
    weight,
)

YopoObjective = Literal["pgd", "trades", "mart"]

_BETA = {"trades": 1.0, "mart": 6.0}
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def yopo_loss(
    model: nn.Module,
    x_natural: Tensor,
    y: Tensor,
    optimizer: torch.optim.Optimizer | None,
    *,
    propagations: int,
    layer_steps: int,
    objective: YopoObjective = "pgd",
    step_size: float = 0.007,
    epsilon: float = 0.031,
    beta: float | None = None,
    first: nn.Module | None = None,
    generator: torch.Generator | None = None,
    normalization: Normalization | None = None,
) -> Tensor:
    """The loss of YOPO-m-n in ℓ∞, ready for `backward()`; the authors' YOPO-5-3 is `propagations=5, layer_steps=3`.

    Args:
        model: maps [m, ...] to logits [m, K]; not DistributedDataParallel. A compiled one runs uncompiled.
        x_natural: [m, ...] floating point in [0, 1], m ≥ 1. y: [m] integers in 0..K-1.
        optimizer: its `zero_grad()` is called; None leaves the gradients as they are, for gradient accumulation.
        propagations: m ≥ 1, full propagations. layer_steps: n ≥ 1, steps against the first layer after each.
        objective: "pgd", "trades" or "mart"; `help(bt_fast.baselines.yopo)` says how each is made.
        step_size: α > 0, epsilon: ε ≥ 0, in pixel units; the authors take 0.007 with 0.031 for TRADES, 2/255 with 8/255
            for PGD.
        beta: β ≥ 0, the weight of the robust term of "trades" (by default 1, the authors') and of "mart" (6).
        first: the layer that ends f₀, which includes all before it; by default the first convolution or linear layer
            that the forward reaches. Buffers of f₀ move in each of its forwards.
        generator: on the images' device, for the start; without it the device's own ("trades", "mart": as TRADES).
        normalization: the loader's normalisation of the images, as for `trades_loss`.

    Raises:
        TypeError, ValueError: as for `trades_loss`, or `first` is not a layer that a forward calls exactly once.
            Nothing has changed then; but NaN in an input gradient is raised after the attack, which in "pgd" moves
            batch norm.
    """
    threat = ThreatModel(epsilon)
    arguments.check_batch(x_natural, y, "x_natural")
    check_labels(y, len(x_natural), x_natural.device, "y")
    step_size = size_of_step("step_size", step_size, threat.epsilon)
    arguments.check_optimizer(optimizer)
    check_generator(generator, x_natural.device)
    m, n = step_count("propagations", propagations, least=1), step_count("layer_steps", layer_steps, least=1)
    robust_weight = _checked_beta(objective, beta)
    warn_of_units(threat.epsilon, step_size=step_size)
    images = on_pixels(model, x_natural, normalization)
    with uncompiled(), torch.inference_mode(False), reentrant_refused(), images as (model, pixels):
        x, labels = pixels(x_natural).detach(), y.long()
        first = _checked_first(model, first, x, labels)
        x = faults.onto_bounds(x, threat.lower, threat.upper)
        attack = _Attack(model, first, x, labels, threat, step_size, n, m, generator)
        loss = _propagations(attack) if objective == "pgd" else _update(attack, objective == "trades", robust_weight)
    if optimizer is not None:
        optimizer.zero_grad()
    return loss


def _checked_beta(objective: str, beta: float | None) -> float:
    check_choice("objective", objective, ("pgd", "trades", "mart"))
    if objective == "pgd" and beta is not None:
        raise ValueError(f"beta is an option of 'trades' and 'mart', not of 'pgd', got {beta!r}: leave it out")
    return weight("beta", _BETA.get(objective, 0.0) if beta is None else beta)


# The first layer


def _checked_first(model: nn.Module, first: nn.Module | None, x: Tensor, y: Tensor) -> nn.Module:
    """Returns the first layer that a forward reaches, or the checked `first`; that forward also checks the values."""
    check_model(model)
    if first is not None and not isinstance(first, nn.Module):
        raise TypeError(
            f"first must be a module or None, got {type(first).__name__}: "
            "give the model's first layer, as model.conv1, or leave it out"
        )
    if first is not None and all(module is not first for module in model.modules()):
        raise ValueError(
            "first must be a layer of the model, but is none of its modules: give one, as model.conv1, or leave it out"
        )
    for module in model.modules():
        if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            raise ValueError(
                "model must not be spread over devices: its first layer could not be reached; give model.module"
            )
    calls: list[tuple[nn.Module, object]] = []

    def note(module: nn.Module, _: object, output: object) -> None:
        calls.append((module, output))

    watched = [m for m in model.modules() if (m is first if first is not None else isinstance(m, _LAYERS))]
    hooks = [module.register_forward_hook(note) for module in watched]
    try:
        check_values(model, x, y)
    finally:
        for hook in hooks:
            hook.remove()
    if first is None and not calls:
        raise ValueError(
            "first must be given: the model's forward reaches no convolution or linear layer; "
            "name the layer that the images enter, as first=model.stem"
        )
    layer = calls[0][0] if first is None else first
    _check_once(sum(module is layer for module, _ in calls))
    output = calls[0][1]
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise TypeError(
            f"first must return a floating-point tensor, got {type(output).__name__}: "
            "give a layer whose forward returns one"
        )
    return layer


def _check_once(calls: int) -> None:
    if calls != 1:
        raise _not_once(calls)


def _not_once(calls: int) -> ValueError:
    return ValueError(
        f"first must be called exactly once in a forward, but was called {calls} times: "
        "give a layer that a forward calls once, or leave first out"
    )


class _ReachedError(Exception):
    """Ends a forward at the first layer's output."""

    def __init__(self, output: Tensor) -> None:
        self.output = output


# The attack


@dataclass(eq=False)
class _Attack:
    """The propagations of a model, and the steps against its layer `first`, which ends f₀."""

    model: nn.Module
    first: nn.Module
    x: Tensor
    y: Tensor
    threat: ThreatModel
    step_size: float
    steps: int
    propagations: int
    generator: torch.Generator | None

    def __post_init__(self) -> None:
        # [m], samples that could not move in some step because their gradient held NaN
        self.faulty = torch.zeros(len(self.x), dtype=torch.bool, device=self.x.device)

    def images(self, eta: Tensor) -> Tensor:
        """x + η within the pixel bounds."""
        return (self.x + eta).clamp(self.threat.lower, self.threat.upper)

    def propagated(self, eta: Tensor) -> tuple[Tensor, GradientEdge]:
        """Returns the logits of x + η, and the edge at which the gradient of the first layer's output arrives.

        At the start x + η may lie outside the pixel bounds, as in the authors' code.
        """
        edges: list[GradientEdge] = []  # taken before the output is changed in place
        hook = self.first.register_forward_hook(lambda _, __, output: edges.append(get_gradient_edge(output)))
        try:
            logits = logits_of(self.model, (self.x + eta).detach().requires_grad_())
        finally:
            hook.remove()
        _check_once(len(edges))
        if not logits.requires_grad:
            raise without_gradient()
        return logits, edges[0]

    def hamiltonian(self, eta: Tensor, p: Tensor) -> Tensor:
        """Returns H = Σ f₀(x + η)·p: the model's forward, ended at the first layer's output."""

        def leave(_: nn.Module, __: object, output: Tensor) -> None:
            raise _ReachedError(output)

        hook = self.first.register_forward_hook(leave)
        try:
            self.model(self.images(eta))
        except _ReachedError as reached:
            return (reached.output * p).sum()
        finally:
            hook.remove()
        raise _not_once(0)

    def moved(self, eta: Tensor, p: Tensor) -> Tensor:
        """Returns η after n steps up H."""
        for _ in range(self.steps):
            with range_(ATTACK_STEP):
                eta = eta.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(self.hamiltonian(eta, p), eta)
                self.faulty.logical_or_(gradient.isnan().flatten(1).any(dim=1))
                eta = eta.detach() + self.step_size * gradient.sign()
                eta = self.images(eta.clamp(-self.threat.epsilon, self.threat.epsilon)) - self.x
        return eta

    def check(self) -> None:
        """Raises ValueError if a sample could not move."""
        faults.read([faults.gradients_without_direction(self.faulty)]).wait()


def _attacked(attack: _Attack, divergence: bool) -> Tensor:
    """Returns x' of a model in eval mode, which climbs the divergence from clean predictions, or the cross-entropy."""
    x, model, generator = attack.x, attack.model, attack.generator
    with torch.enable_grad(), eval_mode(model):
        target = clean_logits(model, x).double().softmax(dim=1) if divergence else None
        eta = normal_noise(x, generator, on_cpu=generator is None and not x.is_cuda).to(x.dtype)
        for _ in range(attack.propagations):
            logits, edge = attack.propagated(eta)
            away_from = F.one_hot(attack.y, logits.shape[1]).double() if target is None else target
            direction = ops.ascent_direction(logits.detach(), away_from, in_float16(model, x, logits))
            (p,) = torch.autograd.grad(logits, [edge], direction)
            eta = attack.moved(eta, p)
    attack.check()
    return attack.images(eta)


# The update


def _update(attack: _Attack, divergence: bool, beta: float) -> Tensor:
    """Returns the loss of TRADES (`divergence`) or MART on x' made before."""
    x, y, model = attack.x, attack.y, attack.model
    x_adv = _attacked(attack, divergence)
    with range_(UPDATE):
        with update_modes(model) as modes:
            clean, adversarial_logits = logits_of(model, x), logits_of(model, x_adv)
            modes.again_in_backward([clean, adversarial_logits])
        if divergence:
            return F.cross_entropy(ops.wide(clean), y) + beta / len(x) * ops.trades_kl(adversarial_logits, clean)
        return ops.mart_loss(clean, adversarial_logits, y, beta)


def _propagations(attack: _Attack) -> Tensor:
    """Returns the sum of m cross-entropies, with the gradient of the propagations and of the first layer's H."""
    x, model = attack.x, attack.model
    trained = [p for p in model.parameters() if p.requires_grad]
    sums: list[Tensor | None] = [None] * len(trained)
    losses = []
    with torch.enable_grad(), update_modes(model):
        noise = torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=attack.generator)
        eta = (2.0 * noise - 1.0) * attack.threat.epsilon
        for _ in range(attack.propagations):
            logits, edge = attack.propagated(eta)
            loss = F.cross_entropy(ops.wide(logits), attack.y)
            wanted: Any = [edge, *trained]  # torch's annotation permits lists of one type only
            p, *gradients = torch.autograd.grad(SCALE * loss, wanted, allow_unused=True)
            sums = _added(sums, gradients)
            eta = attack.moved(eta, p)
            hamiltonian = attack.hamiltonian(eta, p)
            if trained and hamiltonian.requires_grad:
                sums = _added(sums, torch.autograd.grad(hamiltonian, trained, allow_unused=True))
            losses.append(loss.detach())
    attack.check()
    used = [k for k, gradient in enumerate(sums) if gradient is not None]
    given = [sums[k] for k in used] + [trained[k] for k in used]
    total: Tensor = _Carrier.apply(torch.stack(losses).sum(), len(used), *given)  # type: ignore[no-untyped-call]
    return total


def _added(sums: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [g if s is None else s if g is None else s + g for s, g in zip(sums, gradients, strict=True)]


class _Carrier(torch.autograd.Function):
    """A value with parameter gradients that are already computed, `SCALE` times each."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *gradients_and_parameters: Tensor) -> Tensor:
        """Returns the value; the first `count` of the others are gradients, the rest their parameters."""
        ctx.save_for_backward(*gradients_and_parameters[:count])
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients, times that of the value."""
        gradients, upstream = ctx.saved_tensors, gradient / SCALE
        return None, None, *(None for _ in gradients), *(g * upstream.to(g.dtype) for g in gradients)
