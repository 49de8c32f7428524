"""The memory of perturbations: an attack starts where that of the same sample ended an epoch ago."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bt_fast import faults, ops
from bt_fast.attack.threat import ThreatModel
from bt_fast.device import HostCopy
from bt_fast.faults import Fault
from bt_fast.memory_arguments import (
    INDICES,
    check_numbers,
    check_same,
    check_state,
    check_view,
    checked_dtype,
    checked_shape,
    checked_share,
    checked_steps,
    digest,
    rows_of,
)
from bt_fast.memory_file import NEVER, NUMPY, Description, MemoryFile, check_new, created, described
from bt_fast.memory_rows import Fetched, on_device, to_device
from bt_fast.ops.frames import Placed
from bt_fast.ops.numeric import per_sample
from bt_fast.placement import Placement, outside_frame
from bt_fast.plan import Plan
from bt_fast.recalled import Recalled, not_attacked
from bt_fast.remembered import Remembered
from bt_fast.validation import check_choice, check_device, check_kind, check_labels, positive, step_count


class Memory(nn.Module):
    """The perturbations of a data set's samples, from which their next attacks start: one step then does for many.

    A part of a loss, `TRADESLoss(attack, memory=Memory(50_000))`, which is then called with `indices=`. A sample with
    steps starts at `clip(x + remembered + 0.001·N(0, 1))`, and x' - x is remembered after the attack, as fractions of
    ε, so that ε may follow a schedule. A sample without steps stays at x, and its whole memory becomes 0. The steps are
    the memory's own, in place of those of the attack and of the mining: one of size ε, two of ε/2, more of 1.7·ε/n; a
    robust sample's one step has 0.6·ε where boundary samples take two.
    A module without parameters: it moves, saves and loads with the loss that holds it. For a loop without such a loss,
    with an attack of its own, there is `minibatch`.

    Args:
        samples: how many samples the data set has; `indices` are 0..samples-1.
        shape: of a sample in its own frame, as [channels, height, width]; None: that of the first minibatch's images.
        dtype: torch.int8, whose unit is ε/127, float16, float32 or float64, the last three also in ℓ2. None: int8, or
            in ℓ2 float16.
        storage: where it lies. "device": with the loss. "host": in the host's memory; the rows of a minibatch are
            copied to the device and back. "file": likewise, in a memory-mapped file at `path`.
        path: of the file, which is made if there is none. Its description lies beside it, in path + ".json". One
            process at a time may use it.
        share: [n] integers, the numbers of the samples that this rank sees, where ranks have fixed shares: only these
            have memory here. None: all.
        steps: of (boundary, robust, outlier) samples with mining; without it all take as many as boundary ones.
        reset_after: a perturbation older than this many epochs is not used, and forgotten. None: none is too old.
        fingerprint: any text that identifies the data set. A state or a file of another one is refused.

    Attributes:
        perturbations: [n, ...] buffer, fractions of ε; int8: times 127. None until the first minibatch has ended.
        written: [n] int64 buffer, the clock at which each was written; -1: never.
        clock: 0-dim int64 buffer, how many samples have been remembered so far.

    Raises:
        TypeError: an argument has a wrong type. ValueError: out of range or unknown, or the file is of another memory.
    """

    perturbations: Tensor | None
    written: Tensor
    clock: Tensor
    share: Tensor | None

    def __init__(
        self,
        samples: int,
        shape: Sequence[int] | None = None,
        *,
        dtype: torch.dtype | None = None,
        storage: Literal["device", "host", "file"] = "device",
        path: str | os.PathLike[str] | None = None,
        share: Tensor | None = None,
        steps: tuple[int, int, int] = (1, 1, 0),
        reset_after: float | None = None,
        fingerprint: str | None = None,
    ) -> None:
        super().__init__()
        self.samples = step_count("samples", samples, least=1)
        self.shape = None if shape is None else checked_shape(shape)
        self.dtype = checked_dtype(dtype)
        self._given = self.shape, self.dtype
        check_choice("storage", storage, ("device", "host", "file"))
        if (path is not None) != (storage == "file"):
            instead = "write storage='file', path='perturbations.mem', or leave path out"
            raise ValueError(f"path must be given for storage='file' alone, got {path!r} for {storage!r}: {instead}")
        self.storage, self.path = storage, None if path is None else Path(path)
        self.steps = checked_steps(steps)
        instead = "write reset_after=3, a number of epochs"
        self.reset_after = None if reset_after is None else positive("reset_after", reset_after, instead)
        check_kind("fingerprint", fingerprint, str, "write the name of the data set and its version", optional=True)
        self.fingerprint = fingerprint
        self._file: MemoryFile | None = None
        self._arriving: tuple[HostCopy, Tensor] | None = None  # rows on their way to the host, and their numbers
        self._fetched: Fetched | None = None  # rows on their way to the images' device
        self._images: Tensor | None = None  # an empty tensor where the last minibatch's images were
        home = None if storage == "device" else torch.device("cpu")  # whatever the default device is
        share = None if share is None else checked_share(share, self.samples)
        self.register_buffer("share", share if share is None or home is None else share.to(home), persistent=False)
        self.register_buffer("perturbations", None)
        count = self.samples if share is None else len(share)
        self.register_buffer("written", torch.full((count,), NEVER, dtype=torch.int64, device=home))
        self.register_buffer("clock", torch.zeros((), dtype=torch.int64, device=home))
        if self.path is not None:
            self._open(self.path)

    # A minibatch

    def minibatch(
        self,
        x: Tensor,
        indices: Tensor,
        threat: ThreatModel,
        placement: Placement | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Remembered:
        """For an attack of your own, with steps of its own: begin it at the result's `start`, and `keep(x_adv)` x'.

        Args:
            x, indices, placement, generator: as for a loss; x are pixels within the bounds. threat: of the attack.

        Raises:
            TypeError or ValueError: as `recall`; or pixels are out of bounds. On a GPU `keep` raises what is of values.
        """
        return Remembered(self, x, indices, threat, placement, generator)

    def recall(
        self, x: Tensor, indices: Tensor | None, placement: Placement | None, *, l2: bool, together: bool = False
    ) -> Recalled:
        """What is remembered of a minibatch. Nothing changes.

        On the CPU what is wrong is raised here; on a GPU values are counted, in `wrong`.

        Args:
            x: [m, ...] floating point, the images.
            indices: [m] integers, each sample's number in the data set, all different.
            placement: where the images lie in their own frames; None: they are these.
            l2: whether the perturbations are bounded in ℓ2. together: whether ranks mine together: wrong values are
                counted on the CPU too, so that all ranks raise the error.

        Raises:
            TypeError or ValueError: indices are missing, out of range, of another rank's share, or one is there twice;
                a placement shows nothing of its image; a type, shape or device does not fit; another memory has made
                this one's file.
        """
        if indices is None:
            raise ValueError(f"indices must be given to a loss with a memory, got none: {INDICES}")
        check_labels(indices, len(x), x.device, "indices")
        shape = tuple(x.shape[1:]) if self.shape is None else self.shape
        check_view(x, placement, shape)
        dtype = self._dtype(l2)
        if self.storage == "device":
            check_device("memory", self.clock, x.device, "the images")
        if self.path is not None and self._file is None:  # which this minibatch is going to make
            check_new(self.path)
        self.settle()
        self._images, fetched, placed = x.detach().new_empty(0), None, None
        if self._fetched is not None and self._fetched.are_of(indices):
            fetched, self._fetched = self._fetched, None
        *wrong, numbers = self._numbers(indices) if fetched is None else fetched.checked
        if placement is not None:
            wrong.insert(0, outside_frame(placement, x.shape, shape))
            placed = Placed(placement.top.long(), placement.left.long(), placement.mirrored)
        if together:
            wrong = [replace(fault, count=fault.count.to(x.device)) for fault in wrong]
        elif known := [fault for fault in wrong if not fault.count.is_cuda]:
            faults.read(known).wait()
            wrong = [fault for fault in wrong if fault.count.is_cuda]
        return self._read(x, numbers, placed, shape, dtype, tuple(wrong), fetched)

    def prefetch(self, indices: Tensor) -> Tensor:
        """Starts to copy the rows of the next minibatch to the images' device, where the memory is on the host.

        To be called between the loss of a minibatch and its backward, with the samples of the next one:

            loss = criterion(model, x, y, indices=indices)
            following = criterion.memory.prefetch(numbers)  # on the host, so that nothing waits
            loss.backward()

        The next call takes `indices=following`. Results are the same to the bit, also of samples in both minibatches;
        if the next call has any other tensor, all is as without this. Does nothing with storage="device", with images
        on the CPU, and before a first minibatch's end.

        Args:
            indices: [m] integers, all different, the samples of the next minibatch. Returned on the images' device,
                which is known once there was a minibatch.

        Raises:
            TypeError or ValueError: as `recall` would; only where there is something to copy.
        """
        self._fetched = None
        if self._images is None:
            return indices
        check_numbers(indices)
        if self.perturbations is None or not self._apart(self._images):
            return indices.to(self._images.device)
        rows, following = self._numbers(indices), to_device(indices, self._images)
        faults.read(rows[:2]).wait()
        arriving = None if self._arriving is None else self._arriving[1]
        self._fetched = Fetched.start(self.perturbations, self.written, following, rows, arriving, self._images)
        return following

    def remember(
        self, recalled: Recalled, x_adv: Tensor, clean: Tensor, plan: Plan, epsilon: float, *, l2: bool
    ) -> None:
        """Remembers x' - x of a minibatch.

        Args:
            recalled: what was remembered of it.
            x_adv, clean: [m, ...], x' and x, in the plan's sorted order.
            plan: the steps of each sample, and their order.
            epsilon: ε of the attack; l2: whether it is bounded in ℓ2.

        Robust samples that others stand for, and that were therefore not attacked, keep their memory and its age.
        """
        if self.perturbations is None:
            self._allocate(tuple(recalled.rows.shape[1:]), self._dtype(l2))
        if not len(recalled.rows):  # of a memory that has been made since
            recalled = self._again(recalled, x_adv)
        rows, slots, numbers = recalled.rows, recalled.slots, recalled.numbers
        out = not_attacked(plan) if epsilon and recalled.counts[1] else None  # else no robust sample was going to be
        before = None if out is None else (rows[slots], self.written[numbers])
        how: dict[str, Any] = {"order": plan.order, "steps": plan.steps, "keep": recalled.fresh}
        ops.remember_(rows, x_adv, clean, slots, epsilon, l2=l2, placed=recalled.placed, **how)
        self.clock += len(numbers)
        self.written.index_copy_(0, numbers, self.clock.expand(len(numbers)))
        if out is not None and before is not None:
            for values, at, old in ((rows, slots, before[0]), (self.written, numbers, before[1])):
                here = out.to(values.device)
                values.index_copy_(0, at, torch.where(per_sample(here, old), old, values[at]))
        if rows is not self.perturbations:
            self.settle()  # of another minibatch that is open
            self._arriving = HostCopy(rows), numbers

    def ages(self) -> Tensor:
        """How many epochs ago each perturbation was written, [n] float64; infinite where it never was.

        An epoch is as many remembered samples as there are in the memory: right after a shuffled epoch ages are
        between 0 and 1, and a sample's age when it comes again is between 0 and 2.
        """
        self.settle()
        ages = (self.clock - self.written).double() / len(self.written)
        return ages.masked_fill(self.written < 0, math.inf)

    def reset(self) -> None:
        """Forgets all perturbations: every sample starts afresh."""
        self.settle()
        self._fetched = None
        self.written.fill_(NEVER)
        if self.perturbations is not None:
            self.perturbations.zero_()

    def settle(self) -> None:
        """Waits until what the device has copied to the host is in the memory there."""
        if self._arriving is not None and self.perturbations is not None:
            (rows, numbers), self._arriving = self._arriving, None
            self.perturbations.index_copy_(0, numbers, rows.wait())

    def extra_repr(self) -> str:
        """The configuration, as it would be written."""
        given = {"shape": self.shape, "dtype": self.dtype, "reset_after": self.reset_after}
        text = "".join([f", {name}={value}" for name, value in given.items() if value is not None])
        return f"{self.samples}{text}, storage={self.storage!r}, steps={self.steps}"

    def description(self) -> str:
        """What it holds, where, how large it is, and the steps of its groups."""
        steps = " / ".join(map(str, self.steps))
        if self.perturbations is None:
            return f"of {len(self.written)} samples, nothing remembered yet; {steps} steps"
        size = self.perturbations.numel() * self.perturbations.element_size() / 2**20
        where = {"host": "on the host", "file": f"in {self.path}"}.get(self.storage, f"on {self.written.device}")
        kind = NUMPY[self.perturbations.dtype]
        of = f"of {len(self.written)} samples of {list(self.perturbations.shape[1:])}"
        return f"{of}, {kind}, {size:.1f} MiB {where}; {steps} steps"

    # Rows

    def _numbers(self, indices: Tensor) -> tuple[Fault, Fault, Tensor]:
        return rows_of(indices.detach().long().to(self.written.device), self.samples, self.share)

    def _dtype(self, l2: bool) -> torch.dtype:
        return self.dtype or (torch.float16 if l2 else torch.int8)

    def _apart(self, x: Tensor) -> bool:
        """Whether rows are copied to the images' device and back."""
        return self.written.device != x.device

    def _read(
        self,
        x: Tensor,
        numbers: Tensor,
        placed: Placed | None,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        wrong: tuple[Fault, ...],
        fetched: Fetched | None = None,
    ) -> Recalled:
        fresh, stored = None, self.perturbations
        if self.reset_after is not None:
            age = (self.clock - self.written[numbers]).double()
            fresh = to_device(age <= self.reset_after * len(self.written), x)
        slots = torch.arange(len(x), device=x.device)
        if stored is None:  # nothing is remembered, and what is wrong may yet come to light
            rows, slots = torch.empty(0, *shape, dtype=dtype, device=x.device), torch.full_like(slots, NEVER)
        elif not self._apart(x):
            rows, slots = stored, numbers
        else:
            rows = on_device(stored, numbers, x) if fetched is None else fetched.arrived(stored, self.written)
        return Recalled(rows, slots, numbers, fresh, placed, wrong, self.steps)

    def _again(self, recalled: Recalled, x: Tensor) -> Recalled:
        """The same minibatch, of a memory that has been made since."""
        rows = recalled.rows
        return self._read(x, recalled.numbers, recalled.placed, tuple(rows.shape[1:]), rows.dtype, recalled.wrong)

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if self.path is not None:
            self._file = created(self.path, len(self.written), shape, dtype, self.fingerprint, digest(self.share))
            self._of_file(self._file)
        else:
            self.perturbations = torch.zeros(len(self.written), *shape, dtype=dtype, device=self.written.device)
        self.shape, self.dtype = shape, dtype

    # Files

    def _open(self, path: Path) -> None:
        if (result := described(path)) is None:
            if not path.absolute().parent.is_dir():
                raise ValueError(f"path must lie in a folder that exists, got {str(path)!r}: make {path.parent} first")
            return
        dtype = next(kind for kind, name in NUMPY.items() if name == result.dtype)
        own = {
            "samples": (len(self.written), result.samples),
            "shape": (self.shape or result.shape, result.shape),
            "dtype": (self.dtype or dtype, dtype),
            "fingerprint": (self.fingerprint or result.fingerprint, result.fingerprint),
            "share": (digest(self.share), result.share),
        }
        check_same(own, f"the file {path.name}", "write another path, or delete it to begin anew")
        self.shape, self.dtype, self._file = result.shape, dtype, MemoryFile(path, result)
        self._of_file(self._file)

    def _of_file(self, file: MemoryFile) -> None:
        """Takes a file's tensors in place of buffers: they are neither moved nor saved with the module."""
        self.register_buffer("perturbations", file.perturbations, persistent=False)
        self.register_buffer("written", file.written, persistent=False)
        if not self.clock:  # a file without a checkpoint goes on from its own last minibatch
            self.clock.fill_(max(int(file.written.max()), 0))

    # Moving, saving and loading

    def _apply(self, fn: Any, recurse: bool = True) -> Memory:
        """Follows the moves of the module that holds this one, but not its casts; on the host nothing moves."""
        self._fetched = self._images = None
        if self.storage == "device":
            for name, buffer in self._buffers.items():
                if buffer is not None:
                    device = fn(torch.empty(0, device=buffer.device)).device
                    filled = buffer.to(device) if not buffer.is_meta else torch.empty_like(buffer, device=device)
                    self._buffers[name] = filled
        return self

    def get_extra_state(self) -> dict[str, Any]:
        """What the perturbations are of, for a check at loading."""
        identity = None if self._file is None else self._file.description.identity
        kind = None if self.perturbations is None else NUMPY[self.perturbations.dtype]
        shape = None if self.perturbations is None else list(self.perturbations.shape[1:])
        given = {"samples": self.samples, "shape": shape, "dtype": kind, "fingerprint": self.fingerprint}
        return given | {"share": digest(self.share), "file": identity}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Does nothing: `state` has been checked before the buffers were loaded."""

    def _save_to_state_dict(self, *args: Any) -> None:
        self.settle()
        if self._file is not None:
            self._file.flush()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Loads a state of the same data set; of a file that has been written since, its perturbations as they are."""
        self.settle()
        self._fetched = None
        stored, written = (state_dict.get(f"{prefix}{name}") for name in ("perturbations", "written"))
        if stored is not None and self.path is not None:
            raise ValueError(
                f"path must be left out for a state that holds its perturbations, got {str(self.path)!r}: "
                "write Memory(..., storage='host') and load that"
            )
        saved = state_dict.get(f"{prefix}_extra_state")
        if isinstance(saved, dict):
            known: dict[str, Any] = {"shape": None if self.shape is None else list(self.shape)}
            known["dtype"] = None if self.dtype is None else NUMPY[self.dtype]
            check_state(saved, self.get_extra_state(), known, self.path)
        if self._file is None and written is not None and written.shape == self.written.shape:
            self._make_room(stored)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self._file is not None:
            self._file.set_back(int(self.clock))

    def _make_room(self, stored: Tensor | None) -> None:
        own = self.perturbations
        if stored is None:
            self.perturbations, (self.shape, self.dtype) = None, self._given
            return
        if own is None or (own.shape, own.dtype) != (stored.shape, stored.dtype):
            self.perturbations = torch.empty_like(stored, device=self.written.device)
        self.shape, self.dtype = tuple(stored.shape[1:]), stored.dtype

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        state = self.__dict__ | {"_fetched": None, "_images": None}
        if self._file is None:
            return state
        self._file.flush()
        buffers = {**self._buffers, "perturbations": None, "written": torch.empty(0, dtype=torch.int64, device="cpu")}
        return state | {"_file": self._file.description, "_buffers": buffers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        description: object = self._file
        if self.path is not None and isinstance(description, Description):
            if described(self.path) != description:
                raise ValueError(
                    f"path must be the file that the copied memory uses, but {self.path} is another or gone: "
                    "bring it back, or write a new Memory(...) and load its state"
                )
            self._file = MemoryFile(self.path, description)
            self._of_file(self._file)
