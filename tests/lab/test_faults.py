"""Full disks, read-only folders, damaged and foreign checkpoints, NaN, signals and other data give clear errors."""

import copy
import dataclasses
import errno
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import tarfile
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from killed_runs import same

from bt_fast import NonFiniteError
from bt_fast.lab import files, training
from bt_fast.lab.checkpoint import load_checkpoint, read_tensors, save_checkpoint
from bt_fast.lab.cli import cli
from bt_fast.lab.config import PRESETS
from bt_fast.lab.data import ImageDataset, minibatches
from bt_fast.lab.files import append_line, replacing, write_text
from bt_fast.lab.locks import take
from bt_fast.lab.provenance import Provenance, fingerprint
from bt_fast.lab.report import summarise
from bt_fast.lab.terminal import stop_signals
from bt_fast.lab.training import Contestant, Run

CPU = torch.device("cpu")
CONFIG = dataclasses.replace(
    PRESETS["digits"],
    methods=("bullet",),
    data="blobs",
    width=2,
    epochs=2,
    batch_size=16,
    steps=3,
    boundary_steps=3,
    robust_steps=1,
    decay_epochs=(1,),
    eval_steps=2,
    curve_size=8,
)
SMALL = ["--width=2", "--epochs=2", "--batch-size=16", "--curve-size=8", "--eval-steps=2", "--steps=3"]


