"""The rows of a minibatch on their way from a memory on the host to the images' device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bt_fast.attack import device as devices
from bt_fast.faults import Fault


def gathered(stored: Tensor, numbers: Tensor, pinned: bool) -> Tensor:
    """Copies of rows `numbers` [n] int64 of what is stored on the host; pinned, so that a device can fetch them."""
    rows = torch.empty((len(numbers), *stored.shape[1:]), dtype=stored.dtype, device="cpu", pin_memory=pinned)
    return torch.index_select(stored, 0, numbers, out=rows)


def to_device(values: Tensor, images: Tensor) -> Tensor:
    """Values on the images' device; the host does not wait for the copy."""
    if not (images.is_cuda and values.device.type == "cpu"):
        return values.to(images.device)
    return values.pin_memory().to(images.device, non_blocking=True)


def on_device(stored: Tensor, numbers: Tensor, images: Tensor) -> Tensor:
    """These rows on the images' device, enqueued there; the host does not wait."""
    return gathered(stored, numbers, images.is_cuda).to(images.device, non_blocking=True, copy=True)


@dataclass(frozen=True, eq=False)
class Fetched:
    """The rows of the next minibatch, which a stream of their own copies beside what the device still does.

    Attributes:
        indices: on the images' device, as the loss is going to be given them. version: theirs, which changes with them.
        checked: what could be wrong with them, and is not; and [m] int64, the row of each in the memory, on the host.
        rows: [m, ...] on the device.
        stream: that fills them; None where there are no streams.
        written: [m] int64, on the host, the clocks of these rows when they were gathered.
        behind: [m] bool, on the host, those whose newest values were still on their way from the device.
    """

    indices: Tensor
    version: int
    checked: tuple[Fault, Fault, Tensor]
    rows: Tensor
    stream: devices.Stream | None
    written: Tensor
    behind: Tensor

    @classmethod
    def start(
        cls,
        stored: Tensor,
        written: Tensor,
        indices: Tensor,
        checked: tuple[Fault, Fault, Tensor],
        arriving: Tensor | None,
        images: Tensor,
    ) -> Fetched:
        """Begins to copy; what is stored of the rows among `arriving` is not yet the newest."""
        numbers, version = checked[2], _version(indices)
        behind = torch.zeros_like(numbers, dtype=torch.bool) if arriving is None else torch.isin(numbers, arriving)
        gathering, clocks, stream = gathered(stored, numbers, images.is_cuda), written[numbers], None
        if not devices.has_graphs(images):
            return cls(indices, version, checked, gathering, None, clocks, behind)
        # of the caller's stream, so that their memory, when they are gone, is used again in its order
        rows = torch.empty(gathering.shape, dtype=gathering.dtype, device=images.device)
        stream = devices.new_stream(images)
        stream.wait_stream(devices.current_stream(images))  # which may still read what was in that memory before
        with devices.on(stream):
            rows.copy_(gathering, non_blocking=True)
        if images.is_cuda:
            rows.record_stream(stream)  # they may be forgotten before they are there
        return cls(indices, version, checked, rows, stream, clocks, behind)

    def are_of(self, indices: Tensor) -> bool:
        """Whether these are the samples, which is seen without reading them: from their being the same tensor."""
        return indices is self.indices and _version(indices) == self.version

    def arrived(self, stored: Tensor, written: Tensor) -> Tensor:
        """The rows, after all that has been written since they were gathered, which is in `stored` by now."""
        if self.stream is not None:
            devices.current_stream(self.rows).wait_stream(self.stream)
        numbers = self.checked[2]
        again = late(self.behind, written[numbers], self.written)
        if len(again):
            fresh = on_device(stored, numbers[again], self.rows)
            self.rows.index_copy_(0, to_device(again, self.rows), fresh)
        return self.rows


def late(behind: Tensor, now: Tensor, before: Tensor) -> Tensor:
    """Which rows have been written since they were gathered, on the host: those that were behind, or whose clock moved.

    All are [m]; returns [n] int64.
    """
    return (behind | (now != before)).nonzero().flatten()


def _version(indices: Tensor) -> int:
    return 0 if indices.is_inference() else indices._version  # which those of inference mode do not have
