"""The memory of a run's method: its file, the images that a rank remembers, and what a checkpoint holds of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bt_fast.lab.config import RunConfig
from bt_fast.lab.world import World
from bt_fast.memory import Memory
from bt_fast.memory_file import header_of


def new_memory(
    config: RunConfig, shape: torch.Size, ranks_of: Tensor, rank: int, fingerprint: str, path: Path
) -> Memory:
    """Returns the memory of a method with this configuration.

    Args:
        shape: of an image.
        ranks_of: int64 [n], the rank that sees each image. rank: this one.
        fingerprint: of the data.
        path: of its file, if it lies in one, which is opened if it is there.
    """
    storage: Any = config.memory_storage
    if storage == "file":
        path.parent.mkdir(parents=True, exist_ok=True)
    return Memory(
        len(ranks_of),
        tuple(shape),
        dtype=getattr(torch, config.memory_dtype),
        storage=storage,
        path=path if storage == "file" else None,
        share=(ranks_of == rank).nonzero()[:, 0] if ranks_of.any() else None,
        fingerprint=fingerprint,
    )


def file_of(folder: Path, method: str, rank: int) -> Path:
    """Returns the path of the file of a method's memory; each rank has its own."""
    return folder / f"memory-{method}-{rank}.mem"


def check_no_file(path: Path) -> None:
    """Raises ValueError if there is a file, so that a new run would begin with what another one remembered."""
    if path.exists() or header_of(path).exists():
        raise ValueError(f"{path.parent}: already holds a run's memory ({path.name}); name another folder with --out")


def remove_unsaved(path: Path, state: dict[str, Any]) -> None:
    """Removes the file of a memory that held nothing at its last checkpoint, whole or half made by a killed run."""
    if state["_extra_state"]["file"] is None:
        for left in (header_of(path), path, *path.parent.glob(f".{path.name}.*.part")):
            left.unlink(missing_ok=True)


def states_of(memory: Memory, world: World) -> list[dict[str, Any]]:
    """Returns the states of all ranks' memories on rank 0, for a checkpoint, and nothing on others. Collective."""
    state = memory.state_dict()
    if world.group is not None:
        state = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in state.items()}
    return world.gathered(state)


def own_state(states: list[dict[str, Any]], world: World) -> dict[str, Any]:
    """Returns this rank's part of a result of `states_of`; ValueError if it is of more or fewer ranks."""
    if len(states) != world.count:
        raise ValueError(
            f"it remembers the images of {len(states)} ranks, each its own share, got {world.count}: start as "
            f"many with torchrun --nproc-per-node {len(states)}"
        )
    return states[world.rank]


def mean_age(memory: Memory) -> float | None:
    """Returns how many epochs ago this rank's perturbations were written, in the mean; None if there are none."""
    ages = memory.ages()
    known = ages[ages.isfinite()]
    return float(known.mean()) if len(known) else None
