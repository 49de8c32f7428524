"""Every layout in which scripts and wrappers save weights is read; for others the error reports the content."""

import argparse
import copy
import io
import pathlib
import sys
import warnings
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from gloo_ranks import run_ranks
from torch import nn
from torch.optim.swa_utils import AveragedModel

from bt_fast import BulletTrain, Normalize
from bt_fast.lab.checkpoint import load_checkpoint
from bt_fast.lab.cli import cli
from bt_fast.lab.models import PreActResNet18, SmallCNN, WideResNet, load_published

MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616]


def trained(build=lambda: WideResNet(10, 1), seed=0):
    """Returns a network that differs from its initial state in every tensor."""
    torch.manual_seed(seed)
    model = build()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(7) if not tensor.is_floating_point() else tensor.uniform_(0.1, 0.9)
    return model


def assert_read(path, model, like=None):
    """Asserts that the file gives another network of this kind all of the model's tensors, without a warning."""
    other = (like or (lambda: WideResNet(10, 1)))()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_published(other, path) is other
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def saved(content, tmp_path):
    torch.save(content, tmp_path / "file.pt")
    return tmp_path / "file.pt"


# Keys

KEYS = [
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "params",
    "network",
    "weights",
    "ema",
    "model_ema",
    "classifier",
]
BESIDE = {
    "nothing": lambda model: {},
    "the guide's": lambda model: {"bullet": BulletTrain().state_dict()},
    "an epoch, an optimizer and a schedule": lambda model: stepped(model),
    "what scripts note": lambda model: {
        "args": argparse.Namespace(lr=0.1, out=pathlib.Path("runs")),
        "best": np.float64(51.3),
        "history": np.zeros(3),
        "acc": 51.3,
        "note": None,
    },
}


def stepped(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    return {"epoch": 3, "optimizer": optimizer.state_dict(), "scheduler": schedule.state_dict()}


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE)
def test_a_state_dict_may_lie_under_any_key(tmp_path, key, beside):
    model = trained()
    assert_read(saved({**beside(model), key: model.state_dict()}, tmp_path), model)


@pytest.mark.parametrize("content", [lambda s: s, lambda s: {"epoch": 3, **s}, lambda s: {"a": {"b": {"model": s}}}])
def test_it_may_lie_bare_or_deep(tmp_path, content):
    model = trained()
    assert_read(saved(content(model.state_dict()), tmp_path), model)


# Wrappers


class Robust(nn.Module):
    """Holds a network and its mining, like a Lightning module or a trainer."""

    def __init__(self, model):
        super().__init__()
        self.model, self.bullet = model, BulletTrain(policy="uniform")


def compiled_inside(model):
    model = copy.deepcopy(model)
    name, child = list(model.named_children())[-1]
    setattr(model, name, torch.compile(child))
    return model


def scripted_names(word):
    def state(model):
        return {name.replace("block1.", f"block1.{word}"): tensor for name, tensor in model.state_dict().items()}

    return state


WRAPPED = {
    "DataParallel": lambda m: nn.DataParallel(m).state_dict(),
    "torch.compile": lambda m: torch.compile(m).state_dict(),
    "DataParallel, then compiled": lambda m: torch.compile(nn.DataParallel(m)).state_dict(),
    "compiled, then DataParallel": lambda m: nn.DataParallel(torch.compile(m)).state_dict(),
    "a part of it compiled": lambda m: compiled_inside(m).state_dict(),
    "AveragedModel": lambda m: AveragedModel(m).state_dict(),
    "AveragedModel of a compiled one": lambda m: AveragedModel(torch.compile(m)).state_dict(),
    "AveragedModel with buffers, in DataParallel": lambda m: nn.DataParallel(
        AveragedModel(m, use_buffers=True)
    ).state_dict(),
    "a module with its mining": lambda m: Robust(m).state_dict(),
    "a module around DataParallel": lambda m: Robust(nn.DataParallel(m)).state_dict(),
    "FSDP's names": scripted_names("_fsdp_wrapped_module."),
    "recomputed activations": scripted_names("_checkpoint_wrapped_module."),
    "the first of a Sequential": lambda m: nn.Sequential(m, nn.Identity()).state_dict(),
}


