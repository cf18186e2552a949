"""Parquet, JSONL, JSON, CSV and saved HF datasets, row by row, with the place of each row; and who calls what how."""

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from pipeline.errors import InputError

ALIASES: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversation", "conversations", "dialogue"),
    "prompt": ("prompt", "question", "problem", "instruction", "query"),
    "answer": (
        "answer", "ground_truth", "reference", "target", "label", "solution",
        "reward_model.ground_truth", "reward_spec.ground_truth",
    ),
    "response": (
        "response", "responses", "completion", "completions", "output", "outputs", "generation", "generations",
    ),
    "text": ("text", "content", "document"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "score_chosen": ("score_chosen", "chosen_score", "rating_chosen", "chosen_rating"),
    "score_rejected": ("score_rejected", "rejected_score", "rating_rejected", "rejected_rating"),
    "margin": ("margin",),
    "response_a": (
        "response_a", "answer_a", "completion_a", "output_a", "response_0", "answer_0", "completion_0", "output_0",
        "conversation_a",
    ),
    "response_b": (
        "response_b", "answer_b", "completion_b", "output_b", "response_1", "answer_1", "completion_1", "output_1",
        "conversation_b",
    ),
    "winner": ("winner", "preferred", "preference", "better_response_id", "choice"),
    "ranks": ("ranks", "ranking"),
    "ratings": ("ratings", "scores"),
    "annotator": ("annotator", "annotator_id", "worker", "worker_id", "labeler", "user_id"),
    "source": ("source", "data_source", "dataset"),
    "finish": ("finish", "finish_reason"),
    "prompt_tokens": ("prompt_tokens", "prompt_ids", "prompt_token_ids"),
    "response_tokens": ("response_tokens", "response_ids", "completion_ids", "token_ids"),
    "sampler_logprobs": ("sampler_logprobs", "logprobs", "rollout_log_probs", "generation_logprobs"),
    "prompt_id": ("prompt_id",),
    "sample": ("sample",),
    "seed": ("seed",),
}  # fmt: skip
"""Our name -> the names it goes by in the wild, the first found wins."""


@dataclass(frozen=True)
class RawRow:
    """One row as it is in the file, and where it stands."""

    values: Mapping[str, Any]
    where: str


def read(paths: Sequence[Path], split: str = "train") -> Iterator[RawRow]:
    """Rows of all files in order. `split` chooses among the splits of a saved HF dataset dictionary.

    Raises `InputError` with file and line for what cannot be read; nothing is skipped.
    """
    for path in paths:
        yield from _reader(path, split)


def _reader(path: Path, split: str) -> Iterator[RawRow]:
    if path.is_dir():
        return _hf_dataset(path, split)
    readers = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise InputError(f"cannot read files of type {path.suffix!r}", str(path), f"use one of {', '.join(readers)}")
    return readers[path.suffix.lower()](path)


def _jsonl(path: Path) -> Iterator[RawRow]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            yield RawRow(_object(_decoded(line, where), where), where)


def _decoded(line: bytes, where: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = Counter(key for key, _ in pairs)
        if twice := [key for key, times in keys.items() if times > 1]:
            raise InputError(f"the key {twice[0]!r} stands {keys[twice[0]]} times in one object", where, "keep one")
        return dict(pairs)

    try:
        return json.loads(line.decode("utf-8-sig"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or a number of thousands of digits
        raise InputError(f"not JSON: {error}", where, "correct or remove this line") from error


def _json(path: Path) -> Iterator[RawRow]:
    rows = _decoded(path.read_bytes(), str(path))
    if not isinstance(rows, list):
        raise InputError(f"expected a list of objects, found {type(rows).__name__}", str(path), "or use .jsonl")
    for index, row in enumerate(rows):
        where = f"{path}[{index}]"
        yield RawRow(_object(row, where), where)


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"expected an object, found {type(value).__name__}", where, "correct or remove this row")
    return value


def _csv(path: Path) -> Iterator[RawRow]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        try:
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    raise InputError(f"expected {len(reader.fieldnames or [])} fields", where, "correct this line")
                yield RawRow(row, where)
        except csv.Error as error:
            raise InputError(f"not CSV: {error}", f"{path}:{reader.line_num + 1}", "correct this line") from error
        except UnicodeDecodeError as error:
            raise InputError(f"not CSV: {error}", f"{path}:{_broken_line(path)}", "save it as UTF-8") from error


def _broken_line(path: Path) -> int:
    """The line of the first byte that is not UTF-8: the reader is a block ahead of the rows it gives."""
    content = path.read_bytes()
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        content = content[: error.start]
    return 1 + len(re.findall(rb"\r\n|\r|\n", content))


def _parquet(path: Path) -> Iterator[RawRow]:
    try:
        file = pq.ParquetFile(path)
        batches = (batch.to_pylist() for batch in file.iter_batches())
        yield from _numbered(path, batches)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"not a Parquet file: {error}", str(path), "write it again") from error


def _hf_dataset(path: Path, split: str) -> Iterator[RawRow]:
    folder = path / split if (path / "dataset_dict.json").is_file() else path
    files = sorted(file for file in folder.glob("*.arrow") if not file.name.startswith("cache-"))
    if not files:
        raise InputError("no .arrow files of a saved HF dataset", str(folder), "use save_to_disk, or name the files")
    for file in files:
        try:
            with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as stream:
                yield from _numbered(file, (batch.to_pylist() for batch in stream))
        except (OSError, pa.ArrowInvalid) as error:
            raise InputError(f"not an Arrow file: {error}", str(file), "save the dataset again") from error


def _numbered(path: Path, batches: Iterator[list[dict[str, Any]]]) -> Iterator[RawRow]:
    number = 0
    for batch in batches:
        for row in batch:
            yield RawRow(row, f"{path}[{number}]")
            number += 1


def find_columns(row: Mapping[str, Any], wanted: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
    """Our name -> name in the file for every one of `wanted` that `row` has; `given` outranks the aliases.

    Raises `InputError` when a given name is not there.
    """
    found = {}
    for ours in wanted:
        names = (given[ours],) if ours in given else ALIASES[ours]
        theirs = next((name for name in names if _has(row, name)), None)
        if theirs is not None:
            found[ours] = theirs
        elif ours in given:
            raise InputError(f"no column {given[ours]!r} for {ours}; found {', '.join(row)}", do="correct `columns`")
    return found


def _has(row: Mapping[str, Any], name: str) -> bool:
    table, _, nested = name.partition(".")
    return name in row or (isinstance(row.get(table), dict) and _has(row[table], nested))


def value(row: Mapping[str, Any], name: str) -> Any:
    """`row[name]`, where `a.b` means the field b of a unless a column has that name; None where it is not there."""
    if name in row or not _has(row, name):
        return row.get(name)
    table, _, nested = name.partition(".")
    return value(row[table], nested)
