"""Datasets as the rows that verl and TRL read. What one of them has no place for is left out, counted and told.

Field names were read in:
    verl   examples/data_preprocess/gsm8k.py       prompts: data_source, prompt, ability, reward_model, extra_info
           .../gsm8k_multiturn_sft.py              demonstrations: messages
           verl/utils/dataset/rm_dataset.py        pairs: prompt, chosen, rejected, all plain text; their example
                                                   full_hh_rlhf.py writes dialogues of "Human:" and "Assistant:"
           verl/trainer/ppo/ray_trainer.py         `_dump_generations`: input, output, gts, score, step, and whatever
                                                   else the reward function tells of a row
    TRL    docs/source/dataset_formats.md          prompt-only, prompt-completion, preference, language modeling
           trl/rewards/accuracy_rewards.py         `solution` is the column of reference answers
           trl/trainer/grpo_trainer.py (1.16.0)    completions_STEP.parquet: step, prompt, completion, a column for each
                                                   reward, advantage

Both pass further columns on, so ours stand beside theirs: ids, tokens and log-probabilities. `ingest` reads all of it
back. verl's `input` is the prompt as the chat template rendered it, from which the turns cannot be told; therefore a
column `prompt` has the conversation.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field, replace
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts import Artifact
from pipeline.companions import Companions
from pipeline.contracts import FLOAT32, FLOATS, INT32, INT64, MESSAGES, STRING, TOKENS
from pipeline.disk import whole_file
from pipeline.errors import ExperimentError
from pipeline.sources.preferences import turns_of

Row = dict[str, Any]

SUFFIXES = (".jsonl", ".parquet")
AT_ONCE = 10_000
"""Rows that are turned at a time."""


@dataclass
class Export:
    """The rows, and what is not in them."""

    schema: pa.Schema
    rows: Iterator[Row]
    left_out: Counter[str] = field(default_factory=Counter)
    """Why -> how many, complete once the rows have been read."""
    remarks: list[str] = field(default_factory=list)
    """What whoever reads the rows should know."""


def exported(artifact: Artifact, to: str) -> Export:
    """The artifact as rows of `to`. Raises `ExperimentError` where there are no such rows."""
    kind = artifact.manifest.kind
    if kind not in SHAPES[to]:
        others = [peer for peer, shapes in SHAPES.items() if kind in shapes]
        raise ExperimentError(
            f"{to} has no rows for {kind}", str(artifact.path),
            f"--to {others[0]} has" if others else f"{to} has rows for {', '.join(SHAPES[to])}",
        )  # fmt: skip
    return SHAPES[to][kind](artifact)


def write(export: Export, out: Path) -> int:
    """Write all rows as JSON Lines or Parquet, by the suffix; return how many. In the end all is there or nothing."""
    count = 0
    with whole_file(out) as temporary:
        with _sink(temporary, export.schema, out.suffix) as sink:
            while some := list(islice(export.rows, AT_ONCE)):
                sink.add(some)
                count += len(some)
        if not count:
            temporary.unlink()
    return count


class _Lines:
    """JSON Lines."""

    def __init__(self, path: Path) -> None:
        self.stream = path.open("w", encoding="utf-8")

    def add(self, rows: Sequence[Row]) -> None:
        self.stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def close(self) -> None:
        self.stream.close()


class _Parquet:
    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.schema, self.writer = schema, pq.ParquetWriter(path, schema, compression="zstd")

    def add(self, rows: Sequence[Row]) -> None:
        self.writer.write_table(pa.Table.from_pylist(list(rows), schema=self.schema))

    def close(self) -> None:
        self.writer.close()


def _sink(path: Path, schema: pa.Schema, suffix: str) -> AbstractContextManager[_Lines | _Parquet]:
    return closing(_Lines(path) if suffix == ".jsonl" else _Parquet(path, schema))


def _rows(artifact: Artifact) -> Iterator[Row]:
    return (row for part in artifact.parts() for batch in part.to_batches(AT_ONCE) for row in batch.to_pylist())


def _said(text: str) -> list[Row]:
    return [{"role": "assistant", "content": text}]


# Prompts, demonstrations, documents -----------------------------------------------------------------------------------


def verl_prompts(prompts: Artifact) -> Export:
    """data_source, prompt, ability, reward_model, extra_info. Nothing in verl reads `ability`: it is our grader."""
    split = "test" if prompts.manifest.settings.get("split") in ("held_out", "test") else "train"
    rows = (
        {
            "data_source": row["source"], "prompt": row["messages"], "ability": row["grader"],
            "reward_model": {"style": "rule", "ground_truth": row["answer"]},
            "extra_info": {"index": index, "split": split, "prompt_id": row["prompt_id"]},
        }
        for index, row in enumerate(_rows(prompts))
    )  # fmt: skip
    return Export(
        pa.schema({
            "data_source": STRING, "prompt": MESSAGES, "ability": STRING,
            "reward_model": pa.struct({"style": STRING, "ground_truth": STRING}),
            "extra_info": pa.struct({"index": INT64, "split": STRING, "prompt_id": STRING}),
        }),
        rows,
    )  # fmt: skip


def trl_prompts(prompts: Artifact) -> Export:
    """Prompt-only, conversational, with `solution` for reward functions."""
    names = {
        "messages": "prompt",
        "answer": "solution",
        "grader": "grader",
        "source": "source",
        "prompt_id": "prompt_id",
    }
    rows = ({theirs: row[ours] for ours, theirs in names.items()} for row in _rows(prompts))
    types = dict.fromkeys(names.values(), STRING)
    return Export(pa.schema({**types, "prompt": MESSAGES}), rows)


def verl_demonstrations(demonstrations: Artifact) -> Export:
    """Messages, for verl's multi-turn SFT."""
    rows = ({"messages": row["messages"], "data_source": row["source"]} for row in _rows(demonstrations))
    return Export(pa.schema({"messages": MESSAGES, "data_source": STRING}), rows)


