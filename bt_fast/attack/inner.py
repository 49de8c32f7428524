"""The inner losses: what an attack ascends, as directions with respect to the model's outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from bt_fast import ops
from bt_fast.ops import rows as logit_rows
from bt_fast.ops.numeric import kind_of

InnerLoss = Literal["kl", "cross_entropy", "margin", "dlr", "lse"]
NAMES: tuple[str, ...] = get_args(InnerLoss)
SHORT = {"ce": "cross_entropy"}  # as evaluations call it


@dataclass(frozen=True, eq=False)
class Rows:
    """The n samples of an attack step, as an inner loss of one's own `(outputs, rows) -> [n]` is given them.

    They are in the order in which the attack works, by descending steps, and those that have no steps left are not
    among them: row i is not sample i of the minibatch.

    Attributes:
        clean_outputs: [n, d] float32 (float64 for float64 outputs), the model's for the clean samples, no gradient.
        labels: [n] int64, or distributions [n, K] where such are given; None where there are none.
    """

    clean_outputs: Tensor
    labels: Tensor | None


InnerFunction = Callable[[Tensor, Rows], Tensor]
Inner = InnerLoss | InnerFunction


def check_inner(name: str, inner: object, *, optional: bool = True) -> None:
    """Raise TypeError or ValueError that names `name` unless it is a named loss or a function, or optional and None."""
    if (optional and inner is None) or (isinstance(inner, str) and inner in NAMES):
        return
    if isinstance(inner, (str, type)) or not callable(inner):
        raise (ValueError if isinstance(inner, str) else TypeError)(
            f"{name} must be one of {', '.join(map(repr, NAMES))} or a function of (outputs, rows), got {inner!r}: "
            f"write {name}='cross_entropy'"
        )


def check_enough_classes(inner: Inner, classes: int) -> None:
    """Raise ValueError where the inner loss needs more classes than the model has."""
    if inner == "dlr" and classes < 3:
        raise ValueError(
            f"inner='dlr' divides by the gap of the first and the third logit: the model must have K >= 3 classes, "
            f"got {classes}: write inner='margin'"
        )


def of_clean(inner: Inner) -> bool:
    """Whether it compares with the clean outputs of each sample, and not with its label alone."""
    return not isinstance(inner, str) or inner in ("kl", "lse")


def by_label(inner: Inner) -> bool:
    """Whether it reads labels, and not a target alone."""
    return not isinstance(inner, str) or inner in ("margin", "dlr")


def direction_of(
    inner: Inner,
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
        direction, unfit = _of_function(inner, z, Rows(target, labels)), z.isnan().any(dim=1)
    else:
        direction, unfit = _of_name(inner, z, target.to(z.dtype), labels), ~logit_rows.has_softmax(z)
    direction = torch.where(unfit[:, None], math.nan, direction)
    if scaled:
        direction = _scaled(direction, together)
    return direction.to(outputs.dtype)


def _of_name(inner: str, z: Tensor, target: Tensor, labels: Tensor | None) -> Tensor:
    if inner in ("kl", "cross_entropy"):
        return ops.ascent_direction(z, target, False)
    if inner == "lse":
        p = logit_rows.softmax(z).to(z.dtype)  # rounded once, so that a clean row has the direction 0
        gap = p - target
        return 2.0 * p * (gap - (p * gap).sum(dim=1, keepdim=True))
    assert labels is not None
    at = labels[:, None]
    return _margin(z, at) if inner == "margin" else _dlr(z, at)


def _margin(z: Tensor, at: Tensor) -> Tensor:
    """1 at the first largest wrong logit and -1 at the label."""
    wrong = z.scatter(1, at, -math.inf).argmax(dim=1, keepdim=True)
    return torch.zeros_like(z).scatter_(1, wrong, 1.0).scatter_(1, at, -1.0)


def _dlr(z: Tensor, at: Tensor) -> Tensor:
    """With the margin a and the gap b of the DLR loss a / b: `∇a / b - a/b · ∇b / b`."""
    top, places = z.topk(3, dim=1)
    first, second, third = places.split(1, dim=1)
    true_first = first == at
    wrong = torch.where(true_first, second, first)
    largest_wrong = torch.where(true_first, top[:, 1:2], top[:, :1])
    gap = top[:, :1] - top[:, 2:] + 1e-12
    loss = (largest_wrong - z.gather(1, at)) / gap
    classes = torch.arange(z.shape[1], device=z.device)
    of_margin, of_gap = (
        (classes == up).to(z.dtype) - (classes == down).to(z.dtype) for up, down in ((wrong, at), (first, third))
    )
    return (of_margin - loss * of_gap) / gap


def _of_function(inner: InnerFunction, z: Tensor, rows: Rows) -> Tensor:
    """The gradient of the sum of the function's values, one of each row."""
    z = z.detach().requires_grad_()
    with torch.enable_grad():
        values = inner(z, rows)
    if not isinstance(values, Tensor) or not values.is_floating_point():
        raise TypeError(
            f"inner must return a floating-point tensor, got {kind_of(values)}: let it return one number for each row"
        )
    if values.shape != (len(z),):
        raise ValueError(
            f"inner must return shape [{len(z)}], one loss for each row, got {list(values.shape)}: "
            "let it sum over the outputs only, with .sum(dim=1)"
        )
    gradient = None
    if values.requires_grad:
        (gradient,) = torch.autograd.grad(values, z, torch.ones_like(values), allow_unused=True)
    if gradient is None:
        raise ValueError(
            "inner must return a loss with a gradient to its outputs, but gave one without: "
            "take .detach(), torch.no_grad() or a rounding out of it"
        )
    return gradient


def _scaled(direction: Tensor, together: bool) -> Tensor:
    """Times the power of two that brings the largest entry, of each row or of all, to [1, 2); a row with NaN is NaN."""
    largest = direction.abs().amax(dim=1, keepdim=True)
    finite = largest.isfinite()
    if together:
        largest = torch.where(finite, largest, 0.0).amax(dim=0, keepdim=True)
    exponent = (1 - torch.frexp(largest).exponent).clamp(-126, 126)
    return torch.where(finite, torch.ldexp(direction, exponent), math.nan)
