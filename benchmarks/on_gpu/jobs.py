"""A process in a group of its own, that ends with the one which started it, or when that one says so."""

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

GRACE = 1.0  # seconds from the request to end to the signal that cannot be refused
TICK = 0.2


@dataclass(eq=False)
class Job:
    """A running process group, and when it was begun, in seconds of `time.monotonic`."""

    process: subprocess.Popen[bytes]
    began: float

    @property
    def code(self) -> int | None:
        """The exit code, minus the signal's number where it died of one; None while it runs."""
        return self.process.poll()

    def end(self) -> None:
        """End all of the group that still runs. Does not wait for what even SIGKILL does not end."""
        if self.code is None:
            self._signal(signal.SIGTERM)
            self._wait(GRACE)
        self._signal(signal.SIGKILL)  # what the process has left behind, too
        self._wait(GRACE)

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def _wait(self, seconds: float) -> None:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)


def start(command: Sequence[str], log: Path, folder: Path, environment: Mapping[str, str]) -> Job:
    """Run a command in a folder; what it prints goes to the file `log`."""
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
    """From now on, end this process's whole group once its parent has gone: nothing is left behind by a SIGKILL."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(TICK)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
