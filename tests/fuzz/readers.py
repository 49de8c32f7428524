"""Fuzz targets for every reader of files, and valid files to start from."""

import argparse
import contextlib
import gzip
import io
import json
import pickle
import shutil
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from benchmarks import compare
from bt_fast.lab.checkpoint import load_checkpoint, read_tensors
from bt_fast.lab.config import PRESETS, RunConfig
from bt_fast.lab.corruptions import CORRUPTIONS, CorruptedTestSet
from bt_fast.lab.data import load_dataset
from bt_fast.lab.html_report.loading import load_runs
from bt_fast.lab.methods import Method
from bt_fast.lab.models import load_published
from bt_fast.lab.training import Run
from tests.fuzz.campaign import Case, UnlawfulError

FORBIDDEN = ("os.system", "subprocess.Popen", "os.posix_spawn", "os.fork", "os.exec", "os.remove", "os.rename")
FORBIDDEN += ("socket.connect", "shutil.rmtree", "os.mkdir", "pickle.find_class")
STEM = "subject"


@dataclass(frozen=True)
class Reader:
    """A reader of files and how to call it on given bytes.

    Attributes:
        read: called with a folder that contains the other files it needs.
        place: writes the bytes into that folder.
        seeds: valid files, to be mutated.
        names: an error's message must contain one of these words.
    """

    read: Callable[[Path], object]
    place: Callable[[Path, bytes], object]
    seeds: list[bytes]
    names: tuple[str, ...]


class ExecutedError(UnlawfulError):
    """Raised when code from a file is executed."""


class Watch:
    """An audit hook that raises when a reader does something that no reader needs."""

    def __init__(self):
        self.on = False
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        if self.on and (event in FORBIDDEN or (event == "open" and _writes(arguments))):
            self.on = False
            raise ExecutedError(f"{event} {arguments!r}")


def _writes(arguments):
    path, mode, _ = arguments
    return isinstance(mode, str) and any(c in mode for c in "wax+") and not str(path).startswith("/dev/null")


WATCH = Watch()


def sing(*_):
    """The function that the corpus's malicious files call."""
    raise ExecutedError("a function was called by a pickle")


class Canary:
    """An object that pickles as a call of `sing`."""

    def __reduce__(self):
        return sing, ()


FOLDERS: dict[str, Path] = {}


def case_of(name: str, data: bytes) -> Case:
    """Returns the case that reads these bytes."""
    reader = READERS[name]
    folder = folder_of(name)
    reader.place(folder, data)

    def read():
        WATCH.on = True
        try:
            return reader.read(folder)
        finally:
            WATCH.on = False

    return Case(read, (*reader.names, str(folder)), data[:200])


def folder_of(name: str) -> Path:
    """Returns a folder in memory with the other files."""
    if name not in FOLDERS:
        memory = Path("/dev/shm")
        FOLDERS[name] = Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory if memory.is_dir() else None))
        for seed in READERS[name].seeds[:1]:
            prepare = PREPARE.get(name)
            if prepare:
                prepare(FOLDERS[name])
            READERS[name].place(FOLDERS[name], seed)
    return FOLDERS[name]


def clean_up() -> None:
    """Removes the folders."""
    for folder in FOLDERS.values():
        shutil.rmtree(folder, ignore_errors=True)
    FOLDERS.clear()


def file_in(*parts: str) -> Callable[[Path, bytes], object]:
    def place(folder: Path, data: bytes) -> None:
        folder.joinpath(*parts).write_bytes(data)

    return place


def member_in(file: str, member: str, others: dict[str, bytes]) -> Callable[[Path, bytes], object]:
    """Writes the bytes as a member of a valid zip archive."""

    def place(folder: Path, data: bytes) -> None:
        with zipfile.ZipFile(folder / file, "w") as archive:
            for name, content in (others | {member: data}).items():
                archive.writestr(name, content)

    return place


# Valid files


def bytes_of(write: Callable[[io.BytesIO], object]) -> bytes:
    with contextlib.closing(io.BytesIO()) as file:
        write(file)
        return file.getvalue()


def saved(content: object) -> bytes:
    return bytes_of(lambda file: torch.save(content, file))


