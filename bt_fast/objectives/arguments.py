"""Checks of what objectives are called with: errors that name the argument, before any state changes."""

from __future__ import annotations

import torch
from torch import Tensor

from bt_fast.attack.apgd import APGD
from bt_fast.attack.balanced import Balance
from bt_fast.attack.by_sample import NOTHING, PerSample
from bt_fast.attack.inner import InnerLoss, check_not_at_x
from bt_fast.attack.pgd import PGD
from bt_fast.attack.start import Noise
from bt_fast.attack.statistics import check_statistics
from bt_fast.labels import check_either, check_without_gradient
from bt_fast.memory import Memory
from bt_fast.memory_arguments import check_norm
from bt_fast.mining import BulletTrain
from bt_fast.validation import check_generator, check_kind, check_labels, check_pixels

DEFAULT_COUNTS = (10, 2, 0)  # of a BulletTrain that is given none


def check_batch(x: Tensor, y: Tensor | None, name: str, *, optional: bool = False) -> None:
    """Raise TypeError or ValueError for images or labels that the host can see to be none; `name` is that of x.

    `optional` labels may be None.
    """
    check_pixels(x, name)
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(
            f"{name} must have shape [m, ...] with m >= 1, got {list(x.shape)}: of one image write x[None], and "
            "leave empty minibatches out"
        )
    if y is None and optional:
        return
    check_either(y, len(x), x.device, "y")
    check_without_gradient("y", y)


def check_optimizer(optimizer: object) -> None:
    """Raise TypeError unless it is an optimizer or None."""
    if optimizer is not None and not hasattr(optimizer, "zero_grad"):
        raise TypeError(
            f"optimizer must be an optimizer or None, got {type(optimizer).__name__}: "
            "give the one of the model's parameters"
        )


def check_attack(
    attack: PGD | APGD,
    mining: BulletTrain | None,
    defaults: tuple[Noise, InnerLoss],
    own: PerSample = NOTHING,
    memory: Memory | None = None,
) -> None:
    """Raise TypeError or ValueError unless they are an attack and a mining with the same steps of a boundary sample.

    `defaults` are start and inner loss of an attack that names none; `own` is what samples have of their own. With a
    `memory` the steps are its.
    """
    check_kind("mining", mining, BulletTrain, "write mining=BulletTrain()", optional=True)
    fit_to_memory(memory, attack, mining)
    if not isinstance(attack, APGD):
        check_kind("attack", attack, PGD, "write PGD(epsilon=8 / 255, step_size=2 / 255, steps=10)")
    if mining is not None and memory is None and mining.boundary_steps not in (0, attack.steps):
        raise ValueError(
            f"attack takes {attack.steps} steps, but mining {mining.boundary_steps} boundary steps: "
            f"write BulletTrain({attack.steps}, ...), or the same number for both"
        )
    if mining is not None:
        check_statistics(attack.statistics, "with BulletTrain", "leave statistics or mining out")
    if own.steps is not None or own.epsilon is not None:
        instead = "leave statistics, or steps and epsilon of per_sample, out"
        check_statistics(attack.statistics, "where samples take their own numbers of steps", instead)
    if own.start is None and memory is None:
        check_not_at_x(attack.start or defaults[0], attack.inner or defaults[1])


def fit_to_memory(memory: Memory | None, attack: PGD | APGD, mining: BulletTrain | None) -> None:
    """Raise TypeError or ValueError unless the attack can start at what is remembered; mining gets its counts."""
    check_memory(memory)
    if memory is None:
        return
    check_kind("attack", attack, PGD, "an APGD has steps of its own, so write PGD(...), or leave memory out")
    if attack.start not in (None, "normal"):
        raise ValueError(
            f"attack's start must be 'normal' or None with a memory, which is where it starts, got {attack.start!r}: "
            "leave start out of the PGD"
        )
    check_norm(memory.dtype, attack.norm == "l2")
    if mining is None:
        return
    check_counts(mining, memory, "mining")
    mining.take_steps(*memory.steps)


def check_memory(memory: object) -> None:
    """Raise TypeError unless it is a memory or None."""
    check_kind("memory", memory, Memory, "write memory=Memory(50_000), the number of samples", optional=True)


def check_counts(mining: BulletTrain, memory: Memory, name: str) -> None:
    """Raise ValueError unless the mining's steps are its default or those of the memory; `name` is the mining's."""
    counts = mining.boundary_steps, mining.robust_steps, mining.outlier_steps
    if counts not in (DEFAULT_COUNTS, memory.steps):
        raise ValueError(
            f"{name}'s steps must be those of the memory, {memory.steps}, got {counts}: write BulletTrain() without "
            f"counts, or Memory(samples, steps={counts})"
        )


def check_draws(x: Tensor, indices: Tensor | None, generator: torch.Generator | None, name: str) -> None:
    """Raise TypeError or ValueError for what decides the random start; `name` is that of the indices."""
    if indices is not None:
        check_labels(indices, len(x), x.device, name)
    check_generator(generator, x.device)


def checked_balance(balance: object, mining: BulletTrain | None) -> Balance | None:
    """The balance; TypeError or ValueError unless there are ranks that could share an attack out so."""
    check_kind("balance", balance, Balance, "write balance=Balance()", optional=True)
    if not isinstance(balance, Balance):
        return None
    if mining is None or mining.process_group is None:
        raise ValueError(
            "balance shares an attack out over ranks: it needs a BulletTrain with process_group=...: "
            "give that, or leave balance out"
        )
    return balance
