"""Output of the commands, their progress bars, and the signals that stop them."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console()
say = functools.partial(console.print, soft_wrap=True, highlight=False)  # lines to copy are not wrapped


class Bar(NamedTuple):
    """A progress bar on the terminal."""

    progress: Progress
    task: TaskID

    def reach(self, count: int, description: str | None = None) -> None:
        """Sets the number of finished items."""
        self.progress.update(self.task, completed=count, description=description)

    def advance(self, _: object = None) -> None:
        """Adds one finished item."""
        self.progress.advance(self.task)


@contextmanager
def progress_bar(description: str, total: int, completed: int = 0) -> Iterator[Bar]:
    """Shows a progress bar during the block."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=console) as progress:
        yield Bar(progress, progress.add_task(description, total=total, completed=completed))


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yields a list that receives the number of an interrupt or termination signal; a second signal exits at once."""
    received: list[int] = []

    def receive(number: int, _: object) -> None:
        received.append(number)
        if len(received) > 1:
            sys.exit(128 + number)
        os.write(2, b"bt-fast: stopping after this iteration; once more to stop at once\n")  # safe in a signal handler

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
