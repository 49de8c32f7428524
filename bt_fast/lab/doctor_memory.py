"""The cases of `bt-fast doctor` for the ops on remembered perturbations: stored in each type, placed or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bt_fast.ops.frames import Placed
from bt_fast.ops.recall import Limits, recall_reference
from bt_fast.ops.remember import remember_reference

Arguments = dict[str, Any]
Kind = tuple[tuple[int, ...], torch.dtype, torch.memory_format, bool]  # shape, dtype, layout, whether with NaN
STORED = (torch.int8, torch.float32, torch.float16, torch.float16)  # of each kind of images; the last in ℓ2


def recall_cases(kinds: Mapping[str, Kind]) -> dict[str, Arguments]:
    """Arguments of `recalled` for images of these kinds, by their names."""
    cases = {}
    for number, (name, kind) in enumerate(kinds.items()):
        clean, memory, common = _case(kind, STORED[number], l2=number == len(kinds) - 1)
        cases[name] = {"x": clean, "memory": memory, "state": torch.tensor([2**40 + 7, 11]), **common}
    return cases


def remember_cases(kinds: Mapping[str, Kind]) -> dict[str, Arguments]:
    """Arguments of `remembered`."""
    cases = {}
    for number, (name, kind) in enumerate(kinds.items()):
        clean, memory, common = _case(kind, STORED[number], l2=number == len(kinds) - 1)
        # 127ths of ε, of which no rounding makes others, but in 16 bits
        units = torch.randint(-140, 141, clean.shape, generator=_generator()) / 127
        x_adv = clean.add((units * common["epsilon"]).to(clean.dtype))
        if kind[3]:
            x_adv[1, 0, 3, 4] = torch.nan
        keep = torch.arange(len(clean)) % 3 > 0
        cases[name] = {"memory": memory, "x_adv": x_adv, "clean": clean, "keep": keep, **common}
    return cases


def recalled(
    run: Callable[..., Any],
    epsilon: float,
    l2: bool,
    top: Tensor | None,
    left: Tensor | None,
    mirrored: Tensor | None,
    **others: Any,
) -> dict[str, Tensor]:
    """What `ops.recall`, or `recalled_plainly`, returns and changes."""
    clean, start = run(limits=Limits(epsilon, l2=l2), placed=_placed(top, left, mirrored), **others)
    return {"clean": clean, "start": start, "state": others["state"]}


def recalled_plainly(limits: Limits, placed: Placed | None, **others: Any) -> tuple[Tensor, Tensor]:
    """`ops.recall` by its reference."""
    arguments: Arguments = {**limits._asdict(), **_places(placed), **others}
    start = recall_reference(noise=0.001, **arguments)
    others["state"][1] += 1
    return start


def remembered(
    run: Callable[..., Any], top: Tensor | None, left: Tensor | None, mirrored: Tensor | None, **others: Any
) -> dict[str, Tensor]:
    """What `ops.remember_`, or `remembered_plainly`, changes."""
    run(**others, placed=_placed(top, left, mirrored))
    return {"memory": others["memory"]}


def remembered_plainly(placed: Placed | None, **others: Any) -> None:
    """`ops.remember_` by its reference."""
    remember_reference(**others, **_places(placed))


def _placed(top: Tensor | None, left: Tensor | None, mirrored: Tensor | None) -> Placed | None:
    return None if top is None or left is None or mirrored is None else Placed(top, left, mirrored)


def _places(placed: Placed | None) -> Arguments:
    return dict(zip(Placed._fields, placed or (None, None, None), strict=True))


def _case(kind: Kind, stored: torch.dtype, *, l2: bool) -> tuple[Tensor, Tensor, Arguments]:
    """Images, a memory of more rows than them, and what both ops take besides."""
    shape, dtype, layout, faults = kind
    m, g = shape[0], _generator()
    x = torch.rand(shape, generator=g).to(dtype, memory_format=layout)
    memory = torch.rand(m + 2, *shape[1:], generator=g) * 2.4 - 1.2
    if faults:
        memory[:, 0, 1] = torch.nan
    memory = (memory * 100).to(stored) if stored == torch.int8 else memory.to(stored)
    places: Arguments = dict.fromkeys(Placed._fields)
    if stored != torch.float32:
        places = {name: torch.randint(-3, 4, (m,), generator=g) for name in ("top", "left")}
        places["mirrored"] = torch.rand(m, generator=g) < 0.5
    of_samples = {"slots": torch.randperm(m + 2, generator=g)[:m], "order": torch.randperm(m, generator=g)}
    of_samples["steps"] = torch.tensor([2, 0, 3, 1] * m)[:m]
    return x, memory, {"epsilon": 3.0 if l2 else 0.25, "l2": l2, **of_samples, **places}


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
