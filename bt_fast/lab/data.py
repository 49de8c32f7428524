"""Image data sets held in memory: MNIST, CIFAR-10 and -100, an npz of your own, and a part of MNIST in the package.

Nothing is downloaded, nothing that is read can run code, and a file that is not what it should be is
refused by name.
"""

import codecs
import dataclasses
import gzip
import pickle
import struct
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bt_fast.faults import rounding_of_pixels

_Array = npt.NDArray[Any]
_Split = tuple[Tensor, Tensor]  # images uint8 [n, C, H, W], labels int64 [n]
_Place = tuple[Path, list[list[str]]]  # a folder and the files wanted there, each with its accepted spellings

_MNIST_CLASSES = 10
_CIFAR_SHAPE = (3, 32, 32)
_NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")
_OR_NPZ = (
    "of any other data make one file, np.savez('images.npz', x_train=..., y_train=..., x_test=..., y_test=...), uint8 "
    "images [n, H, W, C] and integer labels [n], and give that"
)


@dataclass(frozen=True)
class _Cifar:
    """How one of the two is published: its folders, files (the last is the test half), classes and labels."""

    folder: str
    stems: tuple[str, ...]
    classes: int
    label_bytes: int  # before the pixels of a record of the binary version; the last is the label
    labels_key: bytes  # in the python version


