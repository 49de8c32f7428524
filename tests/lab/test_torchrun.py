"""`torchrun -m bt_fast train`: ranks that share minibatches train as one process, stop together and die together."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial, partialmethod
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from gloo_ranks import run_ranks
from torch import nn

from bt_fast import Balance, Guard, NonFiniteError
from bt_fast.lab import cli, models
from bt_fast.lab.checkpoint import load_checkpoint
from bt_fast.lab.config import PRESETS
from bt_fast.lab.data import ImageDataset
from bt_fast.lab.draws import DrawsOfAll
from bt_fast.lab.training import Contestant, Run
from bt_fast.lab.world import ALONE, World, joined

CPU = torch.device("cpu")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
SMALL = ["--train-size=76", "--test-size=30", "--width=2", "--epochs=2", "--batch-size=32", "--steps=3"]
SMALL += ["--eval-steps=2", "--curve-size=13"]
# BulletTrain sorts samples per rank, so dropout masks would fall to other samples
WITHOUT_DROPOUT = """
import os, signal, sys, time
from functools import partialmethod
from bt_fast.lab import cli, models, session

models.SmallCNN.__init__ = partialmethod(models.SmallCNN.__init__, dropout=0.0)
"""
STOPPED = """
stops, step = [], session.Run._step
def noted(run, stop, how, train=session.train):
    stops.append(stop)
    train(run, stop, how)
def preempted(run, batch):
    step(run, batch)
    if run.iteration == 4 and os.environ["RANK"] == "0":
        os.kill(os.getppid(), signal.SIGTERM)  # as a cluster does it: torchrun tells the ranks
        while not stops[0]:
            time.sleep(0.01)
