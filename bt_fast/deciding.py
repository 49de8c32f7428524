"""Decides which samples get how many steps: by Eq. 6 or a policy, for one process or for all ranks of a group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bt_fast import allocation, faults, ops
from bt_fast.allocation import Judged, Metric, Oracle, Policy
from bt_fast.faults import CheckedRead, Fault
from bt_fast.plan import MinedPlan
from bt_fast.ranks import Ranks, Together
from bt_fast.robust_half import HalfDrawn, Halved, halved
from bt_fast.validation import check_device, check_floating, size, size_of_step

STEP_FACTOR = 1.7  # α = 1.7 ε / N (section 3.1, Fig. 2)


@dataclass(frozen=True)
class Rule:
    """The rule that decides certainties, steps and step sizes.

    Attributes:
        metric, policy: the functions, as in `BulletTrain`.
        steps: (N_O, N_B, N_R), in the ops' numbering of the groups.
        epsilon: ε. step_size: α of the boundary samples, 1.7·ε/N_B if None; all in pixel units.
        half_drawn: which half of the robust samples takes part in the update, or None for all.
    """

    metric: Metric
    policy: Policy
    steps: tuple[int, int, int]
    epsilon: float
    step_size: float | None
    half_drawn: HalfDrawn | None = None

    @property
    def by_groups(self) -> bool:
        """Whether the paper's rule decides, rather than a policy."""
        return self.policy is allocation.three_groups

    @property
    def steps_vary(self) -> bool:
        """Whether the numbers of samples in the groups do not give their steps."""
        return not self.by_groups or (self.half_drawn is not None and self.half_drawn.attacked == "half")

    @property
    def taken(self) -> tuple[int, int, int]:
        """The steps that (outlier, boundary, robust) samples take: none where ε is 0."""
        return self.steps if self.epsilon else (0, 0, 0)

    @property
    def most_steps(self) -> int:
        """No sample takes more."""
        return max(self.taken)

    @property
    def sizes(self) -> tuple[float, float, float]:
        """α of (outlier, boundary, robust): 1.7·ε/N, or the given step size of boundary samples."""
        outlier, boundary, robust = (STEP_FACTOR * self.epsilon / n if n else 0.0 for n in self.steps)
        given = self.step_size if self.steps[ops.BOUNDARY] else None
        return outlier, boundary if given is None else given, robust

    def certainty_of(self, logits: Tensor, labels: Tensor, of_logits: ops.SignedVariance) -> tuple[Tensor, list[Fault]]:
        """Returns the metric's certainty [m] of clean logits, and its fault if the metric is not SVar."""
        if self.metric is allocation.signed_variance:
            return of_logits.svar, []
        certainty = allocation.certainty_of(self.metric, logits, labels)
        message = (
            f"metric must return numbers, but gave NaN for {{count}} of {len(certainty)} samples: "
            "let it give a number to those that it knows nothing of"
        )
        return certainty, [Fault((certainty.isnan() & (of_logits.unfit == 0)).sum(), message)]

    def sizes_of(self, group: Tensor, steps: Tensor) -> Tensor:
        """Returns α [m] float64 by the group or by any counts n: of boundary samples at N_B, else 1.7·ε/n, 0 at 0."""
        if self.by_groups:
            return allocation.by_group(group, self.sizes, torch.float64)
        travel = torch.full((), STEP_FACTOR * self.epsilon, dtype=torch.float64, device=steps.device)
        at_boundary = steps == self.steps[ops.BOUNDARY]
        sizes = torch.where(at_boundary, self.sizes[ops.BOUNDARY], travel / steps.clamp(min=1))
        return sizes.masked_fill_(steps == 0, 0.0)

    def steps_of(self, judged: Judged, is_sample: Tensor | None = None) -> tuple[Tensor, Fault]:
        """[m] int64 in 0..most_steps, and whether the policy gave a sample (that is no padding) another count."""
        steps, most = allocation.steps_of(self.policy, judged), max(self.steps)
        outside = (steps < 0) | (steps > most)
        if is_sample is not None:
            outside &= is_sample
        message = (
            f"policy must return steps in 0..{most}, but {{count}} of {len(steps)} are not: "
            f"let it end with .clamp(0, {most})"
        )
        return steps.clamp(0, self.most_steps), Fault(outside.sum(), message)  # the order has no room for other counts


