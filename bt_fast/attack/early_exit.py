"""PGD with restarts that drops a sample as soon as it is misclassified and fills its place with the next one.

The working batch is a prefix of fixed buffers, and each of its rows has its own restart and step. So it stays full as
long as samples are waiting, and the cost is that of the iterates of samples that are still classified correctly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bt_fast import faults, ops
from bt_fast.attack.batch import View
from bt_fast.attack.forward import gradient_of, in_float16, logits_of
from bt_fast.attack.inner import Inner, OfAPGD, direction_of, of_clean
from bt_fast.attack.start import Noise, numbered_start
from bt_fast.attack.threat import ThreatModel
from bt_fast.faults import CheckedRead
from bt_fast.labels import target_of
from bt_fast.ops.launch import dense_format
from bt_fast.ops.rows import has_softmax, softmax

STOOD = -1  # restart and step of a sample that is never misclassified
LONGEST_BURST = 8


@dataclass(frozen=True)
class Attack:
    """PGD on every sample: `restarts` times `steps` steps of `step_size`; `seed` is a 0-dim int64 on the device.

    `start` is "uniform", "surface" or "clean".
    """

    threat: ThreatModel
    loss: Inner
    steps: int
    step_size: float
    restarts: int
    seed: Tensor
    start: Noise = "uniform"


@dataclass(frozen=True, eq=False)
class Samples:
    """Images [n, ...] and labels [n] int64 on the device, and their numbers in the stream: [n] int64 on the host.

    `goals` [n, T] int64 on the device are the classes that a targeted attack goes to in turn; None for another attack.
    """

    x: Tensor
    y: Tensor
    number: Tensor
    target: Tensor | None = None  # [n, K], where the loss compares with the clean outputs
    goals: Tensor | None = None

    def __len__(self) -> int:
        return len(self.number)

    def __getitem__(self, rows: slice) -> Samples:
        target, goals = (None if values is None else values[rows] for values in (self.target, self.goals))
        return Samples(self.x[rows], self.y[rows], self.number[rows], target, goals)


class Verdicts:
    """The result of each sample of the stream: the restart and iterate at which it was misclassified, or `STOOD`.

    `progress` is called with the number of samples decided so far, whenever it has grown.
    """

    def __init__(self, progress: Callable[[int], None] | None = None, first: int = 0) -> None:
        self._progress, self._first = progress, first
        self._decided: list[Tensor] = []
        self.seen = self.decided = 0

    def number(self, n: int) -> Tensor:
        """Returns the numbers [n] int64 of the next n samples of the stream."""
        self.seen += n
        return torch.arange(self.seen - n, self.seen, device="cpu") + self._first

    def record(self, numbers: Tensor, restart: Tensor, step: Tensor) -> None:
        """Records decided samples [n]: all int64, on the host."""
        if len(numbers) == 0:
            return
        self._decided.append(torch.stack([numbers, restart, step]))
        self.decided += len(numbers)
        if self._progress is not None:
            self._progress(self.decided)

    def overrule(self, numbers: Tensor, restart: int) -> None:
        """Samples [n] int64 on the host, recorded as standing, that fell to a later attack, counted as this restart."""
        all_of_them = torch.cat(self._decided, dim=1)
        fell = torch.isin(all_of_them[0], numbers)
        all_of_them[1, fell], all_of_them[2, fell] = restart, 0
        self._decided = [all_of_them]

    def in_order(self) -> tuple[Tensor, Tensor]:
        """Returns restart and step of all samples, each [seen] int64; all must be decided."""
        number, restart, step = torch.cat(self._decided, dim=1)
        order = number.argsort()
        return restart[order], step[order]


class Waiting:
    """Samples not yet under attack: the rest of one batch of the stream, which is read on demand."""

    def __init__(self, stream: Iterator[Samples]) -> None:
        self._stream = stream
        self._rest: Samples | None = None

    def take(self, most: int) -> Samples | None:
        """Returns up to `most` samples, at least one, or None if there are no more."""
        while not self._rest:
            self._rest = None  # releases a batch before the next is read
            self._rest = next(self._stream, None)
            if self._rest is None:
                return None
        taken, self._rest = self._rest[:most], self._rest[most:]
        return taken


class WorkingBatch:
    """The samples under attack, in rows [0, count) of buffers with as many rows as `like` [width, ...].

    All have the size, dtype and device of `like`, and its memory format unless `channels_last`.
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
        # known to the host without a wait: a row moves in every step until it is misclassified
        on_host = [torch.zeros(width, dtype=torch.int64, device="cpu") for _ in range(3)]
        self._number, self._restart, self._step = on_host
        self._count = 0

    @torch.no_grad()
    def run(self, model: Callable[[Tensor], Tensor], waiting: Waiting, verdicts: Verdicts) -> None:
        """Attacks all waiting samples and records the results. ValueError if the model gives NaN for one that stood."""
        leaving = torch.zeros(0, dtype=torch.bool, device="cpu")
        while True:
            self._replace(leaving, waiting)
            if self._count == 0:
                return
            leaving = self._settle(self._advance(model), verdicts)

    def _advance(self, model: Callable[[Tensor], Tensor]) -> Tensor:
        """Runs a burst of steps; returns [count] int64 on the host: the step before which a row fell, or STOOD.

        Step j first checks the logits of iterate j, which its forward pass gives at no cost. A row moves until it falls
        (is misclassified) or its restart ends.
        """
        n, attack = self._count, self._attack
        x, labels, left = self._x[:n], self._labels[:n], self._left[:n]
        fell = torch.full_like(left, STOOD)
        unfit = torch.zeros_like(left, dtype=torch.bool)
        faulty = torch.zeros_like(left, dtype=torch.int32)
        most = attack.steps - int(self._step[:n].min())
        for j in range(min(self._burst, most + 1)):
            moves = j < most  # all others are at their last iterate, which only needs the check
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
                self._ascend(model, probe, logits, j, faulty)
        number = self._number[:n]
        wrong = [
            faults.marked_rows(unfit, "the model's logits", number),
            faults.gradients_without_direction(faulty, number),
        ]
        numbers = torch.cat([fell, faults.counts_of(wrong)])
        return torch.tensor(CheckedRead(numbers, wrong).wait(), device="cpu")

    def _ascend(self, model: View, probe: Tensor, logits: Tensor, j: int, faulty: Tensor) -> None:
        """Step j of the burst, of the rows that have more than j left; `logits` are those of `probe`, the iterates."""
        n, threat = self._count, self._attack.threat
        scaled = in_float16(model, probe, logits)
        plain, labels = logits.detach(), self._labels[:n]
        target = target_of(labels, plain) if self._target is None else self._target[:n]
        direction = direction_of(self._attack.loss, plain, target, labels, scaled=scaled)
        grad, step = gradient_of(logits, probe, direction), self._counter[j]
        images = (self._x[:n], grad, self._clean[:n], self._step_size[:n])
        box = (threat.epsilon, threat.lower, threat.upper)
        if self._still is None:
            ops.linf_step_(*images, *box, steps=self._left[:n], step=step, faulty=faulty)
        else:
            ops.l2_step_(*images, *box, self._still[:n], steps=self._left[:n], step=step, faulty=faulty)

    def _settle(self, fell: Tensor, verdicts: Verdicts) -> Tensor:
        """Records rows that fell or stood to the end and begins the next restarts. [count] bool: which rows leave."""
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
        """Fills the leaving rows, and those beyond the prefix, with waiting samples; closes the remaining gaps."""
        n = self._count
        free = torch.cat([leaving.nonzero().flatten(), torch.arange(n, len(self._x), device="cpu")])
        self._count -= int(leaving.sum())
        while len(free) and (arriving := waiting.take(len(free))) is not None:
            rows, free = free[: len(arriving)], free[len(arriving) :]
            at = rows.to(self._x.device)
            self._take_in(at, arriving)
            self._number[rows], self._restart[rows] = arriving.number, 0
            self._begin(rows)
            self._count += len(rows)
        gaps, kept = free[free < self._count], (~leaving).nonzero().flatten()
        self._copy_rows(kept[kept >= self._count], gaps)

    def _take_in(self, at: Tensor, arriving: Samples) -> None:
        """Put samples into the rows `at` (int64 on the device)."""
        self._clean[at], self._labels[at] = arriving.x, arriving.y
        if arriving.target is not None:
            if self._target is None:
                self._target = arriving.target.new_zeros(len(self._x), arriving.target.shape[1])
            self._target[at] = arriving.target

    def _begin(self, rows: Tensor) -> None:
        """Put rows (int64 on the host) at the starts of their restarts."""
        self._step[rows] = 0
        for restart in self._restart[rows].unique().tolist():
            some = rows[self._restart[rows] == restart]
            at, numbers = (t.to(self._x.device) for t in (some, self._number[some]))
            self._begin_restart(at, numbers, restart)
            self._left[at] = self._attack.steps

    def _begin_restart(self, at: Tensor, numbers: Tensor, restart: int) -> None:
        """Put the rows `at`, the samples of these numbers (both int64 on the device), at their starts."""
        attack = self._attack
        self._x[at] = numbered_start(self._clean[at], attack.start, numbers, restart, attack.threat, attack.seed)

    def _copy_rows(self, source: Tensor, target: Tensor) -> None:
        if len(source) == 0:
            return
        for values in (self._number, self._restart, self._step):
            values[target] = values[source]
        source, target = source.to(self._x.device), target.to(self._x.device)
        for values in self._tensors:
            values[target] = values[source]

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        """All on the device that a sample takes along from one row to another."""
        targets = () if self._target is None else (self._target,)
        return self._x, self._clean, self._labels, self._left, *targets


def clean_target(loss: OfAPGD, logits: Tensor) -> Tensor | None:
    """[n, K], what the loss compares with where that is the clean logits [n, K]."""
    if not of_clean(loss):
        return None
    return softmax(logits).to(ops.wide(logits).dtype) if isinstance(loss, str) else ops.wide(logits)


def burst_length(steps: int, x: Tensor) -> int:
    """Returns the number of steps before the host reads which samples were misclassified.

    One on the CPU, where a read costs nothing. Up to eight on a GPU, where the host would wait in each step: a
    misclassified row stays, unmoved, for less than a burst. A restart's `steps + 1` iterates are divided evenly.
    """
    if x.is_cpu:
        return 1
    bursts = -(-(steps + 1) // LONGEST_BURST)
    return -(-(steps + 1) // bursts)
