"""What a token counts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.algorithms.weights import WEIGHTS

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "weights.json").read_text())


@pytest.mark.parametrize("case", GOLDEN["weights"], ids=lambda case: case["name"])
def test_weighted_sum_golden(case):
    mask = torch.tensor(case["inputs"]["mask"], dtype=torch.bool)
    weights = WEIGHTS[case["inputs"]["weights"]](mask)
    loss = (weights * torch.tensor(case["inputs"]["loss"], dtype=torch.float64)).sum()
    np.testing.assert_allclose(loss, case["outputs"], rtol=1e-6)


@pytest.mark.parametrize("case", GOLDEN["token_weights"], ids=lambda case: case["name"])
def test_weight_of_one_token_golden(case):
    mask = torch.tensor(case["inputs"]["mask"], dtype=torch.bool)
    weights = WEIGHTS[case["inputs"]["weights"]](mask)
    np.testing.assert_allclose(weights, np.where(mask, np.array(case["outputs"])[:, None], 0), rtol=1e-6)


@pytest.mark.parametrize("name", WEIGHTS)
def test_nothing_counts_where_nothing_is_masked_in(name):
    np.testing.assert_array_equal(WEIGHTS[name](torch.zeros(2, 3, dtype=torch.bool)), 0)