@pytest.mark.parametrize("wrapped", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("key", [None, "model"])
@pytest.mark.parametrize("build", [lambda: WideResNet(10, 1), PreActResNet18, SmallCNN], ids=["wrn", "resnet", "cnn"])
def test_the_names_may_be_a_wrappers(tmp_path, wrapped, key, build):
    if (
        build is not None
        and "block1" not in dict(build().named_children())
        and wrapped in (WRAPPED["a part of it compiled"],)
    ):
        return
    model = trained(build)
    state = wrapped(model)
    assert_read(saved({key: state} if key else state, tmp_path), model, build)


def saved_by_ranks(folder, how):
    """Saves from rank 0 a model that is spread over ranks."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    model = trained()
    if how == "DistributedDataParallel":
        state = nn.parallel.DistributedDataParallel(model).state_dict()
    else:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        torch.save({"model": state}, f"{folder}/file.pt")
    return 0


def _shards_on_the_cpu():
    return tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7)


@pytest.mark.parametrize(
    "how",
    [
        "DistributedDataParallel",
        pytest.param(
            "fully_shard", marks=pytest.mark.skipif(not _shards_on_the_cpu(), reason="torch 2.6 shards on CUDA only")
        ),
    ],
)
def test_the_names_may_be_those_of_several_processes(tmp_path, how):
    run_ranks(2, saved_by_ranks, str(tmp_path), how)
    assert_read(tmp_path / "file.pt", trained())


# A layer in front


class Attacker(nn.Module):
    """The layout of the robustness library: the network, its normaliser, and both again in the attacker."""

    def __init__(self, model):
        super().__init__()
        self.normalizer = nn.Module()
        self.normalizer.register_buffer("new_mean", torch.tensor(MEAN)[:, None, None])
        self.normalizer.register_buffer("new_std", torch.tensor(STD)[:, None, None])
        self.model, self.attacker = model, nn.Module()
        self.attacker.normalize, self.attacker.model = self.normalizer, model


def kept_buffers(names, unit=1.0):
    """Returns the state of a normaliser that saves its numbers, in front of a network."""

    def state(model):
        front = nn.Module()
        for name, numbers in zip(names, (MEAN, STD), strict=True):
            front.register_buffer(name, torch.tensor(numbers).view(1, 3, 1, 1) * unit)
        return nn.Sequential(front, model).state_dict()

    return state


FRONTS = {
    "robustness": lambda m: nn.DataParallel(Attacker(m)).state_dict(),
    "mean and std": kept_buffers(("mean", "std")),
    "mu and sigma": kept_buffers(("mu", "sigma")),
    "of bytes": kept_buffers(("mean", "std"), 255.0),
    "in the network itself": lambda m: {
        **m.state_dict(),
        "mean": torch.tensor(MEAN)[:, None, None],
        "std": torch.tensor(STD)[:, None, None],
    },
}


@pytest.mark.parametrize("front", FRONTS.values(), ids=FRONTS)
def test_what_normalises_in_front_of_the_network_comes_along(tmp_path, front):
    model, other = trained(), WideResNet(10, 1)
    path = saved({"model": front(model)}, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = load_published(other.eval(), path)
    x = torch.rand(2, 3, 8, 8)
    expected = nn.Sequential(Normalize(MEAN, STD), model).eval()(x)
    torch.testing.assert_close(whole(x), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(other(x), expected, rtol=1e-2)


def test_a_layer_in_front_that_saves_nothing_is_a_warning(tmp_path):
    """The layer may have normalised the images, as in this package's guide."""
    model = trained()
    path = saved(nn.Sequential(Normalize(MEAN, STD), model).state_dict(), tmp_path)
    other = WideResNet(10, 1)
    with pytest.warns(UserWarning, match=r"behind another layer.*'1\.'.*put Normalize\(mean, std\) in front"):
        load_published(other, path)
    assert torch.equal(other.fc.weight, model.fc.weight)


# Several candidates


def test_the_network_is_read_before_its_average_and_it_is_reported(tmp_path):
    model, average = trained(seed=0), trained(seed=1)
    path = saved({"ema": average.state_dict(), "model": model.state_dict()}, tmp_path)
    other = WideResNet(10, 1)
    with pytest.warns(UserWarning, match=r"read is \['model'\], not \['ema'\]; to read another, torch\.save it alone"):
        load_published(other, path)
    assert torch.equal(other.fc.weight, model.fc.weight)


def test_a_copy_of_the_same_values_is_no_choice(tmp_path):
    model = trained()
    assert_read(saved({"best": model.state_dict(), "last": model.state_dict()}, tmp_path), model)


def test_what_is_beside_the_network_is_reported_not_to_be_read(tmp_path):
    model = trained()
    whole = Robust(model)
    whole.purifier = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match=r"purifier\.weight, purifier\.bias are of something beside WideResNet"):
        load_published(WideResNet(10, 1), saved(whole.state_dict(), tmp_path))


# Files that are refused


def test_a_deeper_network_is_not_taken_for_a_shallower_one(tmp_path):
    path = saved({"net": nn.DataParallel(WideResNet(16, 1)).state_dict()}, tmp_path)
    with pytest.raises(
        ValueError, match=r"unexpected block1\.layer\.1\..*nearest is \['net'\], names without 'module\.'"
    ):
        load_published(WideResNet(10, 1), path)


