"""What came back from annotators: read in any form, and every fault named with its place and its mend."""

import csv
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.annotating.answers import RANKS, SHOWN, Answer, asked, rank_of, read, unanswered
from pipeline.errors import InputError
from pipeline.sources import files

QUESTIONS = [
    {"question_id": "q1", "response_ids": ["a/0", "a/1", "a/2"], "annotators": ["anna", "ben"]},
    {"question_id": "q2", "response_ids": ["b/3", "b/4"], "annotators": ["ben"]},
    {"question_id": "q3", "response_ids": ["c/0", "c/1"], "annotators": []},
]
HEADER = "question_id,annotator,response_id,rank"
GOOD = [{"question_id": "q1", "annotator": "anna", "ranks": {"a/0": 2, "a/1": 1, "a/2": 2}}]
COLUMNS = ["question_id", "annotator", "response_id", "rank", "prompt", "response"]
TWICE = "keep one of the two; of a file that was saved twice give the later one"
WHOLE = "write a whole number from 1, the best, to 99; equal numbers are ties"
ALL_OR_NONE = "rank all responses of a question or none"


@pytest.fixture
def write(tmp_path):
    """Write a file: a text, rows of JSON lines, or cells of a CSV."""

    def to(name, content):
        path = tmp_path / name
        if isinstance(content, str | bytes):
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        elif isinstance(content[0], dict):
            path.write_text("".join(json.dumps(row) + "\n" for row in content))
        else:
            with path.open("w", newline="", encoding="utf-8") as stream:
                csv.writer(stream).writerows(content)
        return path

    return to


def answers(*paths, questions=QUESTIONS):
    return read([(path, files.read([path])) for path in paths], questions)


def faults(*paths):
    """The listed faults without the folder, and the error."""
    with pytest.raises(InputError) as caught:
        answers(*paths)
    _, *listed = caught.value.what.split("\n")
    return [line.strip().replace(f"{paths[0].parent}/", "") for line in listed], caught.value


def line(question_id="q1", annotator="anna", ranks=None, **more):
    ranks = {"a/0": 1, "a/1": 2, "a/2": 3} if ranks is None else ranks
    return {"question_id": question_id, "annotator": annotator, "ranks": ranks, **more}


def test_json_lines_as_the_page_saves_them(write):
    path = write("anna.jsonl", [line(ranks={"a/2": 1, "a/0": 5, "a/1": 5}, seconds=12.5)])
    assert answers(path).given == (Answer("q1", "anna", (1, 1, 0), 12.5),)


def test_the_exported_lines_filled_in_by_hand(write):
    texts = [{"response_id": name, "text": "changed"} for name in ("a/0", "a/1", "a/2")]
    export = {"messages": [{"role": "user", "content": "?"}], "responses": texts}
    rows = [line(**export), line(annotator="ben", ranks={}, **export), line("q2", "ben", {}, **export)]
    made = answers(write("annotate.jsonl", rows))
    assert (made.given, made.blank) == ((Answer("q1", "anna", (0, 1, 2)),), 2)


def test_a_table_as_it_is_exported_and_filled_in(write):
    cells = [
        COLUMNS, ["q1", "anna", "a/0", "2", "why?\nnow", 'say "so", or\nnot'], ["q1", "anna", "a/1", "1", "", "x"],
        ["q1", "anna", "a/2", "2", "", ""], ["q2", "ben", "b/3", "", "", ""], ["q2", "ben", "b/4", " ", "", ""],
        ["q3", "", "c/0", "", "?", "x"], ["q3", "", "c/1", "", "?", "y"],
    ]  # fmt: skip
    made = answers(write("annotate.csv", cells))
    assert (made.given, made.blank) == ((Answer("q1", "anna", (1, 0, 1)),), 2)


def test_what_spreadsheets_make_of_a_table(write):
    header = "\ufeffRank , QUESTION_ID,Annotator ,Response_ID,Seconds"
    lines = header, "2.0, q2 ,  ben, b/4 ,", "1 ,q2,ben,b/3,3.5", ",,,,", "", ""
    made = answers(write("annotate.CSV", "\r\n".join(lines)))
    assert made.given == (Answer("q2", "ben", (0, 1), 3.5),)


@pytest.mark.parametrize("name", ["x.jsonl", "x.ndjson", "x.json", "x.csv"])
def test_every_form_says_the_same(write, name):
    said = [("q3", "zoe", [3, 3]), ("q1", "ben", [2, 1, 2]), ("q3", "cleo", [1, 2]), ("q1", "anna", [9, 7, 8])]
    ids = {question["question_id"]: question["response_ids"] for question in QUESTIONS}
    rows = [line(q, who, dict(zip(ids[q], ranks, strict=True))) for q, who, ranks in said]
    cells = [[q, who, r, rank] for q, who, ranks in said for r, rank in zip(ids[q], ranks, strict=True)]
    content = {".csv": [COLUMNS[:4], *cells[::-1]], ".json": json.dumps(rows)}.get(f".{name.rpartition('.')[2]}", rows)
    assert answers(write(name, content)).given == (
        Answer("q1", "anna", (2, 0, 1)), Answer("q1", "ben", (1, 0, 1)), Answer("q3", "cleo", (0, 1)),
        Answer("q3", "zoe", (0, 0)),
    )  # fmt: skip


