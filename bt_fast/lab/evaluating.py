"""Loads the networks in a checkpoint, their data, and corrupted test sets, for `bt-fast evaluate` and `corruptions`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from bt_fast.lab.checkpoint import load_checkpoint, read_tensors
from bt_fast.lab.config import RunConfig
from bt_fast.lab.corruptions import CORRUPTIONS, CorruptedTestSet
from bt_fast.lab.data import ImageDataset, load_dataset
from bt_fast.lab.fitting import check_labels
from bt_fast.lab.make_corruptions import make_corruptions
from bt_fast.lab.models import build_model, classes_in, load_published
from bt_fast.lab.provenance import check_data, fingerprint
from bt_fast.lab.session import data_of, preset
from bt_fast.lab.terminal import progress_bar, say


@dataclass(frozen=True)
class Source:
    """The networks of a checkpoint to evaluate, and the data; fields are named like the options."""

    checkpoint: Path
    method: str | None
    model: str | None
    data: str | None
    data_dir: Path
    test_size: int | None


@dataclass(frozen=True)
class Evaluated:
    """Networks by name, their data, the number of test images to use (None: all), and ε."""

    networks: dict[str, nn.Module]
    dataset: ImageDataset
    test_size: int | None
    epsilon: float


def read_networks(source: Source) -> Evaluated:
    """Returns the networks of a run's checkpoint, or, with the name of its model, of a published one.

    Raises:
        ValueError: the file, its networks or the data do not match the source.
    """
    return _published(source, source.model) if source.model is not None else _of_run(source)


def _published(source: Source, model: str) -> Evaluated:
    """Returns a network from a published state_dict."""
    if source.method is not None:
        raise ValueError(
            f"--method {source.method}: a checkpoint that is read with --model holds one network; leave it away"
        )
    name = source.data or "digits"
    dataset = load_dataset(name, source.data_dir).take(None, source.test_size)
    network = _build(model, None, dataset, read_tensors(source.checkpoint), source.checkpoint)
    network = load_published(network, source.checkpoint)
    return Evaluated({model: network}, dataset, source.test_size, preset(name, dataset).epsilon)


def _of_run(source: Source) -> Evaluated:
    path, method = source.checkpoint, source.method
    config, state = load_checkpoint(path)
    stored: dict[str, Any] = state["contestants"]
    if method is not None and method not in stored:
        raise ValueError(f"--method {method}: {path} holds {', '.join(stored)}; name one of them, or none for all")
    dataset = _data_of_run(source, config, state.get("data"))
    networks = {}
    for name in [method] if method else stored:
        weights = stored[name]["model"]
        networks[name] = _build(config.model, config.width, dataset, weights, path)
        try:
            networks[name].load_state_dict(weights)
        except RuntimeError as error:  # other data, with other channels or another size
            raise ValueError(
                f"{path}: its network does not fit the data ({error}); evaluate it on --data with images like its own"
            ) from error
    return Evaluated(networks, dataset, source.test_size or config.test_size, config.epsilon)


def _data_of_run(source: Source, config: RunConfig, sha256: object) -> ImageDataset:
    """Returns the data that the source names, or those of the run, which must still be the same."""
    test_size = source.test_size or config.test_size
    if source.data is not None:
        return load_dataset(source.data, source.data_dir).take(None, test_size)
    whole = data_of(dataclasses.replace(config, train_size=None, test_size=None), source.data_dir)
    if sha256 is not None:
        used = whole.take(config.train_size, config.test_size)
        check_data(used, fingerprint(used), str(sha256), source.checkpoint)
    return whole.take(None, test_size)


def _build(model: str, width: int | None, dataset: ImageDataset, weights: object, path: Path) -> nn.Module:
    """Returns the network for the weights in the contents of `path`: with their classes, not those of the data."""
    classes = classes_in(model, weights)
    if classes is None:
        classes = 2  # loading reports the missing weights
    else:
        check_labels(classes, dataset.y_test, dataset.name, f"the network of {path}")
    _, channels, *size = dataset.x_test.shape
    return build_model(model, in_channels=channels, image_size=(size[0], size[1]), num_classes=classes, width=width)


def corrupted_test_set(
    folder: Path, dataset: ImageDataset, test_size: int | None, seed: int | None = None
) -> CorruptedTestSet:
    """Returns the corrupted test set in the folder, made from the data set's test images if missing.

    Args:
        test_size: the number of images to evaluate; None for all.
        seed: of the corruptions to make, 0 if None; if given, existing ones must have it too.

    Raises:
        ValueError: the folder was made of other images.
    """
    if not folder.exists() or not any(folder.iterdir()):
        with progress_bar("corrupting the test set", len(CORRUPTIONS)) as bar:
            make_corruptions(
                dataset.x_test,
                dataset.y_test,
                folder,
                seed=seed or 0,
                done=bar.advance,
                waiting=lambda who: say(f"{folder}: waiting for {who}, which makes it"),
            )
    test_set = CorruptedTestSet(folder, test_size)
    shape, expected = list(test_set.image_shape), list(dataset.x_test.shape[1:])
    if shape != expected:
        hint = "name another --corruptions-dir"
        raise ValueError(f"{folder}: found images of {shape}, expected {expected} as in {dataset.name}; {hint}")
    test_set.check_made_of(dataset.x_test, dataset.y_test, seed)
    say(f"{folder}: {test_set}")
    return test_set
