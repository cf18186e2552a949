"""Which rows train."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.algorithms.filters import first, mixed_outcomes

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "filters.json").read_text())


@pytest.mark.parametrize("case", GOLDEN["mixed_outcomes"], ids=lambda case: case["name"])
def test_mixed_outcomes_golden(case):
    group = np.array(case["inputs"]["group"])
    kept = mixed_outcomes(np.array(case["inputs"]["verdicts"], np.float64), group)
    np.testing.assert_array_equal(kept.keep, np.isin(group, case["outputs"]))
    assert kept.reason == "constant outcomes"


def test_a_row_without_verdict_is_no_outcome():
    verdicts = np.array([1.0, np.nan, 1.0, 0.0, np.nan, np.nan])
    kept = mixed_outcomes(verdicts, np.array([7, 7, 3, 3, 3, 5]))
    np.testing.assert_array_equal(kept.keep, [False, False, True, True, True, False])


def test_no_rows_are_no_groups():
    assert mixed_outcomes(np.zeros(0), np.zeros(0, np.int64)).keep.shape == (0,)


def test_first_keeps_the_first_samples_and_not_the_greedy_one():
    kept = first(np.array([-1, 0, 1, 2, 3], np.int32), n=2)
    np.testing.assert_array_equal(kept.keep, [False, True, True, False, False])
    assert kept.reason == "beyond first 2"
