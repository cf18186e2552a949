import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.grading.exact import ExactGrader


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("37+85=122,122+6=128;128", "128"),
        ("37+85=122,122+6=128; 128\n", "128"),
        ("1;2;3", "3"),
        ("37+85=122,122+6=128;", None),
        ("9 * 2 = 18\n#### 18", "18"),
        ("Q: how many? A: 42", "42"),
        ("Answer: yes", "yes"),
        ("the final answer: B ", "B"),
        ("  B ", "B"),
        ("DNA: B", "DNA: B"),
        ("", None),
        (" \n", None),
    ],
)
def test_the_answer_follows_the_last_mark_or_is_the_whole_text(response, answer):
    assert ExactGrader().extract(response) == answer


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("128", "128", True),
        ("128", " 128\n", True),
        ("128", "1+127=128;128", True),
        ("128", "0128", False),
        ("0.5", "1/2", False),
        ("Yes", "yes", False),
        ("", "", False),
        ("5", ";", False),
    ],
)
def test_equality_is_of_characters(answer, reference, same):
    assert ExactGrader().same(answer, reference) is same


@given(st.text())
def test_an_extracted_answer_is_its_own_answer(text):
    grader = ExactGrader()
    answer = grader.extract(text)
    assert answer is None or (grader.extract(answer) == answer and grader.same(answer, text))
