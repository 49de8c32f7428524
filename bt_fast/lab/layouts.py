"""Where in a checkpoint that somebody's script wrote the tensors of a network lie, and under which names.

Scripts keep a state_dict bare or under some key, beside an optimizer's, an average's, an epoch; wrappers put words in
front of its names or into them. So no list of keys and words is kept here: what is looked for are the network's own
names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bt_fast.attack.pixels import Normalization

DEEPEST = 6  # keys within keys
# what wrappers put into names: torch.compile, activation checkpoints, FSDP
_INSIDE = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
_AVERAGE = re.compile(r"ema|swa|avg|averag|teacher|shadow", re.IGNORECASE)
_MEAN = re.compile(r"(^|\.)(new_|_)?(mean|mu)$")
_DEVIATION = re.compile(r"(^|\.)(new_|_)?(std|sigma)$")
_BEHIND = re.compile(r"(^|\.)[1-9][0-9]*\.$")  # not the first of a Sequential
# of an AveragedModel and of a BulletTrain
_COUNTS = {"n_averaged", "robust_fraction", "group_counts", "steps_assigned"}
_COUNTS |= {"unreported_faults", "unreported_gradients"}
_UNUSED = "sub_block1."  # of the TRADES code's wide networks, which never run it


@dataclass(frozen=True, eq=False)
class Found:
    """A network's tensors.

    Attributes:
        tensors: by the network's own names; some may be missing, others too many.
        place: where they are, as it is said in messages.
        normalization: of a layer in front of the network, whose mean and deviation are there too.
        behind: whether there was a layer in front of which nothing is there.
        others: names beside the network's, which are of something else.
        again: places of further tensors of the network that have other values.
    """

    tensors: dict[str, Tensor]
    place: str
    normalization: Normalization | None
    behind: bool
    others: tuple[str, ...]
    again: tuple[str, ...]


def network_in(content: object, own: Mapping[str, Tensor]) -> Found | None:
    """The tensors in a checkpoint's content that have most of a network's names; None where there are none.

    Those of an average (of its weights, say) are taken only where the network's are not there themselves.

    Args:
        content: what the file holds: mappings, within each other.
        own: the network's state_dict.
    """
    sets = [named for path, tensors in _state_dicts(content, ()) for named in _by_prefix(path, tensors, own)]
    if not sets:
        return None
    best = min(sets, key=lambda named: (named.missing(own), named.average))  # the first, of several as good
    again = [named.place for named in sets if not named.missing(own) and not named.equals(best)]
    front = _normalization(best.front)
    behind = front is None and _BEHIND.search(best.prefix) is not None
    return Found(best.tensors, best.place, front, behind, best.others, tuple(again))


def described(content: object) -> str:
    """What a file holds, for a message."""
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    kinds = [f"{key!r} ({type(value).__name__})" for key, value in content.items()]
    shown = ", ".join(kinds[:8]) + (f" and {len(kinds) - 8} more" if len(kinds) > 8 else "")
    return f"the keys {shown}" if kinds else "an empty dict"


@dataclass(frozen=True, eq=False)
class _Named:
    """The tensors of one mapping whose names begin alike.

    Attributes:
        path: the keys to the mapping; prefix: what its names begin with.
        tensors: by what follows; front: mean and deviation of a layer in front of the network; others: further names.
    """

    path: tuple[str, ...]
    prefix: str
    tensors: dict[str, Tensor]
    front: tuple[Tensor, ...]
    others: tuple[str, ...]

    @property
    def place(self) -> str:
        keys = "".join(f"[{key!r}]" for key in self.path) or "the file itself"
        return f"{keys}, names without {self.prefix!r}" if self.prefix else keys

    @property
    def average(self) -> bool:
        return any(_AVERAGE.search(word) for word in (*self.path, self.prefix))

    def missing(self, own: Mapping[str, Tensor]) -> int:
        return sum(not name.endswith(".num_batches_tracked") and name not in self.tensors for name in own)

    def equals(self, other: _Named) -> bool:
        shared = self.tensors.keys() & other.tensors.keys()
        return all(_same(self.tensors[name], other.tensors[name]) for name in shared)


def _state_dicts(content: object, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Every mapping with names of tensors, outer ones first, and the keys to it."""
    if not isinstance(content, Mapping):
        return
    tensors = {_without(name): t for name, t in content.items() if isinstance(name, str) and isinstance(t, Tensor)}
    if tensors:
        yield path, tensors
    if len(path) < DEEPEST:
        for key, value in content.items():
            yield from _state_dicts(value, (*path, str(key)))


def _without(name: str) -> str:
    for word in _INSIDE:
        name = name.replace(word, "")
    return name


def _by_prefix(path: tuple[str, ...], tensors: dict[str, Tensor], own: Mapping[str, Tensor]) -> Iterator[_Named]:
    """The mapping's tensors under each prefix under which there are as many of the network's names as under any."""
    counts: Counter[str] = Counter()
    for name in tensors:
        at = 0
        while at >= 0:
            counts[name[:at]] += name[at:] in own
            at = name.find(".", at) + 1 or -1
    most = max(counts.values())
    prefixes = sorted((prefix for prefix, count in counts.items() if count == most > 0), key=len)
    for prefix in prefixes:
        named = {name for name in tensors if name.startswith(prefix) and name.removeprefix(prefix) in own}
        rest = [name for name in tensors if name not in named and not name.startswith(prefix + _UNUSED)]
        front = [name for pair in _fronts({name: tensors[name] for name in rest}) for name in pair]
        copies = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
        left = [n for n in rest if n not in front and n.split(".")[-1] not in _COUNTS and not n.startswith(copies)]
        named |= {name for name in left if name.startswith(prefix)}  # too many, which is told when they are loaded
        elsewhere = tuple(other for other in prefixes if other not in copies and other != prefix)
        yield _Named(
            path,
            prefix,
            {name.removeprefix(prefix): tensors[name] for name in tensors if name in named},
            tuple(tensors[name] for name in front[:2]),
            tuple(name for name in left if name not in named and not (elsewhere and name.startswith(elsewhere))),
        )


def _fronts(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Pairs of names of a mean and a deviation in one place."""
    for name, mean in tensors.items():
        for other, std in tensors.items() if _MEAN.search(name) and mean.is_floating_point() and mean.numel() else ():
            same = _DEVIATION.search(other) and _MEAN.sub("", name) == _DEVIATION.sub("", other)
            if same and std.is_floating_point() and std.shape == mean.shape:
                yield name, other


def _normalization(front: tuple[Tensor, ...]) -> Normalization | None:
    """In units of [0, 1]; those of bytes are told by a mean above 1. ValueError if no normalization has them."""
    if not front:
        return None
    unit = 255.0 if float(front[0].max()) > 1.0 else 1.0
    mean, std = ((t.double().flatten() / unit).tolist() for t in front)
    return Normalization(mean, std)


def _same(one: Tensor, other: Tensor) -> bool:
    alike = (one.shape, one.dtype, one.layout) == (other.shape, other.dtype, other.layout)
    return alike and one.layout == torch.strided and not one.is_quantized and torch.equal(one, other)
