"""`python -m bt_fast` and the `bt-fast` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say what is missing for it."""
    try:
        from bt_fast.lab.cli import cli
    except ModuleNotFoundError as error:
        if error.name not in ("click", "rich", "matplotlib"):
            raise
        sys.exit(f"bt-fast: the command line needs {error.name}: pip install 'bt-fast[lab]'")
    cli()


if __name__ == "__main__":
    main()
