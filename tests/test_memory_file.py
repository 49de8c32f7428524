"""A memory in a file: who may use it, and what is refused."""

import copy
import json
import os
import pickle
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
from test_memory import ALL, ATTACK, SAMPLES, SHAPE, batch, model, same, trained

from bt_fast import BulletTrain, Memory, TRADESLoss
from bt_fast.memory_file import header_of


def in_file(path, **options):
    return Memory(SAMPLES, storage="file", path=path / "all.mem", **options)


def test_a_file_holds_what_a_device_would(tmp_path):
    memory, expected = in_file(tmp_path), Memory(SAMPLES)
    trained(memory, *ALL, *ALL)
    trained(expected, *ALL, *ALL)
    assert same(memory, expected)
    described = json.loads(header_of(memory.path).read_text())
    assert (described["samples"], described["shape"], described["dtype"]) == (SAMPLES, [*SHAPE], "int8")
    state = memory.state_dict()
    assert "perturbations" not in state
    assert same(copy.deepcopy(memory), expected)
    assert same(pickle.loads(pickle.dumps(memory)), expected)
    del memory
    again = in_file(tmp_path)
    assert same(again, expected)
    assert again.shape == SHAPE


def test_a_row_of_a_file_brings_no_neighbours_from_the_disk(tmp_path):
    memory = in_file(tmp_path)
    trained(memory, *ALL)
    _, *maps = Path("/proc/self/smaps").read_text().split(str(memory.path))
    flags = [next(line for line in one.splitlines() if line.startswith("VmFlags")) for one in maps]
    assert sorted(" rr" in line for line in flags) == [False, True]  # the rows, but not their clocks


def test_a_file_as_old_as_its_checkpoint_goes_on_exactly(tmp_path):
    memory, expected = in_file(tmp_path), Memory(SAMPLES)
    state = trained(memory, *ALL).state_dict()
    del memory
    resumed = in_file(tmp_path)
    criterion = TRADESLoss(ATTACK, memory=resumed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion.load_state_dict(state)
    trained(resumed, *ALL)
    trained(expected, *ALL, *ALL)
    assert same(resumed, expected)


def test_of_a_file_newer_than_its_checkpoint_perturbations_are_used_as_they_are(tmp_path):
    memory = in_file(tmp_path)
    state = copy.deepcopy(trained(memory, *ALL).state_dict())
    trained(memory, (1, 2))
    kept = memory.perturbations.clone()
    del memory
    resumed = in_file(tmp_path)
    with pytest.warns(UserWarning, match=r"^2 of 6 perturbations in .*all.mem were written after the state"):
        TRADESLoss(ATTACK, memory=resumed).load_state_dict(state)
    assert resumed.clock == 6
    assert torch.equal(resumed.perturbations, kept)
    assert (resumed.ages() >= 0).all()
    trained(resumed, *ALL)
    assert resumed.clock == 12


def test_a_torn_row_is_still_a_start_within_the_ball(tmp_path):
    memory = in_file(tmp_path, dtype=torch.float16)
    trained(memory, *ALL)
    memory.perturbations[1] = float("nan")
    memory.perturbations[2] = 3.0
    criterion = trained(memory, ALL[0])
    x = batch(*ALL[0])[0]
    assert (criterion.last.x_adv - x).abs().max() <= 0.1 * 1.00001
    assert memory.perturbations.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: header_of(path).unlink(), r"^path must be a memory with its all.mem.json beside it"),
        (lambda path: header_of(path).write_text("[]"), r"^path must be a memory whose all.mem.json describes it"),
        (lambda path: header_of(path).write_text('{"shape": [1]}'), r"^path must be a memory whose all.mem.json"),
        (lambda path: path.write_bytes(b"short"), r"^path must be a file of 264 bytes .* got one of 5 bytes"),
        (lambda path: path.unlink(), r"^path must be a file of 264 bytes .* got one of 0 bytes"),
    ],
)
def test_a_file_that_is_damaged_is_refused(tmp_path, change, message):
    memory = in_file(tmp_path)
    trained(memory, *ALL)
    path = memory.path
    del memory
    change(path)
    with pytest.raises(ValueError, match=message):
        in_file(tmp_path)


def test_a_file_of_another_memory_is_refused(tmp_path):
    state = trained(in_file(tmp_path, fingerprint="letters"), *ALL).state_dict()
    for own, name in (
        ({"fingerprint": "digits"}, "fingerprint"),
        ({"dtype": torch.float16}, "dtype"),
        ({"shape": (1, 6, 5)}, "shape"),
    ):
        with pytest.raises(ValueError, match=rf"^memory must have the {name} of the file all.mem, "):
            in_file(tmp_path, **own)
    with pytest.raises(ValueError, match=r"^memory must have the samples of the file all.mem, 6, got 5"):
        Memory(5, storage="file", path=tmp_path / "all.mem")
    other = Memory(SAMPLES, storage="file", path=tmp_path / "other.mem", fingerprint="letters")
    with pytest.raises(ValueError, match=r"^path must be the file that was saved with this state"):
        TRADESLoss(ATTACK, memory=other).load_state_dict(state)
    with pytest.raises(ValueError, match=r"^path must lie in a folder that exists"):
        Memory(SAMPLES, storage="file", path=tmp_path / "none" / "all.mem")


