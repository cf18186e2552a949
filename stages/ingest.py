"""files you have -> prompts, demonstrations, documents, rankings or rollouts: the first contract of everything."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pyarrow as pa
from pydantic import Field

from pipeline.artifacts import Artifact, Outbox
from pipeline.contracts import DEMONSTRATIONS, DOCUMENTS, POLICY, PROMPTS, RANKINGS, ROLLOUTS
from pipeline.errors import ExperimentError, InputError
from pipeline.experiment import Experiment
from pipeline.grading import open_grader
from pipeline.sources import arithmetic, files, preferences
from pipeline.sources.files import RawRow
from pipeline.sources.rows import (
    Noted,
    Origin,
    Row,
    UnfitRowError,
    as_demonstration,
    as_document,
    as_prompt,
    few,
    identity,
    question_of,
    refuse_broken_text,
    short_hash,
    spoken,
)
from pipeline.stage import FILES, StageSettings, stage
from pipeline.text import Chat

REJECTED = "rejected.jsonl"
PART_ROWS = 50_000


class Settings(StageSettings):
    """What to make, and from what."""

    kind: Literal["prompts", "demonstrations", "documents", "rankings", "rollouts"]
    """The contract to make."""
    source: Literal["files", "arithmetic"] = "files"
    """Files from outside, or the built-in world."""
    world: arithmetic.World = arithmetic.World()
    """Settings of the built-in world."""
    split: str = "train"
    """Side of a built-in world (`train`, `held_out`), or split of a saved HF dataset."""
    count: int | None = Field(None, ge=1)
    """Rows wanted; all there are when absent (a built-in world needs it)."""
    grader: str = "exact"
    """Written into prompts: who compares a response with the answer."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our column name -> the name in the file, where the usual aliases do not fit."""
    name: str | None = None
    """Value of the `source` column where the file has none; the file's name when absent."""
    part: (
        Literal[
            "demonstrations", "prompts", "held_out", "documents", "held_out_documents", "rankings", "held_out_rankings"
        ]
        | None
    ) = None  # fmt: skip
    """Which dataset of an experiment this is."""

    @classmethod
    def slice(cls, experiment: Experiment, changes: Mapping[str, Any]) -> dict[str, Any]:
        """The experiment's `data.PART`; PART comes from `--set part=...`."""
        part = changes.get("part")
        wanted = getattr(experiment.data, part, None) if part else None
        if wanted is None:
            raise ExperimentError(f"which dataset of the experiment? part={part!r}", do="--set part=prompts")
        kind = "prompts" if part == "held_out" else str(part).removeprefix("held_out_")
        world = {"seed": experiment.seed, **experiment.data.world}
        return {
            "kind": kind, "part": part, "source": wanted.source, "world": world, "split": wanted.split,
            "count": wanted.count, "grader": wanted.grader, "columns": wanted.columns,
        }  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """Files from outside; a checkpoint whose tokenizer responses from elsewhere are written in."""

    files: Annotated[tuple[Path, ...] | None, FILES] = None
    tokenizer: Annotated[Artifact | None, POLICY] = None


WIDTH = {"sample": 32, "seed": 64}
"""Bits of a column."""


def as_rollouts(row: Mapping[str, Any], chat: Chat) -> list[Row]:
    """Rows of the rollouts contract, without `sample`: one response or a list of them, tokenized here once."""
    messages = question_of(row)
    given = spoken(row.get("response"))
    responses = [spoken(one) for one in given] if isinstance(given, list) else [given]
    if not responses or not all(isinstance(text, str) and text for text in responses):
        raise UnfitRowError("no response, or an empty one")
    asked = {**_key(row, messages), "prompt_tokens": row.get("prompt_tokens") or chat.prompt_tokens(messages)}
    _refuse_strange(asked["prompt_tokens"], chat)
    tokens, logprobs = (
        _per_response(row.get(name), len(responses)) for name in ("response_tokens", "sampler_logprobs")
    )
    finish: Any = row.get("finish")
    finishes = finish if isinstance(finish, list) else [finish] * len(responses)
    if len(finishes) != len(responses):
        raise UnfitRowError(f"{len(finishes)} times finish for {len(responses)} responses")
    return [
        {**_response(text, ids, logs, end, chat), **asked}
        for text, ids, logs, end in zip(responses, tokens, logprobs, finishes, strict=True)
    ]


