"""Labels of samples: a class for each, or a distribution over the classes, as CutMix, Mixup and teachers give."""

from __future__ import annotations

import torch
from torch import Tensor

from bt_fast.ops.numeric import computable, kind_of
from bt_fast.validation import check_device, check_floating, check_labels

ROUNDING = 1e-5  # by which a distribution's sum may miss 1; in 16 bits it is four units in the last place of 1


def is_soft(labels: object) -> bool:
    """Whether labels are distributions [m, K], not classes [m]."""
    return isinstance(labels, Tensor) and labels.is_floating_point()


def class_of(labels: Tensor) -> Tensor:
    """The class of each label, [m] int64: who predicts it is right. Of a distribution it is the largest part.

    The first of equal parts counts. A row that is no distribution has -1, which is no class: a fault wherever labels
    are checked. Never waits for the device.
    """
    classes = largest_part(labels)
    return classes.masked_fill_(~_are_distributions(labels), -1) if is_soft(labels) else classes


def largest_part(labels: Tensor) -> Tensor:
    """As `class_of`, of labels that have been checked and may have been widened since, which their sums show."""
    return labels.argmax(dim=1) if is_soft(labels) else labels.long()


def target_of(labels: Tensor, like: Tensor) -> Tensor:
    """Labels as distributions [m, K] with the columns and dtype of `like`.

    A class out of range, an error later, has a row without a 1.
    """
    if is_soft(labels):
        return labels.to(like.dtype)
    return (torch.arange(like.shape[1], device=labels.device) == labels.long()[:, None]).to(like.dtype)


def for_loss(labels: Tensor, dtype: torch.dtype) -> Tensor:
    """Labels as an objective takes them: [m] int64, or distributions [m, K] of this dtype."""
    return labels.to(dtype) if is_soft(labels) else labels.long()


def _are_distributions(labels: Tensor) -> Tensor:
    """Bool [m]: whether a row of floating-point labels [m, K] is at least 0 and sums to 1, but for rounding."""
    room = max(4.0 * torch.finfo(labels.dtype).eps, ROUNDING)
    return (labels >= 0).all(dim=1) & ((labels.double().sum(dim=1) - 1.0).abs() <= room)


# Arguments


def check_either(labels: Tensor | None, m: int, device: torch.device, name: str = "labels") -> None:
    """Raise TypeError or ValueError that names `name` unless labels are integers [m] or floating point [m, K]."""
    if not isinstance(labels, Tensor) or not labels.is_floating_point() or labels.dim() != 2:
        check_labels(labels, m, device, name)
        return
    if not computable(labels):
        raise TypeError(f"{name} must be dense distributions, got {kind_of(labels)}: write {name}.to_dense().float()")
    if len(labels) != m or labels.shape[1] < 2:
        instead = f"write {name}.squeeze(1).long()" if labels.shape == (m, 1) else f"give as many {name} as images"
        raise ValueError(
            f"{name} must have shape [{m}, K], a distribution over K >= 2 classes for each sample, got "
            f"{list(labels.shape)}: {instead}"
        )
    check_device(name, labels, device, "the samples", "are")


def check_classes(name: str, labels: Tensor, classes: int) -> None:
    """Raise ValueError that names `name` where checked labels are distributions over another number of classes."""
    if is_soft(labels) and labels.shape[1] != classes:
        raise ValueError(
            f"{name} must have a column for each of the model's {classes} classes, got shape {list(labels.shape)}: "
            f"write num_classes={classes} where {name} are made"
        )


def check_without_gradient(name: str, labels: Tensor | None) -> None:
    """Raise ValueError that names `name` where labels require a gradient: a loss gives them none."""
    if labels is not None and labels.requires_grad:
        raise ValueError(f"{name} must not require a gradient, which no loss here gives them: write {name}.detach()")


def check_logits_and_labels(logits: Tensor, labels: Tensor) -> None:
    """Raise TypeError or ValueError unless logits are floating point [m, K], K ≥ 2, and labels fit them.

    Labels are integers [m] or distributions [m, K].
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a tensor, got {type(logits).__name__}: write torch.as_tensor(logits)")
    check_floating("logits", logits, "write logits.float()")
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"logits must have shape [m, K] with K >= 2 classes, got {list(logits.shape)}: "
            "give a row for each sample and a column for each class"
        )
    check_either(labels, len(logits), logits.device)
    check_classes("labels", labels, logits.shape[1])
