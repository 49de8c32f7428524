"""Adversarial weight perturbation (Wu, Xia and Wang, 2020): each update is taken at weights that raise the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bt_fast.attack.forward import reentrant_refused
from bt_fast.attack.wrapped import sharded_parts, unwrapped
from bt_fast.objectives.passes import Pass, check_moving, wanting
from bt_fast.ops.numeric import kind_of
from bt_fast.validation import check_choice, check_kind, check_model, real

SMALL = 1e-20  # the authors', by which a gradient of 0 gives no NaN


class AWP:
    """Adversarial weight perturbation around any loss: `with awp(criterion, x, y) as loss: ...`.

    ```python
    awp = AWP(model, gamma=5e-3)
    for x, y in loader:
        optimizer.zero_grad()
        with awp(criterion, x, y) as loss:  # the weights are moved inside of the block
            loss.backward()
            optimizer.step()
    ```

    Of Wu et al. (2020). The loss of a minibatch is computed twice on one x', which is made by the weights as they are.
    The first pass takes the gradient g of the whole loss; no `.grad` and no buffer of the model keeps anything of it.
    Each trained parameter w of two or more dimensions with "weight" in its name then moves by `γ·‖w‖·g / (‖g‖ +
    1e-20)`. There the second pass computes the loss of the block. When the block ends, by an exception too, the weights
    come back.

    This is the authors' step of a proxy network by SGD (whose length the scaling takes out), and their update: of a
    loss with two clean forwards (TRADES) batch norm sees adversarial, clean, clean. As with them the move is subtracted
    again, so that a weight keeps what the block's step did to it up to one rounding of the weight's own size. A weight
    that the block has not changed (by no step, or one that a `GradScaler` skipped) comes back to the bit. A weight with
    a gradient that is not finite does not move.

    With mining the first pass moves F_R and the counts. `criterion.last` is of the second. Under
    `DistributedDataParallel` g is the mean of the ranks, so that all move alike. Nothing is kept from one block to the
    next: a checkpoint needs nothing of this. One that is taken within a block holds moved weights.

    Args:
        model: the network that the loss trains, compiled and wrapped as for the losses.
        gamma: γ ≥ 0, at least the rounding of the weights' dtype (in bfloat16 0.008). TRADES-AWP has 5e-3, AT-AWP 1e-2.
            It may be set. 0 moves nothing and costs no pass: for a warm-up, in the same order of forwards.
        samples: whose loss the first pass takes: "all", or with mining "moved", of those with attack steps alone (if
            they are two at least), at their share of the cost; F_R then counts the others by the clean logits that
            judged them.
        scaler: the loop's `GradScaler`, for float16 under autocast: the first pass scales its loss by it, too, without
            which small gradients are lost.

    Raises:
        TypeError: an argument is not of its kind.
        ValueError: gamma is out of range, or samples not known.
    """

    def __init__(
        self,
        model: nn.Module,
        gamma: float = 5e-3,
        *,
        samples: Literal["all", "moved"] = "all",
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        check_model(model)
        check_choice("samples", samples, ("all", "moved"))
        check_kind("scaler", scaler, torch.amp.GradScaler, "give the one that scales the loop's loss", optional=True)
        self.model = model
        self.gamma = gamma
        self.samples = samples
        self.scaler = scaler
        self._open = False

    @property
    def gamma(self) -> float:
        """The length γ of a weight's move, as a share of its norm; may be set."""
        return self._gamma

    @gamma.setter
    def gamma(self, gamma: float) -> None:
        number = real("gamma", gamma)
        if not 0 <= number < math.inf:
            raise ValueError(f"gamma must be a finite number of at least 0, got {gamma}: write gamma=5e-3")
        self._gamma = number

    @contextmanager
    def __call__(self, loss: Callable[..., Tensor], x: Any, y: Any, *args: Any, **options: Any) -> Iterator[Tensor]:
        """A block with the weights moved. Its value is the loss there, ready for `backward()`.

        Args:
            loss: a loss of bt_fast, or a function of (model, x, y) that returns a tensor of one number. It is called
                twice and uses the model that it is given. A function may call losses of bt_fast, each once; x' of
                another attack is made before the block, by `perturb` say.
            x, y, args, options: what the loss is called with, after the model.

        Raises:
            TypeError: the loss cannot be called, or returns no tensor.
            ValueError: it returns more numbers than one, or one without gradient; the model has no weight to move, or
                is sharded by `fully_shard`; gamma is less than a weight's rounding; samples is "moved" without mining.
            RuntimeError: a block of this AWP is open already.

        With all of these, and with the loss's own errors, no weight has changed.
        """
        if not callable(loss):
            raise TypeError(
                f"loss must be a loss or a function of (model, x, y), got {type(loss).__name__}: "
                "write `with awp(criterion, x, y) as loss:`"
            )
        if self._open:
            raise RuntimeError("a block of this AWP is open, whose weights are moved: end it before the next one")
        call = partial(_value, loss, x=x, y=y, args=args, options=options)
        moved: list[_Moved] = []
        self._open = True
        try:
            gamma = self.gamma
            for weight, gradient in self._gradients(call) if gamma > 0 else ():
                moved.append(_Moved(weight, gradient, gamma))
            torch.clear_autocast_cache()  # of the caller's autocast: it holds casts of the weights as they were
            with wanting(Pass(further=gamma > 0, adversarial_first=True)):
                value = call(self.model)
            yield value
        finally:
            for one in moved:
                one.take_back()
            torch.clear_autocast_cache()
            self._open = False

    def _gradients(self, call: Callable[[nn.Module], Tensor]) -> list[tuple[Tensor, Tensor]]:
        """The weights that move, and the gradient of the first pass for each of them that has one."""
        model = unwrapped(self.model)  # neither of the ranks' sums of gradients nor of `.grad` is any part of this
        weights = _weights(model, self.gamma)
        buffers, of_moving = _Buffers(model), self.samples == "moved"
        try:
            with torch.enable_grad(), wanting(Pass(of_moving=of_moving, update_begins=buffers.note)):
                value = call(model)
                check_moving(of_moving and not buffers.noted)
                value = value if self.scaler is None else self.scaler.scale(value)
            with reentrant_refused():
                gradients = torch.autograd.grad(value, weights, allow_unused=True)
        except BaseException:
            buffers.forget()  # of an attack that moves them, too, nothing stays
            raise
        finally:
            buffers.put_back()
        wrapper = getattr(self.model, "_orig_mod", self.model)
        if isinstance(wrapper, DistributedDataParallel):
            gradients = _mean_of_ranks(weights, gradients, wrapper.process_group)
        return [(w, g.to_dense()) for w, g in zip(weights, gradients, strict=True) if g is not None]

    def __getstate__(self) -> dict[str, Any]:
        if self._open:
            raise RuntimeError(
                "a copy within the block would have moved weights: wait until `with awp(...):` has ended"
            )
        return self.__dict__

    def __repr__(self) -> str:
        return f"AWP({type(self.model).__name__}, gamma={self.gamma:g}, samples={self.samples!r})"


