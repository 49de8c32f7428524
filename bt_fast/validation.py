"""Checks of arguments: an error names the argument, what was given, what was expected, and what to write instead."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable
from types import NoneType
from typing import Any, SupportsIndex

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bt_fast.ops.numeric import computable, kind_of

# Tensors


def check_floating(name: str, values: object, instead: str, must: str = "must be floating point") -> None:
    """Raise TypeError unless `values` is a dense tensor in a floating-point type that torch computes with."""
    if not isinstance(values, Tensor) or not computable(values):
        raise TypeError(f"{name} {must}, got {kind_of(values)}: {instead}")


def holds_integers(values: Tensor) -> bool:
    """Whether a tensor has an integer type; bool does not count."""
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)


def check_device(name: str, values: Tensor, device: torch.device, like: str, verb: str = "is") -> None:
    """Raises ValueError unless `values` are on the device, on which `like` are."""
    if values.device != device:
        raise ValueError(
            f"{name} must be on {device} like {like}, but {verb} on {values.device}: write {name}.to({str(device)!r})"
        )


def check_pixels(x: Tensor, name: str) -> None:
    """Raise TypeError that names `name` unless x is a tensor of floating-point images."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of images, got {type(x).__name__}: write torch.as_tensor({name})")
    if not computable(x):
        raise TypeError(f"{name} must be floating-point images, got {kind_of(x)}: of bytes write x.float() / 255")


def check_labels(labels: Tensor | None, m: int, device: torch.device, name: str = "labels") -> None:
    """Raise TypeError or ValueError that names `name` unless labels are integers [m] on the device."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a tensor of integers, got {type(labels).__name__}: write torch.as_tensor(...)")
    one_hot = ".argmax(dim=1), if they are one-hot"
    if not holds_integers(labels):
        instead = one_hot if labels.dim() == 2 else ".long()"
        raise TypeError(f"{name} must be integers, got {labels.dtype}: write {name}{instead}")
    if labels.shape != (m,):
        instead = f"give as many {name} as images"
        if labels.dim() == 2 and len(labels) == m:
            instead = f"write {name}{'.squeeze(1)' if labels.shape[1] == 1 else one_hot}"
        raise ValueError(f"{name} must have shape [{m}], one for each sample, got {list(labels.shape)}: {instead}")
    check_device(name, labels, device, "the samples", "are")


# Numbers


def step_count(name: str, value: SupportsIndex, least: int = 0) -> int:
    """`value` as an int; TypeError or ValueError that names `name` unless it is an integer of at least `least`."""
    try:
        if isinstance(value, bool):
            raise TypeError
        count = operator.index(value)
    except TypeError as error:  # also from tensors and arrays
        raise TypeError(
            f"{name} must be an integer, got {value!r}: write a whole number, as {name}={max(least, 1)}"
        ) from error
    if count < least:
        raise ValueError(f"{name} must be at least {least}, got {count}: write {name}={least} or more")
    return count


def real(name: str, value: Any) -> float:
    """`value` as a float; TypeError or ValueError that names `name` unless it is a real number that fits."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}: write float({name}), if it holds one")
    try:
        return float(value)
    except OverflowError as error:  # from an integer or a fraction
        raise ValueError(
            f"{name} must be a number that fits into a float, got a larger one: write a smaller one"
        ) from error


def positive(name: str, value: float, instead: str | None = None) -> float:
    """`value` as a float; TypeError or ValueError that names `name` unless it is a finite number greater than 0."""
    number = real(name, value)
    if not 0 < number < math.inf:
        instead = instead or f"write {name}=8/255, or another size of pixels"
        raise ValueError(f"{name} must be a finite number greater than 0, got {value}: {instead}")
    return number


def size(name: str, value: float) -> float:
    """`value` as a float; TypeError or ValueError that names `name` unless it is a finite number of at least 0."""
    number = real(name, value)
    if not 0 <= number < math.inf:
        instead = f"write {name}=8/255, or another size of pixels"
        raise ValueError(f"{name} must be a finite number of at least 0, got {value}: {instead}")
    return number


def size_of_step(name: str, value: float, epsilon: float) -> float:
    """`value` as a float; TypeError or ValueError unless it is a finite number greater than 0, or 0 where ε is."""
    return positive(name, value) if epsilon else size(name, value)


def weight(name: str, value: float) -> float:
    """`value` as a float; TypeError or ValueError that names `name` unless it is a finite number of at least 0."""
    number = real(name, value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be a finite number of at least 0, got {value}: write {name}=6.0")
    return number


# Objects


def check_model(model: nn.Module) -> None:
    """Raise TypeError unless it is a module."""
    check_kind("model", model, nn.Module, "of a function make the forward of one")


def check_kind(name: str, value: object, kind: type, instead: str, *, optional: bool = False) -> None:
    """Raise TypeError that names `name` and ends with `instead` unless `value` is of the kind, or optional and None."""
    if isinstance(value, kind) or (optional and value is None):
        return
    of, *package = kind.__name__, *kind.__module__.split(".")[:2]
    if package[0] == "torch":  # as users write it: torch.Tensor, torch.nn.Module
        of = ".".join([part for part in package if not part.startswith("_")] + [of])
    expected = f"{'an' if of[0] in 'AEIOU' else 'a'} {of}{' or None' if optional else ''}"
    raise TypeError(f"{name} must be {expected}, got {type(value).__name__}: {instead}")


def check_choice(name: str, value: object, choices: Iterable[str | None]) -> None:
    """Raise ValueError that names `name` unless `value` is one of the choices."""
    known = tuple(choices)
    if not isinstance(value, (str, NoneType)) or value not in known:
        listed = ", ".join(map(repr, known))
        raise ValueError(f"{name} must be one of {listed}, got {value!r}: write {name}={known[0]!r}")


def check_generator(generator: torch.Generator | None, device: torch.device) -> None:
    """Raise TypeError or ValueError unless it is a generator for the images' device, or None."""
    instead = f"write torch.Generator({str(device)!r}).manual_seed(0)"
    check_kind("generator", generator, torch.Generator, instead, optional=True)
    if generator is not None and generator.device.type != device.type:
        raise ValueError(f"generator must be on {device} like the images, but is on {generator.device}: {instead}")


def check_process_group(group: object) -> None:
    """Raise TypeError unless it is a process group, or None."""
    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup or None, got {group!r}: "
            "write torch.distributed.group.WORLD"
        )
