import gzip
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bt_fast.lab.data import ImageDataset, images, load_dataset, minibatches

ROOT = Path(__file__).parents[2]
EMBEDDED = ROOT / "bt_fast" / "lab" / "mnist_subset.npz"
ORIGINAL = ROOT.parent / "shared" / "data" / "mnist.npz"
IDX_NAMES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}
CIFAR_STEMS = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


# Small data sets, and a writer of each format


def made_up(shape=(6, 5), train=12, test=4, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "x_train": rng.integers(0, 256, (train, *shape), dtype=np.uint8),
        "y_train": rng.integers(0, 10, train, dtype=np.uint8),
        "x_test": rng.integers(0, 256, (test, *shape), dtype=np.uint8),
        "y_test": rng.integers(0, 10, test, dtype=np.uint8),
    }


def idx_bytes(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder, arrays, dot=False, gz=False):
    folder.mkdir(parents=True, exist_ok=True)
    for key, array in arrays.items():
        name = IDX_NAMES[key].replace("-idx", ".idx") if dot else IDX_NAMES[key]
        content = idx_bytes(array)
        (folder / (name + ".gz" * gz)).write_bytes(gzip.compress(content, 1) if gz else content)


def cifar_batches(n=2):
    rng = np.random.default_rng(1)
    return {
        stem: (rng.integers(0, 256, (n, 3072), dtype=np.uint8), rng.integers(0, 10, n).tolist()) for stem in CIFAR_STEMS
    }


def write_cifar_binary(folder, batches):
    folder.mkdir(parents=True, exist_ok=True)
    for stem, (data, labels) in batches.items():
        records = np.concatenate([np.array(labels, np.uint8)[:, None], data], axis=1)
        (folder / f"{stem}.bin").write_bytes(records.tobytes())


def python_2_pickle(data, labels):
    """Writes, opcode by opcode, the pickle of Python 2 and numpy 1 in the published cifar-10-batches-py."""
    rows, columns = (b"M" + struct.pack("<H", size) for size in data.shape)
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    values = b"T" + struct.pack("<i", data.size) + data.tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    array += b"(K\x01" + rows + columns + b"\x86" + dtype + b"\x89" + values + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([y]) for y in labels) + b"e"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels" + numbers + b"u."


def python_3_pickle(data, labels):
    return pickle.dumps({b"data": data, b"labels": labels}, protocol=2)


def python_3_pickle_of_protocol_5(data, labels):
    return pickle.dumps({b"data": data, b"labels": labels}, protocol=5)


def numpy_1_pickle_of_protocol_5(data, labels):
    """Writes a pickle with the module name that numpy used before 2.0."""
    content = python_3_pickle_of_protocol_5(data, labels)
    if b"numpy._core" not in content:
        return content
    assert content[2:3] == b"\x95"  # a frame, and its length
    (length,) = struct.unpack("<Q", content[3:11])
    renamed = content[11:].replace(b"\x13numpy._core.numeric", b"\x12numpy.core.numeric")
    return content[:3] + struct.pack("<Q", length - 1) + renamed


def write_cifar_python(folder, batches, pickled=python_2_pickle):
    folder.mkdir(parents=True, exist_ok=True)
    for stem, (data, labels) in batches.items():
        (folder / stem).write_bytes(pickled(data, labels))


