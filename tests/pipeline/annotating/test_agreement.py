"""How far annotators agree: by hand, and what must hold whatever they said."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.annotating.agreement import Agreement, measure

ranks = st.integers(2, 6).flatmap(lambda k: st.lists(st.integers(0, 4), min_size=k, max_size=k))
two = st.integers(2, 6).flatmap(
    lambda k: st.tuples(*[st.lists(st.integers(0, 4), min_size=k, max_size=k) for _ in range(2)])
)


def of(one, other):
    return measure({"q": {"anna": one, "ben": other}})[0]


def numbers(agreement):
    return agreement.pairwise, agreement.untied, agreement.kendall_tau


def same(one, other):
    return numbers(one) == pytest.approx(numbers(other))


@pytest.mark.parametrize(
    ("one", "other", "pairwise", "untied", "tau"),
    [
        ([0, 1, 2], [0, 1, 2], 3 / 3, 3 / 3, 1.0),
        ([0, 1, 2], [2, 1, 0], 0 / 3, 0 / 3, -1.0),
        ([0, 1, 2], [0, 2, 1], 2 / 3, 2 / 3, 1 / 3),
        # pairs: better better, better better, tie better. tau-b = 2 / sqrt((3 - 1)(3 - 0))
        ([0, 1, 1], [0, 1, 2], 2 / 3, 2 / 2, 2 / 6**0.5),
        # pairs: tie better, better better, better tie. tau-b = 1 / sqrt((3 - 1)(3 - 1))
        ([0, 0, 1], [0, 1, 1], 1 / 3, 1 / 1, 1 / 2),
        # pairs: tie tie, better worse, better worse. tau-b = -2 / sqrt((3 - 1)(3 - 1))
        ([0, 0, 1], [1, 1, 0], 1 / 3, 0 / 2, -1.0),
        ([0, 0], [0, 0], 1 / 1, None, None),
        ([0, 0], [0, 1], 0 / 1, None, None),
        # 6 pairs; only (1, 2) the other way round. tau-b = (5 - 1) / 6
        ([0, 1, 2, 3], [0, 2, 1, 3], 5 / 6, 5 / 6, 4 / 6),
    ],
)
def test_two_annotators_by_hand(one, other, pairwise, untied, tau):
    assert numbers(of(one, other)) == pytest.approx((pairwise, untied, tau))


THREE = {
    "q1": {"anna": [0, 1, 2], "ben": [0, 2, 1], "cleo": [0, 0, 1]},
    "q2": {"ben": [0, 1], "anna": [1, 0]},
    "q3": {"cleo": [0, 1]},
    "q4": {},
}
"""q1: anna and ben agree on 2 of 3 pairs, anna and cleo on 2 of 3 (one tied), ben and cleo on 1 of 3 (one tied)."""


def test_questions_and_annotators_add_up_by_comparison():
    made, _ = measure(THREE)
    assert (made.questions, made.comparisons, made.agreed) == (2, 10, 5)
    assert (made.untied_comparisons, made.untied_agreed) == (8, 5)
    # anna and ben 1/3; anna and cleo 2/sqrt(3 * 2); ben and cleo (1 - 1)/sqrt(3 * 2); q2: -1
    assert made.kendall_tau == pytest.approx((1 / 3 + 2 / 6**0.5 + 0 - 1) / 4)


def test_by_pair_of_annotators():
    _, made = measure(THREE)
    assert list(made) == [("anna", "ben"), ("anna", "cleo"), ("ben", "cleo")]
    assert [(one.questions, one.pairwise) for one in made.values()] == [(2, 2 / 4), (1, 2 / 3), (1, 1 / 3)]
    assert [one.untied for one in made.values()] == [2 / 4, 2 / 2, 1 / 2]
    assert [one.kendall_tau for one in made.values()] == pytest.approx([(1 / 3 - 1) / 2, 2 / 6**0.5, 0])


@pytest.mark.parametrize("rankings", [{}, {"q": {}}, {"q": {"anna": [0, 1]}, "p": {"ben": [0, 1]}}])
def test_nobody_to_agree_with(rankings):
    made, by_pair = measure(rankings)
    assert made == Agreement(0, 0, 0, 0, 0, ())
    assert numbers(made) == (None, None, None)
    assert by_pair == {}


@given(two)
def test_it_does_not_matter_who_is_named_first(pair):
    one, other = pair
    assert same(of(one, other), of(other, one))
    assert same(of(one, other), measure({"q": {"zoe": one, "adam": other}})[1]["adam", "zoe"])


@given(ranks)
def test_who_says_the_same_agrees_fully(one):
    made = of(one, one)
    strict = len(set(one)) > 1
    assert numbers(made) == pytest.approx((1.0, 1.0 if strict else None, 1.0 if strict else None))


@given(two, st.randoms(use_true_random=False))
def test_names_of_responses_do_not_matter(pair, random):
    order = list(range(len(pair[0])))
    random.shuffle(order)
    assert same(of(*pair), of(*([one[place] for place in order] for one in pair)))


@given(two, st.lists(st.integers(1, 20), min_size=5, max_size=5), st.integers(-9, 9))
def test_only_the_order_of_the_ranks_matters(pair, steps, start):
    grown = [start + sum(steps[:rank]) for rank in range(5)]
    assert same(of(*pair), of([grown[rank] for rank in pair[0]], pair[1]))


@given(two)
def test_the_opposite_order_disagrees_wherever_nobody_ties(pair):
    made, turned = of(*pair), of(pair[0], [-rank for rank in pair[1]])
    assume(made.untied is not None)
    assert turned.untied == pytest.approx(1 - made.untied)
    assert turned.kendall_tau == pytest.approx(-made.kendall_tau)


@given(two)
def test_the_shares_follow_from_pairs_counted_one_by_one(pair):
    one, other = pair
    places = [(i, j) for i in range(len(one)) for j in range(i)]
    signs = [((one[i] > one[j]) - (one[i] < one[j]), (other[i] > other[j]) - (other[i] < other[j])) for i, j in places]
    made = of(one, other)
    assert made.pairwise == sum(a == b for a, b in signs) / len(signs)
    strict = [a == b for a, b in signs if a and b]
    assert made.untied == (sum(strict) / len(strict) if strict else None)
