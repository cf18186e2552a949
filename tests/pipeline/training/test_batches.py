"""Batches: every row once, in sizes that fit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.packing import MOST_PADDING
from pipeline.training.batches import dealt, drawn, held_out, micro_batches, shuffled

LENGTHS = st.lists(st.integers(0, 50), min_size=1, max_size=40).map(np.array)


@given(LENGTHS, st.integers(1, 200), st.data())
def test_micro_batches_hold_every_row_once_within_the_budget(lengths, budget, data):
    rows = np.array(data.draw(st.lists(st.integers(0, len(lengths) - 1), unique=True)), dtype=np.int64)
    parts = list(micro_batches(rows, lengths, budget))
    assert sorted(row for part in parts for row in part) == sorted(rows)
    for part in parts:
        padded = len(part) * lengths[part].max()
        assert len(part) == 1 or padded <= budget
        assert lengths[part].sum() >= (1 - MOST_PADDING) * padded
    longest = [lengths[part].max() for part in parts]
    assert longest == sorted(longest, reverse=True)


@given(st.integers(1, 20))
def test_micro_batches_are_as_large_as_fits(count):
    parts = list(micro_batches(np.arange(count), np.full(20, 5), 20))
    assert [len(part) for part in parts] == [4] * (count // 4) + [count % 4] * (count % 4 > 0)


def test_a_micro_batch_ends_where_it_would_be_padding():
    lengths = np.array([100, 98, 70, 66, 65, 10])
    found = [lengths[part].tolist() for part in micro_batches(np.arange(6), lengths, 1000)]
    assert found == [[100, 98], [70, 66, 65], [10]]
    assert [part.tolist() for part in micro_batches(np.arange(6), lengths, 1000, packed=True)] == [list(range(6))]


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 5)), min_size=1, max_size=40), st.integers(1, 200))
def test_packed_rows_stay_with_their_group_where_it_fits(made, budget):
    lengths, groups = (np.array(column) for column in zip(*made, strict=True))
    rows = np.flatnonzero(groups < 5)
    parts = list(micro_batches(rows, lengths, budget, packed=True, groups=groups))
    assert sorted(row for part in parts for row in part) == rows.tolist()
    for part in parts:
        assert len(part) == 1 or lengths[part].sum() <= budget
    for group in np.unique(groups[rows]):
        whole = rows[groups[rows] == group]
        if lengths[whole].sum() <= budget:
            assert sum(bool(set(whole) & set(part)) for part in parts) == 1
    if parts:
        assert lengths[parts[0]].max() == lengths[rows].max()


def test_packed_rows_without_groups_are_cut_by_the_budget_alone():
    parts = list(micro_batches(np.arange(4), np.array([1, 9, 3, 5]), 9, packed=True))
    assert [part.tolist() for part in parts] == [[1], [3, 2, 0]]


@given(st.integers(0, 60), st.integers(1, 70), st.integers(1, 3))
def test_every_epoch_deals_its_order_to_steps_that_differ_by_one_row_at_most(count, minibatches, epochs):
    steps = dealt(count, epochs, minibatches, 5)
    per_epoch = min(minibatches, count)
    assert len(steps) == epochs * per_epoch
    for epoch in range(epochs if count else 0):
        mine = steps[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert np.array_equal(np.concatenate(mine), shuffled(count, 5, epoch))
        sizes = {len(step) for step in mine}
        assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 20), st.integers(0, 70), st.lists(st.integers(0, 30), max_size=5))
def test_a_stream_goes_on_where_it_stopped_and_passes_over_all_rows_again_and_again(count, start, takes):
    places = np.cumsum([start, *takes])
    pieces = [drawn(count, int(place), take, 3) for place, take in zip(places, takes, strict=False)]
    whole = drawn(count, start, sum(takes), 3)
    assert np.array_equal(np.concatenate([np.zeros(0), *pieces]), whole)
    everything = drawn(count, 0, start + sum(takes), 3)
    assert np.array_equal(everything[start:], whole)
    for begin in range(0, len(everything) - count + 1, count):
        assert sorted(everything[begin : begin + count]) == list(range(count))


def test_a_stream_is_shuffled_anew_at_each_pass():
    first, second = np.split(drawn(50, 0, 100, 3), 2)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, drawn(50, 0, 50, 4))


@given(st.integers(0, 50), st.integers(0, 5), st.integers(0, 5))
def test_an_epoch_is_a_permutation_of_all_rows_and_the_same_every_time(count, seed, epoch):
    assert sorted(shuffled(count, seed, epoch)) == list(range(count))
    assert np.array_equal(shuffled(count, seed, epoch), shuffled(count, seed, epoch))


@pytest.mark.parametrize("other", [(1, 0), (0, 1)])
def test_seeds_and_epochs_have_their_own_order(other):
    assert not np.array_equal(shuffled(50, 0, 0), shuffled(50, *other))


@given(groups=st.integers(1, 30), share=st.floats(0, 0.99), seed=st.integers(0, 99))
def test_no_prompt_is_trained_on_and_held_out(groups, share, seed):
    names = [f"p{number // 3}" + "#1" * (number % 3 == 2) for number in range(3 * groups)]
    apart = held_out(names, share, seed)
    prompts = np.arange(3 * groups) // 3
    assert not set(prompts[apart]) & set(prompts[~apart])
    assert not apart.all()
    assert apart.any() == (share > 0 and groups > 1)


def test_a_prompt_stays_on_its_side_when_others_join():
    names = [f"p{number}" for number in range(200)]
    some, more = held_out(names[:100], 0.2, 0), held_out(names, 0.2, 0)
    assert (some == more[:100]).all()
    assert 25 < more.sum() < 55
