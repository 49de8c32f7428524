"""Locks that die with their process: on a run's folder, on what several processes would make, on half-written files.

A lock is the system's, on an open file. The file's content tells people who has it; that it lies there means nothing.
Not by the library filelock, whose lock files stay for ever: here the locked file goes with its holder, and it may be
the half-written file itself.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        os.lseek(descriptor, 2**30, os.SEEK_SET)  # behind the content, which others are to read
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        os.lseek(descriptor, 0, os.SEEK_SET)

else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


NAME = "run.lock"
_TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_NONE_HERE = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)  # of some network file systems
_WAIT = 0.1  # seconds


@dataclass(eq=False)
class _Held:
    """A lock of this process, and how often it was asked for."""

    path: Path
    descriptor: int | None  # None in a fork
    times: int = 1


_HELD: dict[Path, _Held] = {}


def hold(folder: Path) -> Callable[[], None]:
    """Make the folder this process's until what is returned is called, or the process ends, killed or not.

    A process may ask several times. Its forks do not have the lock. Reading needs none.

    Args:
        folder: it is there.

    Raises:
        ValueError: another process has it; the message says which.
        OSError: no file can be made in the folder.
    """
    path = folder.resolve() / NAME
    held = _HELD.get(path)
    if held is not None and held.descriptor is not None and _is_at(held.descriptor, path):
        held.times += 1
    else:
        descriptor = take(path)
        if descriptor is None:
            raise ValueError(
                f"{folder}: {_holder(path)} writes there; wait for its end or stop it, or take another folder "
                "(reports and evaluations may read this one meanwhile)"
            )
        _write_holder(descriptor)
        held = _HELD[path] = _Held(path, descriptor)
    return lambda: _let_go(held)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """`hold` for the time of the block."""
    let_go = hold(folder)
    try:
        yield
    finally:
        let_go()


@contextmanager
def alone(path: Path, waiting: Callable[[str], object]) -> Iterator[None]:
    """In the block no other process is in the block of the same path, a file that is there as long as one is.

    Args:
        waiting: is told once who is waited for.

    Raises:
        OSError: the file cannot be made.
    """
    told = False
    while (descriptor := take(path)) is None:
        if not told:
            waiting(_holder(path))
            told = True
        time.sleep(_WAIT)
    held = _HELD[path] = _Held(path, descriptor)
    try:
        _write_holder(descriptor)
        yield
    finally:
        _let_go(held)


def take(path: Path) -> int | None:
    """A descriptor of the file, made if it is not there, and locked until it is closed; None if another has it.

    Where the file system has no locks, a warning says so, and it is not locked.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        try:
            if not _locked(descriptor, path):
                os.close(descriptor)
                return None
            if _is_at(descriptor, path):  # else who had it removed it, and another may have made it anew
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def remove_abandoned(path: Path) -> None:
    """Remove a file that `take` made and whose process is no more; one that cannot be locked or removed stays."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDWR)
        try:
            _lock(descriptor)
            path.unlink()
        finally:
            os.close(descriptor)


def new_folder(parent: Path) -> Path:
    """A folder of today's date and time in `parent`, which no other process has made, nor will."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = dated = parent / datetime.now().strftime("%Y%m%d-%H%M%S")
    number = 1
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1
            folder = parent / f"{dated.name}-{number}"


def _locked(descriptor: int, path: Path) -> bool:
    try:
        _lock(descriptor)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        if error.errno not in _NONE_HERE:
            raise
        why = f"its file system has no locks ({error.strerror}): see to it that no other process writes there"
        warnings.warn(f"{path.parent}: {why}", stacklevel=4)
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _write_holder(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())


def _holder(path: Path) -> str:
    with suppress(OSError, UnicodeDecodeError):
        if told := path.read_text(encoding="utf-8"):
            return told
    return "another process"


def _let_go(held: _Held) -> None:
    held.times -= 1
    if held.times or held.descriptor is None:
        return
    if _HELD.get(held.path) is held:
        del _HELD[held.path]
    with suppress(OSError):  # Windows does not remove an open file: it stays, unlocked
        if _is_at(held.descriptor, held.path):
            held.path.unlink()
    os.close(held.descriptor)


def _forked() -> None:
    """A fork shares the open files, and would keep the locks beyond the death of the process that it came from."""
    for held in _HELD.values():
        if held.descriptor is not None:
            os.close(held.descriptor)
        held.descriptor = None
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
