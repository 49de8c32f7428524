"""Takes the optimizer's step only if the loss and the gradients are finite: NaN is raised or skipped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from bt_fast.device import HostRead
from bt_fast.faults import NonFiniteError, listed
from bt_fast.mining import BulletTrain
from bt_fast.validation import check_choice, check_floating, check_kind, check_process_group

NON_FINITE = ("raise", "skip")
MOST_IN_A_ROW = 100  # consecutive skipped minibatches; more are no accident
Indices = Tensor | Sequence[int] | None
REASONS = ("the loss is NaN or infinite", "the gradients of the parameters hold NaN or Inf")


@dataclass(frozen=True)
class Skipped:
    """A minibatch that a `Guard` left out, so that the weights have not learnt from it.

    Attributes:
        minibatch: its number, from 0.
        reason: the text of the error.
        indices: its samples' indices in the data set, if the guard has them; those of the minibatch before if the
            reason lies there (`NonFiniteError.earlier`).
        samples: the places of the faulty samples in their minibatch; empty if they are unknown.
    """

    minibatch: int
    reason: str
    indices: tuple[int, ...]
    samples: tuple[int, ...]

    @property
    def blamed(self) -> tuple[int, ...]:
        """The indices of the faulty samples; all of the minibatch if they are unknown."""
        return tuple(self.indices[i] for i in self.samples if i < len(self.indices)) or self.indices

    def __str__(self) -> str:
        return f"minibatch {self.minibatch}: {self.reason}{listed(self.blamed, 'of the data')}"


class Guard:
    """Takes an optimizer's steps, except those of minibatches with NaN or Inf in logits, gradients or loss.

    ```python
    guard = Guard(optimizer, model, bullet, non_finite="skip")
    for indices, x, y in loader:
        with guard.minibatch(indices):
            loss = trades_loss(model, x, y, optimizer, bullet=bullet)
            loss.backward()
            guard.step(loss)
    guard.settle()
    ```

    A faulty minibatch changes neither the weights and the optimizer's state nor the buffers of `modules` (batch norm's
    statistics, F_R and the counts of a `BulletTrain`), which are copied at the start of each minibatch. Only the random
    stream has advanced. A `NonFiniteError` of an objective in the `with` block is a fault of the minibatch too.

    An optimizer with `fused=True` (SGD, Adam, AdamW) skips a faulty step on the device itself. Then the host does not
    wait: a fault is raised in the next `step`, or in `settle`. (Except in the first step, in which fused SGD would
    begin with an undefined momentum.) Any other optimizer waits for the result in `step`. A fault that `bullet` reports
    one call late on a GPU (`NonFiniteError.earlier`) costs the minibatch of that call.

    With a `GradScaler` call `scaler.step` in place of `step`: it skips faulty steps itself, and uses Inf in scaled
    gradients to adjust its scale. `minibatch` still handles the objectives' errors, and restores the buffers then.

    Args:
        optimizer: any with a `step()` without closure.
        modules: their buffers are restored, e.g. the model and its `BulletTrain`.
        non_finite: "raise", or "skip" and go on with the next minibatch.
        process_group: the group of data parallel training: all ranks skip a minibatch in which one has a fault. Every
            rank must then call `step` in each minibatch, and an objective's error must be raised on all ranks (with a
            `BulletTrain` of the same group it is).

    Attributes:
        skipped: the minibatches skipped so far; complete after `settle`.

    Raises:
        TypeError: an argument is not of its kind.
        ValueError: non_finite is neither of the two.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *modules: nn.Module,
        non_finite: Literal["raise", "skip"] = "raise",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        check_kind("optimizer", optimizer, torch.optim.Optimizer, "write Guard(optimizer, model, bullet)")
        for module in modules:
            if not isinstance(module, nn.Module):
                raise TypeError(
                    f"modules must be torch.nn.Module, got {type(module).__name__}: "
                    "write Guard(optimizer, model, bullet)"
                )
        check_choice("non_finite", non_finite, NON_FINITE)
        check_process_group(process_group)
        self.skipped: list[Skipped] = []
        self._group = process_group
        self._optimizer = optimizer
        self._modules = modules
        self._skips = non_finite == "skip"
        self._minibatches = 0
        self._in_a_row = 0
        self._indices: Indices = None
        self._indices_before: Indices = None
        self._kept: list[tuple[nn.Module, str, Tensor]] | None = None  # buffers; None outside a minibatch
        self._has_stepped = False
        self._unread: tuple[HostRead, int, Indices] | None = None
        self._raised: NonFiniteError | None = None

    @contextmanager
    def minibatch(self, indices: Indices = None) -> Iterator[None]:
        """A context for forwards, backward and step of a minibatch; indices [m] in the data set are only for reports.

        A `NonFiniteError` of an objective is raised again, or skipped, after the buffers are restored.
        """
        self._indices_before, self._indices = self._indices, indices
        self._finish()
        self._kept = [
            (module, name, buffer.clone())
            for module in self._submodules()
            for name, buffer in module.named_buffers(recurse=False)
        ]
        try:
            yield
        except NonFiniteError as error:
            self._restore()
            if error is self._raised:  # raised by `step`
                raise
            self.settle()  # raises the earlier fault first
            faulty = self._indices_before if error.earlier else indices
            self._skip(self._minibatches, str(error), faulty, error)
        finally:
            self._kept = None
            self._minibatches += 1

    @torch.no_grad()
    def step(self, loss: Tensor) -> None:
        """Calls `optimizer.step()`, unless the loss, one floating-point number, or a gradient is NaN or infinite.

        With non_finite="raise" it then raises NonFiniteError, for this minibatch or, with a fused optimizer on a GPU,
        for the one before. RuntimeError outside `minibatch`, TypeError or ValueError for another kind of loss.
        """
        if self._kept is None:
            raise RuntimeError(
                "step belongs into the block of `with guard.minibatch():`: "
                "write `with guard.minibatch(): ... guard.step(loss)`"
            )
        check_floating("loss", loss, "give the tensor that had its backward", "must be a floating-point tensor")
        if loss.numel() != 1:
            raise ValueError(f"loss must be one number, got shape {list(loss.shape)}: write loss.mean()")
        self.settle()
        faulty = self._faulty(loss)
        if self._has_stepped and getattr(self._optimizer, "_step_supports_amp_scaling", False):
            self._step_on_device(faulty.any())
            self._unread = (HostRead(faulty.long()), self._minibatches, self._indices)
            if not faulty.is_cuda:
                self.settle()
            return
        results = HostRead(faulty.long()).wait()
        if any(results):
            self._restore()
        else:
            self._optimizer.step()
            self._has_stepped = True
        self._conclude(results, self._minibatches, self._indices)

    def settle(self) -> None:
        """Waits for the result of the last step: call it before a checkpoint, an evaluation or the end.

        NonFiniteError if the step was faulty and faults are raised; the weights are those before it.
        """
        if self._unread is not None:
            (read, number, indices), self._unread = self._unread, None
            self._conclude(read.wait(), number, indices)

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of minibatches, and how many of the last were skipped; settles first."""
        self.settle()
        return {"minibatches": self._minibatches, "in_a_row": self._in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads a state of `state_dict`; `skipped` is not part of it."""
        self._minibatches, self._in_a_row = int(state["minibatches"]), int(state["in_a_row"])

    def _faulty(self, loss: Tensor) -> Tensor:
        """Returns whether the loss and whether a gradient is not finite, on any rank: bool [2] on the loss's device."""
        gradients = [p.grad for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [gradient for gradient in gradients if gradient.numel()]  # the maximum of nothing is an error
        largest = get_total_norm(gradients, torch.inf).to(loss.device) if gradients else torch.zeros_like(loss)
        faulty = ~torch.stack([loss.detach().reshape(()).isfinite(), largest.reshape(()).isfinite()])
        if self._group is None:
            return faulty
        of_ranks = faulty.long()
        dist.all_reduce(of_ranks, dist.ReduceOp.MAX, self._group)
        return of_ranks > 0

    def _step_on_device(self, faulty: Tensor) -> None:
        """Takes a step that the optimizer skips if it is faulty, by the protocol of `GradScaler`."""
        optimizer: Any = self._optimizer
        optimizer.grad_scale, optimizer.found_inf = None, faulty.float()
        try:
            optimizer.step()
        finally:
            del optimizer.grad_scale, optimizer.found_inf
        self._finish()
        for module, name, kept in self._kept or ():
            buffer = getattr(module, name)
            buffer.copy_(torch.where(faulty.to(buffer.device), kept, buffer))

    def _conclude(self, results: list[int], number: int, indices: Indices) -> None:
        if any(results):
            self._skip(number, REASONS[results.index(1)], indices)
        else:
            self._in_a_row = 0

    def _skip(self, number: int, reason: str, indices: Indices, cause: NonFiniteError | None = None) -> None:
        """Records a skipped minibatch, or raises."""
        in_data = indices.tolist() if isinstance(indices, Tensor) else indices or ()
        skipped = Skipped(number, reason, tuple(in_data), cause.samples if cause else ())
        message = f"{skipped}; lower the learning rate, or write non_finite='skip'"
        if self._skips:
            self.skipped.append(skipped)
            self._in_a_row += 1
            if self._in_a_row < MOST_IN_A_ROW:
                return
            message = (
                f"{MOST_IN_A_ROW} minibatches in a row had to be skipped; the last is {skipped}; lower the learning "
                "rate, and begin again from a checkpoint before them"
            )
        earlier = cause.earlier if cause else number < self._minibatches
        self._raised = NonFiniteError(message, skipped.samples, earlier=earlier)
        raise self._raised from cause

    def _submodules(self) -> Iterator[nn.Module]:
        for top in self._modules:
            yield from top.modules()

    def _finish(self) -> None:
        """Applies the mining's pending sum over ranks now: then the copies and the restored state are complete."""
        for module in self._submodules():
            if isinstance(module, BulletTrain):
                module.finish()

    @torch.no_grad()
    def _restore(self) -> None:
        self._finish()
        for module, name, kept in self._kept or ():
            buffer = getattr(module, name)
            same = buffer is not None and buffer.shape == kept.shape  # some modules replace the tensor
            setattr(module, name, buffer.copy_(kept) if same else kept)
