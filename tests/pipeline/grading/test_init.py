import subprocess
import sys

import pytest

from pipeline.errors import InputError
from pipeline.grading import GRADERS, Judgement, judge, judge_row, open_grader


@pytest.mark.parametrize("name", GRADERS)
def test_every_name_opens_a_grader(name):
    grader = open_grader(name)
    assert isinstance(grader.risky, bool)
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
    class Failing:
        risky = False

        def extract(self, text):
            return text

        def readable(self, reference):
            return True

        def same(self, answer, reference):
            return answer == 1 / 0

    assert judge_row(Failing(), "5", "5") == Judgement(None, "5", "error")


def test_grading_imports_neither_torch_nor_the_maths_library_before_it_is_asked():
    code = (
        "import sys, pipeline.grading; assert 'math_verify' not in sys.modules; import pipeline.grading.math; "
        "assert 'math_verify' in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