def write_npz(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def assert_holds(dataset, arrays):
    for key, array in arrays.items():
        result = getattr(dataset, key)
        assert result.dtype == (torch.uint8 if key.startswith("x") else torch.int64)
        assert torch.equal(result, torch.from_numpy(array.astype(result.numpy().dtype))), key


def assert_holds_cifar(dataset, batches):
    x = np.concatenate([data for data, _ in batches.values()]).reshape(-1, 3, 32, 32)
    y = np.concatenate([np.array(labels) for _, labels in batches.values()])
    n = len(batches["test_batch"][1])
    halves = {"x_train": x[:-n], "y_train": y[:-n], "x_test": x[-n:], "y_test": y[-n:]}
    assert_holds(dataset, halves)
    assert dataset.classes == 10


def error_of(source, data_dir=Path("data")):
    with pytest.raises(ValueError) as caught:
        load_dataset(str(source), data_dir)
    return str(caught.value)


# MNIST's IDX files


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("dot", [False, True])
@pytest.mark.parametrize("below", ["", "MNIST/raw", "mnist"])
def test_mnist_is_read_exactly_from_every_folder_and_spelling(tmp_path, below, dot, gz):
    arrays = made_up()
    write_idx(tmp_path / below, arrays, dot, gz)
    dataset = load_dataset("mnist", tmp_path)
    assert_holds(dataset, {k: a[:, None] if k.startswith("x") else a for k, a in arrays.items()})
    assert (dataset.name, dataset.classes) == ("mnist", 10)


def test_missing_mnist_files_are_listed_with_the_folders_searched(tmp_path):
    write_idx(tmp_path / "mnist", made_up())
    (tmp_path / "mnist" / IDX_NAMES["y_test"]).unlink()
    lines = error_of("mnist", tmp_path).splitlines()
    assert f"in {tmp_path}: no {', '.join(IDX_NAMES.values())}" in lines[1]
    assert f"in {tmp_path / 'MNIST' / 'raw'}: no {IDX_NAMES['x_train']}" in lines[2]
    assert lines[3].endswith(f"in {tmp_path / 'mnist'}: no {IDX_NAMES['y_test']}")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda b: b[:-1], ["found 375 bytes", "expected 376", "[12, 6, 5]"]),
        (lambda b: b + b"\0", ["found 377 bytes", "expected 376"]),
        (lambda b: b[:3], ["found 3 bytes", "expected at least 16"]),
        (lambda b: b"", ["found 0 bytes", "nothing", "expected at least 16"]),
        (lambda b: b"\0\0\x0d\3" + b[4:], ["begin with 00 00 0d 03", "begin with 00 00 08 03"]),
        (lambda b: b[:4] + b"\xff" * 12 + b[16:], ["found 376 bytes", "[4294967295, 4294967295, 4294967295]"]),
        (lambda b: b[:4] + b"\0" * 12, ["[0, 1, 0, 0]", "none of them 0"]),
    ],
    ids=["truncated", "trailing", "header_cut", "empty", "wrong_magic", "huge_sizes", "no_images"],
)
@pytest.mark.parametrize("gz", [False, True])
def test_spoilt_idx_file_is_named_in_the_error_with_found_and_expected(tmp_path, spoil, said, gz):
    write_idx(tmp_path, made_up(), gz=gz)
    path = tmp_path / (IDX_NAMES["x_train"] + ".gz" * gz)
    spoilt = spoil(idx_bytes(made_up()["x_train"]))
    path.write_bytes(gzip.compress(spoilt) if gz else spoilt)
    message = error_of("mnist", tmp_path)
    for part in (str(path), *said):
        assert part in message


@pytest.mark.parametrize("spoil", [lambda b: b[:-9], lambda b: b[:40] + b"spoilt" + b[46:], lambda b: b + b"more"])
def test_spoilt_gz_file_is_named_in_the_error(tmp_path, spoil):
    write_idx(tmp_path, made_up(), gz=True)
    path = tmp_path / (IDX_NAMES["y_test"] + ".gz")
    path.write_bytes(spoil(path.read_bytes()))
    message = error_of("mnist", tmp_path)
    assert str(path) in message
    assert "expected a whole gzip file" in message


def test_idx_label_out_of_range_is_blamed_on_its_file(tmp_path):
    arrays = made_up()
    arrays["y_test"][2] = 10
    write_idx(tmp_path, arrays)
    message = error_of("mnist", tmp_path)
    assert IDX_NAMES["y_test"] in message
    assert "to 10, expected them within 0..9" in message


def test_idx_images_and_labels_of_different_number_are_refused(tmp_path):
    arrays = made_up()
    write_idx(tmp_path, arrays | {"y_train": arrays["y_train"][:-1]})
    message = error_of("mnist", tmp_path)
    assert f"{IDX_NAMES['y_train']}: found torch.int64 [11], expected torch.int64 [12]" in message


@settings(deadline=None, max_examples=30)
@given(
    shape=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    counts=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 2**32 - 1),
    gz=st.booleans(),
)
def test_any_idx_data_comes_back_exactly(tmp_path_factory, shape, counts, seed, gz):
    folder = tmp_path_factory.mktemp("idx")
    arrays = made_up(shape, *counts, seed)
    write_idx(folder, arrays, gz=gz)
    dataset = load_dataset(str(folder))
    assert_holds(dataset, {k: a[:, None] if k.startswith("x") else a for k, a in arrays.items()})


