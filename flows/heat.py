"""What `rlhf show --tokens` shows: responses token by token, one number of each token as its colour."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.style import Style
from rich.text import Text

from flows.looking import first_keys
from flows.sheets import out
from pipeline import pages
from pipeline.artifacts import Artifact
from pipeline.catalog import Entry
from pipeline.disk import whole_file
from pipeline.errors import ExperimentError
from pipeline.inspecting.tokens import COLUMNS, Key, Reading, colour, printable, read, rollouts_of, span

STEPS = 9
"""Colours of the scale that is printed."""


def show(path: Path, rows: int, where: str | None, column: str | None, html: Path | None) -> None:
    """Print the first responses that `where` finds, or write them as a page that opens offline.

    `path` is rollouts, labels, scores or advantages of an iteration; all its columns are looked at where none is named.
    Raises `ExperimentError` for a column that tokens do not have, or that is not stored of these.
    """
    if column is not None and column not in COLUMNS:
        raise ExperimentError(f"tokens have no {column!r}", "--column", f"one of {', '.join(COLUMNS)}")
    readings = _readings(path, rows, where)
    spans = {name: span(name, readings) for name in COLUMNS if any(name in one.columns for one in readings)}
    if not spans:
        raise ExperimentError("no responses there", str(path), "another --where, or another artifact")
    if column is not None and column not in spans:
        raise ExperimentError(
            f"{column} is not stored of these responses", str(path), f"there are: {', '.join(spans)}"
        )  # fmt: skip
    if html is not None:
        _write(html, path, readings, spans, column or next(iter(spans)))
        return
    for one in readings:
        _print(one, {column: spans[column]} if column is not None else spans)


def _readings(path: Path, rows: int, where: str | None) -> list[Reading]:
    rounds = rollouts_of(path)
    artifact = Artifact.open(path)
    redone = path if Entry.of(artifact).variant is not None else None
    keys = first_keys(artifact, where, rows)
    found: list[Reading] = []
    for rollouts in rounds:
        there = set(keys) if len(rounds) == 1 else set(first_keys(Artifact.open(rollouts), None, None))
        found += read(rollouts, [key for key in keys if key in there], redone=redone)
    place: Mapping[Key, int] = {key: number for number, key in enumerate(keys)}
    return sorted(found, key=lambda one: place[one.prompt_id, one.sample])


def _print(one: Reading, spans: Mapping[str, tuple[float, float]]) -> None:
    facts = "  ".join(f"{name} {_fact(value)}" for name, value in one.facts.items())
    out.print(Text(f"{one.prompt_id}/{one.sample}", "bold"), Text(facts, "dim"))
    out.print(Text(printable(one.prompt)))
    for name, ends in spans.items():
        if name in one.columns:
            out.print(_scale(name, ends))
            out.print(_coloured(one, name, ends) if out.color_system is not None else _numbered(one, name))
    out.print()


def _fact(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else printable(str(value))


def _scale(name: str, ends: tuple[float, float]) -> Text:
    low, high = ends
    line = Text(f"{name:<10} {low:.3g} ")
    for step in range(STEPS):
        line.append(" ", _style(low + (high - low) * step / (STEPS - 1), ends))
    return line.append(f" {high:.3g} {COLUMNS[name].unit}: {COLUMNS[name].doc}")


def _coloured(one: Reading, name: str, ends: tuple[float, float]) -> Text:
    line = Text()
    for piece, value in zip(one.pieces, one.columns[name], strict=True):
        line.append(printable(piece), _style(value, ends))
    return line


def _numbered(one: Reading, name: str) -> Text:
    """Where there are no colours: the number behind each token."""
    return Text(" ".join(f"{printable(p)}({v:.2g})" for p, v in zip(one.pieces, one.columns[name], strict=True)))


def _style(value: float, ends: tuple[float, float]) -> Style:
    red, green, blue = colour(value, *ends)
    dark = red + green + blue < 390
    return Style(color="rgb(255,255,255)" if dark else "rgb(0,0,0)", bgcolor=f"rgb({red},{green},{blue})")


def _write(
    html: Path, path: Path, readings: Sequence[Reading], spans: Mapping[str, tuple[float, float]], column: str
) -> None:
    columns = {name: {**dataclasses.asdict(COLUMNS[name]), "span": ends} for name, ends in spans.items()}
    data = {
        "where": str(path), "column": column, "columns": columns, "readings": [dataclasses.asdict(r) for r in readings],
    }  # fmt: skip
    with whole_file(html) as temporary:
        temporary.write_text(pages.page("pipeline.inspecting", "tokens.html", data), encoding="utf-8")
    out.print(f"{len(readings)} responses: {html}", markup=False)
