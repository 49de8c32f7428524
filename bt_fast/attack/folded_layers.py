"""The layers of a folded view: each on tensors of its own, without gradients, which `refresh` writes anew in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bt_fast.attack.weights import Values

Affine = tuple[Tensor | None, Tensor | None]  # s and t of s·x + t for each channel; None for 1 and 0
Merge = Callable[[Values], Affine]


@dataclass(frozen=True, eq=False)
class Source:
    """Where a layer's weights come from: a module, or the nodes of a function's arguments."""

    module: Any
    weight: fx.Node | None
    bias: fx.Node | None

    def now(self, values: Values) -> tuple[Tensor, Tensor | None]:
        """Weight and bias."""
        if self.module is not None:
            return self.module.weight, self.module.bias
        return values[cast(fx.Node, self.weight)], None if self.bias is None else values[self.bias]


class FoldedLayer(nn.Module):
    """A convolution or a linear layer on weights of its own, without gradients; what follows it is folded in."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, source: Source, merges: list[Merge], channels_last: bool, values: Values) -> None:
        super().__init__()
        self._source, self._merges = source, merges  # a dataclass, so that the layer is no submodule of the view
        weight, bias = source.now(values)
        weight = weight.detach()
        last = channels_last and weight.dim() == 4
        memory_format = torch.channels_last if last else torch.preserve_format
        self.register_buffer("weight", weight.clone(memory_format=memory_format))
        self.register_buffer("bias", weight.new_zeros(len(weight)) if bias is not None or merges else None)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, and what is folded in."""
        layer = self._source.module
        if isinstance(layer, nn.Linear):
            return F.linear(x, self.weight, self.bias)
        return cast(Tensor, layer._conv_forward(x, self.weight, self.bias))

    def refresh(self, values: Values) -> None:
        """Take the weights as they are now."""
        weight, bias = self._source.now(values)
        scale: Tensor | None = None
        for merge in self._merges:
            s, t = merge(values)
            if s is not None:
                scale = s if scale is None else scale * s
                bias = None if bias is None else bias * s
            if t is not None:
                bias = t if bias is None else bias + t
        if scale is None:
            self.weight.copy_(weight)
        else:
            torch.mul(weight, scale.view(-1, *[1] * (weight.dim() - 1)), out=self.weight)
        if self.bias is not None:
            self.bias.zero_() if bias is None else self.bias.copy_(bias)


class KeptNorm(nn.Module):
    """A norm that stays one, `s·x + t` with numbers of its own, without gradients to its parameters."""

    scale: Tensor
    shift: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, affine: Merge, values: Values) -> None:
        super().__init__()
        self._affine = affine
        scale, _ = affine(values)
        assert scale is not None
        for name, value in (("scale", 1.0), ("shift", 0.0), ("mean", 0.0), ("variance", 1.0)):
            self.register_buffer(name, torch.full_like(scale, value))

    def forward(self, x: Tensor) -> Tensor:
        """`s·x + t` for each channel."""
        # without `F.batch_norm`, which in torch 2.11 refuses an eps of 0
        on = torch.backends.cudnn.enabled
        return torch.batch_norm(x, self.scale, self.shift, self.mean, self.variance, False, 0.0, 0.0, on)

    def refresh(self, values: Values) -> None:
        """Take the statistics and parameters as they are now."""
        scale, shift = cast("tuple[Tensor, Tensor]", self._affine(values))
        self.scale.copy_(scale)
        self.shift.copy_(shift)


class Constant(nn.Module):
    """What is computed of weights alone, without gradients."""

    value: Tensor

    def __init__(self, node: fx.Node, values: Values) -> None:
        super().__init__()
        self._node = node
        self.register_buffer("value", values[node].detach().clone())

    def refresh(self, values: Values) -> None:
        """Take it as it is now."""
        self.value.copy_(values[self._node])


def affine_of(tensors: Sequence[Any], eps: float) -> Affine:
    """Batch norm in eval mode as `s·x + t`: s and t, new tensors [channels], of mean, variance, weight and bias."""
    mean, variance, weight, bias = tensors
    scale = (variance + eps).rsqrt_()
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift.add_(bias)
