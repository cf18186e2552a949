import numpy as np
import pytest

from pipeline.grading import Judgement, Memory
from pipeline.grading.mixed import Means, classes, compare, judge, read
from pipeline.grading.pool import Worker, shared_pool
from pipeline.journal import Journal

LIMITS = {"timeout": 5.0, "workers": 1}
NAMES = ["math", "exact", "math", "none"]


def test_each_row_is_judged_by_its_own_grader_and_comes_back_in_its_place():
    answers, references = ["1/2", "1/2", "3", "5"], ["0.5", "0.5", None, "5"]
    expected = [(True, "correct"), (False, "wrong"), (None, "bad reference"), (None, "bad reference")]
    assert [(j.correct, j.status) for j in judge(NAMES, answers, references, **LIMITS)] == expected
    assert [(j.correct, j.status) for j in compare(NAMES, answers, references, **LIMITS)] == expected


def test_groups_of_different_graders_vote_at_once():
    names, responses = ["math", "exact"] * 3, ["1/2", "1/2", "0.5", "0.5", "9", " "]
    made = classes(names, responses, ["m", "e"] * 3, **LIMITS)
    assert [vote.number for vote in made.votes] == [0, 0, 0, 1, 1, -1]


def looked_at(needs, references, last=(False,) * 4, names=("exact",) * 4, responses=("1", "2", "2", " "), **limits):
    means = Means(**{**LIMITS, **limits})
    return read(names, responses, references, "aaaa", needs=needs, last=np.array(last), means=means)


@pytest.mark.parametrize(
    ("needs", "statuses", "classes"),
    [
        ((), [None] * 4, None),
        (("verdicts",), ["wrong", "correct", "correct", "no answer"], None),
        (("answers",), ["read", "read", "read", "no answer"], [0, 1, 1, -1]),
        (("answers", "verdicts"), ["wrong", "correct", "correct", "no answer"], [0, 1, 1, -1]),
    ],
)
def test_all_that_is_read_whatever_is_needed(needs, statuses, classes):
    made = looked_at(needs, ["2"] * 4)
    assert [j.correct for j in made.gold] == [False, True, True, False]
    assert made.extracted == ["1", "2", "2", None]
    assert made.statuses == statuses
    assert (made.classes is None) == (classes is None) and (classes is None or made.classes.tolist() == classes)


@pytest.mark.parametrize("needs", [(), ("answers",)])
def test_references_change_the_gold_alone(needs):
    known, unknown = looked_at(needs, ["2", "7", ";", "1"]), looked_at(needs, [None] * 4)
    assert unknown.gold == [None] * 4
    assert [j.status for j in known.gold] == ["wrong", "wrong", "bad reference", "no answer"]
    assert (known.extracted, known.statuses) == (unknown.extracted, unknown.statuses)
    np.testing.assert_array_equal(known.classes, unknown.classes)


def test_rows_marked_last_lead_no_class():
    assert looked_at(("answers",), [None] * 4, last=(True, False, False, True)).classes.tolist() == [1, 0, 0, -1]


@pytest.mark.parametrize("needs", [(), ("answers",), ("verdicts",)])
def test_an_answer_that_hangs_is_not_a_wrong_one(needs):
    hangs = r"\boxed{9^{9^{9^{9}}}}"
    made = looked_at(needs, ["1", "1"], (False,) * 2, ["math"] * 2, ["1", hangs], timeout=0.5)
    assert [j.correct for j in made.gold] == [True, None]
    assert made.gold[1].status == "timeout"
    assert made.statuses[1] == ("timeout" if needs else None)


@pytest.mark.parametrize("needs", [(), ("answers",), ("verdicts",), ("answers", "verdicts")])
def test_what_is_remembered_is_read_again_without_a_process(needs, tmp_path, monkeypatch):
    """Extractions, probes, comparisons with each other and with the reference."""
    rows = {"references": ["2", "0.5", None, "1"], "names": ["math"] * 4, "responses": ("1/2", "A: 0.5", "A: 7", "x!")}
    with Journal(tmp_path / "a") as journal:
        learned = looked_at(needs, memory=Memory(journal), **rows)
    monkeypatch.setattr(Worker, "__init__", None)
    shared_pool("math").close()
    with Journal(tmp_path / "a") as journal:
        recalled = looked_at(needs, memory=Memory(journal), **rows)
    assert (recalled.extracted, recalled.gold, recalled.statuses) == (learned.extracted, learned.gold, learned.statuses)
    np.testing.assert_array_equal(recalled.classes, learned.classes)


def test_an_extraction_that_is_lost_has_no_gold(monkeypatch):
    """A response so long that looking for its answer takes longer than the limit."""
    made = looked_at((), ["1"], (False,), ["math"], ["(" * 9000], timeout=1e-6)
    assert made.gold == [Judgement(None, None, "timeout")]
