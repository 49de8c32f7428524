"""A run with a memory: what reaches the loss, how it goes on after a kill, on ranks, and what is refused."""

import dataclasses
import json
import re
import warnings
from functools import partialmethod
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from gloo_ranks import run_ranks
from killed_runs import same

from bt_fast.augment import crop
from bt_fast.lab.checkpoint import load_checkpoint
from bt_fast.lab.cli import cli
from bt_fast.lab.config import PRESETS
from bt_fast.lab.data import ImageDataset, minibatches
from bt_fast.lab.fitting import check_training
from bt_fast.lab.fixed_shares import minibatches_of, owners
from bt_fast.lab.models import SmallCNN
from bt_fast.lab.profile import profile
from bt_fast.lab.training import Run
from bt_fast.lab.world import ALONE, World
from bt_fast.memory import Memory

CPU = torch.device("cpu")
CONFIG = dataclasses.replace(
    PRESETS["digits"],
    methods=("bullet", "optimised-exact"),
    data="blobs",
    width=2,
    augment=True,
    memory=True,
    epochs=2,
    batch_size=16,
    eval_steps=1,
    curve_size=4,
)
SMALL = ["--train-size=64", "--test-size=8", "--width=2", "--epochs=1", "--batch-size=32", "--eval-steps=1"]


