"""SQL over the datasets of runs: DuckDB, straight on the Parquet files of their artifacts.

    prompts rollouts labels ...   a view for each kind of dataset: the columns of its contract (null where a run has not
                              stored them) after run, phase, iteration, stage
    labels_redone ...         the same of artifacts redone or labelled again beside others, with the column variant
    metrics                   what every stage measured
    artifacts                 a row for each artifact, from its manifest
    responses                 rollouts, prompts, labels, scores and advantages joined on (prompt_id, sample)

A statement may read these and nothing else of this machine, and changes nothing.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import duckdb
import pyarrow as pa

from pipeline.artifacts import METRICS_FILE
from pipeline.catalog import ROLES, Entry
from pipeline.contracts import CONTRACTS, METRICS, Contract
from pipeline.errors import ExperimentError

PLACE = ("run", "phase", "iteration", "stage")
"""Columns that every view begins with."""

RESPONSES = """
create view responses as
select r.run, r.phase, r.iteration, r.stage, r.prompt_id, r.sample, p.prompt, p.answer, p.grader, p.source,
       r.response, len(r.response_tokens) as length, r.finish,
       l.reward, l.correct, l.gold, l.extracted, l.target, l.verdict, l.vote_share, l.keep, l.dropped,
       coalesce(j.reward_scores, s.reward_scores) as reward_score,
       list_avg(a.advantages) as advantage, coalesce(s.values, a.values)[1] as value, a.returns[1] as "return",
       exp(list_avg(r.sampler_logprobs)) as confidence,
       list_sum(s.old_logprobs) - list_sum(s.ref_logprobs) as kl_reference
from rollouts r
left join (select prompt_id as asked, * exclude (prompt_id) from prompt_texts) p
       on p.asked = split_part(r.prompt_id, '#', 1)
left join labels l on same(r, l)
left join judgements j on same(r, j)
left join scores s on same(r, s)
left join advantages a on same(r, a)
"""
"""`same` stands for: the same response of the same iteration."""

SAME = r"(\1.run, \1.phase, coalesce(\1.iteration, -1), \1.prompt_id, \1.sample) = " \
       r"(\2.run, \2.phase, coalesce(\2.iteration, -1), \2.prompt_id, \2.sample)"  # fmt: skip
"""Foundations have no iteration."""

PROMPT_TEXTS = """
create view prompt_texts as
select distinct on (prompt_id) prompt_id, messages[-1].content as prompt, answer, grader, source
from prompts order by prompt_id, answer is null, run, stage
"""

ALLOWED = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN)


class Views:
    """A connection on which the views of some runs are. Use it in a `with`."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._connection = duckdb.connect()
        self._connection.execute("set enable_progress_bar = false; create schema empty")
        files = self._places(entries)
        for name, contract in _kinds():
            self._view(name, contract, [path for path, view, redone in files if (view, redone) == (name, False)])
            redone = [path for path, view, redone in files if (view, redone) == (name, True)]
            self._view(f"{name}_redone", contract, redone, "variant")
        self._view("metrics", METRICS, [path for path, view, _ in files if view == "metrics"], "kind")
        self._connection.execute(PROMPT_TEXTS)
        self._connection.execute(re.sub(r"same\((\w), (\w)\)", SAME, RESPONSES))
        lock(self._connection, [path for path, _, _ in files])

    def __enter__(self) -> "Views":
        return self

    def __exit__(self, *what: object) -> None:
        self._connection.close()

    def run(self, statement: str, values: Mapping[str, Any] | None = None) -> pa.Table:
        """The rows of one statement that reads. Raises `ExperimentError` that says what there is to read."""
        refuse_writing(statement)
        try:
            found = self._connection.sql(statement, params=dict(values or {}))
            return found.to_arrow_table()
        except duckdb.Error as error:
            raise ExperimentError(f"DuckDB: {error}", "the statement", self._hint(str(error))) from error

    @property
    def names(self) -> list[str]:
        """What there is to read from; those of redone artifacts left out."""
        return [*(name for name, _ in _kinds()), "responses", "prompt_texts", "metrics", "artifacts"]

    def columns(self, view: str) -> list[str]:
        """The columns of a view."""
        return [row[0] for row in self._connection.execute(f'describe "{view}"').fetchall()]

    def stored(self, view: str, column: str) -> bool:
        """Whether a column has a value anywhere."""
        found = self._connection.execute(f'select 1 from "{view}" where "{column}" is not null limit 1')  # noqa: S608
        return bool(found.fetchall())

    def _hint(self, error: str) -> str:
        """What to name instead: the columns of the views that the statement reads, or the views."""
        if "Binder Error" in error:
            return f'`rlhf sql RUN "describe responses"` lists columns; views: {", ".join(self.names)}'
        return f"views: {', '.join(self.names)}; each has {', '.join(PLACE)}"

    def _places(self, entries: Sequence[Entry]) -> list[tuple[str, str, bool]]:
        """Make the tables `artifacts` and `places`; returns every file, the view it belongs to, and if it is redone."""
        files, places, artifacts = [], [], []
        for entry in entries:
            place = (entry.run, entry.phase, entry.iteration, entry.stage, entry.variant, entry.kind)
            named = [
                (str(path.absolute()), entry.kind, entry.variant is not None) for path in entry.artifact.part_paths()
            ]
            measured = entry.artifact.path.absolute() / METRICS_FILE
            if entry.variant is None and measured.exists():
                named.append((str(measured), "metrics", False))
            files += named
            places += [(path, *place) for path, _, _ in named]
            artifacts.append((*place, *_about(entry)))
        self._table("places", {"filename": pa.string(), **_PLACE}, places)
        self._table("artifacts", {**_PLACE, **_ABOUT}, artifacts)
        return files

    def _table(self, name: str, types: Mapping[str, pa.DataType], rows: Sequence[tuple[Any, ...]]) -> None:
        columns = [pa.array([row[place] for row in rows], kind) for place, kind in enumerate(types.values())]
        self._keep(name, pa.table(columns, names=list(types)))

    def _keep(self, name: str, table: pa.Table) -> None:
        self._connection.register("given", table)
        self._connection.execute(f"create table {name} as select * from given")  # noqa: S608  # names are ours
        self._connection.unregister("given")

    def _view(self, name: str, contract: Contract, files: Sequence[str], *more: str) -> None:
        """A view of the files under the columns of their contract; those that no file has are null."""
        self._keep(f"empty.{name}", contract.schema().empty_table())
        own = [field.name for field in contract.fields if field.name not in ("run", "iteration", "stage")]
        place = ", ".join(f"places.{column}" for column in (*PLACE, *more))
        columns = ", ".join(f'd."{column}"' for column in own)
        rows = f"select {', '.join(map(quoted, own))}, null as filename from empty.{name}"  # noqa: S608
        if files:
            there = ", ".join(_literal(path) for path in files)
            rows += f" union all by name select * from read_parquet([{there}], filename = true, union_by_name = true)"  # noqa: S608
        self._connection.execute(
            f"create view {name} as select {place}, {columns} from ({rows}) d join places using (filename)"  # noqa: S608
        )


