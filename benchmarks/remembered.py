"""TRADES with remembered perturbations, written plainly: the prototype of `ten_times`, and an oracle for the package.

A perturbation that was made in the last epoch is where this epoch's attack starts, in the image's own frame. Nothing
here is fused or fast, and nothing of it is the package's but the data class of a placement.

A method is a text: steps, then options, then further phases, each with the share of the epochs at which it begins.

    10                                          TRADES: ten steps for all
    10/2/0                                      BulletTrain: steps of boundary / robust / outlier samples
    1/1/0,remember,skip,half,one-clean,beta=12  remembered perturbations, the cheapest row
    1/1/0,remember,beta=12;0.8:10/2/0           the last fifth with BulletTrain
    authors                                     TRADES by its authors' code

| option | what it does |
| --- | --- |
| `remember` | the attack starts at clip(x + clip(remembered + 0.001·N(0, 1), ±ε), 0, 1), and x' - x is remembered |
| `int8` | what is remembered is rounded to 127ths of ε |
| `skip` | unperturbed samples are left out of the adversarial forward |
| `half`, `half-before` | ⌈n/2⌉ of n robust samples stand for all, drawn after or before the attack |
| `one-clean` | one clean forward, in train mode, for mining, target and update |
| `beta=B` | the weight of the robust term, 6 |
| `margin=W` | the attack climbs KL + W · (the largest wrong logit - the true one) |
| `gradient=S` | a further remembered step of S·ε along the sign of the update's own gradient of x' |
| `bf16` | attack and update run under bfloat16 autocast, with weights and losses in float32 |
| `sizes=B/R/O` | step sizes as shares of ε |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bt_fast.placement import Placement

OUTLIER, BOUNDARY, ROBUST = 0, 1, 2
GAMMA, MOMENTUM = 0.8, 0.9  # of F_R
TRAVEL = 1.7  # ε of all steps of an attack that starts at x (paper, section 3.1)
NOISE = 0.001


# Methods


@dataclass(frozen=True)
class Recipe:
    """How one minibatch is trained on; the options are those at the head of this module.

    Attributes:
        steps: of boundary, robust and outlier samples. mining: whether there are groups; else all are boundary samples.
        half: "", "after" or "before". sizes: of the steps, as shares of ε; None for the method's own.
        authors: whether the loss is that of TRADES' authors' code instead.
    """

    steps: tuple[int, int, int]
    mining: bool
    remember: bool = False
    int8: bool = False
    skip: bool = False
    half: str = ""
    one_clean: bool = False
    beta: float = 6.0
    margin: float = 0.0
    gradient: float = 0.0
    bf16: bool = False
    sizes: tuple[float, float, float] | None = None
    authors: bool = False

    @property
    def step_sizes(self) -> tuple[float, float, float]:
        """The step sizes of boundary, robust and outlier samples as shares of ε."""
        if self.sizes is not None:
            return self.sizes
        boundary, robust, outlier = self.steps
        if self.remember:
            one = {1: 1.0, 2: 0.5}
            own = [one.get(n, TRAVEL / max(n, 1)) for n in self.steps]
            return own[0], 0.6 if (boundary, robust) == (2, 1) else own[1], own[2]
        of_boundary = 0.25 if boundary == 10 else TRAVEL / max(boundary, 1)  # the authors' 2/255 at ε = 8/255
        return of_boundary, TRAVEL / max(robust, 1), TRAVEL / max(outlier, 1)


@dataclass(frozen=True)
class Phase:
    """A recipe that holds from a share of the epochs on."""

    begin: float
    recipe: Recipe


def phases_of(text: str) -> tuple[Phase, ...]:
    """Returns the phases of a method, in their order; ValueError for a text that is none."""
    first, *later = text.split(";")
    phases = [Phase(0.0, recipe_of(first))]
    for part in later:
        share, colon, rest = part.partition(":")
        begin = _number(share, part)
        if not colon or not phases[-1].begin < begin < 1.0:
            raise ValueError(f"{part!r}: expected SHARE:RECIPE with shares that grow below 1, as 0.8:10/2/0")
        phases.append(Phase(begin, recipe_of(rest)))
    return tuple(phases)


def recipe_of(text: str) -> Recipe:
    """Returns the recipe of a text like 1/1/0,remember,beta=12; ValueError for another one."""
    first, *options = text.split(",")
    if first == "authors":
        recipe = Recipe((10, 10, 10), mining=False, authors=True)
    else:
        counts = first.split("/")
        if len(counts) not in (1, 3) or not all(n.isdecimal() for n in counts):
            raise ValueError(f"{text!r}: expected to begin with steps, as 10 or 10/2/0, or with authors")
        boundary, robust, outlier = (int(n) for n in (counts * 3)[:3])
        recipe = Recipe((boundary, robust, outlier), mining=len(counts) == 3)
    for option in options:
        name, equals, value = option.partition("=")
        change: dict[str, Any]
        if name in ("remember", "int8", "skip", "one-clean", "bf16") and not equals:
            change = {name.replace("-", "_"): True}
        elif option in ("half", "half-before"):
            change = {"half": "before" if option == "half-before" else "after"}
        elif name in ("beta", "margin", "gradient") and equals:
            change = {name: _number(value, option)}
        elif name == "sizes" and value.count("/") == 2:
            change = {name: tuple(_number(part, option) for part in value.split("/"))}
        else:
            raise ValueError(f"{option!r} is no option of a recipe; `benchmarks.remembered` names all of them")
        recipe = replace(recipe, **change)
    return _checked(recipe, text)


def _checked(recipe: Recipe, text: str) -> Recipe:
    if recipe.authors and recipe != Recipe((10, 10, 10), mining=False, beta=recipe.beta, authors=True):
        raise ValueError(f"{text!r}: the authors' code has no option but beta; leave the others out")
    if recipe.half and not (recipe.mining and (recipe.steps[1] or recipe.gradient)):
        raise ValueError(f"{text!r}: half of the robust samples needs robust samples with steps; write 1/1/0,half")
    if (recipe.int8 or recipe.gradient) and not recipe.remember:
        raise ValueError(f"{text!r}: int8 and gradient are of what is remembered; write remember, too")
    return recipe


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{where!r}: expected a number in it, got {text!r}") from None


# What is remembered


class PlainMemory:
    """Perturbations [n, C, H, W] of n images in their own frames, by slices of one image after the other."""

    def __init__(self, shape: tuple[int, ...], epsilon: float, *, int8: bool = False) -> None:
        self.epsilon = epsilon
        self.stored = torch.zeros(shape, dtype=torch.int8 if int8 else torch.float32)

    def read(self, indices: Tensor, placement: Placement) -> Tensor:
        """Returns what the crops [m, C, H, W] of these images show of their perturbations; else 0."""
        dtype = torch.float32 if self.stored.dtype == torch.int8 else self.stored.dtype
        result = torch.zeros(len(indices), *self.stored.shape[1:], dtype=dtype)
        for k, number in enumerate(indices.tolist()):
            top, left, mirrored = _place(placement, k)
            own, of_crop = _both(self.stored.shape[2:], top, left)
            shown = self.stored[number][:, own[0], own[1]].to(dtype)
            if self.stored.dtype == torch.int8:
                shown = shown * (self.epsilon / 127)
            result[k][:, of_crop[0], of_crop[1]] = shown
            if mirrored:
                result[k] = result[k].flip(2)
        return result

    def write(self, indices: Tensor, placement: Placement, delta: Tensor, moved: Tensor) -> None:
        """Remembers delta [m, C, H, W] of these crops; what they do not show stays.

        A sample that was not `moved` [m] is forgotten as a whole.
        """
        for k, number in enumerate(indices.tolist()):
            if not moved[k]:
                self.stored[number] = 0
                continue
            top, left, mirrored = _place(placement, k)
            own, of_crop = _both(self.stored.shape[2:], top, left)
            crop = delta[k].flip(2) if mirrored else delta[k]
            shown = crop[:, of_crop[0], of_crop[1]]
            if self.stored.dtype == torch.int8:
                shown = (shown * (127 / self.epsilon)).round()
            self.stored[number][:, own[0], own[1]] = shown.to(self.stored.dtype)


def _place(placement: Placement, k: int) -> tuple[int, int, bool]:
    return int(placement.top[k]), int(placement.left[k]), bool(placement.mirrored[k])


def _both(size: tuple[int, ...], top: int, left: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Returns the part of an image of this size that a crop of the same size shows: in the image, and in the crop."""
    own = [slice(max(at, 0), min(at + n, n)) for at, n in zip((top, left), size, strict=True)]
    crop = [slice(part.start - at, part.stop - at) for at, part in zip((top, left), own, strict=True)]
    return (own[0], own[1]), (crop[0], crop[1])