def trl_demonstrations(demonstrations: Artifact) -> Export:
    """Prompt-completion, conversational: TRL then learns the last turn only, not earlier ones of the assistant."""

    def rows() -> Iterator[Row]:
        for row in _rows(demonstrations):
            *prompt, answer = row["messages"]
            if prompt:
                yield {"prompt": prompt, "completion": [answer], "source": row["source"]}
            else:
                export.left_out["a conversation that the assistant begins: there is no prompt"] += 1

    export = Export(pa.schema({"prompt": MESSAGES, "completion": MESSAGES, "source": STRING}), rows())
    return export


def trl_documents(documents: Artifact) -> Export:
    """Language modeling."""
    rows = ({"text": row["text"], "source": row["source"]} for row in _rows(documents))
    return Export(pa.schema({"text": STRING, "source": STRING}), rows)


# Pairs ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pair:
    ranking: Row
    better: str
    worse: str
    margin: float | None


def _pairs(rankings: Artifact, left_out: Counter[str]) -> Iterator[_Pair]:
    """Every response above every one that is ranked below it."""
    for row in _rows(rankings):
        ratings = row.get("ratings") or [None] * len(row["ranks"])
        judged = sorted(zip(row["ranks"], row["responses"], ratings, strict=True), key=lambda one: int(one[0]))
        for (rank, better, high), (lower, worse, low) in combinations(judged, 2):
            if rank == lower:
                left_out["pairs that tie"] += 1
            else:
                yield _Pair(row, better, worse, None if high is None or low is None else high - low)


def trl_rankings(rankings: Artifact) -> Export:
    """Preference, explicit prompt, conversational. `margin` is the difference of the ratings."""

    def rows() -> Iterator[Row]:
        for pair in _pairs(rankings, export.left_out):
            about = {name: pair.ranking[name] for name in ("annotator", "source")}
            row = {"prompt": pair.ranking["messages"], "chosen": _said(pair.better), "rejected": _said(pair.worse)}
            yield {**row, **({"margin": pair.margin} if rated else {}), **about}

    rated = all("ratings" in part.column_names and not part["ratings"].null_count for part in rankings.parts())
    margin = {"margin": FLOAT32} if rated else {}
    sides = dict.fromkeys(("prompt", "chosen", "rejected"), MESSAGES)
    export = Export(pa.schema({**sides, **margin, "annotator": STRING, "source": STRING}), rows())
    if not rated:
        export.remarks.append("no column margin: not every ranking has ratings")
    return export


