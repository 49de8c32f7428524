"""Writes files atomically, so that readers see the old or the new content, and parses JSON from any source."""

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
    """Yields a binary file that replaces `path` when the block ends without an exception: synced, then renamed.

    A process that is killed in the block leaves `.NAME.PID.RANDOM.part` behind, which the next writer of `path`
    removes; the file of a process that is still writing is locked, and stays. Of several writers the last one wins.

    Raises:
        OSError: the file cannot be written (full disk, missing or read-only folder); it names `path`, which keeps its
            old content.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    with naming(path):
        _remove_leftovers(path)
        try:
            with open(temporary, "wb", opener=_open_locked) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)  # still locked, so that it does not count as abandoned
        finally:
            with suppress(OSError):  # the write itself reports what prevents removal
                temporary.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Replaces the contents of `path`."""
    with replacing(path) as file:
        file.write(text.encode())


def parse_json(text: str) -> Any:
    """Calls `json.loads`, and raises ValueError also for JSON nested too deeply for Python's parser."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error


def whole_lines(path: Path) -> list[str]:
    """The lines of a text, without a last one that was cut off while it was written; none where there is no file."""
    if not path.exists():
        return []
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return lines


def append_line(path: Path, line: str) -> None:
    """Appends a line to the file and waits until it is on disk; OSError names `path`."""
    with naming(path), open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Makes OSErrors in the block name `path` if they name no file, or a temporary one."""
    try:
        yield
    except OSError as error:
        unnamed = error.filename is None or str(error.filename).endswith(".part")
        if error.errno is None or not unnamed:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def _open_locked(path: str, _: int) -> int:
    """Opens a new file that stays locked until it is closed."""
    while (descriptor := take(Path(path))) is None:
        pass  # for a moment, another process is testing whether the file was abandoned
    return descriptor


def _remove_leftovers(path: Path) -> None:
    """Removes the temporary files of processes that have ended."""
    form = re.compile(rf"\.{re.escape(path.name)}\.\d+(\.[0-9a-f]{{8}})?\.part")  # the first version had no RANDOM
    with suppress(OSError):
        for name in os.listdir(path.parent):
            if form.fullmatch(name):
                remove_abandoned(path.parent / name)
