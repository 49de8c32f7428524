import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from bt_fast.lab.cli import cli
from bt_fast.lab.corruptions import CORRUPTIONS, CorruptedTestSet, corruption_errors, mean_corruption_error
from bt_fast.lab.models import build_model

CPU = torch.device("cpu")
N = 7


def write(folder, n=N, shape=(6, 5, 3)):
    """Writes a folder in the published layout: pixel (0, 0) of each image encodes corruption, severity and place."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "labels.npy", np.tile(np.arange(n) % 3, 5).astype(np.uint8))
    for k, name in enumerate(CORRUPTIONS):
        images = np.zeros((5 * n, *shape), np.uint8)
        images[:, 0, 0, 0], images[:, 0, 1, 0], images[:, 1, 0, 0] = (
            k,
            np.repeat(np.arange(1, 6), n),
            [i % 256 for i in range(n)] * 5,
        )
        np.save(folder / f"{name}.npy", images)
    return folder


class Fooled(nn.Module):
    """A model that errs only at severities above 3 of corruption number 4; class = place modulo 3."""

    def forward(self, x):
        number, severity, place = (x[:, 0, row, column] * 255 for row, column in ((0, 0), (0, 1), (1, 0)))
        decision = (place.round().long() + ((number.round() == 4) & (severity.round() > 3)).long()) % 3
        return nn.functional.one_hot(decision, 3).float()


def test_there_are_the_fifteen_corruptions_of_the_benchmark_in_its_order():
    assert len(set(CORRUPTIONS)) == 15
    assert (CORRUPTIONS[0], CORRUPTIONS[4], CORRUPTIONS[-1]) == ("gaussian_noise", "glass_blur", "jpeg_compression")


def test_a_severity_is_its_fifth_of_the_file(tmp_path):
    test_set = CorruptedTestSet(write(tmp_path))
    assert test_set.image_shape == (3, 6, 5)
    for k, name in enumerate(CORRUPTIONS):
        for severity in (1, 3, 5):
            x, y = test_set.severity(name, severity)
            assert (x.shape, x.dtype, y.dtype) == ((N, 3, 6, 5), torch.uint8, torch.int64)
            assert y.tolist() == [i % 3 for i in range(N)]
            assert (x[:, 0, 0, 0] == k).all()
            assert (x[:, 0, 0, 1] == severity).all()
            assert x[:, 0, 1, 0].tolist() == list(range(N))


def test_other_files_of_the_folder_are_not_read(tmp_path):
    (write(tmp_path) / "speckle_noise.npy").write_bytes(b"nothing")
    CorruptedTestSet(tmp_path)


def test_the_error_is_the_share_of_wrong_decisions(tmp_path):
    model = Fooled().train()
    errors = dict(corruption_errors(model, CorruptedTestSet(write(tmp_path)), CPU))
    assert list(errors) == list(CORRUPTIONS)
    for k, of_severities in enumerate(errors.values()):
        assert of_severities == ([0, 0, 0, 1, 1] if k == 4 else [0] * 5)
    assert mean_corruption_error(errors) == pytest.approx(2 / 75)
    assert model.training


def test_more_images_than_one_batch(tmp_path):
    errors = dict(corruption_errors(Fooled(), CorruptedTestSet(write(tmp_path, n=1001, shape=(2, 2, 1))), CPU))
    # places wrap around at a byte, and 256 is 1 modulo 3
    expected = np.mean([(i % 256) % 3 != i % 3 for i in range(1001)])
    assert errors["fog"] == pytest.approx([expected] * 5)


def test_the_model_runs_in_eval_mode(tmp_path):
    class Watching(Fooled):
        def forward(self, x):
            assert not self.training
            return super().forward(x)

    dict(corruption_errors(Watching().train(), CorruptedTestSet(write(tmp_path)), CPU))


# Bad input


def spoil(folder, name, array):
    np.save(folder / f"{name}.npy", array, allow_pickle=True)


IMAGES = np.zeros((5 * N, 6, 5, 3), np.uint8)
BAD = {
    "missing": (lambda d: [(d / f"{n}.npy").unlink() for n in ("fog", "snow")], r"no snow.npy, fog.npy; expected"),
    "no labels": (lambda d: (d / "labels.npy").unlink(), "no labels.npy"),
    "float labels": (
        lambda d: spoil(d, "labels", np.zeros(35)),
        r"labels.npy: found float64 \[35\], expected integers",
    ),
    "two-dimensional labels": (lambda d: spoil(d, "labels", np.zeros((35, 1), int)), r"labels.npy.*\[35, 1\]"),
    "labels of no five parts": (lambda d: spoil(d, "labels", np.zeros(36, int)), r"labels.npy.*\[36\].*\[5n\]"),
    "other labels": (lambda d: spoil(d, "labels", np.zeros(40, int)), r"gaussian_noise.npy.*\[35, 6.*expected.*\[40"),
    "float images": (
        lambda d: spoil(d, "fog", IMAGES / 1.0),
        r"fog.npy: found float64.*expected uint8 \[35, H, W, C\]",
    ),
    "channels first": (lambda d: spoil(d, "fog", IMAGES.transpose(0, 3, 1, 2)), r"fog.npy.*\[35, 3, 6, 5\]"),
    "another size": (lambda d: spoil(d, "fog", IMAGES[:, :4]), r"fog.npy: found images of \[4, 5, 3\], expected \[6"),
    "too few images": (lambda d: spoil(d, "fog", IMAGES[:30]), r"fog.npy.*\[30, 6, 5, 3\], expected uint8 \[35"),
    "a pickle": (lambda d: spoil(d, "fog", np.array([{}])), "fog.npy: found ValueError.*expected a plain .npy array"),
    "a truncated file": (lambda d: (d / "fog.npy").write_bytes((d / "fog.npy").read_bytes()[:200]), "fog.npy: found"),
    "no array": (lambda d: (d / "fog.npy").write_bytes(b"nothing"), "fog.npy: found"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_folder_that_is_not_as_published_is_refused_by_name(name, tmp_path):
    change, message = BAD[name]
    change(write(tmp_path))
    with pytest.raises(ValueError, match=message):
        CorruptedTestSet(tmp_path)


def test_labels_that_the_model_does_not_know_are_named(tmp_path):
    spoil(write(tmp_path), "labels", np.full(5 * N, 3))
    with pytest.raises(ValueError, match=r"the labels must lie in 0\.\.2, but 7 of 7 do not"):
        dict(corruption_errors(Fooled(), CorruptedTestSet(tmp_path), CPU))


# The command


def bt_fast(*arguments):
    return CliRunner().invoke(cli, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.save(build_model("small-cnn", in_channels=1, image_size=28, num_classes=10).state_dict(), folder / "model.pt")
    return folder / "model.pt"


def test_the_command_prints_the_errors_and_their_mean(checkpoint, tmp_path):
    folder = write(tmp_path / "c", shape=(28, 28, 1))
    result = bt_fast("corruptions", checkpoint, "--model", "small-cnn", "--corruptions-dir", folder, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "small-cnn: mean corruption error" in result.output
    for name in CORRUPTIONS:
        row = next(line for line in result.output.splitlines() if line.strip().startswith(name))
        assert row.count("%") == 6


def test_the_command_refuses_corrupted_images_that_are_not_the_networks(checkpoint, tmp_path):
    folder = write(tmp_path / "c")
    result = bt_fast("corruptions", checkpoint, "--model", "small-cnn", "--corruptions-dir", folder)
    assert result.exit_code == 2
    assert "found images of [3, 6, 5], expected [1, 28, 28] as in digits" in result.stderr
