"""Boundary-example mining: which samples deserve how many attack steps (paper, section 3.2). All state is here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bt_fast import allocation, faults, ops
from bt_fast.allocation import METRICS, POLICIES, Judged, Metric, Oracle, Policy
from bt_fast.faults import CheckedRead, Fault
from bt_fast.ops.numeric import computable, kind_of
from bt_fast.ranks import Ranks, Together
from bt_fast.speedup import Fractions, theoretical_speedup_augmix
from bt_fast.validation import check_logits_and_labels, positive, real, step_count

EARLIER = 2  # kinds of faults that an earlier update left to be told
MOVED_BY_UPDATES = ("robust_fraction", "unreported_faults", "unreported_gradients")
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
        most_steps: no sample has more.
        ranks: what the process group's ranks told each other, if there is one.
        counted: whether it is in `group_counts`: one of a further pass over a minibatch (`again`) is not.
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
    most_steps: int
    ranks: Together | None = None
    counted: bool = True

    @property
    def active_counts(self) -> tuple[int, ...]:
        """For each step t, how many samples have more than t steps: step t works on `order[:active_counts[t]]`."""
        return tuple(self.counts.wait()[: self.most_steps])

    @property
    def group_sizes(self) -> tuple[int, int, int]:
        """Samples in (outlier, boundary, robust)."""
        outlier, boundary, robust = self.counts.wait()[self.most_steps : self.most_steps + 3]
        return outlier, boundary, robust

    @property
    def steps_of_ranks(self) -> Tensor:
        """[N, most_steps + 1] int64 on the host: how many samples of each rank have 0, 1, ... steps."""
        spread = self.counts.wait()[self.most_steps + 3 :]
        return torch.tensor(spread, dtype=torch.int64, device="cpu").view(-1, self.most_steps + 1)


@dataclass(frozen=True, eq=False)
class _Seen:
    """What is known of a minibatch's m samples before anything is decided.

    Attributes:
        certainty, correct, unfit: [m], as the metric and `ops.signed_variance` say.
        found: what else was wrong, the first two in earlier updates.
        unfit_faults: from the counts [2] of unfit rows, what is to be told of them.
        epsilon: ε; sizes: α of (outlier, boundary, robust).
    """

    certainty: Tensor
    correct: Tensor
    unfit: Tensor
    found: list[Fault]
    unfit_faults: Callable[[Tensor], Sequence[Fault]]
    epsilon: float
    sizes: tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class _Decided:
    """What follows from it; `counts` as `Assignment` and `CheckedRead` read them, faults last."""

    threshold: Tensor
    group: Tensor
    steps: Tensor
    step_size: Tensor
    order: Tensor
    counts: Tensor
    faults: Sequence[Fault]
    ranks: Together | None = None


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
        process_group: of data parallel training, `torch.distributed.group.WORLD` say. F_R, the percentile of Eq. 6 and
            the counts are then those of all ranks' minibatches together, and the same on every rank: N ranks with m
            samples each sort them into the groups of one process with N·m. A policy judges all of them, rank by rank;
            rows that fill up smaller minibatches are outliers of certainty NaN there, and what it says of them is not
            used. What is wrong on one rank is raised on all. Random starts are those of rank 0's generator, by a
            sample's place among all ranks'. Every rank must call the same methods in the same order, and no minibatch
            may be larger than the largest of the group's first. None: each process mines for itself.

    Attributes:
        robust_fraction: 0-dim float64 buffer, F_R; starts at 0.
        group_counts: [3] int64 buffer, samples assigned so far to (outlier, boundary, robust).
        steps_assigned: 0-dim int64 buffer, attack steps assigned so far; None with the policy of three groups, whose
            `group_counts` tell. Where a loaded state lacks it, those tell too.
        unreported_faults: 0-dim int64 buffer, updates that met NaN logits since the last read; raised by the next.
        unreported_gradients: 0-dim int64 buffer, samples whose input gradient held NaN in an attack; raised so too.

    Raises:
        TypeError: a step count is not an integer, the metric or policy neither a name nor a function, or the process
            group none.
        ValueError: a step count is negative, γ or p out of range, the name of a metric or policy not known, or the
            policy an Oracle in a process group.
    """

    robust_fraction: Tensor
    group_counts: Tensor
    steps_assigned: Tensor | None
    unreported_faults: Tensor
    unreported_gradients: Tensor

    # of the last minibatch, for a further pass over it; neither saved nor copied
    _fraction_before: Tensor | None = None  # F_R as it was for it; None where no update has ended it
    _kept: object = None  # what its objective made of it
    _reuse: bool | None = None  # in a block of `again`: what its caller said

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
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.boundary_steps = step_count("boundary_steps", boundary_steps)
        self.robust_steps = step_count("robust_steps", robust_steps)
        self.outlier_steps = step_count("outlier_steps", outlier_steps)
        if not 0.0 < real("gamma", gamma) <= 1.0:
            raise ValueError(f"gamma must lie in (0, 1], got {gamma}: write gamma=0.8")
        if not 0.0 <= real("momentum", momentum) < 1.0:
            raise ValueError(f"momentum must lie in [0, 1), got {momentum}: write momentum=0.9")
        self.gamma = float(gamma)
        self.momentum = float(momentum)
        self.metric = allocation.rule_of("metric", metric, METRICS)
        self.policy = allocation.rule_of("policy", policy, POLICIES)
        self.process_group = process_group
        # the sum over the ranks by which F_R is about to move, and whether it is
        self._unsettled: tuple[Callable[[], Tensor], bool] | None = None
        self._faulty_gradients: Tensor | None = None  # of this rank's attack, to be told with the next update
        by_group = self.policy is allocation.three_groups
        self.register_buffer("robust_fraction", torch.zeros((), dtype=torch.float64))
        self.register_buffer("group_counts", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("steps_assigned", None if by_group else torch.zeros((), dtype=torch.int64))
        self.register_buffer("unreported_faults", torch.zeros((), dtype=torch.int64))
        self.register_buffer("unreported_gradients", torch.zeros((), dtype=torch.int64))
        self._last_attack = (
            torch.empty(0, device="cpu"),
            torch.empty(0, dtype=torch.int64, device="cpu"),
        )  # who was faulty, and who is who

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The group whose ranks mine together; may be set where it is not there yet at construction."""
        return None if self.ranks is None else self.ranks.group

    @process_group.setter
    def process_group(self, group: dist.ProcessGroup | None) -> None:
        self.ranks = _ranks_of(group, self.policy)

    def __getattr__(self, name: str) -> Any:
        if name in MOVED_BY_UPDATES:
            self._settle()
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        passing = ("_fraction_before", "_kept", "_reuse")
        return {name: value for name, value in self.__dict__.items() if name not in passing}

    def _save_to_state_dict(self, *args: Any) -> None:
        self._settle()
        super()._save_to_state_dict(*args)

    def _apply(self, fn: Any, recurse: bool = True) -> BulletTrain:
        """Follow the moves of the module that holds this one, not its casts: in 16 bits F_R would stand still."""
        exact = self.robust_fraction
        self._forget()
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
        self._settle()
        self._forget()
        name, counts = f"{prefix}steps_assigned", state_dict.get(f"{prefix}group_counts", ())
        if self.steps_assigned is not None and name not in state_dict and getattr(counts, "shape", None) == (3,):
            state_dict[name] = sum(n * counts[group] for group, n in enumerate(self._group_steps))
        super()._load_from_state_dict(state_dict, prefix, *args)

    @contextmanager
    def again(self, *, reuse: bool = True) -> Iterator[None]:
        """A further pass over the last minibatch: in the block a loss moves neither F_R nor any count.

        For optimizers that look at one minibatch's loss at several weights, such as sharpness-aware ones:

        ```python
        trades_loss(model, x, y, optimizer, bullet=bullet).backward()
        move_weights_up()
        with bullet.again():
            trades_loss(model, x, y, optimizer, bullet=bullet).backward()
        move_weights_back()
        optimizer.step()
        ```

        The last minibatch is that of the last call outside of such a block. What it left on the device stays until the
        next one begins. With micro-batches go over each again before the next.

        Args:
            reuse: whether the losses in the block take the x' of the first pass (of `augmix_loss`: its views), with
                the steps that made them, and run only the update's forwards. Off, the samples are judged at the
                weights as they are now, by F_R as it was for the first pass, and attacked anew.

        Raises:
            TypeError: reuse is no bool.
            RuntimeError: there is no last minibatch: none yet, the last one ended with an error, or the module was
                moved or loaded since.
        """
        if not isinstance(reuse, bool):
            raise TypeError(
                f"reuse must be True (the x' of the first pass) or False (made anew), got {reuse!r}: "
                "write `with bullet.again(reuse=False):`"
            )
        if self._fraction_before is None:
            raise RuntimeError(
                "again goes over the last minibatch once more, but there is none that ended without an error: call the "
                "loss with bullet= (or assign and update) first, outside of the block of `with bullet.again():`"
            )
        outer, self._reuse = self._reuse, reuse
        try:
            yield
        finally:
            self._reuse = outer

    def keep(self, made: object) -> None:
        """Hold what an objective made of a minibatch, until the next one begins; not in a further pass.

        Args:
            made: what `reused` is to return.
        """
        if self._reuse is None:
            self._kept = made

    def reused(self) -> object:
        """What the minibatch's objective kept, where a further pass is to reuse it; None where x' is to be made.

        An objective asks it first of all: outside of a block of `again` a new minibatch begins with it.

        Raises:
            RuntimeError: it is to be reused, but nothing was kept.
        """
        if self._counts_now:
            self._forget()
        if self._reuse and self._kept is None:
            raise RuntimeError(
                "again(reuse=True) takes the x' that a loss of bt_fast made with bullet=, but the last minibatch had "
                "none: write `with bullet.again(reuse=False):`"
            )
        return self._kept if self._reuse else None

    def start_again(self, found: Sequence[Fault]) -> CheckedRead:
        """The read of a pass that assigns nothing: what earlier updates left to be told, and what was found now.

        Args:
            found: faults of this process; in a process group every rank must call this, and all raise.
        """
        counts = faults.counts_of(found)
        if self.ranks is not None:
            counts = self.ranks.start_sum(counts)()
        told = [*self._earlier_faults(), *found]
        read = CheckedRead(torch.cat([faults.counts_of(told[:EARLIER]), counts]), told)
        self._earlier_told()
        return read

    @property
    def _counts_now(self) -> bool:
        return self._reuse is None

    def _forget(self) -> None:
        """Let go of the last minibatch."""
        self._fraction_before = self._kept = None

    def _deciding_fraction(self) -> Tensor:
        """F_R by which samples are judged: in a further pass that of the first."""
        before = self._fraction_before
        return self.robust_fraction if self._counts_now or before is None else before

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
        state: Tensor | None = None,
    ) -> Assignment:
        """`assign` without waiting for its counts: faults are raised by the first use of a count.

        Args:
            logits, labels, epsilon, step_size, attacked_logits: as for `assign`.
            state: [2] int64, a random state to be told to the ranks of the process group, which take rank 0's.
            inputs: further faults of this minibatch to be raised with the counts (pixels out of range, say).
            names: what error messages call the logits and the labels.
            of_attack: faults of the oracle's attack, which are told if nothing else is wrong.
        """
        check_logits_and_labels(logits, labels)
        self._check_device(logits)
        self._check_attacked(logits, attacked_logits)
        epsilon = positive("epsilon", epsilon)
        if step_size is not None:
            step_size = positive("step_size", step_size)
        logits, labels = logits.detach(), labels.long()
        if self._counts_now:
            self._forget()

        svar, correct, probabilities, unfit = ops.signed_variance(logits, labels)
        found = [*self._earlier_faults(), *inputs]
        certainty = svar
        if self.metric is not allocation.signed_variance:
            certainty = allocation.certainty_of(self.metric, logits, labels)
            found.append(_without_certainty(certainty, unfit))
        seen = _Seen(
            certainty=certainty,
            correct=correct,
            unfit=unfit,
            found=found,
            unfit_faults=lambda counts: faults.unfit_faults(unfit, counts, logits.shape[1], names),
            epsilon=epsilon,
            sizes=self._step_sizes(epsilon, step_size),
        )
        if self.ranks is not None:
            decided = self._decide_together(seen, self.ranks, state)
        elif self.policy is allocation.three_groups:
            decided = self._decide_by_group(seen)
        else:
            attacked = None if attacked_logits is None else ops.signed_variance(attacked_logits.detach(), labels)
            decided = self._decide_by_policy(seen, attacked, of_attack)
        self._earlier_told()
        return Assignment(
            group=decided.group,
            steps=decided.steps,
            step_size=decided.step_size,
            order=decided.order,
            threshold=decided.threshold,
            svar=svar,
            certainty=certainty,
            probabilities=probabilities,
            counts=CheckedRead(decided.counts, decided.faults),
            most_steps=max(self._group_steps),
            ranks=decided.ranks,
            counted=self._counts_now,
        )

    def _earlier_faults(self) -> list[Fault]:
        """What earlier updates left to be told."""
        return [
            Fault(
                self.unreported_faults,
                "an earlier update met NaN logits or labels out of range: F_R was not moved by it" + faults.AGAINST_NAN,
                lambda: torch.empty(0, dtype=torch.int64, device="cpu"),
                earlier=True,
            ),
            Fault(
                self.unreported_gradients,
                "the model's input gradient must be finite, but held NaN for {count} samples of earlier attacks"
                + faults.AGAINST_NAN,
                lambda: faults.marked(*self._last_attack),
                earlier=True,
            ),
        ]

    def _earlier_told(self) -> None:
        self.unreported_faults.zero_()
        self.unreported_gradients.zero_()

    def _decide_by_group(self, seen: _Seen) -> _Decided:
        """The paper's rule, for this process alone: one op."""
        threshold, group, steps, step_size, order, counts = ops.assign_steps(
            seen.certainty,
            seen.correct,
            self._deciding_fraction(),
            self._group_steps,
            seen.sizes,
            seen.unfit,
            faults.counts_of(seen.found),
            self.group_counts if self._counts_now else torch.zeros_like(self.group_counts),
        )
        told = [*seen.found, *seen.unfit_faults(counts[-2:])]
        return _Decided(threshold, group, steps, step_size, order, counts, told)

    def _decide_by_policy(
        self, seen: _Seen, attacked: ops.SignedVariance | None, of_attack: Sequence[Fault]
    ) -> _Decided:
        """What `ops.assign_steps` does for three groups, by a policy.

        Args:
            attacked: of the attacked logits, for an Oracle; of_attack: the faults of its attack, told last.
        """
        fraction = self._deciding_fraction()
        threshold = ops.robust_threshold(seen.certainty, fraction)
        group, late = self._groups(seen.certainty, seen.correct, threshold), list(of_attack)
        if isinstance(self.policy, Oracle) and attacked is not None:
            group = self.policy.groups(seen.correct, attacked.correct)
            late.append(faults.marked_rows(attacked.unfit & 1, "attacked_logits"))
        judged = Judged(seen.certainty, seen.correct, group, threshold, fraction, self._group_steps)
        steps, outside = self._steps_of_policy(judged)
        unfit = torch.stack([(seen.unfit & bit > 0).sum() for bit in (1, 2)])
        told = [*seen.found, *seen.unfit_faults(unfit), *late, outside]
        wrong = faults.counts_of(told)
        order, active = ops.order_by_steps(steps, max(self._group_steps))
        sizes = _sizes_of(group)
        self._count(sizes, steps.sum(), ~wrong.any())
        return _Decided(
            threshold,
            group,
            steps,
            self._sizes_by_count(steps, seen),
            order,
            torch.cat([active, sizes, wrong]),
            told,
        )

    def _decide_together(self, seen: _Seen, ranks: Ranks, state: Tensor | None) -> _Decided:
        """The same of all ranks' samples, on every rank; of it this rank's share."""
        state = self.group_counts.new_zeros(2) if state is None else state
        earlier, found = seen.found[:EARLIER], seen.found[EARLIER:]  # every rank knows the earlier ones already
        counted = faults.counts_of(found) if found else state[:0]
        all_of_them = ranks.gather(seen.certainty, seen.correct, seen.unfit, state, counted)
        there = all_of_them.there
        fraction = self._deciding_fraction()
        threshold = ops.robust_threshold(all_of_them.certainty, fraction, there.sum())
        group = self._groups(all_of_them.certainty, all_of_them.correct, threshold)
        judged = Judged(all_of_them.certainty, all_of_them.correct, group, threshold, fraction, self._group_steps)
        steps, outside = self._steps_of_policy(judged, there)
        unfit = torch.stack([(all_of_them.unfit & bit > 0).view(ranks.count, -1).sum(dim=1) for bit in (1, 2)], dim=1)
        of_ranks = torch.cat([all_of_them.faults, unfit, all_of_them.too_many[:, None]], dim=1)
        of_all = [*earlier, outside]
        wrong = torch.cat([of_ranks.flatten(), faults.counts_of(of_all)])
        self._count(_sizes_of(group, there), (steps * there).sum(), ~wrong.any())

        own_group, own_steps = all_of_them.own(group), all_of_them.own(steps)
        most = max(self._group_steps)
        order, active = ops.order_by_steps(own_steps, most)
        if self.policy is allocation.three_groups:
            step_size = torch.full_like(own_steps, seen.sizes[ops.OUTLIER], dtype=torch.float64)
            for member in (ops.BOUNDARY, ops.ROBUST):
                step_size.masked_fill_(own_group == member, seen.sizes[member])
        else:
            step_size = self._sizes_by_count(own_steps, seen)
        spread = torch.zeros(ranks.count * (most + 1), dtype=torch.int64, device=steps.device)
        place = torch.arange(len(steps), device=steps.device) // max(len(steps) // ranks.count, 1)
        spread.scatter_add_(0, place * (most + 1) + steps, there.long())
        too_many = Fault(
            all_of_them.too_many,
            f"minibatches must have at most {ranks.rows} samples, the most of the group's first, but one has more: "
            "let the loaders of all ranks have one batch size",
        )
        own = [*found, *seen.unfit_faults(unfit[ranks.rank]), too_many]
        return _Decided(
            threshold,
            own_group,
            own_steps,
            step_size,
            order,
            torch.cat([active, _sizes_of(own_group), spread, wrong]),
            faults.OfRanks(own, ranks.rank, ranks.count, of_all),
            all_of_them,
        )

    def _groups(self, certainty: Tensor, correct: Tensor, threshold: Tensor) -> Tensor:
        """Eq. 6: [m] int64."""
        robust = (certainty.double() >= threshold) & (self._deciding_fraction() > 0)
        return correct.long() + (correct & robust)  # OUTLIER, BOUNDARY, ROBUST are 0, 1, 2

    def _steps_of_policy(self, judged: Judged, there: Tensor | None = None) -> tuple[Tensor, Fault]:
        """[m] int64 in 0..max(group_steps), and whether the policy said something else of a sample."""
        steps, most = allocation.steps_of(self.policy, judged), max(self._group_steps)
        outside = (steps < 0) | (steps > most)
        if there is not None:
            outside &= there
        message = (
            f"policy must return steps in 0..{most}, but {{count}} of {len(steps)} are not: "
            f"let it end with .clamp(0, {most})"
        )
        return steps.clamp(0, most), Fault(outside.sum(), message)  # the order has room for no others

    def _count(self, sizes: Tensor, steps: Tensor, sound: Tensor) -> None:
        """Add a minibatch's groups [3] and steps to what has been assigned, unless something is wrong."""
        if not self._counts_now:
            return
        self.group_counts += sizes * sound
        if self.steps_assigned is not None:
            self.steps_assigned += steps * sound

    def report_attack(self, assignment: Assignment, faulty: Tensor) -> None:
        """Take note of the samples that could not move in the attack on an assignment, since their gradient held NaN.

        On the CPU they raise at once, and the assignment does not count; on a GPU, where that would mean to wait for
        the device, and in a process group, where all ranks are to raise, they raise with the next assignment's read.

        Args:
            faulty: [m] int32 as `generate` fills it.

        Raises:
            ValueError: on the CPU, if there are any.
        """
        fault = faults.gradients_without_direction(faulty, assignment.order)
        self._last_attack = (faulty, assignment.order)
        if self.ranks is not None:
            self._faulty_gradients = fault.count  # told to all with the update
        elif faulty.is_cuda:
            self.unreported_gradients += fault.count
        elif fault.count:
            self.take_back(assignment)
            faults.read([fault]).wait()

    def take_back(self, assignment: Assignment) -> None:
        """Let an assignment not count in `group_counts` and `steps_assigned`: its attack could not be run.

        In a process group it still counts, since the other ranks' attacks may have run, and all count the same.

        Args:
            assignment: one of this module's; one that was not counted changes nothing.
        """
        if self.ranks is not None or not assignment.counted:
            return
        self.group_counts -= torch.tensor(assignment.group_sizes, device=self.group_counts.device)
        if self.steps_assigned is not None:
            self.steps_assigned -= sum(assignment.active_counts)

    def update(self, adversarial_logits: Tensor, labels: Tensor, *, order: Tensor | None = None) -> None:
        """Move F_R by the share of corrupted samples that are still classified correctly (Eq. 5).

        Logits with NaN leave F_R unchanged. On the CPU they raise at once; on a GPU, where that would mean to wait for
        the device, and in a process group, they raise with the next assignment's read. The ranks' sum is on its way
        while the backward runs, and F_R moves when it is read. In a block of `again` F_R stays, and all else is so.

        Args:
            adversarial_logits: [m, K] floating point, m ≥ 1, of all m corrupted samples.
            labels: [m] integers in 0..K-1.
            order: [m] int64, which sample of the minibatch each row is, for the error that tells them.

        Raises:
            TypeError: logits are not floating point or labels not integers.
            ValueError: a shape, device or value does not fit; the module is unchanged.
        """
        check_logits_and_labels(adversarial_logits, labels)
        self._check_device(adversarial_logits)
        if len(labels) == 0:
            raise ValueError("adversarial_logits must have at least 1 row, got 0: leave empty minibatches out")
        logits, labels = adversarial_logits.detach(), labels.long()
        if self.ranks is not None:
            self._settle()
            hits, faulty = ops.adversarial_hits(logits, labels)
            m, gradients = hits.new_full((), len(labels)), self._faulty_gradients
            told = [hits, m, faulty.long(), hits.new_zeros(()) if gradients is None else gradients.long()]
            self._faulty_gradients = None
            self._begin_move()
            self._unsettled = self.ranks.start_sum(torch.stack(told)), self._counts_now
            return
        if not logits.is_cuda:
            found = [
                faults.labels_outside(labels, logits.shape[1], "labels"),
                faults.rows_without_number(logits, "adversarial_logits", order),
            ]
            faults.read(found).wait()
        if self._counts_now:
            self._begin_move()
            state = (self.robust_fraction, self.unreported_faults)
            ops.update_fraction_(*state, logits, labels, self.gamma, self.momentum)
        elif logits.is_cuda:
            self.unreported_faults += ops.adversarial_hits(logits, labels)[1] > 0

    def _begin_move(self) -> None:
        """Note F_R as it was for the minibatch that ends now."""
        if self._counts_now:
            self._fraction_before = self.robust_fraction.clone()

    def _settle(self) -> None:
        """Let F_R move by the sum over the ranks that the last update started."""
        unsettled, self._unsettled = self._unsettled, None
        if unsettled is not None:
            finish, moves = unsettled
            hits, m, faulty, gradients = finish().unbind()
            if moves:
                ops.move_fraction_(self.robust_fraction, hits, m, faulty > 0, self.gamma, self.momentum)
            self.unreported_faults += faulty > 0
            self.unreported_gradients += gradients

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

    def _sizes_by_count(self, steps: Tensor, seen: _Seen) -> Tensor:
        """α [m] float64 of any counts: that of boundary samples at N_B, 1.7·ε/n at any other n, and 0 at 0."""
        travel = torch.full((), STEP_FACTOR * seen.epsilon, dtype=torch.float64, device=steps.device)
        boundary = seen.sizes[ops.BOUNDARY]
        sizes = torch.where(steps == self.boundary_steps, boundary, travel / steps.clamp(min=1))
        return sizes.masked_fill_(steps == 0, 0.0)

    def _check_attacked(self, logits: Tensor, attacked: Tensor | None) -> None:
        if not isinstance(self.policy, Oracle):
            if attacked is not None:
                raise ValueError(
                    "attacked_logits are for the policy 'oracle' alone, but the policy is another: leave them out"
                )
            return
        if attacked is None:
            raise ValueError(
                "policy is an Oracle, whose groups need attacked_logits=, the model's logits of attacked samples: "
                "the objectives run that attack, `assign` alone cannot: "
                "call trades_loss, mart_loss or pgd_loss with bullet=, or give them"
            )
        if not isinstance(attacked, Tensor) or not computable(attacked):
            raise TypeError(
                f"attacked_logits must be a floating-point tensor, got {kind_of(attacked)}: "
                "give model(x_adv) of attacked samples"
            )
        if attacked.shape != logits.shape:
            raise ValueError(
                f"attacked_logits must have the logits' shape {list(logits.shape)}, got {list(attacked.shape)}: "
                "give a row for each sample"
            )
        if attacked.device != logits.device:
            raise ValueError(
                f"attacked_logits must be on {logits.device} like the logits, but are on {attacked.device}: "
                f"write attacked_logits.to({str(logits.device)!r})"
            )

    def _check_device(self, logits: Tensor) -> None:
        if self.robust_fraction.device != logits.device:
            raise ValueError(
                f"BulletTrain is on {self.robust_fraction.device}, the logits are on {logits.device}: "
                f"move it with .to({str(logits.device)!r})"
            )


def _without_certainty(certainty: Tensor, unfit: Tensor) -> Fault:
    """The number of sound samples of which the metric does not say anything."""
    count = (certainty.isnan() & (unfit == 0)).sum()
    return Fault(
        count,
        f"metric must return numbers, but gave NaN for {{count}} of {len(certainty)} samples: "
        "let it give a number to those that it knows nothing of",
    )


def _sizes_of(group: Tensor, there: Tensor | None = None) -> Tensor:
    """Samples in (outlier, boundary, robust), of those that are there: [3] int64."""
    members = group == torch.arange(3, device=group.device)[:, None]
    return (members if there is None else members & there).sum(dim=1)


def _ranks_of(group: Any, policy: Policy) -> Ranks | None:
    """The process group as the mining sees it, checked."""
    if group is None:
        return None
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup or None, got {group!r}: "
            "write torch.distributed.group.WORLD"
        )
    if isinstance(policy, Oracle):
        raise ValueError(
            "policy must not be an Oracle in a process group: its attack would need the ranks' random state: "
            "write policy='three_groups', or leave process_group out"
        )
    return Ranks(group)


def _step_size(epsilon: float, steps: int) -> float:
    return STEP_FACTOR * epsilon / steps if steps else 0.0