def lock(connection: duckdb.DuckDBPyConnection, files: Sequence[str]) -> None:
    """Let what a person types read these files, and nothing else on this machine."""
    connection.execute(f"set allowed_paths = [{', '.join(map(_literal, files))}]")
    connection.execute("set enable_external_access = false")
    connection.execute("set lock_configuration = true")


def refuse_writing(statement: str) -> None:
    """Raise `ExperimentError` unless this is one statement, and one that reads."""
    try:
        statements = duckdb.extract_statements(statement)
    except duckdb.Error as error:
        raise ExperimentError(f"DuckDB: {error}", "the statement", "correct it") from error
    if len(statements) != 1:
        raise ExperimentError(f"one statement is wanted, found {len(statements)}", "the statement")
    if statements[0].type not in ALLOWED:
        kind = str(statements[0].type).rpartition(".")[2]
        raise ExperimentError(f"{kind} is not allowed: data can only be read", "the statement", "write a select")


_PLACE = {
    "run": pa.string(), "phase": pa.string(), "iteration": pa.int32(), "stage": pa.string(), "variant": pa.string(),
    "kind": pa.string(),
}  # fmt: skip
_ABOUT = {
    "made_by": pa.string(), "version": pa.int32(), "fingerprint": pa.string(), "digest": pa.string(),
    "rows": pa.int64(), "seconds": pa.float64(), "bytes": pa.int64(), "made": pa.string(), "path": pa.string(),
}  # fmt: skip


def _about(entry: Entry) -> tuple[Any, ...]:
    manifest = entry.artifact.manifest
    rows = manifest.stats.get("rows")
    return (
        manifest.stage, manifest.version, manifest.fingerprint, manifest.digest, None if rows is None else int(rows),
        manifest.stats.get("seconds"), sum(file.bytes for file in manifest.files.values()), manifest.made.get("time"),
        str(entry.artifact.path),
    )  # fmt: skip


def _kinds() -> Iterator[tuple[str, Contract]]:
    for contract in CONTRACTS.values():
        if contract.is_table and contract.name != METRICS.name:
            yield contract.name, contract
    yield from ((role, CONTRACTS[kind]) for role, kind in ROLES.items())


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def quoted(column: str) -> str:
    """A column's name in a statement, whatever characters it has."""
    return '"' + column.replace('"', '""') + '"'