def blobs(train=38, test=6):
    """Three classes of 16x16 images that differ in where they are bright."""
    y = torch.arange(train + test) % 3
    x = torch.randint(0, 60, (train + test, 1, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for i, label in enumerate(y):
        x[i, :, 5 * label : 5 * label + 5] += 150
    return ImageDataset("blobs", x[:train], y[:train], x[train:], y[train:], 3)


def run_until(folder, iteration=None, config=CONFIG, saved=None, world=ALONE, **options):
    """Trains to an iteration, or to the end, as a process that is killed then: `saved` is its last checkpoint."""
    run = Run(folder, config, blobs(), CPU, world=world, **options)
    for at in run.train():
        if at.iteration == saved:
            run.save()
            run.save = lambda: None
        if at.iteration == iteration:
            break
    run.close()
    return run


def outcome(folder):
    """Everything that a run ends with, without its clocks."""
    contestants = load_checkpoint(folder / "checkpoint.pt")[1]["contestants"]
    for state in contestants.values():
        del state["seconds"]
        for memory in state["memory"]:
            memory["_extra_state"]["file"] = None  # its name, drawn at random
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return contestants, [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def perturbations(run):
    return [contestant.memory.perturbations.clone() for contestant in run.contestants]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder and memories of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, perturbations(run_until(folder))


@pytest.mark.parametrize("loss", ["trades", "mart", "pgd"])
def test_each_image_is_remembered_by_its_number_in_its_own_frame(loss, tmp_path):
    run = run_until(tmp_path / "run", 4, dataclasses.replace(CONFIG, loss=loss))
    batch = next(iter(minibatches(38, 16, seed=0, epoch=1)))
    x, _, placement = run._images(batch, ALONE.share(16), 3)
    inside = crop(torch.ones_like(x), placement).bool()
    for contestant in run.contestants:
        moved = (contestant.criterion.last.x_adv - x) / CONFIG.epsilon
        assert moved[inside].any()
        remembered = crop(contestant.memory.perturbations[batch], placement) / 127
        torch.testing.assert_close(remembered[inside], moved[inside], rtol=0, atol=0.51 / 127)


def test_the_noise_of_a_start_is_new_in_each_epoch_and_the_same_for_all_methods(tmp_path):
    run = Run(tmp_path / "run", CONFIG, blobs(), CPU)
    seeds = {contestant.method: [] for contestant in run.contestants}
    for contestant in run.contestants:

        def noted(*batch, generator, method=contestant.method, forward=contestant.criterion.forward, **options):
            seeds[method].append(generator.initial_seed())
            return forward(*batch, generator=generator, **options)

        contestant.criterion.forward = noted
    for _ in run.train():
        pass
    assert seeds["bullet"] == seeds["optimised-exact"]
    assert len(set(seeds["bullet"])) == 6


@pytest.mark.parametrize(("storage", "stop"), [("device", 1), ("file", 4)])
def test_a_run_killed_after_a_checkpoint_ends_as_one_that_was_not(storage, stop, whole, tmp_path):
    config, folder = dataclasses.replace(CONFIG, memory_storage=storage), tmp_path / "run"
    run_until(folder, stop, config, saved=stop)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = run_until(folder, config=config, resume=True)
    assert same(perturbations(run), whole[1])
    (states, records), (expected, expected_records) = outcome(folder), outcome(whole[0])
    assert records == expected_records
    if storage == "file":  # whose checkpoint holds no perturbations
        for state in (*states.values(), *expected.values()):
            state["memory"] = state["memory"][0]["clock"]
    assert same(states, expected)


def test_a_file_made_after_the_only_checkpoint_is_made_anew(whole, tmp_path):
    config, folder = dataclasses.replace(CONFIG, memory_storage="file"), tmp_path / "run"
    run_until(folder, 2, config)
    (folder / "memory-optimised-exact-0.mem.json").unlink()  # as after a kill between the two
    (folder / ".memory-bullet-0.mem.0a.part").write_bytes(b"half")
    assert same(perturbations(run_until(folder, config=config, resume=True)), whole[1])
    assert not list(folder.glob(".*"))


def test_a_file_newer_than_its_checkpoint_is_gone_on_with_and_a_warning_says_so(tmp_path):
    config, folder = dataclasses.replace(CONFIG, memory_storage="file", methods=("bullet",)), tmp_path / "run"
    run_until(folder, 3, config, saved=2)
    with pytest.warns(UserWarning, match="6 of 38 perturbations in .*memory-bullet-0.mem were written after"):
        run = run_until(folder, config=config, resume=True)
    assert run.iteration == 6


def test_a_new_run_does_not_begin_with_what_another_remembered(tmp_path):
    config, folder = dataclasses.replace(CONFIG, memory_storage="file"), tmp_path / "run"
    run_until(folder, 1, config)
    for name in ("checkpoint.pt", "run.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"already holds a run's memory \(memory-bullet-0.mem\); name another folder"):
        run_until(folder, 1, config)
    assert not (folder / "run.json").exists()


# Ranks


@pytest.mark.parametrize(("n", "size", "ranks"), [(38, 16, 3), (7, 7, 2), (40, 5, 4)])
def test_a_rank_has_the_same_images_in_every_epoch_in_another_order(n, size, ranks):
    ranks_of = owners(n, size, ranks, seed=3)
    before = set()
    for epoch in range(3):
        batches = list(minibatches_of(ranks_of, size, seed=3, epoch=epoch))
        assert torch.cat(batches).sort().values.tolist() == list(range(n))
        plain = list(minibatches(n, size, seed=3, epoch=epoch))
        assert [len(batch) for batch in batches] == [len(batch) for batch in plain]
        for batch in batches:
            for rank in range(ranks):
                assert (ranks_of[World(rank, ranks).share(len(batch)).own(batch)] == rank).all()
        before.add(tuple(torch.cat(batches).tolist()))
        alone = list(minibatches_of(torch.zeros(n, dtype=torch.int64), size, seed=3, epoch=epoch))
        assert same(alone, plain)
        assert epoch or all(torch.equal(*two) for two in zip(batches, plain, strict=True))
    assert len(before) == 3


def without_dropout():
    """Dropout's masks would go to other images where each rank sorts its own by steps."""
    return mock.patch.object(SmallCNN, "__init__", partialmethod(SmallCNN.__init__, dropout=0.0))


RANKED = dataclasses.replace(CONFIG, methods=("bullet",))


def on_ranks(folder):
    """Trains a run to its end, and one that is killed and resumed; returns what this rank remembers of the first."""
    world, in_file = World(dist.get_rank(), 2, dist.group.WORLD), dataclasses.replace(RANKED, memory_storage="file")
    with without_dropout():
        for k, config in enumerate((RANKED, in_file)):
            run_until(folder / f"killed{k}", 4, config, saved=4, world=world)
            run_until(folder / f"killed{k}", config=config, world=world, resume=True)
        memory = run_until(folder / "run", config=RANKED, world=world).contestants[0].memory
    return memory.share, memory.perturbations


def test_two_ranks_remember_their_shares_as_one_process_would_and_go_on_exactly(tmp_path):
    with without_dropout():
        alone = Run(tmp_path / "alone", RANKED, blobs(), CPU)
        alone._ranks_of = owners(38, 16, 2, seed=0)
        for _ in alone.train():
            pass
    of_ranks, (of_all,) = run_ranks(2, on_ranks, tmp_path), perturbations(alone)
    assert torch.cat([share for share, _ in of_ranks]).sort().values.tolist() == list(range(38))
    assert all(torch.equal(remembered, of_all[share]) for share, remembered in of_ranks)
    whole, killed, in_file = (outcome(tmp_path / name)[0] for name in ("run", "killed0", "killed1"))
    assert same(killed, whole)
    assert same(in_file["bullet"]["model"], whole["bullet"]["model"])
    with pytest.raises(ValueError, match=r"the images of 2 ranks, each its own share, got 1: start as many"):
        run_until(tmp_path / "killed0", config=RANKED, resume=True)


# The command line


def bt_fast(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_a_comparison_says_what_is_remembered_and_resumes_with_the_same_memory_only(tmp_path):
    folder, page = tmp_path / "run", tmp_path / "report.html"
    methods = ("--method", "bullet", "--method", "bullet,memory=on")
    result = bt_fast(
        "compare", *SMALL, *methods, "--memory-dtype", "float16", "--memory-storage", "file", "--out", folder
    )
    assert result.exit_code == 0, result.output
    assert "bullet,memory=on: memory of 64 samples, nothing remembered yet; 1 / 1 / 0 steps" in result.output
    assert re.search(r"epoch 1, .*: bullet [^,]* s, bullet,memory=on .* s, memory 0.25 epochs old", result.output)
    assert re.search(r"\+ BulletTrain, memory ", result.output)
    said = f"of 64 samples of [1, 28, 28], float16, 0.1 MiB in {folder}/memory-bullet,memory=on-0.mem; 1 / 1 / 0 steps"
    assert f"memory: {said}" in result.output
    methods = json.loads((folder / "summary.json").read_text())["methods"]
    assert [entry.get("memory") for entry in methods.values()] == [None, said]
    assert bt_fast("report", folder, "--out", page).exit_code == 0
    assert said in page.read_text()
    assert "--memory-dtype" not in (other := bt_fast("train", "--resume", folder, "--memory-dtype", "int8")).output
    assert other.exit_code == 2
    assert "another configuration (memory_dtype: int8 against float16" in other.stderr


REFUSED = {
    ("--memory", "--steps=5"): "--steps 5: with a memory it is 1, .* leave --steps away",
    ("--memory", "--robust-steps=0"): "--robust-steps 0: with a memory it is 1",
    ("--memory", "--step-size=0.1"): "--step-size 0.1: with a memory it is 0.2",
    ("--method=bullet,memory=on,outlier-steps=1",): "--method .*: --outlier-steps 1: with a memory it is 0",
    ("--memory", "--loss=augmix"): "--memory: augmix attacks nothing, .* leave it away",
    ("--memory", "--method=fast"): "--method fast: fast has no memory; .* write --method bullet,memory=on",
    ("--memory-dtype=float16",): "--memory-dtype float16: no method has a memory; write --memory too",
    ("--memory", "--method=bullet,memory=off", "--memory-storage=file"): "--memory-storage file: no method has",
}


@pytest.mark.parametrize("options", REFUSED)
def test_what_a_memory_cannot_go_with_is_refused_in_one_line_before_anything_is_made(options, tmp_path):
    result = bt_fast("train", *SMALL, *options, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert re.fullmatch(f"bt-fast: {REFUSED[options]}.*\n", result.stderr)
    assert not (tmp_path / "run").exists()


def test_steps_are_those_of_the_methods_without_a_memory_where_there_are_some():
    config = dataclasses.replace(CONFIG, memory=False, steps=7, methods=("optimised", "optimised,memory=on"))
    assert [config.of_method(method)[1].steps for method in config.methods] == [7, 1]


def test_a_memory_that_does_not_fit_the_device_is_refused_with_what_to_write():
    with mock.patch("bt_fast.lab.fitting.memory", return_value=920_000):  # 16 kB less than are needed
        with pytest.raises(ValueError, match=r"need at least 936 kB, .* or --memory-storage host or file"):
            check_training(CONFIG, blobs(), CPU)
        check_training(dataclasses.replace(CONFIG, memory_storage="host"), blobs(), CPU)


@pytest.mark.parametrize("storage", ["device", "file"])
def test_a_profile_has_a_memory_too_which_ends_with_it(tmp_path, storage):
    config = dataclasses.replace(CONFIG, methods=("optimised",), memory_storage=storage)
    with mock.patch.object(Memory, "remember", autospec=True, side_effect=Memory.remember) as remember:
        profile(config, blobs(), CPU, tmp_path / "profile", iterations=1)
    assert remember.call_count == 3 + 1 + 3
    assert not [path for path in (tmp_path / "profile").iterdir() if "mem" in path.name]
