"""The only place where the host waits for the device, and the detection of full memory."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """A tensor on its way from any device to the host.

    The copy is enqueued at construction and does not block; `wait` blocks until this copy, and nothing that was
    enqueued after it, has finished. On the CPU there is nothing to wait for; on the meta device it is a ValueError.
    """

    def __init__(self, values: Tensor) -> None:
        if values.is_meta:
            raise ValueError(
                "tensors must hold values, but are on the meta device: "
                "move them with .to_empty(device=...) and fill them"
            )
        self._arrived: torch.cuda.Event | None = None
        self._values = values
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(values.device))

    def wait(self) -> Tensor:
        """Waits and returns the tensor on the host."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values


class HostRead:
    """A few numbers, values int64 [n], on their way to the host, as a `HostCopy`."""

    def __init__(self, values: Tensor) -> None:
        self._copy = HostCopy(values)

    def wait(self) -> list[int]:
        """Waits and returns the values, as Python integers."""
        return [int(v) for v in self._copy.wait().tolist()]


def out_of_memory(error: BaseException) -> bool:
    """Whether a memory is full, by the error's class or its text from torch, the driver, cuBLAS, cuDNN or the host."""
    words = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    full = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, full) or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))


def synchronize(device: torch.device) -> None:
    """Waits for all of the device's work: for timing only, never in a training step."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
