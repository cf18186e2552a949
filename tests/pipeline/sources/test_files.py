"""Files from outside: every format, the names things go by, and faults with their place."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.sources.files import ALIASES, find_columns, read, value

ROWS = [
    {"question": "1+1?", "answer": "2"},
    {"question": 'a "b", c\nd', "answer": "ü"},
    {"question": "", "answer": "x"},
]


def write_jsonl(path):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), encoding="utf-8")


def write_json(path):
    path.write_text(json.dumps(ROWS), encoding="utf-8")


def write_csv(path):
    path.write_text('question,answer\n1+1?,2\n"a ""b"", c\nd",ü\n,x\n', encoding="utf-8")


def write_parquet(path):
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=2)


def write_dataset(path):
    datasets.Dataset.from_list(ROWS).save_to_disk(path, num_shards=2)


def write_dataset_dict(path):
    other = datasets.Dataset.from_list([{"question": "no", "answer": "no"}])
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS), "test": other}).save_to_disk(path)


WRITERS = {
    "x.jsonl": write_jsonl, "x.ndjson": write_jsonl, "X.JSONL": write_jsonl, "x.json": write_json, "x.csv": write_csv,
    "x.parquet": write_parquet, "dataset": write_dataset, "dictionary": write_dataset_dict,
}  # fmt: skip


def rows(*paths, split="train"):
    return [dict(row.values) for row in read(paths, split)]


def fault(*paths):
    with pytest.raises(InputError) as caught:
        rows(*paths)
    return caught.value


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(name, tmp_path):
    WRITERS[name](tmp_path / name)
    assert rows(tmp_path / name) == ROWS


def test_several_files_follow_each_other(tmp_path):
    write_csv(tmp_path / "b.csv")
    write_json(tmp_path / "a.json")
    assert rows(tmp_path / "b.csv", tmp_path / "a.json") == ROWS * 2


def test_a_row_knows_its_place(tmp_path):
    places = {}
    for name in ("x.jsonl", "x.json", "x.csv", "x.parquet"):
        WRITERS[name](tmp_path / name)
        places[name] = [row.where.removeprefix(str(tmp_path / name)) for row in read([tmp_path / name])]
    assert places == {
        "x.jsonl": [":1", ":2", ":3"], "x.json": ["[0]", "[1]", "[2]"], "x.csv": [":2", ":4", ":5"],
        "x.parquet": ["[0]", "[1]", "[2]"],
    }  # fmt: skip


@pytest.mark.parametrize(
    "garbage",
    [b"{", b"[1, 2]", b'"text"', b"{'a': 1}", b"\xff\xfe{}", b"null", b"[" * 50000, b'{"a": ' + b"9" * 5000 + b"}"],
)
def test_garbage_in_the_middle_of_jsonl_names_the_line_and_the_rows_before_it_arrive(tmp_path, garbage):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + garbage + b'\n{"a": 2}\n')
    found = read([path])
    assert next(found).values == {"a": 1}
    with pytest.raises(InputError) as caught:
        next(found)
    assert caught.value.where == f"{path}:3"


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n \r\n{"a": 2}')
    assert rows(path) == [{"a": 1}, {"a": 2}]
    path = tmp_path / "x.csv"
    path.write_bytes(b"\xef\xbb\xbfa,b\r\n1,2\r\n\r\n")
    assert rows(path) == [{"a": "1", "b": "2"}]


@pytest.mark.parametrize("line", ["1,2,3", "1"])
def test_a_csv_row_of_another_width_names_its_line(tmp_path, line):
    path = tmp_path / "x.csv"
    path.write_text(f"a,b\n1,2\n{line}\n3,4\n")
    error = fault(path)
    assert (error.what, error.where) == ("expected 2 fields", f"{path}:3")


def test_a_csv_column_without_a_name_is_a_column(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(",prompt\n0,hi\n1,ho\n")
    assert [row["prompt"] for row in rows(path)] == ["hi", "ho"]


def test_csv_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b"a,b\n1,\xff\n")
    assert fault(path).what.startswith("not CSV")


@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_the_line_that_is_not_text_is_named_though_the_reader_is_a_block_ahead(tmp_path, end, before):
    path = tmp_path / "x.csv"
    lines = [b"a,b", *(b"%d,fine" % n for n in range(3000)), b"1,\xff", b"2,b"]
    path.write_bytes(before + end.join(lines))
    assert fault(path).where == f"{path}:3002"


@pytest.mark.parametrize("line", ['{"a": 1, "b": 2, "a": 3}', '{"b": [{"a": 1, "a": 1}]}'])
def test_a_key_that_stands_twice_is_refused(tmp_path, line):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n' + line)
    assert fault(path).where == f"{path}:2"
    assert "'a' stands 2 times" in fault(path).what
    path = tmp_path / "x.json"
    path.write_text(f"[{line}]")
    assert "'a' stands 2 times" in fault(path).what


@pytest.mark.parametrize("content", ['{"a": 1}', "3", "null", '"a"'])
def test_json_must_be_a_list(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    assert fault(tmp_path / "x.json").what.startswith("expected a list of objects, found")


def test_json_must_hold_objects_and_be_json(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('[{"a": 1}, 2]')
    assert fault(path).where == f"{path}[1]"
    path.write_text('[{"a": 1}')
    assert fault(path).what.startswith("not JSON")


@pytest.mark.parametrize("cut", [0, 3, -20])
def test_broken_parquet_is_refused(tmp_path, cut):
    path = tmp_path / "x.parquet"
    write_parquet(path)
    path.write_bytes(path.read_bytes()[:cut])
    error = fault(path)
    assert error.what.startswith("not a Parquet file") and error.where == str(path)


def test_a_split_of_a_dataset_dictionary_is_chosen_by_name(tmp_path):
    write_dataset_dict(tmp_path / "d")
    assert rows(tmp_path / "d", split="test") == [{"question": "no", "answer": "no"}]
    with pytest.raises(InputError, match=r"no \.arrow files"):
        rows(tmp_path / "d", split="validation")


def test_what_datasets_caches_beside_a_dataset_is_not_read(tmp_path):
    write_dataset(tmp_path / "d")
    mapped = datasets.load_from_disk(tmp_path / "d").map(lambda row: {"answer": "changed"})
    assert mapped.cache_files and list((tmp_path / "d").glob("cache-*.arrow"))
    assert rows(tmp_path / "d") == ROWS


def test_a_broken_arrow_file_and_an_empty_folder_are_refused(tmp_path):
    write_dataset(tmp_path / "d")
    first = min((tmp_path / "d").glob("*.arrow"))
    first.write_bytes(b"nonsense")
    error = fault(tmp_path / "d")
    assert error.what.startswith("not an Arrow file") and error.where == str(first)
    (tmp_path / "e").mkdir()
    assert "no .arrow files" in fault(tmp_path / "e").what


def test_an_unknown_type_of_file_is_refused_with_the_known_ones(tmp_path):
    (tmp_path / "x.xlsx").touch()
    error = fault(tmp_path / "x.xlsx")
    assert "'.xlsx'" in error.what and ".jsonl" in error.do


@pytest.mark.parametrize(("ours", "theirs"), [(ours, name) for ours, names in ALIASES.items() for name in names])
def test_every_alias_is_found_and_read(ours, theirs):
    table, _, nested = theirs.partition(".")
    row = {"other": 0, table: {nested: 5} if nested else 5}
    assert find_columns(row, [ours], {}) == {ours: theirs}
    assert value(row, theirs) == 5


def test_the_first_alias_wins_and_what_is_not_there_is_left_out():
    row = {"solution": "s", "answer": "a", "problem": "p"}
    assert find_columns(row, ["answer", "prompt", "ranks"], {}) == {"answer": "answer", "prompt": "problem"}


def test_a_given_name_outranks_the_aliases_and_must_be_there():
    row = {"answer": "a", "meta": {"deep": {"er": 1}}}
    assert find_columns(row, ["answer"], {"answer": "meta.deep.er"}) == {"answer": "meta.deep.er"}
    assert value(row, "meta.deep.er") == 1
    with pytest.raises(InputError, match="no column 'gone' for answer; found answer, meta"):
        find_columns(row, ["answer"], {"answer": "gone"})


def test_a_column_whose_name_has_a_dot_is_a_column():
    row = {"reward_model.ground_truth": "42", "a": {"b": 1}, "a.b": 2}
    assert find_columns(row, ["answer"], {}) == {"answer": "reward_model.ground_truth"}
    assert value(row, "reward_model.ground_truth") == "42"
    assert value(row, "a.b") == 2


@pytest.mark.parametrize("name", ["x", "a.x", "a.b.x", "b.x"])
def test_what_is_not_there_has_no_value(name):
    assert value({"a": {"b": None}, "b": 3}, name) is None
