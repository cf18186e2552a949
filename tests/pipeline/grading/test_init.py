import subprocess
import sys
import time
import types

import pytest

from pipeline import grading
from pipeline.errors import InputError
from pipeline.grading import GRADERS, Judgement, Memory, Vote, classes, compare, judge, judge_row, open_grader
from pipeline.grading.pool import Pool, shared_pool
from pipeline.journal import Journal

HANGS = r"\boxed{9^{9^{9^{9}}}}"


@pytest.mark.parametrize("name", GRADERS)
def test_every_name_opens_a_grader(name):
    grader = open_grader(name)
    assert isinstance(grader.risky, bool) and isinstance(grader.literal, bool)
    assert grader.same("1", "1") == (name != "none")


def test_an_unknown_grader_is_refused_with_the_names_there_are():
    with pytest.raises(InputError, match=r"'maths'.*math, exact, none"):
        judge("maths", ["1"], ["1"], workers=1)


def test_columns_of_different_length_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        judge("exact", ["1", "2"], ["1"], workers=1)


def test_no_rows_give_no_judgements():
    assert judge("math", [], [], workers=2) == []
    assert judge("exact", [], [], workers=2) == []


@pytest.mark.parametrize("name", ["exact", "math"])
def test_every_status_that_needs_no_accident(name):
    judged = judge(name, ["A: 5", "A: 6", "", "A: 5", "A: 5"], ["5", "5", "5", None, "####"], workers=1)
    assert judged == [
        Judgement(True, "5", "correct"),
        Judgement(False, "6", "wrong"),
        Judgement(False, None, "no answer"),
        Judgement(None, "5", "bad reference"),
        Judgement(None, "5", "bad reference"),
    ]


def test_the_grader_none_gives_no_verdict():
    assert judge("none", ["A: 5", ""], ["5", None], workers=1) == [Judgement(None, None, "bad reference")] * 2


def test_a_grader_that_fails_gives_a_null_and_not_a_zero():
    class Failing(Near):
        def same(self, answer, reference):
            return answer == 1 / 0

    assert judge_row(Failing(), "5", "5") == Judgement(None, "5", "error")
    assert judge_row(Failing(), None, "5") == Judgement(None, None, "error")


@pytest.mark.parametrize("name", ["exact", "math"])
def test_answers_that_are_extracted_already_are_compared_as_they_are(name):
    answers, references = ["5", "6", None, "5", None], ["5", "5", "5", None, None]
    assert compare(name, answers, references, workers=1) == [
        Judgement(True, "5", "correct"),
        Judgement(False, "6", "wrong"),
        Judgement(False, None, "no answer"),
        Judgement(None, "5", "bad reference"),
        Judgement(None, None, "bad reference"),
    ]


class Near:
    """Numbers that differ by less than 2 are the same, 13 is bad luck, and words cannot be compared."""

    risky = False
    literal = False

    def extract(self, text):
        return text.strip() or None

    def readable(self, reference):
        return reference.isdigit()

    def same(self, answer, reference):
        if {answer, reference} == {"12", "13"}:
            raise RuntimeError("bad luck")
        return abs(int(answer) - int(reference)) < 2


@pytest.fixture
def near(monkeypatch):
    monkeypatch.setitem(GRADERS, "near", f"{__name__}:Near")
    monkeypatch.setitem(sys.modules, __name__, types.SimpleNamespace(Near=Near))


def numbers(grader, responses, group=None, **limits):
    return [v.number for v in classes(grader, responses, group or [0] * len(responses), workers=2, **limits).votes]


def test_equal_answers_of_a_group_share_a_number_in_the_order_of_first_appearance():
    responses = ["A: 1/2", "A: 3", "A: 0.5", "A: 3.0", r"\boxed{\frac12}", "A: 3", "A: 0.5", "A: 0.5"]
    group = ["a", "a", "a", "a", "b", "b", "b", "a"]
    assert numbers("math", responses, group) == [0, 1, 0, 1, 0, 1, 0, 0]
    assert numbers("exact", responses, group) == [0, 1, 2, 3, 0, 1, 2, 2]


def test_what_cannot_be_compared_has_no_number_and_says_why(near):
    made = classes("near", ["one", " ", "5", "one"], [0] * 4, workers=1)
    assert made.votes == [
        Vote("one", -1, "unreadable"), Vote(None, -1, "no answer"), Vote("5", 0, "read"), Vote("one", -1, "unreadable")
    ]  # fmt: skip
    assert numbers("exact", ["", " \n", "so;"]) == numbers("math", ["", " \n", "no idea!"]) == [-1] * 3
    assert numbers("none", ["5", "5"]) == [-1, -1]
    assert classes("math", [], [], workers=1).votes == []


@pytest.mark.parametrize(
    ("responses", "expected"),
    [
        (["1", "2", "3", "1"], [0, 0, 1, 0]),  # 3 is near 2, but 2 leads no class
        (["2", "1", "3"], [0, 0, 0]),
        (["3", "1", "2"], [0, 1, 0]),  # near both: the first class takes it
    ],
)
def test_answers_are_compared_with_the_first_of_each_class_in_order(near, responses, expected):
    assert numbers("near", responses) == expected


def test_a_comparison_that_fails_is_counted_and_makes_no_one_equal(near):
    made = classes("near", ["12", "13", "13", "30"], ["a"] * 4, workers=1)
    assert ([vote.number for vote in made.votes], made.lost) == ([0, 1, 1, 2], 1)