# One minibatch


@dataclass(eq=False)
class Minibatch:
    """The loss of a minibatch, and what became of its samples.

    Attributes:
        loss: 0-dim, with its graph. group, steps: [m] int64. weights: [m], of the robust terms; 0 if left out.
        kept: [k] int64, the samples in the adversarial forward.
        x_adv: [m, ...]. kept_adv: [k, ...], the leaf of its forward if its gradient is wanted.
        moved: [m] bool, the samples that are attacked. remembers: [m] bool, those of which something new is remembered,
            if it is only that they stayed at x.
        fraction: F_R after this minibatch.
    """

    loss: Tensor
    group: Tensor
    steps: Tensor
    weights: Tensor
    kept: Tensor
    x_adv: Tensor
    kept_adv: Tensor
    moved: Tensor
    remembers: Tensor
    fraction: float

    def perturbation(self, x: Tensor, recipe: Recipe, epsilon: float) -> Tensor:
        """Returns x' - x [m, ...], after the step from the update's gradient; call it after the loss's backward."""
        x_adv = self.x_adv
        if recipe.gradient and self.kept_adv.grad is not None:
            moved = self.kept_adv.detach() + recipe.gradient * epsilon * self.kept_adv.grad.sign()
            x_adv = x_adv.clone()
            x_adv[self.kept] = project(moved, x[self.kept], epsilon)
        return x_adv - x


