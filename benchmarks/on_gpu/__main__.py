"""Checks and measures the package on a GPU in a given time: the stages of `plan.py`, in order of value.

python -m benchmarks.on_gpu --out FOLDER --minutes 8                   # all stages
python -m benchmarks.on_gpu --out FOLDER --minutes 4 --stages c,d      # some, after a fix
python -m benchmarks.on_gpu --out FOLDER --minutes 8 --rehearse        # all, tiny, on the CPU: nothing is measured

It needs neither git nor a network, and installs the package from this tree if necessary. The folder then holds
results.json (everything), page.md (to quote), log.txt, and trace.json.gz (for Perfetto). The exit code is 1 if a stage
failed, in a rehearsal also if one was cut or did not run; 2 for invalid arguments.
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.on_gpu.conduct import FILES, Request, conduct
from benchmarks.on_gpu.plan import STAGES, chosen

LAYOUTS = (
    {"x_train", "y_train", "x_test", "y_test"},
    {f"{half}_{what}" for half in ("train", "test") for what in ("jpeg", "offset", "label")},
)


def parsed(arguments: Sequence[str] | None) -> Request:
    """Returns the request; invalid arguments end the process with one line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.on_gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results, made if it is not there")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything together (default: 8)")
    parser.add_argument("--stages", help="letters or names with commas between (default: all)")
    parser.add_argument("--rehearse", action="store_true", help="run every stage on the CPU, in tiny sizes")
    parser.add_argument("--data", type=Path, help="an .npz of images for the last stage")
    given = parser.parse_args(arguments)
    try:
        if not 0 < given.minutes <= 600:
            raise ValueError(f"--minutes: expected a number above 0, of at most 600, got {given.minutes:g}")
        stages = STAGES if given.stages is None else chosen(given.stages)
        check_out(given.out)
        if given.data is not None:
            check_data(given.data)
    except ValueError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error
    data = None if given.data is None else given.data.resolve()
    return Request(given.out.resolve(), 60 * given.minutes, stages, given.rehearse, data)


def check_out(folder: Path) -> None:
    """Raises ValueError unless results can be written there and no earlier run has written any."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out: {folder} is a file, expected a folder")
    for name in FILES:
        if (folder / name).exists():
            raise ValueError(f"--out: {folder} already holds {name}; name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: {folder} cannot be made ({error.strerror}); name another folder") from error


def check_data(path: Path) -> None:
    """Raises ValueError unless the file is an .npz of one of the two layouts."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"--data: {path} is no .npz file")
    with zipfile.ZipFile(path) as archive:
        keys = {name.removesuffix(".npy") for name in archive.namelist()}
    if not any(layout <= keys for layout in LAYOUTS):
        expected = " or ".join(" ".join(sorted(layout)) for layout in LAYOUTS)
        raise ValueError(f"--data: {path} holds {' '.join(sorted(keys)) or 'nothing'}; expected {expected}")


if __name__ == "__main__":
    sys.exit(conduct(parsed(None)))
