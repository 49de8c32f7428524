"""Readers of the files of image data sets: MNIST's IDX, CIFAR's binary and python versions, npz."""

from __future__ import annotations

import codecs
import gzip
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bt_fast.faults import rounding_of_pixels

Array = npt.NDArray[Any]
Split = tuple[Tensor, Tensor]  # images uint8 [n, C, H, W], labels int64 [n]
Place = tuple[Path, list[list[str]]]  # a folder, and for each expected file its possible names

OR_NPZ = (
    "of any other data make one file, np.savez('images.npz', x_train=..., y_train=..., x_test=..., y_test=...), uint8 "
    "images [n, H, W, C] and integer labels [n], and give that"
)
_NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")
_CIFAR_SHAPE = (3, 32, 32)
_PIXELS = prod(_CIFAR_SHAPE)


def wrong(where: object, given: str, expected: str) -> ValueError:
    """Returns the error for invalid data."""
    return ValueError(f"{where}: found {given}, expected {expected}")


@contextmanager
def blaming(path: Path, expected: str) -> Iterator[None]:
    """Turns any exception into a ValueError that names the file: on corrupt bytes readers raise a dozen types."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path}: found {type(error).__name__}: {error}; expected {expected}") from error


def check_split(split: Split, classes: int, images_name: str, labels_name: str) -> None:
    """Raises ValueError, which names the array, unless images and labels have the dtypes and shapes of a `Split`."""
    x, y = split
    if x.dtype != torch.uint8 or x.ndim != 4 or 0 in x.shape:
        raise wrong(images_name, f"{x.dtype} {list(x.shape)}", "torch.uint8 [n, C, H, W], none of them 0")
    if y.dtype != torch.int64 or list(y.shape) != [len(x)]:
        raise wrong(labels_name, f"{y.dtype} {list(y.shape)}", f"torch.int64 [{len(x)}], one label an image")
    least, greatest = int(y.min()), int(y.max())
    if least < 0 or greatest >= classes:
        raise wrong(labels_name, f"labels from {least} to {greatest}", f"them within 0..{classes - 1}")


def locate(places: Sequence[Place], *, missing_ok: bool = False, advice: str = "") -> list[Path]:
    """Returns the files of the first place that has all of them.

    Without such a place, returns nothing with `missing_ok`, else raises a ValueError with the missing files and
    `advice`.
    """
    lines = []
    for folder, expected in places:
        existing = [[folder / name for name in names if (folder / name).is_file()] for names in expected]
        if all(existing):
            return [paths[0] for paths in existing]
        missing = [names[0] for names, paths in zip(expected, existing, strict=True) if not paths]
        lines.append(f"\n  in {folder}: no {', '.join(missing)}")
    if missing_ok:
        return []
    raise ValueError(
        "data files not found (nothing is downloaded; IDX files may also be spelt .idx and end in .gz):"
        + "".join(lines)
        + advice
    )


@dataclass(frozen=True)
class Format:
    """A published data set: where its files may lie below a folder, and how to read them, in the order of a place."""

    title: str
    classes: int
    places: Callable[[Path], list[Place]]
    read: Callable[[list[Path]], tuple[Split, Split]]


# MNIST


def _mnist_places(folder: Path) -> list[Place]:
    names = [
        [f"{half}-{kind}-ubyte{end}" for kind in kinds for end in ("", ".gz")]
        for half in ("train", "t10k")
        for kinds in (("images-idx3", "images.idx3"), ("labels-idx1", "labels.idx1"))
    ]
    return [(place, names) for place in (folder, folder / "MNIST" / "raw", folder / "mnist")]


def _read_idx(images_path: Path, labels_path: Path) -> Split:
    x = torch.from_numpy(_idx_array(images_path, 3)).unsqueeze(1)
    y = torch.from_numpy(_idx_array(labels_path, 1)).long()
    check_split((x, y), 10, str(images_path), str(labels_path))
    return x, y


def _idx_array(path: Path, ndim: int) -> Array:
    """Returns the array of an IDX file: 0, 0, 8 (uint8), ndim, then ndim big-endian int32 sizes, then the values."""
    if path.suffix == ".gz":
        with blaming(path, "a whole gzip file"), gzip.open(path) as file:
            content = file.read()
    else:
        content = path.read_bytes()
    header, magic = 4 + 4 * ndim, bytes([0, 0, 8, ndim])
    if len(content) < header or content[:4] != magic:
        begin = f"{len(content)} bytes that begin with {content[:4].hex(' ') or 'nothing'}"
        raise wrong(path, begin, f"at least {header} that begin with {magic.hex(' ')} (IDX, uint8)")
    shape = struct.unpack(f">{ndim}I", content[4:header])
    size = header + prod(shape)
    if len(content) != size:
        raise wrong(path, f"{len(content)} bytes", f"{size} for its shape {list(shape)}")
    return np.array(np.frombuffer(content, np.uint8, offset=header).reshape(shape))


# CIFAR-10 and CIFAR-100


def _cifar(
    title: str, folders: tuple[str, str], stems: tuple[str, ...], classes: int, label_bytes: int, key: bytes
) -> Format:
    """Returns the format of CIFAR-10 or CIFAR-100.

    Args:
        folders: of the binary and of the python version. stems: of the file names; the last is the test set.
        label_bytes: the bytes before the pixels of a binary record; the last is the label. key: of the labels in a
            pickle.
    """
    binary, python = [[f"{stem}.bin"] for stem in stems], [[stem] for stem in stems]

    def places(folder: Path) -> list[Place]:
        return [(folder / folders[0], binary), (folder / folders[1], python), (folder, binary), (folder, python)]

    def read(files: list[Path]) -> tuple[Split, Split]:
        splits = []
        for path in files:
            is_binary = path.suffix == ".bin"
            split = _read_binary(path, label_bytes) if is_binary else _read_pickle(path, key, classes)
            check_split(split, classes, str(path), str(path))
            splits.append(split)
        x_train, y_train = (torch.cat(parts) for parts in zip(*splits[:-1], strict=True))
        return (x_train, y_train), splits[-1]

    return Format(title, classes, places, read)


def _read_binary(path: Path, label_bytes: int) -> Split:
    content, record = np.fromfile(path, np.uint8), label_bytes + _PIXELS
    if content.size == 0 or content.size % record:
        raise wrong(path, f"{content.size} bytes", f"a positive multiple of {record}")
    records = torch.from_numpy(content).view(-1, record)
    return records[:, label_bytes:].reshape(-1, *_CIFAR_SHAPE), records[:, label_bytes - 1].long()


def _read_pickle(path: Path, key: bytes, classes: int) -> Split:
    with blaming(path, f"a pickle of arrays and plain values; {OR_NPZ}"), path.open("rb") as file:
        batch = _ArrayUnpickler(file, encoding="bytes").load()
    if not isinstance(batch, dict) or not {b"data", key} <= batch.keys():
        given = f"keys {sorted(map(repr, batch))}" if isinstance(batch, dict) else type(batch).__name__
        raise wrong(path, given, f"a dict with the keys b'data' and {key!r}")
    x, labels = _unpickled_images(batch[b"data"], f"{path}: b'data'"), batch[key]
    if not isinstance(labels, list) or any(type(y) is not int or not 0 <= y < classes for y in labels):
        raise wrong(f"{path}: {key!r}", repr(labels)[:60], f"a list of integers within 0..{classes - 1}")
    return x, torch.tensor(labels, dtype=torch.int64, device="cpu")


class _Recorded:
    """Replaces a numpy array or dtype in a pickle: keeps its arguments and its state, and runs nothing.

    The real ones trust the pickle's state, so a corrupt file can crash the process.
    """

    def __init__(self, *args: object) -> None:
        self.args = args
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"numpy{self.args}"


def _frombuffer(content: object, dtype: object, shape: object, order: object) -> _Recorded:
    """Returns an array of pickle protocol 5, in the form of the older protocols."""
    array = _Recorded()
    array.state = (1, shape, dtype, order == "F", content)
    return array


_PICKLE_GLOBALS: dict[tuple[str, str], Callable[..., object]] = {
    ("numpy", "ndarray"): _Recorded,
    ("numpy", "dtype"): _Recorded,
    ("_codecs", "encode"): codecs.encode,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Recorded for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads only plain values and `_Recorded` arrays, and imports nothing: a pickle could call any function."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PICKLE_GLOBALS:
            raise pickle.UnpicklingError(f"forbidden global {module}.{name}, which could run code")
        return _PICKLE_GLOBALS[module, name]


def _unpickled_images(array: object, where: str) -> Tensor:
    match array:
        case _Recorded(
            state=(_, (int(n), width), _Recorded(args=("u1" | b"u1", *_)), fortran, (bytes() | bytearray()) as content)
        ) if width == _PIXELS and n > 0 and len(content) == n * _PIXELS:
            x = np.frombuffer(content, np.uint8).reshape((n, _PIXELS), order="F" if fortran else "C")
            return torch.from_numpy(np.array(x, order="C")).view(-1, *_CIFAR_SHAPE)
    if isinstance(array, _Recorded):
        given = f"an array of {repr(array.state or array.args)[:60]}"
    else:
        given = type(array).__name__
    raise wrong(where, given, f"an array, uint8 [n, {_PIXELS}], n at least 1")


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
FORMATS = {
    "mnist": Format("MNIST", 10, _mnist_places, lambda files: (_read_idx(*files[:2]), _read_idx(*files[2:]))),
    "cifar10": _cifar(
        "CIFAR-10", ("cifar-10-batches-bin", "cifar-10-batches-py"), (*_BATCHES, "test_batch"), 10, 1, b"labels"
    ),
    "cifar100": _cifar(
        "CIFAR-100", ("cifar-100-binary", "cifar-100-python"), ("train", "test"), 100, 2, b"fine_labels"
    ),
}


# npz


def read_npz(path: Path) -> tuple[Split, Split, int]:
    """Returns the training split, the test split and the number of classes."""
    arrays = _npz_arrays(path)
    classes = 1 + max(int(arrays[y].max(initial=0)) for y in ("y_train", "y_test"))
    return _npz_split(path, arrays, "train", classes), _npz_split(path, arrays, "test", classes), classes


def _npz_split(path: Path, arrays: dict[str, Array], half: str, classes: int) -> Split:
    x_name, y_name = f"{path}: x_{half}", f"{path}: y_{half}"
    x = _channels_first(_as_uint8(arrays[f"x_{half}"], x_name), x_name)
    split = torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(arrays[f"y_{half}"].astype(np.int64))
    check_split(split, classes, x_name, y_name)
    return split


def _npz_arrays(path: Path) -> dict[str, Array]:
    if not zipfile.is_zipfile(path):
        raise wrong(path, "no whole zip archive", f"an npz with {', '.join(_NPZ_KEYS)}")
    with blaming(path, "an npz of plain arrays"), np.load(path, allow_pickle=False) as archive:
        keys = archive.files
        arrays = {key: archive[key] for key in _NPZ_KEYS if key in keys}
    if len(arrays) < len(_NPZ_KEYS):
        raise wrong(path, ", ".join(keys) or "nothing", ", ".join(_NPZ_KEYS))
    for key, array in arrays.items():
        if not isinstance(array, np.ndarray):  # for a member that is not an .npy file numpy gives its bytes
            raise wrong(f"{path}: {key}", f"{len(array)} bytes", "an array as numpy saves it")
        if key.startswith("y") and not np.issubdtype(array.dtype, np.integer):
            raise wrong(f"{path}: {key}", str(array.dtype), "integer labels")
    return arrays


def _channels_first(x: Array, where: str) -> Array:
    if x.ndim == 3:
        return x[:, None]
    axes = [axis for axis in (1, 3) if x.ndim == 4 and x.shape[axis] in (1, 3)]
    if len(axes) != 1:
        why = "where axes 1 and 3 could both be the channels" if axes else "where no axis can be the channels"
        raise ValueError(
            f"{where}: found {list(x.shape)}, {why}; "
            "expected [n, H, W], or size 1 or 3 on just one of axis 1 (n, C, H, W) and axis 3 (n, H, W, C)"
        )
    return np.moveaxis(x, axes[0], 1)


def _as_uint8(x: Array, where: str) -> Array:
    if x.dtype == np.uint8 or x.size == 0:  # an empty array gets its own error later
        return x.astype(np.uint8, copy=False)
    if x.dtype not in (np.float32, np.float64):
        raise wrong(where, str(x.dtype), "uint8, or float32 or float64 in [0, 1]")
    if not np.isfinite(x).all():
        given = f"{np.isnan(x).sum()} NaN and {np.isinf(x).sum()} infinite of {x.size} values"
        raise wrong(where, given, "[0, 1]: look for a division by 0 in what made them")
    least, greatest = x.min(), x.max()
    room = rounding_of_pixels(torch.float32, 0.0, 1.0)
    if not (least >= -room and greatest <= 1 + room):
        advice = "divide bytes by 255, take a mean and a deviation out in the model and not here, or store uint8"
        raise wrong(where, f"floats from {least:.6g} to {greatest:.6g}", f"[0, 1]; {advice}")
    scaled = x.clip(0, 1) * 255
    rounded: Array = np.rint(scaled)
    error = np.abs(scaled - rounded).max()
    if error > 1e-3:
        given = f"floats whose 255-fold is up to {error:.3g} from an integer"
        raise wrong(where, given, "at most 0.001; or store uint8")
    return rounded.astype(np.uint8)
