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

from bt_fast import allocation, faults, ops
from bt_fast.allocation import METRICS, POLICIES, Judged, Metric, Oracle, Policy
from bt_fast.faults import CheckedRead, Fault
from bt_fast.ops.numeric import computable, kind_of
from bt_fast.speedup import Fractions, theoretical_speedup_augmix

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
        certainty: [m] of the same dtype, what the metric gave; `svar` itself by default.
        probabilities: [m, K] of the same dtype, softmax of the clean logits.
        counts: the numbers that the host needs, on their way to it; `assign` has waited for them.
    """

    group: Tensor
    steps: Tensor
    step_size: Tensor
    order: Tensor
    threshold: Tensor
    svar: Tensor
    certainty: Tensor
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
    """The compute allocation of BulletTrain (Eq. 5, Eq. 6, Algorithm 2) and its moving state.

    A module without parameters: its state is in buffers, so that it moves, saves and loads with everything else.

    A sample of n steps has the size 1.7·ε/n, but a boundary sample the `step_size` of the assignment. A policy other
    than the three groups decides counts, not groups: with it whoever takes N_B steps has `step_size`.

    Args:
        boundary_steps: N_B, robust_steps: N_R, outlier_steps: N_O; each at least 0.
        gamma: γ in (0, 1], scales the measured robust accuracy.
        momentum: p in [0, 1), of the moving average.
        metric: how sure the model is of a sample, in place of SVar in Eq. 6: a name in `allocation.METRICS`, or a
            function of (logits [m, K] in float32 or float64, labels [m] int64) that returns [m] floating point: the
            surer, the greater, at least 0 where correct and less where misclassified. Whether a sample is an outlier
            is decided by its logits, not by this sign. NaN of sound logits is an error, ±Inf the largest float32.
        policy: how many steps a sample takes: a name in `allocation.POLICIES`, or a function of `allocation.Judged`
            that returns [m] integers in 0..max(N_B, N_R, N_O); other values are an error.

    Attributes:
        robust_fraction: 0-dim float64 buffer, F_R; starts at 0.
        group_counts: [3] int64 buffer, samples assigned so far to (outlier, boundary, robust).
        steps_assigned: 0-dim int64 buffer, attack steps assigned so far; None with the policy of three groups, whose
            `group_counts` tell. Where a loaded state lacks it, those tell too.
        unreported_faults: 0-dim int64 buffer, updates that met NaN logits since the last read; raised by the next.
        unreported_gradients: 0-dim int64 buffer, samples whose input gradient held NaN in an attack; raised so too.

    Raises:
        TypeError: a step count is not an integer, or the metric or policy neither a name nor a function.
        ValueError: a step count is negative, γ or p out of range, or the name of a metric or policy not known.
    """

    robust_fraction: Tensor
    group_counts: Tensor
    steps_assigned: Tensor | None
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
        metric: str | Metric = "signed_variance",
        policy: str | Policy = "three_groups",
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
        self.metric = allocation.rule_of("metric", metric, METRICS)
        self.policy = allocation.rule_of("policy", policy, POLICIES)
        by_group = self.policy is allocation.three_groups
        self.register_buffer("robust_fraction", torch.zeros((), dtype=torch.float64))
        self.register_buffer("group_counts", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("steps_assigned", None if by_group else torch.zeros((), dtype=torch.int64))
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
        rules = ""
        if self.metric is not allocation.signed_variance:
            rules += f", metric={allocation.name_of(self.metric, METRICS)}"
        if self.policy is not allocation.three_groups:
            rules += f", policy={allocation.name_of(self.policy, POLICIES)}"
        return (
            f"{self.boundary_steps}, {self.robust_steps}, {self.outlier_steps}, "
            f"gamma={self.gamma:g}, momentum={self.momentum:g}{rules}"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load a state that was saved before there were policies, or with that of three groups."""
        name, counts = f"{prefix}steps_assigned", state_dict.get(f"{prefix}group_counts", ())
        if self.steps_assigned is not None and name not in state_dict and getattr(counts, "shape", None) == (3,):
            state_dict[name] = sum(n * counts[group] for group, n in enumerate(self._group_steps))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def assign(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        epsilon: float = 0.031,
        step_size: float | None = None,
        attacked_logits: Tensor | None = None,
    ) -> Assignment:
        """Sort a minibatch into groups by its clean logits (Eq. 6) and give each sample its steps.

        Args:
            logits: [m, K] floating point, K ≥ 2, of the clean samples in the attack's (eval) mode. m may be 0.
            labels: [m] integers in 0..K-1, on the logits' device.
            epsilon: ε > 0, in pixel units; sets `1.7·ε/N` for robust samples and outliers.
            step_size: α_B > 0 of the boundary samples, in pixel units; `1.7·ε/N_B` if not given. With a policy other
                than that of three groups: of whoever takes N_B steps.
            attacked_logits: [m, K] floating point, of the attacked samples in the same mode: for the policy `Oracle`,
                and only for it. (The objectives see to it themselves.)

        Raises:
            TypeError: logits are not floating point, labels not integers, or the metric or policy returned no such
                tensor.
            ValueError: a shape, device or value does not fit, of what the metric or policy returned too; the module is
                unchanged.
        """
        assignment = self.start_assignment(
            logits, labels, epsilon=epsilon, step_size=step_size, attacked_logits=attacked_logits
        )
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
        attacked_logits: Tensor | None = None,
        of_attack: Sequence[Fault] = (),
    ) -> Assignment:
        """`assign` without waiting for its counts: faults are raised by the first use of a count.

        Args:
            logits, labels, epsilon, step_size, attacked_logits: as for `assign`.
            inputs: further faults of this minibatch to be raised with the counts (pixels out of range, say).
            names: what error messages call the logits and the labels.
            of_attack: faults of the oracle's attack, which are told if nothing else is wrong.
        """
        check_logits_and_labels(logits, labels)
        self._check_device(logits)
        self._check_attacked(logits, attacked_logits)
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
        certainty = svar
        if self.metric is not allocation.signed_variance:
            certainty = allocation.certainty_of(self.metric, logits, labels)
            found.append(_without_certainty(certainty, unfit))
        sizes = self._step_sizes(epsilon, step_size)
        by_group = self.policy is allocation.three_groups
        threshold, group, steps, step_sizes, order, counts = ops.assign_steps(
            certainty,
            correct,
            self.robust_fraction,
            self._group_steps,
            sizes,
            unfit,
            faults.counts_of(found),
            self.group_counts if by_group else None,
        )
        messages = [*(fault.message for fault in found), *faults.unfit_messages(logits, names)]
        if not by_group:
            late = list(of_attack)
            if isinstance(self.policy, Oracle) and attacked_logits is not None:
                attacked = ops.signed_variance(attacked_logits.detach(), labels)
                group = self.policy.groups(correct, attacked.correct)
                late.append(faults.marked_rows(attacked.unfit & 1, "attacked_logits"))
            judged = Judged(certainty, correct, group, threshold, self.robust_fraction, self._group_steps)
            steps, order, counts, late = self._by_policy(judged, counts[-len(messages) :], late)
            step_sizes = self._sizes_by_count(steps, epsilon, sizes[ops.BOUNDARY])
            messages += [fault.message for fault in late]
        self.unreported_faults.zero_()
        self.unreported_gradients.zero_()
        return Assignment(
            group=group,
            steps=steps,
            step_size=step_sizes,
            order=order,
            threshold=threshold,
            svar=svar,
            certainty=certainty,
            probabilities=probabilities,
            counts=CheckedRead(counts, messages),
        )

    def _by_policy(
        self, judged: Judged, wrong: Tensor, late: Sequence[Fault]
    ) -> tuple[Tensor, Tensor, Tensor, list[Fault]]:
        """What `ops.assign_steps` does for three groups, by a policy: steps [m], order [m], counts, the late faults.

        The groups' sizes and the steps are added to what has been assigned unless something is wrong.

        Args:
            wrong: [f] int64, the counts of the faults that are told first; late: those behind them.
        """
        steps, most = allocation.steps_of(self.policy, judged), max(self._group_steps)
        outside = ((steps < 0) | (steps > most)).sum()
        message = f"policy must return steps in 0..{most}, but {{count}} of {len(steps)} are not"
        late = [*late, Fault(outside, message)]
        steps = steps.clamp(0, most)  # the order has room for no others
        order, active = ops.order_by_steps(steps, most)
        sizes = (judged.group == torch.arange(3, device=steps.device)[:, None]).sum(dim=1)
        wrong = torch.cat([wrong, faults.counts_of(late)])
        sound = ~wrong.any()
        self.group_counts += sizes * sound
        if self.steps_assigned is not None:  # as it is for these policies
            self.steps_assigned += steps.sum() * sound
        return steps, order, torch.cat([active, sizes, wrong]), late

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
            self.take_back(assignment)
            faults.read([fault]).wait()

    def take_back(self, assignment: Assignment) -> None:
        """Let an assignment not count in `group_counts` and `steps_assigned`: its attack could not be run.

        Args:
            assignment: one of this module's, which has counted.
        """
        self.group_counts -= torch.tensor(assignment.group_sizes, device=self.group_counts.device)
        if self.steps_assigned is not None:
            self.steps_assigned -= sum(assignment.active_counts)

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
        """Start the measured fractions and `mean_steps` anew; F_R, which steers the assignment, stays."""
        self.group_counts.zero_()
        if self.steps_assigned is not None:
            self.steps_assigned.zero_()

    @property
    def mean_steps(self) -> float:
        """Attack steps per sample, over all samples assigned since the start or `reset_fractions`; at first NaN."""
        total = int(self.group_counts.sum())
        if total == 0:
            return math.nan
        if self.steps_assigned is None:
            return self.fractions.mean_steps(self.boundary_steps, self.robust_steps, self.outlier_steps)
        return int(self.steps_assigned) / total

    def theoretical_speedup(self, baseline_steps: int | None = None) -> float:
        """Eq. 7, `(N + 1) / (mean_steps + 1)`; NaN before the first assignment.

        Args:
            baseline_steps: N of the training it is compared with; N_B if not given, as in the paper.

        Raises:
            TypeError or ValueError: it is not an integer of at least 0.
        """
        baseline = self.boundary_steps if baseline_steps is None else step_count("baseline_steps", baseline_steps)
        return (baseline + 1) / (self.mean_steps + 1)

    def theoretical_speedup_augmix(self) -> float:
        """`3 / (1 + 2·F)`, what `augmix_loss` saves; NaN before the first assignment.

        F is the measured share of samples that it augments: F_B, or with another policy `mean_steps` (at N_B = 1).
        """
        if not self.group_counts.any():
            return math.nan
        share = self.fractions.boundary if self.steps_assigned is None else self.mean_steps
        return theoretical_speedup_augmix(share)

    @property
    def _group_steps(self) -> tuple[int, int, int]:
        """(N_O, N_B, N_R), as the ops number the groups."""
        return self.outlier_steps, self.boundary_steps, self.robust_steps

    def _step_sizes(self, epsilon: float, step_size: float | None) -> tuple[float, float, float]:
        """α of (outlier, boundary, robust)."""
        boundary = _step_size(epsilon, self.boundary_steps)
        if self.boundary_steps and step_size is not None:
            boundary = step_size
        return _step_size(epsilon, self.outlier_steps), boundary, _step_size(epsilon, self.robust_steps)

    def _sizes_by_count(self, steps: Tensor, epsilon: float, boundary: float) -> Tensor:
        """α [m] float64 of any counts: `boundary` at N_B, 1.7·ε/n at any other n, and 0 at 0."""
        travel = torch.full((), STEP_FACTOR * epsilon, dtype=torch.float64, device=steps.device)
        sizes = torch.where(steps == self.boundary_steps, boundary, travel / steps.clamp(min=1))
        return sizes.masked_fill_(steps == 0, 0.0)

    def _check_attacked(self, logits: Tensor, attacked: Tensor | None) -> None:
        if not isinstance(self.policy, Oracle):
            if attacked is not None:
                raise ValueError("attacked_logits are for the policy 'oracle' alone, but the policy is another")
            return
        if attacked is None:
            raise ValueError(
                "policy is an Oracle, whose groups need attacked_logits=, the model's logits of attacked samples: "
                "the objectives run that attack, `assign` alone cannot"
            )
        if not isinstance(attacked, Tensor) or not computable(attacked):
            raise TypeError(f"attacked_logits must be a floating-point tensor, got {kind_of(attacked)}")
        if attacked.shape != logits.shape:
            raise ValueError(
                f"attacked_logits must have the logits' shape {list(logits.shape)}, got {list(attacked.shape)}"
            )
        if attacked.device != logits.device:
            raise ValueError(
                f"attacked_logits must be on {logits.device} like the logits, but are on {attacked.device}"
            )

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
    if not computable(logits):
        raise TypeError(f"logits must be floating point, got {kind_of(logits)}")
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
    try:
        count = operator.index(value)
    except TypeError as error:  # of tensors and arrays
        raise TypeError(f"{name} must be an integer, got {value!r}") from error
    if count < least:
        raise ValueError(f"{name} must be at least {least}, got {count}")
    return count


def _without_certainty(certainty: Tensor, unfit: Tensor) -> Fault:
    """The number of sound samples of which the metric does not say anything."""
    count = (certainty.isnan() & (unfit == 0)).sum()
    return Fault(count, f"metric must return numbers, but gave NaN for {{count}} of {len(certainty)} samples")


def _step_size(epsilon: float, steps: int) -> float:
    return STEP_FACTOR * epsilon / steps if steps else 0.0


def real(name: str, value: Any) -> float:
    """`value` as a float; TypeError or ValueError that names `name` unless it is a real number that fits."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError as error:  # of an integer or a fraction
        raise ValueError(f"{name} must be a number that fits into a float, got a larger one") from error


def positive(name: str, value: float) -> None:
    """Raise TypeError or ValueError that names `name` unless `value` is a finite number greater than 0."""
    if not (real(name, value) > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a finite number greater than 0, got {value}")
