"""Boundary-example mining: which samples deserve how many attack steps (paper, section 3.2). All state is here."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from bt_fast import faults, ops
from bt_fast.faults import CheckedRead, Fault
from bt_fast.speedup import Fractions, theoretical_speedup, theoretical_speedup_augmix

STEP_FACTOR = 1.7  # α = 1.7 ε / N (section 3.1, Fig. 2)


@dataclass(frozen=True, eq=False)
class Assignment:
    """What each of m samples gets. Tensors are on the logits' device and in the batch's own order.

    Attributes:
        group: [m] int64, one of `ops.OUTLIER`, `ops.BOUNDARY`, `ops.ROBUST`.
        steps: [m] int64, attack steps.
        step_size: [m] float64, in pixel units; 0 where `steps` is 0.
        order: [m] int64, the stable order by descending steps.
        threshold: 0-dim float64, T of Eq. 6.
        svar: [m] float32 (float64 for float64 logits), signed prediction variance.
        probabilities: [m, K] of the same dtype, softmax of the clean logits.
        counts: the numbers that the host needs, on their way to it; `assign` has waited for them.
    """

    group: Tensor
    steps: Tensor
    step_size: Tensor
    order: Tensor
    threshold: Tensor
    svar: Tensor
    probabilities: Tensor
    counts: CheckedRead

    @property
    def active_counts(self) -> tuple[int, ...]:
        """For each step t, how many samples have more than t steps: step t works on `order[:active_counts[t]]`."""
        return tuple(self.counts.wait()[:-3])

    @property
    def group_sizes(self) -> tuple[int, int, int]:
        """Samples in (outlier, boundary, robust)."""
        outlier, boundary, robust = self.counts.wait()[-3:]
        return outlier, boundary, robust


class BulletTrain(nn.Module):
    """The three-group compute allocation of BulletTrain (Eq. 5, Eq. 6, Algorithm 2) and its moving state.

    A module without parameters: its state is in buffers, so that it moves, saves and loads with everything else.

    Args:
        boundary_steps: N_B, robust_steps: N_R, outlier_steps: N_O; each at least 0.
        gamma: γ in (0, 1], scales the measured robust accuracy.
        momentum: p in [0, 1), of the moving average.

    Attributes:
        robust_fraction: 0-dim float64 buffer, F_R; starts at 0.
        group_counts: [3] int64 buffer, samples assigned so far to (outlier, boundary, robust).
        unreported_faults: 0-dim int64 buffer, updates that met NaN logits since the last read; raised by the next.
        unreported_gradients: 0-dim int64 buffer, samples whose input gradient held NaN in an attack; raised so too.

    Raises:
        TypeError: a step count is not an integer.
        ValueError: a step count is negative, or γ or p out of range.
    """

    robust_fraction: Tensor
    group_counts: Tensor
    unreported_faults: Tensor
    unreported_gradients: Tensor

    def __init__(
        self,
        boundary_steps: int = 10,
        robust_steps: int = 2,
        outlier_steps: int = 0,
        *,
        gamma: float = 0.8,
        momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.boundary_steps = step_count("boundary_steps", boundary_steps)
        self.robust_steps = step_count("robust_steps", robust_steps)
        self.outlier_steps = step_count("outlier_steps", outlier_steps)
        if not 0.0 < real("gamma", gamma) <= 1.0:
            raise ValueError(f"gamma must lie in (0, 1], got {gamma}")
        if not 0.0 <= real("momentum", momentum) < 1.0:
            raise ValueError(f"momentum must lie in [0, 1), got {momentum}")
        self.gamma = float(gamma)
        self.momentum = float(momentum)
        self.register_buffer("robust_fraction", torch.zeros((), dtype=torch.float64))
        self.register_buffer("group_counts", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("unreported_faults", torch.zeros((), dtype=torch.int64))
        self.register_buffer("unreported_gradients", torch.zeros((), dtype=torch.int64))

    def _apply(self, fn: Any, recurse: bool = True) -> BulletTrain:
        """Follow the moves of the module that holds this one, not its casts: in 16 bits F_R would stand still."""
        exact = self.robust_fraction
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.robust_fraction.dtype != torch.float64:
            self.robust_fraction = exact.to(self.robust_fraction.device)
        return self

    def extra_repr(self) -> str:
        """The configuration, as it would be written."""
        return (
            f"{self.boundary_steps}, {self.robust_steps}, {self.outlier_steps}, "
            f"gamma={self.gamma:g}, momentum={self.momentum:g}"
        )

    def assign(
        self, logits: Tensor, labels: Tensor, *, epsilon: float = 0.031, step_size: float | None = None
    ) -> Assignment:
        """Sort a minibatch into groups by its clean logits (Eq. 6) and give each sample its steps.

        Args:
            logits: [m, K] floating point, K ≥ 2, of the clean samples in the attack's (eval) mode. m may be 0.
            labels: [m] integers in 0..K-1, on the logits' device.
            epsilon: ε > 0, in pixel units; sets `1.7·ε/N` for robust samples and outliers.
            step_size: α_B > 0 of the boundary samples, in pixel units; `1.7·ε/N_B` if not given.

        Raises:
            TypeError: logits are not floating point or labels not integers.
            ValueError: a shape, device or value does not fit; the module is unchanged.
        """
        assignment = self.start_assignment(logits, labels, epsilon=epsilon, step_size=step_size)
        assignment.counts.wait()
        return assignment

    def start_assignment(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        epsilon: float = 0.031,
        step_size: float | None = None,
        inputs: Sequence[Fault] = (),
        names: tuple[str, str] = ("logits", "labels"),
    ) -> Assignment:
        """`assign` without waiting for its counts: faults are raised by the first use of a count.

        Args:
            inputs: further faults of this minibatch to be raised with the counts (pixels out of range, say).
            names: what error messages call the logits and the labels.
        """
        check_logits_and_labels(logits, labels)
        self._check_device(logits)
        positive("epsilon", epsilon)
        if step_size is not None:
            positive("step_size", step_size)
        logits, labels = logits.detach(), labels.long()

        svar, correct, probabilities, unfit = ops.signed_variance(logits, labels)
        found = [
            Fault(
                self.unreported_faults,
                "an earlier update met NaN logits or labels out of range: F_R was not moved by it",
            ),
            Fault(
                self.unreported_gradients,
                "the model's input gradient must be finite, but held NaN for {count} samples of earlier attacks",
            ),
            *inputs,
        ]
        threshold, group, steps, sizes, order, counts = ops.assign_steps(
            svar,
            correct,
            self.robust_fraction,
            (self.outlier_steps, self.boundary_steps, self.robust_steps),
            self._step_sizes(epsilon, step_size),
            unfit,
            faults.counts_of(found),
            self.group_counts,
        )
        self.unreported_faults.zero_()
        self.unreported_gradients.zero_()
        messages = [*(fault.message for fault in found), *faults.unfit_messages(logits, names)]
        return Assignment(
            group=group,
            steps=steps,
            step_size=sizes,
            order=order,
            threshold=threshold,
            svar=svar,
            probabilities=probabilities,
            counts=CheckedRead(counts, messages),
        )

    def report_attack(self, assignment: Assignment, faulty: Tensor) -> None:
        """Take note of the samples that could not move in the attack on an assignment, since their gradient held NaN.

        On the CPU they raise at once, and the assignment does not count; on a GPU, where that would mean to wait for
        the device, they raise with the next assignment's read.

        Args:
            faulty: [m] int32 as `generate` fills it.

        Raises:
            ValueError: on the CPU, if there are any.
        """
        fault = faults.gradients_without_direction(faulty)
        if faulty.is_cuda:
            self.unreported_gradients += fault.count
        elif fault.count:
            self.group_counts -= torch.tensor(assignment.group_sizes)
            faults.read([fault]).wait()

    def update(self, adversarial_logits: Tensor, labels: Tensor) -> None:
        """Move F_R by the share of corrupted samples that are still classified correctly (Eq. 5).

        Logits with NaN leave F_R unchanged. On the CPU they raise at once; on a GPU, where that would mean to wait for
        the device, they raise with the next assignment's read.

        Args:
            adversarial_logits: [m, K] floating point, m ≥ 1, of all m corrupted samples.
            labels: [m] integers in 0..K-1.

        Raises:
            TypeError: logits are not floating point or labels not integers.
            ValueError: a shape, device or value does not fit; the module is unchanged.
        """
        check_logits_and_labels(adversarial_logits, labels)
        self._check_device(adversarial_logits)
        if len(labels) == 0:
            raise ValueError("adversarial_logits must have at least 1 row, got 0")
        logits, labels = adversarial_logits.detach(), labels.long()
        if not logits.is_cuda:
            found = [
                faults.labels_outside(labels, logits.shape[1], "labels"),
                faults.rows_without_number(logits, "adversarial_logits"),
            ]
            faults.read(found).wait()
        state = (self.robust_fraction, self.unreported_faults)
        ops.update_fraction_(*state, logits, labels, self.gamma, self.momentum)

    @property
    def fractions(self) -> Fractions:
        """The measured F_B, F_R and F_O over all samples assigned since the start or `reset_fractions`."""
        outlier, boundary, robust = self.group_counts.tolist()
        total = max(outlier + boundary + robust, 1)
        return Fractions(boundary=boundary / total, robust=robust / total, outlier=outlier / total)

    def reset_fractions(self) -> None:
        """Start the measured fractions anew; F_R, which steers the assignment, stays."""
        self.group_counts.zero_()

    def theoretical_speedup(self, baseline_steps: int | None = None) -> float:
        """Eq. 7 at the measured fractions; NaN before the first assignment.

        Args:
            baseline_steps: N of the training it is compared with; N_B if not given, as in the paper.
        """
        if not self.group_counts.any():
            return math.nan
        return theoretical_speedup(
            self.fractions,
            boundary_steps=self.boundary_steps,
            robust_steps=self.robust_steps,
            outlier_steps=self.outlier_steps,
            baseline_steps=self.boundary_steps if baseline_steps is None else baseline_steps,
        )

    def theoretical_speedup_augmix(self) -> float:
        """`3 / (1 + 2·F_B)` at the measured F_B, what `augmix_loss` saves; NaN before the first assignment."""
        return theoretical_speedup_augmix(self.fractions.boundary) if self.group_counts.any() else math.nan

    def _step_sizes(self, epsilon: float, step_size: float | None) -> tuple[float, float, float]:
        """α of (outlier, boundary, robust)."""
        boundary = _step_size(epsilon, self.boundary_steps)
        if self.boundary_steps and step_size is not None:
            boundary = step_size
        return _step_size(epsilon, self.outlier_steps), boundary, _step_size(epsilon, self.robust_steps)

    def _check_device(self, logits: Tensor) -> None:
        if self.robust_fraction.device != logits.device:
            raise ValueError(
                f"BulletTrain is on {self.robust_fraction.device}, the logits are on {logits.device}: "
                f"move it with .to({str(logits.device)!r})"
            )


def check_logits_and_labels(logits: Tensor, labels: Tensor) -> None:
    """Raise TypeError or ValueError unless logits are floating point [m, K], K ≥ 2, and labels integers [m]."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a tensor, got {type(logits).__name__}")
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits must have shape [m, K] with K >= 2 classes, got {list(logits.shape)}")
    check_labels(labels, len(logits), logits.device)


def check_labels(labels: Tensor, m: int, device: torch.device, name: str = "labels") -> None:
    """Raise TypeError or ValueError that names `name` unless labels are integers [m] on the device."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a tensor of integers, got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {labels.dtype}")
    if labels.shape != (m,):
        raise ValueError(f"{name} must have shape [{m}], one for each sample, got {list(labels.shape)}")
    if labels.device != device:
        raise ValueError(f"{name} must be on {device} like the samples, but are on {labels.device}")


def step_count(name: str, value: SupportsIndex, least: int = 0) -> int:
    """`value` as an int; TypeError or ValueError that names `name` unless it is an integer of at least `least`."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if (count := operator.index(value)) < least:
        raise ValueError(f"{name} must be at least {least}, got {count}")
    return count


def _step_size(epsilon: float, steps: int) -> float:
    return STEP_FACTOR * epsilon / steps if steps else 0.0


def real(name: str, value: Any) -> float:
    """`value`; TypeError that names `name` unless it is a real number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def positive(name: str, value: float) -> None:
    """Raise TypeError or ValueError that names `name` unless `value` is a finite number greater than 0."""
    if not (real(name, value) > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a finite number greater than 0, got {value}")
