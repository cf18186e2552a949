"""Two artifacts of one kind, or two runs, side by side: what was asked for differently, and what came out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from pipeline.artifacts import Artifact, FileRecord
from pipeline.catalog import EXPERIMENT_FILE, artifacts_of, refuse_no_run
from pipeline.errors import ArtifactError
from pipeline.inspecting.views import quoted
from pipeline.settings import flat, read_toml

Pair = tuple[str, Any, Any]
"""A name, what A has under it, and what B has; None where it has nothing."""

ABOUT_THE_MAKING = ("seconds", "time/seconds", "speed/tokens_per_second")
"""Statistics that differ between two makings of the same thing."""


@dataclass(frozen=True)
class Rows:
    """How the rows of two tables differ."""

    only_a: int
    only_b: int
    both: int
    """Rows with a key that both have (of a table without keys: equal rows)."""
    changed: int
    """Of those, with another value somewhere."""
    columns: Mapping[str, int]
    """Column -> rows in which it changed; those in which it did."""
    first: Sequence[Mapping[str, Any]]
    """Those with most columns changed: key -> value, changed column -> (in A, in B)."""


@dataclass(frozen=True)
class Difference:
    """Two artifacts."""

    settings: list[Pair]
    inputs: list[Pair]
    stats: list[Pair]
    files: list[Pair]
    """Of a directory that is no table: size and first digits of the hash."""
    rows: Rows | None

    @property
    def why(self) -> str:
        """In a few words."""
        if self.settings:
            return "settings: " + ", ".join(name for name, _, _ in self.settings[:4])
        return f"inputs: {', '.join(name for name, _, _ in self.inputs)}" if self.inputs else "nothing it was asked for"


def difference(a: Artifact, b: Artifact, shown: int = 5) -> Difference:
    """Compare two artifacts; `shown` changed rows are kept. Raises `ArtifactError` when they are of two kinds."""
    if a.manifest.kind != b.manifest.kind:
        raise ArtifactError(
            f"{a.manifest.kind} and {b.manifest.kind} cannot be compared", f"{a.path}, {b.path}",
            "name two artifacts of one kind, or two runs",
        )  # fmt: skip
    stats = {name: value for name, value in a.stats.items() if name not in ABOUT_THE_MAKING}
    other = {name: value for name, value in b.stats.items() if name not in ABOUT_THE_MAKING}
    is_table = a.contract.is_table
    return Difference(
        *asked_differently(a, b), _pairs(stats, other),
        [] if is_table else _pairs(_files(a.manifest.files), _files(b.manifest.files)),
        row_difference(a, b, shown) if is_table and a.manifest.digest != b.manifest.digest else None,
    )  # fmt: skip


def asked_differently(a: Artifact, b: Artifact) -> tuple[list[Pair], list[Pair]]:
    """Settings, and inputs, in which two computations differ."""
    made = [{"stage": f"{m.stage} version {m.version}", **flat(m.settings)} for m in (a.manifest, b.manifest)]
    inputs = [
        {name: ", ".join(f"{record.path} ({record.digest[:12]})" for record in records) for name, records in given}
        for given in (a.manifest.inputs.items(), b.manifest.inputs.items())
    ]
    digests = [
        {name: [record.digest for record in records] for name, records in given}
        for given in (a.manifest.inputs.items(), b.manifest.inputs.items())
    ]
    names = [name for name, _, _ in _pairs(*digests)]
    return _pairs(*made), [(name, inputs[0].get(name), inputs[1].get(name)) for name in names]


def row_difference(a: Artifact, b: Artifact, shown: int) -> Rows:
    """Compare two tables row by row, by their key; without a key whole rows are compared."""
    with duckdb.connect() as connection:
        for name, one in (("a", a), ("b", b)):
            files = connection.read_parquet([str(path) for path in one.part_paths()], union_by_name=True)
            files.create_view(name)
        columns = [column for column, *_ in connection.execute("describe a").fetchall()]
        there = {column for column, *_ in connection.execute("describe b").fetchall()}
        columns = [column for column in columns if column in there]
        key = a.contract.key
        return _keyed(connection, key, columns, shown) if key else _keyless(connection, columns)


def _keyed(connection: duckdb.DuckDBPyConnection, key: Sequence[str], columns: Sequence[str], shown: int) -> Rows:
    # Columns are those of a contract, quoted: nothing that anybody typed stands in these statements.
    others = [column for column in columns if column not in key]
    on = ", ".join(map(quoted, key))
    changed = " or ".join(map(_differs, others)) or "false"
    counts = "".join(f", count(*) filter ({_differs(column)})" for column in others)
    both, any_, *each = _one(
        connection,
        f"select count(*), count(*) filter ({changed}){counts} from a join b using ({on})",  # noqa: S608
    )
    (only_a,) = _one(connection, f"select count(*) from a anti join b using ({on})")  # noqa: S608
    (only_b,) = _one(connection, f"select count(*) from b anti join a using ({on})")  # noqa: S608
    per_column = {column: count for column, count in zip(others, each, strict=True) if count}
    pairs = "".join(f", a.{quoted(column)}, b.{quoted(column)}" for column in per_column)
    if not per_column:
        return Rows(only_a, only_b, both, 0, {}, [])
    most = " + ".join(f"({_differs(column)})::int" for column in per_column)
    found = connection.execute(
        f"select {on}{pairs} from a join b using ({on}) where {changed} order by {most} desc, {on} limit {int(shown)}"  # noqa: S608
    ).fetchall()
    first = [
        dict(zip(key, row, strict=False))
        | {
            column: (row[len(key) + 2 * place], row[len(key) + 2 * place + 1])
            for place, column in enumerate(per_column)
            if row[len(key) + 2 * place] != row[len(key) + 2 * place + 1]
        }
        for row in found
    ]
    return Rows(only_a, only_b, both, any_, per_column, first)


def _keyless(connection: duckdb.DuckDBPyConnection, columns: Sequence[str]) -> Rows:
    names = ", ".join(map(quoted, columns))

    def count(one: str, word: str, other: str) -> int:
        rows = f"select {names} from {one} {word} all select {names} from {other}"  # noqa: S608  # as above
        return _one(connection, f"select count(*) from ({rows})")[0]  # noqa: S608

    return Rows(count("a", "except", "b"), count("b", "except", "a"), count("a", "intersect", "b"), 0, {}, [])


def _one(connection: duckdb.DuckDBPyConnection, statement: str) -> tuple[int, ...]:
    (row,) = connection.execute(statement).fetchall()
    return tuple(row)


def _differs(column: str) -> str:
    return f"a.{quoted(column)} is distinct from b.{quoted(column)}"


@dataclass(frozen=True)
class Runs:
    """Two runs: what differs in the experiment, and in which artifacts they part."""

    experiment: list[Pair]
    same: int
    """Artifacts that both have with the same bytes."""
    parted: list[tuple[str, str]]
    """Artifacts that both have with other bytes, in the order of A's making, and why."""
    only_a: int
    only_b: int


