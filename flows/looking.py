"""What `rlhf show` and `rlhf sql` print."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.csv as arrow_csv
import pyarrow.parquet as pq
import tomli_w
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from flows.sheets import Sheet, out, print_sheet
from flows.tables import contract_sheet
from pipeline.artifacts import Artifact
from pipeline.catalog import catalog, find_runs
from pipeline.contracts import LABELS, ROLLOUTS
from pipeline.disk import whole_file
from pipeline.errors import ExperimentError
from pipeline.inspecting import queries
from pipeline.inspecting.tokens import Key, beside, printable
from pipeline.inspecting.views import Views, lock
from pipeline.settings import without_none

SHOWN = 24
"""Elements of a list that are shown."""
WIDEST = 60
"""Characters of a cell of `rlhf sql`."""


def show(path: Path, rows: int, where: str | None) -> None:
    """`rlhf show PATH`: manifest, columns with their meaning, statistics, sample rows."""
    artifact = Artifact.open(path)
    manifest = artifact.manifest
    out.print(
        f"[bold]{manifest.kind}[/bold] made by stage {manifest.stage} version {manifest.version}, "
        f"{manifest.made.get('time', 'elsewhere')}"
    )
    out.print(f"fingerprint {manifest.fingerprint[:16]}  digest {manifest.digest[:16]}")
    out.print("settings", tomli_w.dumps(without_none(manifest.settings)), markup=False)
    for name, records in manifest.inputs.items():
        for record in records:
            out.print(f"input {name}: {record.path} ({record.digest[:16]})", markup=False)
    if artifact.contract.is_table:
        print_sheet(contract_sheet(artifact.contract))
        _show_rows(artifact, rows, where)
    numbers = tuple((name, f"{value:,.6g}") for name, value in manifest.stats.items())
    print_sheet(Sheet("statistics", ("name", "value"), numbers))


def _show_rows(artifact: Artifact, rows: int, where: str | None) -> None:
    total, found = _selected(artifact, "*", where, rows)
    out.print(f"{found.num_rows} of {total} rows" + (f" where {where}" if where else ""), markup=False)
    given = found.to_pylist()
    told = _labels_of(artifact, given)
    for row in given:
        _show_row(row | told.get((row.get("prompt_id"), row.get("sample")), {}))


def first_keys(artifact: Artifact, where: str | None, limit: int | None) -> list[Key]:
    """(prompt_id, sample) of the first rows for which the condition holds; of all of them where no limit is given."""
    found = _selected(artifact, "prompt_id, sample", where, limit)[1]
    return [(row["prompt_id"], row["sample"]) for row in found.to_pylist()]


def _selected(artifact: Artifact, columns: str, where: str | None, limit: int | None) -> tuple[int, pa.Table]:
    """How many rows there are, and the first of them. Raises `ExperimentError` for a condition that is none."""
    files = [str(path.absolute()) for path in artifact.part_paths()]
    condition = f" where ({where}\n)" if where else ""
    some = "" if limit is None else f" limit {int(limit)}"
    with duckdb.connect() as connection:
        connection.execute("set enable_progress_bar = false; set threads = 1")
        connection.read_parquet(files, union_by_name=True).create_view("data")
        lock(connection, files)
        one = f"select {columns} from data{condition}{some}"  # noqa: S608
        try:
            # What a person types may look at the rows, and at nothing else on this machine.
            if len(duckdb.extract_statements(one)) != 1:
                raise ExperimentError("one condition is wanted", f"--where {where!r}", "leave out the `;`")
            found = connection.sql(one).to_arrow_table()
            [(total,)] = connection.sql(f"select count(*) from data{condition}").fetchall()  # noqa: S608
        except duckdb.Error as error:
            raise ExperimentError(
                f"cannot select: {error}", f"--where {where!r}", "name columns of the table above"
            ) from error
    return total, found


def _labels_of(artifact: Artifact, rows: Sequence[Mapping[str, Any]]) -> dict[Key, dict[str, Any]]:
    """What the labels beside some rollouts say of these rows; nothing of anything else."""
    keys = [(row["prompt_id"], row["sample"]) for row in rows] if artifact.manifest.kind == ROLLOUTS.name else []
    labels = next((one for one in beside(artifact) if one.manifest.kind == LABELS.name), None) if keys else None
    if labels is None:
        return {}
    with duckdb.connect() as connection:
        files = [str(path) for path in labels.part_paths()]
        wanted = pa.table(
            {"prompt_id": [key[0] for key in keys], "sample": pa.array([key[1] for key in keys], "int32")}
        )
        connection.register("wanted", wanted)
        connection.read_parquet(files, union_by_name=True).create_view("labels")
        found = connection.sql(
            "select prompt_id, sample, reward, verdict, keep from labels semi join wanted using (prompt_id, sample)"
        )
        return {
            (prompt, sample): dict(zip(("reward", "verdict", "keep"), said, strict=True))
            for prompt, sample, *said in found.fetchall()
        }


def _show_row(row: Mapping[str, Any]) -> None:
    table = Table(show_header=False, box=None, padding=(0, 1))
    for name, value in row.items():
        table.add_row(f"[dim]{name}[/dim]", _short(value))
    out.print(table)
    out.print()


def _short(value: Any) -> Text:
    """A value on a few lines; nothing in it can control the terminal."""
    more = " ..." if isinstance(value, list) and len(value) > SHOWN else ""
    if isinstance(value, list) and value and isinstance(value[0], float):
        return Text(f"{len(value)} numbers: " + " ".join(f"{x:.3g}" for x in value[:SHOWN]) + more)
    if isinstance(value, list):
        return Text(printable(f"{len(value)}: " + json.dumps(value[:SHOWN], ensure_ascii=False) + more))
    return Text(printable(str(value)))


def sql(words: Sequence[str], query: str | None, changes: Sequence[str], rows: int, file: Path | None) -> None:
    """`rlhf sql RUN... STATEMENT`, or `rlhf sql RUN... --query NAME`; without anything: the list of queries."""
    if not words and query is None:
        print_sheet(queries_sheet())
        return
    asked = None if query is None else queries.load(query)
    runs = list(words) if asked is not None else list(words[:-1])
    if not runs:
        raise ExperimentError(
            "name a run and what is asked of it", do='rlhf sql RUN "select ...", or rlhf sql RUN --query NAME'
        )
    with Views(catalog(find_runs(runs))) as views:
        found = views.run(words[-1]) if asked is None else asked.run(views, changes)
    if asked is not None:
        out.print(asked.question, style="bold", markup=False, highlight=False)
    if file is not None:
        _write(found, file)
        return
    _print(found, rows)


def queries_sheet() -> Sheet:
    """Every named query: what it answers, and what can be set."""
    rows = []
    for name in queries.names():
        query = queries.load(name)
        settings = ", ".join(f"{key} = {default}" for key, (default, _) in query.settings.items())
        rows.append((name, query.question + (f" ({settings})" if settings else "")))
    return Sheet("queries: rlhf sql RUN --query NAME", ("query", "answers"), tuple(rows))


def _print(found: pa.Table, rows: int) -> None:
    """As a table; row by row where the terminal is too narrow for one."""
    if not found.num_rows:
        out.print("no rows")
        return
    shown = found.slice(0, rows).to_pylist()
    table = Table(*(escape(printable(n)) for n in found.column_names), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in shown:
        table.add_row(*(_cell(value) for value in row.values()))
    if Measurement.get(out, out.options.update(max_width=10**6), table).maximum <= out.width:
        out.print(table)
    else:
        for row in shown:
            told = [Text.assemble((name, "dim"), " ", _cell(value)) for name, value in row.items() if value is not None]
            out.print(Text("  ").join(told), "", sep="\n")
    if found.num_rows > rows:
        out.print(f"{rows} of {found.num_rows} rows: --rows {found.num_rows} shows all, -o FILE keeps them")


def _cell(value: Any) -> Text:
    if value is None:
        return Text("")
    shown = f"{value:.4g}" if isinstance(value, float) else printable(str(value))
    return Text(shown if len(shown) <= WIDEST else shown[: WIDEST - 3] + "...")


def _write(found: pa.Table, file: Path) -> None:
    """All rows into a file, whole or not at all. Raises `ExperimentError` for a kind of file that it cannot be."""
    writers: dict[str, Callable[[pa.Table, Path], object]] = {
        ".parquet": pq.write_table, ".csv": arrow_csv.write_csv, ".jsonl": _write_lines,
    }  # fmt: skip
    if file.suffix not in writers:
        raise ExperimentError(
            f"cannot write {file.suffix or 'a file without a suffix'}", str(file), ".parquet, .csv or .jsonl"
        )
    with whole_file(file) as temporary:
        writers[file.suffix](found, temporary)
    out.print(f"{found.num_rows:,} rows: {file}", markup=False)


def _write_lines(found: pa.Table, file: Path) -> None:
    with file.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in found.to_pylist())
