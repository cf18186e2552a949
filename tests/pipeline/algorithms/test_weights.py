"""What a token counts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.algorithms.weights import WEIGHTS

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "weights.json").read_text())


def _weigh(inputs):
    mask = torch.tensor(inputs["mask"], dtype=torch.bool)
    return WEIGHTS[inputs["weights"]](mask, torch.tensor(inputs.get("group", [0] * len(mask))))


@pytest.mark.parametrize("case", GOLDEN["weights"], ids=lambda case: case["name"])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-6), (torch.float32, 1e-4)], ids=["float64", "float32"])
def test_weighted_sum_golden(case, dtype, rtol):
    loss = (_weigh(case["inputs"]) * torch.tensor(case["inputs"]["loss"], dtype=dtype)).sum()
    np.testing.assert_allclose(case["inputs"].get("coef", 1.0) * loss, case["outputs"], rtol=rtol)


@pytest.mark.parametrize("case", GOLDEN["token_weights"], ids=lambda case: case["name"])
def test_weight_of_one_token_golden(case):
    expected = np.where(case["inputs"]["mask"], np.array(case["outputs"])[:, None], 0)
    np.testing.assert_allclose(_weigh(case["inputs"]), expected, rtol=1e-6)


@pytest.mark.parametrize("name", WEIGHTS)
def test_nothing_counts_where_nothing_is_masked_in(name):
    np.testing.assert_array_equal(_weigh({"weights": name, "mask": [[0] * 3] * 2, "group": [0, 1]}), 0)


def test_groups_are_told_apart_by_number_and_one_without_tokens_is_no_group():
    inputs = {"weights": "group_token_mean", "mask": [[1, 0], [1, 1], [0, 0], [1, 1]], "group": [7, -2, 5, 7]}
    expected = [[1 / 6, 0], [1 / 4, 1 / 4], [0, 0], [1 / 6, 1 / 6]]
    np.testing.assert_allclose(_weigh(inputs), expected, rtol=1e-6)


@pytest.mark.parametrize("name", sorted(set(WEIGHTS) - {"group_token_mean"}))
def test_the_others_do_not_read_the_group(name):
    inputs = {"weights": name, "mask": [[1, 0], [1, 1], [0, 0]]}
    np.testing.assert_array_equal(_weigh(inputs), _weigh({**inputs, "group": [0, 1, 1]}))
