"""Finds a network's tensors in a checkpoint from an arbitrary script: their place and their names.

Scripts save a state_dict bare or under some key, beside an optimizer's, an average's, an epoch; wrappers add prefixes
to its names or insert words. So the search looks for the network's own names, not for known keys and words.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bt_fast.attack.pixels import Normalization

DEEPEST = 6  # most levels of nested keys
# words that wrappers put into names: torch.compile, activation checkpoints, FSDP
_INSIDE = re.compile(r"_orig_mod\.|_checkpoint_wrapped_module\.|_fsdp_wrapped_module\.")
_AVERAGE = re.compile(r"ema|swa|avg|averag|teacher|shadow", re.IGNORECASE)
_MEAN = re.compile(r"(^|\.)(new_|_)?(mean|mu)$")
_DEVIATION = re.compile(r"(^|\.)(new_|_)?(std|sigma)$")
_BEHIND = re.compile(r"(^|\.)[1-9][0-9]*\.$")  # a module other than the first of a Sequential
# the state of an AveragedModel and of a BulletTrain
_COUNTS = {"n_averaged", "robust_fraction", "group_counts", "steps_assigned"}
_COUNTS |= {"unreported_faults", "unreported_gradients"}
_UNUSED = "sub_block1."  # in the TRADES code's wide networks, which never use it


@dataclass(frozen=True, eq=False)
class Candidate:
    """The tensors in one mapping of a checkpoint that a network may load: those with a common prefix.

    Attributes:
        path: the keys to the mapping. prefix: the common prefix of the names.
        tensors: by name without the prefix; some may be missing, others superfluous.
        front: mean and deviation of a layer in front of the network, or nothing.
        others: names of tensors that belong to something else.
        again: places of further candidates, complete but with other values.
    """

    path: tuple[str, ...]
    prefix: str
    tensors: dict[str, Tensor]
    front: tuple[Tensor, ...]
    others: tuple[str, ...]
    again: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """Describes where the tensors are, for messages."""
        keys = "".join(f"[{key!r}]" for key in self.path) or "the file itself"
        return f"{keys}, names without {self.prefix!r}" if self.prefix else keys

    @property
    def normalization(self) -> Normalization | None:
        """The normalisation of the layer in front, in units of [0, 1]; ValueError if its numbers are invalid."""
        if not self.front:
            return None
        unit = 255.0 if float(self.front[0].max()) > 1.0 else 1.0  # a mean above 1 refers to bytes
        mean, std = ((t.double().flatten() / unit).tolist() for t in self.front)
        return Normalization(mean, std)

    @property
    def behind_unknown(self) -> bool:
        """Whether the network stood behind a layer that saved nothing in the checkpoint."""
        return not self.front and _BEHIND.search(self.prefix) is not None

    def is_average(self) -> bool:
        """Whether a key or the prefix calls it an average of weights."""
        return any(_AVERAGE.search(word) for word in (*self.path, self.prefix))

    def missing(self, own: Iterable[str]) -> int:
        """Returns how many of the network's names are missing, except batch norm's counters."""
        return sum(not name.endswith(".num_batches_tracked") and name not in self.tensors for name in own)

    def equals(self, other: Candidate) -> bool:
        """Whether both have the same values under their common names."""
        return all(_same(self.tensors[name], other.tensors[name]) for name in self.tensors.keys() & other.tensors)


def network_in(content: object, own: Mapping[str, Tensor]) -> Candidate | None:
    """Returns the tensors in a checkpoint that have most of a network's names; None if none has.

    Those of an average (for example of weights) are used only if the network itself is missing. `content` is any
    nesting of mappings, `own` the network's state_dict.
    """
    candidates = [c for path, tensors in _state_dicts(content, ()) for c in _by_prefix(path, tensors, own)]
    if not candidates:
        return None
    best = min(candidates, key=lambda c: (c.missing(own), c.is_average()))  # the first of equally good ones
    again = tuple(c.place for c in candidates if not c.missing(own) and not c.equals(best))
    return dataclasses.replace(best, again=again)


def described(content: object) -> str:
    """Describes the contents of a file, for a message."""
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    kinds = [f"{key!r} ({type(value).__name__})" for key, value in content.items()]
    return f"the keys {listed(kinds, 8)}" if kinds else "an empty dict"


def listed(names: list[str] | tuple[str, ...], most: int = 3) -> str:
    """Returns the first names and the number of the others."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _state_dicts(content: object, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Yields every mapping with names of tensors and the keys to it, outer ones first."""
    if not isinstance(content, Mapping):
        return
    named = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if named:
        yield path, {_INSIDE.sub("", name): tensor for name, tensor in named.items()}
    if len(path) < DEEPEST:
        for key, value in content.items():
            yield from _state_dicts(value, (*path, str(key)))


def _by_prefix(path: tuple[str, ...], tensors: dict[str, Tensor], own: Mapping[str, Tensor]) -> Iterator[Candidate]:
    """Yields the mapping's tensors under each of the prefixes that have the most of the network's names."""
    counts: Counter[str] = Counter()
    for name in tensors:
        starts = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
        counts.update({name[:start]: name[start:] in own for start in starts})
    most = max(counts.values())
    prefixes = sorted((prefix for prefix, count in counts.items() if count == most > 0), key=len)
    for prefix in prefixes:
        named = {name for name in tensors if name.startswith(prefix) and name.removeprefix(prefix) in own}
        rest = [name for name in tensors if name not in named and not name.startswith(prefix + _UNUSED)]
        front = [name for pair in _fronts({name: tensors[name] for name in rest}) for name in pair]
        # the network again, in a part of the model with this prefix
        copies = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
        left = [n for n in rest if n not in front and n.split(".")[-1] not in _COUNTS and not n.startswith(copies)]
        named |= {name for name in left if name.startswith(prefix)}  # superfluous, which loading reports
        # the network again, outside this prefix
        elsewhere = tuple(other for other in prefixes if other not in copies and other != prefix)
        yield Candidate(
            path,
            prefix,
            {name.removeprefix(prefix): tensors[name] for name in tensors if name in named},
            tuple(tensors[name] for name in front[:2]),
            tuple(name for name in left if name not in named and not (elsewhere and name.startswith(elsewhere))),
        )


def _fronts(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Yields pairs of names of a mean and a deviation in one place."""
    for name, mean in tensors.items():
        if not _MEAN.search(name) or not mean.is_floating_point() or not mean.numel():
            continue
        for other, std in tensors.items():
            same = _DEVIATION.search(other) and _MEAN.sub("", name) == _DEVIATION.sub("", other)
            if same and std.is_floating_point() and std.shape == mean.shape:
                yield name, other


def _same(one: Tensor, other: Tensor) -> bool:
    alike = (one.shape, one.dtype, one.layout) == (other.shape, other.dtype, other.layout)
    return alike and one.layout == torch.strided and not one.is_quantized and torch.equal(one, other)
