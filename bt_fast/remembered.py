"""One minibatch of a script's own attack: where a memory lets it start, and how its end is remembered."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bt_fast import faults
from bt_fast.attack.start import state_of_seed
from bt_fast.attack.threat import ThreatModel, check_threat
from bt_fast.memory_arguments import check_norm
from bt_fast.placement import Placement
from bt_fast.plan import Known, Plan
from bt_fast.recalled import Recalled
from bt_fast.validation import check_device, check_generator, check_labels, check_pixels

if TYPE_CHECKING:
    from bt_fast.memory import Memory


class Remembered:
    """What a memory has of a minibatch, for an attack of your own. `Memory.minibatch` makes these.

    Attributes:
        start: [m, ...] in the dtype and order of x, without gradient: where the attack begins.
    """

    start: Tensor

    def __init__(
        self,
        memory: Memory,
        x: Tensor,
        indices: Tensor,
        threat: ThreatModel,
        placement: Placement | None,
        generator: torch.Generator | None,
    ) -> None:
        check_pixels(x, "x")
        check_labels(indices, len(x), x.device, "indices")
        check_threat(threat)
        check_generator(generator, x.device)
        self._l2 = threat.norm == "l_2"
        check_norm(memory.dtype, self._l2)
        self._memory, self._x, self._epsilon = memory, x.detach(), threat.epsilon
        recalled = memory.recall(self._x, indices, placement, l2=self._l2)
        outside = faults.pixels_outside(self._x, threat.lower, threat.upper, "x")
        self._wrong = faults.read([outside, *recalled.wrong])
        if not x.is_cuda:  # there it has arrived when the attack has ended
            self._wrong.wait()
        _, self.start = recalled.starts(self._x, threat, state_of_seed(x, generator), indices.long())
        self._recalled: Recalled | None = recalled

    def keep(self, x_adv: Tensor) -> None:
        """Remembers x' - x. A sample whose x' is x, to the bit, is forgotten, also where its crop does not show it.

        Args:
            x_adv: [m, ...] of x's dtype, in its order: x', where the attack ended.

        Raises:
            TypeError or ValueError: x' does not fit x; on a GPU also what is wrong with x, indices or placement.
            RuntimeError: the minibatch has been remembered. Nothing has changed then.
        """
        if (recalled := self._recalled) is None:
            raise RuntimeError("keep has remembered this minibatch: call memory.minibatch(x, indices, threat) anew")
        check_pixels(x_adv, "x_adv")
        x, x_adv = self._x, x_adv.detach()
        if x_adv.shape != x.shape or x_adv.dtype != x.dtype:
            raise ValueError(
                f"x_adv must be {x.dtype} {list(x.shape)} like x, got {x_adv.dtype} {list(x_adv.shape)}: give x' of "
                "all samples, x_adv.to(x.dtype)"
            )
        check_device("x_adv", x_adv, x.device, "x")
        self._wrong.wait()
        steps = (x_adv != x).flatten(1).any(dim=1).long()
        plan = Plan(steps, steps.double(), None, Known(()), 1)
        self._memory.remember(recalled, x_adv, x, plan, self._epsilon, l2=self._l2)
        self._recalled = None
