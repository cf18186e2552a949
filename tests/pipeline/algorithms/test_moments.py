"""Mean and spread over lots."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pipeline.algorithms.lots import ELEMENTS, lots
from pipeline.algorithms.moments import Moments

NUMBERS = arrays.arrays(np.float32, st.integers(1, 60), elements=st.floats(-1e3, 1e3, width=32))


@given(values=NUMBERS)
def test_a_single_lot_says_what_numpy_says(values):
    numbers = values.astype(np.float64)
    for made in (Moments.of(values), Moments() + Moments.of(values), Moments.of(values) + Moments()):
        assert (made.count, made.mean, made.std) == (len(numbers), numbers.mean(), numbers.std())


@given(values=NUMBERS, seed=st.integers(0, 99), ddof=st.sampled_from([0, 1]))
def test_lots_add_up_to_the_whole(values, seed, ddof):
    ends = np.sort(np.random.default_rng(seed).integers(0, len(values) + 1, 4))
    made = sum((Moments.of(lot) for lot in np.split(values, ends)), Moments())
    whole = Moments.of(values)
    scale = float(np.abs(values).max())
    assert made.count == whole.count
    assert made.mean == pytest.approx(whole.mean, rel=1e-13, abs=1e-14 * scale)
    assert made.variance(ddof) == pytest.approx(whole.variance(ddof), rel=1e-12, abs=1e-14 * scale**2)


def test_equal_numbers_have_no_spread_however_they_are_cut():
    made = sum((Moments.of(np.full(n, 0.5)) for n in (3, 1, 64, 7)), Moments())
    assert made == Moments(75, 0.5, 0.0)


def test_nothing_has_no_spread():
    assert Moments.of(np.zeros(0)) == Moments() and Moments().variance(1) == 0


@pytest.mark.parametrize("shape", [(0, 3), (1, 0), (5, ELEMENTS // 2), (5, 2 * ELEMENTS), (7, 1)])
def test_lots_cover_all_rows_in_order(shape):
    rows = [row for lot in lots(shape) for row in range(shape[0])[lot]]
    assert rows == list(range(shape[0]))