def run_difference(a: Path, b: Path) -> Runs:
    """Compare two runs. Raises `ArtifactError` for a folder that is none."""
    for folder in (a, b):
        refuse_no_run(folder)
    made = [{str(one.path.relative_to(folder)): one for one in artifacts_of(folder)} for folder in (a, b)]
    experiments = [_without_remarks(read_toml(folder / EXPERIMENT_FILE)) for folder in (a, b)]
    shared = [name for name in made[0] if name in made[1]]
    parted = [(name, made[0][name], made[1][name]) for name in shared]
    parted = [(name, x, y) for name, x, y in parted if x.manifest.digest != y.manifest.digest]
    return Runs(
        _pairs(*experiments), len(shared) - len(parted), list(_reasons(parted)),
        len(made[0]) - len(shared), len(made[1]) - len(shared),
    )  # fmt: skip


def _without_remarks(experiment: Mapping[str, Any]) -> dict[str, Any]:
    """All settings by dotted name; what a recipe says about itself is none."""
    return {name: v for name, v in flat(experiment).items() if not name.startswith(("recipe.differs.", "recipe.idea"))}


def _reasons(parted: Sequence[tuple[str, Artifact, Artifact]]) -> Iterator[tuple[str, str]]:
    for name, a, b in parted:
        settings, inputs = asked_differently(a, b)
        yield name, Difference(settings, inputs, [], [], None).why


def _files(files: Mapping[str, FileRecord]) -> dict[str, str]:
    return {name: f"{record.bytes:,} bytes, {record.blake2b[:12]}" for name, record in files.items()}


def _pairs(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Pair]:
    return [(name, a.get(name), b.get(name)) for name in sorted({*a, *b}) if a.get(name) != b.get(name)]
