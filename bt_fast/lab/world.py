"""The processes that train together: `torchrun -m bt_fast train` starts them, each has its share, rank 0 writes."""

from __future__ import annotations

import gc
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from bt_fast.faults import NonFiniteError
from bt_fast.lab.draws import DrawsOfAll

_SET_BY_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Share:
    """A rank's samples in a minibatch of size `of`: those from `first` to before `end`."""

    first: int
    end: int
    of: int

    def __len__(self) -> int:
        return self.end - self.first

    def own(self, values: Tensor) -> Tensor:
        """Returns this rank's part of values [of, ...]."""
        return values[self.first : self.end]

    @property
    def weight(self) -> float:
        """This part as a fraction of the whole."""
        return len(self) / self.of


@dataclass(frozen=True)
class World:
    """The ranks that train together. Every rank must call the methods marked collective, in the same order.

    `group` is the group of all `count` ranks, for tensors on the CPU and on the training's device, or None for a single
    process; `per_node` is the number of ranks on this machine.
    """

    rank: int = 0
    count: int = 1
    group: dist.ProcessGroup | None = None
    per_node: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, the process that writes."""
        return self.rank == 0

    def share(self, m: int) -> Share:
        """Returns this rank's contiguous share of m samples; the ranks' shares differ in size by at most one."""
        return Share(self.rank * m // self.count, (self.rank + 1) * m // self.count, m)

    def most_in_a_share(self, m: int) -> int:
        """Returns the size of the largest share of m samples."""
        return -(-m // self.count)

    def check_minibatches(self, n: int, batch_size: int) -> None:
        """Raises ValueError, which names --batch-size, if an epoch of n images has a minibatch smaller than `count`."""
        for m, which in ((min(n, batch_size), "a minibatch"), (n % batch_size, "the last minibatch of an epoch")):
            if 0 < m < self.count:
                raise ValueError(
                    f"--batch-size {batch_size}: {which} would have {m} of the {n} training images, fewer than there "
                    f"are ranks ({self.count}); it is the size of the whole minibatch, which "
                    "the ranks share: give a larger one, or start fewer ranks"
                )

    def place(self, model: nn.Module, device: torch.device) -> tuple[nn.Module, nn.Module]:
        """Returns the model on the device, for attacks, and a wrapper of it that averages gradients over the ranks.

        On CUDA, where torch supports it, batch norms see all ranks' samples.
        """
        if self.group is None:
            model = model.to(device)
            return model, model
        is_cuda = device.type == "cuda"
        if is_cuda:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model, self.group)
        model = model.to(device)
        with warnings.catch_warnings():  # torch 2.13 renamed the option, and older versions lack the new name
            warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
            # a synchronised norm's buffers are equal on all ranks; `follow` broadcasts the others
            devices = [device] if is_cuda else None
            return model, DistributedDataParallel(model, devices, process_group=self.group, broadcast_buffers=False)

    def follow(self, model: nn.Module) -> None:
        """Broadcasts rank 0's buffers if batch norms are not synchronised. Collective."""
        if self.group is not None and norms_alone(model):
            for buffer in model.buffers():
                dist.broadcast(buffer, 0, self.group)

    def draws(self, share: Share) -> DrawsOfAll | None:
        """A context that draws the share's random numbers for the whole minibatch; None for a single process."""
        return None if self.group is None else DrawsOfAll(share.first, len(share), share.of)

    def broadcast_path(self, path: Path | None) -> Path:
        """Returns the path that rank 0 gives. Collective."""
        paths = [path]
        if self.group is not None:
            dist.broadcast_object_list(paths, 0, self.group)
        if paths[0] is None:
            raise ValueError("rank 0 must give a path")
        return paths[0]

    def gathered(self, value: object) -> list[Any]:
        """Returns the ranks' values on rank 0, and nothing on others. Collective."""
        if self.group is None:
            return [value]
        values: list[Any] | None = [None] * self.count if self.leads else None
        dist.gather_object(value, values, 0, self.group)
        return values or []

    def most(self, number: int) -> int:
        """Returns the largest of the ranks' numbers. Collective."""
        return self._reduced([number], dist.ReduceOp.MAX)[0]

    def sums(self, numbers: Sequence[int]) -> list[int]:
        """Returns the sum of each number over the ranks. Collective."""
        return self._reduced(numbers, dist.ReduceOp.SUM)

    def _reduced(self, numbers: Sequence[int], operation: dist.ReduceOp.RedOpType) -> list[int]:
        if self.group is None:
            return list(numbers)
        reduced = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        dist.all_reduce(reduced, operation, self.group)
        return [int(n) for n in reduced]

    def mean(self, value: Tensor, share: Share) -> Tensor:
        """Returns the mean over a whole minibatch, 0-dim, from the mean over each share. Collective."""
        if self.group is None:
            return value
        mean = value.double() * share.weight
        dist.all_reduce(mean, group=self.group)
        return mean

    def check(self, fault: NonFiniteError | None, share: Share) -> None:
        """Raises on all ranks the error that some raised in their shares, since a backward waits for all. Collective.

        If a rank fails before a forward in which the others wait for it (that of a synchronised batch norm, or of the
        second minibatch, when DistributedDataParallel settles its buckets), the job ends at the group's time limit.

        The NonFiniteError comes from the first rank that names samples, by their places in the whole minibatch.
        """
        if self.group is None:
            if fault is not None:
                raise fault
            return
        if not self.most(fault is not None):
            return
        own = None if fault is None else (str(fault), [share.first + i for i in fault.samples], fault.earlier)
        of_ranks: list[tuple[str, list[int], bool] | None] = [None] * self.count
        dist.all_gather_object(of_ranks, own, self.group)
        faults = [one for one in of_ranks if one is not None]
        message, samples, earlier = next((one for one in faults if one[1]), faults[0])
        raise NonFiniteError(message, samples, earlier=earlier) from fault


