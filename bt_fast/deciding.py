"""Who gets how many steps: Eq. 6 of the paper or a policy, for one process or for all ranks of a group together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bt_fast import allocation, faults, ops
from bt_fast.allocation import Judged, Oracle, Policy
from bt_fast.faults import CheckedRead, Fault
from bt_fast.plan import MinedPlan
from bt_fast.ranks import Ranks

STEP_FACTOR = 1.7  # α = 1.7 ε / N (section 3.1, Fig. 2)


@dataclass(frozen=True)
class Rule:
    """How steps and step sizes follow from groups.

    Attributes:
        policy: who takes how many steps.
        steps: (N_O, N_B, N_R), as the ops number the groups.
        epsilon: ε. step_size: α of the boundary samples, 1.7·ε/N_B if None; all in pixel units.
    """

    policy: Policy
    steps: tuple[int, int, int]
    epsilon: float
    step_size: float | None

    @property
    def most_steps(self) -> int:
        """No sample takes more."""
        return max(self.steps)

    @property
    def sizes(self) -> tuple[float, float, float]:
        """α of (outlier, boundary, robust): 1.7·ε/N, or the step size that boundary samples were given."""
        outlier, boundary, robust = (STEP_FACTOR * self.epsilon / n if n else 0.0 for n in self.steps)
        given = self.step_size if self.steps[ops.BOUNDARY] else None
        return outlier, boundary if given is None else given, robust

    def sizes_by_group(self, group: Tensor) -> Tensor:
        """α [m] float64 of the groups [m]."""
        sizes = torch.full_like(group, self.sizes[ops.OUTLIER], dtype=torch.float64)
        for member in (ops.BOUNDARY, ops.ROBUST):
            sizes.masked_fill_(group == member, self.sizes[member])
        return sizes

    def sizes_by_count(self, steps: Tensor) -> Tensor:
        """α [m] float64 of any counts: that of boundary samples at N_B, 1.7·ε/n at any other n, and 0 at 0."""
        travel = torch.full((), STEP_FACTOR * self.epsilon, dtype=torch.float64, device=steps.device)
        at_boundary = steps == self.steps[ops.BOUNDARY]
        sizes = torch.where(at_boundary, self.sizes[ops.BOUNDARY], travel / steps.clamp(min=1))
        return sizes.masked_fill_(steps == 0, 0.0)

    def steps_of(self, judged: Judged, there: Tensor | None = None) -> tuple[Tensor, Fault]:
        """[m] int64 in 0..most_steps, and whether the policy gave a sample (that is `there`) another count."""
        steps = allocation.steps_of(self.policy, judged)
        outside = (steps < 0) | (steps > self.most_steps)
        if there is not None:
            outside &= there
        message = (
            f"policy must return steps in 0..{self.most_steps}, but {{count}} of {len(steps)} are not: "
            f"let it end with .clamp(0, {self.most_steps})"
        )
        return steps.clamp(0, self.most_steps), Fault(outside.sum(), message)  # the order has room for no others


@dataclass(frozen=True, eq=False)
class Seen:
    """What the clean logits of m samples tell, before anything is decided.

    Attributes:
        of_logits: what `ops.signed_variance` makes of them.
        certainty: [m], as the metric says.
        fraction: 0-dim float64, F_R.
        earlier: what earlier updates left to be raised; found: what else is wrong with this minibatch.
        unfit_faults: from the counts [2] of unfit rows, what is to be raised about them.
    """

    of_logits: ops.SignedVariance
    certainty: Tensor
    fraction: Tensor
    earlier: Sequence[Fault]
    found: Sequence[Fault]
    unfit_faults: Callable[[Tensor], Sequence[Fault]]


def by_group(rule: Rule, seen: Seen) -> MinedPlan:
    """The paper's rule (Eq. 6), for this process alone: one op."""
    signs, found = seen.of_logits, [*seen.earlier, *seen.found]
    counted = torch.zeros(3, dtype=torch.int64, device=seen.certainty.device)
    threshold, group, steps, step_size, order, counts = ops.assign_steps(
        seen.certainty,
        signs.correct,
        seen.fraction,
        rule.steps,
        rule.sizes,
        signs.unfit,
        faults.counts_of(found),
        counted,
    )
    return MinedPlan(
        steps=steps,
        step_size=step_size,
        order=order,
        counts=CheckedRead(counts, [*found, *seen.unfit_faults(counts[-2:])]),
        most_steps=rule.most_steps,
        group=group,
        threshold=threshold,
        svar=signs.svar,
        certainty=seen.certainty,
        probabilities=signs.probabilities,
        counted_groups=counted,
        counted_steps=None,
        ranks=None,
    )


