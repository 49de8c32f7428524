"""What a device would be given to run: a launch for every op that is neither a view nor room in memory."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOM = ("empty", "empty_strided", "new_empty", "empty_like")


class _Launches(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not views and func.overloadpacket.__name__ not in ROOM:
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def launches(work):
    """The names of the ops that `work()` launches, one of ours as one; what is inside of it does not count."""
    with torch.no_grad(), _Launches() as counter:
        work()
    return counter.names