def test_another_network_is_reported_with_the_keys_that_were_tried(tmp_path):
    path = saved({"epoch": 3, "net": nn.Linear(2, 2).state_dict()}, tmp_path)
    expected = (
        r"holds no state_dict of WideResNet: found the keys 'epoch' \(int\), 'net' \(OrderedDict\), and looked in all "
        r"of it for names such as conv1\.weight; write torch\.save\(model\.state_dict\(\), path\)"
    )
    with pytest.raises(ValueError, match=expected):
        load_published(WideResNet(10, 1), path)


def test_what_could_run_code_is_named_and_not_read(tmp_path):
    path = tmp_path / "whole.pt"
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(
        ValueError, match=r"holds torch\.nn\.modules\.linear\.Linear, .*write torch\.save\(model\.state"
    ):
        load_published(WideResNet(10, 1), path)


def test_what_scripts_note_beside_the_weights_is_not_made(tmp_path):
    """A Namespace and arrays are skipped without running any of their code."""
    buffer = io.BytesIO()
    torch.save({"net": trained().state_dict(), "args": argparse.Namespace(a=1), "best": np.float32(1)}, buffer)
    path = tmp_path / "file.pt"
    path.write_bytes(buffer.getvalue())
    with mock.patch.object(argparse.Namespace, "__init__", side_effect=AssertionError("made")):
        load_published(WideResNet(10, 1), path)


def test_a_checkpoint_of_another_script_without_its_network_says_what_to_add(tmp_path):
    path = saved({"model": trained().state_dict(), "bullet": BulletTrain().state_dict()}, tmp_path)
    with pytest.raises(
        ValueError, match=r"the keys 'model' \(OrderedDict\), 'bullet' \(OrderedDict\); .*--model small-cnn"
    ):
        load_checkpoint(path)


def test_the_guides_checkpoint_is_evaluated_by_the_command_line(tmp_path):
    model = SmallCNN()
    path = saved({"model": torch.compile(model).state_dict(), "bullet": BulletTrain().state_dict()}, tmp_path)
    options = ["--data", "digits", "--test-size", "20", "--steps", "1", "--device", "cpu"]
    result = CliRunner().invoke(cli, ["evaluate", str(path), "--model", "small-cnn", *options])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(cli, ["evaluate", str(path), *options])
    assert result.exit_code != 0
    assert "--model small-cnn" in " ".join(result.output.split())


# Files not written by torch.save


def test_a_file_of_safetensors_is_read(tmp_path):
    torch_of_safetensors = pytest.importorskip("safetensors.torch")
    model = trained()
    torch_of_safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert_read(tmp_path / "model.safetensors", model)
    spoilt = (tmp_path / "model.safetensors").read_bytes()[:-1]
    (tmp_path / "spoilt.safetensors").write_bytes(spoilt)
    with pytest.raises(ValueError, match=r"spoilt\.safetensors: not a readable file of safetensors .*; write it anew"):
        load_published(WideResNet(10, 1), tmp_path / "spoilt.safetensors")


def test_without_the_library_of_safetensors_the_error_says_what_to_install(tmp_path, monkeypatch):
    header = b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    (tmp_path / "model").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match="pip install safetensors"):
        load_published(WideResNet(10, 1), tmp_path / "model")


def test_torchscript_is_refused_with_what_to_write(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript
        torch.jit.save(torch.jit.trace(trained().eval(), torch.zeros(1, 3, 32, 32)), tmp_path / "script.pt")
    with pytest.raises(ValueError, match=r"TorchScript, whose code is not run: write torch\.jit\.load\(path\)"):
        load_published(WideResNet(10, 1), tmp_path / "script.pt")


def test_of_a_sharded_checkpoint_the_error_says_how_to_make_one_file(tmp_path):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import format_utils

    model = trained()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warning that there is only one process
        checkpoint.save(model.state_dict(), checkpoint_id=str(tmp_path / "shards"))
    with pytest.raises(ValueError, match=r"shards: a sharded checkpoint; write torch\.distributed.*dcp_to_torch_save"):
        load_published(WideResNet(10, 1), tmp_path / "shards")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        format_utils.dcp_to_torch_save(str(tmp_path / "shards"), str(tmp_path / "whole.pt"))
    assert_read(tmp_path / "whole.pt", model)


def test_what_torch_does_not_unpickle_is_named_and_not_its_advice_to_run_the_file(tmp_path):
    (tmp_path / "file.pt").write_bytes(b"\x80\x02\x8f.")
    with pytest.raises(ValueError, match="not a readable checkpoint") as raised:
        load_published(WideResNet(10, 1), tmp_path / "file.pt")
    assert "Re-running" not in str(raised.value)