def test_several_files_in_any_order_are_in_the_order_of_the_questions(write):
    one = write("one.jsonl", [line("q3", "x", {"c/0": 1, "c/1": 2}), line("q2", "ben", {"b/3": 2, "b/4": 1})])
    two = write("two.csv", [COLUMNS[:4], ["q1", "ben", "a/0", 1], ["q1", "ben", "a/1", 1], ["q1", "ben", "a/2", 1]])
    assert answers(one, two) == answers(two, one)
    assert [answer.question_id for answer in answers(one, two).given] == ["q1", "q2", "q3"]


def test_a_question_left_blank_in_one_file_may_be_answered_in_another(write):
    blank = write("blank.jsonl", [line(ranks={}), line("q2", "ben", {})])
    made = answers(blank, write("done.jsonl", GOOD))
    assert ([answer.question_id for answer in made.given], made.blank) == (["q1"], 1)
    for_anybody = write("open.jsonl", [line("q3", "", {}), line("q3", "zoe", {"c/0": 1, "c/1": 2})])
    assert answers(for_anybody).blank == 0


def test_who_was_asked_and_has_not_answered():
    given = [Answer("q1", "ben", (0, 1, 2)), Answer("q3", "dan", (0, 1)), Answer("q3", "eve", (0, 1))]
    assert asked(QUESTIONS) == {"anna": 1, "ben": 2, "anybody": 1}
    assert unanswered(QUESTIONS, []) == asked(QUESTIONS)
    assert unanswered(QUESTIONS, given) == {"anna": 1, "ben": 1}


