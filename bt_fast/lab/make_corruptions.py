"""Makes the fifteen corruptions of a test set at five severities with the imagecorruptions library, as published.

The library has the severities of ImageNet-C, which are harder on small images than those of CIFAR-10-C: errors on its
images compare models with each other, not with published figures.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from bt_fast.lab.corruptions import CORRUPTIONS, MADE, SEVERITIES, Made
from bt_fast.lab.files import write_text
from bt_fast.lab.locks import alone

LIBRARY = "imagecorruptions-imaug"  # the maintained fork: the original does not run with today's scikit-image
LEAST_SIZE = 32  # pixels a side that the library needs
WITH_SEED = ("impulse_noise", "glass_blur")  # these take a seed, the others draw from numpy's global generator

_Image = npt.NDArray[np.uint8]


def make_corruptions(
    x: Tensor,
    y: Tensor,
    folder: Path,
    *,
    seed: int = 0,
    done: Callable[[str], object] = lambda _: None,
    waiting: Callable[[str], object] = lambda _: None,
) -> None:
    """Writes `labels.npy`, a file for each corruption and `made.json`; the folder appears when all are complete.

    An image's corruption depends only on its pixels, its place and the seed; numpy's global random state does not
    change. Images of fewer than 32 pixels a side are padded with their edge for the library, and cropped again. A grey
    image takes the first channel of the result.

    Args:
        x: uint8 [n, C, H, W], C 1 or 3, n ≥ 1. y: int64 [n].
        folder: new or empty. If another process is making it from the same images, its result is awaited and used.
        done: called with each corruption's name when it is written.
        waiting: called once with a description of the other process.

    Raises:
        ValueError: the library is not installed, the folder holds files, or the images do not fit.
    """
    corrupt = _library()
    if x.dim() != 4 or x.shape[1] not in (1, 3) or len(x) == 0 or len(x) != len(y):
        raise ValueError(
            f"x must be [n, C, H, W] with C 1 or 3 and one label an image, got {list(x.shape)}, {len(y)}: "
            "give grey or coloured images, and as many labels"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone(folder.with_name(f".{folder.name}.lock"), waiting):
        made = Made.of(x, y, seed)
        if folder.exists() and any(folder.iterdir()):
            if Made.read(folder / MADE) == made:
                return
            raise ValueError(f"{folder}: found files, expected a new or empty folder; name another --corruptions-dir")
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        images: _Image = np.ascontiguousarray(np.moveaxis(x.cpu().numpy(), 1, 3))
        for name in CORRUPTIONS:
            np.save(part / f"{name}.npy", _all_severities(corrupt, images, name, seed))
            done(name)
        np.save(part / "labels.npy", np.tile(y.cpu().numpy(), len(SEVERITIES)))
        write_text(part / MADE, made.to_json())
        part.replace(folder)


def _all_severities(corrupt: Callable[..., Any], images: _Image, name: str, seed: int) -> _Image:
    """Returns [5n, H, W, C]."""
    state = np.random.get_state()
    try:
        corrupted = [
            _corrupted(corrupt, image, name, severity, (seed, CORRUPTIONS.index(name), severity, place))
            for severity in SEVERITIES
            for place, image in enumerate(images)
        ]
    finally:
        np.random.set_state(state)
    return np.stack(corrupted)


def _corrupted(
    corrupt: Callable[..., Any], image: _Image, name: str, severity: int, key: tuple[int, int, int, int]
) -> _Image:
    """Corrupts one image [H, W, C], with random numbers determined by the key."""
    height, width, channels = image.shape
    drawn = int(np.random.SeedSequence(key).generate_state(1)[0])
    np.random.seed(drawn)  # the library's own generator
    missing = [max(0, LEAST_SIZE - size) for size in (height, width)]
    top, left = (n // 2 for n in missing)
    padded = np.pad(image, ((top, missing[0] - top), (left, missing[1] - left), (0, 0)), mode="edge")
    options = {"seed": drawn} if name in WITH_SEED else {}
    made: _Image = corrupt(padded, corruption_name=name, severity=severity, **options)
    return made[top : top + height, left : left + width, :channels]


def _library() -> Callable[..., Any]:
    try:
        version(LIBRARY)
        from imagecorruptions import corrupt
    except (PackageNotFoundError, ImportError) as error:
        raise ValueError(
            f"making corruptions needs {LIBRARY} ({error}): install it with pip install 'bt-fast[corruptions]', or "
            "give a folder in the layout of CIFAR-10-C"
        ) from error
    return corrupt  # type: ignore[no-any-return]