@settings(deadline=None, max_examples=60)
@given(key=st.sampled_from(sorted(IDX_NAMES)), gz=st.booleans(), where=st.floats(0, 1, exclude_max=True))
def test_an_idx_file_cut_at_any_byte_is_named_in_the_error(tmp_path_factory, key, gz, where):
    folder = tmp_path_factory.mktemp("idx")
    write_idx(folder, made_up(), gz=gz)
    path = folder / (IDX_NAMES[key] + ".gz" * gz)
    path.write_bytes(path.read_bytes()[: int(where * path.stat().st_size)])
    assert str(path) in error_of("mnist", folder)


# CIFAR-10


@pytest.mark.parametrize("below", ["", "cifar-10-batches-bin"])
def test_the_binary_version_of_cifar10_is_read_exactly(tmp_path, below):
    batches = cifar_batches()
    write_cifar_binary(tmp_path / below, batches)
    assert_holds_cifar(load_dataset("cifar10", tmp_path), batches)


@pytest.mark.parametrize(
    "pickled", [python_2_pickle, python_3_pickle, python_3_pickle_of_protocol_5, numpy_1_pickle_of_protocol_5]
)
@pytest.mark.parametrize("below", ["", "cifar-10-batches-py"])
def test_the_python_version_of_cifar10_is_read_exactly(tmp_path, below, pickled):
    batches = cifar_batches()
    write_cifar_python(tmp_path / below, batches, pickled)
    assert_holds_cifar(load_dataset("cifar10", tmp_path), batches)


def cifar100_halves(n=3):
    rng = np.random.default_rng(2)
    fine = {half: [0, 99, *rng.integers(0, 100, n - 2).tolist()] for half in ("train", "test")}
    return {half: (rng.integers(0, 256, (n, 3072), dtype=np.uint8), labels) for half, labels in fine.items()}


def assert_holds_cifar100(dataset, halves):
    assert dataset.classes == 100
    for half, (data, labels) in halves.items():
        assert torch.equal(getattr(dataset, f"x_{half}"), torch.from_numpy(data.reshape(-1, 3, 32, 32)))
        assert getattr(dataset, f"y_{half}").tolist() == labels


@pytest.mark.parametrize("below", ["", "cifar-100-binary"])
def test_the_binary_version_of_cifar100_is_read_exactly_with_its_fine_labels(tmp_path, below):
    halves, folder = cifar100_halves(), tmp_path / below
    folder.mkdir(exist_ok=True)
    for half, (data, labels) in halves.items():
        coarse, fine = np.full((len(data), 1), 7, np.uint8), np.array(labels, np.uint8)[:, None]
        (folder / f"{half}.bin").write_bytes(np.concatenate([coarse, fine, data], axis=1).tobytes())
    assert_holds_cifar100(load_dataset("cifar100", tmp_path), halves)
    assert_holds_cifar100(load_dataset(str(tmp_path)), halves)


@pytest.mark.parametrize("below", ["", "cifar-100-python"])
def test_the_python_version_of_cifar100_is_read_exactly_with_its_fine_labels(tmp_path, below):
    halves, folder = cifar100_halves(), tmp_path / below
    folder.mkdir(exist_ok=True)
    for half, (data, labels) in halves.items():
        content = {b"data": data, b"fine_labels": labels, b"coarse_labels": [7] * len(data)}
        (folder / half).write_bytes(pickle.dumps(content, protocol=2))
    assert_holds_cifar100(load_dataset("cifar100", tmp_path), halves)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [1]}, r"expected a dict with the keys .* b'fine_labels'"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"fine_labels": [100]}, r"b'fine_labels': found \[100\].* 0..99"),
    ],
)
def test_a_cifar100_pickle_with_wrong_content_is_named_in_the_error(tmp_path, content, said):
    for half in ("train", "test"):
        (tmp_path / half).write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match=said):
        load_dataset("cifar100", tmp_path)