class _Moved:
    """A weight that is moved up its gradient when this is made."""

    @torch.no_grad()
    def __init__(self, weight: Tensor, gradient: Tensor, gamma: float) -> None:
        norm = gradient.norm()
        move = gamma * (weight.norm() / (norm + SMALL) * gradient)
        self._weight, self._before = weight, weight.detach().clone()
        self._move = torch.where(norm.isfinite(), move, 0.0).to(weight.dtype)
        weight.add_(self._move)

    @torch.no_grad()
    def take_back(self) -> None:
        """Subtract the move, or put the weight back where nothing has changed it since."""
        unchanged = self._weight == self._before + self._move
        self._weight.copy_(torch.where(unchanged, self._before, self._weight - self._move))


class _Buffers:
    """The buffers of a model, and their values at the last `note`."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        self.note()
        self._first = self._kept
        self.noted = False  # by a loss of bt_fast with an attack, which may have moved some on purpose

    @torch.no_grad()
    def note(self) -> None:
        """Copy the values that are to be brought back."""
        named = [(m, name, b) for m in self._model.modules() for name, b in m._buffers.items() if b is not None]
        self._kept = [(module, name, buffer, buffer.detach().clone()) for module, name, buffer in named]
        self.noted = True

    def forget(self) -> None:
        """Bring the first values back, whatever was noted since."""
        self._kept = self._first

    @torch.no_grad()
    def put_back(self) -> None:
        """Put values, and buffers in whose place there are others, back."""
        for module, name, buffer, value in self._kept:
            buffer.data.copy_(value)  # .data: an earlier loss may still await its backward
            module._buffers[name] = buffer


def _value(
    loss: Callable[..., Tensor], model: nn.Module, x: Any, y: Any, args: tuple[Any, ...], options: dict[str, Any]
) -> Tensor:
    """The loss, checked to be a number, with a gradient where there are any."""
    value = loss(model, x, y, *args, **options)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"loss must return a tensor of one number, got {kind_of(value)}: let it return the loss alone")
    if value.numel() != 1:
        raise ValueError(f"loss must return one number, got shape {list(value.shape)}: let it end with .mean()")
    if torch.is_grad_enabled() and not value.requires_grad:
        raise ValueError(
            "loss must return a number with a gradient to the model's weights, got one without: "
            "take .detach() and torch.no_grad() out of it"
        )
    return value


def _weights(model: nn.Module, gamma: float) -> list[Tensor]:
    """The parameters that AWP moves: ValueError where there are none, or it cannot."""
    if sharded_parts(model):
        raise ValueError(
            "model must not be sharded by fully_shard for AWP: leave AWP out, or use DistributedDataParallel"
        )
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    weights: list[Tensor] = [p for name, p in named if "weight" in name and p.dim() > 1 and p.is_floating_point()]
    if not weights:
        raise ValueError(
            "model must have a trained weight of two or more dimensions for AWP, got none: write gamma=0 until it has"
        )
    rounding = max(torch.finfo(p.dtype).eps for p in weights)
    if gamma < rounding:
        raise ValueError(
            f"gamma must be at least the rounding of the weights, {rounding:.2g}, got {gamma}: "
            "write gamma=5e-3, and keep weights in float32 (under autocast, for 16 bits)"
        )
    return weights


def _mean_of_ranks(
    weights: list[Tensor], gradients: tuple[Tensor | None, ...], group: dist.ProcessGroup
) -> tuple[Tensor, ...]:
    """The gradients' mean over the ranks; on a rank where a weight has none it counts as 0."""
    dense = [torch.zeros_like(w) if g is None else g.to_dense() for w, g in zip(weights, gradients, strict=True)]
    together = torch.cat([g.flatten() for g in dense])
    dist.all_reduce(together, group=group)
    together /= dist.get_world_size(group)
    parts = together.split([g.numel() for g in dense])
    return tuple(part.view_as(g) for part, g in zip(parts, dense, strict=True))
