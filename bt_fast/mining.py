"""Boundary-example mining, with its state: it decides which samples get how many attack steps (paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex

import torch
import torch.distributed as dist
from torch import Tensor

from bt_fast import allocation, deciding, faults, ops
from bt_fast.allocation import METRICS, POLICIES, Metric, Oracle, Policy
from bt_fast.deciding import Evidence, Rule
from bt_fast.deprecated import renamed
from bt_fast.faults import CheckedRead, Fault
from bt_fast.labels import check_logits_and_labels, class_of, is_soft
from bt_fast.minibatch import LastMinibatch
from bt_fast.plan import MinedPlan
from bt_fast.ranks import Ranks, Sharing
from bt_fast.robust_half import HalfDrawn, check_ranks, check_saving, steps_of
from bt_fast.shares import MeasuredShares
from bt_fast.validation import check_choice, check_process_group, real, step_count
from bt_fast.warning import warn_deprecated


class BulletTrain(MeasuredShares):
    """Decides how many attack steps each sample gets, by how sure the model is of it (Eq. 5, Eq. 6, Algorithm 2).

    A module without parameters: its state is in buffers, which move, save and load with everything else. `plan` begins
    a minibatch and `observe` ends it: only then does the state move. A sample with n steps has the step size 1.7·ε/n,
    but a boundary sample (with another policy than three groups: one with N_B steps) the plan's `step_size`.

    Args:
        boundary_steps: N_B, robust_steps: N_R, outlier_steps: N_O; each at least 0. With `HalfDrawn(N_R)` half
            of the robust samples stand for all in the update.
        gamma: γ in (0, 1], scales the measured robust accuracy. momentum: p in [0, 1) of the moving average.
        metric: the certainty of the model about a sample, in place of SVar in Eq. 6: a name in `allocation.METRICS`, or
            a function of (logits [m, K] in float32 or float64, labels [m] int64) that returns [m] floating point:
            greater for more certainty, at least 0 if correct and below 0 if misclassified. Outliers are decided by the
            logits, not by this sign. NaN from valid logits is an error, ±Inf counts as the largest float32.
        policy: the number of steps of a sample: a name in `allocation.POLICIES`, or a function of `allocation.Judged`
            that returns [m] integers in 0..max(N_B, N_R, N_O).
        process_group: the group of data parallel training. F_R, the percentile of Eq. 6 and the counts then cover all
            ranks' minibatches together, like in one process. A policy gets all of them, rank by rank; rows that pad
            smaller minibatches are outliers with certainty NaN. A fault of one rank is raised on all. Random starts
            come from rank 0's generator, by a sample's place among all ranks' samples. Every rank must call the same
            methods in the same order, and no minibatch may be larger than the largest of the group's first ones.
        unperturbed: whether samples with 0 steps, for which x' is x, take part in the update's adversarial forward.
            "keep": yes; with batch norm in train mode their robust term is then small, not 0. "skip": no, their z' is
            their z (a single moving sample is joined by one of them for batch norm's sake). None is "skip" if both
            N_R and N_O are 0, else "keep" (Algorithm 2 and section 3.2 of the paper differ here).
        balance: a `Balance`, with which ranks of the process group with many boundary samples hand some to those with
            few, if that is faster.

    Attributes:
        robust_fraction: 0-dim float64 buffer, F_R; starts at 0.
        group_counts: [3] int64 buffer, samples so far in (outlier, boundary, robust), of observed minibatches.
        steps_assigned: 0-dim int64 buffer, attack steps so far of observed minibatches; None with three groups, where
            `group_counts` gives them. A loaded state without it also takes it from those.
        unreported_faults, unreported_gradients: 0-dim int64 buffers, minibatches with NaN logits in `observe`, and
            samples with NaN in an attack's input gradient, since the last read; raised by the next.

    Raises:
        TypeError: an argument has a wrong type. ValueError: out of range, unknown, or not to be combined.
    """

    robust_fraction: Tensor
    unreported_faults: Tensor
    unreported_gradients: Tensor

    def __init__(
        self,
        boundary_steps: int = 10,
        robust_steps: int | HalfDrawn = 2,
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
        self._attacked = robust_steps.attacked if isinstance(robust_steps, HalfDrawn) else None
        self.gamma = real("gamma", gamma)
        if not 0.0 < self.gamma <= 1.0:
            raise ValueError(f"gamma must lie in (0, 1], got {gamma}: write gamma=0.8")
        self.momentum = real("momentum", momentum)
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum must lie in [0, 1), got {momentum}: write momentum=0.9")
        self.metric = allocation.rule_of("metric", metric, METRICS)
        self.policy = allocation.rule_of("policy", policy, POLICIES)
        check_choice("unperturbed", unperturbed, ("keep", "skip", None))
        self.unperturbed = unperturbed
        self.take_steps(boundary_steps, steps_of(robust_steps), outlier_steps)
        self.process_group = process_group
        if not (balance is None or isinstance(balance, Sharing)):
            raise TypeError(
                f"balance must be a Balance or None, got {type(balance).__name__}: write balance=bt_fast.Balance()"
            )
        self.balance = balance
        self._last = LastMinibatch()
        self._reuse: bool | None = None  # the argument of `again`, inside its block
        # the pending sum over the ranks that moves F_R, and whether it moves
        self._moving: tuple[Callable[[], Tensor], bool] | None = None
        self._last_attack: tuple[Tensor, Tensor | None] = torch.empty(0, device="cpu"), None  # faulty, order
        self.register_buffer("robust_fraction", torch.zeros((), dtype=torch.float64))
        self.register_buffer("group_counts", torch.zeros(3, dtype=torch.int64))
        for name in ("steps_assigned", "unreported_faults", "unreported_gradients"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        if not self._rule(0.0, None).steps_vary:
            self.steps_assigned = None

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The group of ranks that mine together; may be set later if it does not exist yet at construction."""
        return None if self.ranks is None else self.ranks.group

    @process_group.setter
    def process_group(self, group: dist.ProcessGroup | None) -> None:
        check_process_group(group)
        if group is not None and isinstance(self.policy, Oracle):
            raise ValueError(
                "policy must not be an Oracle in a process group: its attack would need the ranks' random state: "
                "write policy='three_groups', or leave process_group out"
            )
        check_ranks(self.half_drawn, group is not None)
        self.ranks = None if group is None else Ranks(group)

    def take_steps(self, boundary: SupportsIndex, robust: SupportsIndex, outlier: SupportsIndex) -> None:
        """Takes other steps of `boundary`, `robust`, `outlier` samples; TypeError or ValueError as at construction."""
        given = ("boundary_steps", boundary), ("robust_steps", robust), ("outlier_steps", outlier)
        boundary, robust, outlier = (step_count(name, count) for name, count in given)
        move = self.policy is not allocation.three_groups or robust > 0
        half = None if self._attacked is None else HalfDrawn(robust, self._attacked)
        check_saving(half, move, self.unperturbed == "skip" or (self.unperturbed is None and not outlier))
        self.boundary_steps, self.robust_steps, self.outlier_steps = boundary, robust, outlier

    @property
    def half_drawn(self) -> HalfDrawn | None:
        """Which half of the robust samples stands for all; None where each counts for itself."""
        return None if self._attacked is None else HalfDrawn(self.robust_steps, self._attacked)

    def extra_repr(self) -> str:
        """Returns the configuration, as it would be written."""
        rules = ""
        if self.metric is not allocation.signed_variance:
            rules += f", metric={allocation.name_of(self.metric, METRICS)}"
        if self.policy is not allocation.three_groups:
            rules += f", policy={allocation.name_of(self.policy, POLICIES)}"
        if self.unperturbed is not None:
            rules += f", unperturbed={self.unperturbed!r}"
        steps = f"{self.boundary_steps}, {self.half_drawn or self.robust_steps}, {self.outlier_steps}"
        return f"{steps}, gamma={self.gamma:g}, momentum={self.momentum:g}{rules}"

    def __getstate__(self) -> dict[str, Any]:
        self.finish()
        return self.__dict__ | {"_last": LastMinibatch(), "_reuse": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"_last": LastMinibatch(), "_reuse": None, "_attacked": None} | state)  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, *args: Any) -> None:
        self.finish()
        super()._save_to_state_dict(*args)

    def _apply(self, fn: Any, recurse: bool = True) -> BulletTrain:
        """Follows the moves of the module that holds this one, but not its casts: in 16 bits F_R would stop moving."""
        self.finish()
        exact = self.robust_fraction
        self._last = LastMinibatch()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.robust_fraction.dtype != torch.float64:
            self.robust_fraction = exact.to(self.robust_fraction.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Loads a state that was saved before there were policies, or with three groups."""
        self.finish()
        self._last = LastMinibatch()
        name, counts = f"{prefix}steps_assigned", state_dict.get(f"{prefix}group_counts", ())
        if self.steps_assigned is not None and name not in state_dict and getattr(counts, "shape", None) == (3,):
            state_dict[name] = sum(n * counts[group] for group, n in enumerate(self._group_steps))
        super()._load_from_state_dict(state_dict, prefix, *args)

    @contextmanager
    def again(self, *, reuse: bool = True) -> Iterator[None]:
        """Makes a further pass over the last minibatch: in the block a loss moves neither F_R nor any count.

        For optimizers that evaluate one minibatch's loss at several weights, such as sharpness-aware ones:
        `with bullet.again(): criterion(model, x, y).backward()`. The last minibatch is that of the last call outside
        of such a block; with micro-batches go over each again before the next. Its tensors stay on the device until
        then. RuntimeError if there is none yet, it ended with an error, or the module was moved or loaded since.

        Args:
            reuse: whether the loss of the first pass reuses its x' in the block (in `augmix_loss`: its views) and runs
                only the update's forwards; RuntimeError of another loss. False: the samples are grouped by the current
                weights and the first pass's F_R, and attacked again.
        """
        self._last.begin_again(reuse)
        outer, self._reuse = self._reuse, reuse
        try:
            yield
        finally:
            self._reuse = outer

    @property
    def counts_now(self) -> bool:
        """Whether this pass is the minibatch's first, which counts."""
        return self._reuse is None

    def keep(self, made: object, owner: object = None) -> None:
        """Keeps what its owner has made, for `reused`, until the next minibatch begins; not in a further pass."""
        if self.counts_now:
            self._last.kept, self._last.owner = made, owner

    def reused(self, owner: object = None) -> object:
        """Returns what `owner` has kept if a further pass reuses it; None if x' must be made.

        An objective calls it first: outside `again` a new minibatch begins. RuntimeError if that owner kept nothing.
        """
        if self.counts_now:
            self._last = LastMinibatch()
        return self._last.reused(owner) if self._reuse else None

    def start_again(self, inputs: Sequence[Fault]) -> CheckedRead:
        """The read of a pass that plans nothing: unreported faults, then those of its inputs; collective with ranks."""
        counts = faults.counts_of(inputs)
        if self.ranks is not None:
            counts = self.ranks.start_sum(counts)()
        self.finish()
        earlier = self._earlier_faults()
        read = CheckedRead(torch.cat([faults.counts_of(earlier), counts]), [*earlier, *inputs])
        self._clear_earlier_faults()
        return read

    def plan(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        epsilon: float = 0.031,
        step_size: float | None = None,
        attacked_logits: Tensor | None = None,
    ) -> MinedPlan:
        """Begins a minibatch: sorts it into groups by its clean logits (Eq. 6) and gives each sample its steps.

        TypeError or ValueError if a type, shape, device or value does not fit, also in the metric's or policy's
        results; the module is then unchanged.

        Args:
            logits: [m, K] floating point, K ≥ 2, of the clean samples in the attack's (eval) mode. m may be 0.
            labels: [m] integers in 0..K-1, or [m, K] distributions, whose largest part counts; on the logits' device.
            epsilon: ε ≥ 0, in pixel units; gives `1.7·ε/N` for robust samples and outliers. At 0 none takes a step.
            step_size: α_B > 0 in pixel units, of boundary samples, or of those with N_B steps; `1.7·ε/N_B` if None.
            attacked_logits: [m, K] floating point, of attacked samples, for an `Oracle` only. (The losses make them.)
        """
        plan = self.start_plan(logits, labels, epsilon=epsilon, step_size=step_size, attacked_logits=attacked_logits)
        plan.counts.wait()
        return plan

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
        generator: torch.Generator | None = None,
    ) -> MinedPlan:
        """Runs `plan`, with its errors, without waiting for its counts: faults are raised by the first use of a count.

        Args:
            logits, labels, epsilon, step_size, attacked_logits: as for `plan`. names: of the first two in messages.
            inputs: further faults to raise with the counts. of_attack: those of the oracle's attack, raised last.
            state: [2] int64, a random state: the ranks of the process group take rank 0's.
            generator: draws which robust samples stand for all, if half of them do; the device's own if None.
        """
        soft, (logits, labels) = is_soft(labels), self._checked(logits, labels)
        deciding.check_attacked(self.policy, logits, attacked_logits)
        epsilon, step_size = deciding.checked_sizes(epsilon, step_size)
        self.finish()
        if self.counts_now:
            self._last = LastMinibatch()
        rule = self._rule(epsilon, step_size)
        of_logits = ops.signed_variance(logits, labels)
        certainty, current = rule.certainty_of(logits, labels, of_logits)
        fraction, earlier = self._deciding_fraction(), self._earlier_faults()
        given = (rule, of_logits, certainty, fraction, earlier, [*inputs, *current], names, soft)
        evidence = Evidence(*given, generator=generator)
        if attacked_logits is not None:
            evidence = evidence.with_attacked(attacked_logits.detach(), labels, of_attack)
        plan = deciding.decide(evidence, self.ranks, state)
        self._clear_earlier_faults()
        self._last.planned = plan
        return plan

    def _rule(self, epsilon: float, step_size: float | None) -> Rule:
        return Rule(self.metric, self.policy, self._group_steps, epsilon, step_size, self.half_drawn)

    def _deciding_fraction(self) -> Tensor:  # in a further pass the first pass's F_R
        return self.robust_fraction if (before := self._last.fraction_before) is None else before

    def _earlier_faults(self) -> list[Fault]:
        return faults.unreported(self.unreported_faults, self.unreported_gradients, *self._last_attack)

    def _clear_earlier_faults(self) -> None:
        self.unreported_faults.zero_()
        self.unreported_gradients.zero_()

    def attacked(self, faulty: Tensor, order: Tensor) -> None:
        """Keeps faulty and order, as for `observe`, from a script's own attack on the planned minibatch."""
        if self.counts_now:
            self._last.attacked = faulty, order

    @property
    def unobserved(self) -> bool:
        """Whether a script has attacked a minibatch that `observe` has not ended."""
        return self._last.attacked is not None

    def observe(
        self, adversarial_logits: Tensor, labels: Tensor, *, order: Tensor | None = None, faulty: Tensor | None = None
    ) -> None:
        """Ends a minibatch: F_R moves by the share of correct adversarial samples (Eq. 5), and its plan counts.

        Logits with NaN leave F_R unchanged. On the CPU they raise at once; on a GPU, where that would wait for the
        device, and in a process group, they raise with the next plan's read. With ranks F_R moves in `finish` or the
        next plan, so that their sum is formed during the backward. In a block of `again` F_R and the counts do not
        change. TypeError or ValueError if a type, shape, device or value does not fit; the module is then unchanged.

        Args:
            adversarial_logits: [m, K] floating point, m ≥ 1, of all m adversarial samples.
            labels: as for `plan`. order: [m] int64, which sample of the minibatch each row is, for names in errors.
            faulty: [m] int32 in the same order, as `generate` fills it: samples that could not move in the attack,
                since their gradient held NaN. On a GPU and with ranks they raise with the next plan's read.
        """
        logits, classes = self._checked(adversarial_logits, labels)
        if len(classes) == 0:
            raise ValueError("adversarial_logits must have at least 1 row, got 0: leave empty minibatches out")
        weights = self._planned_weights(len(classes), order)
        attacked, self._last.attacked = self._last.attacked, None
        if faulty is not None:
            self._last_attack = (faulty, order)
        elif attacked is not None:
            faulty, self._last_attack = attacked[0], attacked
        if self.ranks is not None:
            self._observe_together(self.ranks, logits, classes, faulty, weights)
            return
        if not logits.is_cuda:
            outside = faults.labels_outside(labels, logits.shape[1], "labels")
            faults.read([outside, faults.rows_without_number(logits, "adversarial_logits", order)]).wait()
        elif faulty is not None:
            self.unreported_gradients += faulty.sum()
        if self.counts_now:
            self._begin_move()
            ops.update_fraction_(
                self.robust_fraction, self.unreported_faults, logits, classes, self.gamma, self.momentum, weights
            )
        elif logits.is_cuda:
            self.unreported_faults += ops.adversarial_hits(logits, classes)[1] > 0

    def _planned_weights(self, m: int, order: Tensor | None) -> Tensor | None:
        """[m], how often each row counts in F_R's mean, where half of the robust samples stand for all."""
        weights = None if self._last.planned is None else self._last.planned.weights
        if weights is None:
            return None
        if len(weights) != m:
            raise ValueError(
                f"adversarial_logits must have a row for each of the {len(weights)} planned samples with "
                f"{self.half_drawn}, got {m}: give clean logits for those of weight 0"
            )
        return weights if order is None else weights[order]

    def _observe_together(
        self, ranks: Ranks, logits: Tensor, labels: Tensor, faulty: Tensor | None, weights: Tensor | None
    ) -> None:
        self.finish()
        hits, without_number = ops.adversarial_hits(logits, labels, weights)
        gradients = hits.new_zeros(()) if faulty is None else faulty.sum()
        numbers = [hits, hits.new_full((), len(labels)), without_number.to(hits), gradients.to(hits)]
        self._begin_move()
        self._moving = ranks.start_sum(torch.stack(numbers)), self.counts_now

    def _begin_move(self) -> None:
        """Records F_R for the minibatch that ends now, and counts its plan."""
        planned, self._last.planned = self._last.planned, None
        if self.counts_now:
            self._last.fraction_before = self.robust_fraction.clone()
            if planned is not None:
                self._count(planned)

    def _count(self, plan: MinedPlan) -> None:
        self.group_counts += plan.counted_groups
        if self.steps_assigned is not None and plan.counted_steps is not None:
            self.steps_assigned += plan.counted_steps

    def finish(self) -> None:
        """Applies the sum over ranks that `observe` started to F_R; call it before you read `robust_fraction`.

        The next plan, copying and saving do so by themselves. Without a process group F_R has already moved.
        """
        moving, self._moving = self._moving, None
        if moving is not None:
            sums, moves = moving
            hits, m, without_number, gradients = sums().unbind()
            if moves:
                ops.move_fraction_(self.robust_fraction, hits, m, without_number > 0, self.gamma, self.momentum)
            self.unreported_faults += without_number > 0
            self.unreported_gradients += gradients.long()

    def assign(self, *args: Any, **options: Any) -> MinedPlan:
        """Deprecated: `plan`, with the same args and options, but the minibatch counts at once, not when it ends."""
        warn_deprecated("BulletTrain.assign", "write bullet.plan(...), which counts when bullet.observe ends it")
        plan = self.plan(*args, **options)
        if self.counts_now:
            self._count(plan)
        self._last.planned = None
        return plan

    def update(self, adversarial_logits: Tensor, labels: Tensor, *, order: Tensor | None = None) -> None:
        """Deprecated: `observe`, with the same adversarial_logits, labels and order."""
        warn_deprecated("BulletTrain.update", "write bullet.observe(adversarial_logits, labels)")
        self.observe(adversarial_logits, labels, order=order)

    @property
    def _group_steps(self) -> tuple[int, int, int]:
        return self.outlier_steps, self.boundary_steps, self.robust_steps

    def _checked(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and [m] int64 labels; TypeError or ValueError unless they fit each other and the module's device."""
        check_logits_and_labels(logits, labels)
        if self.robust_fraction.device != logits.device:
            raise ValueError(
                f"BulletTrain is on {self.robust_fraction.device}, the logits are on {logits.device}: "
                f"move it with .to({str(logits.device)!r})"
            )
        return logits.detach(), class_of(labels)


if not TYPE_CHECKING:  # a type checker should know only the new names
    __getattr__ = renamed(__name__, {"Assignment": "bt_fast.MinedPlan", "STEP_FACTOR": "bt_fast.deciding.STEP_FACTOR"})