def minibatch(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    recipe: Recipe,
    *,
    epsilon: float,
    fraction: float,
    delta: Tensor | None,
    generator: torch.Generator,
) -> Minibatch:
    """Attacks a minibatch and returns its loss, with the model in train mode.

    Args:
        x: [m, C, H, W] in [0, 1]. y: [m] int64.
        fraction: F_R. delta: [m, C, H, W], what is remembered of these crops, or None.
        generator: draws the noise of all samples, then which robust ones stand for all.
    """
    # no cache: in torch 2.6 it keeps weights that were cast without gradients, and the update would not reach them
    with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16, cache_enabled=False):
        return _minibatch(model, x, y, recipe, epsilon, fraction, delta, generator)


def _minibatch(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    recipe: Recipe,
    epsilon: float,
    fraction: float,
    delta: Tensor | None,
    generator: torch.Generator,
) -> Minibatch:
    m = len(x)
    model.train(recipe.one_clean)
    with torch.set_grad_enabled(recipe.one_clean):
        z = model(x).to(x.dtype)
    known = z.detach()
    group = groups(known, y, fraction) if recipe.mining else torch.full_like(y, BOUNDARY)
    steps, sizes = (_by_group(group, values) for values in (recipe.steps, recipe.step_sizes))
    noise = NOISE * torch.randn(x.shape, dtype=x.dtype, generator=generator)
    weights = half_of(group, generator) if recipe.half else torch.ones(m)
    out_before = (weights == 0) & (recipe.half == "before")
    steps = steps.long() * ~out_before
    moved = steps > 0
    if recipe.gradient:
        moved = (group != OUTLIER) & ~out_before
    start = x + noise if delta is None else (x + (delta + noise).clamp(-epsilon, epsilon)).clamp(0.0, 1.0)
    start = torch.where(_wide(moved), start, x)
    x_adv = attack(model, x, start, known.softmax(dim=1), y, steps, sizes * epsilon, epsilon, recipe.margin)

    model.train()
    if not recipe.one_clean:
        z = model(x).to(x.dtype)
    kept = ((weights > 0) & (moved | (not recipe.skip))).nonzero().flatten()
    kept_adv = x_adv[kept].requires_grad_(bool(recipe.gradient))
    loss, hits = F.cross_entropy(z, y), (z.argmax(dim=1) == y).to(weights.dtype)
    if len(kept):
        z_adv = model(kept_adv).to(x.dtype)
        loss = loss + recipe.beta / m * (weights[kept].to(x.dtype) * divergence(z_adv, z[kept])).sum()
        hits[kept] = (z_adv.argmax(dim=1) == y[kept]).to(weights.dtype)
    robust = float((weights * hits).sum()) / m
    next_fraction = MOMENTUM * fraction + (1.0 - MOMENTUM) * GAMMA * robust
    return Minibatch(loss, group, steps, weights, kept, x_adv, kept_adv, moved, ~out_before, next_fraction)


def groups(logits: Tensor, y: Tensor, fraction: float) -> Tensor:
    """Returns each sample's group [m] by its clean logits (paper, Eq. 4 and Eq. 6)."""
    p, correct = logits.double().softmax(dim=1), logits.argmax(dim=1) == y
    svar = torch.where(correct, 1.0, -1.0) * (p - 1.0 / p.shape[1]).square().mean(dim=1)
    threshold = max(0.0, float(np.quantile(svar.numpy(), 1.0 - fraction)))
    robust = correct & (svar >= threshold) & (fraction > 0.0)
    return torch.where(correct, torch.where(robust, ROBUST, BOUNDARY), OUTLIER)