def test_missing_cifar10_files_are_listed_with_the_folders_searched(tmp_path):
    write_cifar_binary(tmp_path / "cifar-10-batches-bin", cifar_batches())
    (tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin").unlink()
    message = error_of("cifar10", tmp_path)
    assert f"in {tmp_path / 'cifar-10-batches-bin'}: no data_batch_3.bin\n" in message
    assert f"in {tmp_path / 'cifar-10-batches-py'}: no {', '.join(CIFAR_STEMS)}\n" in message


@pytest.mark.parametrize("size", [0, 1, 3072, 2 * 3073 - 1, 2 * 3073 + 1])
def test_a_binary_cifar10_file_of_a_wrong_size_is_named_in_the_error(tmp_path, size):
    write_cifar_binary(tmp_path, cifar_batches())
    (tmp_path / "data_batch_4.bin").write_bytes(bytes(size))
    message = error_of("cifar10", tmp_path)
    assert f"data_batch_4.bin: found {size} bytes, expected a positive multiple of 3073" in message


def test_a_binary_cifar10_label_out_of_range_is_blamed_on_its_file(tmp_path):
    write_cifar_binary(tmp_path, cifar_batches())
    (tmp_path / "test_batch.bin").write_bytes(b"\x0b" + bytes(3072))
    assert "test_batch.bin: found labels from 11 to 11, expected" in error_of("cifar10", tmp_path)


ZEROS = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ([1, 2], "found list, expected a dict"),
        ({b"data": ZEROS}, "found keys [\"b'data'\"], expected a dict with the keys b'data' and b'labels'"),
        ({b"data": [0], b"labels": [0]}, "b'data': found list, expected an array, uint8 [n, 3072]"),
        ({b"data": ZEROS.astype("i4"), b"labels": [0, 1]}, "b'data': found an array of (1, (2, 3072), numpy('i4', "),
        ({b"data": ZEROS[:, 1:], b"labels": [0, 1]}, "b'data': found an array of (1, (2, 3071), numpy('u1', "),
        ({b"data": ZEROS[0], b"labels": [0, 1]}, "b'data': found an array of (1, (3072,), numpy('u1', "),
        ({b"data": ZEROS[:0], b"labels": []}, "b'data': found an array of (1, (0, 3072), numpy('u1', "),
        ({b"data": ZEROS, b"labels": [0, 10]}, "b'labels': found [0, 10], expected a list of integers"),
        ({b"data": ZEROS, b"labels": [0, 2**70]}, "b'labels': found [0, 1180591620717411303424], expected"),
        ({b"data": ZEROS, b"labels": [0, [1]]}, "b'labels': found [0, [1]], expected a list of integers"),
        ({b"data": ZEROS, b"labels": None}, "b'labels': found None, expected a list of integers"),
        ({b"data": ZEROS, b"labels": [0]}, "found torch.int64 [1], expected torch.int64 [2]"),
    ],
)
def test_a_cifar10_pickle_with_wrong_content_is_named_in_the_error(tmp_path, batch, said):
    write_cifar_python(tmp_path, cifar_batches())
    (tmp_path / "data_batch_2").write_bytes(pickle.dumps(batch, protocol=3))
    assert f"{tmp_path / 'data_batch_2'}: {said}" in error_of("cifar10", tmp_path)


@pytest.mark.parametrize("pickled", [python_3_pickle, python_3_pickle_of_protocol_5])
def test_a_cifar10_array_in_fortran_order_is_read_exactly(tmp_path, pickled):
    batches = cifar_batches()
    write_cifar_python(tmp_path, {k: (np.asfortranarray(x), y) for k, (x, y) in batches.items()}, pickled)
    assert_holds_cifar(load_dataset("cifar10", tmp_path), batches)


def replace_once(path, whole, spoilt):
    content = path.read_bytes()
    assert whole in content
    path.write_bytes(content.replace(whole, spoilt, 1))


def test_a_dtype_state_that_would_crash_numpy_is_never_handed_to_it(tmp_path):
    write_cifar_python(tmp_path, cifar_batches())
    replace_once(tmp_path / "data_batch_1", b"K\x03U\x01|NNN", b"K\x03U\x01|NN")
    assert_holds_cifar(load_dataset("cifar10", tmp_path), cifar_batches())


