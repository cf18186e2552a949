"""One number that is not finite is enough."""

import math

import pytest
import torch

from pipeline.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 500, 999])
def test_any_number_that_is_not_finite_is_seen(dtype, bad, place):
    numbers = torch.linspace(-3, 3, 1000).to(dtype)
    assert all_finite(numbers)
    numbers[place] = bad
    assert not all_finite(numbers)
    assert not all_finite(numbers.view(10, 100).t().requires_grad_())


def test_of_no_numbers_all_are():
    assert all_finite(torch.empty(0, 3))