@dataclass(frozen=True, eq=False)
class Evidence:
    """The inputs of the decision about the m samples of a minibatch.

    Attributes:
        of_logits: the result of `ops.signed_variance`. certainty: [m], the result of the metric.
        fraction: 0-dim float64, F_R.
        earlier: faults of earlier updates. current: faults of this minibatch, but for unfit rows.
        names: of the logits and the labels in messages. soft: the labels were distributions.
        attacked_correct: [m] bool, whether attacked samples are classified correctly, for an Oracle.
        of_attack: the faults of the Oracle's attack, raised last.
        generator: draws which robust samples stand for all, if half of them do.
    """

    rule: Rule
    of_logits: ops.SignedVariance
    certainty: Tensor
    fraction: Tensor
    earlier: Sequence[Fault]
    current: Sequence[Fault]
    names: tuple[str, str]
    soft: bool = False
    attacked_correct: Tensor | None = None
    of_attack: Sequence[Fault] = ()
    generator: torch.Generator | None = None

    def unfit_faults(self, counts: Tensor) -> Sequence[Fault]:
        """Returns the faults of unfit rows, from their counts [2]."""
        signs = self.of_logits
        return faults.unfit_faults(signs.unfit, counts, signs.probabilities.shape[1], self.names, self.soft)

    def with_attacked(self, logits: Tensor, labels: Tensor, of_attack: Sequence[Fault]) -> Evidence:
        """Returns the evidence with the logits [m, K] of attacked samples, and the faults of their attack."""
        attacked = ops.signed_variance(logits, labels)
        of_attack = [*of_attack, faults.marked_rows(attacked.unfit & 1, "attacked_logits")]
        return replace(self, attacked_correct=attacked.correct, of_attack=of_attack)

    def half(self, group: Tensor, steps: Tensor) -> Halved | None:
        """Draws the robust samples that stand for all in a plan of these; None where all of them do."""
        how = self.rule.half_drawn
        return None if how is None else halved(how, group, steps, self.rule.most_steps, self.generator)

    def plan(self, **decided: Any) -> MinedPlan:
        """Returns the plan with these decided fields."""
        signs, most = self.of_logits, self.rule.most_steps
        known: dict[str, Any] = {"svar": signs.svar, "certainty": self.certainty, "probabilities": signs.probabilities}
        return MinedPlan(most_steps=most, **known, **decided)


def checked_sizes(epsilon: float, step_size: float | None) -> tuple[float, float | None]:
    """ε and the step size, if there is one, as floats; TypeError or ValueError unless they are sizes of an attack."""
    epsilon = size("epsilon", epsilon)
    return epsilon, None if step_size is None else size_of_step("step_size", step_size, epsilon)


def check_attacked(policy: Policy, logits: Tensor, attacked: Tensor | None) -> None:
    """Raises TypeError or ValueError unless an Oracle has attacked logits, and another policy has none."""
    if not isinstance(policy, Oracle):
        if attacked is not None:
            raise ValueError(
                "attacked_logits are for the policy 'oracle' alone, but the policy is another: leave them out"
            )
        return
    if attacked is None:
        raise ValueError(
            "policy is an Oracle, which needs attacked_logits=, the model's logits of attacked samples: "
            "call TRADESLoss, MARTLoss or PGDLoss with mining=, which make them, or give them to `plan`"
        )
    instead = "give model(x_adv) of attacked samples"
    check_floating("attacked_logits", attacked, instead, "must be a floating-point tensor")
    if attacked.shape != logits.shape:
        raise ValueError(
            f"attacked_logits must have the logits' shape {list(logits.shape)}, got {list(attacked.shape)}: "
            "give a row for each sample"
        )
    check_device("attacked_logits", attacked, logits.device, "the logits", "are")


def decide(evidence: Evidence, ranks: Ranks | None, state: Tensor | None) -> MinedPlan:
    """Returns the plan of a minibatch. With ranks, this rank's share of the plan of all samples; collective.

    `state` [2] int64 is a random state: all ranks get that of rank 0.
    """
    if ranks is not None:
        return _together(evidence, ranks, state)
    return _by_groups(evidence) if evidence.rule.by_groups else _by_policy(evidence)


def _by_groups(evidence: Evidence) -> MinedPlan:
    """Applies the paper's rule (Eq. 6) for this process alone: one op."""
    rule, signs, certainty = evidence.rule, evidence.of_logits, evidence.certainty
    every = [*evidence.earlier, *evidence.current]
    counted, wrong = torch.zeros(3, dtype=torch.int64, device=certainty.device), faults.counts_of(every)
    threshold, group, steps, step_size, order, counts = ops.assign_steps(
        certainty, signs.correct, evidence.fraction, rule.taken, rule.sizes, signs.unfit, wrong, counted
    )
    most, counted_steps = rule.most_steps, None
    half = evidence.half(group, steps)
    if half is not None:
        steps, order, idle = half.steps, half.order, half.idle
        counts = torch.cat([half.active, counts[most : most + 3], idle, counts[most + 3 :]])
        counted_steps = steps.sum() * counted.any() if rule.steps_vary else None
    return evidence.plan(
        steps=steps,
        step_size=step_size,
        order=order,
        counts=CheckedRead(counts, [*every, *evidence.unfit_faults(counts[-2:])]),
        group=group,
        threshold=threshold,
        counted_groups=counted,
        counted_steps=counted_steps,
        ranks=None,
        weights=None if half is None else half.weights,
    )


