"""Boundary-example mining: which samples deserve how many attack steps (paper, section 3.2). All state is here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bt_fast import allocation, deciding, faults, ops
from bt_fast.allocation import METRICS, POLICIES, Metric, Oracle, Policy
from bt_fast.deciding import Rule, Seen, by_group, by_policy, together
from bt_fast.faults import CheckedRead, Fault
from bt_fast.ops.numeric import computable, kind_of
from bt_fast.plan import MinedPlan
from bt_fast.ranks import Ranks
from bt_fast.speedup import Fractions, theoretical_speedup_augmix
from bt_fast.validation import check_choice, check_logits_and_labels, positive, real, step_count
from bt_fast.warning import warn_deprecated


class BulletTrain(nn.Module):
    """The compute allocation of BulletTrain (Eq. 5, Eq. 6, Algorithm 2) and its moving state.

    A module without parameters: its state is in buffers, so that it moves, saves and loads with everything else.

    A sample of n steps has the size 1.7·ε/n, but a boundary sample the `step_size` of the plan. A policy other than
    the three groups decides counts, not groups: with it a sample of N_B steps has `step_size`.

    `plan` begins a minibatch, and `observe` ends it: only then has the module's state moved.

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
        unperturbed: whether samples with 0 steps, whose x' is x, take part in the update's adversarial forward. "keep":
            they do, and in train mode with batch norm their robust term is small but not 0, since the two forwards have
            different batch statistics. "skip": they do not, and their z' is their z (a single moving sample takes one
            along for batch norm's sake). None is "skip" where N_R = N_O = 0 and "keep" elsewhere (Algorithm 2 and
            section 3.2 of the paper differ here).
        balance: a `Balance`, by which the ranks of the process group share an attack out: those with many boundary
            samples hand some to those with few, where that is the shorter way. None: each attacks its own.

    Attributes:
        robust_fraction: 0-dim float64 buffer, F_R; starts at 0.
        group_counts: [3] int64 buffer, samples so far in (outlier, boundary, robust), of the minibatches that
            `observe` has ended.
        steps_assigned: 0-dim int64 buffer, attack steps planned so far, likewise; None with the policy of three groups,
            whose `group_counts` give them. Where a loaded state lacks it, it follows from those too.
        unreported_faults: 0-dim int64 buffer, minibatches with NaN logits in `observe` since the last read; raised by
            the next.
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
    _planned: MinedPlan | None = None  # of a minibatch that has begun, and does not count yet
    _attacked: tuple[Tensor, Tensor] | None = None  # of it, where a script ends it: see `attacked`

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
        unperturbed: Literal["keep", "skip"] | None = None,
        balance: object = None,
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
        check_choice("unperturbed", unperturbed, ("keep", "skip", None))
        self.unperturbed, self.balance = unperturbed, balance
        # the sum over the ranks by which F_R is about to move, and whether it is
        self._moving: tuple[Callable[[], Tensor], bool] | None = None
        by_group = self.policy is allocation.three_groups
        self.register_buffer("robust_fraction", torch.zeros((), dtype=torch.float64))
        self.register_buffer("group_counts", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("steps_assigned", None if by_group else torch.zeros((), dtype=torch.int64))
        self.register_buffer("unreported_faults", torch.zeros((), dtype=torch.int64))
        self.register_buffer("unreported_gradients", torch.zeros((), dtype=torch.int64))
        # which samples had gradients with NaN, and in which order they are
        self._last_attack: tuple[Tensor, Tensor | None] = torch.empty(0, device="cpu"), None

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The group whose ranks mine together; may be set where it is not there yet at construction."""
        return None if self.ranks is None else self.ranks.group

    @process_group.setter
    def process_group(self, group: dist.ProcessGroup | None) -> None:
        self.ranks = _ranks_of(group, self.policy)

    def __getstate__(self) -> dict[str, Any]:
        self.finish()
        passing = ("_fraction_before", "_kept", "_reuse", "_planned", "_attacked")
        return {name: value for name, value in self.__dict__.items() if name not in passing}

    def _save_to_state_dict(self, *args: Any) -> None:
        self.finish()
        super()._save_to_state_dict(*args)

    def _apply(self, fn: Any, recurse: bool = True) -> BulletTrain:
        """Follow the moves of the module that holds this one, not its casts: in 16 bits F_R would stand still."""
        self.finish()
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
        if self.unperturbed is not None:
            rules += f", unperturbed={self.unperturbed!r}"
        return (
            f"{self.boundary_steps}, {self.robust_steps}, {self.outlier_steps}, "
            f"gamma={self.gamma:g}, momentum={self.momentum:g}{rules}"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load a state that was saved before there were policies, or with that of three groups."""
        self.finish()
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
                "loss with it (or plan and observe) first, outside of the block of `with bullet.again():`"
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
                "again(reuse=True) takes the x' that a loss of bt_fast has made, but the last minibatch had none: "
                "write `with bullet.again(reuse=False):`"
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
        self.finish()
        earlier = self._earlier_faults()
        read = CheckedRead(torch.cat([faults.counts_of(earlier), counts]), [*earlier, *found])
        self._earlier_raised()
        return read

    @property
    def _counts_now(self) -> bool:
        return self._reuse is None

    def _forget(self) -> None:
        """Let go of the last minibatch."""
        self._fraction_before = self._kept = self._planned = self._attacked = None

    def _deciding_fraction(self) -> Tensor:
        """F_R by which samples are judged: in a further pass that of the first."""
        before = self._fraction_before
        return self.robust_fraction if self._counts_now or before is None else before

    def plan(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        epsilon: float = 0.031,
        step_size: float | None = None,
        attacked_logits: Tensor | None = None,
    ) -> MinedPlan:
        """Begin a minibatch: sort it into groups by its clean logits (Eq. 6) and give each sample its steps.

        Args:
            logits: [m, K] floating point, K ≥ 2, of the clean samples in the attack's (eval) mode. m may be 0.
            labels: [m] integers in 0..K-1, on the logits' device.
            epsilon: ε > 0, in pixel units; sets `1.7·ε/N` for robust samples and outliers.
            step_size: α_B > 0 of the boundary samples, in pixel units; `1.7·ε/N_B` if not given. With a policy other
                than that of three groups: of samples with N_B steps.
            attacked_logits: [m, K] floating point, of the attacked samples in the same mode: for the policy `Oracle`,
                and only for it. (The losses see to it themselves.)

        Raises:
            TypeError: logits are not floating point, labels not integers, or the metric or policy returned no such
                tensor.
            ValueError: a shape, device or value does not fit, of what the metric or policy returned too; the module is
                unchanged.
        """
        plan = self.start_plan(logits, labels, epsilon=epsilon, step_size=step_size, attacked_logits=attacked_logits)
        plan.counts.wait()
        return plan

    def assign(self, *args: Any, **options: Any) -> MinedPlan:
        """Deprecated: `plan`, of the same args and options, but the minibatch counts at once, not when it ends."""
        warn_deprecated("BulletTrain.assign", "write bullet.plan(...), which counts when bullet.observe ends it")
        plan = self.plan(*args, **options)
        if self._counts_now:
            self._count(plan)
        self._planned = None
        return plan

    def update(self, adversarial_logits: Tensor, labels: Tensor, *, order: Tensor | None = None) -> None:
        """Deprecated: `observe`, of the same adversarial_logits, labels and order."""
        warn_deprecated("BulletTrain.update", "write bullet.observe(adversarial_logits, labels)")
        self.observe(adversarial_logits, labels, order=order)

    def start_plan(
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
    ) -> MinedPlan:
        """`plan` without waiting for its counts: faults are raised by the first use of a count.

        Args:
            logits, labels, epsilon, step_size, attacked_logits: as for `plan`.
            inputs: further faults of this minibatch to be raised with the counts (pixels out of range, say).
            names: what error messages call the logits and the labels.
            of_attack: faults of the oracle's attack, which are raised if nothing else is wrong.
            state: [2] int64, a random state: the ranks of the process group take rank 0's.
        """
        check_logits_and_labels(logits, labels)
        self._check_device(logits)
        self._check_attacked(logits, attacked_logits)
        epsilon = positive("epsilon", epsilon)
        if step_size is not None:
            step_size = positive("step_size", step_size)
        logits, labels = logits.detach(), labels.long()
        self.finish()
        if self._counts_now:
            self._forget()

        rule = Rule(self.policy, self._group_steps, epsilon, step_size)
        seen = self._seen(logits, labels, inputs, names)
        if self.ranks is not None:
            plan = together(rule, seen, self.ranks, state)
        elif self.policy is allocation.three_groups:
            plan = by_group(rule, seen)
        else:
            attacked = None if attacked_logits is None else ops.signed_variance(attacked_logits.detach(), labels)
            plan = by_policy(rule, seen, attacked, of_attack)
        self._earlier_raised()
        self._planned = plan
        return plan

    def _seen(self, logits: Tensor, labels: Tensor, inputs: Sequence[Fault], names: tuple[str, str]) -> Seen:
        of_logits = ops.signed_variance(logits, labels)
        certainty, found = of_logits.svar, list(inputs)
        if self.metric is not allocation.signed_variance:
            certainty = allocation.certainty_of(self.metric, logits, labels)
            found.append(_without_certainty(certainty, of_logits.unfit))
        return Seen(
            of_logits,
            certainty,
            self._deciding_fraction(),
            self._earlier_faults(),
            found,
            lambda counts: faults.unfit_faults(of_logits.unfit, counts, logits.shape[1], names),
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

    def _earlier_raised(self) -> None:
        self.unreported_faults.zero_()
        self.unreported_gradients.zero_()

    def observe(
        self,
        adversarial_logits: Tensor,
        labels: Tensor,
        *,
        order: Tensor | None = None,
        faulty: Tensor | None = None,
    ) -> None:
        """End a minibatch: F_R moves by the share of adversarial samples classified correctly (Eq. 5), its plan counts.

        Logits with NaN leave F_R unchanged. On the CPU they raise at once; on a GPU, where that would mean to wait for
        the device, and in a process group, they raise with the next plan's read. The ranks' sum is on its way while the
        backward runs, and F_R moves when `finish` or the next plan asks for it. In a block of `again` F_R and the
        counts stay, and all else is so.

        Args:
            adversarial_logits: [m, K] floating point, m ≥ 1, of all m adversarial samples.
            labels: [m] integers in 0..K-1.
            order: [m] int64, which sample of the minibatch each row is, for an error that names samples.
            faulty: [m] int32 in the same order, as `generate` fills it: samples that could not move in the attack,
                since their gradient held NaN. On a GPU and in a process group they raise with the next plan's read.

        Raises:
            TypeError: logits are not floating point or labels not integers.
            ValueError: a shape, device or value does not fit; the module is unchanged.
        """
        check_logits_and_labels(adversarial_logits, labels)
        self._check_device(adversarial_logits)
        if len(labels) == 0:
            raise ValueError("adversarial_logits must have at least 1 row, got 0: leave empty minibatches out")
        logits, labels = adversarial_logits.detach(), labels.long()
        attacked, self._attacked = self._attacked, None
        if faulty is not None:
            self._last_attack = (faulty, order)
        elif attacked is not None:
            faulty, self._last_attack = attacked[0], attacked
        if self.ranks is not None:
            self._observe_together(logits, labels, faulty)
            return
        if not logits.is_cuda:
            found = [
                faults.labels_outside(labels, logits.shape[1], "labels"),
                faults.rows_without_number(logits, "adversarial_logits", order),
            ]
            faults.read(found).wait()
        elif faulty is not None:
            self.unreported_gradients += faulty.sum()
        if self._counts_now:
            self._begin_move()
            state = (self.robust_fraction, self.unreported_faults)
            ops.update_fraction_(*state, logits, labels, self.gamma, self.momentum)
        elif logits.is_cuda:
            self.unreported_faults += ops.adversarial_hits(logits, labels)[1] > 0

    def attacked(self, faulty: Tensor, order: Tensor) -> None:
        """Hold what an attack on the planned minibatch found, where a script's own update ends it.

        Args:
            faulty: [m] int32, as `observe` takes it; order: [m] int64, which sample of the minibatch each is.
        """
        if self._counts_now:
            self._attacked = faulty, order

    @property
    def unobserved(self) -> bool:
        """Whether a minibatch was attacked by a script that `observe` has not ended."""
        return self._attacked is not None

    def _observe_together(self, logits: Tensor, labels: Tensor, faulty: Tensor | None) -> None:
        """Start the sum over the ranks by which F_R will move."""
        assert self.ranks is not None
        self.finish()
        hits, without_number = ops.adversarial_hits(logits, labels)
        gradients = hits.new_zeros(()) if faulty is None else faulty.sum()
        numbers = [hits, hits.new_full((), len(labels)), without_number.long(), gradients.long()]
        self._begin_move()
        self._moving = self.ranks.start_sum(torch.stack(numbers)), self._counts_now

    def _begin_move(self) -> None:
        """Note F_R as it was for the minibatch that ends now, and count its plan."""
        planned, self._planned = self._planned, None
        if not self._counts_now:
            return
        self._fraction_before = self.robust_fraction.clone()
        if planned is not None:
            self._count(planned)

    def _count(self, plan: MinedPlan) -> None:
        self.group_counts += plan.counted_groups
        if self.steps_assigned is not None and plan.counted_steps is not None:
            self.steps_assigned += plan.counted_steps

    def finish(self) -> None:
        """Let F_R move by the sum over a process group's ranks that `observe` started; without a group it has moved.

        The next plan, a copy and a saved state do so by themselves. Call it before you read `robust_fraction`.
        """
        moving, self._moving = self._moving, None
        if moving is not None:
            sums, moves = moving
            hits, m, without_number, gradients = sums().unbind()
            if moves:
                ops.move_fraction_(self.robust_fraction, hits, m, without_number > 0, self.gamma, self.momentum)
            self.unreported_faults += without_number > 0
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
                "the losses run that attack, `plan` alone cannot: "
                "call TRADESLoss, MARTLoss or PGDLoss with mining=, or give them"
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


if not TYPE_CHECKING:  # a checker is to know what there is

    def __getattr__(name: str) -> object:
        """The names of the first version."""
        if name not in _RENAMED:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found, instead = _RENAMED[name]
        warn_deprecated(f"bt_fast.mining.{name}", f"write {instead}")
        return found


_RENAMED = {
    "Assignment": (MinedPlan, "bt_fast.MinedPlan"),
    "STEP_FACTOR": (deciding.STEP_FACTOR, "bt_fast.deciding.STEP_FACTOR"),
}
