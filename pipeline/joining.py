"""The rows of an iteration with their labels and what models read of them, in blocks of whole groups."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int

from pipeline.artifacts import Artifact
from pipeline.errors import ContractError

KEY = ["prompt_id", "sample"]
GREEDY = -1
"""The `sample` of the greedy response."""


class Rows:
    """Rows of tables that follow one another, at least one, taken so many at a time."""

    def __init__(self, tables: Iterable[pa.Table]) -> None:
        self._tables = iter(tables)
        self._left = next(self._tables)

    def take(self, count: int) -> pa.Table:
        """The next `count` rows, fewer at the end."""
        while self._left.num_rows < count and (table := next(self._tables, None)) is not None:
            self._left = pa.concat_tables([self._left, table])
        taken, self._left = self._left.slice(0, count), self._left.slice(count)
        return taken


def kept(rollouts: Sequence[Artifact], labels: Sequence[Artifact], names: Sequence[str]) -> Iterator[pa.Table]:
    """The kept rows with these columns of the rollouts and with their labels, part by part.

    Column `greedy` is the reward of the greedy response to the same prompt, kept or not; null without one.
    Raises `ContractError` when keys do not match.
    """
    if len(rollouts) != len(labels):
        raise ContractError(f"{len(rollouts)} rollouts but {len(labels)} labels", do="name both once per round")
    for responses, marks in zip(rollouts, labels, strict=True):
        said = Rows(marks.parts([*KEY, "reward", "correct", "keep"]))
        for part in responses.parts(list(names)):
            mine = said.take(part.num_rows)
            if not part.select(KEY).equals(mine.select(KEY)):
                raise ContractError("the labels are of other rollouts", f"{marks.path} and {responses.path}")
            told = {name: mine[name] for name in ("reward", "correct")} | {"greedy": _greedy_rewards(mine)}
            yield with_columns(part, told).filter(mine["keep"]).replace_schema_metadata(None)
        if said.take(1).num_rows:
            raise ContractError("the labels are of other rollouts", f"{marks.path} and {responses.path}")


def with_columns(table: pa.Table, columns: Mapping[str, Any]) -> pa.Table:
    """The table with these columns behind its own."""
    for name, column in columns.items():
        table = table.append_column(name, column)
    return table


def _greedy_rewards(marks: pa.Table) -> pa.ChunkedArray:
    """The reward of the greedy response to each row's prompt; null where there is none."""
    rows = marks.filter(pc.equal(marks["sample"], GREEDY))
    return rows["reward"].take(pc.index_in(marks["prompt_id"], value_set=rows["prompt_id"].combine_chunks()))


def blocks(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in blocks of about `rows` that do not cut through a group."""
    left: pa.Table | None = None
    for table in tables:
        left = table if left is None else pa.concat_tables([left, table])
        if left.num_rows > rows:
            *whole, (start, _) = cuts(groups(left), rows)
            yield from (left.slice(first, end - first) for first, end in whole)
            left = left.slice(start)  # its last group may go on
    if left is not None and left.num_rows:
        yield left


def groups(table: pa.Table) -> Int[np.ndarray, " B"]:
    """A number for each prompt, in the order of their first rows."""
    return np.asarray(table["prompt_id"].combine_chunks().dictionary_encode().indices, dtype=np.int64)


class Scores:
    """What models read, in the order of the kept rows.

    They are written in that order, perhaps with rows between that are not kept; then only those about the rows at hand
    are held. In another order they are held all.
    """

    def __init__(self, artifact: Artifact, columns: Sequence[str], order: Iterable[pa.Table] | None = None) -> None:
        """`order` has the keys of all kept rows where the scores are not in their order."""
        names = [*KEY, *columns]
        self._parts = artifact.parts(names) if order is None else iter(())
        self._there = self._next() if order is None else _in_order(artifact.table(names), order, artifact)

    def take(self, keys: pa.Table) -> pa.Table | None:
        """The rows with these keys, which follow those taken before; None where one is not found there."""
        there = self._there
        while there is not None:
            if there.num_rows >= keys.num_rows and ((places := _places(keys, there)) >= 0).all():
                self._there = there.slice(int(places.max(initial=-1)) + 1)
                in_a_row = np.array_equal(places, np.arange(keys.num_rows))
                return there.slice(0, keys.num_rows) if in_a_row else there.take(places)
            more = self._next()
            there = None if more is None else pa.concat_tables([there, more])
        return None

    def _next(self) -> pa.Table | None:
        part = next(self._parts, None)
        return None if part is None else part.replace_schema_metadata(None)


def _in_order(scores: pa.Table, order: Iterable[pa.Table], artifact: Artifact) -> pa.Table:
    wanted = pa.concat_tables(order)
    places = _places(wanted, scores)
    if len(missing := np.flatnonzero(places < 0)):
        first = [tuple(row.values()) for row in wanted.take(missing[:5]).to_pylist()]
        raise ContractError(
            f"{len(missing)} kept rows have no scores; first: {first}", str(artifact.path),
            "run `score` on these labels",
        )  # fmt: skip
    return scores.replace_schema_metadata(None).take(places)


def _places(keys: pa.Table, among: pa.Table) -> Int[np.ndarray, " B"]:
    """The row of `among` that has each key; -1 where none has."""
    if among.slice(0, keys.num_rows).select(KEY).equals(keys.select(KEY)):
        return np.arange(keys.num_rows)
    both = pa.concat_tables([among.select(KEY), keys.select(KEY)])
    samples = both["sample"].to_numpy().astype(np.int64)
    codes = groups(both) * (samples.max(initial=0) + 2) + samples + 1  # samples count from -1
    there, wanted = np.split(codes, [among.num_rows])
    order = np.argsort(there, kind="stable")
    places = order[np.minimum(np.searchsorted(there, wanted, sorter=order), len(order) - 1)]
    return np.where(there[places] == wanted, places, -1)


def cuts(group: np.ndarray, rows: int) -> list[tuple[int, int]]:
    """Ranges of about `rows` rows that do not cut through a group."""
    ends = np.append(np.flatnonzero(np.diff(group)) + 1, len(group))
    ranges, start = [], 0
    while start < len(group):
        end = int(ends[np.searchsorted(ends, min(start + rows, len(group)))])
        ranges.append((start, end))
        start = end
    return ranges
