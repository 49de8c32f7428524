"""Data and network are checked against each other and the machine before anything is written."""

import dataclasses

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from bt_fast.lab import fitting
from bt_fast.lab.checkpoint import load_checkpoint
from bt_fast.lab.cli import cli
from bt_fast.lab.config import PRESETS
from bt_fast.lab.data import ImageDataset
from bt_fast.lab.fitting import check_training
from bt_fast.lab.models import Size, build_model, classes_in, size_of
from bt_fast.lab.world import World

CPU = torch.device("cpu")
SMALL = ["--epochs=1", "--batch-size=16", "--curve-size=8", "--eval-steps=1", "--steps=2"]


def bt_fast(*arguments):
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def one_line(result):
    assert result.exit_code == 2, (result.output, result.exception)
    line = result.stderr.strip()
    assert "\n" not in line
    assert line.startswith("bt-fast: ")
    return line


def write(path, y, shape=(16, 16), train=48):
    x = np.random.default_rng(0).integers(0, 256, (len(y), *shape)).astype(np.uint8)
    np.savez(path, x_train=x[:train], y_train=y[:train], x_test=x[train:], y_test=y[train:])
    return path


def blobs(shape, classes=10, n=60):
    x, y = torch.zeros(n, *shape, dtype=torch.uint8), torch.arange(n) % 10 % classes
    y[0] = classes - 1
    return ImageDataset("blobs", x, y, x, y, classes)


# Needs of a network


@pytest.mark.parametrize("name", ["small-cnn", "preactresnet-18", "wrn-10-1", "wrn-16-2"])
@pytest.mark.parametrize("shape", [(1, 16, 19), (3, 33, 20)])
def test_the_size_of_a_network_is_that_of_the_one_that_is_built(name, shape):
    width = 5 if name == "small-cnn" else None
    sizes = {"in_channels": shape[0], "image_size": shape[1:], "num_classes": 7, "width": width}
    model, returned, positions = build_model(name, **sizes).eval(), [], [2]
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda _m, _i, out: returned.append(out.numel()))
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda _m, _i, out: positions.append(out[0, 0].numel()))
    model(torch.rand(1, *shape))
    weights = sum(p.numel() for p in model.parameters())
    assert size_of(name, **sizes) == Size(weights, sum(returned), min(positions[1:] or positions))


def test_a_checkpoint_knows_its_classes_however_deep_its_weights_lie():
    for name in ("small-cnn", "preactresnet-18", "wrn-10-1"):
        weights = build_model(name, in_channels=1, image_size=16, num_classes=7).state_dict()
        assert classes_in(name, weights) == 7
        assert classes_in(name, {"epoch": 3, "net": {f"module._orig_mod.{k}": v for k, v in weights.items()}}) == 7
        assert classes_in(name, {"weight": torch.ones(3, 2)}) is None
        assert classes_in(name, [weights]) is None


# Refused training


