"""A response token by token: the text of each token, and what the run says of it.

pieces     the response cut at its tokens; joined they are the text, end token included
columns    name -> one number per token, from whatever lies beside the response: rollouts, scores, advantages
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pipeline.artifacts import Artifact
from pipeline.catalog import is_redone, lies_at
from pipeline.contracts import ADVANTAGES, LABELS, ROLLOUTS, SCORES
from pipeline.errors import ArtifactError
from pipeline.storage import MANIFEST

SPEAK = (SCORES.name, LABELS.name, ADVANTAGES.name)
"""Kinds that say something of a response."""

Key = tuple[str, int]
"""(prompt_id, sample)."""


@dataclass(frozen=True)
class Column:
    """A number that tokens have."""

    doc: str
    unit: str
    signed: bool = True
    """Whether both sides of 0 mean something; else 0 is one end of the scale."""


COLUMNS: Mapping[str, Column] = {
    "advantages": Column("credit of the token: above 0 it is made likelier", "reward, or 1 if normalized"),
    "values": Column("critic's estimate before the token is chosen", "reward"),
    "returns": Column("what the critic is to learn", "reward"),
    "kl": Column("log-probability under the policy less that under the reference", "nat"),
    "mismatch": Column("log-probability in the sampler less that in the trainer", "nat"),
    "logprobs": Column("log-probability when it was sampled", "nat", signed=False),
}
"""In the order in which they are offered."""

FACTS = ("reward", "verdict", "correct", "gold", "extracted", "target", "keep", "dropped", "finish", "reward_scores")
"""What is told of a response as a whole."""


@dataclass(frozen=True)
class Reading:
    """One response with everything that is known of its tokens."""

    prompt_id: str
    sample: int
    prompt: str
    """As the engine saw it, special tokens included."""
    pieces: tuple[str, ...]
    facts: Mapping[str, Any]
    """Those of `FACTS` that are stored and not null."""
    columns: Mapping[str, tuple[float, ...]]
    """Those of `COLUMNS` that are stored."""


def read(
    rollouts: Path, keys: Sequence[Key] | None = None, limit: int | None = None, redone: Path | None = None
) -> list[Reading]:
    """Responses of one rollouts artifact with what lies beside it, in the order of `keys`, or the first `limit`.

    What a `redone` artifact says takes the place of what the run goes by. Raises `ArtifactError` where the artifact is
    none of rollouts, its tokenizer is gone, or a key is not in it.
    """
    source = Artifact.open(rollouts, ROLLOUTS)
    cutter = Cutter(tokenizer_of(source))
    rows = _rows(source, keys, limit)
    given = [(row["prompt_id"], row["sample"]) for row in rows]
    missing = [key for key in keys or () if key not in set(given)]
    if missing:
        raise ArtifactError(f"no such response: {missing[:5]}", str(rollouts), "`rlhf show` lists some that there are")
    found: dict[Key, dict[str, Any]] = {key: {} for key in given}
    for artifact in (*beside(source), *([] if redone is None else [Artifact.open(redone)])):
        for row in _rows(artifact, given, None):
            found[row["prompt_id"], row["sample"]] |= {name: v for name, v in row.items() if v is not None}
    order = {key: place for place, key in enumerate(keys)} if keys is not None else {}
    ordered = sorted(rows, key=lambda row: order.get((row["prompt_id"], row["sample"]), 0))
    return [_reading(cutter, {**found[row["prompt_id"], row["sample"]], **row}) for row in ordered]


def _reading(cutter: "Cutter", row: Mapping[str, Any]) -> Reading:
    return Reading(
        row["prompt_id"], row["sample"], "".join(cutter.pieces(row["prompt_tokens"])),
        tuple(cutter.pieces(row["response_tokens"])),
        {name: row[name] for name in FACTS if row.get(name) is not None},
        {name: tuple(values) for name in COLUMNS if (values := _column(name, row)) is not None},
    )  # fmt: skip


def _column(name: str, row: Mapping[str, Any]) -> Sequence[float] | None:
    pairs = {"kl": ("old_logprobs", "ref_logprobs"), "mismatch": ("sampler_logprobs", "old_logprobs")}
    if name in pairs:
        a, b = (row.get(one) for one in pairs[name])
        if name == "kl" and a is None:
            a = row.get("sampler_logprobs")
        return None if a is None or b is None else [float(d) for d in np.subtract(a, b)]
    values: Sequence[float] | None = row.get("sampler_logprobs" if name == "logprobs" else name)
    return values


def _rows(artifact: Artifact, keys: Sequence[Key] | None, limit: int | None) -> list[dict[str, Any]]:
    """Rows with these keys, or the first; only these are taken into memory."""
    rows = pl.scan_parquet([str(path) for path in artifact.part_paths()], glob=False)
    if keys is None:
        found = rows if limit is None else rows.head(limit)
    else:
        wanted = pl.LazyFrame(list(keys), schema={"prompt_id": pl.String, "sample": pl.Int32}, orient="row")
        found = rows.join(wanted, on=["prompt_id", "sample"], how="semi", maintain_order="left")
    there: list[dict[str, Any]] = found.collect(engine="streaming").to_dicts()
    return there


def beside(rollouts: Artifact) -> list[Artifact]:
    """What the run has made of these responses in the same iteration and goes by: judgements, labels, credit."""
    found = []
    for path in sorted(rollouts.path.absolute().parent.iterdir()):
        if (path / MANIFEST).is_file() and not path.name.startswith(".") and not is_redone(path):
            one = Artifact.open(path)
            made_of = {record.digest for record in one.manifest.inputs.get("rollouts", ())}
            if one.manifest.kind in SPEAK and rollouts.manifest.digest in made_of:
                found.append(one)
    return found


def rollouts_of(path: Path) -> list[Path]:
    """The rollouts that the artifact at `path` speaks of: itself, or those that lie in the same iteration.

    Raises `ArtifactError` where there are none.
    """
    artifact = Artifact.open(path)
    if artifact.manifest.kind == ROLLOUTS.name:
        return [path]
    given = artifact.manifest.inputs.get("rollouts", [])
    roots = [path.resolve().parents[min(depth, len(path.resolve().parents) - 1)] for depth in (1, 2, 3)]
    found = [place for record in given if (place := lies_at(record, roots)) is not None]
    if not found:
        raise ArtifactError(
            f"{artifact.manifest.kind} that no rollouts belong to", str(path), "name rollouts, labels or advantages"
        )
    return found


def tokenizer_of(rollouts: Artifact) -> Path:
    """The tokenizer.json with which the responses were written. Raises `ArtifactError` where it is gone."""
    places = rollouts.path.resolve().parents
    roots = places[1 : min(4, len(places))]
    for name in ("policy", "tokenizer"):
        for record in rollouts.manifest.inputs.get(name, []):
            place = lies_at(record, roots)
            if place is not None and (place / "tokenizer.json").is_file():
                return place / "tokenizer.json"
    raise ArtifactError(
        "the tokenizer of these responses is gone: it lay in the policy that sampled them", str(rollouts.path),
        "`rlhf lineage` shows where that lay",
    )  # fmt: skip


class Cutter:
    """Cuts a text at its tokens."""

    def __init__(self, file: Path) -> None:
        self._tokenizer = _load(file)

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """The text of each token, such that all joined are the text of all.

        A character that several tokens make stands at the last of them, the others are empty. Each text is what its
        token adds to those before it: decoders that drop a first space, or join bytes, are right that way.
        """
        pieces, begin, read_to = [], 0, 0
        for end in range(1, len(tokens) + 1):
            before = self._text(tokens[begin:read_to])
            now = self._text(tokens[begin:end])
            if now.endswith("�") and end < len(tokens):
                pieces.append("")
                continue
            pieces.append(now[len(before) :])
            begin, read_to = read_to, end
        return pieces

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))


def _load(file: Path) -> Any:
    try:
        return _parsed(file.read_bytes())
    except Exception as error:  # whatever Rust says of a file
        raise ArtifactError(f"unreadable tokenizer: {error}", str(file)) from error


@lru_cache(maxsize=2)  # by content: every policy of a run has a copy of the same
def _parsed(text: bytes) -> Any:
    from tokenizers import Tokenizer  # much lighter than transformers, and the same file

    return Tokenizer.from_buffer(text)


def span(name: str, readings: Iterable[Reading]) -> tuple[float, float]:
    """Ends of a column's colour scale over these responses: symmetric around 0 where its sign means something."""
    values = np.array([value for one in readings for value in one.columns.get(name, ())], dtype=float)
    values = values[np.isfinite(values)]
    if not np.any(values):
        return (0.0, 0.0)
    if COLUMNS[name].signed:
        most = float(np.abs(values).max())
        return (-most, most)
    return (float(values.min()), 0.0)


NEGATIVE, NEUTRAL, POSITIVE = (178, 24, 43), (255, 255, 255), (33, 102, 172)
"""Ends and middle of the scale, as in ColorBrewer's RdBu: told apart by the colour-blind."""


def colour(value: float, low: float, high: float) -> tuple[int, int, int]:
    """Red below 0, blue above, white at 0; the further the stronger. NaN and an empty scale are white."""
    end = high if value > 0 else -low
    share = 0.0 if not np.isfinite(value) or end <= 0 else min(1.0, abs(value) / end)
    to = POSITIVE if value > 0 else NEGATIVE
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(NEUTRAL, to, strict=True))
    return red, green, blue


def printable(text: str) -> str:
    """A token's text such that every character of it shows: line ends and control characters as JSON has them."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]", _escaped, text)


def _escaped(match: re.Match[str]) -> str:
    known = {"\n": "↵", "\t": "⇥"}
    return known.get(match[0], f"\\u{ord(match[0]):04x}")
