"""Error under common corruptions, on a test set in the layout in which CIFAR-10-C and CIFAR-100-C are published.

That is a folder with `labels.npy`, integers [5n], and for each corruption an uint8 array [5n, H, W, C] in a file of its
name: the n test images at severity 1, then at severity 2, up to 5. A folder that was made here has `made.json` too,
which says of which images it was, and with which seed.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bt_fast import faults
from bt_fast.attack.forward import clean_logits, eval_mode
from bt_fast.lab.data import images as as_floats
from bt_fast.lab.files import parse_json

CORRUPTIONS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
SEVERITIES = (1, 2, 3, 4, 5)
EVALUATION_BATCH = 1000


MADE = "made.json"


@dataclass(frozen=True)
class Made:
    """What a folder was made of: the seed, and the digest of each test image with its label, in their order."""

    seed: int
    images: tuple[str, ...]

    @classmethod
    def of(cls, x: Tensor, y: Tensor, seed: int) -> Made:
        """Of images uint8 [n, C, H, W] and labels int64 [n]."""
        labelled = zip(x.cpu().contiguous().numpy(), y.tolist(), strict=True)
        return cls(
            seed, tuple(hashlib.sha256(f"{label}".encode() + image.data).hexdigest()[:16] for image, label in labelled)
        )

    def to_json(self) -> str:
        """One line."""
        return json.dumps({"seed": self.seed, "images": self.images})

    @classmethod
    def read(cls, path: Path) -> Made | None:
        """What the file says; None without it. Raises ValueError, which names it, where it says something else."""
        try:
            content = parse_json(path.read_text(encoding="utf-8"))
            found = cls(content["seed"], tuple(content["images"]))
            if type(found.seed) is not int or any(type(digest) is not str for digest in found.images):
                raise TypeError("expected a seed that is an integer, and images, a list of texts")
        except FileNotFoundError:
            return None
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: does not say what the folder was made of ({error!r}); make it anew") from error
        return found


class CorruptedTestSet:
    """The files of a folder, all of them checked when it is made; pixels are read when they are asked for.

    Args:
        folder: in the published layout. Files of other corruptions may lie there too and are not read.
        first: how many test images of each severity to take; None for all.

    Attributes:
        labels: [n] int64, the same at each severity.
        image_shape: (C, H, W).
        there: how many there are.
        made: what it was made of, where it was made here.

    Raises:
        ValueError: a file is missing or not what it should be, or holds fewer images than are to be taken; the message
            names it, what was found and what was expected. No pickle is read.
    """

    def __init__(self, folder: Path, first: int | None = None) -> None:
        names = ["labels", *CORRUPTIONS]
        missing = [f"{name}.npy" for name in names if not (folder / f"{name}.npy").is_file()]
        if missing:
            raise ValueError(f"{folder}: found no {', '.join(missing)}; expected the files of CIFAR-10-C or alike")
        self._folder = folder
        self._all_labels = _read_labels(folder / "labels.npy")
        self._arrays = {name: _open_images(folder / f"{name}.npy", len(self._all_labels)) for name in CORRUPTIONS}
        shapes = {name: array.shape[1:] for name, array in self._arrays.items()}
        others = CORRUPTIONS[1:]
        for name in others:
            if shapes[name] != shapes[CORRUPTIONS[0]]:
                path, found, like = folder / f"{name}.npy", list(shapes[name]), list(shapes[CORRUPTIONS[0]])
                raise ValueError(f"{path}: found images of {found}, expected {like} as in {CORRUPTIONS[0]}.npy")
        height, width, channels = shapes[CORRUPTIONS[0]]
        self.image_shape = (channels, height, width)
        self.there = len(self._all_labels) // len(SEVERITIES)
        if first is not None and not 1 <= first <= self.there:
            raise ValueError(
                f"{folder}: has {self.there} images at each severity, --test-size asks for {first}; ask for fewer, or "
                "make them in another --corruptions-dir"
            )
        self._taken = self.there if first is None else first
        self.labels = self._all_labels[: self._taken]
        self.made = Made.read(folder / MADE)

    def __str__(self) -> str:
        """How many images, and where they are from."""
        number = f"{self._taken}" if self._taken == self.there else f"the first {self._taken} of {self.there}"
        made = "" if self.made is None else f", made of the test set with seed {self.made.seed}"
        return f"{number} images at each severity{made}"

    def severity(self, name: str, severity: int) -> tuple[Tensor, Tensor]:
        """The images uint8 [n, C, H, W] and labels int64 [n] of one corruption at one severity, 1 to 5."""
        begin = (severity - 1) * self.there
        part = slice(begin, begin + self._taken)
        images = np.array(np.moveaxis(self._arrays[name][part], 3, 1), order="C")  # a copy: the file is read-only
        return torch.from_numpy(images), self._all_labels[part]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all images and labels that are taken; reads all of them."""
        digest = hashlib.sha256()
        for name in CORRUPTIONS:
            for severity in SEVERITIES:
                for part in self.severity(name, severity):
                    digest.update(f"{list(part.shape)}".encode())
                    digest.update(part.contiguous().numpy().data)
        return digest.hexdigest()

    def check_made_of(self, x: Tensor, y: Tensor, seed: int | None) -> None:
        """Raise ValueError if it was made, and not of these test images, or not with this seed where one is given."""
        if seed is not None and (self.made is None or self.made.seed != seed):
            whence = "was not made here" if self.made is None else f"was made with seed {self.made.seed}"
            raise ValueError(f"--seed {seed}: {self._folder} {whence}; leave --seed away, or another --corruptions-dir")
        if self.made is None:
            return
        expected = Made.of(x, y, 0).images
        if self.made.images[: len(expected)] != expected:
            raise ValueError(
                f"{self._folder}: made of {len(self.made.images)} other test images than the {len(expected)} that are "
                "evaluated; name another --corruptions-dir, or their number with --test-size"
            )


