"""Ragged columns: to padded arrays and back."""

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from pipeline import ragged

ROWS = st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=6), max_size=8)
INTS = pa.list_(pa.int32())


@given(ROWS)
def test_padded_and_back_is_the_same(rows):
    column = ragged.from_rows(rows, pa.int32())
    mask = ragged.mask_of(ragged.lengths(column))
    padded = ragged.pad(column)
    assert padded.shape == mask.shape == (len(rows), max(map(len, rows), default=0))
    assert ragged.unpad(padded, mask).equals(column)
    assert not padded[~mask].any()


@given(ROWS, st.data())
def test_a_slice_of_a_column_is_its_own_rows(rows, data):
    start = data.draw(st.integers(0, len(rows)))
    stop = data.draw(st.integers(start, len(rows)))
    sliced, alone = pa.array(rows, INTS)[start:stop], pa.array(rows[start:stop], INTS)
    assert np.array_equal(ragged.pad(sliced), ragged.pad(alone))
    assert np.array_equal(ragged.lengths(sliced), ragged.lengths(alone))


@given(st.lists(ROWS, max_size=4), st.data())
def test_chunks_do_not_matter(chunks, data):
    rows = [row for chunk in chunks for row in chunk]
    column = pa.chunked_array([pa.array(chunk, INTS) for chunk in chunks], INTS)
    start = data.draw(st.integers(0, len(rows)))
    whole = pa.array(rows[start:], INTS)
    assert np.array_equal(ragged.pad(column.slice(start)), ragged.pad(whole))
    assert np.array_equal(ragged.lengths(column.slice(start)), ragged.lengths(whole))


@given(st.lists(st.none() | st.lists(st.integers(0, 9), max_size=4), max_size=6))
def test_a_null_row_is_an_empty_row(rows):
    column, filled = pa.array(rows, INTS), pa.array([row or [] for row in rows], INTS)
    assert ragged.lengths(column).tolist() == [len(row or []) for row in rows]
    assert np.array_equal(ragged.pad(column), ragged.pad(filled))


def test_a_null_row_that_hides_elements_shows_none_of_them():
    column = pa.ListArray.from_arrays(
        pa.array([0, 1, 3, 4]), pa.array([1, 8, 8, 2], pa.int32()), mask=pa.array([False, True, False])
    )
    assert ragged.pad(column).tolist() == [[1], [0], [2]]


def test_a_wider_array_is_padding_only():
    column = pa.array([[1, 2], [3]], INTS)
    assert ragged.pad(column, 4).tolist() == [[1, 2, 0, 0], [3, 0, 0, 0]]
    assert ragged.mask_of(ragged.lengths(column), 4).sum() == 3


def test_types_are_kept_and_asked_for():
    column = pa.array([[0.5], [True]], pa.list_(pa.float32()))
    padded = ragged.pad(column)
    assert padded.dtype == np.float32
    assert ragged.unpad(padded.astype(np.float64), padded > -1, pa.float32()).type == pa.list_(pa.float32())
    assert ragged.pad(pa.array([[True, False]], pa.list_(pa.bool_()))).tolist() == [[True, False]]


def test_no_rows_at_all():
    empty = pa.chunked_array([], INTS)
    assert ragged.pad(empty).shape == (0, 0)
    assert ragged.unpad(ragged.pad(empty), ragged.mask_of(ragged.lengths(empty))).to_pylist() == []