def members_of(archive: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def npy(array: np.ndarray) -> bytes:
    return bytes_of(lambda file: np.save(file, array))


def npz(**arrays: np.ndarray) -> bytes:
    return bytes_of(lambda file: np.savez(file, **arrays))


MODEL = torch.nn.Linear(2, 3)
CONFIG = PRESETS["digits"]
STATE = {"iteration": 3, "contestants": {m: {"model": MODEL.state_dict()} for m in CONFIG.methods}}
CHECKPOINT = saved({"bt_fast": 1, "config": CONFIG.to_json(), "state": STATE})
ATTACKER = {f"module.model.{name}": tensor for name, tensor in MODEL.state_dict().items()}
ATTACKER |= {"module.normalizer.new_mean": torch.rand(3, 1, 1), "module.normalizer.new_std": torch.ones(3, 1, 1)}
MEMBERS = members_of(CHECKPOINT)
PICKLE = next(name for name in MEMBERS if name.endswith("data.pkl"))
MALICIOUS = pickle.dumps({"bt_fast": 1, "config": Canary(), b"data": Canary(), b"labels": [Canary()]}, protocol=2)

IMAGES = np.arange(2 * 4, dtype=np.uint8).reshape(2, 2, 2)
LABELS = np.array([1, 7], dtype=np.uint8)
MNIST = {
    "train-images-idx3-ubyte": idx(IMAGES),
    "train-labels-idx1-ubyte": idx(LABELS),
    "t10k-images-idx3-ubyte": idx(IMAGES),
    "t10k-labels-idx1-ubyte": idx(LABELS),
}
RECORD = bytes([3]) + bytes(3072)
CIFAR10 = {f"data_batch_{i}.bin": RECORD for i in range(1, 6)} | {"test_batch.bin": RECORD}
BATCH = pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [3]}, protocol=2)
CIFAR10_PYTHON = {f"data_batch_{i}": BATCH for i in range(1, 6)} | {"test_batch": BATCH}
CIFAR100 = {"train.bin": bytes([1, 5]) + bytes(3072), "test.bin": bytes([1, 5]) + bytes(3072)}
NPZ = {"x_train": IMAGES, "y_train": LABELS.astype(np.int64), "x_test": IMAGES / 255.0, "y_test": LABELS}
ARRAYS = {f"{name}.npy": npy(array) for name, array in NPZ.items()}
CORRUPTED = {f"{name}.npy": npy(np.zeros((5, 2, 2, 3), np.uint8)) for name in CORRUPTIONS}
CORRUPTED["labels.npy"] = npy(np.zeros(5, np.int64))

METHOD = {
    "label": "TRADES + BulletTrain",
    "clean": 0.9,
    "robust": 0.5,
    "attack": "PGD-20 x 1",
    "seconds": 12.5,
    "iteration_seconds": 0.1,
    "forward_passes": 15.0,
    "theoretical_speedup": 2.1,
    "speedup": {"reference": 2.0},
    "fractions": {"boundary": 0.3, "robust": 0.5, "outlier": 0.2},
    "joules": None,
}
SUMMARY = {"config": json.loads(CONFIG.to_json()), "machine": {"torch": "2"}, "methods": {"bullet": METHOD}}
RECORDS = [
    {"iteration": 1, "kind": "fractions", "boundary": 1, "robust": 0, "outlier": 0, "robust_fraction": 0.0},
    {"iteration": 2, "kind": "allocation", "threshold": 0.1, "svar": [0.1, -0.1], "steps": [10, 0], "method": "bullet"},
    {"iteration": 3, "kind": "epoch", "epoch": 1, "clean": 0.9, "robust": 0.5, "seconds": 1.0, "method": "bullet"},
    {"iteration": 3, "kind": "corruptions", "method": "bullet", "robust": 0.4},
]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
PROVENANCE = {
    "format": 1,
    "config": json.loads(CONFIG.to_json()) | {"methods": ["bullet"]},
    "data": {"sha256": "00"},
    "starts": [{"machine": {"torch": "2"}}],
}
MADE_OF = {"seed": 0, "images": ["00" * 8]}
BENCHMARKS = {
    "benchmarks": [
        {
            "fullname": "test[a]",
            "extra_info": {"seconds": {"ours": [0.1, 0.2, 0.3, 0.2], "theirs": [0.2, 0.2, 0.4, 0.3]}, "flops": 12},
            "stats": {"median": 0.2, "iqr": 0.1, "rounds": 4, "data": [0.1, 0.2, 0.3, 0.2]},
        },
        {"fullname": "test[b]", "stats": {"median": 0.2, "iqr": 0.1, "rounds": 9}},
    ]
}
EXTREME_JSON = [
    b"[" * 5000,
    b'{"a":' * 5000,
    b"1" * 5000,
    b"1e999",
    b'{"kind": NaN}',
    b"\xff\xfe",
    b"null",
    b"[]",
    b"{}",
]


