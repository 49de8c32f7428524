"""Checks of a memory's arguments, and of what it is given to load."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bt_fast.faults import Fault
from bt_fast.ops.frames import STORED
from bt_fast.placement import Placement, check_form
from bt_fast.validation import check_kind, check_labels, holds_integers, step_count

INDICES = "give each sample's number in its data set, as in criterion(model, x, y, indices=indices)"


def check_same(either: dict[str, tuple[Any, Any]], of: str, instead: str) -> None:
    """Raise ValueError unless each name is the same of both, `own` and that `of` something else."""
    for name, (own, other) in either.items():
        if own != other:
            raise ValueError(f"memory must have the {name} of {of}, {other}, got {own}: {instead} {name}")


def check_state(saved: dict[str, Any], own: dict[str, Any], known: dict[str, Any], path: Path | None) -> None:
    """Raise ValueError unless a saved memory is of the same data set and file.

    Args:
        saved, own: what it and the memory that loads it say of themselves. known: what the latter was told, which need
            not have been remembered yet. path: of its file.
    """
    either = {name: (known.get(name, own[name]), saved.get(name)) for name in own if name != "file"}
    optional = ("shape", "dtype", "fingerprint")
    either = {name: two for name, two in either.items() if not (name in optional and None in two)}
    check_same(either, "the saved memory", "load it into a Memory of the same data set, made with the same")
    if own["file"] is not None and saved.get("file") is None:
        raise ValueError(
            f"path must be a new file for a state that was saved before anything was remembered, got {str(path)!r}, "
            "in which something is: write another path"
        )
    if own["file"] != saved.get("file"):
        raise ValueError(
            f"path must be the file that was saved with this state, {saved.get('file')}, got {own['file']}: bring "
            "that file back, or leave the entries that begin with 'memory.' out of the state to begin anew"
        )


def checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The sizes of a sample; TypeError or ValueError unless they are such."""
    if not isinstance(shape, (tuple, list)):
        raise TypeError(f"shape must be a tuple of a sample's sizes, got {shape!r}: write shape=(3, 32, 32)")
    return tuple(step_count("shape", size, least=1) for size in shape)


def checked_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    """The type in which a memory stores; ValueError unless it can."""
    if dtype is not None and dtype not in STORED:
        listed = ", ".join(map(str, STORED))
        raise ValueError(f"dtype must be one of {listed}, or None, got {dtype!r}: write dtype=torch.float16")
    return dtype


def check_norm(dtype: torch.dtype | None, l2: bool) -> None:
    """Raise ValueError unless a memory of this dtype, if it has one, can hold perturbations of that norm."""
    if l2 and dtype == torch.int8:
        raise ValueError(
            "memory's dtype must be floating point in l2, got torch.int8: write Memory(samples, dtype=torch.float16)"
        )


def checked_steps(steps: tuple[int, int, int]) -> tuple[int, int, int]:
    """The steps of the three groups; TypeError or ValueError unless they are such."""
    if not isinstance(steps, (tuple, list)) or len(steps) != 3:
        raise TypeError(f"steps must be three numbers, of boundary, robust and outlier samples, got {steps!r}: "
                        "write steps=(1, 1, 0)")  # fmt: skip
    boundary, robust, outlier = steps
    return step_count("steps", boundary, least=1), step_count("steps", robust), step_count("steps", outlier)


def checked_share(share: Tensor, samples: int) -> Tensor:
    """The numbers of a rank's samples, ascending; TypeError or ValueError unless they are such."""
    instead = "write torch.arange(rank, samples, ranks)"
    check_kind("share", share, Tensor, instead)
    if share.dim() != 1 or not holds_integers(share) or not len(share):
        got = f"{list(share.shape)} {share.dtype}"
        raise TypeError(f"share must be integers [n], the numbers of this rank's samples, got {got}: {instead}")
    numbers: Tensor = share.detach().long().unique()
    if len(numbers) != len(share) or numbers[0] < 0 or numbers[-1] >= samples:
        raise ValueError(f"share must hold different numbers in 0..{samples - 1}, got others: {instead}")
    return numbers


def digest(share: Tensor | None) -> str | None:
    """Identifies a rank's share of the samples."""
    return None if share is None else hashlib.sha256(share.cpu().numpy().tobytes()).hexdigest()


def check_view(x: Tensor, placement: Placement | None, shape: tuple[int, ...]) -> None:
    """Raises TypeError or ValueError unless images x [m, ...] are frames of this shape, or have a placement in them."""
    if placement is not None:
        check_form(placement, len(x), x.shape[1:], shape, x.device)
    elif tuple(x.shape[1:]) != shape:
        raise ValueError(
            f"images must have the memory's shape {list(shape)} where they have no placement, got "
            f"{list(x.shape[1:])}: write placement=Placement(top, left, mirrored) of crops, or Memory(samples, "
            f"{tuple(x.shape[1:])})"
        )


def check_numbers(indices: object) -> None:
    """Raises TypeError or ValueError unless they are a tensor of integers [m], on any device."""
    of = indices if isinstance(indices, Tensor) and indices.dim() else torch.empty(1, device="cpu")
    check_labels(indices, len(of), of.device, "indices")  # type: ignore[arg-type]


def rows_of(numbers: Tensor, samples: int, share: Tensor | None) -> tuple[Fault, Fault, Tensor]:
    """Which of the numbers [m] int64 are wrong, those that are there twice, and each sample's row; of a wrong one any.

    Args:
        samples: how many the data set has. share: ascending, the numbers of those that are here; None: all.
    """
    m, ordered = len(numbers), numbers.sort().values
    again = (ordered[1:] == ordered[:-1]).sum()
    if share is None:
        rows = numbers.clamp(0, samples - 1)
        outside = numbers != rows
        text = f"indices must lie in 0..{samples - 1}, but {{count}} of {m} do not: {INDICES}"
    else:
        rows = torch.searchsorted(share, numbers).clamp_(max=len(share) - 1)
        outside = share[rows] != numbers
        text = (
            f"indices must be of this rank's share of {len(share)} samples, but {{count}} of {m} are not: "
            "let the sampler give each rank the samples of its share in every epoch"
        )
    twice = f"indices must be all different, but {{count}} of {m} are there again: leave second copies out"
    return Fault(outside.sum(), text), Fault(again, twice), rows