def _by_policy(evidence: Evidence) -> MinedPlan:
    """Plans by a policy, like `ops.assign_steps` for three groups."""
    signs = evidence.of_logits
    judged = _judged(evidence, evidence.certainty, signs.correct)
    steps, outside = evidence.rule.steps_of(judged)
    unfit = torch.stack([(signs.unfit & bit > 0).sum() for bit in (1, 2)])
    every = [*evidence.earlier, *evidence.current, *evidence.unfit_faults(unfit), *evidence.of_attack, outside]
    return _planned(evidence, judged, steps, faults.counts_of(every), every, None)


def _together(evidence: Evidence, ranks: Ranks, state: Tensor | None) -> MinedPlan:
    """Applies the rule or policy to the samples of all ranks."""
    signs, device = evidence.of_logits, evidence.certainty.device
    state = torch.zeros(2, dtype=torch.int64, device=device) if state is None else state
    # every rank knows the earlier faults already
    counted = faults.counts_of(evidence.current) if evidence.current else state[:0]
    everyone = ranks.gather(evidence.certainty, signs.correct, signs.unfit, state, counted)
    judged = _judged(evidence, everyone.certainty, everyone.correct, everyone.is_sample)
    steps, outside = evidence.rule.steps_of(judged, everyone.is_sample)
    unfit = torch.stack([(everyone.unfit & bit > 0).view(ranks.count, -1).sum(dim=1) for bit in (1, 2)], dim=1)
    of_ranks = torch.cat([everyone.faults, unfit, everyone.too_many[:, None]], dim=1)
    too_many = Fault(
        everyone.too_many,
        f"minibatches must have at most {ranks.rows} samples, the most of the group's first, but one has more: "
        "let the loaders of all ranks have one batch size",
    )
    own = [*evidence.current, *evidence.unfit_faults(unfit[ranks.rank]), too_many]
    of_all = [*evidence.earlier, outside]
    wrong = torch.cat([of_ranks.flatten(), faults.counts_of(of_all)])
    every = faults.OfRanks(own, ranks.rank, ranks.count, of_all)
    return _planned(evidence, judged, steps, wrong, every, everyone)


def _judged(evidence: Evidence, certainty: Tensor, correct: Tensor, is_sample: Tensor | None = None) -> Judged:
    """Returns the values for a policy, with the groups by Eq. 6 or the oracle's."""
    rule, fraction = evidence.rule, evidence.fraction
    threshold = ops.robust_threshold(certainty, fraction, None if is_sample is None else is_sample.sum())
    if isinstance(rule.policy, Oracle) and evidence.attacked_correct is not None:
        group = rule.policy.groups(correct, evidence.attacked_correct)
    else:
        robust = (certainty.double() >= threshold) & (fraction > 0)
        group = correct.long() + (correct & robust)  # OUTLIER, BOUNDARY, ROBUST are 0, 1, 2
    return Judged(certainty, correct, group, threshold, fraction, rule.steps)


def _planned(
    evidence: Evidence, judged: Judged, steps: Tensor, wrong: Tensor, every: Sequence[Fault], everyone: Together | None
) -> MinedPlan:
    """Returns the plan of all samples with these steps; `wrong` counts every fault; with ranks, this rank's share."""
    rule = evidence.rule
    group, own_steps, spread = judged.group, steps, []
    if everyone is not None:
        group, own_steps = everyone.own(group), everyone.own(steps)
        spread = [_spread(steps, everyone.is_sample, len(everyone.sizes), rule.most_steps)]
        steps = steps * everyone.is_sample
    order, active = ops.order_by_steps(own_steps, rule.most_steps)
    half, idle = evidence.half(group, own_steps), []
    if half is not None:
        own_steps, order, active, idle = half.steps, half.order, half.active, [half.idle]
        steps = own_steps if everyone is None else steps
    sizes, sound = _sizes_of(group), ~wrong.any()
    sizes_of_all = sizes if everyone is None else _sizes_of(judged.group, everyone.is_sample)
    return evidence.plan(
        steps=own_steps,
        step_size=rule.sizes_of(group, own_steps),
        order=order,
        counts=CheckedRead(torch.cat([active, sizes, *idle, *spread, wrong]), every),
        group=group,
        threshold=judged.threshold,
        counted_groups=sizes_of_all * sound,
        counted_steps=steps.sum() * sound if rule.steps_vary else None,
        ranks=everyone,
        weights=None if half is None else half.weights,
    )


def _sizes_of(group: Tensor, is_sample: Tensor | None = None) -> Tensor:
    """Returns the numbers of samples in (outlier, boundary, robust): [3] int64."""
    members = group == torch.arange(3, device=group.device)[:, None]
    return (members if is_sample is None else members & is_sample).sum(dim=1)


def _spread(steps: Tensor, is_sample: Tensor, ranks: int, most: int) -> Tensor:
    """Returns [N · (most + 1)] int64: how many samples of each rank have 0, 1, ... steps."""
    spread = torch.zeros(ranks * (most + 1), dtype=torch.int64, device=steps.device)
    place = torch.arange(len(steps), device=steps.device) // max(len(steps) // ranks, 1)
    return spread.scatter_add_(0, place * (most + 1) + steps, is_sample.long())
