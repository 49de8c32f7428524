"""A folder belongs to one process at a time, a dead process holds nothing, and names of new folders do not collide."""

import errno
import fcntl
import importlib.util
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from bt_fast.lab import locks
from bt_fast.lab.locks import alone, held, hold, new_folder, take


def child(work):
    """Forks a process that does the work and waits to be killed; returns when the work is done."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.write(writing, f"{work()}".encode() or b"-")
            time.sleep(60)
        finally:
            os._exit(1)
    os.close(writing)
    reported = os.read(reading, 1000).decode()
    os.close(reading)
    return process, reported


def kill(process):
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def holding(folder):
    hold(folder)
    return os.getpid()


def test_a_folder_that_another_process_has_is_refused_with_its_name(tmp_path):
    process, _ = child(lambda: holding(tmp_path))
    try:
        with pytest.raises(ValueError, match=rf"{tmp_path}: process {process} on \S+ writes there; wait for its end"):
            hold(tmp_path)
    finally:
        kill(process)


def test_a_dead_process_keeps_no_lock_though_its_file_stays(tmp_path):
    kill(child(lambda: holding(tmp_path))[0])
    assert (tmp_path / "run.lock").exists()
    with held(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_fork_that_outlives_its_process_does_not_keep_the_lock(tmp_path):
    process, grandchild = child(lambda: (holding(tmp_path), child(lambda: "alive")[0])[1])
    kill(process)
    try:
        os.kill(int(grandchild), 0)
        with held(tmp_path):
            pass
    finally:
        os.kill(int(grandchild), signal.SIGKILL)


def test_a_process_may_ask_twice_and_the_folder_is_free_after_the_last(tmp_path):
    first, second = hold(tmp_path), hold(tmp_path)
    first()
    process, reported = child(lambda: attempt(tmp_path))
    kill(process)
    assert "writes there" in reported
    second()
    process, reported = child(lambda: attempt(tmp_path))
    kill(process)
    assert reported == "free"


def attempt(folder):
    try:
        hold(folder)
    except ValueError as error:
        return error
    return "free"


def test_a_folder_that_was_removed_and_made_anew_is_not_taken_for_the_old_one(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    old = hold(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    new = hold(folder)
    old()
    process, reported = child(lambda: attempt(folder))
    kill(process)
    assert "writes there" in reported
    new()


def test_what_was_removed_while_somebody_opened_it_is_opened_anew(tmp_path, monkeypatch):
    path, lock = tmp_path / "run.lock", locks._lock

    def removed_once(descriptor):
        monkeypatch.setattr(locks, "_lock", lock)
        path.unlink()
        lock(descriptor)

    monkeypatch.setattr(locks, "_lock", removed_once)
    descriptor = take(path)
    assert os.path.samestat(os.fstat(descriptor), path.stat())
    os.close(descriptor)


def test_a_file_system_without_locks_is_reported_and_nothing_is_kept_from_anybody(tmp_path, monkeypatch):
    def none(_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks, "_lock", none)
    with pytest.warns(UserWarning, match="no locks .* see to it that no other process writes there"), held(tmp_path):
        pass


def test_in_the_block_of_a_path_one_process_is_alone_and_the_next_learns_for_whom_it_waits(tmp_path):
    path, reported = tmp_path / ".lock", []

    def inside():
        with alone(path, reported.append):
            (tmp_path / "mine").touch()
            time.sleep(1)
            (tmp_path / "mine").unlink()

    process, _ = child(lambda: (os.fork() or (inside(), os._exit(0)), time.sleep(0.3)))
    with alone(path, reported.append):
        assert not (tmp_path / "mine").exists()
    kill(process)
    assert len(reported) == 1
    assert not path.exists()


def test_folders_of_the_same_second_have_names_of_their_own(tmp_path):
    code = "from pathlib import Path; from bt_fast.lab.locks import new_folder\n"
    code += f"for _ in range(40): print(new_folder(Path({str(tmp_path / 'runs')!r})))"
    begun = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    names = "".join(process.communicate()[0] for process in begun).split()
    assert len(names) == len(set(names)) == 80
    assert {Path(name) for name in names} == set((tmp_path / "runs").iterdir())
    assert new_folder(tmp_path / "runs").is_dir()


def test_windows_locks_a_byte_behind_the_content(tmp_path, monkeypatch):
    """Emulates the calls of Windows with this system's locks of bytes that belong to an open file."""

    def locking(descriptor, mode, count):
        assert (mode, count) == (2, 1)
        start = os.lseek(descriptor, 0, os.SEEK_CUR)
        lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, start, count, 0)
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, lock)

    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    monkeypatch.setattr(sys, "platform", "win32")
    spec = importlib.util.spec_from_file_location("windows_locks", locks.__file__)
    windows = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "windows_locks", windows)
    spec.loader.exec_module(windows)
    monkeypatch.undo()
    with windows.held(tmp_path):
        assert (tmp_path / "run.lock").read_text().startswith(f"process {os.getpid()} on ")
        process, reported = child(lambda: windows_attempt(windows, tmp_path))
        kill(process)
        assert "writes there" in reported
    assert windows_attempt(windows, tmp_path) == "free"


def windows_attempt(windows, folder):
    try:
        windows.hold(folder)
    except ValueError as error:
        return error
    return "free"
