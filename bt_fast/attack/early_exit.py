"""PGD with restarts that drops a sample as soon as it is broken and fills its place with the next one.

The working batch is a prefix of fixed buffers, and each of its rows is at a restart and a step of its own. So it stays
full as long as samples are waiting, wherever in the stream and in the attack they are, and the cost is that of the
iterates which samples that still stand go through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bt_fast import faults, ops
from bt_fast.attack.forward import gradient_of, in_float16, logits_of
from bt_fast.attack.inner import Inner, check_enough_classes, direction_of, of_clean
from bt_fast.attack.start import uniform_start
from bt_fast.attack.threat import ThreatModel
from bt_fast.faults import CheckedRead
from bt_fast.ops.launch import dense_format
from bt_fast.ops.rows import has_softmax, softmax

STOOD = -1  # instead of the restart and the step in which a sample fell
LONGEST_BURST = 8


@dataclass(frozen=True)
class Attack:
    """PGD on every sample: `restarts` times `steps` steps of `step_size`; `seed` is a 0-dim int64 on the device."""

    threat: ThreatModel
    loss: Inner
    steps: int
    step_size: float
    restarts: int
    seed: Tensor


@dataclass(frozen=True, eq=False)
class Samples:
    """Images [n, ...] and labels [n] int64 on the device, and their numbers in the stream: [n] int64 on the host."""

    x: Tensor
    y: Tensor
    number: Tensor
    target: Tensor | None = None  # [n, K], where the loss compares with the clean outputs

    def __len__(self) -> int:
        return len(self.number)

    def __getitem__(self, rows: slice) -> Samples:
        target = None if self.target is None else self.target[rows]
        return Samples(self.x[rows], self.y[rows], self.number[rows], target)


class Verdicts:
    """The fate of each sample of the stream: in which restart and at which iterate it fell, or that it stood.

    `progress` is called with the number of samples decided so far, whenever it grew.
    """

    def __init__(self, progress: Callable[[int], None] | None = None, first: int = 0) -> None:
        self._progress, self._first = progress, first
        self._decided: list[Tensor] = []
        self.seen = self.decided = 0

    def number(self, n: int) -> Tensor:
        """The numbers [n] int64 of the next n samples of the stream."""
        self.seen += n
        return torch.arange(self.seen - n, self.seen, device="cpu") + self._first

    def record(self, numbers: Tensor, restart: Tensor, step: Tensor) -> None:
        """Samples [n] that are decided: all int64, on the host."""
        if len(numbers) == 0:
            return
        self._decided.append(torch.stack([numbers, restart, step]))
        self.decided += len(numbers)
        if self._progress is not None:
            self._progress(self.decided)

    def in_order(self) -> tuple[Tensor, Tensor]:
        """Restart and step of all samples, each [seen] int64; all must be decided."""
        number, restart, step = torch.cat(self._decided, dim=1)
        order = number.argsort()
        return restart[order], step[order]


class Waiting:
    """Samples that are not under attack yet: the rest of one batch of the stream, which is read on demand."""

    def __init__(self, stream: Iterator[Samples]) -> None:
        self._stream = stream
        self._rest: Samples | None = None

    def take(self, most: int) -> Samples | None:
        """Up to `most` samples, at least one; None where there are no more."""
        while not self._rest:
            self._rest = None  # let go of a batch before the next is read
            self._rest = next(self._stream, None)
            if self._rest is None:
                return None
        taken, self._rest = self._rest[:most], self._rest[most:]
        return taken


class WorkingBatch:
    """The samples under attack, in rows [0, count) of buffers that hold as many as `like` [width, ...] has.

    All are of the size, dtype and device of `like`, and of its memory format if not `channels_last`.
    """

    def __init__(self, attack: Attack, like: Tensor, *, channels_last: bool = False) -> None:
        width, device = len(like), like.device
        last = channels_last and like.dim() == 4
        memory_format = torch.channels_last if last else dense_format(like) or torch.contiguous_format
        self._attack = attack
        self._burst = burst_length(attack.steps, like)
        self._x, self._clean = (torch.empty_like(like, memory_format=memory_format) for _ in range(2))
        self._labels, self._left = (torch.zeros(width, dtype=torch.int64, device=device) for _ in range(2))
        self._step_size = torch.full((width,), attack.step_size, dtype=like.dtype, device=device)
        self._target: Tensor | None = None  # [width, K], once K is known
        self._still = torch.zeros_like(self._x) if attack.threat.norm == "l_2" else None
        self._counter = torch.arange(self._burst, device=device)
        # known to the host without a wait: a row moves in every step until it falls
        on_host = [torch.zeros(width, dtype=torch.int64, device="cpu") for _ in range(3)]
        self._number, self._restart, self._step = on_host
        self._count = 0

    @torch.no_grad()
    def run(self, model: Callable[[Tensor], Tensor], waiting: Waiting, verdicts: Verdicts) -> None:
        """Attack all that wait, and record their fates. A ValueError, if the model gives NaN for one that stood."""
        leaving = torch.zeros(0, dtype=torch.bool, device="cpu")
        while True:
            self._replace(leaving, waiting)
            if self._count == 0:
                return
            leaving = self._settle(self._advance(model), verdicts)

    def _advance(self, model: Callable[[Tensor], Tensor]) -> Tensor:
        """A burst of steps. [count] int64 on the host: the step of the burst before which a row fell, or STOOD.

        Step j first looks at the logits of iterate j, which its forward pass gives for nothing. A row moves until it
        falls or its restart ends.
        """
        n, attack = self._count, self._attack
        x, labels, left = self._x[:n], self._labels[:n], self._left[:n]
        fell = torch.full_like(left, STOOD)
        unfit = torch.zeros_like(left, dtype=torch.bool)
        faulty = torch.zeros_like(left, dtype=torch.int32)
        most = attack.steps - int(self._step[:n].min())
        for j in range(min(self._burst, most + 1)):
            moves = j < most  # else all are at their last iterate, which only has to be looked at
            probe = x.detach().requires_grad_(moves)
            with torch.set_grad_enabled(moves):
                logits = logits_of(model, probe)
            plain = logits.detach()
            standing = left >= j
            unfit |= standing & ~has_softmax(plain)
            falls = standing & (plain.argmax(dim=1) != labels)
            fell.masked_fill_(falls, j)
            left.masked_fill_(falls, 0)
            if moves:
                scaled = in_float16(model, probe, logits)
                target = one_hot(labels, plain) if self._target is None else self._target[:n]
                direction = direction_of(attack.loss, plain, target, labels, scaled=scaled)
                grad = gradient_of(logits, probe, direction)
                self._move(grad, self._counter[j], faulty)
        number = self._number[:n]
        wrong = [
            faults.marked_rows(unfit, "the model's logits", number),
            faults.gradients_without_direction(faulty, number),
        ]
        numbers = torch.cat([fell, faults.counts_of(wrong)])
        return torch.tensor(CheckedRead(numbers, wrong).wait(), device="cpu")

    def _move(self, grad: Tensor, step: Tensor, faulty: Tensor) -> None:
        """One projected step of the rows that have more than `step` steps left."""
        n, threat = self._count, self._attack.threat
        images = (self._x[:n], grad, self._clean[:n], self._step_size[:n])
        box = (threat.epsilon, threat.lower, threat.upper)
        if self._still is None:
            ops.linf_step_(*images, *box, steps=self._left[:n], step=step, faulty=faulty)
        else:
            ops.l2_step_(*images, *box, self._still[:n], steps=self._left[:n], step=step, faulty=faulty)

    def _settle(self, fell: Tensor, verdicts: Verdicts) -> Tensor:
        """Record those that fell or stood to the end, and begin the next restarts. [count] bool: which rows leave."""
        n, attack = self._count, self._attack
        number, restart, step = self._number[:n], self._restart[:n], self._step[:n]
        falls = fell != STOOD
        ended = ~falls & (step + self._burst > attack.steps)
        leaving = falls | (ended & (restart + 1 == attack.restarts))
        restarts, steps = torch.where(falls, restart + 1, STOOD), torch.where(falls, step + fell, STOOD)
        verdicts.record(number[leaving], restarts[leaving], steps[leaving])
        step += self._burst
        self._left[:n] -= self._burst
        again = (ended & ~leaving).nonzero().flatten()
        restart[again] += 1
        self._begin(again)
        return leaving

    def _replace(self, leaving: Tensor, waiting: Waiting) -> None:
        """Fill the rows that leave, and those beyond the prefix, with waiting samples; close the gaps that remain."""
        n = self._count
        free = torch.cat([leaving.nonzero().flatten(), torch.arange(n, len(self._x), device="cpu")])
        self._count -= int(leaving.sum())
        while len(free) and (arriving := waiting.take(len(free))) is not None:
            rows, free = free[: len(arriving)], free[len(arriving) :]
            at = rows.to(self._x.device)
            self._clean[at], self._labels[at] = arriving.x, arriving.y
            if arriving.target is not None:
                if self._target is None:
                    self._target = arriving.target.new_zeros(len(self._x), arriving.target.shape[1])
                self._target[at] = arriving.target
            self._number[rows], self._restart[rows] = arriving.number, 0
            self._begin(rows)
            self._count += len(rows)
        gaps, kept = free[free < self._count], (~leaving).nonzero().flatten()
        self._copy_rows(kept[kept >= self._count], gaps)

    def _begin(self, rows: Tensor) -> None:
        """Put rows (int64 on the host) at the random starts of their restarts."""
        self._step[rows] = 0
        for restart in self._restart[rows].unique().tolist():
            some = rows[self._restart[rows] == restart]
            at, numbers = (t.to(self._x.device) for t in (some, self._number[some]))
            self._x[at] = uniform_start(self._clean[at], numbers, restart, self._attack.threat, self._attack.seed)
            self._left[at] = self._attack.steps

    def _copy_rows(self, source: Tensor, target: Tensor) -> None:
        if len(source) == 0:
            return
        for values in (self._number, self._restart, self._step):
            values[target] = values[source]
        source, target = source.to(self._x.device), target.to(self._x.device)
        targets = () if self._target is None else (self._target,)
        for values in (self._x, self._clean, self._labels, self._left, *targets):
            values[target] = values[source]


def one_hot(labels: Tensor, like: Tensor) -> Tensor:
    """[n, K] in the dtype of `like` [n, K]; labels [n] int64 in 0..K-1."""
    return torch.zeros_like(like).scatter_(1, labels[:, None], 1.0)


def target_of(loss: Inner, logits: Tensor) -> Tensor | None:
    """[n, K], what the loss compares with where that is the clean logits [n, K]; ValueError for too few classes."""
    check_enough_classes(loss, logits.shape[1])
    if not of_clean(loss):
        return None
    return softmax(logits).to(ops.wide(logits).dtype) if isinstance(loss, str) else ops.wide(logits)


def burst_length(steps: int, x: Tensor) -> int:
    """The number of steps before the host reads which samples fell.

    On the CPU one, where a read costs nothing. On a GPU the host would wait in each step, so up to eight: a broken row
    stays, unmoved, for less than a burst. A restart's `steps + 1` iterates are shared out evenly.
    """
    if x.is_cpu:
        return 1
    bursts = -(-(steps + 1) // LONGEST_BURST)
    return -(-(steps + 1) // bursts)
