"""Models in wrappers that span the ranks: an attack needs only the images' gradients, so it communicates nothing.

`DistributedDataParallel` prepares its sum of gradients in its forward: so an attack runs on the module inside, and of
an update's forwards exactly one goes through the wrapper. (A second one would also send the buffers again, in place,
while the first one's graph still holds them.)

FSDP2's `fully_shard` spreads the parameters over the ranks. In a ragged attack the ranks run different numbers of
forwards, so no forward may wait for other ranks: the parameters are gathered before the first step, and freed after the
last. (So for the attack, unlike the update, they must fit into one device's memory.)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Fronted(nn.Module):
    """A module in front of a model that may be wrapped."""

    @property
    def unwrapped(self) -> nn.Module:
        """The same front, before the module inside the wrapper."""
        raise NotImplementedError


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns the module inside `DistributedDataParallel`, or the model itself.

    For a wrapper that was compiled as a whole it is the uncompiled module: to have both compiled, compile the module
    itself and wrap that.
    """
    if isinstance(model, Fronted):
        return model.unwrapped
    wrapper = getattr(model, "_orig_mod", model)
    return wrapper.module if isinstance(wrapper, DistributedDataParallel) else model


def sharded_parts(model: nn.Module) -> list[Any]:
    """Returns the modules that `fully_shard` has spread, the outermost first."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # code that shards a model has imported it, which takes a second
    kind = getattr(fsdp, "FSDPModule", None)
    return [] if kind is None else [module for module in model.modules() if isinstance(module, kind)]


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Gathers the model's parameters on every rank, so that its forwards and backwards do not communicate.

    Collective: every rank must enter and leave it. A model that is not sharded stays unchanged.
    """
    parts = sharded_parts(model)
    before = [(group, group.post_forward_mesh_info, group.reshard_after_backward) for group in _parameter_groups(parts)]
    for part in parts:
        part.unshard()
    for group, _, _ in before:
        group.post_forward_mesh_info, group.reshard_after_backward = None, False
    try:
        yield
    finally:
        for group, after_forward, after_backward in before:
            group.post_forward_mesh_info, group.reshard_after_backward = after_forward, after_backward
        for part in parts:
            part.reshard()


def _parameter_groups(parts: list[Any]) -> list[Any]:
    states = [part._get_fsdp_state() for part in parts]
    # separate ones until torch 2.11
    groups = [g for s in states for g in getattr(s, "_fsdp_param_groups", None) or [s._fsdp_param_group]]
    return [group for group in groups if group is not None]
