"""Error under common corruptions, on a test set in the published layout of CIFAR-10-C and CIFAR-100-C.

This is a folder with `labels.npy`, integers [5n], and for each corruption a file of its name with uint8 [5n, H, W, C]:
the n test images at severity 1, then at severity 2, up to 5. A folder from `make_corruptions` also has `made.json`,
which records the images and the seed.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bt_fast import faults
from bt_fast.attack.forward import clean_logits, eval_mode
from bt_fast.lab.data import images as as_floats
from bt_fast.lab.data_files import Array, blaming, wrong
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
    """The origin of a folder: the seed, and a digest of each test image with its label, in their order."""

    seed: int
    images: tuple[str, ...]

    @classmethod
    def of(cls, x: Tensor, y: Tensor, seed: int) -> Made:
        """Returns the origin of images uint8 [n, C, H, W] and labels int64 [n]."""
        labelled = zip(x.cpu().contiguous().numpy(), y.tolist(), strict=True)
        digests = (hashlib.sha256(f"{label}".encode() + image.data).hexdigest() for image, label in labelled)
        return cls(seed, tuple(digest[:16] for digest in digests))

    def to_json(self) -> str:
        """Returns one line of JSON."""
        return json.dumps({"seed": self.seed, "images": self.images})

    @classmethod
    def read(cls, path: Path) -> Made | None:
        """Reads the file; None without it; ValueError, which names it, if it holds something else."""
        try:
            content = parse_json(path.read_text(encoding="utf-8"))
            made = cls(content["seed"], tuple(content["images"]))
            if type(made.seed) is not int or any(type(digest) is not str for digest in made.images):
                raise TypeError("expected a seed that is an integer, and images, a list of texts")
        except FileNotFoundError:
            return None
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: does not say what the folder was made of ({error!r}); make it anew") from error
        return made


class CorruptedTestSet:
    """The corrupted test set in a folder: files are checked at once, pixels are read when needed.

    Uses the first `first` test images of each severity, or all. Files of other corruptions are not read.

    Attributes:
        labels: int64 [n], the same at each severity.
        image_shape: (C, H, W).
        made: the folder's origin, or None.

    Raises:
        ValueError: a file is missing, invalid, or holds too few images; the message names it.
    """

    def __init__(self, folder: Path, first: int | None = None) -> None:
        names = ["labels", *CORRUPTIONS]
        missing = [f"{name}.npy" for name in names if not (folder / f"{name}.npy").is_file()]
        if missing:
            raise ValueError(f"{folder}: found no {', '.join(missing)}; expected the files of CIFAR-10-C or alike")
        self._folder = folder
        self._all_labels = _read_labels(folder / "labels.npy")
        self._arrays = {name: _open_images(folder / f"{name}.npy", len(self._all_labels)) for name in CORRUPTIONS}
        shape = self._arrays[CORRUPTIONS[0]].shape[1:]
        for name, array in self._arrays.items():
            if array.shape[1:] != shape:
                images = f"images of {list(array.shape[1:])}"
                raise wrong(folder / f"{name}.npy", images, f"{list(shape)} as in {CORRUPTIONS[0]}.npy")
        height, width, channels = shape
        self.image_shape = (channels, height, width)
        self._per_severity = len(self._all_labels) // len(SEVERITIES)
        if first is not None and not 1 <= first <= self._per_severity:
            raise ValueError(
                f"{folder}: has {self._per_severity} images at each severity, --test-size asks for {first}; ask for "
                "fewer, or make them in another --corruptions-dir"
            )
        self._taken = self._per_severity if first is None else first
        self.labels = self._all_labels[: self._taken]
        self.made = Made.read(folder / MADE)

    def __str__(self) -> str:
        """Describes the number of images and their origin."""
        is_whole = self._taken == self._per_severity
        number = f"{self._taken}" if is_whole else f"the first {self._taken} of {self._per_severity}"
        made = "" if self.made is None else f", made of the test set with seed {self.made.seed}"
        return f"{number} images at each severity{made}"

    def severity(self, name: str, severity: int) -> tuple[Tensor, Tensor]:
        """Returns images uint8 [n, C, H, W] and labels int64 [n] of one corruption at one severity, 1 to 5."""
        begin = (severity - 1) * self._per_severity
        part = slice(begin, begin + self._taken)
        images = np.array(np.moveaxis(self._arrays[name][part], 3, 1), order="C")  # a copy: the file is read-only
        return torch.from_numpy(images), self._all_labels[part]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Returns the SHA-256 of all images and labels in use; reads all of them."""
        digest = hashlib.sha256()
        for name in CORRUPTIONS:
            for severity in SEVERITIES:
                for part in self.severity(name, severity):
                    digest.update(f"{list(part.shape)}".encode())
                    digest.update(part.contiguous().numpy().data)
        return digest.hexdigest()

    def check_made_of(self, x: Tensor, y: Tensor, seed: int | None) -> None:
        """Raises ValueError if the folder was made of other test images, or not with `seed` if that is given."""
        if seed is not None and (self.made is None or self.made.seed != seed):
            origin = "was not made here" if self.made is None else f"was made with seed {self.made.seed}"
            raise ValueError(f"--seed {seed}: {self._folder} {origin}; leave --seed away, or another --corruptions-dir")
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
    """Yields for each corruption its name and the error rates at the five severities, in [0, 1].

    The model, on the device, maps images [m, C, H, W] in [0, 1] to logits [m, K]; it runs in eval mode. TypeError or
    ValueError if its logits are invalid or hold NaN, or a label is outside 0..K-1.
    """
    for name in CORRUPTIONS:
        yield name, [_error(model, *test_set.severity(name, severity), device) for severity in SEVERITIES]


def mean_corruption_error(errors: dict[str, list[float]]) -> float:
    """Returns the mean over corruptions and severities, as for CIFAR-10-C: not relative to another network."""
    return float(np.mean(list(errors.values())))


def _error(model: nn.Module, x: Tensor, y: Tensor, device: torch.device) -> float:
    errors = torch.zeros((), dtype=torch.int64, device=device)
    with eval_mode(model):
        for images, labels in zip(x.split(EVALUATION_BATCH), y.to(device).split(EVALUATION_BATCH), strict=True):
            logits = clean_logits(model, as_floats(images, device))
            outside = faults.labels_outside(labels, logits.shape[1], "the labels")
            faults.read([outside, faults.rows_without_number(logits, "the model's logits")]).wait()
            errors += (logits.argmax(dim=1) != labels).sum()
    return int(errors) / len(y)


def _read_labels(path: Path) -> Tensor:
    labels = _open_array(path)
    is_list = labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer)
    if not is_list or not len(labels) or len(labels) % len(SEVERITIES):
        raise wrong(path, _kind(labels), "integers [5n], the labels of n images for each severity")
    return torch.from_numpy(labels.astype(np.int64))


def _open_images(path: Path, n: int) -> Array:
    images = _open_array(path)
    fits = images.ndim == 4 and len(images) == n and images.shape[3] in (1, 3) and 0 not in images.shape
    if images.dtype != np.uint8 or not fits:
        raise wrong(path, _kind(images), f"uint8 [{n}, H, W, C], one image a label and C 1 or 3")
    return images


def _open_array(path: Path) -> Array:
    """Returns a memory-mapped array of plain numbers."""
    with blaming(path, "a plain .npy array"):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise wrong(path, type(array).__name__, "a plain .npy array")
    return array


def _kind(array: Array) -> str:
    return f"{array.dtype} {list(array.shape)}"
