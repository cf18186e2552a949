import csv
import json
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.annotating.sheets import (
    COLUMNS,
    LONGEST_CELL,
    assigned,
    conversation,
    people,
    responses,
    write_csv,
    write_jsonl,
)

NAMES = ["anna", "ben", "Çelik", "dora", "eve"]
IDS = [f"q{number:04x}" for number in range(60)]


def read_csv(path):
    with path.open(encoding="utf-8-sig", newline="") as stream:
        return list(csv.DictReader(stream))


@given(st.data())
def test_everybody_is_asked_as_often_as_the_others(data):
    count = data.draw(st.integers(1, 6))
    overlap = data.draw(st.integers(1, count))
    names = [f"n{number}" for number in range(count)]
    ids = data.draw(st.lists(st.text(min_size=1, max_size=4), unique=True, max_size=40))
    made = assigned(ids, names, overlap, data.draw(st.integers(0, 99)))
    assert set(made) == set(ids)
    assert all(len(set(those)) == len(those) == overlap and set(those) <= set(names) for those in made.values())
    loads = Counter(name for those in made.values() for name in those)
    spread = [loads[name] for name in names]
    assert max(spread) - min(spread) <= 1


@pytest.mark.parametrize(("names", "overlap"), [(NAMES[:4], 2), (NAMES, 2), (NAMES, 3), (NAMES[:3], 2)])
def test_every_two_meet_about_as_often_as_every_other_two(names, overlap):
    made = assigned(IDS, names, overlap, 3)
    met = Counter(pair for those in made.values() for pair in combinations(those, 2))
    assert set(met) == set(combinations(names, 2))
    assert max(met.values()) - min(met.values()) <= 3


def test_who_is_asked_follows_from_the_seed_and_not_from_the_order_of_the_questions():
    made = assigned(IDS, NAMES, 2, 0)
    assert assigned(IDS[::-1], NAMES, 2, 0) == made != assigned(IDS, NAMES, 2, 1)
    assert all(those == sorted(those, key=NAMES.index) for those in made.values())


def test_people_are_those_who_are_asked_in_alphabetical_order(question):
    questions = [question("a", "x", "y", annotators=["b", "C", "a"]), question("b", "x", "y", annotators=["B", "a"])]
    assert people(questions) == ["a", "B", "b", "C"]
    assert people([question("a", "x", "y")]) == []


def test_the_csv_has_a_row_for_each_annotator_question_and_response(question, tmp_path):
    asked = [question("p1", "x", "y", annotators=["ben", "anna"]), question("p2", "z", "", "w", annotators=["ben"])]
    write_csv(tmp_path / "a.csv", asked)
    rows = read_csv(tmp_path / "a.csv")
    assert tuple(rows[0]) == COLUMNS
    assert [(row["annotator"], row["question_id"], row["response_id"]) for row in rows] == [
        ("anna", "q-p1", "p1/0"), ("anna", "q-p1", "p1/1"),
        ("ben", "q-p1", "p1/0"), ("ben", "q-p1", "p1/1"),
        ("ben", "q-p2", "p2/0"), ("ben", "q-p2", "p2/1"), ("ben", "q-p2", "p2/2"),
    ]  # fmt: skip
    assert {row["rank"] for row in rows} == {""}
    assert [row["response"] for row in rows[4:]] == ["z", "(empty response)", "w"]
    assert rows[4]["prompt"] == "p2?"
    assert (tmp_path / "a.csv").read_bytes()[:3] == b"\xef\xbb\xbf"


def test_where_anybody_may_answer_the_annotator_is_empty(question, tmp_path):
    write_csv(tmp_path / "a.csv", [question("p", "x", "y")])
    assert [row["annotator"] for row in read_csv(tmp_path / "a.csv")] == ["", ""]
    write_jsonl(tmp_path / "a.jsonl", [question("p", "x", "y")])
    assert json.loads((tmp_path / "a.jsonl").read_text(encoding="utf-8"))["annotator"] == ""


@pytest.mark.parametrize(
    "text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "\uff1d1", "\uff0b1", "\uff0d1", "\uff201"]
)
def test_no_text_is_a_formula(question, tmp_path, text):
    write_csv(tmp_path / "a.csv", [question("p", text, "1=1", messages=[{"role": "user", "content": text}])])
    rows = read_csv(tmp_path / "a.csv")
    assert [(row["prompt"], row["response"]) for row in rows] == [(f"'{text}", f"'{text}"), (f"'{text}", "1=1")]


def test_a_cell_holds_any_text_that_a_spreadsheet_can_hold(question, tmp_path):
    texts = [
        'a "quoted", text; with\ttabs',
        "two\nlines\r\nand\ra third",
        "nul\x00here",
        "\u05e9\u05dc\u05d5\u05dd \U0001f9ea",
        "x" * 40_000,
    ]
    write_csv(tmp_path / "a.csv", [question("p", *texts)])
    read = [row["response"] for row in read_csv(tmp_path / "a.csv")]
    assert read[:4] == [*texts[:2], "nul\ufffdhere", texts[3]]
    assert read[4] == "x" * LONGEST_CELL + " (cut here: the whole text is in annotate.jsonl)"
    assert len(read[4]) < 32_767


def test_the_jsonl_has_a_line_for_each_annotator_and_question(question, tmp_path):
    turns = [
        {"role": "user", "content": "\u2028\x00 a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    asked = [
        question("p1", "x\ny", "", annotators=["ben", "anna"], messages=turns),
        question("p2", "z", "w", annotators=["ben"]),
    ]
    write_jsonl(tmp_path / "a.jsonl", asked)
    lines = (tmp_path / "a.jsonl").read_bytes().split(b"\n")
    assert lines.pop() == b""
    read = [json.loads(line) for line in lines]
    assert [(line["annotator"], line["question_id"]) for line in read] == [
        ("anna", "q-p1"), ("ben", "q-p1"), ("ben", "q-p2")
    ]  # fmt: skip
    assert read[0] == {
        "question_id": "q-p1", "annotator": "anna", "messages": turns, "responses": responses(asked[0]), "ranks": {}
    }  # fmt: skip
    assert responses(asked[0]) == [{"response_id": "p1/0", "text": "x\ny"}, {"response_id": "p1/1", "text": ""}]


def test_a_conversation_names_the_roles_where_there_is_more_than_one_turn():
    turns = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "a\nb"}]
    assert conversation(turns) == "system: be kind\n\nuser: a\nb"
    assert conversation(turns[1:]) == "a\nb"
