"""Detects models with logits of a sample that depend on the other samples of its batch in eval mode.

Causes are a batch norm without running statistics, or a layer that uses the batch's mean or attends to the batch.
"""

from __future__ import annotations

from weakref import WeakSet

import torch
from torch import Tensor, nn

from bt_fast.attack.device import RandomStates
from bt_fast.attack.forward import buffers_kept, clean_logits, uncompiled
from bt_fast.attack.threat import ThreatModel
from bt_fast.untraced import untraced
from bt_fast.warning import warn_caller

_looked_at: WeakSet[nn.Module] = WeakSet()
ROOM = 1e-2  # relative to the largest logit: far above rounding in 16 bits, far below the effect of another image


@untraced
def warn_of_neighbours(model: nn.Module, x: Tensor, threat: ThreatModel, instead: str) -> None:
    """Warns once for a model if, in eval mode, the first image's logits change with the image beside it.

    Runs two forwards of two images, which leave buffers and generators unchanged; on a GPU the host waits for them.

    Args:
        x: [m, ...], m ≥ 1, images within the threat model's bounds.
        instead: the caller's alternative to changing the model.
    """
    if model in _looked_at or x.is_meta:
        return
    alone = _alone(model, x[:1].detach(), threat)
    _looked_at.add(model)
    if not alone:
        warn_caller(
            "the model's logits of an image depend on the other images of its batch, in eval mode too: what an attack "
            "that drops samples from the batch finds depends on who is dropped. Give its norms statistics of their "
            f"own, BatchNorm2d(..., track_running_stats=True) say, or {instead}"
        )


def _alone(model: nn.Module, image: Tensor, threat: ThreatModel) -> bool:
    other = threat.lower + threat.upper - image
    random = RandomStates.of(image.device)
    both = []
    try:
        with uncompiled(), buffers_kept(model):  # two rows are no size to compile for
            for beside in (image, other):
                random.restore()
                both.append(clean_logits(model, torch.cat([image, beside]))[0].float())
    finally:
        random.restore()
    same, moved = (logits.nan_to_num(0.0, 0.0, 0.0) for logits in both)
    return bool((same - moved).abs().max() <= ROOM * same.abs().max().clamp_min(1e-30))