def by_policy(
    rule: Rule, seen: Seen, attacked: ops.SignedVariance | None = None, of_attack: Sequence[Fault] = ()
) -> MinedPlan:
    """What `ops.assign_steps` does for three groups, by a policy.

    Args:
        attacked: of the attacked logits, for an Oracle; of_attack: the faults of its attack, raised last.
    """
    signs, late = seen.of_logits, list(of_attack)
    threshold = ops.robust_threshold(seen.certainty, seen.fraction)
    group = _groups(seen.certainty, signs.correct, threshold, seen.fraction)
    if isinstance(rule.policy, Oracle) and attacked is not None:
        group = rule.policy.groups(signs.correct, attacked.correct)
        late.append(faults.marked_rows(attacked.unfit & 1, "attacked_logits"))
    judged = Judged(seen.certainty, signs.correct, group, threshold, seen.fraction, rule.steps)
    steps, outside = rule.steps_of(judged)
    unfit = torch.stack([(signs.unfit & bit > 0).sum() for bit in (1, 2)])
    every = [*seen.earlier, *seen.found, *seen.unfit_faults(unfit), *late, outside]
    wrong = faults.counts_of(every)
    order, active = ops.order_by_steps(steps, rule.most_steps)
    sizes, sound = _sizes_of(group), ~wrong.any()
    return MinedPlan(
        steps=steps,
        step_size=rule.sizes_by_count(steps),
        order=order,
        counts=CheckedRead(torch.cat([active, sizes, wrong]), every),
        most_steps=rule.most_steps,
        group=group,
        threshold=threshold,
        svar=signs.svar,
        certainty=seen.certainty,
        probabilities=signs.probabilities,
        counted_groups=sizes * sound,
        counted_steps=_steps_counted(rule, steps, sound),
        ranks=None,
    )


def together(rule: Rule, seen: Seen, ranks: Ranks, state: Tensor | None = None) -> MinedPlan:
    """The same of all ranks' samples, on every rank; of it this rank's share. Collective.

    Args:
        state: [2] int64, a random state: that of rank 0 becomes all ranks'.
    """
    signs, device = seen.of_logits, seen.certainty.device
    state = torch.zeros(2, dtype=torch.int64, device=device) if state is None else state
    # every rank knows the earlier faults already
    counted = faults.counts_of(seen.found) if seen.found else state[:0]
    everyone = ranks.gather(seen.certainty, signs.correct, signs.unfit, state, counted)
    there = everyone.there
    threshold = ops.robust_threshold(everyone.certainty, seen.fraction, there.sum())
    group = _groups(everyone.certainty, everyone.correct, threshold, seen.fraction)
    judged = Judged(everyone.certainty, everyone.correct, group, threshold, seen.fraction, rule.steps)
    steps, outside = rule.steps_of(judged, there)
    unfit = torch.stack([(everyone.unfit & bit > 0).view(ranks.count, -1).sum(dim=1) for bit in (1, 2)], dim=1)
    of_ranks = torch.cat([everyone.faults, unfit, everyone.too_many[:, None]], dim=1)
    of_all = [*seen.earlier, outside]
    wrong = torch.cat([of_ranks.flatten(), faults.counts_of(of_all)])
    sound = ~wrong.any()

    own_group, own_steps = everyone.own(group), everyone.own(steps)
    order, active = ops.order_by_steps(own_steps, rule.most_steps)
    by_groups = rule.policy is allocation.three_groups
    too_many = Fault(
        everyone.too_many,
        f"minibatches must have at most {ranks.rows} samples, the most of the group's first, but one has more: "
        "let the loaders of all ranks have one batch size",
    )
    own = [*seen.found, *seen.unfit_faults(unfit[ranks.rank]), too_many]
    spread = _spread(steps, there, ranks.count, rule.most_steps)
    return MinedPlan(
        steps=own_steps,
        step_size=rule.sizes_by_group(own_group) if by_groups else rule.sizes_by_count(own_steps),
        order=order,
        counts=CheckedRead(
            torch.cat([active, _sizes_of(own_group), spread, wrong]),
            faults.OfRanks(own, ranks.rank, ranks.count, of_all),
        ),
        most_steps=rule.most_steps,
        group=own_group,
        threshold=threshold,
        svar=signs.svar,
        certainty=seen.certainty,
        probabilities=signs.probabilities,
        counted_groups=_sizes_of(group, there) * sound,
        counted_steps=_steps_counted(rule, steps * there, sound),
        ranks=everyone,
    )


def _groups(certainty: Tensor, correct: Tensor, threshold: Tensor, fraction: Tensor) -> Tensor:
    """Eq. 6: [m] int64."""
    robust = (certainty.double() >= threshold) & (fraction > 0)
    return correct.long() + (correct & robust)  # OUTLIER, BOUNDARY, ROBUST are 0, 1, 2


def _sizes_of(group: Tensor, there: Tensor | None = None) -> Tensor:
    """Samples in (outlier, boundary, robust), of those that are there: [3] int64."""
    members = group == torch.arange(3, device=group.device)[:, None]
    return (members if there is None else members & there).sum(dim=1)


def _steps_counted(rule: Rule, steps: Tensor, sound: Tensor) -> Tensor | None:
    """All steps together, 0 if something is wrong; None where the groups' sizes give them."""
    return None if rule.policy is allocation.three_groups else steps.sum() * sound


def _spread(steps: Tensor, there: Tensor, ranks: int, most: int) -> Tensor:
    """[N · (most + 1)] int64: how many samples of each rank have 0, 1, ... steps."""
    spread = torch.zeros(ranks * (most + 1), dtype=torch.int64, device=steps.device)
    place = torch.arange(len(steps), device=steps.device) // max(len(steps) // ranks, 1)
    return spread.scatter_add_(0, place * (most + 1) + steps, there.long())