def half_of(group: Tensor, generator: torch.Generator) -> Tensor:
    """Returns weights [m]: of n robust samples ⌈n/2⌉ drawn ones have n/⌈n/2⌉ and the others 0; else 1."""
    robust = (group == ROBUST).nonzero().flatten()
    stay = robust[torch.randperm(len(robust), generator=generator)[: -(-len(robust) // 2)]]
    weights = torch.ones(len(group))
    weights[robust] = 0.0
    weights[stay] = len(robust) / max(len(stay), 1)
    return weights


def attack(
    model: nn.Module,
    x: Tensor,
    start: Tensor,
    target: Tensor,
    y: Tensor,
    steps: Tensor,
    sizes: Tensor,
    epsilon: float,
    margin: float,
) -> Tensor:
    """Returns x' [m, ...]: each sample's `steps` of its own size up the inner loss, in eval mode; arguments as above.

    Each step runs the samples that still have steps.
    """
    model.eval()
    x_adv = start.clone()
    for step in range(int(steps.max())):
        rows = (steps > step).nonzero().flatten()
        at = x_adv[rows].requires_grad_()
        z = model(at).to(x.dtype)
        inner = F.kl_div(z.log_softmax(dim=1), target[rows], reduction="sum")
        if margin:
            wrong = z.scatter(1, y[rows, None], -torch.inf).amax(dim=1)
            inner = inner + margin * (wrong - z.gather(1, y[rows, None])[:, 0]).sum()
        (gradient,) = torch.autograd.grad(inner, [at])
        moved = at.detach() + _wide(sizes[rows]).to(x.dtype) * gradient.sign()
        x_adv[rows] = project(moved, x[rows], epsilon)
    return x_adv


def project(moved: Tensor, x: Tensor, epsilon: float) -> Tensor:
    """Returns the nearest images within ε of x and in [0, 1]."""
    return torch.min(torch.max(moved, x - epsilon), x + epsilon).clamp(0.0, 1.0)


def divergence(z_adv: Tensor, z: Tensor) -> Tensor:
    """Returns KL(softmax z ‖ softmax z') of each row."""
    return F.kl_div(z_adv.log_softmax(dim=1), z.log_softmax(dim=1), reduction="none", log_target=True).sum(dim=1)


def _by_group(group: Tensor, values: tuple[float, float, float]) -> Tensor:
    """Returns each sample's value [m] float64, of (boundary, robust, outlier) ones."""
    boundary, robust, outlier = values
    return torch.tensor([outlier, boundary, robust], dtype=torch.float64)[group]


def _wide(values: Tensor) -> Tensor:
    return values[:, None, None, None]


# Forward-pass equivalents


def rows_by_arithmetic(recipe: Recipe, group: Tensor) -> int:
    """Returns an iteration's rows, each one forward pass of an image, of samples with these groups [m]."""
    m = len(group)
    if recipe.authors:
        return m * (3 * recipe.steps[0] + 9)
    boundary, robust, outlier = (int((group == member).sum()) for member in (BOUNDARY, ROBUST, OUTLIER))
    half = -(-robust // 2) if recipe.half else robust
    attacked = (boundary, half if recipe.half == "before" else robust, outlier)
    of_steps = sum(n * count for n, count in zip(recipe.steps, attacked, strict=True))
    takes_part = [bool(n or not recipe.skip) for n in recipe.steps]
    if recipe.gradient:
        takes_part[:2] = [True, True]
    forward = sum(count for count, taken in zip((boundary, half, outlier), takes_part, strict=True) if taken)
    return (0 if recipe.one_clean else m) + 2 * of_steps + 3 * m + 3 * forward


class Rows:
    """Counts a model's rows as they are run: one for a forward, one for a gradient of x', two for one of the weights.

    Within its `with` blocks. In eval mode only gradients of images are taken here, and in train mode those of the
    weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self.count = 0
        self._model = model

    def __enter__(self) -> Rows:
        self._hook = self._model.register_forward_hook(self._forward)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()  # a model with hooks is not folded when it is judged

    def _forward(self, module: nn.Module, images: Any, logits: Tensor) -> None:
        self.count += len(logits)
        if logits.requires_grad:
            logits.register_hook(self._backward(len(logits) * (2 if module.training else 1)))

    def _backward(self, rows: int) -> Callable[[Tensor], None]:
        def count(gradient: Tensor) -> None:
            self.count += rows

        return count
