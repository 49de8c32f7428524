"""Random numbers for a minibatch shared by ranks: each rank draws those of all samples, and takes its own.

So all ranks' random streams stay the same, and a sample gets the numbers that a single process would draw for it: for
random starts without BulletTrain (with it they are counter-based, not drawn), the authors' code, AugMix without
BulletTrain, GradAlign, and dropout. With BulletTrain, which sorts each rank's samples by steps, dropout's masks go to
other samples than in a single process. Each rank needs the memory of the whole minibatch's numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class DrawsOfAll(TorchFunctionMode):
    """Inside, random numbers for `count` samples are drawn for `of` samples, and those from `first` on are used.

    The same holds for k views of each sample in one draw of k·count rows. Draws from an explicit generator do not
    change.
    """

    def __init__(self, first: int, count: int, of: int) -> None:
        super().__init__()
        self._first, self._count, self._of = first, count, of

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replaces the functions that draw."""
        kwargs = kwargs or {}
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        if kwargs.get("generator") is None:
            if func in (torch.rand, torch.randn):
                size = args if isinstance(args[0], int) else args[0]
                if self._views(size):
                    return self._own(func(self._whole(size), **kwargs))
            elif func is torch.randint and len(args[-1]) > 1 and self._views(args[-1]):  # seeds have one dimension
                return self._own(func(*args[:-1], self._whole(args[-1]), **kwargs))  # type: ignore[call-overload]
            elif func is torch.Tensor.exponential_ and self._views(args[0].shape):
                drawn = args[0].new_empty(self._whole(args[0].shape)).exponential_(*args[1:], **kwargs)
                return args[0].copy_(self._own(drawn))
        return func(*args, **kwargs)

    def _dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """Applies the first of this rank's dropout masks if x has fewer rows than samples (those under attack)."""
        if not training or p == 0 or len(x) == 0:
            return F.dropout(x, p, training, inplace)
        views = -(-len(x) // self._count)
        masks = F.dropout(x.new_ones(views * self._of, *x.shape[1:]), p)
        return x * self._own(masks)[: len(x)]

    def _views(self, size: Sequence[int]) -> int:
        """Returns the number of views of each sample in a draw of this size; 0 if it is not a draw by sample."""
        return size[0] // self._count if len(size) and size[0] % self._count == 0 else 0

    def _whole(self, size: Sequence[int]) -> list[int]:
        return [self._views(size) * self._of, *size[1:]]

    def _own(self, drawn: Tensor) -> Tensor:
        views = drawn.view(-1, self._of, *drawn.shape[1:])
        return views[:, self._first : self._first + self._count].flatten(0, 1)
