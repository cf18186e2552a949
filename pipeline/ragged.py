"""Arrow list columns to padded arrays and back: [B, T], with a mask that is True on real tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int, Shaped


def lengths(column: pa.ChunkedArray | pa.Array) -> Int[np.ndarray, " B"]:
    """Elements per row. A null row counts 0."""
    return np.asarray(pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False), dtype=np.int64)


def mask_of(row_lengths: Int[np.ndarray, " B"], width: int | None = None) -> Bool[np.ndarray, "B T"]:
    """True where a row has a token; T is the longest row unless `width` says more."""
    width = int(row_lengths.max(initial=0)) if width is None else width
    return np.arange(width)[None, :] < row_lengths[:, None]


def pad(column: pa.ChunkedArray | pa.Array, width: int | None = None) -> Shaped[np.ndarray, "B T"]:
    """Rows of a list column side by side, right-padded with zeros.

    The values are read from Arrow's buffer without a copy; only the padded array is new.
    """
    flat = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    values = flat.flatten().to_numpy(zero_copy_only=False)
    mask = mask_of(lengths(flat), width)
    padded = np.zeros(mask.shape, dtype=values.dtype)
    padded[mask] = values
    return padded


def unpad(
    padded: Shaped[np.ndarray, "B T"], mask: Bool[np.ndarray, "B T"], dtype: pa.DataType | None = None
) -> pa.ListArray:
    """The inverse of `pad`: a list array that holds each row's unmasked elements."""
    dtype = pa.from_numpy_dtype(padded.dtype) if dtype is None else dtype
    offsets = np.concatenate([[0], mask.sum(axis=1).cumsum()]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(padded[mask]).cast(dtype))


def from_rows(rows: Sequence[Sequence[Any] | np.ndarray], dtype: pa.DataType) -> pa.ListArray:
    """A list array from Python rows."""
    return pa.array(rows, type=pa.list_(dtype))
