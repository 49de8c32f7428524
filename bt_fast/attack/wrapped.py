"""Models in wrappers that span the ranks: an attack needs only the images' gradients, so it communicates nothing.

`DistributedDataParallel` prepares its sum of gradients in its forward: so an attack runs on the module inside, and of
an update's forwards exactly one goes through the wrapper. (A second one would also send the buffers again, in place,
while the first one's graph still holds them.)

FSDP2's `fully_shard` spreads the parameters over the ranks. A ragged attack takes other numbers of forwards on other
ranks, so that none of them may wait for the others: the parameters are gathered before its first step, and let go after
its last. (So for the attack, unlike the update, they must fit into one device's memory.)

`DataParallel` with one device calls the module inside, and so does an attack. With several it copies the module to all
of them in each forward: an attack goes through the wrapper, to have them all, and is not folded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Fronted(nn.Module):
    """A module in front of a model that may be wrapped."""

    @property
    def unwrapped(self) -> nn.Module:
        """The same front, before the module inside the wrapper."""
        raise NotImplementedError


class Lent(Fronted):
    """One that holds its model only while it is used, so that a cache of it does not keep the model.

    There is one for each model, by which folded views and graphs of it are found again.
    """

    def __init__(self) -> None:
        super().__init__()
        self._unwrapped: tuple[nn.Module, ...] = ()  # in a tuple, so that it is no submodule

    @property
    def unwrapped(self) -> nn.Module:
        """The same in front of the module that the model may wrap; itself while no model is held."""
        return self._unwrapped[0] if self._unwrapped else self

    @contextmanager
    def holding(self, model: nn.Module, inside: nn.Module) -> Iterator[None]:
        """Be in front of this model, in its mode; `inside` is in front of the module that it may wrap."""
        outer, unwrapped_before = self._modules.get("model"), self._unwrapped
        self.model, self._unwrapped = model, (inside,)
        for own in (self, *self.children()):
            if own is not model:
                own.training = model.training
        try:
            yield
        finally:
            del self.model
            self._unwrapped = unwrapped_before
            if outer is not None:
                self.model = outer


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside `DistributedDataParallel` or a `DataParallel` with one device, or the model itself.

    For a wrapper that was compiled as a whole it is the uncompiled module: to have both compiled, compile the module
    itself and wrap that.
    """
    wrapper = getattr(model, "_orig_mod", model)
    if isinstance(wrapper, Fronted):
        front = wrapper.unwrapped
        return model if front is wrapper else front
    called = inside(wrapper)  # whose truth is its length, which a compiled one may not have
    return model if called is None else called


def inside(model: nn.Module) -> nn.Module | None:
    """The module that a wrapper for ranks or for a single device calls; None where the model is no such wrapper."""
    alone = isinstance(model, nn.DataParallel) and not spread(model) and type(model).forward is nn.DataParallel.forward
    return cast(nn.Module, model.module) if alone or isinstance(model, DistributedDataParallel) else None


def spread(model: nn.Module) -> bool:
    """Whether the model is a `DataParallel` that copies a module to several devices."""
    return isinstance(model, nn.DataParallel) and len(model.device_ids) > 1


SPREAD = (
    "DataParallel copies the model to all of its devices in each forward: with one device in device_ids, or under "
    "DistributedDataParallel, it is folded"
)


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
