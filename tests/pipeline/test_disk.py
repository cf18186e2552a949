"""A file is there as a whole, or nothing is; what it holds is read once while it is what it was."""

import pytest

from pipeline.disk import Unchanged, whole_file
from pipeline.errors import StorageError


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


def test_what_is_in_a_file_is_made_of_it_once_until_it_is_another(tmp_path):
    made = []
    length = Unchanged(lambda file: made.append(file.name) or len(file.read_text()), most=2)
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    for file, text in ((one, "a"), (two, "ab"), (three, "abc")):
        file.write_text(text)
    assert [length(one), length(one), length(two), length(two)] == [1, 1, 2, 2]
    assert made == ["one", "two"]
    one.write_text("abcd")
    assert [length(one), length(two), length(one)] == [4, 2, 4]
    assert made == ["one", "two", "one"]
    length.learn(three, 30)
    assert length(three) == 30, "whoever has written it knows"
    assert made == ["one", "two", "one"]
    length(two), length(two)
    assert made[3:] == ["two"], "of three files the first of them was given up"
    one.unlink()
    with pytest.raises(FileNotFoundError):
        length(one)


def test_what_cannot_be_read_is_tried_again(tmp_path):
    number = Unchanged(lambda file: int(file.read_text()), most=2)
    (tmp_path / "n").write_text("x")
    for _ in range(2):
        with pytest.raises(ValueError, match="invalid literal"):
            number(tmp_path / "n")