def as_json(content: object) -> bytes:
    return json.dumps(content).encode()


# Readers


def put_all(files: dict[str, bytes]) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        for name, content in files.items():
            (folder / name).write_bytes(content)

    return prepare


def read_text(parse: Callable[[str], object]) -> Callable[[Path], object]:
    return lambda folder: parse((folder / STEM).read_text(errors="surrogateescape"))


def published(folder: Path) -> None:
    model = torch.nn.Linear(2, 3)
    before = [p.detach().clone() for p in model.parameters()]
    try:
        load_published(model, folder / STEM)
    except ValueError:
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert same, "the model was changed by a file that was refused"
        raise


def run_records(folder: Path) -> object:
    records = Run.records(SimpleNamespace(_metrics_path=folder / STEM))
    assert all(isinstance(record, dict) for record in records)
    return records


def corrupted(folder: Path) -> object:
    test_set = CorruptedTestSet(folder)
    images, labels = test_set.severity("fog", 5)
    assert (images.dtype, len(images)) == (torch.uint8, len(labels))
    return test_set


def unfinished(folder: Path) -> object:
    """Loads a run without a summary, with these bytes as its description or records."""
    (run,) = load_runs([folder])
    assert run.unfinished
    assert [result.name for result in run.results] == list(run.config["methods"])
    return run


