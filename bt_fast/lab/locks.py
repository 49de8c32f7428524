"""Locks that end with their process: on run folders, on files that several processes would make, on half-written files.

A lock is the system's, on an open file that contains the holder's name; a file that merely exists locks nothing. The
library filelock is unsuitable: its lock files stay forever, while here the holder removes the locked file, which may be
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
from functools import partial
from pathlib import Path

if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        os.lseek(descriptor, 2**30, os.SEEK_SET)  # behind the content, which other processes read
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        os.lseek(descriptor, 0, os.SEEK_SET)

else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


NAME = "run.lock"
_TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)  # of some network file systems
_WAIT = 0.1  # seconds between attempts


@dataclass(eq=False)
class _Lock:
    """A lock of this process, and the number of its holders."""

    path: Path
    descriptor: int | None  # None in a fork
    holders: int = 1


_LOCKS: dict[Path, _Lock] = {}


def hold(folder: Path) -> Callable[[], None]:
    """Locks an existing folder until the returned function is called, or the process ends, killed or not.

    A process may hold a folder several times; its forks do not hold it. Readers need no lock. ValueError, which names
    the other process, if one holds it; OSError if no file can be made in it.
    """
    path = folder.resolve() / NAME
    lock = _LOCKS.get(path)
    if lock is not None and lock.descriptor is not None and _is_at(lock.descriptor, path):
        lock.holders += 1
    else:
        descriptor = take(path)
        if descriptor is None:
            raise ValueError(
                f"{folder}: {_holder(path)} writes there; wait for its end or stop it, or take another folder "
                "(reports and evaluations may read this one meanwhile)"
            )
        lock = _registered(path, descriptor)
    return partial(_release, lock)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Holds the folder during the block."""
    release = hold(folder)
    try:
        yield
    finally:
        release()


@contextmanager
def alone(path: Path, waiting: Callable[[str], object]) -> Iterator[None]:
    """Lets only one process at a time run the block for a path, a file that exists meanwhile.

    `waiting` is called once with the description of another process in the block. OSError if the file cannot be made.
    """
    is_reported = False
    while (descriptor := take(path)) is None:
        if not is_reported:
            waiting(_holder(path))
            is_reported = True
        time.sleep(_WAIT)
    lock = _registered(path, descriptor)
    try:
        yield
    finally:
        _release(lock)


def take(path: Path) -> int | None:
    """Returns a descriptor of the file, made if missing and locked until closed; None if another process has the lock.

    If the file system has no locks, it warns and does not lock.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        is_locked = False
        try:
            if not _try_lock(descriptor, path):
                return None
            is_locked = _is_at(descriptor, path)  # not if its holder has removed the file and another is in its place
            if is_locked:
                return descriptor
        finally:
            if not is_locked:
                os.close(descriptor)


def remove_abandoned(path: Path) -> None:
    """Removes a file that `take` made in a process that has ended; one that cannot be locked or removed stays."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDWR)
        try:
            _lock(descriptor)
            path.unlink()
        finally:
            os.close(descriptor)


def new_folder(parent: Path) -> Path:
    """Makes a folder in `parent` with a name from date and time that no other process uses."""
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


def _try_lock(descriptor: int, path: Path) -> bool:
    try:
        _lock(descriptor)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        if error.errno not in _UNSUPPORTED:
            raise
        reason = f"its file system has no locks ({error.strerror}): see to it that no other process writes there"
        warnings.warn(f"{path.parent}: {reason}", stacklevel=4)
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _registered(path: Path, descriptor: int) -> _Lock:
    """Returns the lock of a descriptor from `take`, after writing this process's name into the file."""
    lock = _LOCKS[path] = _Lock(path, descriptor)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    except BaseException:
        _release(lock)
        raise
    return lock


def _holder(path: Path) -> str:
    with suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8") or "another process"
    return "another process"


def _release(lock: _Lock) -> None:
    lock.holders -= 1
    if lock.holders or lock.descriptor is None:
        return
    if _LOCKS.get(lock.path) is lock:
        del _LOCKS[lock.path]
    with suppress(OSError):  # Windows does not remove an open file: it stays, unlocked
        if _is_at(lock.descriptor, lock.path):
            lock.path.unlink()
    os.close(lock.descriptor)


def _forget_in_fork() -> None:
    """Closes a fork's descriptors, which would keep the locks after the death of its parent process."""
    for lock in _LOCKS.values():
        if lock.descriptor is not None:
            os.close(lock.descriptor)
        lock.descriptor = None
    _LOCKS.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_fork)