def _key(row: Mapping[str, Any], messages: Sequence[Row]) -> Row:
    """What the row says of itself where it was exported from here: its draw of the prompt, `sample` and `seed`.

    Other data have ids of their own; ours is a hash of the prompt.
    """
    prompt_id, known = identity(messages), row.get("prompt_id")
    if not isinstance(known, str) or known.partition("#")[0] != prompt_id:
        return {"prompt_id": prompt_id}
    told = {name: row.get(name) for name in ("sample", "seed")}
    return {"prompt_id": known, **{name: value for name, value in told.items() if is_whole(value, WIDTH[name])}}


def is_whole(value: Any, bits: int) -> bool:
    """Whether it is a whole number that a column of so many bits holds."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2 ** (bits - 1)) <= value < 2 ** (bits - 1)


def _response(text: str, ids: Any, logprobs: Any, finish: Any, chat: Chat) -> Row:
    """One response; without `finish` it was cut if its own tokens say so, and log-probabilities need those tokens."""
    if not finish:
        finish = "length" if ids and ids[-1] not in chat.stop_ids else "stop"
    if finish not in ("stop", "length"):
        raise UnfitRowError(f"finish is {finish!r}, neither stop nor length")
    if ids:
        _refuse_strange(ids, chat)
        _refuse_impossible(logprobs, len(ids))
    return {
        "response_tokens": ids or chat.response_tokens(text, finished=finish == "stop"), "response": text,
        "sampler_logprobs": logprobs if ids else None, "finish": finish, "seed": 0,
    }  # fmt: skip


def _refuse_strange(tokens: Any, chat: Chat) -> None:
    size = len(chat.tokenizer)
    if not isinstance(tokens, list) or not all(isinstance(token, int) and 0 <= token < size for token in tokens):
        raise UnfitRowError(f"tokens that are not ids of this tokenizer: {str(tokens)[:60]}")


def _refuse_impossible(logprobs: Any, count: int) -> None:
    if logprobs is None:
        return
    if len(logprobs) != count:
        raise UnfitRowError(f"{len(logprobs)} log-probabilities for {count} tokens")
    if not all(isinstance(value, int | float) and -math.inf < value <= 0 for value in logprobs):
        raise UnfitRowError("log-probabilities that are not finite numbers <= 0")


def _per_response(values: Any, count: int) -> list[Any]:
    """One list per response: `values` is a list of them, a single one, or nothing."""
    if not values:
        return [None] * count
    if not isinstance(values, list):
        raise UnfitRowError(f"expected a list, found {str(values)[:60]}")
    lists = values if isinstance(values[0], list) else [values]
    if len(lists) != count:
        raise UnfitRowError(f"{len(lists)} lists of tokens for {count} responses")
    return lists


COLUMNS = {
    "prompts": ("messages", "prompt", "answer", "source"),
    "demonstrations": ("messages", "prompt", "response", "answer", "source"),
    "documents": ("text", "source"),
    "rankings": (
        "messages", "prompt", *dict.fromkeys(name for shape in preferences.SHAPES for name in shape.needs),
        "score_chosen", "score_rejected", "margin", "annotator", "source",
    ),
    "rollouts": (
        "messages", "prompt", "response", "finish", "prompt_tokens", "response_tokens", "sampler_logprobs", "source",
        "prompt_id", "sample", "seed",
    ),
}  # fmt: skip
NEEDS: dict[str, Sequence[tuple[str, ...]]] = {
    "prompts": [("messages",), ("prompt",)],
    "demonstrations": [("messages",), ("prompt",)],
    "documents": [("text",)],
    "rankings": [shape.needs for shape in preferences.SHAPES],
    "rollouts": [("messages", "response"), ("prompt", "response")],
}
"""The columns of one of these must be there."""
RENDERED = (
    "`input` of verl's dumps is the prompt as a chat template wrote it, from which its turns cannot be told: add a "
    "column `prompt` with the messages; or, if it is one plain turn of the user, say --set columns.prompt=input"
)
UNIQUE = {"prompts": "prompt_id", "documents": "document_id", "rankings": "ranking_id"}
"""Contracts in which a row may stand once only."""


def refuse_misfit(first: RawRow, settings: Settings) -> None:
    """Raise `InputError` when the columns of the first row will not do: then none of the rows would."""
    wanted = COLUMNS[settings.kind]
    if unknown := [name for name in settings.columns if name not in wanted]:
        raise InputError(f"{settings.kind} have no column {unknown[0]!r}", do=f"columns: {', '.join(wanted)}")
    found = files.find_columns(first.values, wanted, settings.columns)
    if not any(all(name in found for name in needs) for needs in NEEDS[settings.kind]):
        accepted = " or ".join(" + ".join(needs) for needs in NEEDS[settings.kind])
        raise InputError(
            f"no column for {accepted}; found {', '.join(first.values) or 'none'}", first.where,
            RENDERED if {"input", "output"} <= first.values.keys() else how_to_name(settings),
        )  # fmt: skip


def how_to_name(settings: Settings) -> str:
    """How to say which column is which, and what they may be called without saying so."""
    needed = dict.fromkeys(name for needs in NEEDS[settings.kind] for name in needs)
    if settings.kind == "rankings":
        needed |= dict.fromkeys(("prompt", "messages"))
    names = "; ".join(f"{name}: {', '.join(files.ALIASES[name])}" for name in needed)
    return f"name it with --set columns.{next(iter(needed))}=YOURS; known names: {names}"


def renamed(raw: RawRow, settings: Settings) -> tuple[Row, dict[str, str]]:
    """The row under our names, with its source filled in, and our name -> theirs. A second file may use other names."""
    names = {**files.find_columns(raw.values, COLUMNS[settings.kind], {}), **settings.columns}
    row = {ours: files.value(raw.values, theirs) for ours, theirs in names.items()}
    refuse_broken_text(row)
    row["source"] = str(row.get("source") or settings.name or Path(raw.where.partition(":")[0].partition("[")[0]).stem)
    return row, names


@dataclass
class Sorted:
    """What became of the rows of the files: those that fit, and those that do not with the reason of each."""

    rows: list[Row] = field(default_factory=list)
    misfits: list[tuple[RawRow, UnfitRowError]] = field(default_factory=list)
    origins: dict[tuple[tuple[str, str], ...], Origin] = field(default_factory=dict)
    """One for every distinct mapping of our names to theirs."""
    winners: set[str] = field(default_factory=set)
    """Numbers that tell who won."""


def adapted(rows: Iterator[RawRow], settings: Settings, chat: Chat | None) -> Sorted:
    """All rows as the contract has them, or the reason why they do not fit."""
    first = next(rows, None)
    if first is None:
        raise InputError("the files hold no rows", do="check the files")
    refuse_misfit(first, settings)
    found, seen = Sorted(), set[str]()
    for raw in chain([first], rows):
        try:
            row, names = renamed(raw, settings)
            found.winners.add(preferences.winner_number(row, names))
            made, origin = _adapt(row, names, settings, chat)
            if (key := UNIQUE.get(settings.kind)) is not None:
                _refuse_repeated(made[0], key, seen)
        except UnfitRowError as reason:
            found.misfits.append((raw, reason))
        else:
            found.rows += made
            found.origins.setdefault(tuple(names.items()), Origin()).add(raw.values, names, origin)
    return found


def _refuse_repeated(row: Row, key: str, seen: set[str]) -> None:
    if row[key] in seen:
        raise UnfitRowError(f"a repetition of {key}", row[key])
    seen.add(row[key])


def _adapt(
    row: Row, names: Mapping[str, str], settings: Settings, chat: Chat | None
) -> tuple[list[Row], dict[str, str]]:
    """The rows made of one, and of which columns."""
    if settings.kind == "rankings":
        ranking, origin = preferences.as_ranking(row, names)
        return [ranking], origin
    noted = Noted(row)
    if settings.kind == "rollouts":
        made = _adopted(noted, chat)
    elif settings.kind == "prompts":
        made = [as_prompt(noted, settings.grader)]
    else:
        made = [{"demonstrations": as_demonstration, "documents": as_document}[settings.kind](noted)]
    return made, {name: f"{{{name}}}" for name in noted.used if name in names}


def _adopted(row: Mapping[str, Any], chat: Chat | None) -> list[Row]:
    if chat is None:
        raise InputError(
            "responses from elsewhere need a tokenizer", do="name the checkpoint they are for: --tokenizer PATH"
        )
    try:
        return as_rollouts(row, chat)
    except InputError as error:  # the chat template refuses the conversation
        raise UnfitRowError(error.what) from error


def built_in(settings: Settings) -> list[Row]:
    """Rows of the built-in world."""
    if settings.count is None:
        raise ExperimentError("a built-in world needs to know how many rows to make", do="--set count=1000")
    if settings.kind == "prompts":
        rows = arithmetic.prompts(settings.world, _split(settings), settings.count)
        return [{"prompt_id": identity(row["messages"]), **row} for row in rows]
    if settings.kind == "demonstrations":
        rows = arithmetic.demonstrations(settings.world, settings.count)
        return [{"prompt_id": identity(row["messages"][:-1]), **row} for row in rows]
    if settings.kind == "documents":
        rows = arithmetic.documents(settings.world, _split(settings), settings.count)
        return [{"document_id": short_hash(row["text"]), **row} for row in rows]
    raise ExperimentError(f"the built-in world has no {settings.kind}", do="prompts, demonstrations or documents")


def _split(settings: Settings) -> arithmetic.Split:
    split: arithmetic.Split | None = next(
        (known for known in get_args(arithmetic.Split) if known == settings.split), None
    )
    if split is None:
        raise ExperimentError(f"the built-in world has no split {settings.split!r}", do="train or held_out")
    return split


def grouped(rows: Sequence[Row]) -> list[Row]:
    """Rollouts with the responses to one prompt together.

    They keep the numbers they came with where those tell them apart, and are else numbered from 0 in the file's order.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["prompt_id"], []).append(row)
    return [row for group in groups.values() for row in _numbered(group)]