SUBJECT = file_in(STEM)
PREPARE: dict[str, Callable[[Path], None]] = {
    "mnist images": put_all(MNIST),
    "mnist labels": put_all(MNIST),
    "mnist gz": put_all({k: v for k, v in MNIST.items() if "train-images" not in k}),
    "cifar10 binary": put_all(CIFAR10),
    "cifar10 python": put_all(CIFAR10_PYTHON),
    "cifar100 binary": put_all(CIFAR100),
    "corrupted images": put_all(CORRUPTED),
    "corrupted labels": put_all(CORRUPTED),
    "report records": put_all({"summary.json": as_json(SUMMARY)}),
    "report summary": put_all({"metrics.jsonl": LINES}),
    "unfinished run": put_all({"metrics.jsonl": LINES, "checkpoint.pt": b""}),
    "unfinished records": put_all({"run.json": as_json(PROVENANCE), "checkpoint.pt": b""}),
    "corrupted, made of": put_all(CORRUPTED),
}
READERS = {
    "read_tensors": Reader(
        lambda f: read_tensors(f / STEM),
        SUBJECT,
        [CHECKPOINT, saved(torch.rand(2)), MALICIOUS, pickle.dumps([1])],
        (STEM,),
    ),
    "load_checkpoint": Reader(
        lambda f: load_checkpoint(f / STEM),
        SUBJECT,
        [CHECKPOINT, saved([1]), saved({"bt_fast": torch.rand(2)}), saved({"bt_fast": 1, "config": 3, "state": 1})],
        (STEM,),
    ),
    "checkpoint pickle": Reader(
        lambda f: load_checkpoint(f / STEM),
        member_in(STEM, PICKLE, MEMBERS),
        [MEMBERS[PICKLE], MALICIOUS, pickle.dumps({"bt_fast": 1, "config": CONFIG.to_json(), "state": {}}, protocol=2)],
        (STEM,),
    ),
    "published checkpoint": Reader(
        published,
        SUBJECT,
        [
            saved(MODEL.state_dict()),
            saved({"state_dict": MODEL.state_dict()}),
            saved({"weight": torch.ones(3, 2)}),
            saved(
                {"net": ATTACKER, "ema": MODEL.state_dict(), "args": argparse.Namespace(lr=0.1), "best": np.float64(1)}
            ),
        ],
        (STEM,),
    ),
    "run configuration": Reader(
        read_text(RunConfig.from_json),
        SUBJECT,
        [CONFIG.to_json().encode(), *EXTREME_JSON],
        ("configuration", "method", "methods"),
    ),
    "method": Reader(
        read_text(Method.parse),
        SUBJECT,
        [b"bullet", b"bullet-bf16,robust-steps=0,metric=margin", b"yopo-2-5", b"fast-3,step-size=0.1", b"fast-0"],
        ("method",),
    ),
    "mnist images": Reader(
        lambda f: load_dataset("mnist", f), file_in("t10k-images-idx3-ubyte"), [idx(IMAGES), idx(LABELS)], ("mnist",)
    ),
    "mnist labels": Reader(
        lambda f: load_dataset("mnist", f), file_in("train-labels-idx1-ubyte"), [idx(LABELS), idx(IMAGES)], ("mnist",)
    ),
    "mnist gz": Reader(
        lambda f: load_dataset("mnist", f),
        file_in("train-images-idx3-ubyte.gz"),
        [gzip.compress(idx(IMAGES))],
        ("mnist",),
    ),
    "cifar10 binary": Reader(lambda f: load_dataset("cifar10", f), file_in("test_batch.bin"), [RECORD, RECORD * 2], ()),
    "cifar100 binary": Reader(lambda f: load_dataset(str(f)), file_in("train.bin"), [bytes([1, 5]) + bytes(3072)], ()),
    "cifar10 python": Reader(
        lambda f: load_dataset("cifar10", f),
        file_in("data_batch_2"),
        [BATCH, MALICIOUS, pickle.dumps({b"data": 1})],
        (),
    ),
    "npz": Reader(
        lambda f: load_dataset(str(f / "a.npz")), file_in("a.npz"), [npz(**NPZ), npz(x=IMAGES), MALICIOUS], ("a",)
    ),
    "npz images": Reader(
        lambda f: load_dataset(str(f / "a.npz")),
        member_in("a.npz", "x_train.npy", ARRAYS),
        [npy(IMAGES), npy(IMAGES / 255.0), npy(IMAGES[..., None]), npy(np.array([Canary()], dtype=object)), b"text"],
        ("a",),
    ),
    "npz labels": Reader(
        lambda f: load_dataset(str(f / "a.npz")),
        member_in("a.npz", "y_test.npy", ARRAYS),
        [
            npy(LABELS),
            npy(LABELS.astype(">i8")),
            npy(np.zeros((2, 2), np.int32)),
            npy(np.full(2, 2**63, np.uint64)),
            b"",
        ],
        ("a",),
    ),
    "npz without suffixes": Reader(
        lambda f: load_dataset(str(f / "a.npz")),
        member_in("a.npz", "x_train", {k: v for k, v in ARRAYS.items() if k != "x_train.npy"}),
        [npy(IMAGES), b"text", b""],
        ("a",),
    ),
    "corrupted images": Reader(
        corrupted, file_in("fog.npy"), [npy(np.zeros((5, 2, 2, 3), np.uint8)), npy(np.array([Canary()])), MALICIOUS], ()
    ),
    "corrupted labels": Reader(
        corrupted, file_in("labels.npy"), [npy(np.zeros(5, np.int64)), npy(np.zeros(5)), npz(**NPZ)], ()
    ),
    "corrupted, made of": Reader(
        corrupted, file_in("made.json"), [as_json(MADE_OF), as_json({"seed": True}), *EXTREME_JSON], ("made.json",)
    ),
    "unfinished run": Reader(
        unfinished,
        file_in("run.json"),
        [as_json(PROVENANCE), as_json(PROVENANCE | {"starts": [3]}), *EXTREME_JSON],
        ("run.json",),
    ),
    "unfinished records": Reader(
        unfinished, file_in("metrics.jsonl"), [LINES, *(e + b"\n" for e in EXTREME_JSON)], ("metrics.jsonl", "run")
    ),
    "run records": Reader(run_records, SUBJECT, [LINES, *(e + b"\n" for e in EXTREME_JSON)], (STEM,)),
    "report summary": Reader(
        lambda f: load_runs([f]), file_in("summary.json"), [as_json(SUMMARY), *EXTREME_JSON], ("summary.json",)
    ),
    "report records": Reader(
        lambda f: load_runs([f]),
        file_in("metrics.jsonl"),
        [LINES, *(e + b"\n" for e in EXTREME_JSON)],
        ("metrics.jsonl",),
    ),
    "benchmark results": Reader(
        lambda f: compare.compare(compare.read(f / STEM), compare.read(f / STEM)).lines,
        SUBJECT,
        [as_json(BENCHMARKS), *EXTREME_JSON],
        (STEM,),
    ),
}