@pytest.mark.parametrize(
    ("whole", "spoilt"),
    [
        (b"M\x02\x00M\x00\x0c", b"M\xff\xffM\x00\x0c"),
        (b"K\x01M\x02\x00", b"K\x01N"),
        (b"U\x02u1", b"U\x01O"),
    ],
    ids=["more_rows_than_values", "no_number_of_rows", "objects"],
)
def test_a_spoilt_array_in_a_cifar10_pickle_is_named_in_the_error(tmp_path, whole, spoilt):
    write_cifar_python(tmp_path, cifar_batches())
    path = tmp_path / "data_batch_1"
    replace_once(path, whole, spoilt)
    assert f"{path}: b'data': found an array of" in error_of("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((2, 3071), np.uint8), "found an array of"),
        (np.zeros((2, 3072), np.int8), "found an array of"),
        (np.zeros((2, 3072), ">u2"), "found an array of"),
        (np.zeros((2, 6144), np.uint8)[:, ::2], None),
    ],
    ids=["too narrow", "signed", "wide", "strided"],
)
def test_a_protocol_5_array_of_another_kind_is_named_in_the_error(tmp_path, array, said):
    write_cifar_python(tmp_path, cifar_batches())
    (tmp_path / "data_batch_1").write_bytes(python_3_pickle_of_protocol_5(array, [0, 1]))
    if said is None:
        assert len(load_dataset("cifar10", tmp_path).x_train) == 2 + sum(
            len(y) for name, (_, y) in cifar_batches().items() if name not in ("data_batch_1", "test_batch")
        )
    else:
        assert f"{tmp_path / 'data_batch_1'}: b'data': {said}" in error_of("cifar10", tmp_path)


def test_a_protocol_5_array_with_too_few_bytes_is_named_in_the_error(tmp_path):
    write_cifar_python(tmp_path, cifar_batches())
    content = python_3_pickle_of_protocol_5(np.zeros((2, 3072), np.uint8), [0, 1])
    assert b"M\x00\x0c" in content
    (tmp_path / "data_batch_1").write_bytes(content.replace(b"K\x02M\x00\x0c", b"K\x09M\x00\x0c"))
    assert "data_batch_1: b'data': found an array of" in error_of("cifar10", tmp_path)


def test_a_folder_of_classes_says_what_would_be_read(tmp_path):
    for name in ("cat", "dog", "emu", "fox"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "1.png").write_bytes(b"")
    message = error_of(str(tmp_path / "train"))
    assert "it holds folders (cat, dog, emu, ...): images in a folder for each class are not read" in message
    assert "np.savez('images.npz', x_train=..., y_train=..., x_test=..., y_test=...)" in message


def test_a_folder_with_an_npz_says_to_give_the_file(tmp_path):
    write_npz(tmp_path / "mine.npz", **made_up())
    assert error_of(str(tmp_path)).endswith(f"give the file itself, as {tmp_path / 'mine.npz'}")


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("in_array", [False, True])
def test_a_malicious_cifar10_pickle_is_refused_and_not_executed(tmp_path, protocol, in_array):
    marker = tmp_path / "executed"
    evil = Malicious(marker)
    write_cifar_python(tmp_path, cifar_batches())
    batch = {b"data": np.array([evil], object) if in_array else evil, b"labels": [0]}
    (tmp_path / "test_batch").write_bytes(pickle.dumps(batch, protocol))
    message = error_of("cifar10", tmp_path)
    assert not marker.exists()
    assert str(tmp_path / "test_batch") in message
    assert f"forbidden global {os.system.__module__}.system" in message


@pytest.mark.parametrize(
    "name", ["builtins\neval", "numpy\nload", "numpy\nndarray.tofile", "numpy.core.multiarray\nscalar"]
)
def test_a_pickle_may_name_nothing_beyond_what_arrays_need(tmp_path, name):
    write_cifar_python(tmp_path, cifar_batches())
    (tmp_path / "test_batch").write_bytes(b"\x80\x02c" + name.encode() + b"\n.")
    assert f"forbidden global {name.replace(chr(10), '.')}" in error_of("cifar10", tmp_path)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_cifar10_pickle_cut_at_any_byte_is_named_in_the_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cifar")
    write_cifar_python(folder, cifar_batches(1))
    path = folder / "data_batch_1"
    whole = path.read_bytes()
    end = data.draw(st.integers(0, 220) | st.integers(len(whole) - 40, len(whole) - 1))
    path.write_bytes(whole[:end])
    assert str(path) in error_of("cifar10", folder)


# npz


