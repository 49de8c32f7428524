"""Writing files so that a reader finds the old one or the new one, never half of one; and reading JSON of anyone's."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when the block ends without an exception: synced, then renamed.

    A process that is killed in the block leaves `.NAME.PID.part` behind, which the next one to write `path` removes.

    Raises:
        OSError: it cannot be written (a full disk, a folder that is read-only or not there); it names `path`, and what
            was there before is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with naming(path):
        _remove_leftovers(path)
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            _remove(temporary)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Replace the contents of `path`."""
    with replacing(path) as file:
        file.write(text.encode())


def parse_json(text: str) -> Any:
    """What the JSON text says.

    Raises:
        ValueError: it is no JSON, or nested more deeply than Python's parser goes.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error


def append_line(path: Path, line: str) -> None:
    """Add a line to the file and wait until it is on the disk; OSError names `path`."""
    with naming(path), open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let the system's errors tell `path` where they tell no file, or the temporary one in its place."""
    try:
        yield
    except OSError as error:
        unnamed = error.filename is None or str(error.filename).endswith(".part")
        if error.errno is None or not unnamed:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files of processes that are no more."""
    for leftover in path.parent.glob(f".{path.name}.*.part"):
        pid = leftover.suffixes[-2][1:] if len(leftover.suffixes) > 1 else ""
        if pid.isdecimal() and not _runs(int(pid)):
            _remove(leftover)


def _remove(path: Path) -> None:
    with suppress(OSError):  # what keeps it from being removed is told by the write itself, or was told
        path.unlink(missing_ok=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