session.train, session.Run._step = noted, preempted
"""
CONFIG = dataclasses.replace(
    PRESETS["digits"],
    methods=("bullet",),
    data="blobs",
    width=2,
    epochs=1,
    batch_size=16,
    steps=3,
    boundary_steps=3,
    robust_steps=1,
    eval_steps=2,
    curve_size=7,
    augment=True,
)


def blobs():
    """Three classes of 16x16 images that differ in where they are bright."""
    x = torch.randint(0, 60, (52, 1, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    y = torch.arange(52) % 3
    for i, k in enumerate(y):
        x[i, :, 5 * k : 5 * k + 5] += 150
    return ImageDataset("blobs", x[:38], y[:38], x[38:], y[38:], 3)


def torchrun(ranks, *arguments):
    return [*TORCHRUN, str(ranks), *map(str, arguments)]


def contestants(folder):
    return load_checkpoint(folder / "checkpoint.pt")[1]["contestants"]


def records(folder):
    result = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in ("seconds", "joules")} for record in result]


def assert_same_run(folder, expected, atol=1e-5):
    """Compares float32 values up to another order of summation; groups, counts and accuracies must be equal."""
    close = partial(torch.testing.assert_close, rtol=0, atol=atol)
    for method, state in contestants(expected).items():
        result = contestants(folder)[method]
        for key, value in state["model"].items():
            close(result["model"][key], value)
        assert (result["bullet"] is None) == (state["bullet"] is None)
        for key, value in (state["bullet"] or {}).items():
            assert torch.equal(result["bullet"][key], value), key
        assert torch.equal(result["random"][0], state["random"][0])
    for one, other in zip(records(folder), records(expected), strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if key in ("loss", "svar", "threshold"):
                close(torch.tensor(value), torch.tensor(other[key]))
            else:
                assert value == other[key], key


# With torchrun


def test_terminated_on_two_ranks_and_resumed_on_four_a_run_ends_as_that_of_one_process(tmp_path):
    methods, whole, run = ["--method=bullet", "--method=optimised-fast"], tmp_path / "whole", tmp_path / "run"
    with mock.patch.object(models.SmallCNN, "__init__", partialmethod(models.SmallCNN.__init__, dropout=0.0)):
        done = CliRunner().invoke(cli.cli, ["compare", *methods, *SMALL, "--augment", "--out", str(whole)])
    assert done.exit_code == 0, done.output
    stopped, plain = tmp_path / "stopped.py", tmp_path / "plain.py"
    stopped.write_text(WITHOUT_DROPOUT + STOPPED + "cli.cli()")
    plain.write_text(WITHOUT_DROPOUT + "cli.cli()")

    begun = torchrun(2, stopped, "compare", *methods, *SMALL, "--augment", "--balance", "--out", run)
    done = subprocess.run(begun, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0
    assert done.stdout.count("stopped and saved: go on with --resume") == 1, done.stderr[-3000:]
    assert load_checkpoint(run / "checkpoint.pt")[1]["iteration"] == 4

    done = subprocess.run(torchrun(4, plain, "compare", "--resume", run), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("epoch 2") == 1
    assert_same_run(run, whole)
    assert [start["ranks"] for start in json.loads((run / "run.json").read_text())["starts"]] == [2, 4]
    assert {"summary.json", "accuracy.png"} <= {path.name for path in run.iterdir()}


def test_a_rank_that_is_killed_ends_the_job_and_what_was_saved_is_whole(tmp_path):
    folder = tmp_path / "run"
    command = torchrun(2, "-m", "bt_fast", "train", *SMALL, "--epochs=2000", "--out", folder)
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        end, reported = time.monotonic() + 300, folder / "metrics.jsonl"
        while not (reported.exists() and '"epoch": 2' in reported.read_text()):
            assert job.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
        ranks = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        assert len(ranks) == 2
        os.kill(int(ranks[1]), signal.SIGKILL)
        _, errors = job.communicate(timeout=45)
    finally:
        job.kill()
    assert job.returncode != 0
    assert "SIGKILL" in errors
    assert load_checkpoint(folder / "checkpoint.pt")[1]["iteration"] >= 3


# On ranks forked here


def to_the_end(folder, config, world=ALONE, balance=None):
    run = Run(folder, config, blobs(), CPU, world=world, balance=balance)
    for _ in run.train():
        pass
    for contestant in run.contestants:
        run.final(contestant)
    return run


def this_world():
    return World(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)


def trained(folder, config, balance=None):
    run = to_the_end(folder, config, this_world(), balance)
    return [parameter.detach().clone() for c in run.contestants for parameter in c.model.parameters()]


# what draws for the whole minibatch, including dropout, is the same without BulletTrain
DRAWING = {
    "trades": ("reference", "optimised", "fast,grad-align=0.2"),
    "pgd": ("reference", "optimised-fast"),
    "augmix": ("optimised", "no-jsd"),
}


@pytest.mark.parametrize("loss", DRAWING)
def test_methods_without_bullet_train_draw_as_one_process(loss, tmp_path):
    config = dataclasses.replace(CONFIG, loss=loss, methods=DRAWING[loss])
    to_the_end(tmp_path / "one", config)
    first, second = run_ranks(2, trained, tmp_path / "two", config)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    assert_same_run(tmp_path / "two", tmp_path / "one")


def test_ranks_of_which_some_have_no_image_to_evaluate_train_with_uneven_shares(tmp_path):
    config = dataclasses.replace(CONFIG, methods=("bullet-fast,robust-steps=0",), curve_size=2)
    with mock.patch.object(models.SmallCNN, "__init__", partialmethod(models.SmallCNN.__init__, dropout=0.0)):
        to_the_end(tmp_path / "one", config)
    run_ranks(3, without_dropout, tmp_path / "three", config)
    assert_same_run(tmp_path / "three", tmp_path / "one")


def without_dropout(folder, config):
    models.SmallCNN.__init__ = partialmethod(models.SmallCNN.__init__, dropout=0.0)
    trained(folder, config, Balance())


def test_augmix_with_bullet_train_counts_and_trains_alike_on_all_ranks(tmp_path):
    config = dataclasses.replace(
        CONFIG, loss="augmix", boundary_steps=1, robust_steps=0, model="preactresnet-18", width=None, train_size=8
    )
    first, second = run_ranks(2, normed, tmp_path / "run", config)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def normed(folder, config):
    """Returns the state, with statistics of batch norm, after one minibatch."""
    data = blobs()
    data = dataclasses.replace(data, x_train=data.x_train[:8], y_train=data.y_train[:8])
    run = Run(folder, config, data, CPU, world=this_world())
    next(run.train())
    contestant = run.contestants[0]
    assert int(contestant.bullet.group_counts.sum()) == 8
    return contestant.model.state_dict()


def faulty(folder, how):
    """Returns the weights after two epochs, with a fault in the second rank's third sample of the fourth minibatch."""
    config = dataclasses.replace(CONFIG, methods=("optimised",), non_finite="skip", epochs=2)
    run = Run(folder, config, blobs(), CPU, world=this_world())
    sound = Contestant._loss

    def loss(contestant, x, y):
        at_fault = run.iteration == 3 and dist.get_rank() == 1
        if at_fault and how == "raised":
            raise NonFiniteError("the third one", [2])
        return sound(contestant, x, y) * (torch.nan if at_fault else 1.0)

    with mock.patch.object(Contestant, "_loss", loss):
        for _ in run.train():
            pass
    return [parameter.detach().clone() for parameter in run.contestants[0].model.parameters()]


@pytest.mark.parametrize("how", ["raised", "NaN"])
def test_what_is_wrong_on_one_rank_is_skipped_by_all(how, tmp_path):
    first, second = run_ranks(2, faulty, tmp_path / "run", how)
    for one, other in zip(first, second, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other)
    (skipped,) = (record for record in records(tmp_path / "run") if record["kind"] == "skipped")
    assert skipped["iteration"] == 4
    assert len(skipped["images"]) == 16
    assert skipped["blamed"] == ([skipped["images"][8 + 2]] if how == "raised" else [])


