"""Attacks shared by several ranks: those with much to attack hand samples to those with little, if it pays."""

from __future__ import annotations

from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from bt_fast.attack.balance import Costs, measured_costs, pays, plan, send_out
from bt_fast.attack.batch import AttackBatch, View
from bt_fast.attack.generate import StartedAttack, start_attack
from bt_fast.attack.runners import Runner, start_of
from bt_fast.attack.threat import ThreatModel
from bt_fast.plan import Plan
from bt_fast.ranks import Sharing
from bt_fast.untraced import untraced
from bt_fast.validation import check_kind, step_count


@Sharing.register
@dataclass(frozen=True)
class Balance:
    """Lets ranks share an attack: `BulletTrain(process_group=..., balance=Balance())`.

    Ranks with many boundary samples hand some to ranks with few, which would wait for them otherwise.
    Every sample's perturbation equals the one its own rank would find, up to rounding at another batch size.

    Attributes:
        costs: decide in each minibatch whether an exchange pays; the same on all ranks. None: measured on the first
            minibatch of each model and kind of images, which waits for the device.
        ranks_per_node: ranks r with the same `r // ranks_per_node` are close to each other and exchange samples first.

    Raises:
        TypeError or ValueError: costs is not a `Costs`, or ranks_per_node is not an integer of at least 1.
    """

    costs: Costs | None = None
    ranks_per_node: int = 1

    def __post_init__(self) -> None:
        check_kind("costs", self.costs, Costs, "write Balance(measured_costs(...)), or Balance()", optional=True)
        step_count("ranks_per_node", self.ranks_per_node, least=1)


def start_balanced_attack(
    view: View,
    batch: AttackBatch,
    threat: ThreatModel,
    generator: torch.Generator | None,
    runner: Runner,
    balance: Balance,
    steps_of_ranks: Tensor,
    group: dist.ProcessGroup,
) -> StartedAttack:
    """`start_attack` after an exchange, if that pays. Collective, and so is the `finish` of its result.

    Args:
        steps_of_ranks: [N, n+1] int64 on the host, how many samples of each rank of the group have 0, 1, ... steps.
    """
    exchange = plan(steps_of_ranks, balance.ranks_per_node)
    costs = balance.costs
    if costs is None and len(exchange.number) and int(steps_of_ranks.sum(dim=1).min()) >= 2:
        costs = _costs(view, batch, threat, runner, group)
    if costs is None or not pays(exchange, costs):
        return start_attack(view, batch, threat, generator, runner)
    there = send_out(batch, exchange, group)
    away = start_attack(view, there.batch, threat, generator, runner)

    def result() -> Tensor:
        """Returns x' of this rank's own samples. Collective."""
        x_adv, flags = there.bring_home(away.result(), there.batch.faulty)
        batch.faulty.copy_(flags)
        return x_adv

    return StartedAttack(away.join, result)


_measured: WeakKeyDictionary[View, dict[tuple[object, ...], Costs]] = WeakKeyDictionary()


@untraced
def _costs(view: View, batch: AttackBatch, threat: ThreatModel, runner: Runner, group: dist.ProcessGroup) -> Costs:
    """Returns costs measured once for each kind of images, which come in the same order on all ranks."""
    clean, target = batch.clean, batch.target
    known = _measured.setdefault(view, {})
    inner = batch.inner if isinstance(batch.inner, str) else None
    kind = (clean.shape[1:], clean.dtype, target.shape[1], threat.norm, inner)
    if kind not in known:
        begin, generator = start_of(runner), torch.Generator(clean.device).manual_seed(0)

        def attack(n: int) -> None:
            one = Plan.uniform(n, 1, threat.epsilon or 1.0, clean.device)
            rows = AttackBatch.of(one, clean[:n].clone(), clean[:n], target[:n])
            labels = None if batch.labels is None else batch.labels[:n]
            begin(view, replace(rows, inner=batch.inner, labels=labels), threat, generator)()

        known[kind] = measured_costs(attack, len(clean), clean, target, group)
    return known[kind]
