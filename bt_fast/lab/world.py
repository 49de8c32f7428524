"""The processes that train together: `torchrun -m bt_fast train` starts them, each takes its share, rank 0 writes."""

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
    """A rank's samples of a minibatch of `of`: those from `first` on, up to `end`."""

    first: int
    end: int
    of: int

    def __len__(self) -> int:
        return self.end - self.first

    def own(self, values: Tensor) -> Tensor:
        """This rank's of values [of, ...]."""
        return values[self.first : self.end]

    @property
    def weight(self) -> float:
        """Its part of the whole."""
        return len(self) / self.of


@dataclass(frozen=True)
class World:
    """Which rank this process is, of how many. Methods that say so are collective: every rank calls them in order.

    Attributes:
        group: of all ranks, for tensors on the CPU (gloo) and on the training's device; None for a process alone.
        per_node: ranks on this machine.
    """

    rank: int = 0
    count: int = 1
    group: dist.ProcessGroup | None = None
    per_node: int = 1

    @property
    def leads(self) -> bool:
        """Whether it is this process that writes."""
        return self.rank == 0

    def share(self, m: int) -> Share:
        """Of m samples this rank's: contiguous, the ranks' numbers of samples differ by at most one."""
        return Share(self.rank * m // self.count, (self.rank + 1) * m // self.count, m)

    def most_in_a_share(self, m: int) -> int:
        """The largest share of m samples."""
        return -(-m // self.count)

    def check_minibatches(self, n: int, batch_size: int) -> None:
        """Raise ValueError, which names --batch-size, if a minibatch of n images has too few for each rank to get one.

        The last of an epoch holds what is left.
        """
        for m, which in ((min(n, batch_size), "a minibatch"), (n % batch_size, "the last minibatch of an epoch")):
            if 0 < m < self.count:
                raise ValueError(
                    f"--batch-size {batch_size}: {which} would have {m} of the {n} training images, fewer than there "
                    f"are ranks ({self.count}); it is the size of the whole minibatch, which "
                    "the ranks share: give a larger one, or start fewer ranks"
                )

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model for updates, whose gradients become the mean over the ranks; the attack runs on the one inside."""
        if self.group is None:
            return model
        devices = [device] if device.type == "cuda" else None
        with warnings.catch_warnings():  # it has a new name from torch 2.13 on, which older ones do not know
            warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
            # a synchronised norm's buffers are the same on all ranks; `follow` sees to those of others
            return DistributedDataParallel(model, devices, process_group=self.group, broadcast_buffers=False)

    def together(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model with batch norms over all ranks' samples, where torch has them: on CUDA."""
        if self.group is None or device.type != "cuda":
            return model
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model, self.group)
        return converted

    def follow(self, model: nn.Module) -> None:
        """Batch norms of each rank's own samples: rank 0's buffers become everyone's. Collective."""
        if self.group is not None and norms_alone(model):
            for buffer in model.buffers():
                dist.broadcast(buffer, 0, self.group)

    def draws(self, share: Share) -> DrawsOfAll | None:
        """In its block, what is drawn for the share is drawn for the whole minibatch."""
        return None if self.group is None else DrawsOfAll(share.first, len(share), share.of)

    def told(self, place: Path | None) -> Path:
        """The path that rank 0 gives. Collective."""
        heard = [place]
        if self.group is not None:
            dist.broadcast_object_list(heard, 0, self.group)
        if heard[0] is None:
            raise ValueError("rank 0 must give a path")
        return heard[0]

    def most(self, number: int) -> int:
        """The largest number that a rank gives; waits for all. Collective."""
        if self.group is None:
            return number
        numbers = torch.tensor(number, device="cpu")
        dist.all_reduce(numbers, dist.ReduceOp.MAX, self.group)
        return int(numbers)

    def sums(self, numbers: Sequence[int]) -> list[int]:
        """Each added up over the ranks. Collective."""
        if self.group is None:
            return list(numbers)
        added = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        dist.all_reduce(added, group=self.group)
        return [int(n) for n in added]

    def mean(self, value: Tensor, share: Share) -> Tensor:
        """The mean over all samples of a minibatch, from the mean over each share; 0-dim. Collective."""
        if self.group is None:
            return value
        mean = value.double() * share.weight
        dist.all_reduce(mean, group=self.group)
        return mean

    def check(self, fault: NonFiniteError | None, share: Share) -> None:
        """Raise on all ranks what some met in their shares: a backward waits for all of them. Collective.

        Where a rank met it before a forward in which the others wait for it (that of a synchronised batch norm, or of
        the second minibatch, when DistributedDataParallel settles its buckets), it ends in the group's time limit.

        Raises:
            NonFiniteError: that of the first rank that can tell the samples, by their places in the whole minibatch.
        """
        if self.group is None:
            if fault is not None:
                raise fault
            return
        if not self.most(fault is not None):
            return
        own = None if fault is None else (str(fault), [share.first + i for i in fault.samples], fault.earlier)
        heard: list[tuple[str, list[int], bool] | None] = [None] * self.count
        dist.all_gather_object(heard, own, self.group)
        found = [one for one in heard if one is not None]
        message, samples, earlier = next((one for one in found if one[1]), found[0])
        raise NonFiniteError(message, samples, earlier=earlier) from fault


ALONE = World()


def norms_alone(model: nn.Module) -> bool:
    """Whether it has a batch norm of each rank's own samples."""
    return any(isinstance(m, _BatchNorm) and not isinstance(m, nn.SyncBatchNorm) for m in model.modules())


@contextmanager
def joined(device: str | None, minutes: float) -> Iterator[tuple[World, str | None]]:
    """The world that torchrun started this process in, for the block, and the name of its device.

    Args:
        device: as it was asked for: "cpu", "cuda" or None. Alone, it is given back as it is.
        minutes: after which a rank that does not answer is an error on the others.

    Raises:
        ValueError: the environment or the device does not fit several ranks.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE, device
        return
    missing = [name for name in _SET_BY_TORCHRUN if name not in os.environ]
    if missing:
        raise ValueError(f"WORLD_SIZE is set but not {', '.join(missing)}: start several ranks with torchrun")
    local, per_node = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    place = _place(device, local, per_node)
    if place == "cpu":
        backend = "gloo"
    else:
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(local)
    dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
    try:
        yield World(dist.get_rank(), dist.get_world_size(), dist.group.WORLD, per_node), place
    finally:
        gc.collect()  # models in their wrappers hold the group, whose threads must end before Python does
        time.sleep(0.1)  # they want the interpreter to drop their work, and torch 2.6 holds it while it waits for them
        dist.destroy_process_group()


def _place(device: str | None, local: int, per_node: int) -> str:
    """The name of a rank's device."""
    if device not in (None, "cpu", "cuda"):
        raise ValueError(
            f"--device {device}: each rank has a GPU of its own; expected cpu or cuda under torchrun; "
            "leave the number away"
        )
    if device == "cpu" or (device is None and not torch.cuda.is_available()):
        return "cpu"
    found = torch.cuda.device_count()
    if found < per_node:
        raise ValueError(
            f"--nproc-per-node {per_node}: there are {found} CUDA devices, expected one for each rank; "
            f"start at most {found}"
        )
    return f"cuda:{local}"