def test_an_answer_that_hangs_the_comparison_is_none_and_costs_one_timeout():
    began = time.monotonic()
    made = classes("math", ["A: 1", HANGS, "A: 2", HANGS, "A: 1.0", "A: 3"], [0, 0, 0, 0, 0, 1], timeout=0.5, workers=2)
    assert [(vote.number, vote.status) for vote in made.votes] == [
        (0, "read"), (-1, "timeout"), (1, "read"), (-1, "timeout"), (0, "read"), (0, "read")
    ]  # fmt: skip
    assert made.lost == 0
    assert time.monotonic() - began < 5


def test_grading_imports_neither_torch_nor_the_maths_library_before_it_is_asked():
    code = (
        "import sys, pipeline.grading; assert 'math_verify' not in sys.modules; import pipeline.grading.math; "
        "assert 'math_verify' in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def sent(monkeypatch):
    """The rows of each call that were handed to processes; the process remembers nothing of earlier tests."""
    calls, judge_rows = [], Pool.judge

    def watched(pool, rows, **how):
        if rows:
            calls.append((list(rows), how["workers"]))
        return judge_rows(pool, rows, **how)

    monkeypatch.setattr(Pool, "judge", watched)
    monkeypatch.setattr(grading, "_known", {})
    return calls


def test_what_was_judged_is_not_judged_again_and_what_was_lost_is(tmp_path, sent):
    responses, references = ["A: 1", HANGS, "A: 3", "", "A: 5"], ["1", "1", "4", "4", None]
    with Journal(tmp_path / "a") as journal:
        memory = Memory(journal)
        first = judge("math", responses[:4], references[:4], timeout=0.5, workers=2, memory=memory)
    assert [one.status for one in first] == ["correct", "timeout", "wrong", "no answer"]
    assert (memory.retried, memory.recovered) == (1, 0)
    lost = ("9^{9^{9^{9}}}", "1")
    extracted = [(response, None) for response in responses]
    assert sent == [(extracted[:4], 2), ([("1", "1"), lost, ("3", "4"), (None, "4")], 2), ([lost], 1)]
    assert len((tmp_path / "a").read_bytes().splitlines()) == 7
    sent.clear()
    grading._known.clear()
    with Journal(tmp_path / "a") as journal:
        again = judge("math", responses, references, timeout=0.5, workers=2, memory=Memory(journal))
    assert again == [*first, Judgement(None, "5", "bad reference")]
    assert sent == [(extracted[4:], 2), ([lost], 2), ([lost], 1)]


def test_an_answer_is_compared_with_a_reference_once_in_the_life_of_a_process(sent, monkeypatch):
    first = judge("math", ["A: 1", "It is 1. A: 1", "A: 2", HANGS], ["1"] * 4, timeout=1.5, workers=2)
    assert [one.status for one in first] == ["correct", "correct", "wrong", "timeout"]
    lost = ("9^{9^{9^{9}}}", "1")
    assert sent[1] == ([("1", "1"), ("2", "1"), lost], 2)
    sent.clear()
    assert judge("math", ["A: 2", "So: A: 1", HANGS], ["1"] * 3, timeout=1.5, workers=2) == [
        *first[2:1:-1],
        first[0],
        first[3],
    ]
    assert sent[1:] == [([lost], 2)]
    assert compare("math", ["1", "2"], ["1", "1"], workers=2) == [first[0], first[2]]
    assert len(sent) == 2
    assert compare("math", ["1"], ["2"], workers=2)[0].correct is False
    monkeypatch.setattr(grading, "MOST_KNOWN", 2)
    compare("math", ["3"], ["2"], workers=2)
    assert len(grading._known) == 2
    sent.clear()
    compare("math", ["3", "1"], ["2", "2"], workers=2)
    assert not sent
    assert compare("math", ["1"], ["1"], workers=2) == [first[0]]
    assert sent == [([("1", "1")], 2)]


def test_the_same_texts_are_another_row_to_another_question(tmp_path, sent):
    with Journal(tmp_path / "a") as journal:
        judge("math", ["A: 5"], ["5"], workers=1, memory=Memory(journal))
        memory = Memory(journal)
        sent.clear()
        assert judge("math", ["A: 5"], ["6"], workers=1, memory=memory)[0].correct is False
        assert compare("math", ["A: 5"], ["5"], workers=1, memory=memory)[0].extracted == "A: 5"
        assert judge("exact", ["A: 5"], ["5"], workers=1, memory=memory)[0].correct is True
        assert judge("math", ["A: 5"], ["5"], workers=1, memory=memory)[0].correct is True
    assert [rows for rows, _ in sent] == [[("5", "6")], [("A: 5", "5")]]


def test_a_process_that_stood_still_for_a_moment_costs_no_row(tmp_path, grading_processes):
    shared_pool("math").close()
    judge("math", ["A: 1"], ["1"], workers=1)
    (worker,) = grading_processes()
    worker.suspend()
    with Journal(tmp_path / "a") as journal:
        memory = Memory(journal)
        found = judge("math", ["A: 3", "A: 4", "A: 5"], ["3", "4", "5"], timeout=0.5, workers=1, memory=memory)
    assert [one.status for one in found] == ["correct"] * 3
    assert (memory.retried, memory.recovered) == (1, 1)