def blobs(label=None):
    """Three classes of 16x16 images that differ in where they are bright; the first label may be another."""
    x = torch.randint(0, 60, (52, 1, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    y = torch.arange(52) % 3
    for i, k in enumerate(y):
        x[i, :, 5 * k : 5 * k + 5] += 150
    if label is not None:
        y[0] = label
    return ImageDataset("blobs", x[:40], y[:40], x[40:], y[40:], 3)


def to_the_end(folder, config=CONFIG, **options):
    run = Run(folder, config, blobs(), CPU, **options)
    for _ in run.train():
        pass
    return run


def state_of(run):
    """Returns everything that a run depends on, except its clock."""
    state = run.contestants[0].state()
    return {key: value for key, value in state.items() if key != "seconds"}


def one_line(result):
    assert result.exit_code == 2, result.output
    line = result.stderr.strip()
    assert "\n" not in line
    assert line.startswith("bt-fast: ")
    return line


def bt_fast(*arguments):
    return CliRunner().invoke(cli, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return to_the_end(tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    import numpy as np

    data, path = blobs(), tmp_path_factory.mktemp("data") / "blobs.npz"
    np.savez(path, **{name: getattr(data, name).numpy() for name in ("x_train", "y_train", "x_test", "y_test")})
    return path


@pytest.fixture(scope="module")
def trained(npz, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "trained"
    result = bt_fast("train", "--data", npz, "--out", folder, *SMALL)
    assert result.exit_code == 0, result.output
    return folder


# Disks and folders


def test_what_a_killed_writer_left_goes_with_the_next_write_and_a_living_ones_stays(tmp_path):
    path = tmp_path / "checkpoint.pt"
    leftovers = [tmp_path / name for name in (".checkpoint.pt.7.0123abcd.part", ".checkpoint.pt.8.part")]
    others = [tmp_path / name for name in (".metrics.jsonl.7.0123abcd.part", ".checkpoint.pt.old.part")]
    for file in (*leftovers, *others):
        file.write_text("half")
    living = tmp_path / f".checkpoint.pt.{os.getpid()}.89abcdef.part"  # of a process that may run on another machine
    descriptor = take(living)
    try:
        write_text(path, "new")
        assert sorted(tmp_path.iterdir()) == sorted([path, living, *others])
    finally:
        os.close(descriptor)
    write_text(path, "newer")
    assert sorted(tmp_path.iterdir()) == sorted([path, *others])


def write_often(path, character):
    for _ in range(200):
        write_text(path, character * 10_000)


def test_several_processes_that_write_a_file_at_once_leave_a_whole_one_and_nothing_else(tmp_path):
    path, children = tmp_path / "report.html", []
    for character in "abc":
        child = os.fork()
        if child == 0:
            code = 1
            try:
                write_often(path, character)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert path.read_text() in {character * 10_000 for character in "abc"}
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_named_and_the_file_keeps_what_it_had(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"old")
    (tmp_path / f".checkpoint.pt.{os.getpid()}.0123abcd.part").symlink_to("/dev/full")
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "0123abcd")
    monkeypatch.setattr(files, "_remove_leftovers", lambda _: None)
    with pytest.raises(OSError, match=r"No space left on device: '.*/checkpoint\.pt'$") as raised:
        save_checkpoint(path, CONFIG, {"tensor": torch.ones(100_000)})
    assert raised.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_record_that_finds_no_room_names_its_file(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*/metrics\.jsonl'$"):
        append_line(tmp_path / "metrics.jsonl", "{}")


def test_a_file_that_may_not_grow_so_large_is_named(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*/large'$"):
            write_text(tmp_path / "large", "x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("at", [4, 7, 10])
def test_a_run_that_fills_the_disk_ends_with_one_line_and_resumes_to_the_same_end(trained, npz, tmp_path, at):
    syncs, fsync = [], os.fsync

    def full(descriptor):
        syncs.append(descriptor)
        if len(syncs) >= at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        line = one_line(bt_fast("train", "--data", npz, "--out", folder, *SMALL))
    assert re.search(rf"No space left on device: '{folder}/[a-z.]+'", line)
    assert bt_fast("train", "--resume", folder).exit_code == 0
    one, other = (load_checkpoint(f / "checkpoint.pt")[1]["contestants"]["bullet"] for f in (folder, trained))
    for part in ("model", "optimizer", "bullet", "random"):
        assert same(one[part], other[part])


@contextmanager
def a_read_only_folder():
    """Yields a folder that this process may not write to; root may write anywhere, so it becomes nobody meanwhile."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_a_read_only_folder_is_named_before_anything_is_trained(npz):
    data = blobs()
    with a_read_only_folder() as folder:
        with pytest.raises(PermissionError, match=rf"Permission denied: '{folder}/run'"):
            Run(folder / "run", CONFIG, data, CPU)
        with pytest.raises(PermissionError, match=rf"Permission denied: '{folder}/run\.lock'"):
            Run(folder, CONFIG, data, CPU)
        with pytest.raises(PermissionError, match=rf"Permission denied: '{folder}/file'"), replacing(folder / "file"):
            pass
        assert not list(folder.iterdir())


def test_a_place_that_is_a_file_or_lies_below_one_is_named(npz, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    error = one_line(bt_fast("train", "--data", npz, "--out", file, *SMALL))
    assert f"{file}: a file, expected a folder for the run" in error
    assert f"Not a directory: '{file}/below'" in one_line(
        bt_fast("train", "--data", npz, "--out", file / "below", *SMALL)
    )
    assert file.read_text() == "mine"


def test_a_folder_without_a_checkpoint_yet_says_what_to_do(tmp_path):
    assert "start it with --out" in one_line(bt_fast("train", "--resume", tmp_path))


# Damaged, older, newer and foreign checkpoints


def test_a_flipped_bit_is_detected_or_changes_nothing(finished, tmp_path):
    content, expected = finished.checkpoint_path.read_bytes(), read_tensors(finished.checkpoint_path)
    path, rng, result = tmp_path / "checkpoint.pt", random.Random(0), []
    for _ in range(300):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            assert same(read_tensors(path), expected)
        except ValueError as error:
            result.append(str(error))
    assert len(result) > 100
    assert all(message.startswith(f"{path}: not a readable checkpoint") for message in result)


def test_a_flipped_weight_stops_a_resume_and_the_file_is_left(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    path = folder / "checkpoint.pt"
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
        weight = archive.read(largest)[:64]
    content = bytearray(path.read_bytes())
    content[content.index(weight) + 5] ^= 1
    path.write_bytes(content)
    assert "checkpoint.pt: not a readable checkpoint (damaged: the checksum" in one_line(
        bt_fast("train", "--resume", folder)
    )
    assert path.read_bytes() == content


def test_an_archive_that_inflates_or_overlaps_is_refused(finished, tmp_path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data/0", bytes(10_000_000))
    assert path.stat().st_size < 20_000
    with pytest.raises(ValueError, match=r"bomb\.pt: not a readable checkpoint \(an archive with compressed parts"):
        load_checkpoint(path)


def test_a_tar_is_refused(tmp_path):
    path = tmp_path / "old.pt"
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"), io.BytesIO())
    with pytest.raises(ValueError, match=r"old\.pt: not a readable checkpoint"):
        load_checkpoint(path)


class Command:
    """An object that makes a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_checkpoint_with_a_command_in_its_pickle_runs_nothing(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    state["state"]["iteration"] = Command(tmp_path / "ran")
    for legacy in (False, True):
        torch.save(state, folder / "checkpoint.pt", _use_new_zipfile_serialization=not legacy)
        for arguments in (["train", "--resume", folder], ["evaluate", folder / "checkpoint.pt"]):
            assert "checkpoint.pt: not a readable checkpoint" in one_line(bt_fast(*arguments))
    assert not (tmp_path / "ran").exists()


def test_a_newer_format_says_to_upgrade(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"bt_fast": 2, "config": "{}", "state": {}}, path)
    with pytest.raises(ValueError, match="written by a newer version of bt_fast: found format 2, expected 1; upgrade"):
        load_checkpoint(path)


def test_a_checkpoint_from_before_guards_fingerprints_and_options_resumes_to_the_same_end(finished, tmp_path):
    run = Run(tmp_path / "run", CONFIG, blobs(), CPU)
    for at in run.train():
        if at.iteration == 4:
            run.save()
            break
    content = torch.load(run.checkpoint_path, weights_only=True)
    del content["state"]["data"]
    for key in ("guard", "left_out"):
        del content["state"]["contestants"]["bullet"][key]
    fields = json.loads(content["config"])
    for name in ("metric", "policy", "grad_align", "non_finite"):
        del fields[name]
    content["config"] = json.dumps(fields)
    torch.save(content, run.checkpoint_path)
    (tmp_path / "run" / "run.json").unlink()
    assert same(state_of(to_the_end(tmp_path / "run", resume=True)), state_of(finished))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state.update(iteration=-1),
        lambda state: state.update(iteration="4"),
        lambda state: state["contestants"]["bullet"].update(random=[torch.zeros(3, dtype=torch.uint8)]),
        lambda state: state["contestants"]["bullet"].update(random=[]),
        lambda state: state["contestants"]["bullet"].update(seconds=3),
        lambda state: state["contestants"]["bullet"].update(guard={}),
        lambda state: state["contestants"]["bullet"].update(optimizer={}),
    ],
)
def test_a_state_that_is_not_one_is_named_when_it_is_loaded(finished, tmp_path, spoil):
    (tmp_path / "run").mkdir()
    config, state = load_checkpoint(finished.checkpoint_path)
    spoil(state)
    save_checkpoint(tmp_path / "run" / "checkpoint.pt", config, state)
    with pytest.raises(ValueError, match=r"checkpoint\.pt: does not fit this run"):
        Run(tmp_path / "run", CONFIG, blobs(), CPU, resume=True)


@pytest.mark.parametrize("line", ["3", "[]", '{"kind": "epoch"}', '{"iteration": "4", "kind": "epoch"}'])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    run = Run(tmp_path / "run", CONFIG, blobs(), CPU)
    (tmp_path / "run" / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl: a line is not a record"):
        run.records()


# NaN and Inf in a run


@pytest.fixture
def faulty_minibatches(monkeypatch):
    """Gives the second minibatch a NaN loss, and in the third lets the objective report NaN in samples 1 and 3."""
    loss_of = Contestant._loss

    def loss(contestant, x, y):
        number = len(contestant.seconds)
        if number == 2:
            raise NonFiniteError("the model's logits must be finite", [1, 3])
        return loss_of(contestant, x, y) * (math.nan if number == 1 else 1.0)

    monkeypatch.setattr(Contestant, "_loss", loss)


SKIPPING = dataclasses.replace(CONFIG, non_finite="skip")


@pytest.mark.usefixtures("faulty_minibatches")
def test_skipped_minibatches_are_recorded_with_their_images_and_counted_in_the_summary(tmp_path):
    run = to_the_end(tmp_path / "run", SKIPPING)
    result = [record for record in run.records() if record["kind"] == "skipped"]
    _, second, third = (batch.tolist() for batch in minibatches(40, 16, seed=0, epoch=0))
    assert [(r["iteration"], r["method"], r["images"], r["blamed"]) for r in result] == [
        (2, "bullet", second, []),
        (3, "bullet", third, [third[1], third[3]]),
    ]
    assert [r["reason"] for r in result] == ["the loss is NaN or infinite", "the model's logits must be finite"]
    assert summarise(run, lambda _: None)["methods"]["bullet"]["skipped"] == 2
    assert all(0 < r["loss"] < 20 for r in run.records() if r["kind"] == "epoch")
    assert len(run.contestants[0].seconds) == 6


@pytest.mark.usefixtures("faulty_minibatches")
def test_a_skipped_minibatch_changes_neither_weights_nor_mining(tmp_path):
    run = Run(tmp_path / "run", SKIPPING, blobs(), CPU)
    seen = []
    for _ in run.train():
        state = state_of(run)
        seen.append(copy.deepcopy({key: state[key] for key in ("model", "optimizer", "bullet")}))
    assert same(seen[1]["model"], seen[0]["model"])
    assert same(seen[2], seen[1])
    assert not torch.equal(seen[3]["model"]["classifier.fc1.weight"], seen[2]["model"]["classifier.fc1.weight"])


@pytest.mark.usefixtures("faulty_minibatches")
@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_run_that_skips_resumes_to_the_same_end(tmp_path, stop_after):
    whole = to_the_end(tmp_path / "whole", SKIPPING)
    first = Run(tmp_path / "run", SKIPPING, blobs(), CPU)
    for at in first.train():
        if at.iteration == stop_after:
            first.save()
            break
    resumed = to_the_end(tmp_path / "run", SKIPPING, resume=True)
    assert same(state_of(resumed), state_of(whole))
    one, other = ([{**r, "seconds": 0} for r in run.records()] for run in (resumed, whole))
    assert one == other


@pytest.mark.usefixtures("faulty_minibatches")
def test_a_fault_that_is_raised_names_method_minibatch_and_images_in_one_line(npz, tmp_path):
    second = list(minibatches(40, 16, seed=0, epoch=0))[1].tolist()
    line = one_line(bt_fast("train", "--data", npz, "--out", tmp_path / "run", *SMALL))
    listed = ", ".join(map(str, second[:8]))
    assert f"bullet, minibatch 1: the loss is NaN or infinite: of the data {listed}, ..." in line
    result = bt_fast("train", "--data", npz, "--out", tmp_path / "b", "--non-finite", "skip", *SMALL)
    assert "bullet: 2 minibatches skipped for NaN or Inf; metrics.jsonl tells which and why" in result.output


def test_where_every_minibatch_is_skipped_no_loss_and_no_fractions_are_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(Contestant, "_loss", lambda contestant, x, y: torch.full((), math.nan, requires_grad=True))
    monkeypatch.setattr(training, "RECORD_EVERY", 2)
    run = to_the_end(tmp_path / "run", SKIPPING)
    assert [r["loss"] for r in run.records() if r["kind"] == "epoch"] == [None, None]
    assert not [r for r in run.records() if r["kind"] == "fractions"]


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_to_stop_and_the_second_exits_at_once(number, capfd):
    before = signal.getsignal(number)
    with stop_signals() as stop:
        os.kill(os.getpid(), number)
        assert stop == [number]
        assert "once more to stop at once" in capfd.readouterr().err
        with pytest.raises(SystemExit) as exited:
            os.kill(os.getpid(), number)
    assert exited.value.code == 128 + number
    assert signal.getsignal(number) == before


# What a run is made of


def test_a_run_folder_says_what_the_run_is_made_of(trained, npz):
    reported = json.loads((trained / "run.json").read_text())
    config, state = load_checkpoint(trained / "checkpoint.pt")
    assert reported["config"] == json.loads(config.to_json())
    assert reported["data"]["sha256"] == state["data"]
    assert {"name", "training_images", "test_images", "classes"} <= reported["data"].keys()
    (start,) = reported["starts"]
    assert start["iteration"] == 0
    assert start["command"]
    assert {"torch", "python", "bt_fast", "threads", "device"} <= start["machine"].keys()
    assert {"revision", "settings", "time"} <= start.keys()


def test_every_start_of_a_run_is_reported(tmp_path):
    run = Run(tmp_path / "run", CONFIG, blobs(), CPU)
    for at in run.train():
        if at.iteration == 2:
            run.save()
            break
    to_the_end(tmp_path / "run", resume=True)
    assert [start["iteration"] for start in Provenance.read(tmp_path / "run" / "run.json").starts] == [0, 2]


def test_a_run_repeated_from_its_folder_ends_with_the_same_bits(trained, tmp_path):
    result = bt_fast("train", "--repeat", trained, "--out", tmp_path / "again")
    assert result.exit_code == 0, result.output
    one, other = (load_checkpoint(f / "checkpoint.pt") for f in (trained, tmp_path / "again"))
    assert one[0] == other[0]
    for part in ("model", "optimizer", "bullet", "random", "loss_sum"):
        assert same(one[1]["contestants"]["bullet"][part], other[1]["contestants"]["bullet"][part])


def test_other_data_are_refused_when_a_run_is_resumed_or_repeated(trained, npz, tmp_path):
    run = Run(tmp_path / "run", CONFIG, blobs(), CPU)
    with pytest.raises(ValueError, match=r"checkpoint\.pt: of a run on other data than blobs: .* SHA-256"):
        Run(tmp_path / "run", CONFIG, blobs(label=2), CPU, resume=True)
    assert json.loads((run.folder / "run.json").read_text())["starts"][0]["iteration"] == 0
    assert "run.json: of a run on other data than digits" in one_line(
        bt_fast("train", "--repeat", trained, "--data", "digits", "--out", tmp_path / "again")
    )
    assert not (tmp_path / "again").exists()


def test_a_repeated_run_takes_no_options_of_its_own(trained, tmp_path):
    error = one_line(bt_fast("train", "--repeat", trained, "--epochs", "1", "--non-finite", "skip"))
    assert "--epochs, --non-finite: --repeat" in error
    assert "--repeat: a resumed run stays" in one_line(bt_fast("train", "--repeat", trained, "--resume", trained))
    assert "run.json: no such file" in one_line(bt_fast("train", "--repeat", tmp_path))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "config": {}, "data": {}}'])
def test_a_description_that_is_another_thing_is_named(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    assert "run.json: not the description of a run" in one_line(bt_fast("train", "--repeat", tmp_path))


def test_the_fingerprint_is_of_every_pixel_label_shape_and_class():
    data = blobs()
    pixel = data.x_test.clone()
    pixel[3, 0, 2, 1] ^= 1
    others = [
        blobs(label=2),
        dataclasses.replace(data, x_test=pixel),
        dataclasses.replace(data, classes=4),
        dataclasses.replace(data, x_train=data.x_train.view(40, 1, 8, 32), x_test=data.x_test.view(12, 1, 8, 32)),
        data.take(39),
    ]
    result = {fingerprint(other) for other in [data, *others]}
    assert len(result) == 6
    assert fingerprint(blobs()) == fingerprint(dataclasses.replace(data, name="another name"))