def guarded(fused):
    model = nn.Linear(2, 2)
    nn.init.ones_(model.weight)
    guard = Guard(
        torch.optim.SGD(model.parameters(), lr=0.1, fused=fused), non_finite="skip", process_group=dist.group.WORLD
    )
    for step in range(3):
        with guard.minibatch():
            loss = model(torch.ones(1, 2)).sum() * (torch.inf if step == dist.get_rank() == 1 else 1.0)
            guard._optimizer.zero_grad()
            loss.backward()
            guard.step(loss)
    guard.settle()
    return [skipped.minibatch for skipped in guard.skipped], model.weight.detach().clone()


@pytest.mark.parametrize("fused", [False, True])
def test_a_guard_of_ranks_skips_on_all_what_is_faulty_on_one(fused):
    for skipped, weight in run_ranks(2, guarded, fused):
        assert skipped == [1]
        torch.testing.assert_close(weight, torch.full((2, 2), 0.8))


def test_a_guard_says_what_is_no_process_group():
    words = "process_group must be a torch.distributed.ProcessGroup or None, got 'world'"
    with pytest.raises(TypeError, match=re.escape(words)):
        Guard(torch.optim.SGD([nn.Parameter(torch.ones(1))]), process_group="world")


# Shares


def test_shares_are_contiguous_and_differ_by_at_most_one():
    for m, count in ((7, 3), (8, 4), (2, 3)):
        shares = [World(rank, count).share(m) for rank in range(count)]
        assert [i for s in shares for i in range(s.first, s.end)] == list(range(m))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert World(0, count).most_in_a_share(m) == max(map(len, shares))
        assert sum(s.weight for s in shares) == pytest.approx(1)


def drawn(views, m, block):
    torch.manual_seed(3)
    with block:
        return [
            torch.rand(views * m, 2, 2),
            torch.randn(torch.Size([views * m, 3])),
            torch.randint(1, 9, (views * m, 2)),
            torch.empty(views * m, 2).exponential_(),
            nn.functional.dropout(torch.ones(views * m, 5)),
            torch.rand(views * m),
            torch.randint(99, (2,)),
            torch.rand(4, generator=torch.Generator().manual_seed(1)),
        ]


@pytest.mark.parametrize("views", [1, 2])
def test_a_share_draws_what_the_whole_minibatch_draws_for_it(views):
    *whole, seeds, others = drawn(views, 7, torch.no_grad())
    for rank in range(3):
        share = World(rank, 3).share(7)
        *own, its_seeds, its_others = drawn(views, len(share), DrawsOfAll(share.first, len(share), 7))
        for mine, all_of_them in zip(own, whole, strict=True):
            blocks = all_of_them.view(views, 7, *all_of_them.shape[1:])
            assert torch.equal(mine, torch.cat([share.own(block) for block in blocks]))
        assert torch.equal(its_seeds, seeds)
        assert torch.equal(its_others, others)


def test_of_fewer_rows_than_samples_each_rank_drops_others_and_draws_as_much():
    masks, after = [], []
    for rank in range(2):
        torch.manual_seed(3)
        with DrawsOfAll(4 * rank, 4, 8):
            masks.append(nn.functional.dropout(torch.ones(3, 50)))
        after.append(torch.rand(2))
    assert not torch.equal(*masks)
    assert torch.equal(*after)


# Mistakes


def test_minibatches_with_too_few_samples_for_the_ranks_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"--batch-size 6: the last minibatch of an epoch would have 2 of the 38 .*4"):
        Run(tmp_path / "run", dataclasses.replace(CONFIG, batch_size=6), blobs(), CPU, world=World(0, 4))
    with pytest.raises(ValueError, match=r"--batch-size 3: a minibatch would have 3 of the 38"):
        Run(tmp_path / "run", dataclasses.replace(CONFIG, batch_size=3), blobs(), CPU, world=World(0, 4))
    assert not (tmp_path / "run").exists()


def test_yopo_is_refused_on_several_ranks():
    config = dataclasses.replace(CONFIG, methods=("yopo-2-1",))
    with pytest.raises(ValueError, match=r"--method yopo-2-1: .* runs on one alone"):
        Contestant("yopo-2-1", config, blobs(), CPU, World(0, 2, object()))


def test_balance_without_ranks_is_refused():
    done = CliRunner().invoke(cli.cli, ["train", "--balance"])
    assert done.exit_code == 2
    assert "--balance shares an attack out over ranks" in done.stderr


LAUNCHED = dict.fromkeys(("RANK", "LOCAL_RANK"), "0") | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("changes", "device", "message"),
    [
        ({}, "cpu", "WORLD_SIZE is set but not MASTER_ADDR, MASTER_PORT"),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "1"}, "cuda:1", "--device cuda:1: each rank has a GPU of its own"),
    ],
)
def test_an_environment_that_is_not_torchruns_is_refused(changes, device, message, monkeypatch):
    for name, value in (LAUNCHED | changes).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message), joined(device, 1.0):
        pass


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    for name, value in (LAUNCHED | {"MASTER_ADDR": "a", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="--nproc-per-node 2: there are 1 CUDA devices"), joined("cuda", 1.0):
        pass
