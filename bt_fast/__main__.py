"""`python -m bt_fast` and the `bt-fast` command."""

from __future__ import annotations

import importlib.metadata
import sys
from contextlib import suppress

from bt_fast.floors import FLOORS, too_old

EXTRA = ("click", "rich", "matplotlib", "jinja2")  # of pyproject.toml's extra lab


def main() -> None:
    """Runs the command line, or reports which package it needs."""
    for name in EXTRA:
        with suppress(importlib.metadata.PackageNotFoundError):
            if (version := importlib.metadata.version(name)) and too_old(name, version):
                needed = f"{name} >= {FLOORS[name]}, but {version} is installed"
                sys.exit(f"bt-fast: the command line needs {needed}: pip install --upgrade 'bt-fast[lab]'")
    try:
        from bt_fast.lab.cli import cli
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRA:
            raise
        sys.exit(f"bt-fast: the command line needs {missing}: pip install 'bt-fast[lab]'")
    cli()


if __name__ == "__main__":
    main()