ALONE = World()


def norms_alone(model: nn.Module) -> bool:
    """Whether the model has a batch norm that is not synchronised over ranks."""
    return any(isinstance(m, _BatchNorm) and not isinstance(m, nn.SyncBatchNorm) for m in model.modules())


@contextmanager
def joined(device: str | None, minutes: float) -> Iterator[tuple[World, str | None]]:
    """Yields the world in which torchrun started this process, and the name of its device.

    `device` is "cpu", "cuda" or None for either; a single process gets it back unchanged. A rank that does not answer
    for `minutes` is an error on the others. ValueError if the environment or the device does not fit.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE, device
        return
    missing = [name for name in _SET_BY_TORCHRUN if name not in os.environ]
    if missing:
        raise ValueError(f"WORLD_SIZE is set but not {', '.join(missing)}: start several ranks with torchrun")
    local, per_node = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    name = _device_of_rank(device, local, per_node)
    if name != "cpu":
        torch.cuda.set_device(local)
    backend = "gloo" if name == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
    try:
        yield World(dist.get_rank(), dist.get_world_size(), dist.group.WORLD, per_node), name
    finally:
        gc.collect()  # wrapped models hold the group, and its threads must end before Python does
        time.sleep(0.1)  # the threads need the interpreter to end, but torch 2.6 holds it while it waits for them
        dist.destroy_process_group()


def _device_of_rank(device: str | None, local: int, per_node: int) -> str:
    if device not in (None, "cpu", "cuda"):
        raise ValueError(
            f"--device {device}: each rank has a GPU of its own; expected cpu or cuda under torchrun; "
            "leave the number away"
        )
    if device == "cpu" or (device is None and not torch.cuda.is_available()):
        return "cpu"
    count = torch.cuda.device_count()
    if count < per_node:
        raise ValueError(
            f"--nproc-per-node {per_node}: there are {count} CUDA devices, expected one for each rank; "
            f"start at most {count}"
        )
    return f"cuda:{local}"
