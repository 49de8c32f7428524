"""The inner losses: what an attack ascends, as directions with respect to the model's outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from bt_fast import ops
from bt_fast.attack.dlr import LEAST_CLASSES, dlr
from bt_fast.ops import rows as logit_rows
from bt_fast.ops.numeric import computable, kind_of
from bt_fast.validation import check_device

InnerLoss = Literal["kl", "cross_entropy", "margin", "dlr", "lse"]
NAMES: tuple[str, ...] = get_args(InnerLoss)
TARGETED: Final = "dlr_targeted"
OF_CLEAN = ("kl", "lse")
SHORT = {"ce": "cross_entropy"}  # as evaluations call it


@dataclass(frozen=True, eq=False)
class Rows:
    """The samples of one attack step, as a function `inner(outputs, rows) -> [n]` of your own is given them.

    Such a function is the inner loss of `PGD(..., inner=inner)`, of `APGD`, `evaluate(loss=inner)` and `generate`. It
    returns the loss of each of n samples, which the attack increases. `outputs` [n, d] are the model's for x', in
    float32 (float64 for float64 outputs), with gradient; it computes with these and with the fields below:

        def away(outputs: Tensor, rows: Rows) -> Tensor:  # RobustVLM: away from the clean embedding
            return (outputs - rows.clean_outputs).square().sum(dim=1)

    Row i of all of them is one sample, but not sample i of the minibatch: the attack works by descending steps, and
    samples that have no steps left are not among the n. So further tensors of a sample are found by its label: in
    `perturb` without mining call it with `y=torch.arange(m)`, and take `texts[rows.labels]`. The function is called in
    each step, eagerly and with gradients enabled, and must treat each row alone. The attack makes these objects.

    Attributes:
        clean_outputs: [n, d] float32 (float64 for float64 outputs), the model's for the clean images, computed once,
            without gradient.
        labels: y of these samples: [n] int64, or [n, K] in `clean_outputs`' dtype. None in `generate`, and in `perturb`
            with `y=None`.
    """

    clean_outputs: Tensor
    labels: Tensor | None


InnerFunction = Callable[[Tensor, Rows], Tensor]
Inner = InnerLoss | InnerFunction
OfAPGD = Inner | Literal["dlr_targeted"]


def check_inner(name: str, inner: object, names: tuple[str, ...] = NAMES, *, optional: bool = True) -> None:
    """Raise TypeError or ValueError that names `name` unless it is a loss of these names, a function, or maybe None."""
    if (inner is None and optional) or (isinstance(inner, str) and inner in names):
        return
    if isinstance(inner, (str, type)) or not callable(inner):
        raise (ValueError if isinstance(inner, str) else TypeError)(
            f"{name} must be one of {', '.join(map(repr, names))} or a function of (outputs, rows), got {inner!r}: "
            f"write {name}='cross_entropy'"
        )


def check_enough_classes(inner: OfAPGD, classes: int) -> None:
    """Raise ValueError where the inner loss needs more classes than the model has."""
    if not isinstance(inner, str) or classes >= (least := LEAST_CLASSES.get(inner, 1)):
        return
    below = "the third logit" if inner == "dlr" else "the mean of the third and the fourth logit"
    raise ValueError(
        f"inner={inner!r} divides by the gap of the first and {below}: the model must have K >= {least} classes, "
        f"got {classes}: write inner='margin'"
    )


def check_not_at_x(start: str | None, inner: OfAPGD | None) -> None:
    """Raise ValueError for a start at x where the inner loss has no gradient there."""
    if start == "clean" and isinstance(inner, str) and inner in OF_CLEAN:
        raise ValueError(
            f"attack must not start at x with the inner loss {inner!r}, a distance from x's own distribution, which "
            "has no gradient there: write start='uniform', or inner='cross_entropy'"
        )


def of_clean(inner: OfAPGD) -> bool:
    """Whether it compares with the clean outputs of each sample, and not with its label alone."""
    return not isinstance(inner, str) or inner in OF_CLEAN


def by_label(inner: OfAPGD) -> bool:
    """Whether it reads labels, and not a target alone."""
    return not isinstance(inner, str) or inner in ("margin", "dlr", TARGETED)


def direction_of(
    inner: OfAPGD,
    outputs: Tensor,
    target: Tensor,
    labels: Tensor | None,
    *,
    scaled: bool = False,
    together: bool = False,
) -> Tensor:
    """The inner loss's gradient with respect to the outputs z: of rows with a NaN in them NaN.

    - "kl": `KL(target ‖ softmax(z))`, the target being the clean distribution; "cross_entropy": being the label.
    - "margin": the largest wrong logit minus the true one (Carlini and Wagner's f_6 without confidence).
    - "dlr": `-(z_y - max_{k≠y} z_k) / (z_(1) - z_(3) + 1e-12)`, z_(i) the i-th largest (Croce and Hein, 2020).
    - "lse": `‖softmax(z) - target‖²`, the target being the clean distribution (SCORE, Pang et al., 2022).
    - A function of (outputs, rows) returns the loss of each row.

    "dlr_targeted" is of `inner_values` alone, whose goals it needs.

    Args:
        outputs: [n, d] floating point without gradient, logits but for a function.
        target: [n, d], probabilities; for a function the clean outputs.
        labels: [n] int64 in 0..d-1, of "margin" and "dlr"; for a function as they are.
        scaled: whether each row is times a power of two of its own, against small numbers' loss in float16.
        together: whether scaled rows have one factor in common, since rows' input gradients depend on each other.

    Returns:
        [n, d] in the outputs' dtype.
    """
    if inner in ("kl", "cross_entropy") and not (scaled and together):
        return ops.ascent_direction(outputs, target, scaled)
    z = outputs.to(logit_rows.result_dtype(outputs))
    if not isinstance(inner, str):
        return fitted(of_function(inner, z, Rows(target, labels))[1], outputs, z.isnan().any(dim=1), scaled, together)
    direction = _of_name(inner, z, target.to(z.dtype), labels)
    return fitted(direction, outputs, ~logit_rows.has_softmax(z), scaled, together)


def fitted(direction: Tensor, outputs: Tensor, unfit: Tensor, scaled: bool, together: bool) -> Tensor:
    """A direction [n, d] as `direction_of` gives it: rows `unfit` [n] bool are NaN, scaled, in the outputs' dtype."""
    direction = torch.where(unfit[:, None], math.nan, direction)
    if scaled:
        direction = _scaled(direction, together)
    return direction.to(outputs.dtype)


def _of_name(inner: str, z: Tensor, target: Tensor, labels: Tensor | None) -> Tensor:
    if target.shape != z.shape:
        raise ValueError(
            f"target must have shape {list(z.shape)} like the logits, got {list(target.shape)}: "
            "give a column for each class of the model"
        )
    if inner in ("kl", "cross_entropy"):
        return ops.ascent_direction(z, target, False)
    if inner == "lse":
        p = logit_rows.softmax(z).to(z.dtype)  # rounded once, so that a clean row has the direction 0
        gap = p - target
        return 2.0 * p * (gap - (p * gap).sum(dim=1, keepdim=True))
    assert labels is not None
    assert inner != TARGETED
    return _margin(z, labels[:, None]) if inner == "margin" else dlr(z, labels)[1]


def _margin(z: Tensor, at: Tensor) -> Tensor:
    """1 at the first largest wrong logit and -1 at the label."""
    wrong = z.scatter(1, at, -math.inf).argmax(dim=1, keepdim=True)
    return torch.zeros_like(z).scatter_(1, wrong, 1.0).scatter_(1, at, -1.0)


def of_function(inner: InnerFunction, z: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """The function's values [n] of outputs z [n, d], and the gradient of their sum: NaN where the value is."""
    z = z.detach().requires_grad_()
    with torch.enable_grad():
        values = inner(z, rows)
    if not isinstance(values, Tensor) or not computable(values):
        raise TypeError(
            f"inner must return a floating-point tensor, got {kind_of(values)}: let it return one number for each row"
        )
    if values.shape != (len(z),):
        raise ValueError(
            f"inner must return shape [{len(z)}], one loss for each row, got {list(values.shape)}: "
            "let it sum over the outputs only, with .sum(dim=1)"
        )
    check_device("inner's result", values, z.device, "the outputs")
    gradient = None
    if values.requires_grad:
        (gradient,) = torch.autograd.grad(values, z, torch.ones_like(values), allow_unused=True)
    if gradient is None:
        raise ValueError(
            "inner must return a loss with a gradient to its outputs, but gave one without: "
            "take .detach(), torch.no_grad() or a rounding out of it"
        )
    values = values.detach()
    return values, torch.where(values.isnan()[:, None], math.nan, gradient)


def _scaled(direction: Tensor, together: bool) -> Tensor:
    """Times the power of two that brings the largest entry, of each row or of all, to [1, 2); a row with NaN is NaN."""
    largest = direction.abs().amax(dim=1, keepdim=True)
    finite = largest.isfinite()
    if together:
        largest = torch.where(finite, largest, 0.0).amax(dim=0, keepdim=True)
    exponent = (1 - torch.frexp(largest).exponent).clamp(-126, 126)
    return torch.where(finite, torch.ldexp(direction, exponent), math.nan)
