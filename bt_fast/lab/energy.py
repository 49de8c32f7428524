"""Measures the joules of methods trained in lockstep: the GPU's power over the time of each method's steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bt_fast.power import PowerMonitor

INTERVAL = 0.05  # seconds between samples: an instant power is updated every 0.1 s (arXiv:2312.02741)
SHORTEST = 0.2  # seconds of a mean step: in shorter steps too many updates belong to another method

Interval = tuple[float, float]


class TrainingEnergy:
    """The joules of each method's steps, measured in `with` blocks and added up over them and over resumed runs.

    A sum with an unknown part is unknown. With several methods the sums are unknown if the device's power is an average
    over a second, or if steps are short: the energy would be divided by chance.

    Args:
        device: the training's device, or its UUID.
        methods: the names that `add` accepts.
    """

    def __init__(self, device: torch.device | str, methods: Sequence[str]) -> None:
        self._monitor = PowerMonitor(device, INTERVAL)
        self._unknown: str | None = None
        self._steps: dict[str, list[Interval]] = {method: [] for method in methods}  # since samples were last added up
        self._sums: dict[str, dict[str, Any]] = {
            "joules": dict.fromkeys(methods, 0.0),
            "seconds": dict.fromkeys(methods, 0.0),
            "counts": dict.fromkeys(methods, 0),
        }

    @property
    def reason(self) -> str | None:
        """Why the joules are unknown, or None."""
        counts, seconds = self._sums["counts"], self._sums["seconds"]
        if self._unknown is not None or len(counts) == 1:
            return self._unknown
        shortest = min((seconds[method] / n for method, n in counts.items() if n), default=SHORTEST)
        if shortest >= SHORTEST:
            return None
        return (
            f"steps of {shortest:.2g} s in turn: power is renewed too rarely to tell methods apart below {SHORTEST} s"
        )

    def joules(self, method: str) -> float | None:
        """The joules of the method's steps up to the last `settle` or end of a block, or None with a `reason`."""
        return None if self.reason is not None else self._sums["joules"][method]

    def __enter__(self) -> TrainingEnergy:
        if self._unknown is None:
            self._monitor.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._unknown is None:
            self._monitor.__exit__()
            self._add_up()

    def add(self, method: str, step: Interval) -> None:
        """Adds a step of the method, given as begin and end in seconds of `time.perf_counter`."""
        self._unknown = self._unknown or self._monitor.reason
        if self._unknown is None:
            self._steps[method].append(step)

    def settle(self) -> None:
        """Adds up the measurements and drops the samples, so that memory stays constant over days."""
        if any(self._steps.values()):
            self.__exit__()
            self.__enter__()

    def _add_up(self) -> None:
        taken, self._steps = self._steps, {method: [] for method in self._steps}
        joules = {method: self._monitor.joules_during(steps) for method, steps in taken.items() if steps}
        self._unknown = self._why_unknown(joules)
        for method, used in joules.items():
            self._sums["joules"][method] += used or 0.0
            self._sums["seconds"][method] += sum(end - begin for begin, end in taken[method])
            self._sums["counts"][method] += len(taken[method])

    def _why_unknown(self, joules: dict[str, float | None]) -> str | None:
        """Returns why the joules of these methods' last steps are unknown, or None."""
        if not joules:
            return None
        if not (summaries := self._monitor.summary()):
            return "the GPU was lost"
        summary = summaries[0]
        if None in joules.values():
            lost = summary.lost
            return "the GPU did not tell its power all the time" if lost is None else f"the GPU was lost ({lost})"
        if summary.power_source == "average" and len(self._steps) > 1:
            return "the GPU tells its power as an average over a second, in which several methods take steps"
        return summary.shared

    def state(self) -> dict[str, Any]:
        """Returns the state for `load`."""
        self.settle()
        return {"unknown": self._unknown, **{name: dict(of_methods) for name, of_methods in self._sums.items()}}

    def load(self, state: dict[str, Any] | None) -> None:
        """Continues from a result of `state`; None comes from a version that measured nothing."""
        if state is None:
            self._unknown = "the run was begun by a version that did not measure it"
            return
        self._unknown = state["unknown"]
        for name, of_methods in self._sums.items():
            of_methods.update({method: state[name][method] for method in of_methods})