def verl_rankings(rankings: Artifact) -> Export:
    """Pairs of plain text, as dialogues of "Human:" and "Assistant:"; others are left out."""

    def rows() -> Iterator[Row]:
        for pair in _pairs(rankings, export.left_out):
            prompt = _spoken(pair.ranking["messages"]) + "\n\nAssistant:"
            row = {"prompt": prompt, "chosen": f" {pair.better}", "rejected": f" {pair.worse}"}
            wanted = [[*pair.ranking["messages"], *_said(text)] for text in (pair.better, pair.worse)]
            if [turns_of(prompt + row[side]) for side in ("chosen", "rejected")] == wanted:
                yield {**row, "annotator": pair.ranking["annotator"], "data_source": pair.ranking["source"]}
            else:
                export.left_out["pairs that no dialogue of Human: and Assistant: can hold"] += 1

    names = ("prompt", "chosen", "rejected", "annotator", "data_source")
    export = Export(pa.schema(dict.fromkeys(names, STRING)), rows())
    return export


def _spoken(messages: Sequence[Row]) -> str:
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names.get(turn['role'], 'Human')}: {turn['content']}" for turn in messages)


# Rollouts -------------------------------------------------------------------------------------------------------------


def verl_rollouts(artifact: Artifact) -> Export:
    """Rows of verl's dump of generations, and our columns."""
    near = replace(Companions.of(artifact), advantages=None)
    chat = near.chat()

    def rows() -> Iterator[Row]:
        for row in near.rows(export.left_out):
            theirs = {
                "input": chat.decode(row["prompt_tokens"]), "output": row["response"], "gts": row["answer"],
                "score": row.get("reward"), "step": near.step,
            }  # fmt: skip
            yield {**theirs, **{name: row[name] for name in OURS}, "prompt": row["messages"]}

    theirs = {"input": STRING, "output": STRING, "gts": STRING, "score": FLOAT32, "step": INT64}
    export = Export(pa.schema({**theirs, **OURS, "prompt": MESSAGES}), rows())
    if near.labels is None:
        export.remarks.append("score is null: there are no labels beside these rollouts")
    return export


def trl_rollouts(artifact: Artifact) -> Export:
    """Rows of TRL's completions files, and our columns. TRL has one advantage for a response, we one for each token."""
    near = Companions.of(artifact)
    told = {"reward": FLOAT32} if near.labels is not None else {}
    told |= {"advantage": FLOAT32} if near.advantages is not None else {}

    def rows() -> Iterator[Row]:
        for row in near.rows(export.left_out):
            theirs = {"step": near.step, "prompt": row["messages"], "completion": _said(row["response"])}
            yield {**theirs, **{name: row[name] for name in (*told, *OURS)}}

    theirs = {"step": INT64, "prompt": MESSAGES, "completion": MESSAGES}
    export = Export(pa.schema({**theirs, **told, **OURS}), rows())
    missing = {"reward": near.labels, "advantage": near.advantages}
    export.remarks += [f"no column {name}: nothing beside tells of it" for name, one in missing.items() if one is None]
    return export


OURS = {
    "prompt_id": STRING, "sample": INT32, "prompt_tokens": TOKENS, "response_tokens": TOKENS,
    "sampler_logprobs": FLOATS, "finish": STRING, "seed": INT64,
}  # fmt: skip
"""Columns of rollouts that stand beside theirs."""


SHAPES: dict[str, dict[str, Callable[[Artifact], Export]]] = {
    "verl": {
        "prompts": verl_prompts, "demonstrations": verl_demonstrations, "rankings": verl_rankings,
        "rollouts": verl_rollouts, "labels": verl_rollouts,
    },
    "trl": {
        "prompts": trl_prompts, "demonstrations": trl_demonstrations, "documents": trl_documents,
        "rankings": trl_rankings, "rollouts": trl_rollouts, "labels": trl_rollouts,
    },
}  # fmt: skip
"""Whose rows -> kind of artifact -> how they are made."""
