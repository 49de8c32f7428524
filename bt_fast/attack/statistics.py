"""The statistics by which batch norm normalises in an attack: its running ones, or those of the batch.

Those of the batch make a sample's result depend on its neighbours: there is no folded view then, no graph whose padding
would be a neighbour, and no mining, which drops samples from the batch. Of `SyncBatchNorm` the batch is that of all
ranks: every attack forward waits for theirs, and all take as many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bt_fast.attack.device import RandomStates
from bt_fast.attack.folded import Frozen, attack_model
from bt_fast.attack.forward import buffers_kept, caller_autocast, training_modes
from bt_fast.attack.wrapped import gathered, unwrapped
from bt_fast.validation import check_model

Statistics = Literal["running", "batch", "tracked"]
STATISTICS = ("running", "batch", "tracked")


@contextmanager
def attack_view(
    model: nn.Module, recipe: Frozen | None, x: Tensor, statistics: Statistics
) -> Iterator[Callable[[Tensor], Tensor]]:
    """`attack_model` for running statistics; for others the model itself in the modes of an update.

    With "batch" its buffers are put back at the end, with "tracked" they stay as the forwards in the block leave them.
    ValueError where batch norm cannot span the ranks so, before anything has changed.
    """
    if statistics == "running":
        with attack_model(model, recipe, x) as view:
            yield view
        return
    model = unwrapped(model)
    with training_modes(model):
        _check_synchronised(model, x, statistics)
        with gathered(model), buffers_kept(model) if statistics == "batch" else nullcontext():
            yield model


def _check_synchronised(model: nn.Module, x: Tensor, statistics: Statistics) -> None:
    """Raise ValueError where a `SyncBatchNorm` could not run on images like x, or would mix rows of other factors."""
    norms = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm) and module.training]
    if not norms or not (dist.is_available() and dist.is_initialized()):
        return
    if x.device.type == "cpu" and any(type(norm).forward is nn.SyncBatchNorm.forward for norm in norms):
        raise ValueError(
            f"attack's statistics must be 'running' for a model with SyncBatchNorm on the CPU, got {statistics!r}: "
            "torch has none for the CPU in train mode: move model and images to a GPU, or leave statistics out"
        )
    dtypes = {caller_autocast(x), *(p.dtype for p in model.parameters())}
    if torch.float16 in dtypes and any(dist.get_world_size(norm.process_group) > 1 for norm in norms):
        raise ValueError(
            f"attack's statistics must be 'running' for a model with SyncBatchNorm in float16, got {statistics!r}: "
            "each rank scales its gradients by a factor of its own, and the norm would add them up: "
            "write bfloat16, or leave statistics out"
        )


def why_apart(statistics: Statistics) -> str:
    """Why an attack on statistics of the batch runs without view, graphs and streams."""
    return f"statistics={statistics!r} runs the model itself, in the modes of the update"


@contextmanager
def undone_by_errors(
    model: nn.Module, x: Tensor, generator: torch.Generator | None, *, buffers: bool
) -> Iterator[None]:
    """Around an attack and what follows it: an error takes back what they drew, and what they did to the `buffers`."""
    if buffers:
        check_model(model)
    random = () if torch.compiler.is_compiling() else (RandomStates.of(x.device, generator),)
    with buffers_kept(model, after_errors_only=True) if buffers else nullcontext():
        try:
            yield
        except BaseException:
            for states in random:
                states.restore()
            raise


def check_statistics(statistics: Statistics, where: str, instead: str) -> None:
    """Raise ValueError `where` samples leave the batch, on which the result of the others would then depend."""
    if statistics != "running":
        raise ValueError(
            f"attack's statistics must be 'running' {where}, got {statistics!r}: samples leave the batch, by whose "
            f"statistics those that stay would be normalised: {instead}"
        )
