import os
import re
import socket
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from bt_fast.lab import make_corruptions as module
from bt_fast.lab.cli import cli
from bt_fast.lab.corruptions import CORRUPTIONS, CorruptedTestSet
from bt_fast.lab.make_corruptions import WITH_SEED, make_corruptions
from bt_fast.lab.models import build_model


def pictures(n=3, shape=(3, 32, 32)):
    g = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, *shape), generator=g, dtype=torch.uint8), torch.arange(n) % 10


@pytest.fixture
def calls(monkeypatch):
    """A library that adds a number from numpy's global generator, severity and channel, and records its calls."""
    result = []

    def corrupt(image, severity, corruption_name, seed=None):
        result.append((image, severity, corruption_name, seed))
        three = np.broadcast_to(image, (*image.shape[:2], 3))
        return three ^ (np.random.randint(128) + severity * np.arange(3)).astype(np.uint8)

    monkeypatch.setitem(sys.modules, "imagecorruptions", SimpleNamespace(corrupt=corrupt))
    monkeypatch.setattr(module, "version", lambda _: "1.1.5")
    return result


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_folder_is_one_that_is_read_and_holds_every_image_at_every_severity(calls, tmp_path):
    x, y = pictures()
    done = []
    make_corruptions(x, y, tmp_path / "c", done=done.append)
    assert done == list(CORRUPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    test_set = CorruptedTestSet(tmp_path / "c")
    for severity in (1, 5):
        images, labels = test_set.severity("snow", severity)
        assert images.shape == x.shape
        assert torch.equal(labels, y)
    assert [(s, name) for _, s, name, _ in calls] == [(s, n) for n in CORRUPTIONS for s in range(1, 6) for _ in x]
    assert all(np.array_equal(call[0], x[k % 3].permute(1, 2, 0).numpy()) for k, call in enumerate(calls))


def test_the_seed_determines_the_files_and_numpys_own_state_stays(calls, tmp_path):
    x, y = pictures()
    state = np.random.get_state()[1].tolist()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_corruptions(x, y, tmp_path / name, seed=seed)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a")["fog.npy"] != files(tmp_path / "c")["fog.npy"]
    assert np.random.get_state()[1].tolist() == state
    seeds = {name: seed for _, _, name, seed in calls}
    assert {name for name, seed in seeds.items() if seed is not None} == set(WITH_SEED)


def test_an_images_corruption_does_not_depend_on_how_many_there_are(calls, tmp_path):
    x, y = pictures(4)
    make_corruptions(x, y, tmp_path / "four")
    make_corruptions(x[:2], y[:2], tmp_path / "two")
    for severity in (1, 4):
        four, two = (CorruptedTestSet(tmp_path / d).severity("frost", severity)[0] for d in ("four", "two"))
        assert torch.equal(four[:2], two)


def test_small_images_are_padded_by_their_edge_for_the_library_and_cut_again(calls, tmp_path):
    x, y = pictures(2, (1, 28, 31))
    make_corruptions(x, y, tmp_path / "c")
    padded = calls[0][0]
    assert padded.shape == (32, 32, 1)
    assert np.array_equal(padded[2:30, :31, 0], x[0, 0].numpy())
    assert (padded[:2] == padded[2]).all()
    assert (padded[:, 31] == padded[:, 30]).all()
    images, _ = CorruptedTestSet(tmp_path / "c").severity("fog", 1)
    difference = images ^ x
    assert images.shape == x.shape
    assert (difference == difference[:, :, :1, :1]).all()  # the first channel stays in its place


def test_what_was_left_of_an_interrupted_run_is_replaced(calls, tmp_path):
    (tmp_path / "c.part").mkdir()
    (tmp_path / "c.part" / "old.npy").write_bytes(b"")
    x, y = pictures(1)

    def interrupted(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_corruptions(x, y, tmp_path / "c", done=interrupted)
    assert not (tmp_path / "c").exists()
    make_corruptions(x, y, tmp_path / "c")
    assert set(files(tmp_path / "c")) == {*(f"{name}.npy" for name in (*CORRUPTIONS, "labels")), "made.json"}


def test_a_folder_with_files_is_left_alone(calls, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="found files, expected a new or empty folder"):
        make_corruptions(*pictures(), tmp_path)
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize(("x", "y"), [((2, 4, 32, 32), 2), ((0, 3, 32, 32), 0), ((2, 3, 32, 32), 3), ((2, 32, 32), 2)])
def test_images_that_do_not_fit_are_refused(calls, tmp_path, x, y):
    with pytest.raises(ValueError, match=r"x must be \[n, C, H, W\] with C 1 or 3 and one label an image"):
        make_corruptions(torch.zeros(x, dtype=torch.uint8), torch.zeros(y, dtype=torch.int64), tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_without_the_library_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(ValueError, match=r"imagecorruptions-imaug.*pip install 'bt-fast\[corruptions\]'"):
        make_corruptions(*pictures(), tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_the_command_makes_the_folder_that_is_not_there_and_reads_it_the_next_time(calls, tmp_path):
    network = build_model("small-cnn", in_channels=1, image_size=28, num_classes=10)
    torch.save(network.state_dict(), tmp_path / "model.pt")
    command = ["corruptions", str(tmp_path / "model.pt"), "--model", "small-cnn", "--test-size", "6", "--device", "cpu"]
    tables = []
    for folder in (["--corruptions-dir", str(tmp_path / "c")],) * 2 + ([],):
        result = CliRunner().invoke(cli, [*command, *folder])
        assert result.exit_code == 0, result.output
        tables.append([line for line in result.output.splitlines() if "%" in line])
        assert len(calls) == 15 * 5 * 6 * (1 if len(tables) < 3 else 2)
    assert tables[0] == tables[1] == tables[2]
    assert len(tables[0]) == 16


@pytest.fixture
def cached(calls, tmp_path):
    """Runs `corruptions` with further options on a folder that was made of six test images with seed 0."""
    network = build_model("small-cnn", in_channels=1, image_size=28, num_classes=10)
    torch.save(network.state_dict(), tmp_path / "model.pt")

    def corruptions(*options):
        command = ["corruptions", tmp_path / "model.pt", "--model", "small-cnn", "--device", "cpu"]
        return CliRunner().invoke(cli, [str(a) for a in (*command, "--corruptions-dir", tmp_path / "c", *options)])

    result = corruptions("--test-size", 6)
    assert "6 images at each severity, made of the test set with seed 0" in result.output
    return corruptions


def test_fewer_images_than_the_folder_has_are_taken_when_they_are_asked_for(cached, tmp_path):
    result = cached("--test-size", 2)
    assert result.exit_code == 0, result.output
    assert "the first 2 of 6 images at each severity" in result.output
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--test-size", 7], "has 6 images at each severity, --test-size asks for 7"),
        ([], "made of 6 other test images than the 1000 that are evaluated"),
        (["--test-size", 6, "--seed", 1], "--seed 1: .*/c was made with seed 0; leave --seed away"),
    ],
)
def test_a_folder_that_is_not_what_is_asked_for_is_refused(cached, options, said):
    result = cached(*options)
    assert result.exit_code == 2
    assert re.search(said, result.stderr), result.stderr


def test_a_folder_made_of_other_images_is_refused(cached, tmp_path):
    x = torch.zeros(6, 1, 28, 28, dtype=torch.uint8).numpy()
    y = np.arange(6) % 10
    np.savez(tmp_path / "other.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    result = cached("--data", tmp_path / "other.npz")
    assert result.exit_code == 2
    assert "made of 6 other test images than the 6 that are evaluated" in result.stderr


def test_a_description_of_the_folder_that_is_another_thing_is_named(cached, tmp_path):
    for text in ("", "[]", "{}", '{"seed": "0", "images": []}', '{"seed": 0, "images": [1]}'):
        (tmp_path / "c" / "made.json").write_text(text)
        result = cached("--test-size", 6)
        assert result.exit_code == 2
        assert "made.json: does not say what the folder was made of" in result.stderr


def test_of_two_processes_the_second_waits_and_takes_what_the_first_has_made(calls, tmp_path):
    x, y = pictures(1)
    waited = []

    def second(_):
        if not waited:
            waited.append(os.fork())
            if waited[0] == 0:
                code = 1
                try:
                    reported = []
                    make_corruptions(x, y, tmp_path / "c", waiting=reported.append)
                    code = 0 if reported == [f"process {os.getppid()} on {socket.gethostname()}"] else 2
                finally:
                    os._exit(code)
            time.sleep(0.5)

    make_corruptions(x, y, tmp_path / "c", done=second)
    before = files(tmp_path / "c")
    assert os.waitpid(waited[0], 0)[1] == 0
    assert files(tmp_path / "c") == before
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


# The library itself, where it is installed


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_the_librarys_corruptions_repeat_and_change_the_images(shape, tmp_path):
    pytest.importorskip("imagecorruptions")
    x, y = pictures(2, shape)
    x = (x // 4 + torch.arange(shape[2]) * 4).to(torch.uint8)
    for name in ("a", "b"):
        make_corruptions(x, y, tmp_path / name, seed=5)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    test_set = CorruptedTestSet(tmp_path / "a")
    for name in CORRUPTIONS:
        mild, strong = ((test_set.severity(name, s)[0].int() - x).abs().float().mean().item() for s in (1, 5))
        assert 0.3 < mild < 100, name
        assert 0.3 < strong < 150, name
        if name.endswith("noise"):
            assert mild < strong
