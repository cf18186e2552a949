"""Batches: every row once, in sizes that fit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.training.batches import micro_batches, minibatches, shuffled

LENGTHS = st.lists(st.integers(0, 50), min_size=1, max_size=40).map(np.array)


@given(LENGTHS, st.integers(1, 200), st.data())
def test_micro_batches_hold_every_row_once_within_the_budget(lengths, budget, data):
    rows = np.array(data.draw(st.lists(st.integers(0, len(lengths) - 1), unique=True)), dtype=np.int64)
    parts = list(micro_batches(rows, lengths, budget))
    assert sorted(row for part in parts for row in part) == sorted(rows)
    for part in parts:
        assert len(part) == 1 or len(part) * lengths[part].max() <= budget
    longest = [lengths[part].max() for part in parts]
    assert longest == sorted(longest, reverse=True)


@given(st.integers(1, 20))
def test_micro_batches_are_as_large_as_fits(count):
    parts = list(micro_batches(np.arange(count), np.full(20, 5), 20))
    assert [len(part) for part in parts] == [4] * (count // 4) + [count % 4] * (count % 4 > 0)


@given(st.integers(0, 60), st.integers(1, 70))
def test_minibatches_keep_the_order_and_differ_by_one_row_at_most(count, parts):
    rows = shuffled(count, 0, 0)
    dealt = list(minibatches(rows, parts))
    assert np.array_equal(np.concatenate([*dealt, np.array([], dtype=np.int64)]), rows)
    assert len(dealt) == min(parts, count)
    sizes = {len(part) for part in dealt}
    assert not sizes or max(sizes) - min(sizes) <= 1


@given(st.integers(0, 50), st.integers(0, 5), st.integers(0, 5))
def test_an_epoch_is_a_permutation_of_all_rows_and_the_same_every_time(count, seed, epoch):
    assert sorted(shuffled(count, seed, epoch)) == list(range(count))
    assert np.array_equal(shuffled(count, seed, epoch), shuffled(count, seed, epoch))


@pytest.mark.parametrize("other", [(1, 0), (0, 1)])
def test_seeds_and_epochs_have_their_own_order(other):
    assert not np.array_equal(shuffled(50, 0, 0), shuffled(50, *other))
