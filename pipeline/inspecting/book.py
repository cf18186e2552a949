"""Responses written down as columns for the page: so many bytes, numbers of three digits, texts that many share once.

rows      column -> one value per response; `pieces` are numbers of `pieces`, `prompt` one of `prompts`
text      how many characters of its tokens are the response (the rest are special tokens), or the text itself;
          null of a response that is too long to be kept whole
column    a list with one number per token; a single number where all are equal
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl

from pipeline.catalog import Entry
from pipeline.errors import ArtifactError
from pipeline.inspecting import tokens
from pipeline.inspecting.samples import HEAD, KEY, LABELS, PLACE, TAIL, choose, round_of, scan
from pipeline.inspecting.subject import Subject
from pipeline.pages import as_json

BUDGET = 6_500_000
"""Bytes of JSON that the responses of a page may take."""
LETTERS = 6000
"""Characters that are kept of a prompt."""
WIDE = 0.995
"""Share of the numbers of a column that its colour scale tells apart."""


@dataclass
class Book:
    """The chosen responses of several runs as columns for the page; texts that many share are kept once."""

    budget: int = BUDGET
    rows: dict[str, list[Any]] = field(default_factory=dict)
    prompts: dict[str, int] = field(default_factory=dict)
    pieces: dict[str, int] = field(default_factory=dict)
    readings: list[tokens.Reading] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    chosen: list[dict[str, Any]] = field(default_factory=list)

    def add(self, subject: Subject, run: int, found: pl.DataFrame, share: float) -> None:
        """Choose and write down responses of a run, with `share` of the budget."""
        budget = int(self.budget * share)
        choice = choose(subject, found, budget)
        read = self._read(subject, choice.rows)
        texts = _texts(subject, choice.rows)
        entries: list[dict[str, Any]] = []
        for row in choice.rows.iter_rows(named=True):
            key = tuple(row[name] for name in KEY)
            entries.append(self._entry(run, row, read.get(key), texts[key]))
            budget -= len(as_json(list(entries[-1].values())).encode())
            if budget < 0:
                break
        for entry in sorted(entries, key=_order):
            for name, value in entry.items():
                self.rows.setdefault(name, []).append(value)
        count = Counter(entry["phase"] for entry in entries)
        self.chosen.append({phase: [count[phase], of] for phase, of in sorted(choice.of.items(), reverse=True)})

    def _read(self, subject: Subject, rows: pl.DataFrame) -> dict[tuple[Any, ...], tokens.Reading]:
        places: dict[tuple[Any, ...], Entry] = {
            (one.phase, one.iteration, round_of(one)): one for one in subject.own if one.kind == "rollouts"
        }
        read: dict[tuple[Any, ...], tokens.Reading] = {}
        for place, those in rows.group_by(PLACE, maintain_order=True):
            entry = places[place]
            keys = list(those.select("prompt_id", "sample").iter_rows())
            try:
                found = tokens.read(entry.artifact.path, keys)
            except ArtifactError as error:
                self.notes.append(f"{subject.name}, {entry.phase} {entry.iteration}, {entry.stage}: {error.what}")
                continue
            read |= {(*place, one.prompt_id, one.sample): one for one in found}
        return read

    def _entry(self, run: int, row: dict[str, Any], reading: tokens.Reading | None, text: str) -> dict[str, Any]:
        told = {
            name: row[name]
            for name in ("phase", "iteration", "prompt_id", "sample", "finish", "length", *LABELS, "why")
        }
        if reading is None:
            shown = text if len(text) <= LETTERS else f"{text[:LETTERS]} ..."
            return {"run": run, **told, "prompt": None, "pieces": None, "text": shown,
                    **dict.fromkeys(("advantage", "divergence", *tokens.COLUMNS))}  # fmt: skip
        self.readings.append(reading)
        prompt = self.prompts.setdefault(_middle_out(reading.prompt), len(self.prompts))
        pieces = [self.pieces.setdefault(piece, len(self.pieces)) for piece in _kept(reading.pieces, _gap(reading))]
        # Where the text is how the tokens begin, its length says it: what follows are special tokens.
        begins = "".join(reading.pieces).startswith(text)
        shown_as = None if len(reading.pieces) > HEAD + TAIL else _units(text) if begins else text
        return {
            "run": run, **told, "prompt": prompt, "pieces": pieces, "text": shown_as,
            "advantage": _short(_mean(reading, "advantages")), "divergence": _short(_sum(reading, "kl")),
            **{name: _column(reading, name) for name in tokens.COLUMNS},
        }  # fmt: skip

    def json(self) -> dict[str, Any]:
        """What the page reads."""
        there = [name for name in tokens.COLUMNS if any(value is not None for value in self.rows.get(name, ()))]
        return {
            "rows": {name: values for name, values in self.rows.items() if name in there or name not in tokens.COLUMNS},
            "prompts": list(self.prompts), "pieces": list(self.pieces), "chosen": self.chosen, "notes": self.notes,
            "columns": {
                name: {"doc": tokens.COLUMNS[name].doc, "unit": tokens.COLUMNS[name].unit, "span": self._span(name)}
                for name in there
            },
        }  # fmt: skip

    def _span(self, name: str) -> tuple[float, float]:
        """Ends of a column's colour scale: few numbers are beyond, so that one of them does not pale all others."""
        values = np.abs(np.concatenate([np.asarray(one.columns.get(name, ())) for one in self.readings]))
        values = values[np.isfinite(values)]
        end = _short(float(np.quantile(values, WIDE)) or float(values.max()))
        return (-end, end if tokens.COLUMNS[name].signed else 0.0)  # type: ignore[operator,return-value]


def _order(entry: dict[str, Any]) -> tuple[Any, ...]:
    return entry["iteration"], entry["phase"] != "loop", entry["prompt_id"], entry["sample"]


def _units(text: str) -> int:
    """Length as a browser counts it."""
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def _texts(subject: Subject, rows: pl.DataFrame) -> dict[tuple[Any, ...], str]:
    wanted = scan(subject, "rollouts", ["prompt_id", "sample", "response"])
    found = wanted.join(rows.lazy().select(KEY), on=KEY, how="semi").select(*KEY, "response")
    return {row[:-1]: row[-1] for row in found.collect(engine="streaming").iter_rows()}


def _gap(reading: tokens.Reading) -> str:
    return f"\n[... {len(reading.pieces) - HEAD - TAIL:,} tokens are not in this page ...]\n"


def _kept(values: Sequence[Any], gap: Any) -> list[Any]:
    return list(values) if len(values) <= HEAD + TAIL else [*values[:HEAD], gap, *values[-TAIL:]]


def _middle_out(text: str) -> str:
    half = LETTERS // 2
    return (
        text if len(text) <= LETTERS else f"{text[:half]}\n[... {len(text) - LETTERS:,} characters ...]\n{text[-half:]}"
    )


def _column(reading: tokens.Reading, name: str) -> list[float | None] | float | None:
    """Three significant digits each; one number where all are equal."""
    values = reading.columns.get(name)
    if values is None:
        return None
    short = [_short(value) for value in _kept(values, None)]
    return short[0] if len(set(short)) == 1 else short


def _short(value: float | None) -> float | None:
    """Whole numbers as such: they are shorter."""
    if value is None or not np.isfinite(value):
        return None
    rounded = float(f"{value:.3g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


def _mean(reading: tokens.Reading, name: str) -> float | None:
    values = reading.columns.get(name)
    return None if values is None else float(np.mean(values))


def _sum(reading: tokens.Reading, name: str) -> float | None:
    values = reading.columns.get(name)
    return None if values is None else float(np.sum(values))
