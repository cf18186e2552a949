import pytest

from pipeline.grading.math import LONGEST, REACH, MathGrader


@pytest.fixture(scope="module")
def grader():
    return MathGrader()


EQUAL = [
    ("1,234", "1234"),
    ("$1,234.50$", "1234.5"),
    ("1 000 000", "1000000"),
    (r"10,\!080", "10{,}080"),
    (r"11,\! 111,\! 111", "11111111"),
    (r"\$18", "18"),
    ("$18", "18.00"),
    ("18 dollars", "18"),
    ("42 km/h", "42"),
    ("3/4 cup", "0.75"),
    (r"5 \text{ cm}", "5"),
    ("5 cm²", "5"),
    ("5cm", "5"),
    (r"90^\circ", "90"),
    (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}"),
    ("x=5", "5"),
    ("5", "x = 5"),
    ("x=1 or x=2", "1,2"),
    (r"x \in [1,2]", "[1,2]"),
    (r"50\%", "50"),
    ("50%", "0.5"),
    (r"2\frac{1}{2}", r"\frac{5}{2}"),
    ("2 1/2", "2.5"),
    (r"11 \frac{1}{2} \text{ inches}", "11.5"),
    (r"\frac12", "0.5"),
    ("1/2", r"\dfrac{1}{2}"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"),
    ("0.333333", r"\frac{1}{3}"),
    ("½", "0.5"),
    ("142", "142.0"),
    ("7", "7."),
    ("007", "7"),
    ("\N{MINUS SIGN}5", "-5"),
    ("1.0e3", "1000"),
    (r"2.5\times 10^3", "2500"),
    ("2**10", "1024"),
    ("5!", "120"),
    (r"\binom{5}{2}", "10"),
    (r"\log_2 8", "3"),
    (r"\sin(\pi/6)", r"\frac12"),
    (r"3\sqrt{2}", r"\sqrt{18}"),
    ("3*sqrt(2)", r"3\sqrt2"),
    ("√18", r"3\sqrt{2}"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    ("2 pi", r"2\pi"),
    ("-5i+6", "6 - 5i"),
    ("(x+1)^2", "x^2+2x+1"),
    ("p - q", "-q+p"),
    ("y=2x+3", "y = 3 + 2x"),
    (r"x \le 5", r"5 \ge x"),
    ("(1,2)", r"\left(1, 2\right)"),
    ("[1,2)", "[1, 2)"),
    (r"(-\infty,3)\cup(5,\infty)", r"(5,\infty)\cup(-\infty,3)"),
    (r"\{1,2\}", r"\{2,1\}"),
    ("{1,2}", r"\{1,2\}"),
    ("1 and -2", "-2,1"),
    (r"\pm 3", "3,-3"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ("4210_5", "4210_{5}"),
    (r"\(\frac{1}{2}\)", "0.5"),
    (r"\text{Evelyn}", "evelyn"),
    ("yes", r"\text{Yes}"),
    (r"\text{(C)}", "C"),
    ("12:30 PM", r"12:30 \text{ PM}"),
    (r"\text{June 20}", "June 20"),
    ("7", "so 3 + 4 = 7, which is\n#### 7"),
    ("7", r"Thus 3 + 4 = \boxed{7}."),
]

DIFFERENT = [
    ("1234", "1235"),
    ("1,234", "1.234"),
    ("100", "1,00"),
    ("1,2,3", "123"),
    ("7 8", "78"),
    ("5 6", "30"),
    ("1/2", "2/1"),
    ("0.3333", r"\frac13"),
    (r"\sqrt{2}", "1.414"),
    ("5", "-5"),
    ("50%", "5"),
    ("2x", "2"),
    ("x^2", "x^3"),
    ("x", "y"),
    ("x=5", "y=5"),
    ("6-5i", "6+5i"),
    ("(1,2)", "(2,1)"),
    ("[1,2)", "[1,2]"),
    (r"\{1,2\}", r"\{1,2,3\}"),
    ("1,2", "1"),
    ("5 or 6", "5"),
    ("5;6", "5"),
    ("east", "seat"),
    ("Evelyn", r"\text{Angela}"),
    ("A", "B"),
    ("not 5", "5"),
    ("4210_5", "4210_7"),
    (r"\frac{1}{2}+\foo{", r"\frac{1}{2}"),
    ("5 @@ foo", "5"),
    ("(5", "5"),
    ("3+", "3"),
    ("1/0", "5"),
    ("nan", "5"),
    (r"\infty", "5"),
    ("", "5"),
    ("5" * (LONGEST + 1), "5" * (LONGEST + 1)),
]


@pytest.mark.parametrize(("answer", "reference"), EQUAL)
def test_equal(grader, answer, reference):
    assert grader.readable(reference)
    assert grader.same(answer, reference)


@pytest.mark.parametrize(("answer", "reference"), DIFFERENT)
def test_different(grader, answer, reference):
    assert not grader.same(answer, reference)


@pytest.mark.parametrize("reference", ["", "  ", "####", "{", r"\frac{", "???", r"\boxed{}", "1" * (LONGEST + 1)])
def test_an_unreadable_reference_equals_nothing_not_even_itself(grader, reference):
    assert not grader.readable(reference)
    assert not grader.same(reference, reference)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"So it is \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"First \boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed 7.", "7"),
        (r"\fbox{8}", "8"),
        (r"\boxed{3} and then \boxed{\frac{1", "3"),
        (r"\boxed{3}. The answer is 4.", "3"),
        (r"\boxed{\frac{1}{2", None),
        (r"\boxed{42", None),
        (r"\boxed{}", None),
        (r"\boxed{} but 4", "4"),
        ("9 * 2 = 18\n#### 18", "18"),
        ("#### $1,234 per day\nand 7 more", "$1,234"),
        ("####\n\n5", "5"),
        ("####", None),
        ("A: 42", "42"),
        ("Q: how many? A: 42 apples.", "42"),
        ("**Answer:** 42", "42"),
        ("**Final Answer**\nThe final answer is: $x=5$. I hope it is correct.", "x=5"),
        ("Final Answer:\n\\[\n\\frac{1}{2}\n\\]", r"\frac{1}{2}"),
        ("The answer is 3.5 meters.", "3.5"),
        ("The answer is $18 per day and $20 per night.", "$18"),
        (r"The answer is $\$18.90$.", r"\$18.90"),
        (r"The answer is \frac{3}{4}.", r"\frac{3}{4}"),
        ("The answer is -5.", "-5"),
        ("The answer to the question is 12.", "12"),
        ("The answer is $1$, $2$ and $3$.", "1, 2, 3"),
        ("The answer is 5, not 6.", "5"),
        ("The answer is no.", "no"),
        ("Answer: the total is 42 apples", "42"),
        ("Answer: 42 (since 6*7=42)", "42"),
        ("Answer: 2x + 3", "2x + 3"),
        ("Answer: (2, 3)", "(2, 3)"),
        ("Answer: Evelyn", "Evelyn"),
        ("Answer: 15%", "15%"),
        (r"The answer is $\begin{pmatrix} 1 \\ 2 \end{pmatrix}$", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        (r"3\sqrt{13}", r"3\sqrt{13}"),
        ("<think>the answer is 4</think> so 5", "5"),
        ("the answer is 4</think>", "4"),
        ("She makes 9*2 = $18 every day.", "18"),
        ("You save $4 + $2 = $6 in all.", "6"),
        ("so $x = 3$ and we are done", "x = 3"),
        ("That leaves $x$ apples, and then $5$ of 7.", "7"),
        (r"so we have \frac{3}{4} of it", r"\frac{3}{4}"),
        ("57 seats are free after the 2nd stop", "57"),
        ("half is 12.5%", "12.5%"),
        ("that makes $118 000 in all", "118 000"),
        (r"so 7 of them, \boxed{x = 42", "7"),
        ("37+85=122,122+6=128", "128"),
        ("no number here", None),
        ("@!", None),
        ("", None),
    ],
)
def test_extraction(grader, response, answer):
    assert grader.extract(response) == answer


def test_only_the_end_of_a_long_response_is_searched(grader):
    assert grader.extract("A: 5\n" + "hm " * REACH) is None
    assert grader.extract("hm " * REACH + "\nA: 5") == "5"


@pytest.mark.parametrize(("answer", "_"), EQUAL)
def test_a_bare_answer_given_as_a_response_equals_itself(grader, answer, _):
    boxed = grader.extract(rf"\boxed{{{answer}}}")
    assert grader.same(boxed, answer)
