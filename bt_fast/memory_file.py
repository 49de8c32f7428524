"""A memory-mapped file of perturbations, for data sets whose memory does not fit, and its description beside it."""

from __future__ import annotations

import json
import math
import mmap
import os
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch

FORMAT, CHUNK = 1, 2**20
NUMPY = {torch.int8: "int8", torch.float16: "float16", torch.float32: "float32", torch.float64: "float64"}
NEVER = -1


@dataclass(frozen=True)
class Description:
    """What a file holds, as the JSON file beside it says."""

    samples: int  # rows
    shape: tuple[int, ...]  # of a row
    dtype: str
    fingerprint: str | None  # of the data set
    share: str | None  # of the samples' numbers
    identity: str  # of this file: a checkpoint belongs to one
    format: int = FORMAT

    @property
    def bytes_of_rows(self) -> int:
        """The size of all rows, up to a multiple of 8 bytes."""
        size = self.samples * math.prod(self.shape) * np.dtype(self.dtype).itemsize
        return -(-size // 8) * 8


class MemoryFile:
    """An open file: its rows, and for each of them the clock at which it was last written.

    Rows that have never been written take no space on the disk. One process at a time may use it.
    """

    def __init__(self, path: Path, description: Description) -> None:
        self.path, self.description = path, description
        rows, count = description.bytes_of_rows, description.samples
        if not path.exists() or path.stat().st_size != rows + 8 * count:
            raise ValueError(
                f"path must be a file of {rows + 8 * count} bytes as {header_of(path).name} says, got one of "
                f"{path.stat().st_size if path.exists() else 0} bytes: write another path=, or bring it back"
            )
        shape, kind = (count, *description.shape), np.dtype(description.dtype)
        self._maps = [
            np.memmap(path, dtype=kind, mode="r+", shape=shape),
            np.memmap(path, dtype=np.int64, mode="r+", offset=rows, shape=(count,)),
        ]
        # rows are read in a random order: without this a row would bring megabytes of its neighbours from the disk
        self._maps[0]._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
        self.perturbations, self.written = (torch.from_numpy(values) for values in self._maps)

    def set_back(self, clock: int) -> None:
        """Warns of rows that were written after this clock, and takes them for written then."""
        newer = self.written > clock
        if count := int(newer.sum()):
            warnings.warn(
                f"{count} of {len(newer)} perturbations in {self.path} were written after the state that is loaded, "
                "and are used as they are: a run that goes on from here is not exactly the one that was interrupted",
                stacklevel=2,
            )
            self.written[newer] = clock

    def flush(self) -> None:
        """Writes what has changed to the disk."""
        for values in self._maps:
            values.flush()


def header_of(path: Path) -> Path:
    """The JSON file beside a file."""
    return path.with_name(path.name + ".json")


def described(path: Path) -> Description | None:
    """What the file at `path` holds; None if there is none yet. ValueError if its description cannot be read."""
    header = header_of(path)
    if not header.exists():
        if path.exists() and path.stat().st_size:
            raise ValueError(
                f"path must be a memory with its {header.name} beside it, or a new file, got {path.name} without one: "
                "write another path, bring the description back, or delete the file if a run was cut while it made it"
            )
        return None
    try:
        fields = json.loads(header.read_text(encoding="utf-8"))
        description = Description(**fields | {"shape": tuple(fields["shape"])})
        if description.format != FORMAT or description.dtype not in NUMPY.values():
            raise KeyError(f"format {description.format} of {description.dtype}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"path must be a memory whose {header.name} describes it, but that cannot be read ({error}): "
            "write another path=, or leave it out of the folder to begin anew"
        ) from error
    return description


def created(
    path: Path, samples: int, shape: tuple[int, ...], dtype: torch.dtype, fingerprint: str | None, share: str | None
) -> MemoryFile:
    """Makes a new file, in which nothing is remembered.

    FileNotFoundError where its folder does not exist; ValueError where another memory has made its file there.
    """
    check_new(path)
    description = Description(samples, shape, NUMPY[dtype], fingerprint, share, uuid.uuid4().hex)
    try:
        with _replacing(path) as file:
            file.truncate(description.bytes_of_rows)
            file.seek(description.bytes_of_rows)
            for first in range(0, samples, CHUNK):
                np.full(min(CHUNK, samples - first), NEVER, dtype=np.int64).tofile(file)
        with _replacing(header_of(path)) as file:  # last: a file without its description is not taken for a memory
            file.write((json.dumps(asdict(description), indent=2) + "\n").encode())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return MemoryFile(path, description)


def check_new(path: Path) -> None:
    """ValueError where another memory has made its file at `path`."""
    if header_of(path).exists() or (path.exists() and path.stat().st_size):
        raise ValueError(
            f"path must be a new file, but another Memory has made {path.name} since: write another path for each"
        )


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yields a new file that takes the place of `path` when the block has ended, synced and then renamed."""
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with unfinished.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network disks do not sync folders
            os.fsync(folder)
    finally:
        os.close(folder)
