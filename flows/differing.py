"""What `rlhf diff` prints: two artifacts, or two runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flows.sheets import Sheet, out, print_sheet
from pipeline.artifacts import Artifact
from pipeline.catalog import EXPERIMENT_FILE, catalog
from pipeline.inspecting.curves import by_iteration
from pipeline.inspecting.differences import Pair, Rows, difference, run_difference
from pipeline.inspecting.tokens import printable

LONGEST = 60
"""Characters that are shown of a value."""
PARTED = 12
"""Artifacts in which two runs part, named one by one."""


def diff(a: Path, b: Path, rows: int) -> None:
    """Print how two artifacts, or two runs, differ. Raises `ArtifactError` for two things that cannot be compared."""
    if (a / EXPERIMENT_FILE).is_file() or (b / EXPERIMENT_FILE).is_file():
        _runs(a, b)
        return
    one, other = Artifact.open(a), Artifact.open(b)
    found = difference(one, other, rows)
    same = one.manifest.digest == other.manifest.digest
    _who(a, b, f"{one.manifest.kind}, {'the same bytes' if same else 'other bytes'}")
    _pairs("asked for differently", found.settings)
    _pairs("inputs", found.inputs)
    _pairs("statistics", found.stats)
    _pairs("files", found.files)
    if found.rows is not None:
        show_rows(found.rows)


def _who(a: Path, b: Path, what: str) -> None:
    out.print(f"A  {a}\nB  {b}\n{what}", markup=False, highlight=False)


def show_rows(rows: Rows) -> None:
    """Print how the rows of two tables differ: how many, in which columns, the first of them."""
    out.print(f"{rows.changed:,} of {rows.both:,} common rows differ{_alone(rows.only_a, rows.only_b)}")
    columns = tuple((name, f"{count:,}", f"{count / rows.both:.1%}") for name, count in rows.columns.items())
    if columns:
        print_sheet(Sheet("columns that differ", ("column", "rows", "share"), columns))
    for row in rows.first:
        key = "/".join(str(value) for value in row.values() if not isinstance(value, tuple))
        changes = [f"  {name}: {_short(v[0])} -> {_short(v[1])}" for name, v in row.items() if isinstance(v, tuple)]
        out.print("\n".join([key, *changes]), markup=False, highlight=False)


def _alone(only_a: int, only_b: int) -> str:
    return "".join(f"; {count:,} only in {name}" for count, name in ((only_a, "A"), (only_b, "B")) if count)


def _pairs(title: str, pairs: Sequence[Pair]) -> None:
    if pairs:
        rows = tuple((name, _short(x), _short(y), _change(x, y)) for name, x, y in pairs)
        header = ("", "A", "B", "B - A")
        without = tuple(row[:3] for row in rows)
        print_sheet(Sheet(title, header, rows) if any(row[3] for row in rows) else Sheet(title, header[:3], without))


def _change(a: Any, b: Any) -> str:
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (a, b))
    return f"{b - a:+.4g}" if numbers else ""


def _short(value: Any) -> str:
    text = "none" if value is None else f"{value:.6g}" if isinstance(value, float) else printable(str(value))
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def _runs(a: Path, b: Path) -> None:
    found = run_difference(a, b)
    alone = _alone(found.only_a, found.only_b)
    _who(a, b, f"{found.same} artifacts with the same bytes, {len(found.parted)} with others{alone}")
    _pairs("experiment", found.experiment)
    if found.parted:
        more = len(found.parted) - PARTED
        title = "they part in" + (f" (the first {PARTED}; {more} more)" if more > 0 else "")
        print_sheet(Sheet(title, ("artifact", "different"), tuple(found.parted[:PARTED])))
    _numbers(a, b)


def _numbers(a: Path, b: Path) -> None:
    """What both measured in the last iteration, and the last evaluation, that both have."""
    tables = [by_iteration(catalog([folder])) for folder in (a, b)]
    for phase in ("loop", "evaluation"):
        measured = [table.filter(phase=phase) for table in tables]
        shared = set(measured[0]["iteration"]) & set(measured[1]["iteration"])
        if not shared:
            continue
        one, other = (
            {f"{row['kind']} {row['name']}": row["value"] for row in table.filter(iteration=max(shared)).to_dicts()}
            for table in measured
        )
        pairs = [(name, one[name], other[name]) for name in one if name in other and one[name] != other[name]]
        _pairs(f"{phase}, iteration {max(shared)}", pairs)
