"""A file is there as a whole, or nothing is."""

import pytest

from pipeline.errors import StorageError
from pipeline.whole import whole_file


def test_what_was_written_takes_the_name_and_directories_are_made(tmp_path):
    file = tmp_path / "new" / "rows.csv"
    with whole_file(file) as temporary:
        temporary.write_text("a")
        assert not file.exists()
    assert [path.name for path in file.parent.iterdir()] == ["rows.csv"] and file.read_text() == "a"


def test_after_an_error_the_old_file_stays_and_nothing_is_left_beside_it(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("old")
    with pytest.raises(KeyError), whole_file(file) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"] and file.read_text() == "old"


def test_where_nothing_was_written_nothing_is_there(tmp_path):
    with whole_file(tmp_path / "rows.csv"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(StorageError, match="cannot write") as told, whole_file(tmp_path / ("x" * 300)) as temporary:
        temporary.write_text("a")
    assert "x" * 300 in str(told.value)
