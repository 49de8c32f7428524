"""Image data sets in memory: MNIST, CIFAR-10 and -100, a custom npz, and a part of MNIST in the package.

Nothing is downloaded, no code in a file is run, and the error for a damaged or foreign file names it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bt_fast.lab.data_files import FORMATS, OR_NPZ, Format, check_split, locate, read_npz, wrong


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Labelled images for training and testing, checked when the object is made.

    Images are uint8 [n, C, H, W] with the same C, H, W in both halves (`images` turns them into floats), labels int64
    [n] in 0..classes-1. Otherwise a ValueError names the array.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int

    def __post_init__(self) -> None:
        for half, x, y in (("train", self.x_train, self.y_train), ("test", self.x_test, self.y_test)):
            check_split((x, y), self.classes, f"{self.name}: x_{half}", f"{self.name}: y_{half}")
        train, test = list(self.x_train.shape[1:]), list(self.x_test.shape[1:])
        if train != test:
            raise wrong(f"{self.name}: x_test", f"images of {test}", f"{train} as in x_train")

    def take(self, train: int | None = None, test: int | None = None) -> ImageDataset:
        """A view of the first `train` training and `test` test images (None: all); ValueError if there are fewer."""
        for key, count, y in (("train", train, self.y_train), ("test", test, self.y_test)):
            if count is not None and not 1 <= count <= len(y):
                raise ValueError(f"{self.name}: {key}={count}, expected 1 to the {len(y)} images there are")
        return dataclasses.replace(
            self,
            x_train=self.x_train[:train],
            y_train=self.y_train[:train],
            x_test=self.x_test[:test],
            y_test=self.y_test[:test],
        )


def images(batch: Tensor, device: torch.device | str) -> Tensor:
    """Converts uint8 [n, C, H, W] to float32 in [0, 1] on `device`; ValueError for another dtype."""
    if batch.dtype != torch.uint8:
        raise wrong("batch", str(batch.dtype), "torch.uint8: give bytes, as load_dataset does")
    return batch.to(device).float() / 255  # moves uint8, a quarter of the bytes


def minibatches(n: int, batch_size: int, *, seed: int, epoch: int) -> Iterator[Tensor]:
    """Yields one epoch's minibatches: a permutation of 0..n-1, cut into int64 index tensors [batch_size] on the CPU.

    The permutation depends only on n, seed and epoch; the last minibatch holds the rest. Raises ValueError unless n and
    batch_size are at least 1, seed and epoch at least 0.
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
    """Loads a data set from files already on this machine.

    Args:
        source: one of
            "digits": 5,000 training and 1,000 test images of MNIST in the package (see MNIST_ATTRIBUTION.md).
            "mnist": MNIST's four IDX files, plain or .gz, in data_dir, data_dir/MNIST/raw or data_dir/mnist.
            "cifar10", "cifar100": the binary or python version in data_dir or its usual folder below it.
            a path: to an .npz file, or to a directory with the files of MNIST, CIFAR-10 or CIFAR-100 as above.

    An .npz file has x_train, y_train, x_test and y_test. Images are [n, H, W], [n, H, W, C] or [n, C, H, W] with C = 1
    or 3, as uint8, or as float32 or float64 in [0, 1] that are multiples of 1/255. Labels are integers [n]; the number
    of classes is the greatest label plus one.

    Raises:
        ValueError: a file is damaged or missing; the message names it.
    """
    if source == "digits":
        return _npz_dataset(Path(__file__).with_name("mnist_subset.npz"), source)
    if source in FORMATS:
        kind = FORMATS[source]
        return _dataset(kind, locate(kind.places(data_dir)), source)
    path = Path(source)
    if path.is_dir():
        places = {name: kind.places(path) for name, kind in FORMATS.items()}
        present = [name for name in FORMATS if locate(places[name], missing_ok=True)]
        if len(present) > 1:
            titles = " and ".join(FORMATS[name].title for name in present)
            raise wrong(path, f"the files of {titles}", "those of one")
        if not present:
            locate([place for of_format in places.values() for place in of_format], advice=_other_files(path))
        return _dataset(FORMATS[present[0]], locate(places[present[0]]), path.resolve().name)
    if path.suffix == ".npz" and path.is_file():
        return _npz_dataset(path, path.stem)
    raise wrong(
        source,
        "no such data",
        "digits, mnist, cifar10, cifar100, an existing .npz file, "
        "or a directory with the files of MNIST, CIFAR-10 or CIFAR-100",
    )


def _dataset(kind: Format, files: list[Path], name: str) -> ImageDataset:
    train, test = kind.read(files)
    return ImageDataset(name, *train, *test, classes=kind.classes)


def _npz_dataset(path: Path, name: str) -> ImageDataset:
    train, test, classes = read_npz(path)
    return ImageDataset(name, *train, *test, classes=classes)


def _other_files(folder: Path) -> str:
    """Describes what a folder holds instead of a data set, and how to make one of it."""
    below = sorted(folder.iterdir())
    archives = [path.name for path in below if path.suffix == ".npz"]
    if archives:
        return f"\nit holds {', '.join(archives[:3])}: give the file itself, as {folder / archives[0]}"
    classes = [path.name for path in below if path.is_dir()]
    if classes:
        shown = ", ".join(classes[:3]) + (", ..." if len(classes) > 3 else "")
        return f"\nit holds folders ({shown}): images in a folder for each class are not read; {OR_NPZ}"
    return f"\n{OR_NPZ}"
