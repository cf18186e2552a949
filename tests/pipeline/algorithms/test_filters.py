"""Which rows train."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.algorithms.advantages import group_mean
from pipeline.algorithms.filters import drawn, first, mixed_outcomes
from pipeline.algorithms.labels import verifier
from pipeline.algorithms.normalizers import group_std

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "filters.json").read_text())


def golden(section):
    return pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in GOLDEN[section]])


@golden("mixed_outcomes")
def test_mixed_outcomes_golden(case):
    group = np.array(case["inputs"]["group"])
    kept = mixed_outcomes(np.array(case["inputs"]["verdicts"], np.float64), group)
    np.testing.assert_array_equal(kept.keep, np.isin(group, case["outputs"]))
    assert kept.reason == "constant outcomes"


@golden("equal_rewards")
def test_equal_rewards_train_nobody_whatever_rounding_does_to_their_deviation(case):
    rewards = np.array(case["inputs"]["rewards"])
    np.testing.assert_allclose(rewards.std(), case["outputs"]["deviation"], atol=1e-15)
    group = np.zeros(len(rewards), np.int64)
    labels = verifier(np.ones(len(rewards)), correct=float(rewards[0]), wrong=-1.0)
    np.testing.assert_array_equal(mixed_outcomes(labels.verdicts, group).keep, case["outputs"]["keep"])
    mask = np.ones((len(rewards), 1), bool)
    credit = group_mean(rewards[:, None], mask, group).advantages
    np.testing.assert_array_equal(group_std(credit, mask, group, eps=1e-9), 0)


def test_a_row_without_verdict_is_no_outcome():
    verdicts = np.array([1.0, np.nan, 1.0, 0.0, np.nan, np.nan])
    kept = mixed_outcomes(verdicts, np.array([7, 7, 3, 3, 3, 5]))
    np.testing.assert_array_equal(kept.keep, [False, False, True, True, True, False])


def test_no_rows_are_no_groups():
    nobody = np.zeros(0, np.int64)
    assert mixed_outcomes(np.zeros(0), nobody).keep.shape == (0,)
    assert drawn(nobody, nobody, np.zeros(0), n=1).keep.shape == (0,)


def test_first_keeps_the_first_samples_and_not_the_greedy_one():
    kept = first(np.array([-1, 0, 1, 2, 3], np.int32), n=2)
    np.testing.assert_array_equal(kept.keep, [False, True, True, False, False])
    assert kept.reason == "beyond first 2"


@golden("drawn")
def test_drawn_golden(case):
    sample, group, lottery = (np.array(case["inputs"][name]) for name in ("sample", "group", "lottery"))
    kept = drawn(sample, group, lottery, n=case["inputs"]["n"])
    np.testing.assert_array_equal(kept.keep, np.array(case["outputs"], bool))
    assert kept.reason == "not among 2 drawn"


def test_equal_lottery_numbers_are_decided_by_the_sample():
    kept = drawn(np.array([2, 0, 1]), np.zeros(3, np.int64), np.full(3, 0.5), n=2)
    np.testing.assert_array_equal(kept.keep, [False, True, True])