def test_of_two_memories_that_would_make_one_file_the_second_is_refused_and_nothing_changes(tmp_path):
    first, second = in_file(tmp_path), in_file(tmp_path)
    trained(first, *ALL)
    expected, network = first.perturbations.clone(), model()
    criterion = TRADESLoss(ATTACK, memory=second, mining=BulletTrain())
    x, y, indices = batch(0, 1, 2)
    before = copy.deepcopy((network.state_dict(), criterion.mining.state_dict()))
    with pytest.raises(ValueError, match=r"^path must be a new file, but another Memory has made all.mem since"):
        criterion(network, x, y, indices=indices)
    for old, new in zip(before, (network.state_dict(), criterion.mining.state_dict()), strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)
    assert (second.shape, second.perturbations, int(second.clock)) == (None, None, 0)
    assert torch.equal(first.perturbations, expected)


@pytest.mark.parametrize("name", ["all.mem", "all.mem.json"])
def test_making_a_file_that_is_interrupted_leaves_nothing_and_may_be_tried_again(tmp_path, name):
    memory = in_file(tmp_path)
    with mock.patch("os.replace", interrupted_at(name)), pytest.raises(KeyboardInterrupt):
        trained(memory, ALL[0])
    assert not list(tmp_path.iterdir())
    assert memory.perturbations is None
    trained(memory, *ALL)
    assert same(in_file(tmp_path), trained(Memory(SAMPLES), *ALL).memory)


def test_what_a_run_leaves_that_was_killed_while_it_made_the_file_is_not_taken_for_a_memory(tmp_path):
    killed = mock.patch.object(Path, "unlink")  # nothing is cleared away
    with killed, mock.patch("os.replace", interrupted_at("all.mem")), pytest.raises(KeyboardInterrupt):
        trained(in_file(tmp_path), ALL[0])
    assert [path.suffix for path in tmp_path.iterdir()] == [".part"]
    memory = in_file(tmp_path)
    with killed, mock.patch("os.replace", interrupted_at("all.mem.json")), pytest.raises(KeyboardInterrupt):
        trained(memory, ALL[0])
    with pytest.raises(
        ValueError, match=r"^path must be a memory with its all.mem.json beside it.* delete the file if"
    ):
        in_file(tmp_path)


def test_a_disk_that_does_not_sync_folders_holds_a_memory_all_the_same(tmp_path):
    def fsync(number, sync=os.fsync):
        if os.path.isdir(f"/proc/self/fd/{number}"):
            raise OSError(22, "Invalid argument")
        sync(number)

    memory = in_file(tmp_path)
    with mock.patch("os.fsync", fsync):
        trained(memory, *ALL)
    assert same(in_file(tmp_path), memory)


def interrupted_at(name, replace=os.replace):
    def interrupted(source, target):
        if target.name == name:
            raise KeyboardInterrupt
        replace(source, target)

    return interrupted


def test_a_copy_of_a_memory_is_refused_where_its_file_is_now_another_one(tmp_path):
    memory = trained(in_file(tmp_path), *ALL).memory
    pickled = pickle.dumps(memory)
    for path in (memory.path, header_of(memory.path)):
        path.unlink()
    for another in (False, True):
        if another:
            trained(in_file(tmp_path), *ALL)
        for copied in (lambda: copy.deepcopy(memory), lambda: pickle.loads(pickled)):
            with pytest.raises(
                ValueError, match=r"^path must be the file that the copied memory uses, but .*all.mem is"
            ):
                copied()


def test_a_state_that_holds_its_perturbations_is_not_loaded_into_a_file(tmp_path):
    state = trained(Memory(SAMPLES), *ALL, mining=BulletTrain()).state_dict()
    for made in (False, True):
        memory = in_file(tmp_path)
        criterion = trained(memory, *(ALL[1:] if made else []), mining=BulletTrain())
        before = copy.deepcopy(criterion.state_dict())
        held = memory.perturbations.clone() if made else None
        with pytest.raises(ValueError, match=r"^path must be left out for a state that holds its perturbations, got"):
            criterion.load_state_dict(state)
        after = criterion.state_dict()
        assert all(torch.equal(before[k], after[k]) for k in before if isinstance(before[k], torch.Tensor))
        assert memory.path.exists() == made
        assert torch.equal(memory.perturbations, held) if made else memory.perturbations is None
