"""What a memory holds of one minibatch: where its attacks start, and how large their steps are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bt_fast import ops
from bt_fast.attack.start import TRADES_NOISE
from bt_fast.attack.threat import ThreatModel
from bt_fast.deciding import STEP_FACTOR
from bt_fast.faults import Fault
from bt_fast.memory_file import NEVER
from bt_fast.ops import ROBUST
from bt_fast.ops.frames import Placed
from bt_fast.plan import MinedPlan, Plan

ONE_BESIDE_TWO = 0.6  # ε times this is the size of a robust sample's one step where boundary samples take two


@dataclass(frozen=True, eq=False)
class Recalled:
    """What is remembered of the m samples of a minibatch, in the caller's order.

    Attributes:
        rows: [slots, ...], on the images' device, each in its sample's own frame.
        slots: [m] int64, the row of each sample.
        numbers: [m] int64, the row of each sample in the memory itself, on its device.
        fresh: [m] bool, whose memory is not too old; None: nobody's is.
        placed: where the images lie in their own frames; None: they are these.
        wrong: what only the device can see.
        counts: the steps of (boundary, robust, outlier) samples.
    """

    rows: Tensor
    slots: Tensor
    numbers: Tensor
    fresh: Tensor | None
    placed: Placed | None
    wrong: tuple[Fault, ...]
    counts: tuple[int, int, int]

    def starts(
        self,
        x: Tensor,
        threat: ThreatModel,
        state: Tensor,
        samples: Tensor | None,
        order: Tensor | None = None,
        steps: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The images in sorted order, and `clip(x + remembered + 0.001·N(0, 1))` of those with steps."""
        limits = ops.Limits(threat.epsilon, threat.lower, threat.upper, threat.norm == "l_2")
        slots = self.slots if self.fresh is None else torch.where(self.fresh, self.slots, NEVER)
        how: dict[str, Any] = {"order": order, "steps": steps, "samples": samples, "placed": self.placed}
        return ops.recall(x, self.rows, slots, state, limits, noise=TRADES_NOISE, **how)

    def sized(self, plan: MinedPlan, epsilon: float) -> MinedPlan:
        """The plan with the step sizes of remembered starts."""
        steps = plan.steps
        sizes = STEP_FACTOR * epsilon / steps.double().clamp(min=1)
        sizes = sizes.masked_fill(steps == 0, 0.0)
        for n in (1, 2):
            sizes = sizes.masked_fill(steps == n, step_size(n, epsilon))
        if self.counts[:2] == (2, 1):
            sizes = sizes.masked_fill((plan.group == ROBUST) & (steps == 1), ONE_BESIDE_TWO * epsilon)
        return replace(plan, step_size=sizes)


def step_size(steps: int, epsilon: float) -> float:
    """The size of each of `steps` steps from a remembered start, in the units of epsilon."""
    return epsilon / steps if 1 <= steps <= 2 else STEP_FACTOR * epsilon / max(steps, 1)


def not_attacked(plan: Plan) -> Tensor | None:
    """[m] bool, the robust samples that others stand for before the attack, in the batch's own order; None: none."""
    weights = plan.weights if isinstance(plan, MinedPlan) else None
    return None if weights is None else (weights == 0) & (plan.steps == 0)