def corruption_errors(
    model: nn.Module, test_set: CorruptedTestSet, device: torch.device
) -> Iterator[tuple[str, list[float]]]:
    """For each corruption in turn its name and the errors at the five severities, shares in [0, 1] of the images.

    The model runs in eval mode and keeps its modes.

    Args:
        model: maps [m, C, H, W] in [0, 1] to logits [m, K], on the device.
        test_set: of images that fit the model.

    Raises:
        TypeError or ValueError: the model does not return such logits, they hold NaN, or a label is outside 0..K-1.
    """
    for name in CORRUPTIONS:
        yield name, [_error(model, *test_set.severity(name, severity), device) for severity in SEVERITIES]


def mean_corruption_error(errors: dict[str, list[float]]) -> float:
    """The mean over corruptions and severities, as it is reported for CIFAR-10-C: not relative to another network."""
    return float(np.mean(list(errors.values())))


def _error(model: nn.Module, x: Tensor, y: Tensor, device: torch.device) -> float:
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    with eval_mode(model):
        for images, labels in zip(x.split(EVALUATION_BATCH), y.to(device).split(EVALUATION_BATCH), strict=True):
            logits = clean_logits(model, as_floats(images, device))
            found = [
                faults.labels_outside(labels, logits.shape[1], "the labels"),
                faults.rows_without_number(logits, "the model's logits"),
            ]
            faults.read(found).wait()
            wrong += (logits.argmax(dim=1) != labels).sum()
    return int(wrong) / len(y)


def _read_labels(path: Path) -> Tensor:
    labels = _open_array(path)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or not _has_five_parts(labels):
        found = f"{labels.dtype} {list(labels.shape)}"
        raise ValueError(f"{path}: found {found}, expected integers [5n], the labels of n images for each severity")
    return torch.from_numpy(labels.astype(np.int64))


def _has_five_parts(labels: npt.NDArray[Any]) -> bool:
    return len(labels) > 0 and len(labels) % len(SEVERITIES) == 0


def _open_images(path: Path, n: int) -> npt.NDArray[Any]:
    images = _open_array(path)
    fits = images.ndim == 4 and len(images) == n and images.shape[3] in (1, 3) and 0 not in images.shape
    if images.dtype != np.uint8 or not fits:
        found = f"{images.dtype} {list(images.shape)}"
        raise ValueError(f"{path}: found {found}, expected uint8 [{n}, H, W, C], one image a label and C 1 or 3")
    return images


def _open_array(path: Path) -> npt.NDArray[Any]:
    """A memory-mapped array of plain numbers."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # corrupt bytes raise a dozen unrelated types
        raise ValueError(f"{path}: found {type(error).__name__}: {error}; expected a plain .npy array") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path}: found {type(array).__name__}, expected a plain .npy array")
    return array
