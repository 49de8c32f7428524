"""The examples run from end to end on tiny data, and are as short and plain as they are meant to be."""

import importlib
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from published import package

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
DOCUMENT = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
CLASSES = 4


def example(name):
    return importlib.import_module(f"examples.{name}")


def images(n, size=12):
    """Images uint8 [n, H, W, 3] that are easy to tell apart, and their classes."""
    drawn = np.random.default_rng(n)
    y = np.arange(n) % CLASSES
    patterns = np.random.default_rng(0).integers(0, 200, (CLASSES, size, size, 3))
    return (patterns[y] + drawn.integers(0, 50, (n, size, size, 3))).astype(np.uint8), y


def save_images(path, n, of_test, **options):
    (x, y), (x_test, y_test) = images(n, **options), images(of_test, **options)
    np.savez(path, x_train=x, y_train=y, x_test=x_test, y_test=y_test)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_images("images.npz", 48, 24)


def run(name, **options):
    """What an example's main returns, on the CPU, in minibatches of 16."""
    given = {"data": "images.npz", "device": "cpu", "batch_size": 16} | options
    arguments = [text for key, value in given.items() for text in (f"--{key.replace('_', '-')}", str(value))]
    return example(name).main(arguments)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_one_short_script(name):
    text = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 120
    assert f"examples/{name}.py" in text.split('"""')[1]  # how it is called
    assert text.endswith('if __name__ == "__main__":\n    main()\n')
    assert not any(f"import {other}" in text or f"examples.{other}" in text for other in EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_guide_leads_to_each_example(name):
    assert f"(../examples/{name}.py)" in DOCUMENT


def test_the_examples_are_in_the_source_distribution_and_not_in_the_wheel(tmp_path):
    source = tmp_path / "source"
    for name in ("bt_fast", "kernels", "examples"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools import build_meta; print(build_meta.build_sdist('.'))"
    made = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=True)
    with tarfile.open(source / made.stdout.splitlines()[-1]) as file:
        assert {Path(name).stem for name in file.getnames() if "/examples/" in name} == set(EXAMPLES)
    packages = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[tool.setuptools]")[1].split("\n[tool.")[0]
    assert "examples" not in packages


def test_an_unknown_option_is_refused_before_anything_is_read(capsys):
    with pytest.raises(SystemExit):
        run("trades_cifar10", epsilon=8)
    assert "--epsilon" in capsys.readouterr().err


# TRADES

TRADES = {"depth": 10, "width": 1}


def test_trades_goes_on_from_its_checkpoint_as_if_it_had_not_stopped():
    whole = run("trades_cifar10", **TRADES, epochs=2, checkpoint="whole.pt")
    run("trades_cifar10", **TRADES, epochs=1, checkpoint="parts.pt")
    assert run("trades_cifar10", **TRADES, epochs=2, checkpoint="parts.pt") == whole
    first, second = (torch.load(f"{name}.pt") for name in ("whole", "parts"))
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    assert first["mining"]["group_counts"].sum() == 2 * 48
    assert not list(Path.cwd().glob("*.part"))


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(monkeypatch):
    path = Path("trades.pt")
    path.write_bytes(b"the old one")

    def broken(content, file):
        file.write(b"half of the new one")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="no space"):
        example("trades_cifar10").save({}, path)
    assert path.read_bytes() == b"the old one"


def test_random_crops_are_windows_of_the_padded_image_or_of_its_mirror():
    x = torch.rand(6, 3, 5, 7)
    padded = torch.nn.functional.pad(torch.stack([x, x.flip(3)]), [4] * 4)
    windows = padded.unfold(3, 5, 1).unfold(4, 7, 1).permute(1, 0, 3, 4, 2, 5, 6).reshape(6, -1, *x.shape[1:])
    for name in ("trades_cifar10", "trades_awp", "augmix_corruptions"):
        crops = example(name).augment(x)
        assert (windows == crops[:, None]).flatten(2).all(dim=2).any(dim=1).all()


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(monkeypatch):
    path, synced = Path("trades.pt"), []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append((path.exists(), Path("trades.pt.part").stat().st_size)))
    example("trades_cifar10").save({"weights": torch.ones(3)}, path)
    assert synced == [(False, path.stat().st_size)]


# AugMix


def test_augmix_is_judged_by_corruptions():
    errors = run("augmix_corruptions", epochs=2, width=8)
    assert set(errors) == {"clean", "gaussian_noise", "brightness", "contrast", "box_blur"}
    assert all(0 <= value <= 1 for value in errors.values())


