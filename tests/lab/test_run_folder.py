"""A run folder belongs to one process at a time, whatever dies; configuration and data identify a run, not its path."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from gloo_ranks import run_ranks
from test_faults import CONFIG, SMALL, blobs, npz, one_line  # noqa: F401
from test_locks import child, kill

from bt_fast.lab import contestant
from bt_fast.lab.checkpoint import load_checkpoint, save_checkpoint
from bt_fast.lab.cli import cli
from bt_fast.lab.html_report.loading import load_runs
from bt_fast.lab.html_report.page import page
from bt_fast.lab.locks import hold
from bt_fast.lab.provenance import Provenance
from bt_fast.lab.training import Run
from bt_fast.lab.world import World

CPU = torch.device("cpu")
TOOL = Path(__file__).parents[1] / "crowded_runs.py"


def bt_fast(*arguments):
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def stopped(folder, config=CONFIG, iteration=2):
    """Returns a run stopped after this many iterations and held by no process."""
    run = Run(folder, config, blobs(), CPU)
    for at in run.train():
        if at.iteration == iteration:
            run.save()
            break
    run.close()
    return run


# Several processes


def test_a_run_that_several_processes_begin_resume_report_and_kill_ends_as_that_of_one():
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TOOL.parents[1])}
    command = [sys.executable, TOOL, "--rounds", "1", "--epochs", "2"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=580, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 rounds" in result.stdout


def test_a_run_that_another_process_writes_is_not_resumed_or_begun_but_read(tmp_path, npz):  # noqa: F811
    folder = tmp_path / "run"
    assert bt_fast("train", "--data", npz, "--out", folder, *SMALL).exit_code == 0
    process, _ = child(lambda: hold(folder))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    try:
        for options in (["--resume", folder], ["--data", npz, "--out", folder, *SMALL]):
            assert f"{folder}: process {process} on " in one_line(bt_fast("train", *options))
        assert bt_fast("report", folder, "--out", tmp_path / "page.html").exit_code == 0
        assert bt_fast("evaluate", folder / "checkpoint.pt", "--steps", "1").exit_code == 0
        assert bt_fast("train", "--repeat", folder, "--out", tmp_path / "again").exit_code == 0
    finally:
        kill(process)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert bt_fast("train", "--resume", folder).exit_code == 0
    assert not list(folder.glob("*.lock"))


def test_a_second_resume_is_reported_before_the_data_are_read(tmp_path, npz, monkeypatch):  # noqa: F811
    assert bt_fast("train", "--data", npz, "--out", tmp_path / "run", *SMALL).exit_code == 0
    monkeypatch.setattr("bt_fast.lab.session.load_dataset", None)
    process, _ = child(lambda: hold(tmp_path / "run"))
    try:
        assert "writes there; wait for its end or stop it" in one_line(bt_fast("train", "--resume", tmp_path / "run"))
    finally:
        kill(process)


def test_a_run_that_was_refused_leaves_the_folder_to_others(tmp_path):
    stopped(tmp_path / "run")
    with pytest.raises(ValueError, match=r"already holds a run \(checkpoint\.pt\); go on with it by --resume"):
        Run(tmp_path / "run", CONFIG, blobs(), CPU)
    process, reported = child(lambda: hold(tmp_path / "run") and "mine")
    kill(process)
    assert reported == "mine"


def test_a_folder_with_a_summary_alone_is_not_taken_for_an_empty_one(tmp_path):
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match=r"already holds a run \(summary\.json\); name another folder with --out"):
        Run(tmp_path, CONFIG, blobs(), CPU)
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_a_profile_keeps_its_folder_and_names_it_itself(tmp_path, npz, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    options = ["profile", "--data", npz, "--iterations", 1, "--width=2", "--batch-size=16", "--steps=2"]
    (tmp_path / "own").mkdir()
    process, _ = child(lambda: hold(tmp_path / "own"))
    try:
        assert "writes there" in one_line(bt_fast(*options, "--out", "own"))
    finally:
        kill(process)
    for _ in range(2):
        result = bt_fast(*options)
        assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "profiles").iterdir())) == 2


def named(place):
    os.chdir(place)
    world = World(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    run = Run(None, CONFIG, blobs(), CPU, world=world)
    for _ in run.train():
        pass
    return str(run.folder)


def test_the_ranks_of_one_job_are_one_writer_of_one_new_folder(tmp_path):
    first, second = run_ranks(2, named, tmp_path)
    assert first == second
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [Path(first).name]


# Data and where they lie


def test_a_run_goes_on_with_its_data_wherever_they_are_now(tmp_path, npz, monkeypatch):  # noqa: F811
    whole, moved = tmp_path / "whole", tmp_path / "elsewhere" / "renamed.npz"
    shutil.copy(npz, tmp_path / "blobs.npz")
    monkeypatch.chdir(tmp_path)
    assert bt_fast("train", "--data", "blobs.npz", "--out", whole, *SMALL).exit_code == 0
    config = load_checkpoint(whole / "checkpoint.pt")[0]
    stopped(tmp_path / "run", config)
    moved.parent.mkdir()
    shutil.move(tmp_path / "blobs.npz", moved)
    monkeypatch.chdir(moved.parent)
    line = one_line(bt_fast("train", "--resume", tmp_path / "run"))
    assert line.startswith("bt-fast: blobs.npz: found no such data")
    assert line.endswith("say with --data where the run's data are now")
    result = bt_fast("train", "--resume", tmp_path / "run", "--data", "renamed.npz")
    assert result.exit_code == 0, result.output
    one, other = (load_checkpoint(f / "checkpoint.pt")[1]["contestants"]["bullet"] for f in (whole, tmp_path / "run"))
    assert all(torch.equal(value, other["model"][key]) for key, value in one["model"].items())
    reported = Provenance.read(tmp_path / "run" / "run.json")
    assert (reported.config.data, len(reported.starts)) == ("renamed.npz", 2)
    assert bt_fast("train", "--resume", tmp_path / "run").exit_code == 0  # the run has recorded the new path
    assert "epochs: 9 against 2" in one_line(bt_fast("train", "--resume", tmp_path / "run", "--epochs", 9))


def test_other_data_at_the_same_place_are_refused(tmp_path, npz):  # noqa: F811
    place = tmp_path / "blobs.npz"
    shutil.copy(npz, place)
    config = dataclasses.replace(CONFIG, data=str(place))
    stopped(tmp_path / "run", config)
    import numpy as np

    arrays = dict(np.load(npz))
    arrays["x_test"][0, 0, 0, 0] ^= 1
    np.savez(place, **arrays)
    line = one_line(bt_fast("train", "--resume", tmp_path / "run"))
    assert "of a run on other data than blobs" in line
    assert line.endswith("say with --data where its own are now")


def test_a_checkpoint_without_a_fingerprint_has_but_the_place_to_know_its_data_by(tmp_path):
    run = stopped(tmp_path / "run")
    config, state = load_checkpoint(run.checkpoint_path)
    del state["data"]
    save_checkpoint(run.checkpoint_path, config, state)
    with pytest.raises(ValueError, match="data: elsewhere against blobs, as asked and as stored"):
        Run(tmp_path / "run", dataclasses.replace(CONFIG, data="elsewhere"), blobs(), CPU, resume=True)
    Run(tmp_path / "run", CONFIG, blobs(), CPU, resume=True)


def test_what_is_another_than_at_the_last_start_is_reported(tmp_path, npz):  # noqa: F811
    folder, path = tmp_path / "run", tmp_path / "run" / "run.json"
    assert bt_fast("train", "--data", npz, "--out", folder, *SMALL).exit_code == 0
    assert "last bits" not in bt_fast("train", "--resume", folder).output
    reported = json.loads(path.read_text())
    reported["starts"][-1]["machine"]["torch"] = "1.0"
    path.write_text(json.dumps(reported))
    for options in (["--resume", folder], ["--repeat", folder, "--out", tmp_path / "again"]):
        output = bt_fast("train", *options).output
        assert f"may differ in its last bits, for it was started with torch: 1.0, now {torch.__version__}" in output


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, CONFIG, {"contestants": {"bullet": {"model": {"w": torch.zeros(10_000)}}}})
    whole = zipfile.ZipFile.testzip

    def replaced(archive):
        save_checkpoint(path, CONFIG, {"contestants": {"bullet": {"model": {"w": torch.ones(1)}}}})
        return whole(archive)

    monkeypatch.setattr(zipfile.ZipFile, "testzip", replaced)
    assert torch.equal(load_checkpoint(path)[1]["contestants"]["bullet"]["model"]["w"], torch.zeros(10_000))
    assert len(load_checkpoint(path)[1]["contestants"]["bullet"]["model"]["w"]) == 1


# Reports


def test_a_run_in_progress_is_reported_as_far_as_it_is(tmp_path):
    config = dataclasses.replace(CONFIG, methods=("optimised", "bullet"), epochs=3)
    run, seen = Run(tmp_path / "run", config, blobs(), CPU), []
    with pytest.raises(ValueError, match=r"run: a run without a summary\.json, .* no epoch has ended; report it later"):
        load_runs([tmp_path / "run"])
    for at in run.train():
        if at.epoch_ended:
            (loaded,) = load_runs([tmp_path])
            seen.append(loaded.unfinished)
            last = [record for record in run.records() if record["kind"] == "epoch"][-2:]
            assert [(r.clean, r.robust, r.seconds) for r in loaded.results] == [
                (r["clean"], r["robust"], r["seconds"]) for r in last
            ]
            assert {result.attack for result in loaded.results} == {"PGD-2 x 1, 8 test images"}
            assert loaded.data == run.fingerprint
            assert "Not finished" in page([loaded], training_started())
    assert seen == [f"epoch {n} of 3 has ended" for n in (1, 2, 3)]


def training_started():
    from datetime import datetime, timezone

    return datetime(2026, 1, 1, tzinfo=timezone.utc)


def test_of_an_epoch_that_not_every_method_has_ended_nothing_is_reported(tmp_path):
    config = dataclasses.replace(CONFIG, methods=("optimised", "bullet"), epochs=2)
    run = Run(tmp_path / "run", config, blobs(), CPU)
    for _ in run.train():
        pass
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    cut = next(i for i, line in enumerate(lines) if '"epoch": 2' in line and '"bullet"' in line)
    path.write_text("".join(line + "\n" for line in lines[:cut]))
    (loaded,) = load_runs([tmp_path / "run"])
    assert loaded.unfinished == "epoch 1 of 2 has ended"
    first = [json.loads(line) for line in lines if '"epoch": 1' in line]
    assert [result.seconds for result in loaded.results] == [record["seconds"] for record in first]


def test_runs_are_alike_by_their_data_and_a_seed_counts_once(tmp_path, npz):  # noqa: F811
    shutil.copy(npz, tmp_path / "copy.npz")
    for name, data, seed in (("a", npz, 0), ("b", tmp_path / "copy.npz", 1), ("c", tmp_path / "copy.npz", 0)):
        assert bt_fast("train", "--data", data, "--out", tmp_path / name, "--seed", seed, *SMALL).exit_code == 0
    runs = load_runs([tmp_path / name for name in "abc"])
    written = str(page(runs, training_started()))
    assert "Means over the seeds (runs A, B)" in written
    assert "(runs A, B, C)" not in written
    assert f"SHA-256 {runs[0].data[:12]}..." in written
    stored = json.loads((tmp_path / "b" / "summary.json").read_text())
    assert stored["data"]["sha256"] == load_checkpoint(tmp_path / "b" / "checkpoint.pt")[1]["data"]


def test_training_looks_at_what_is_needed_before_it_makes_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr(contestant, "build_model", None)
    nought = {half: getattr(blobs(), half) * 0 for half in ("y_train", "y_test")}
    with pytest.raises(ValueError, match="one class"):
        Run(tmp_path / "run", CONFIG, dataclasses.replace(blobs(), **nought, classes=1), CPU)
    assert not list(tmp_path.iterdir())
