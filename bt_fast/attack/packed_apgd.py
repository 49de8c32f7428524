"""APGD with restarts on full batches: a sample that is broken leaves at once, with all that APGD remembers of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bt_fast.attack.apgd import checkpoints
from bt_fast.attack.apgd_steps import Trail, with_direction
from bt_fast.attack.batch import View
from bt_fast.attack.early_exit import STOOD, Attack, Samples, Verdicts, WorkingBatch
from bt_fast.attack.forward import gradient_of, in_float16
from bt_fast.attack.inner import TARGETED, OfAPGD
from bt_fast.attack.inner_values import Aim, values_and_directions


@dataclass(frozen=True)
class Rounds:
    """The inner loss of each restart, and ρ. Targeted restarts go to the likeliest wrong class, the next one, ...

    All others are of one inner loss.
    """

    inner: tuple[OfAPGD, ...]
    rho: float

    def goal(self, restart: int, classes: int) -> int | None:
        """The rank of the class that this restart goes to, of `classes` wrong ones; None where it goes to none."""
        return self.inner[:restart].count(TARGETED) % classes if self.inner[restart] == TARGETED else None


class PackedAPGD(WorkingBatch):
    """The samples under APGD, each at a restart, a step and a step size of its own. Its attack's loss is not used.

    Args:
        goals: how many classes each sample brings along to go to; 0 without a targeted restart.
        keep: whether to keep the samples that stood.
    """

    def __init__(
        self,
        attack: Attack,
        rounds: Rounds,
        like: Tensor,
        *,
        channels_last: bool = False,
        goals: int = 0,
        keep: bool = False,
    ) -> None:
        super().__init__(attack, like, channels_last=channels_last)
        width, device = len(like), like.device
        self._rounds, self._keep = rounds, keep
        self._trail = Trail.of(torch.zeros_like(self._x), attack.threat.epsilon)
        self._goals = torch.zeros(width, goals, dtype=torch.int64, device=device)
        self._goal = torch.full((width,), -1, device=device)  # -1 in a restart that goes to none
        periods = checkpoints(attack.steps)
        self._period_on_host = torch.tensor([periods.get(t, 0) for t in range(attack.steps + 1)], device="cpu")
        self._period = self._period_on_host.to(device)
        self.stood: list[Samples] = []

    def _ascend(self, model: View, probe: Tensor, logits: Tensor, j: int, faulty: Tensor) -> None:
        n, threat, left = self._count, self._attack.threat, self._left[: self._count]
        x, trail = self._x[:n], self._trail[:n]
        values, direction = self._inner(logits.detach(), in_float16(model, probe, logits))
        grad = with_direction(gradient_of(logits, probe, direction), faulty, threat.norm, left > j)
        at = (self._attack.steps + j - left).clamp_(max=self._attack.steps)  # of rows that fell: anywhere
        first = at == 0
        trail.look(x, values.to(trail.value.dtype), grad, first)
        if self._period_on_host[(self._step[:n] + j).clamp_(max=self._attack.steps)].any():
            grad = grad.clone()  # a model's gradient may be one number, expanded
            trail.check(x, grad, self._rounds.rho, self._period[at])
        trail.step(x, self._clean[:n], grad, threat, threat.epsilon, first)

    def _inner(self, logits: Tensor, scaled: bool) -> tuple[Tensor, Tensor]:
        """Values and directions of all rows, each in its restart's loss."""
        n = self._count
        present = [self._rounds.inner[r] for r in self._restart[:n].unique().tolist()]
        plain = [inner for inner in present if inner != TARGETED]
        goal = self._goal[:n]
        aim = Aim(None if self._target is None else self._target[:n], self._labels[:n], goal.clamp(min=0))
        if len(plain) in (0, len(present)):
            return values_and_directions(present[0], logits, aim, scaled=scaled)
        both = (values_and_directions(inner, logits, aim, scaled=scaled) for inner in (TARGETED, plain[0]))
        (values, directions), (others, other_directions) = both
        targeted = goal >= 0
        return torch.where(targeted, values, others), torch.where(targeted[:, None], directions, other_directions)

    def _take_in(self, at: Tensor, arriving: Samples) -> None:
        super()._take_in(at, arriving)
        if arriving.goals is not None:
            self._goals[at] = arriving.goals

    def _begin_restart(self, at: Tensor, numbers: Tensor, restart: int) -> None:
        super()._begin_restart(at, numbers, restart)
        self._trail.begin(at, self._x[at], self._attack.threat.epsilon)
        goal = self._rounds.goal(restart, self._goals.shape[1])
        if goal is None:
            self._goal[at] = -1
        else:
            self._goal[at] = self._goals[at, goal]

    def _settle(self, fell: Tensor, verdicts: Verdicts) -> Tensor:
        leaving = super()._settle(fell, verdicts)
        rows = (leaving & (fell == STOOD)).nonzero().flatten()
        if self._keep and len(rows):
            at = rows.to(self._clean.device)
            self.stood.append(Samples(self._clean[at].cpu(), self._labels[at].cpu(), self._number[rows]))
        return leaving

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        return *super()._tensors, *self._trail.tensors, self._goals, self._goal