def _numbered(group: Sequence[Row]) -> list[Row]:
    if len({row["sample"] for row in group if "sample" in row}) == len(group):
        return list(group)
    return [{**row, "sample": sample} for sample, row in enumerate(group)]


@stage(writes=(PROMPTS, DEMONSTRATIONS, DOCUMENTS, RANKINGS, ROLLOUTS), version=1)
def ingest(inputs: Inputs, settings: Settings, out: Outbox) -> None:
    """Bring data in: check every row, keep the misfits aside with their reasons, drop nothing in silence."""
    if settings.kind == "prompts":
        open_grader(settings.grader)
    rows = built_in(settings) if settings.source == "arithmetic" else _from_files(inputs, settings, out)
    about: dict[str, str] = {}
    if settings.kind == "rollouts" and inputs.tokenizer is not None:
        rows, about = grouped(rows), {"engine": "elsewhere", **Chat(inputs.tokenizer.path).metadata()}
    for index, part in enumerate(parts(rows, PART_ROWS)):
        table = pa.Table.from_pylist(part, schema=out.contract.schema(part[0]))
        out.write(index, table.replace_schema_metadata({**(table.schema.metadata or {}), **about}))


def _from_files(inputs: Inputs, settings: Settings, out: Outbox) -> list[Row]:
    if not inputs.files:
        raise InputError("no files to read", do="name them: --files PATH ...; or --set source=arithmetic")
    chat = Chat(inputs.tokenizer.path) if inputs.tokenizer is not None else None
    found = adapted(islice(files.read(inputs.files, settings.split), settings.count), settings, chat)
    preferences.refuse_unclear_winners(found.winners)
    _say(found, out)
    if not found.rows:
        raw, reason = found.misfits[0]
        raise InputError(
            f"none of {len(found.misfits)} rows fits; the first: {reason}", raw.where, how_to_name(settings)
        )
    return preferences.without_empty_ratings(found.rows) if settings.kind == "rankings" else found.rows


