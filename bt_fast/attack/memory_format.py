"""Images with the channel as the fastest index, for the models whose forwards take them.

A forward that calls `.view` on activations of more than one pixel does not: it needs them contiguous.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bt_fast.attack.forward import eval_mode, logits_of, uncached
from bt_fast.attack.wrapped import unwrapped
from bt_fast.untraced import untraced

CONTIGUOUS = "its forward calls .view on activations, which needs them contiguous: write .flatten(1) or .reshape"

_takes: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def formatted(x: Tensor, channels_last: bool) -> Tensor:
    """4-d images with the channel as the fastest index, if so."""
    return x.contiguous(memory_format=torch.channels_last) if channels_last and x.dim() == 4 else x


@untraced
def takes_channels_last(model: nn.Module, x: Tensor | None = None) -> bool:
    """Whether a model runs on such images, as far as is known.

    Where it is not, one forward of an image of `x` [n, ...], if given, in eval mode tells.
    """
    model = unwrapped(model)
    if x is not None and model not in _takes and x.dim() == 4:
        with torch.no_grad(), uncached(x), eval_mode(model):
            logits_in_format(model, x[:1].detach(), channels_last=True)
    return _takes.get(model, True)


def logits_in_format(model: nn.Module, x: Tensor, channels_last: bool) -> Tensor:
    """The outputs [n, d] of images x [n, ...], which are contiguous where the model turns out to need that."""
    if not channels_last or x.dim() != 4:
        return logits_of(model, x, least=1)
    if not _takes.get(model, True):
        return logits_of(model, x.contiguous(), least=1)
    try:
        logits = logits_of(model, formatted(x, channels_last), least=1)
    except RuntimeError as error:
        if not needs_contiguous(error):
            raise
        _takes[model] = False
        return logits_of(model, x.contiguous(), least=1)
    _takes[model] = True
    return logits


def needs_contiguous(error: BaseException | None) -> bool:
    """Whether it was raised by `.view` on what is not contiguous."""
    return error is not None and "view size is not compatible" in str(error)
