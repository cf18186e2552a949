import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.journal import Journal

ENTRIES = [["a", 1, [0.1, -1e-300]], {"text": "two\nlines \ud800 😀"}, None, "", [[]]]
FLOAT32 = st.floats(width=32, allow_nan=False)


def read(path, under=None):
    with Journal(path, under) as journal:
        return list(journal.entries())


def written(path, *entries, under=None):
    with Journal(path, under) as journal:
        for entry in entries:
            journal.add(entry)
    return path


def test_what_was_added_is_read_back_in_order_by_the_next_try(tmp_path):
    path = written(tmp_path / "a", *ENTRIES)
    assert read(path) == ENTRIES
    assert read(written(path, "more")) == [*ENTRIES, "more"]
    assert read(tmp_path / "new") == []


@given(st.lists(FLOAT32, max_size=20))
def test_floats_are_read_back_bit_for_bit(tmp_path_factory, numbers):
    (found,) = read(written(tmp_path_factory.mktemp("floats") / "a", numbers))
    assert struct.pack(f"{len(numbers)}d", *found) == struct.pack(f"{len(numbers)}d", *numbers)


def test_a_file_cut_off_anywhere_holds_the_lines_before_and_takes_others(tmp_path):
    whole = written(tmp_path / "whole", *ENTRIES).read_bytes()
    ends = [0, *(place + 1 for place, byte in enumerate(whole) if byte == ord("\n"))]
    for length in range(len(whole)):
        path = tmp_path / "cut"
        path.write_bytes(whole[:length])
        kept = [entry for entry, end in zip(ENTRIES, ends[1:], strict=True) if end - 1 <= length]
        assert read(path) == kept
        path.write_bytes(whole[:length])
        assert read(written(path, "next")) == [*kept, "next"]


@pytest.mark.parametrize("place", [0, 3, 17, 20])
def test_a_damaged_line_is_passed_over(tmp_path, place):
    path = written(tmp_path / "a", "one", "two", "three")
    lines = path.read_bytes().splitlines(keepends=True)
    second = bytearray(lines[1])
    second[place] ^= 1
    path.write_bytes(lines[0] + bytes(second) + lines[2])
    assert read(path) == ["one", "three"]


def test_lines_under_something_else_are_passed_over(tmp_path):
    path = written(tmp_path / "a", "old", under={"version": "1"})
    written(path, "new", under={"version": "2", "dtype": "float32"})
    assert read(path, {"dtype": "float32", "version": "2"}) == ["new"]
    assert read(path, {"version": "1"}) == ["old"]
    assert read(path) == []


def test_a_line_is_in_the_file_as_soon_as_it_is_added(tmp_path):
    """A process that is killed closes nothing."""
    journal = Journal(tmp_path / "a")
    journal.add([1.5])
    (line,) = (tmp_path / "a").read_text().splitlines()
    assert json.loads(line.partition(" ")[2]) == [1.5]
    journal.close()