@pytest.mark.parametrize(
    ("shape", "to_channels_first"),
    [
        ((6, 5), lambda x: x[:, None]),
        ((6, 5, 1), lambda x: x.transpose(0, 3, 1, 2)),
        ((6, 5, 3), lambda x: x.transpose(0, 3, 1, 2)),
        ((1, 6, 5), lambda x: x),
        ((3, 6, 5), lambda x: x),
    ],
)
def test_npz_is_read_exactly_in_every_layout(tmp_path, shape, to_channels_first):
    arrays = made_up(shape)
    arrays["y_train"][0] = 9
    dataset = load_dataset(write_npz(tmp_path / "mine.npz", **arrays))
    assert_holds(dataset, {k: to_channels_first(a) if k.startswith("x") else a for k, a in arrays.items()})
    assert (dataset.name, dataset.classes) == ("mine", 10)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_npz_floats_that_are_k_over_255_become_the_same_bytes(tmp_path, dtype):
    arrays = made_up((16, 16))
    arrays["x_train"][0] = np.arange(256).reshape(16, 16)
    floats = {k: (a / 255).astype(dtype) if k.startswith("x") else a for k, a in arrays.items()}
    dataset = load_dataset(write_npz(tmp_path / "floats.npz", **floats))
    assert_holds(dataset, {k: a[:, None] if k.startswith("x") else a for k, a in arrays.items()})


@pytest.mark.parametrize(
    ("images_found", "said"),
    [
        (np.full((4, 6, 5), 0.5, np.float32), "found floats whose 255-fold is up to 0.5 from an integer"),
        (np.full((4, 6, 5), 1.5), "found floats from 1.5 to 1.5, expected [0, 1]"),
        (np.full((4, 6, 5), -1.0), "found floats from -1 to -1, expected [0, 1]"),
        (np.full((4, 6, 5), np.nan), "found 120 NaN and 0 infinite of 120 values, expected [0, 1]"),
        (np.zeros((4, 6, 5), np.int64), "found int64, expected uint8, or float32 or float64"),
        (np.zeros((4, 6, 5), np.float16), "found float16, expected uint8, or float32 or float64"),
        (np.zeros((4, 3, 5, 1), np.uint8), "found [4, 3, 5, 1], where axes 1 and 3 could both be the channels"),
        (np.zeros((4, 2, 5, 4), np.uint8), "found [4, 2, 5, 4], where no axis can be the channels"),
        (np.zeros((4, 30), np.uint8), "found [4, 30], where no axis can be the channels"),
        (np.zeros((0, 6, 5)), "found torch.uint8 [0, 1, 6, 5], expected"),
        (np.zeros((4, 0, 5), np.uint8), "found torch.uint8 [4, 1, 0, 5], expected"),
    ],
)
def test_npz_images_of_a_wrong_kind_are_named_in_the_error(tmp_path, images_found, said):
    source = write_npz(tmp_path / "mine.npz", **made_up() | {"x_test": images_found})
    assert f"{source}: x_test: {said}" in error_of(source)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (np.array([0, -1, 2, 3]), "found labels from -1 to 3, expected them within 0..9"),
        (np.array([0.0, 1, 2, 3]), "found float64, expected integer labels"),
        (np.array([0, 1, 2]), "found torch.int64 [3], expected torch.int64 [4]"),
        (np.eye(4, dtype=int), "found torch.int64 [4, 4], expected torch.int64 [4]"),
        (np.array([], int), "found torch.int64 [0], expected torch.int64 [4]"),
    ],
)
def test_npz_labels_of_a_wrong_kind_are_named_in_the_error(tmp_path, labels, said):
    arrays = made_up() | {"y_test": labels}
    arrays["y_train"][0] = 9
    source = write_npz(tmp_path / "mine.npz", **arrays)
    assert f"{source}: y_test: {said}" in error_of(source)


def test_npz_with_missing_keys_says_which_it_has(tmp_path):
    source = write_npz(tmp_path / "mine.npz", x_train=np.zeros(1), labels=np.zeros(1))
    assert f"{source}: found x_train, labels, expected x_train, y_train, x_test, y_test" in error_of(source)


def test_npz_with_pickled_objects_is_refused_and_not_executed(tmp_path):
    marker = tmp_path / "executed"
    evil = np.array([Malicious(marker)], object)
    source = write_npz(tmp_path / "mine.npz", **made_up() | {"y_train": evil})
    assert source in error_of(source)
    assert not marker.exists()


