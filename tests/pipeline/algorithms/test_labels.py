"""A reward for every response."""

import numpy as np

from pipeline.algorithms.labels import LABELS, verifier
from pipeline.algorithms.shelf import Line


def test_right_and_wrong_get_their_rewards_and_no_verdict_counts_as_wrong():
    verdicts = np.array([1.0, 0.0, np.nan])
    labels = verifier(verdicts, correct=1.0, wrong=-1.0)
    np.testing.assert_array_equal(labels.rewards, np.array([1, -1, -1], np.float32))
    np.testing.assert_array_equal(labels.verdicts, verdicts)
    assert labels.rewards.dtype == np.float32


def test_a_recipe_line_gives_the_same():
    piece = LABELS.take(Line(kind="verifier"))
    labels = piece({"verdicts": np.array([0.0, 1.0]), "group": np.array([0, 0])})
    np.testing.assert_array_equal(labels.rewards, np.array([0, 1], np.float32))
