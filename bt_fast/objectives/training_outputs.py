"""Whether a model returns logits in the modes of its update too, looked at before the attack and not after it.

Some nets return more in train mode: Inception its auxiliary logits, say. Two images show it, once for each model and
its settings (its modules, their modes, and their other attributes that are bools or names), without a gradient and with
buffers and random numbers as they were. It is looked at only where some module's own code reads `training`: no layer of
torch's returns another kind of output in train mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from types import CodeType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bt_fast.attack.device import RandomStates
from bt_fast.attack.forward import buffers_kept, checked_logits, training_modes, uncompiled
from bt_fast.attack.logits import SelectError
from bt_fast.attack.wrapped import unwrapped
from bt_fast.untraced import untraced
from bt_fast.validation import check_model

MOST_SETTINGS = 64  # of one model: one whose forwards set its flags at random is left to its update after these

_known: WeakKeyDictionary[nn.Module, set[tuple[object, ...]]] = WeakKeyDictionary()  # settings that need no look


@untraced
def check_training_outputs(model: nn.Module, x: Tensor, pixels: Callable[[Tensor], Tensor]) -> None:
    """Raise TypeError or ValueError unless the model is known to return logits in the modes of an update.

    What only the update's own batch can show is left to it: where the two images' forward raises, and where there are
    several ranks, which might wait for each other in it.

    Args:
        x: [m, ...]; `pixels` makes images of it as the model takes them.
    """
    check_model(model)
    model = unwrapped(model)
    known, settings = _known.setdefault(model, set()), _settings(model)
    if settings in known or len(known) >= MOST_SETTINGS:
        return
    if any(map(_reads_its_mode, model.modules())):
        if x.is_meta or (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        _look(model, pixels(x[:2].detach().clone()))
    known.add(settings)


def _settings(model: nn.Module) -> tuple[object, ...]:
    """What a look has seen of a model. Not its numbers, of which some count its forwards."""
    result: list[object] = []
    for module in model.modules():
        values = vars(module)
        forward = values.get("forward")  # as code, since a bound one would keep the model
        result += (id(module), type(module), getattr(forward, "__code__", None))
        result += [value for value in values.values() if type(value) in (bool, str)]
    return tuple(result)


def _look(model: nn.Module, images: Tensor) -> None:
    random = RandomStates.of(images.device)
    try:
        with training_modes(model), buffers_kept(model), torch.no_grad(), uncompiled():
            returned: object = model(images)
    except SelectError as error:
        raise SelectError(f"in train mode, in which the update runs: {error}") from error
    except Exception:  # of a forward that two images do not suit
        return
    finally:
        random.restore()
    checked_logits(returned, len(images), where=" in train mode, in which the update runs")


def _reads_its_mode(module: nn.Module) -> bool:
    kind: type = type(module)
    return _mentions_training(kind) or _in_code(vars(module).get("forward"))


@lru_cache(maxsize=4096)
def _mentions_training(kind: type) -> bool:
    """Whether a class of modules, or one that it inherits from, reads `training` in its own code; torch's do not count.

    Nor do those of this package.
    """
    own = (
        base for base in kind.__mro__ if not base.__module__.startswith(("torch.", "bt_fast.")) and base is not object
    )
    return any(_in_code(value) for base in own for value in vars(base).values())


def _in_code(value: Any) -> bool:
    for behind in ("__func__", "fget", "__wrapped__"):  # a class's or a static method, a property, a decorator
        value = getattr(value, behind, value)
    code = getattr(value, "__code__", None)
    return isinstance(code, CodeType) and any("training" in part.co_names for part in _parts(code))


def _parts(code: CodeType) -> Iterator[CodeType]:
    """The code and what is defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _parts(constant)
