"""Writing files so that a reader finds the old one or the new one, never half of one; and reading JSON of anyone's."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from bt_fast.lab.locks import remove_abandoned, take


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when the block ends without an exception: synced, then renamed.

    A process that is killed in the block leaves `.NAME.PID.RANDOM.part` behind, which the next one to write `path`
    removes; that of a process which is still writing is locked, and stays. Of several that write, the last one wins.

    Raises:
        OSError: it cannot be written (a full disk, a folder that is read-only or not there); it names `path`, and what
            was there before is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    with naming(path):
        _remove_leftovers(path)
        try:
            with open(temporary, "wb", opener=_locked) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)  # still locked, so that nobody takes it for abandoned
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


def _locked(path: str, _: int) -> int:
    """An opener of new files that the process has for itself until they are closed."""
    while (descriptor := take(Path(path))) is None:
        pass  # another process looks whether it was abandoned, and in a moment knows
    return descriptor


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files of processes that are no more."""
    form = re.compile(rf"\.{re.escape(path.name)}\.\d+(\.[0-9a-f]{{8}})?\.part")  # the version before this drew nothing
    with suppress(OSError):
        for name in os.listdir(path.parent):
            if form.fullmatch(name):
                remove_abandoned(path.parent / name)


def _remove(path: Path) -> None:
    with suppress(OSError):  # what keeps it from being removed is told by the write itself, or was told
        path.unlink(missing_ok=True)
