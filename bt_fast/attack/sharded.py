"""Models whose parameters are spread over the ranks by FSDP2's `fully_shard`: gathered once for an attack.

A ragged attack takes other numbers of forwards on other ranks, so that none of them may wait for the others: the
parameters are gathered before its first step, and let go after its last. (So for the attack, unlike the update, they
must fit into one device's memory.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

try:
    from torch.distributed.fsdp import FSDPModule
except ImportError:  # a torch without torch.distributed
    FSDPModule = None  # type: ignore[assignment, misc]


def sharded_parts(model: nn.Module) -> list[Any]:
    """The modules whose parameters `fully_shard` has spread, the outermost first."""
    return [] if FSDPModule is None else [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """The model's parameters are whole on every rank, and neither forwards nor backwards of it communicate.

    Collective: every rank enters and leaves it. A model that is not sharded is as it is.
    """
    parts = sharded_parts(model)
    found = [(group, group.post_forward_mesh_info, group.reshard_after_backward) for group in _groups(parts)]
    for part in parts:
        part.unshard()
    for group, _, _ in found:
        group.post_forward_mesh_info, group.reshard_after_backward = None, False
    try:
        yield
    finally:
        for group, after_forward, after_backward in found:
            group.post_forward_mesh_info, group.reshard_after_backward = after_forward, after_backward
        for part in parts:
            part.reshard()


def _groups(parts: list[Any]) -> list[Any]:
    """What keeps the parts' parameters."""
    states = [part._get_fsdp_state() for part in parts]
    return [
        group
        for state in states
        for group in getattr(state, "_fsdp_param_groups", None)
        or [state._fsdp_param_group]  # one each until torch 2.11
        if group is not None
    ]