ROWS = {
    "of a question of others": (
        line("q9"), "question_id 'q9' is none of the 3 questions; "
        "rank with the questions that this file was written for, or write it again from these",
    ),
    "of no question": (
        line(None), "question_id '' is none of the 3 questions; "
        "rank with the questions that this file was written for, or write it again from these",
    ),
    "with a response of others": (
        line(ranks={"a/0": 1, "a/1": 1, "a/2": 2, "b/3": 2}),
        "response_id b/3 is no response of question q1 by anna; its responses are a/0, a/1, a/2",
    ),
    "without some responses": (
        line(ranks={"a/1": 1}), f"question q1 by anna has no rank for response a/0, a/2; {ALL_OR_NONE}",
    ),
    "with a response twice": (
        line(ranks={"a/0": 1, "a/1": 1, "a/2": 2, " a/0": 2}),
        "response a/0 of question q1 by anna is ranked a second time; keep one of the two",
    ),
    "of another annotator": (
        line(annotator="dan"),
        "annotator 'dan' was not asked question q1; remove it, or write who was asked: anna, ben",
    ),
    "of an annotator written differently": (
        line(annotator="Anna"),
        "annotator 'Anna' was not asked question q1; remove it, or write who was asked: anna, ben",
    ),
    "of an annotator without a name": (
        line(annotator=" "), "question q1 has ranks and no annotator; write who was asked: anna, ben",
    ),
    "of anybody without a name": (
        line("q3", None, {"c/0": 1, "c/1": 2}), "question q3 has ranks and no annotator; write the name of who ranked",
    ),
    "of an annotator that is no text": (
        line("q3", 7, {"c/0": 1, "c/1": 2}), "annotator of question q3 is 7, no name; write the name of who ranked",
    ),
    "of an annotator in half a letter": (
        line("q3", "\ud800", {"c/0": 1, "c/1": 2}),
        r"annotator of question q3 is '\ud800', no name; write the name of who ranked",
    ),
    "with ranks in a list": (
        line(ranks=[1, 2, 3]),
        'ranks of question q1 by anna is [1, 2, 3], no object; write {"response_id": rank, ...}, or {} while it is '
        "not answered",
    ),
    "with ranks that are null": (
        {**line(), "ranks": None},
        'ranks of question q1 by anna is None, no object; write {"response_id": rank, ...}, or {} while it is not '
        "answered",
    ),
    "without ranks": (
        {"question_id": "q1", "annotator": "anna", "order": []},
        "no ranks; found question_id, annotator, order; take the line of annotate.jsonl as it is and fill in its ranks",
    ),
    "without anything": (
        {}, "no question_id, no annotator, no ranks; found nothing; take the line of annotate.jsonl as it is and fill "
        "in its ranks",
    ),
    "with a column twice": (
        {**line(), "Ranks": {}},
        "columns that differ in case only: question_id, annotator, ranks, Ranks; take the line of annotate.jsonl as "
        "it is and fill in its ranks",
    ),
    "with negative seconds": (
        line(seconds=-1), "seconds of question q1 by anna is -1; write a finite number from 0, or leave it out",
    ),
    "with endless seconds": (
        line(seconds=float("inf")),
        "seconds of question q1 by anna is inf; write a finite number from 0, or leave it out",
    ),
    "with seconds that are true": (
        line(seconds=True), "seconds of question q1 by anna is True; write a finite number from 0, or leave it out",
    ),
    "with seconds that are no number": (
        line(seconds="long"),
        "seconds of question q1 by anna is 'long'; write a finite number from 0, or leave it out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROWS)
def test_a_row(kind, write):
    bad, message = ROWS[kind]
    listed, error = faults(write("back.jsonl", [line("q2", "ben", {"b/3": 1, "b/4": 2}), bad]))
    assert listed == [f"back.jsonl:2: {message}"]
    assert error.what.startswith("1 fault in the annotators' files:\n")
    assert error.where.endswith("back.jsonl (1)")
    assert error.do == "correct the files and run this again; they are as they were, and nothing was written"


@pytest.mark.parametrize(
    ("value", "shown"),
    [("first", "'first'"), (0, "0"), (-1, "-1"), (1.5, "1.5"), (100, "100"), (float("nan"), "nan"), (True, "True"),
     (None, "None"), (float("inf"), "inf"), ("1.5", "'1.5'"), ("0", "'0'"), ("1e1", "'1e1'"), ("9" * 5000, None),
     ([1], "[1]"), ({}, "{}"), ("٢", "'٢'"), ("1\n2", r"'1\n2'")],
)  # fmt: skip
def test_what_is_no_rank(value, shown, write):
    listed, _ = faults(write("back.jsonl", [line(ranks={"a/0": 1, "a/1": value, "a/2": 2})]))
    shown = f"'{'9' * 96}..." if shown is None else shown
    assert listed == [f"back.jsonl:1: rank of response a/1 of question q1 by anna is {shown}, no rank; {WHOLE}"]


@given(st.one_of(st.integers(), st.floats(), st.text(), st.none(), st.booleans(), st.lists(st.integers())))
def test_a_rank_is_a_whole_number_or_nothing(value):
    assert rank_of(value) in (None, *RANKS)


@given(st.sampled_from(RANKS))
def test_forms_of_the_same_rank(rank):
    assert {rank_of(form) for form in (rank, float(rank), str(rank), f" {rank}.0 ", f"0{rank}", f"{rank}.")} == {rank}


TABLES = {
    "half ranked": (
        "q2,ben,b/3,1\nq2,ben,b/4,",
        [f"back.csv:3: response b/4 of question q2 by ben has no rank, others have; {ALL_OR_NONE}"],
    ),
    "without a row": (
        "q2,ben,b/4,1", [f"back.csv:2: question q2 by ben has no rank for response b/3; {ALL_OR_NONE}"],
    ),
    "with a response twice": (
        "q2,ben,b/4,1\nq2,ben,b/3,1\nq2,ben,b/4,2",
        [
            "back.csv:4: response b/4 of question q2 by ben is ranked a second time, after back.csv:2; keep one of the "
            "two"
        ],
    ),
    "with many faults": (
        "q2,ben,b/3,x\nq2,ben,,0\nq8,ben,b/4,1\nq8,ben,b/5,2",
        [
            f"back.csv:2: rank of response b/3 of question q2 by ben is 'x', no rank; {WHOLE}",
            "back.csv:3: response_id '' is no response of question q2 by ben; its responses are b/3, b/4",
            f"back.csv:3: rank of response '' of question q2 by ben is '0', no rank; {WHOLE}",
            f"back.csv:2: question q2 by ben has no rank for response b/4; {ALL_OR_NONE}",
            "back.csv:4: question_id 'q8' is none of the 3 questions; rank with the questions that this file was "
            "written for, or write it again from these",
        ],
    ),
    "that is cut": (
        "q2,ben,b/3,1\nq2,ben",
        [
            "back.csv:3: expected 4 fields, and nothing from here on was read; save it as CSV with commas between the "
            "columns, in UTF-8",
            f"back.csv:2: question q2 by ben has no rank for response b/4; {ALL_OR_NONE}",
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TABLES)
def test_a_table(kind, write):
    rows, expected = TABLES[kind]
    assert faults(write("back.csv", f"{HEADER}\n{rows}\n"))[0] == expected


WHOLE_FILES = {
    "a table without columns": (
        "back.csv", "question_id,rank\nq1,1\nq1,2\n",
        ":1: no annotator, no response_id; found question_id, rank; leave the header of annotate.csv as it is",
    ),
    "a table with semicolons": (
        "back.csv", "question_id;annotator;response_id;rank\nq2;ben;b/3;1\n",
        ":1: no question_id, no annotator, no response_id, no rank; found question_id;annotator;response_id;rank; save "
        "it as CSV with commas between the columns",
    ),
    "a table with nothing but a header": ("back.csv", HEADER, ": the file is empty; fill it in again, or leave it out"),
    "an empty table": ("back.csv", "", ": the file is empty; fill it in again, or leave it out"),
    "lines without any": ("back.jsonl", "\n \n", ": the file is empty; fill it in again, or leave it out"),
    "an empty list": ("back.json", "[]", ": the file is empty; fill it in again, or leave it out"),
    "a line that is no JSON": (
        "back.jsonl", '{"question_id": "q1"', ":1: not JSON: Expecting ',' delimiter: line 1 column 21 (char 20), and "
        "nothing from here on was read; correct or remove this line",
    ),
    "a line that is no object": (
        "back.jsonl", "[1]", ":1: expected an object, found list, and nothing from here on was read; correct or remove "
        "this row",
    ),
    "a JSON file that is no list": (
        "back.json", "{}", ": expected a list of objects, found dict, and nothing from here on was read; or use .jsonl",
    ),
    "a table in another encoding": (
        "back.csv", f"{HEADER},für\n".encode("latin-1"),
        ":1: not CSV: 'utf-8' codec can't decode byte 0xfc in position 40: invalid start byte, and nothing from here "
        "on was read; save it as CSV with commas between the columns, in UTF-8",
    ),
    "a spreadsheet": (
        "back.xlsx", b"PK", ": cannot read files of type '.xlsx'; name files of type .csv, .json, .jsonl, .ndjson; a "
        "spreadsheet saves .csv",
    ),
    "a dataset": (
        "back.parquet", b"PAR1", ": cannot read files of type '.parquet'; name files of type .csv, .json, .jsonl, "
        ".ndjson; a spreadsheet saves .csv",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WHOLE_FILES)
def test_a_file(kind, write):
    name, content, message = WHOLE_FILES[kind]
    assert faults(write(name, content))[0] == [f"{name}{message}"]


def test_a_folder(tmp_path):
    (tmp_path / "back").mkdir()
    expected = "back: a folder; name files of type .csv, .json, .jsonl, .ndjson; a spreadsheet saves .csv"
    assert faults(tmp_path / "back")[0] == [expected]


@pytest.mark.parametrize("second", ["again.jsonl", "again.csv", "back.jsonl"])
def test_a_question_answered_twice_by_one_annotator(second, write):
    first, ranks = write("back.jsonl", GOOD), GOOD[0]["ranks"]
    cells = [COLUMNS[:4], *(["q1", "anna", response_id, rank] for response_id, rank in ranks.items())]
    place = "again.csv:2" if second == "again.csv" else f"{second}:1"
    other = first if second == "back.jsonl" else write(second, cells if second == "again.csv" else GOOD)
    expected = f"{place}: question q1 by anna is answered a second time; the first time at back.jsonl:1; {TWICE}"
    assert faults(first, other)[0] == [expected]


def test_a_question_answered_twice_in_one_file(write):
    listed, _ = faults(write("back.jsonl", [*GOOD, line("q2", "ben", {"b/3": 1, "b/4": 1}), line()]))
    assert listed == [
        f"back.jsonl:3: question q1 by anna is answered a second time; the first time at back.jsonl:1; {TWICE}"
    ]


def test_the_faults_of_all_files_are_found_at_once(write):
    one = write("one.jsonl", json.dumps(line(annotator="dan")) + "\n{\n" + json.dumps(line("q9")))
    two = write("two.csv", f"{HEADER}\nq2,ben,b/3,1\nq2,ben,b/4,0\n")
    listed, error = faults(one, write("none.txt", ""), two, write("good.jsonl", GOOD))
    assert [fault.partition(": ")[0] for fault in listed] == ["one.jsonl:1", "one.jsonl:2", "none.txt", "two.csv:3"]
    assert error.what.startswith("4 faults in the annotators' files:\n")
    assert error.where.replace(f"{one.parent}/", "") == "one.jsonl (2), none.txt (1), two.csv (1)"


def test_of_many_faults_the_first_are_listed_and_all_are_counted(write):
    rows = [line(f"x{number}") for number in range(SHOWN + 5)]
    listed, error = faults(write("back.jsonl", rows))
    assert [fault.partition(":")[2].partition(":")[0] for fault in listed] == [str(n + 1) for n in range(SHOWN)]
    assert error.what.startswith("25 faults in the annotators' files; the first 20:\n")
    assert error.where.endswith("back.jsonl (25)")
