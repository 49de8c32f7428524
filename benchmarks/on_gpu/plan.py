"""The stages in order of value, and how much of the remaining time each may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

SHORTEST = 3.0  # seconds: with less, no stage is begun


@dataclass(frozen=True)
class Stage:
    """A stage, which runs as `benchmarks.on_gpu.NAME` in a separate process group.

    Attributes:
        letter: its short name on the command line.
        share: the largest share of the whole time that it may take.
        least: the share that earlier stages must leave for it.
        beside: it needs no GPU, and runs from the beginning, beside the stages before it.
    """

    letter: str
    name: str
    title: str
    share: float
    least: float
    beside: bool = False


STAGES = (
    Stage("a", "examination", "the doctor", 0.16, 0.05),
    Stage("b", "kernel_tests", "the kernels' tests", 0.22, 0.05),
    Stage("c", "engine_tests", "the engine's tests, a process each", 0.18, 0.05),
    Stage("d", "iterations", "one TRADES iteration", 0.48, 0.25),
    Stage("e", "bandwidth", "the step's and the start's bandwidth", 0.06, 0.03),
    Stage("f", "captures", "what a capture costs and holds", 0.08, 0.03),
    Stage("g", "prediction", "predicted against measured", 0.30, 0.02, beside=True),
    Stage("h", "overlap", "whether chains overlap", 0.08, 0.04),
    Stage("i", "training", "TRADES and BulletTrain in lockstep", 1.0, 0.05),
)


def chosen(text: str) -> tuple[Stage, ...]:
    """Returns the stages of a list of letters or names, in order of value.

    Raises:
        ValueError: a name is unknown.
    """
    requested = [name.strip() for name in text.split(",")]
    for name in requested:
        if not any(name in (stage.letter, stage.name) for stage in STAGES):
            there = ", ".join(f"{stage.letter} ({stage.name})" for stage in STAGES)
            raise ValueError(f"--stages: no stage {name!r}; there are {there}")
    return shared_out([stage for stage in STAGES if {stage.letter, stage.name} & set(requested)])


def shared_out(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Returns some of the stages, with shares that use up the time of all."""
    whole = sum(stage.share for stage in stages if not stage.beside)
    grown = 1 / whole if 0 < whole < 1 else 1.0
    return tuple(stage if stage.beside else replace(stage, share=grown * stage.share) for stage in stages)


def limit(stage: Stage, later: Sequence[Stage], whole: float, left: float, rehearsal: bool = False) -> float:
    """Returns the seconds of a stage: its share, limited by the least that later stages need.

    Args:
        whole: all seconds. left: the remaining ones. rehearsal: no stage has a share, since CPUs differ.
    """
    kept = sum(other.least for other in later) * whole
    share = 1.0 if rehearsal else stage.share
    return max(0.0, min(share * whole, left - kept))


# Measured iterations: network and precision, and the share of the stage's time; the most wanted first, but after a
# small network, which shows what does not work here
CASES = (
    ("preactresnet-18", "tf32", 0.14),
    ("wrn-34-10", "tf32", 0.26),
    ("wrn-34-10", "bfloat16", 0.20),
    ("preactresnet-18", "bfloat16", 0.12),
    ("wrn-34-10", "float32", 0.20),
    ("preactresnet-18", "float32", 0.08),
)
SMALL_CASES = tuple(("wrn-16-2", precision, 1 / 3) for precision in ("tf32", "bfloat16", "float32"))
REHEARSED_CASES = (("wrn-10-1", "tf32", 0.5), ("wrn-10-1", "bfloat16", 0.5))
MINUTES = 4.0  # with less time the networks are too large
BATCH, REHEARSED_BATCH = 128, 8


def cases(minutes: float, rehearsal: bool) -> tuple[tuple[str, str, float], ...]:
    """Returns networks, precisions and shares of the time for this many minutes."""
    if rehearsal:
        return REHEARSED_CASES
    return CASES if minutes >= MINUTES else SMALL_CASES


def batch_size(rehearsal: bool) -> int:
    """Returns the batch size of every measured iteration."""
    return REHEARSED_BATCH if rehearsal else BATCH
