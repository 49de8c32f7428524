import pytest

from bt_fast.lab.files import append_line, replacing, whole_lines, write_text


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "summary.json"
    write_text(path, "old")
    write_text(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"old")

    def write_half():
        with replacing(path) as file:
            file.write(b"half of the new")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_half()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_last_line_that_was_cut_off_is_no_whole_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert whole_lines(path) == []
    append_line(path, '{"loss": 1}')
    append_line(path, '{"who": "\u2028"}')
    both = ['{"loss": 1}', '{"who": "\u2028"}']
    assert whole_lines(path) == both
    with path.open("ab") as file:
        file.write('{"who": "ö'.encode()[:-1])
    assert whole_lines(path) == both