def _say(found: Sorted, out: Outbox) -> None:
    out.stats["rejected"] = len(found.misfits)
    out.metrics.add("rows/rejected", len(found.misfits), "rows")
    for line in few([str(origin) for origin in found.origins.values()], 10, "\n").splitlines():
        out.say(line)
    if not found.misfits:
        return
    with (out.path / REJECTED).open("w", encoding="utf-8") as stream:
        for raw, reason in found.misfits:
            aside = {"where": raw.where, "reason": str(reason), "row": raw.values}
            stream.write(json.dumps(aside, default=str) + "\n")
    out.say(f"{len(found.rows)} rows kept, {len(found.misfits)} do not fit and lie in {REJECTED}:")
    reasons = Counter(reason.why for _, reason in found.misfits).most_common()
    for line in few([f"{times} x {why}" for why, times in reasons], 20, "\n").splitlines():
        out.say(f"  {line}")


def parts(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    """Runs of `size` rows, or a few more, that do not cut through a group."""
    start = 0
    while start < len(rows):
        end = min(start + size, len(rows))
        while end < len(rows) and "sample" in rows[end] and rows[end]["prompt_id"] == rows[end - 1]["prompt_id"]:
            end += 1
        yield rows[start:end]
        start = end


if __name__ == "__main__":
    ingest.main()