def test_npz_with_a_spoilt_byte_is_named_in_the_error(tmp_path):
    source = write_npz(tmp_path / "mine.npz", **made_up((28, 28)))
    content = bytearray(Path(source).read_bytes())
    content[2000] ^= 1
    Path(source).write_bytes(content)
    message = error_of(source)
    assert f"{source}: found BadZipFile" in message
    assert "expected an npz of plain arrays" in message


@settings(deadline=None, max_examples=40)
@given(where=st.floats(0, 1, exclude_max=True))
def test_an_npz_cut_at_any_byte_is_named_in_the_error(tmp_path_factory, where):
    source = write_npz(tmp_path_factory.mktemp("npz") / "mine.npz", **made_up())
    content = Path(source).read_bytes()
    Path(source).write_bytes(content[: int(where * len(content))])
    assert source in error_of(source)


def test_npz_halves_with_different_image_shapes_are_refused(tmp_path):
    arrays = made_up() | {"x_test": np.zeros((4, 5, 6), np.uint8)}
    message = error_of(write_npz(tmp_path / "mine.npz", **arrays))
    assert "mine: x_test: found images of [1, 5, 6], expected [1, 6, 5]" in message


# Directories and names


def test_a_directory_is_recognised_by_its_files_and_gives_its_name(tmp_path):
    arrays, batches = made_up(), cifar_batches()
    write_idx(tmp_path / "fashion", arrays)
    write_cifar_binary(tmp_path / "small" / "cifar-10-batches-bin", batches)
    fashion, small = load_dataset(str(tmp_path / "fashion")), load_dataset(str(tmp_path / "small"))
    assert (fashion.name, small.name) == ("fashion", "small")
    assert_holds(fashion, {"y_train": arrays["y_train"]})
    assert_holds_cifar(small, batches)


def test_a_directory_with_two_data_sets_is_refused(tmp_path):
    write_idx(tmp_path, made_up())
    write_cifar_python(tmp_path, cifar_batches())
    assert f"{tmp_path}: found the files of MNIST and CIFAR-10" in error_of(tmp_path)


def test_a_directory_without_data_lists_what_was_looked_for(tmp_path):
    message = error_of(tmp_path)
    for name in (*IDX_NAMES.values(), *CIFAR_STEMS, *(f"{stem}.bin" for stem in CIFAR_STEMS)):
        assert name in message


@pytest.mark.parametrize("source", ["imagenet", "absent.npz", "present.txt"])
def test_an_unknown_source_is_reported_with_what_there_is(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    Path("present.txt").touch()
    assert f"{source}: found no such data, expected digits, mnist, cifar10, cifar100" in error_of(source)


# The embedded subset


def test_the_embedded_digits_are_balanced_and_need_no_data_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digits = load_dataset("digits")
    assert (digits.name, digits.classes) == ("digits", 10)
    assert list(digits.x_train.shape) == [5000, 1, 28, 28]
    assert list(digits.x_test.shape) == [1000, 1, 28, 28]
    assert torch.bincount(digits.y_train).tolist() == [500] * 10
    assert torch.bincount(digits.y_test).tolist() == [100] * 10


def test_the_embedded_digits_are_shuffled():
    digits = load_dataset("digits")
    assert torch.bincount(digits.take(train=500).y_train).min() > 25


@pytest.mark.skipif(not ORIGINAL.exists(), reason="the whole of MNIST is not here")
def test_the_embedded_digits_equal_the_originals_at_their_positions():
    with np.load(EMBEDDED) as subset, np.load(ORIGINAL) as original:
        for half in ("train", "test"):
            index = subset[f"{half}_index"]
            assert index.dtype == np.int32
            assert len(np.unique(index)) == len(index)
            for key in (f"x_{half}", f"y_{half}"):
                np.testing.assert_array_equal(subset[key], original[key][index])


# ImageDataset


def dataset_of(**changed):
    arrays = {
        "x_train": torch.zeros(4, 1, 2, 2, dtype=torch.uint8),
        "y_train": torch.tensor([0, 1, 2, 1]),
        "x_test": torch.zeros(2, 1, 2, 2, dtype=torch.uint8),
        "y_test": torch.tensor([2, 0]),
    }
    return ImageDataset("mine", **arrays | changed, classes=3)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"x_train": torch.zeros(4, 1, 2, 2)}, "x_train: found torch.float32 [4, 1, 2, 2], expected torch.uint8"),
        ({"x_test": torch.zeros(2, 2, 2).byte()}, "x_test: found torch.uint8 [2, 2, 2], expected torch.uint8"),
        ({"x_test": torch.zeros(0, 1, 2, 2).byte()}, "x_test: found torch.uint8 [0, 1, 2, 2], expected"),
        ({"x_test": torch.zeros(2, 3, 2, 2).byte()}, "x_test: found images of [3, 2, 2], expected [1, 2, 2]"),
        ({"y_train": torch.tensor([0, 1, 2])}, "y_train: found torch.int64 [3], expected torch.int64 [4]"),
        ({"y_train": torch.zeros(4).int()}, "y_train: found torch.int32 [4], expected torch.int64 [4]"),
        ({"y_test": torch.tensor([0, 3])}, "y_test: found labels from 0 to 3, expected them within 0..2"),
        ({"y_test": torch.tensor([-1, 0])}, "y_test: found labels from -1 to 0, expected them within 0..2"),
    ],
)
def test_a_wrong_array_is_named_when_the_dataset_is_made(changed, said):
    with pytest.raises(ValueError) as caught:
        dataset_of(**changed)
    assert f"mine: {said}" in str(caught.value)