def test_augmix_is_judged_by_a_folder_in_the_layout_of_cifar_10_c():
    (x, y), folder = images(30), Path("corrupted")
    folder.mkdir()
    np.save(folder / "labels.npy", y)
    for name in ("fog", "snow"):
        np.save(folder / f"{name}.npy", np.roll(x, len(name), axis=3))
    nothing = torch.empty(0)
    result = list(example("augmix_corruptions").corrupted(nothing, nothing, folder))
    assert [name for name, _, _ in result] == ["fog", "snow"] * 5
    for place, (name, of_name, labels) in enumerate(result):
        part = slice(6 * (place // 2), 6 * (place // 2 + 1))  # five severities of six images
        expected = torch.as_tensor(np.roll(x, len(name), axis=3)[part]).permute(0, 3, 1, 2) / 255
        torch.testing.assert_close(of_name, expected, rtol=0, atol=0)
        assert labels.tolist() == y[part].tolist()
    assert set(run("augmix_corruptions", epochs=1, width=8, corruptions=folder)) == {"clean", "fog", "snow"}


def test_the_corruptions_are_images_and_grow_with_severity():
    x = torch.rand(4, 3, 16, 16)
    mild, strong = (example("augmix_corruptions").corruptions(x, severity) for severity in (1, 5))
    for name in mild:
        assert strong[name].shape == x.shape
        assert strong[name].min() >= 0
        assert strong[name].max() <= 1
        assert 0 < (mild[name] - x).square().mean() < (strong[name] - x).square().mean()


# Generated data


def save_generated():
    x, y = images(40)
    np.savez("generated.npz", image=x, label=y)
    return {"generated": "generated.npz", "width": 4, "blocks": 1}


def test_generated_images_are_trained_on_at_their_share(monkeypatch):
    trained_on = []
    module = example("generated_data")
    cutmix = module.cutmix
    monkeypatch.setattr(module, "cutmix", lambda x, y: trained_on.append((x, y)) or cutmix(x, y))
    clean, robust = run("generated_data", **save_generated(), epochs=1)
    assert 0 <= robust <= clean <= 1
    originals = torch.as_tensor(images(48)[0]).permute(0, 3, 1, 2) / 255
    of_originals = [int((x[:, None] == originals).flatten(2).all(dim=2).any(dim=1).sum()) for x, _ in trained_on]
    assert of_originals == [5, 5, 5]  # 30 % of 16, in each of 48 / 16 minibatches
    assert all(len(x) == 16 and y.shape == (16, CLASSES) for x, y in trained_on)


def test_cutmix_labels_are_the_shares_of_the_pixels():
    torch.manual_seed(0)
    y = torch.eye(8)
    x = torch.arange(8.0)[:, None, None, None].expand(8, 3, 9, 7)  # an image's pixels are its number
    for _ in range(10):
        mixed, labels = example("generated_data").cutmix(x, y)
        for k in range(8):
            torch.testing.assert_close((mixed == k).float().mean(dim=(1, 2, 3)), labels[:, k])
        assert (mixed == mixed[:, :1]).all()


def test_weights_are_averaged_over_fewer_updates_in_the_beginning():
    averaged = example("generated_data").averaged
    mean, new = torch.tensor([1.0]), torch.tensor([0.0])
    assert averaged(mean, new, torch.tensor(1)).item() == pytest.approx(2 / 11)
    assert averaged(mean, new, torch.tensor(10**6)).item() == pytest.approx(0.995)


# AWP


def test_weights_are_perturbed_after_the_warm_up(monkeypatch):
    module, gammas = example("trades_awp"), []

    class Recorded(module.AWP):
        def __call__(self, *arguments):
            gammas.append(self.gamma)
            return super().__call__(*arguments)

    monkeypatch.setattr(module, "AWP", Recorded)
    clean, robust = run("trades_awp", width=4, epochs=2, warmup=1, gamma=0.01)
    assert 0 <= robust <= clean <= 1
    assert gammas == [0.0] * 3 + [0.01] * 3


# Embeddings


def test_the_image_tower_learns_to_withstand_the_attack_without_labels():
    before, after = run("clip_embeddings", width=4, epochs=8)
    assert after > before


def test_the_inner_loss_knows_each_row_by_its_number():
    original = torch.tensor([[0.0, 0.0], [1.0, 1.0], [5.0, 5.0]])
    rows = SimpleNamespace(labels=torch.tensor([2, 0]))
    distances = example("clip_embeddings").away_from(original)(torch.tensor([[5.0, 6.0], [3.0, 4.0]]), rows)
    assert distances.tolist() == [1.0, 25.0]


# ImageNet

SCRIPT = """
import json, os, sys
from pathlib import Path
from published import package
package("torchvision")
from examples.imagenet_finetune import main
Path(f"{os.environ['RANK']}.json").write_text(json.dumps(main(sys.argv[1:])))
"""


@pytest.fixture
def imagenet():
    """Arguments of a run over 16 images, and 9 of the test."""
    package("torchvision")
    save_images("large.npz", 16, 9, size=32)
    given = {"data": "large.npz", "model": "convnext_atto", "batch-size": 8, "workers": 0, "epochs": 1, "device": "cpu"}
    return ["--no-pretrained", *(text for key, value in given.items() for text in (f"--{key}", str(value)))]


@pytest.mark.parametrize("mining", [(), ("--mining",)], ids=["all", "mining"])
def test_a_convnext_is_fine_tuned_in_one_process(imagenet, mining):
    clean, robust = example("imagenet_finetune").main([*imagenet, *mining])
    assert 0 <= robust <= clean <= 1


def test_a_convnext_is_fine_tuned_by_two_processes(imagenet):
    Path("script.py").write_text(SCRIPT, encoding="utf-8")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py", "--mining"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, *launch, *imagenet], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert Path("0.json").read_text() == Path("1.json").read_text()  # the accuracies of all test images
    assert ran.stdout.count("averaged weights") == 1


def test_without_timm_the_network_is_torchvision_s(monkeypatch):
    package("torchvision")
    monkeypatch.setitem(sys.modules, "timm", None)
    network = example("imagenet_finetune").convnext("of timm", CLASSES, pretrained=False)
    assert network(torch.rand(1, 3, 32, 32)).shape == (1, CLASSES)