_CIFAR10 = _Cifar("cifar-10-batches", (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"), 10, 1, b"labels")
_CIFAR100 = _Cifar("cifar-100", ("train", "test"), 100, 2, b"fine_labels")


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Labelled images for training and testing, checked once, when it is made.

    name: what reports call the data set.
    x_train, x_test: uint8 [n, C, H, W] in 0..255, the same C, H, W in both; `images` turns them into floats.
    y_train, y_test: int64 [n] in 0..classes-1.
    classes: the number of classes.

    Raises ValueError that names the array, what was found and what was expected.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int

    def __post_init__(self) -> None:
        for half, x, y in (("train", self.x_train, self.y_train), ("test", self.x_test, self.y_test)):
            _check_split((x, y), self.classes, f"{self.name}: x_{half}", f"{self.name}: y_{half}")
        train, test = list(self.x_train.shape[1:]), list(self.x_test.shape[1:])
        if train != test:
            raise ValueError(f"{self.name}: x_test: found images of {test}, expected {train} as in x_train")

    def take(self, train: int | None = None, test: int | None = None) -> "ImageDataset":
        """The data set cut to its first `train` training and first `test` test images; None keeps all.

        The arrays are views. Raises ValueError if fewer than 1 or more than there are is asked for.
        """
        for key, asked, y in (("train", train, self.y_train), ("test", test, self.y_test)):
            if asked is not None and not 1 <= asked <= len(y):
                raise ValueError(f"{self.name}: {key}={asked}, expected 1 to the {len(y)} images there are")
        return dataclasses.replace(
            self,
            x_train=self.x_train[:train],
            y_train=self.y_train[:train],
            x_test=self.x_test[:test],
            y_test=self.y_test[:test],
        )


def images(batch: Tensor, device: torch.device | str) -> Tensor:
    """A minibatch as a model takes it: uint8 [n, C, H, W] -> batch / 255, float32 in [0, 1], on `device`.

    Raises ValueError if the batch is not uint8.
    """
    if batch.dtype != torch.uint8:
        raise ValueError(f"batch: found {batch.dtype}, expected torch.uint8: give bytes, as load_dataset does")
    return batch.to(device).float() / 255  # moved first: uint8 is a quarter of the bytes


def minibatches(n: int, batch_size: int, *, seed: int, epoch: int) -> Iterator[Tensor]:
    """One epoch's minibatches: a permutation of 0..n-1 cut into int64 index tensors on the CPU.

    The permutation depends on n, seed and epoch alone. Each batch holds `batch_size` indices; the last holds
    what is left. Raises ValueError unless n and batch_size are at least 1, seed and epoch at least 0.
    """
    if n < 1 or batch_size < 1 or seed < 0 or epoch < 0:
        raise ValueError(
            f"found n={n}, batch_size={batch_size}, seed={seed}, epoch={epoch}, "
            "expected n and batch_size of at least 1, seed and epoch of at least 0"
        )
    # Hashed to 32 bits, since torch's CPU generator ignores the upper half of a seed.
    mixed = int(np.random.SeedSequence(seed, spawn_key=(epoch,)).generate_state(1)[0])
    order = torch.randperm(n, generator=torch.Generator().manual_seed(mixed), device="cpu")
    return (order[start : start + batch_size] for start in range(0, n, batch_size))


def load_dataset(source: str, data_dir: Path = Path("data")) -> ImageDataset:
    """Load a data set from files already on this machine.

    source: one of
      "digits"   5,000 training and 1,000 test images of MNIST that come with the package (see
                 MNIST_ATTRIBUTION.md beside this file)
      "mnist"    MNIST's four IDX files, plain or .gz, in data_dir, data_dir/MNIST/raw or data_dir/mnist
      "cifar10", "cifar100"  the binary or python version in data_dir or its usual folder below it
      a path     to an .npz file, or to a directory that holds the files of one of these as above.

    An .npz file has x_train, y_train, x_test and y_test. Images are [n, H, W], [n, H, W, C] or [n, C, H, W]
    with C = 1 or 3, as uint8, or as float32 or float64 in [0, 1] whose every value is some k/255. Labels are
    integers [n]; there are as many classes as the greatest label of both halves plus one.

    Raises ValueError that names the file, what was found and what was expected; if files are missing, it
    lists those looked for, and where.
    """
    if source == "digits":
        with resources.as_file(resources.files("bt_fast.lab") / "mnist_subset.npz") as embedded:
            return _load_npz(embedded, source)
    if source == "mnist":
        return _load_mnist(_locate(_mnist_places(data_dir)), source)
    if source in ("cifar10", "cifar100"):
        kind = _CIFAR10 if source == "cifar10" else _CIFAR100
        return _load_cifar(_locate(_cifar_places(data_dir, kind)), source, kind)
    path = Path(source)
    if path.is_dir():
        return _load_directory(path)
    if path.suffix == ".npz" and path.is_file():
        return _load_npz(path, path.stem)
    raise ValueError(
        f"{source}: found no such data, expected digits, mnist, cifar10, cifar100, an existing .npz file, "
        "or a directory with the files of MNIST, CIFAR-10 or CIFAR-100"
    )


def _check_split(split: _Split, classes: int, images_name: str, labels_name: str) -> None:
    x, y = split
    if x.dtype != torch.uint8 or x.ndim != 4 or 0 in x.shape:
        found = f"{x.dtype} {list(x.shape)}"
        raise ValueError(f"{images_name}: found {found}, expected torch.uint8 [n, C, H, W], none of them 0")
    if y.dtype != torch.int64 or list(y.shape) != [len(x)]:
        found = f"{y.dtype} {list(y.shape)}"
        raise ValueError(f"{labels_name}: found {found}, expected torch.int64 [{len(x)}], one label an image")
    least, greatest = int(y.min()), int(y.max())
    if least < 0 or greatest >= classes:
        raise ValueError(
            f"{labels_name}: found labels from {least} to {greatest}, expected them within 0..{classes - 1}"
        )


@contextmanager
def _blaming(path: Path, expected: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # corrupt bytes make the readers raise a dozen unrelated types
        raise ValueError(f"{path}: found {type(error).__name__}: {error}; expected {expected}") from error


# Finding files


def _existing(folder: Path, spellings: Sequence[str]) -> list[Path]:
    return [folder / spelling for spelling in spellings if (folder / spelling).is_file()]


def _first_complete(places: Sequence[_Place]) -> list[Path]:
    """The files of the first place that has them all, in the order wanted; empty if no place has."""
    for folder, wanted in places:
        files = [path for spellings in wanted for path in _existing(folder, spellings)[:1]]
        if len(files) == len(wanted):
            return files
    return []


def _locate(places: Sequence[_Place], advice: str = "") -> list[Path]:
    files = _first_complete(places)
    if files:
        return files
    lines = []
    for folder, wanted in places:
        missing = [spellings[0] for spellings in wanted if not _existing(folder, spellings)]
        lines.append(f"\n  in {folder}: no {', '.join(missing)}")
    raise ValueError(
        "data files not found (nothing is downloaded; IDX files may also be spelt .idx and end in .gz):"
        + "".join(lines)
        + advice
    )


def _mnist_places(folder: Path) -> list[_Place]:
    wanted = [
        [f"{half}-{kind}-ubyte{end}" for kind in kinds for end in ("", ".gz")]
        for half in ("train", "t10k")
        for kinds in (("images-idx3", "images.idx3"), ("labels-idx1", "labels.idx1"))
    ]
    return [(place, wanted) for place in (folder, folder / "MNIST" / "raw", folder / "mnist")]


def _cifar_places(folder: Path, kind: _Cifar) -> list[_Place]:
    binary, python = [[f"{stem}.bin"] for stem in kind.stems], [[stem] for stem in kind.stems]
    suffixes = ("-bin", "-py") if kind is _CIFAR10 else ("-binary", "-python")
    below = [folder / f"{kind.folder}{suffix}" for suffix in suffixes]
    return [(below[0], binary), (below[1], python), (folder, binary), (folder, python)]


def _load_directory(folder: Path) -> ImageDataset:
    places = {
        "MNIST": _mnist_places(folder),
        "CIFAR-10": _cifar_places(folder, _CIFAR10),
        "CIFAR-100": _cifar_places(folder, _CIFAR100),
    }
    found = [name for name, wanted in places.items() if _first_complete(wanted)]
    if len(found) > 1:
        raise ValueError(f"{folder}: found the files of {' and '.join(found)}, expected those of one")
    wanted = places[found[0]] if found else [place for wanted in places.values() for place in wanted]
    files = _locate(wanted, _other_files(folder))
    name = folder.resolve().name
    if found == ["MNIST"]:
        return _load_mnist(files, name)
    return _load_cifar(files, name, _CIFAR10 if found == ["CIFAR-10"] else _CIFAR100)


def _other_files(folder: Path) -> str:
    """What lies in a folder without the files wanted, and what to make of it."""
    below = sorted(folder.iterdir())
    archives = [path.name for path in below if path.suffix == ".npz"]
    if archives:
        return f"\nit holds {', '.join(archives[:3])}: give the file itself, as {folder / archives[0]}"
    classes = [path.name for path in below if path.is_dir()]
    if classes:
        shown = ", ".join(classes[:3]) + (", ..." if len(classes) > 3 else "")
        return f"\nit holds folders ({shown}): images in a folder for each class are not read; {_OR_NPZ}"
    return f"\n{_OR_NPZ}"


# MNIST


def _load_mnist(files: list[Path], name: str) -> ImageDataset:
    train, test = _read_idx_split(*files[:2]), _read_idx_split(*files[2:])
    return ImageDataset(name, *train, *test, classes=_MNIST_CLASSES)


def _read_idx_split(images_path: Path, labels_path: Path) -> _Split:
    x = torch.from_numpy(_read_idx(images_path, 3)).unsqueeze(1)
    y = torch.from_numpy(_read_idx(labels_path, 1)).long()
    _check_split((x, y), _MNIST_CLASSES, str(images_path), str(labels_path))
    return x, y


def _read_idx(path: Path, ndim: int) -> _Array:
    """The array of an IDX file: 0, 0, 8 (uint8), ndim, then ndim big-endian int32 sizes, then the values."""
    content = _read_plain_or_gz(path)
    header, magic = 4 + 4 * ndim, bytes([0, 0, 8, ndim])
    if len(content) < header or content[:4] != magic:
        found = f"{len(content)} bytes that begin with {content[:4].hex(' ') or 'nothing'}"
        raise ValueError(
            f"{path}: found {found}, expected at least {header} that begin with {magic.hex(' ')} (IDX, uint8)"
        )
    shape = struct.unpack(f">{ndim}I", content[4:header])
    if len(content) != header + prod(shape):
        raise ValueError(
            f"{path}: found {len(content)} bytes, expected {header + prod(shape)} for its shape {list(shape)}"
        )
    return np.array(np.frombuffer(content, np.uint8, offset=header).reshape(shape))


def _read_plain_or_gz(path: Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    with _blaming(path, "a whole gzip file"), gzip.open(path) as file:
        return file.read()


# CIFAR-10 and CIFAR-100


def _load_cifar(files: list[Path], name: str, kind: _Cifar) -> ImageDataset:
    read = _read_cifar_binary if files[0].suffix == ".bin" else _read_cifar_python
    splits = [read(path, kind) for path in files]
    for split, path in zip(splits, files, strict=True):
        _check_split(split, kind.classes, str(path), str(path))
    x_train, y_train = (torch.cat(parts) for parts in zip(*splits[:-1], strict=True))
    return ImageDataset(name, x_train, y_train, *splits[-1], classes=kind.classes)


def _read_cifar_binary(path: Path, kind: _Cifar) -> _Split:
    content, record = np.fromfile(path, np.uint8), kind.label_bytes + prod(_CIFAR_SHAPE)
    if content.size == 0 or content.size % record:
        raise ValueError(f"{path}: found {content.size} bytes, expected a positive multiple of {record}")
    records = torch.from_numpy(content).view(-1, record)
    return records[:, kind.label_bytes :].reshape(-1, *_CIFAR_SHAPE), records[:, kind.label_bytes - 1].long()


def _read_cifar_python(path: Path, kind: _Cifar) -> _Split:
    key, classes = kind.labels_key, kind.classes
    with _blaming(path, f"a pickle of arrays and plain values; {_OR_NPZ}"), path.open("rb") as file:
        batch = _ArrayUnpickler(file, encoding="bytes").load()
    if not isinstance(batch, dict) or not {b"data", key} <= batch.keys():
        found = f"keys {sorted(map(repr, batch))}" if isinstance(batch, dict) else type(batch).__name__
        raise ValueError(f"{path}: found {found}, expected a dict with the keys b'data' and {key!r}")
    x, labels = _unpickled_images(batch[b"data"], f"{path}: b'data'"), batch[key]
    if not isinstance(labels, list) or any(type(y) is not int or not 0 <= y < classes for y in labels):
        raise ValueError(
            f"{path}: {key!r}: found {repr(labels)[:60]}, expected a list of integers within 0..{classes - 1}"
        )
    return x, torch.tensor(labels, dtype=torch.int64, device="cpu")


class _Recorded:
    """Stands for a numpy array or dtype in a pickle: keeps what it was made of, and does nothing with it.

    The real ones trust the state that a pickle gives them, and a spoilt file can crash the process.
    """

    args: tuple[object, ...] = ()
    state: object = None

    def __init__(self, *args: object) -> None:
        self.args = args

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"numpy{self.args}"


_PICKLE_GLOBALS = {
    ("numpy.core.multiarray", "_reconstruct"): _Recorded,
    ("numpy._core.multiarray", "_reconstruct"): _Recorded,
    ("numpy.core.numeric", "_frombuffer"): _Recorded,  # of protocol 5
    ("numpy._core.numeric", "_frombuffer"): _Recorded,
    ("numpy", "ndarray"): _Recorded,
    ("numpy", "dtype"): _Recorded,
    ("_codecs", "encode"): codecs.encode,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads plain values and `_Recorded` arrays, and imports nothing: a pickle may else call any function."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PICKLE_GLOBALS:
            raise pickle.UnpicklingError(f"forbidden global {module}.{name}, which could run code")
        return _PICKLE_GLOBALS[module, name]


def _unpickled_images(array: object, where: str) -> Tensor:
    pixels = prod(_CIFAR_SHAPE)
    match array:
        case _Recorded(state=(_, (int(n), width), _Recorded(args=("u1" | b"u1", *_)), fortran, bytes(content))) if (
            width == pixels and n > 0 and len(content) == n * pixels
        ):
            return _images_of(content, n, "F" if fortran else "C")
        case _Recorded(  # of protocol 5
            args=(
                (bytes() | bytearray()) as content,
                _Recorded(args=("u1" | b"u1", *_)),
                (int(n), width),
                "C" | "F" as order,
            ),
            state=None,
        ) if width == pixels and n > 0 and len(content) == n * pixels:
            return _images_of(bytes(content), n, order)
    found = (
        f"an array of {repr(array.state or array.args)[:60]}" if isinstance(array, _Recorded) else type(array).__name__
    )
    raise ValueError(f"{where}: found {found}, expected an array, uint8 [n, {pixels}], n at least 1")


def _images_of(content: bytes, n: int, order: Literal["C", "F"]) -> Tensor:
    x = np.frombuffer(content, np.uint8).reshape((n, prod(_CIFAR_SHAPE)), order=order)
    return torch.from_numpy(np.array(x, order="C")).view(-1, *_CIFAR_SHAPE)


# npz


def _load_npz(path: Path, name: str) -> ImageDataset:
    arrays = _read_npz(path)
    classes = 1 + max(int(arrays[y].max(initial=0)) for y in ("y_train", "y_test"))
    tensors = {}
    for x_key, y_key in (("x_train", "y_train"), ("x_test", "y_test")):
        x_name, y_name = f"{path}: {x_key}", f"{path}: {y_key}"
        x = _channels_first(_as_uint8(arrays[x_key], x_name), x_name)
        tensors[x_key] = torch.from_numpy(np.ascontiguousarray(x))
        tensors[y_key] = torch.from_numpy(arrays[y_key].astype(np.int64))
        _check_split((tensors[x_key], tensors[y_key]), classes, x_name, y_name)
    return ImageDataset(name, **tensors, classes=classes)


def _read_npz(path: Path) -> dict[str, _Array]:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: found no whole zip archive, expected an npz with {', '.join(_NPZ_KEYS)}")
    with _blaming(path, "an npz of plain arrays"), np.load(path, allow_pickle=False) as archive:
        keys = archive.files
        arrays = {key: archive[key] for key in _NPZ_KEYS if key in keys}
    if len(arrays) < len(_NPZ_KEYS):
        raise ValueError(f"{path}: found {', '.join(keys) or 'nothing'}, expected {', '.join(_NPZ_KEYS)}")
    for key, array in arrays.items():
        if not isinstance(array, np.ndarray):  # numpy gives the bytes of a member that is no .npy file
            raise ValueError(f"{path}: {key}: found {len(array)} bytes, expected an array as numpy saves it")
    for key in ("y_train", "y_test"):
        if not np.issubdtype(arrays[key].dtype, np.integer):
            raise ValueError(f"{path}: {key}: found {arrays[key].dtype}, expected integer labels")
    return arrays


def _channels_first(x: _Array, where: str) -> _Array:
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


def _as_uint8(x: _Array, where: str) -> _Array:
    if x.dtype == np.uint8 or x.size == 0:  # an empty array is refused later, for being empty
        return x.astype(np.uint8, copy=False)
    if x.dtype not in (np.float32, np.float64):
        raise ValueError(f"{where}: found {x.dtype}, expected uint8, or float32 or float64 in [0, 1]")
    if not np.isfinite(x).all():
        found = f"{np.isnan(x).sum()} NaN and {np.isinf(x).sum()} infinite of {x.size} values"
        raise ValueError(f"{where}: found {found}, expected [0, 1]: look for a division by 0 in what made them")
    least, greatest = x.min(), x.max()
    room = rounding_of_pixels(torch.float32, 0.0, 1.0)
    if not (least >= -room and greatest <= 1 + room):
        found = f"floats from {least:.6g} to {greatest:.6g}"
        raise ValueError(
            f"{where}: found {found}, expected [0, 1]; divide bytes by 255, take a mean and a deviation out in the "
            "model and not here, or store uint8"
        )
    scaled = x.clip(0, 1) * 255
    rounded: _Array = np.rint(scaled)
    error = np.abs(scaled - rounded).max()
    if error > 1e-3:
        raise ValueError(
            f"{where}: found floats whose 255-fold is up to {error:.3g} from an integer, "
            "expected at most 0.001; or store uint8"
        )
    return rounded.astype(np.uint8)
