"""Weights against the mismatch between engine and trainer."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.algorithms.importance import IMPORTANCE, sequence_truncated, token_truncated
from pipeline.algorithms.shelf import Line
from pipeline.errors import RecipeError

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "importance.json").read_text())


@pytest.mark.parametrize("piece", [token_truncated, sequence_truncated], ids=lambda piece: piece.__name__)
@pytest.mark.parametrize("case", GOLDEN["weights"], ids=lambda case: case["name"])
@pytest.mark.parametrize(("dtype", "rtol"), [(np.float64, 1e-6), (np.float32, 1e-4)], ids=["float64", "float32"])
def test_weights_golden(piece, case, dtype, rtol):
    inputs = case["inputs"]
    old, sampler = (np.log(np.array(inputs[name])).astype(dtype) for name in ("old", "sampler"))
    weights = piece(old, sampler, np.array(inputs["mask"], bool), cap=inputs["cap"])
    np.testing.assert_allclose(weights, case["outputs"][piece.__name__], rtol=rtol)
    assert weights.dtype == dtype


def test_long_responses_leave_no_range():
    old, mask = np.array([[-1.0] * 900, [-9.0] * 900]), np.ones((2, 900), bool)
    weights = sequence_truncated(old, old[::-1], mask)
    np.testing.assert_allclose(weights[:, 0], [2.0, np.exp(-20)])


def test_a_recipe_line_caps_at_two_and_below_one_there_is_nothing_to_cap():
    piece = IMPORTANCE.take(Line(kind="token_truncated"))
    columns = {
        "old_logprobs": np.zeros((1, 1)),
        "sampler_logprobs": np.full((1, 1), -3.0),
        "mask": np.ones((1, 1), bool),
    }
    np.testing.assert_array_equal(piece(columns), [[2.0]])
    with pytest.raises(RecipeError, match="greater than or equal to 1"):
        IMPORTANCE.take(Line(kind="token_truncated", cap=0.5))
