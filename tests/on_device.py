"""Runs an op on another device, with arguments that have the same memory layout there."""

import torch
from torch.utils._pytree import tree_map


def on_device(run, device):
    """Runs `run` on the device, with arguments and results on the host; changes to the arguments are copied back.

    Sizes, strides, the memory between rows, and which arguments share memory are kept: `Tensor.to` would make rows with
    gaps contiguous, and copy shared memory twice.
    """

    def there_and_back(*args, **kwargs):
        memories = {}

        def there(value):
            if not isinstance(value, torch.Tensor):
                return value
            here = memory(value)
            if here.data_ptr() not in memories:
                memories[here.data_ptr()] = here, torch.empty_like(here, device=device).copy_(here)
            _, copied = memories[here.data_ptr()]
            return copied.view(value.dtype).as_strided(value.shape, value.stride(), value.storage_offset())

        args, kwargs = tree_map(there, (args, kwargs))
        out = run(*args, **kwargs)
        for here, copied in memories.values():
            here.copy_(copied)
        return tree_map(lambda value: value.cpu() if isinstance(value, torch.Tensor) else value, out)

    return there_and_back


def memory(value):
    """Returns all bytes of the tensor's storage: uint8, 1-d."""
    return torch.empty(0, dtype=torch.uint8, device=value.device).set_(value.untyped_storage())