@pytest.mark.parametrize(
    ("dataset", "options", "said"),
    [
        (blobs((1, 16, 16), 1), {}, "all labels are 0, one class: training needs at least two; give other --data"),
        (blobs((1, 8, 28)), {}, "images of 1x8x28 in 10 classes: small-cnn takes images of at least 16x16; take"),
        (
            blobs((1, 28, 28), 9 * 10**9 + 1),
            {},
            r"at least 66.9 TB, cpu has .* number the labels 0..10: there are",
        ),
        (blobs((1, 28, 28), 2**62), {}, r"need at least 3.43e\+04 EB, cpu has"),
        (blobs((1, 28, 28)), {"width": 10**20}, "EB, cpu has .*: take a smaller --model, --width or --batch-size$"),
        (blobs((3, 32, 32)), {"model": "wrn-600000004-10", "width": None}, "PB, cpu has"),
        (blobs((1, 3000, 3000), n=1), {}, r"need at least \d+ GB, cpu has 8 GB"),
        (blobs((3, 4, 4), n=51), {"model": "wrn-10-1", "width": None}, "has 1 image .* another --batch-size than 50"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_with_its_size(dataset, options, said, monkeypatch):
    monkeypatch.setattr(fitting, "memory", lambda _: 8e9)
    with pytest.raises(ValueError, match=said):
        check_training(dataclasses.replace(PRESETS["digits"], **options), dataset, CPU)


def test_what_just_fits_is_not_refused(monkeypatch):
    config, dataset = PRESETS["digits"], blobs((1, 28, 28))
    size = size_of("small-cnn", in_channels=1, image_size=(28, 28), num_classes=10, width=16)
    needed = 4 * (9 * size.weights + 50 * size.activations)  # four models and momenta, a gradient
    monkeypatch.setattr(fitting, "memory", lambda _: needed)
    check_training(config, dataset, CPU)
    monkeypatch.setattr(fitting, "memory", lambda _: needed - 1)
    with pytest.raises(ValueError, match="cpu has"):
        check_training(config, dataset, CPU)
    check_training(config, dataset, CPU, World(0, 2, object()))  # each has half a minibatch
    check_training(dataclasses.replace(config, sgd_momentum=0.0), dataset, CPU)


def test_a_machine_has_some_memory_and_a_container_less():
    there = fitting.memory(CPU)
    assert 1e8 < there < 1e15


def test_a_containers_limit_is_its_memory(monkeypatch):
    files = {"/proc/meminfo": "SwapTotal:        1000 kB\n", "/sys/fs/cgroup/memory.max": "123456\n"}
    monkeypatch.setattr(fitting, "_text", lambda path: files[path])
    assert fitting.memory(CPU) == 123456
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    with_swap = fitting.memory(CPU)
    files["/proc/meminfo"] = ""
    assert with_swap == fitting.memory(CPU) + 1_024_000


@pytest.mark.parametrize("command", ["train", "compare", "profile", "study"])
@pytest.mark.parametrize(
    ("labels", "said"),
    [(np.arange(64) % 4 * 10**9, "need at least"), (np.zeros(64, int), "one class")],
    ids=["labels that are no numbers of classes", "one class"],
)
def test_a_command_refuses_such_data_before_it_writes_anything(command, labels, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "data.npz", labels)
    name = ["fig7"] if command == "study" else []
    for options in ([], ["--out", "out"]):
        assert said in one_line(bt_fast(command, *name, "--data", path, *options, *SMALL))
        assert list(tmp_path.iterdir()) == [path]


# Images that are not square, test sets without a class


@pytest.mark.parametrize("model", ["small-cnn", "wrn-10-1"])
def test_images_that_are_not_square_train_and_are_evaluated(model, tmp_path):
    path = write(tmp_path / "data.npz", np.arange(64) % 3, (20, 28))
    result = bt_fast("train", "--data", path, "--out", tmp_path / "run", "--model", model, "--augment", *SMALL)
    assert result.exit_code == 0, result.output
    result = bt_fast("evaluate", tmp_path / "run" / "checkpoint.pt", "--steps", 1)
    assert result.exit_code == 0, result.output


def test_augmix_takes_images_that_are_not_square(tmp_path):
    path = write(tmp_path / "data.npz", np.arange(64) % 3, (20, 28))
    result = bt_fast("train", "--loss", "augmix", "--data", path, "--out", tmp_path / "run", *SMALL)
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    """A run on ten classes, and its network in the form of a published file."""
    place = tmp_path_factory.mktemp("ten")
    path = write(place / "ten.npz", np.arange(64) % 10)
    result = bt_fast("train", "--data", path, "--out", place / "run", *SMALL, "--width", 32)
    assert result.exit_code == 0, result.output
    weights = load_checkpoint(place / "run" / "checkpoint.pt")[1]["contestants"]["bullet"]["model"]
    torch.save({"state_dict": {f"module.{key}": value for key, value in weights.items()}}, place / "published.pt")
    return place


@pytest.mark.parametrize("which", ["own", "published"])
def test_data_without_the_last_class_are_evaluated_on_a_network_that_knows_it(ten, which, tmp_path):
    nine = write(tmp_path / "nine.npz", np.arange(64) % 9)
    eleven = write(tmp_path / "eleven.npz", np.arange(64) % 11)
    network = [ten / "run" / "checkpoint.pt"] if which == "own" else [ten / "published.pt", "--model", "small-cnn"]
    result = bt_fast("evaluate", *network, "--data", nine, "--steps", 1)
    assert result.exit_code == 0, result.output
    line = one_line(bt_fast("evaluate", *network, "--data", eleven, "--steps", 1))
    assert "eleven: labels up to 10, but the network of" in line
    assert "tells 10 classes apart; evaluate it on data with labels in 0..9" in line


def test_an_option_that_a_published_checkpoint_has_no_use_for_is_refused(ten):
    line = one_line(bt_fast("evaluate", ten / "published.pt", "--model", "small-cnn", "--method", "bullet"))
    assert "--method bullet: a checkpoint that is read with --model holds one network; leave it away" in line


def test_data_that_are_others_now_are_not_evaluated_as_those_of_the_run(ten, tmp_path):
    path = ten / "ten.npz"
    before = path.read_bytes()
    try:
        write(path, np.arange(64) % 5)
        line = one_line(bt_fast("evaluate", ten / "run" / "checkpoint.pt", "--steps", 1))
        assert "of a run on other data than ten: " in line
        assert line.endswith("say with --data where its own are now")
        result = bt_fast("evaluate", ten / "run" / "checkpoint.pt", "--steps", 1, "--data", path)
        assert result.exit_code == 0, result.output
    finally:
        path.write_bytes(before)
