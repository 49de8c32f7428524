"""Checkpoints: tensors, numbers and one JSON string, read without running any code in them."""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from bt_fast.lab.config import RunConfig
from bt_fast.lab.files import replacing
from bt_fast.lab.layouts import described

FORMAT = 1
_STOPPED = "WeightsUnpickler error"


def save_checkpoint(path: Path, config: RunConfig, state: dict[str, Any]) -> None:
    """Writes `state` (tensors and plain values) and its configuration, replacing the file atomically."""
    with replacing(path) as file:
        torch.save({"bt_fast": FORMAT, "config": config.to_json(), "state": state}, file)


def load_checkpoint(path: Path) -> tuple[RunConfig, dict[str, Any]]:
    """Returns the configuration and state that `save_checkpoint` wrote, on the CPU; ValueError for another file."""
    content = read_tensors(path)
    version = content.get("bt_fast", "none") if isinstance(content, dict) else type(content).__name__
    if type(version) is int and version > FORMAT:  # checks the type first: a tensor is not comparable
        raise ValueError(
            f"{path}: written by a newer version of bt_fast: found format {version}, expected {FORMAT}; upgrade"
        )
    if type(version) is not int or version != FORMAT:
        shown = version if isinstance(version, (int, str)) else type(version).__name__
        raise ValueError(
            f"{path}: not a checkpoint of this package: found format {shown}, expected {FORMAT}, in "
            f"{described(content)}; of weights that another script saved, say of which network they are: --model "
            "small-cnn, preactresnet-18 or wrn-D-K"
        )
    try:
        config, state = RunConfig.from_json(content["config"]), content["state"]
        missing = [method for method in config.methods if "model" not in state["contestants"][method]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: a checkpoint with parts missing or of the wrong kind ({error!r}); take an earlier one"
        ) from error
    if missing:
        raise ValueError(f"{path}: a checkpoint without the model of {', '.join(missing)}; take an earlier one")
    return config, state


def read_tensors(path: Path) -> Any:
    """Returns what `torch.save` or safetensors wrote to `path`, tensors on the CPU; no code in it is run.

    ValueError if the file is missing, damaged, or holds more than tensors and plain values.
    """
    if (path / ".metadata").is_file():
        raise ValueError(
            f"{path}: a sharded checkpoint; write torch.distributed.checkpoint.format_utils."
            f"dcp_to_torch_save({str(path)!r}, 'whole.pt') and give that file"
        )
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint file; give the path of one")
    if _is_safetensors(path):
        return _safetensors(path)
    try:
        # opened once, since a run may replace the file
        with path.open("rb") as file, warnings.catch_warnings(), torch.serialization.safe_globals(_IGNORED):
            if zipfile.is_zipfile(file):  # else the format before torch 1.6, in which some networks were published
                _check_archive(file)
            file.seek(0)
            warnings.simplefilter("ignore")  # torch warns of foreign pickles that it then refuses
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types on a damaged file
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(
                f"{path}: not a readable checkpoint: beside tensors and plain values it holds {refused[1]}, which "
                "could run code and is not read; write torch.save(model.state_dict(), path) where it was made"
            ) from error
        raise ValueError(
            f"{path}: not a readable checkpoint ({_first_line(error)}); expected what torch.save(model.state_dict(), "
            "path) writes"
        ) from error


def _is_safetensors(path: Path) -> bool:
    """Whether the file begins with a matching header length and a JSON header."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file

        tensors: dict[str, Tensor] = load_file(path)
    except ImportError as error:
        raise ValueError(f"{path}: a file of safetensors; install them: pip install safetensors") from error
    except Exception as error:  # the library's own exception type
        raise ValueError(f"{path}: not a readable file of safetensors ({_first_line(error)}); write it anew") from error
    return tensors


class _Ignored:
    """Replaces objects of kinds that torch does not read and that scripts save beside the weights."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


_IGNORED: list[Any] = [
    (_Ignored, name)
    for name in (
        "argparse.Namespace",
        "numpy.dtype",
        "numpy.ndarray",
        *(f"numpy.{core}.multiarray.{made}" for core in ("core", "_core") for made in ("scalar", "_reconstruct")),
        *(f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")),
        *(f"pathlib.{module}{kind}Path" for module in ("", "_local.") for kind in ("Posix", "Windows")),
    )
]


def _check_archive(file: IO[bytes]) -> None:
    """Raises ValueError or BadZipFile unless the archive has the form of `torch.save`, with correct checksums.

    torch does not check them, and inflates a foreign archive to any size.
    """
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any("/code/" in member.filename for member in members):
            raise ValueError("TorchScript, whose code is not run: write torch.jit.load(path).state_dict() into a file")
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("an archive with compressed parts, which torch does not write")
        if sum(member.file_size for member in members) > os.fstat(file.fileno()).st_size:
            raise ValueError("an archive whose parts are larger than the file")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"damaged: the checksum of its part {damaged} is wrong")


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    # torch puts the unpickler's reason after the advice to run the file
    stopped = (line[line.index(_STOPPED) :] for line in lines if _STOPPED in line)
    return next(stopped, lines[0]).strip()[:200]
