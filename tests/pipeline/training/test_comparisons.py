"""Comparisons: how often the model says what people say, in all and by kind."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.training.comparisons import Comparisons, agreement, calibration, kinds, length_bias, measures


def comparisons(lead, **given):
    count = len(lead)
    columns = {
        "rankings": [f"r{n}" for n in range(count)], "better": np.zeros(count, int), "worse": np.ones(count, int),
        "prompts": [f"p{n}" for n in range(count)], "annotators": [""] * count, "rank_gap": np.ones(count, int),
        "rating_gap": np.full(count, np.nan), "length_gap": np.zeros(count, int),
    }  # fmt: skip
    arrays = {name: np.array(value) if name.endswith("gap") else value for name, value in given.items()}
    return Comparisons(lead=np.array(lead, dtype=float), **{**columns, **arrays})


def shares(numbers, kind):
    """Bin -> (accuracy, pairs)."""
    names = [name.removeprefix(f"pairs/{kind}/") for name in numbers if name.startswith(f"pairs/{kind}/")]
    return {name: (numbers[f"accuracy/{kind}/{name}"][0], numbers[f"pairs/{kind}/{name}"][0]) for name in names}


def test_equal_scores_are_half_right():
    made = comparisons([2.0, -1.0, 0.0, 0.5], prompts=["p", "p", "q", "q"])
    assert made.right.tolist() == [1.0, 0.0, 0.5, 1.0]
    accuracy, error = agreement(made)
    assert accuracy == 0.625
    # excess over the mean: p -0.25, q +0.25; sqrt(2 / 1 * 0.125) / 4
    assert error == pytest.approx(0.125)


def test_accuracy_by_difference_of_length():
    made = comparisons([1, -1, 1, 1, -1, 0], length_gap=[-30, -30, -2, 0, 7, 40])
    assert shares(kinds(made), "length_gap") == {
        "-30..-30": (0.5, 2), "-2..-2": (1, 1), "+0..+0": (1, 1), "+7..+7": (0, 1), "+40..+40": (0.5, 1),
    }  # fmt: skip


def test_many_differences_fall_into_bins_of_equal_size():
    made = comparisons(np.where(np.arange(50) < 10, -1.0, 1.0), length_gap=np.arange(50) - 25)
    assert shares(kinds(made), "length_gap") == {
        "-25..-16": (0, 10), "-15..-6": (1, 10), "-5..+4": (1, 10), "+5..+14": (1, 10), "+15..+24": (1, 10),
    }  # fmt: skip


def test_accuracy_by_difference_of_the_ratings_where_there_are_any():
    made = comparisons([1, -1, 1, 1, -1], rating_gap=[1.0, 1.0, np.nan, 2.5, np.nan])
    assert shares(kinds(made), "rating_gap") == {"1..1": (0.5, 2), "2.5..2.5": (1, 1)}
    assert shares(kinds(comparisons([1, -1])), "rating_gap") == {}


def test_differences_of_ratings_that_differ_by_rounding_are_one():
    gaps = np.float32([0.3, 0.2, 0.7]).astype(float) - np.float32([0.2, 0.1, 0.6]).astype(float)
    assert len(set(gaps)) == 3
    assert shares(kinds(comparisons([1, 1, -1], rating_gap=gaps)), "rating_gap") == {"0.1..0.1": (2 / 3, 3)}


def test_accuracy_by_difference_of_the_ranks_where_there_is_more_than_one():
    made = comparisons([1, -1, 1, -1], rank_gap=[1, 1, 3, 3])
    assert shares(kinds(made), "rank_gap") == {"1": (0.5, 2), "3": (0.5, 2)}
    assert shares(kinds(comparisons([1, -1], rank_gap=[2, 2])), "rank_gap") == {}


def test_accuracy_by_annotator_where_they_have_names():
    made = comparisons([1, -1, 1, -1], annotators=["ben", "ann", "ben", ""])
    assert shares(kinds(made), "annotator") == {"ann": (0, 1), "ben": (1, 2)}
    assert shares(kinds(comparisons([1])), "annotator") == {}


@pytest.mark.parametrize(
    ("gaps", "bins"),
    [
        ([0] * 90 + [1] * 10, {"+0..+0": 90, "+1..+1": 10}),
        ([3] * 20, {"+3..+3": 20}),
        ([-8], {"-8..-8": 1}),
        ([0] * 95 + [1, 2, 3, 4, 5], {"+0..+5": 100}),
    ],
    ids=["two values", "one value", "one pair", "almost all equal"],
)
def test_equal_differences_are_in_one_bin(gaps, bins):
    found = shares(kinds(comparisons(np.ones(len(gaps)), length_gap=gaps)), "length_gap")
    assert {name: pairs for name, (_, pairs) in found.items()} == bins


def test_calibration_by_hand():
    sure = np.array([0.77, 0.76, 0.93, 0.94, 0.83])  # of the side that the model prefers
    numbers = calibration(comparisons(np.log(sure / (1 - sure)) * [1, -1, 1, 1, 1]))
    assert numbers["calibration/error"][0] == pytest.approx((2 * abs(0.5 - 0.765) + 2 * (1 - 0.935) + (1 - 0.83)) / 5)
    bins = {"0.75-0.80": (0.765, 0.5, 2), "0.80-0.85": (0.83, 1, 1), "0.90-0.95": (0.935, 1, 2)}
    for name, wanted in bins.items():
        found = [numbers[f"calibration/{name}/{what}"][0] for what in ("predicted", "observed", "pairs")]
        assert found == pytest.approx(list(wanted))
    assert len(numbers) == 1 + 3 * len(bins)


def test_what_is_as_sure_as_it_is_right_is_calibrated():
    lead = np.log(3.0) * np.array([1, 1, 1, -1])
    assert calibration(comparisons(lead))["calibration/error"][0] == pytest.approx(0)
    assert calibration(comparisons([-50.0] * 3))["calibration/error"][0] == pytest.approx(1)
    assert calibration(comparisons([0.0] * 3))["calibration/error"][0] == 0


def test_the_model_may_prefer_length_more_than_people_do():
    made = comparisons([1, 1, 1, 0, 1], length_gap=[5, -5, -5, 2, 0])
    numbers = length_bias(made, np.array([1.0, 2.0, 3.0]), np.array([2, 4, 6]))
    assert numbers["reward_scores/length_correlation"][0] == pytest.approx(1)
    assert numbers["longer/model"][0] == (1 + 0 + 0 + 0.5) / 4
    assert numbers["longer/people"][0] == 0.5


@pytest.mark.parametrize(("scores", "lengths"), [([1.0, 1.0], [2, 3]), ([1.0, 2.0], [3, 3]), ([1.0], [3])])
def test_where_nothing_varies_the_correlation_with_length_is_zero(scores, lengths):
    found = length_bias(comparisons([1.0]), np.array(scores), np.array(lengths))
    assert found == {"reward_scores/length_correlation": (0.0, "")}


LEADS = st.one_of(st.just(0.0), st.floats(-30, 30))
PAIRS = st.lists(
    st.tuples(
        LEADS, st.sampled_from(["", "ann", "ben"]), st.integers(1, 8), st.integers(-300, 300) | st.sampled_from([0, 1]),
        st.just(np.nan) | st.floats(-1e7, 1e7) | st.sampled_from([0.5, 1.0, 0.1 + 0.2, 0.3]), st.integers(0, 4),
    ),
    min_size=1, max_size=60,
)  # fmt: skip


def of(pairs):
    lead, annotators, rank_gap, length_gap, rating_gap, prompt = zip(*pairs, strict=True)
    return comparisons(
        lead, annotators=list(annotators), rank_gap=rank_gap, length_gap=length_gap, rating_gap=rating_gap,
        prompts=[f"p{number}" for number in prompt],
    )  # fmt: skip


@given(PAIRS)
def test_the_bins_of_a_kind_hold_every_pair_once(pairs):
    made = of(pairs)
    numbers = kinds(made)
    rated, named = np.isfinite(made.rating_gap), np.array(made.annotators) != ""
    everything = np.ones(len(pairs), bool)
    for kind, rows in {"length_gap": everything, "rating_gap": rated, "annotator": named}.items():
        found = shares(numbers, kind)
        assert sum(count for _, count in found.values()) == rows.sum()
        assert sum(share * count for share, count in found.values()) == pytest.approx(made.right[rows].sum())
    found = shares(numbers, "rank_gap")
    assert sum(count for _, count in found.values()) == (len(pairs) if len(set(made.rank_gap)) > 1 else 0)
    assert len(shares(numbers, "length_gap")) <= 5
    assert len(shares(numbers, "rating_gap")) <= 4


@given(PAIRS)
def test_calibration_bins_add_up(pairs):
    made = of(pairs)
    numbers = calibration(made)
    assert 0 <= numbers["calibration/error"][0] <= 1
    assert sum(value for name, (value, _) in numbers.items() if name.endswith("/pairs")) == len(pairs)
    observed = [
        numbers[f"{name.removesuffix('/pairs')}/observed"][0] * value
        for name, (value, _) in numbers.items() if name.endswith("/pairs")
    ]  # fmt: skip
    assert sum(observed) == pytest.approx(made.right.sum())


@given(PAIRS, st.randoms(use_true_random=False))
def test_the_order_of_the_pairs_changes_nothing(pairs, random):
    shuffled = random.sample(pairs, len(pairs))
    scores, lengths = np.array([0.5, 1.0, 3.0]), np.array([3, 1, 4])
    one, other = (measures(of(some), scores, lengths) for some in (pairs, shuffled))
    assert one.keys() == other.keys()
    for name, (value, unit) in one.items():
        assert other[name] == (pytest.approx(value, abs=1e-9), unit)
    assert agreement(of(pairs)) == pytest.approx(agreement(of(shuffled)), nan_ok=True)


@given(PAIRS)
def test_turning_every_score_round_turns_the_accuracy_round(pairs):
    turned = [(-lead, *rest) for lead, *rest in pairs]
    assert agreement(of(turned))[0] == pytest.approx(1 - agreement(of(pairs))[0])


def test_one_row_per_comparison_as_columns():
    made = comparisons([1.0, -1.0], annotators=["ann", ""], length_gap=[2, -3])
    columns = made.columns()
    assert {len(column) for column in columns.values()} == {2}
    assert columns["right"].tolist() == [1, 0]
    assert columns["ranking_id"] == ["r0", "r1"]
