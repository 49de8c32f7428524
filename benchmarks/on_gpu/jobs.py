"""Runs a process in a new group, which ends with the process that started it or at its request."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

GRACE = 1.0  # seconds from the request to end to SIGKILL
TICK = 0.2


@dataclass(eq=False)
class Job:
    """A running process group, and its start, in seconds of `time.monotonic`."""

    process: subprocess.Popen[bytes]
    began: float

    @property
    def code(self) -> int | None:
        """The exit code, negative for the signal of a killed process; None while it runs."""
        return self.process.poll()

    def end(self) -> None:
        """Ends all of the group that still runs. Does not wait for processes that even SIGKILL does not end."""
        if self.code is None:
            self._signal(signal.SIGTERM)
            self._wait(GRACE)
        self._signal(signal.SIGKILL)  # also what the process has left behind
        self._wait(GRACE)

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def _wait(self, seconds: float) -> None:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)


def start(command: Sequence[str], log: Path, folder: Path, environment: Mapping[str, str]) -> Job:
    """Runs a command in a folder; its output goes to the file `log`."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=dict(environment),
            preexec_fn=os.setpgrp,  # a group, no session: a machine that ends the session's processes ends these too
        )
    return Job(process, time.monotonic())


def end_with_parent() -> None:
    """Ends this process's whole group from now on when its parent is gone, so that a SIGKILL leaves nothing behind."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(TICK)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