def test_take_keeps_the_first_images_and_leaves_the_original_whole():
    whole = dataset_of()
    cut = whole.take(3, 1)
    assert (len(cut.x_train), len(cut.x_test)) == (3, 1)
    assert (cut.y_train.tolist(), cut.y_test.tolist()) == ([0, 1, 2], [2])
    assert (cut.name, cut.classes) == ("mine", 3)
    assert (len(whole.x_train), len(whole.x_test)) == (4, 2)


def test_take_none_keeps_all():
    cut = dataset_of().take(None, None)
    assert (len(cut.x_train), len(cut.x_test)) == (4, 2)


@pytest.mark.parametrize(("train", "test"), [(5, None), (None, 3), (0, None), (None, -1)])
def test_take_refuses_more_than_there_is_and_less_than_one(train, test):
    with pytest.raises(ValueError, match=r"mine: (train|test)=-?\d, expected 1 to the [42] images"):
        dataset_of().take(train, test)


def test_images_are_the_bytes_over_255_in_float32():
    batch = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x = images(batch, "cpu")
    assert x.dtype == torch.float32
    assert x.shape == batch.shape
    assert torch.equal(x, (batch.double() / 255).float())
    assert (x.min(), x.max()) == (0, 1)
    assert torch.equal(batch.flatten(), torch.arange(256, dtype=torch.uint8))


def test_images_refuses_floats():
    with pytest.raises(ValueError, match=r"found torch.float32, expected torch.uint8"):
        images(torch.zeros(1, 1, 2, 2), "cpu")


# minibatches


@settings(deadline=None)
@given(
    n=st.integers(1, 200),
    batch_size=st.integers(1, 60),
    seed=st.integers(0, 2**64),
    epoch=st.integers(0, 1000),
)
def test_minibatches_hold_every_index_once_and_only_the_last_may_be_smaller(n, batch_size, seed, epoch):
    batches = list(minibatches(n, batch_size, seed=seed, epoch=epoch))
    assert all(batch.dtype == torch.int64 for batch in batches)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= batch_size
    assert sorted(torch.cat(batches).tolist()) == list(range(n))


def order_of(seed, epoch, batch_size=7):
    return torch.cat(list(minibatches(50, batch_size, seed=seed, epoch=epoch))).tolist()


def test_the_order_depends_on_seed_and_epoch_only():
    first = order_of(1, 2)
    torch.manual_seed(5)
    torch.rand(3)
    assert order_of(1, 2, batch_size=50) == first
    others = [order_of(seed, epoch) for seed, epoch in ((1, 1), (1, 3), (2, 1), (2, 2), (1 + 2**32, 2), (3, 0))]
    assert all(other != first for other in others)
    assert len(set(map(tuple, others))) == len(others)


def test_minibatches_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    order_of(1, 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("wrong", [{"n": 0}, {"batch_size": 0}, {"batch_size": -1}, {"seed": -1}, {"epoch": -1}])
def test_minibatches_refuse_wrong_numbers_at_once(wrong):
    given = {"n": 4, "batch_size": 2, "seed": 0, "epoch": 0} | wrong
    with pytest.raises(ValueError, match="expected n and batch_size of at least 1"):
        minibatches(**given)
