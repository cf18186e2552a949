"""rollouts, labels (, scores) -> advantages: shaping, credit, normalization; the one join.

All rows of the iteration are handed to the pieces at once: statistics over groups or over the batch then cannot
depend on how the rows are split into parts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pyarrow as pa

from pipeline import ragged
from pipeline.algorithms.advantages import ADVANTAGES, Credit
from pipeline.algorithms.normalizers import NORMALIZERS
from pipeline.algorithms.shaping import SHAPES, on_last_token
from pipeline.algorithms.shelf import FROM_MODELS, Line, Piece
from pipeline.artifacts import Artifact, Outbox
from pipeline.contracts import ADVANTAGES as TABLE
from pipeline.contracts import LABELS, ROLLOUTS, SCORES
from pipeline.errors import ContractError
from pipeline.experiment import Experiment
from pipeline.stage import StageSettings, stage

Columns = dict[str, Any]
PART_ROWS = 4096


class Settings(StageSettings):
    """The recipe's lines between reward and update."""

    shape: tuple[Line, ...] = ()
    """Recipe lines of the shape shelf, applied in this order."""
    advantage: Line
    """A recipe line of the advantage shelf."""
    normalize: Line | None = None
    """A recipe line of the normalize shelf."""

    @classmethod
    def slice(cls, experiment: Experiment, changes: Mapping[str, Any]) -> dict[str, Any]:
        """`recipe.shape`, `recipe.advantage`, `recipe.normalize`."""
        recipe = experiment.recipe
        return {"shape": recipe.shape, "advantage": recipe.advantage, "normalize": recipe.normalize}


@dataclass(frozen=True)
class Inputs:
    """The rounds of one iteration, their labels in the same order, and what models read."""

    rollouts: Annotated[tuple[Artifact, ...], ROLLOUTS]
    labels: Annotated[tuple[Artifact, ...], LABELS]
    scores: Annotated[Artifact | None, SCORES] = None


def joined(rollouts: Sequence[Artifact], labels: Sequence[Artifact], scores: Artifact | None) -> pa.Table:
    """One table of the kept rows: rollouts with their labels and, where there are any, their scores.

    Raises `ContractError` when keys do not match.
    """
    if len(rollouts) != len(labels):
        raise ContractError(f"{len(rollouts)} rollouts but {len(labels)} labels", do="name both once per round")
    rounds = [_with_labels(a, b) for a, b in zip(rollouts, labels, strict=True)]
    table = pa.concat_tables(rounds)
    if not table.num_rows:
        raise ContractError(
            "no rows are kept: there is nothing to learn from", str(labels[0].path), "`rlhf show` it for the reasons"
        )
    return table if scores is None else _with_scores(table, scores)


def _with_labels(rollouts: Artifact, labels: Artifact) -> pa.Table:
    responses, marks = rollouts.table(), labels.table()
    if responses.select(["prompt_id", "sample"]) != marks.select(["prompt_id", "sample"]):
        raise ContractError("the labels are of other rollouts", f"{labels.path} and {rollouts.path}")
    for name in ("reward", "correct", "keep"):
        responses = responses.append_column(name, marks[name])
    return responses.filter(marks["keep"]).replace_schema_metadata(None)


def _with_scores(table: pa.Table, scores: Artifact) -> pa.Table:
    read = scores.table().replace_schema_metadata(None)
    place = {key: row for row, key in enumerate(_keys(read))}
    missing = [key for key in _keys(table) if key not in place]
    if missing:
        raise ContractError(
            f"{len(missing)} kept rows have no scores; first: {missing[:5]}",
            str(scores.path),
            "run `score` on these labels",
        )
    read = read.take([place[key] for key in _keys(table)])
    for name in FROM_MODELS:
        if name in read.column_names:
            table = table.append_column(name, read[name])
    return table


def _keys(table: pa.Table) -> list[tuple[str, int]]:
    return list(zip(table["prompt_id"].to_pylist(), table["sample"].to_pylist(), strict=True))


def columns_of(table: pa.Table) -> Columns:
    """The columns that shape, advantage and normalize pieces may ask for, padded to [B, T]."""
    mask = ragged.mask_of(ragged.lengths(table["response_tokens"]))
    columns: Columns = {
        "mask": mask,
        "group": np.unique(np.asarray(table["prompt_id"].to_pylist()), return_inverse=True)[1],
        "greedy": table["sample"].to_numpy() == -1,
        "finished": np.asarray([finish == "stop" for finish in table["finish"].to_pylist()]),
        "rewards": on_last_token(table["reward"].to_numpy(), mask),
    }
    for name in ("old_logprobs", "ref_logprobs", "values"):
        if name in table.column_names:
            columns[name] = ragged.pad(table[name], mask.shape[1])
    return columns


def credited(
    columns: Columns, shapers: Sequence[Piece[Any]], advantage: Piece[Credit], normalizer: Piece[Any] | None
) -> tuple[Credit, np.ndarray]:
    """Shape, assign credit, normalize. Returns the credit and the shaped reward of each token [B, T]."""
    for shaper in shapers:
        columns = {**columns, "rewards": shaper(columns)}
    credit = advantage(columns)
    if normalizer is not None:
        credit = Credit(normalizer({**columns, "advantages": credit.advantages}), credit.returns)
    return credit, columns["rewards"]


@stage(writes=TABLE, version=1)
def advantage(inputs: Inputs, settings: Settings, out: Outbox) -> None:
    """Turn rewards into credit per token, in one self-contained training table."""
    table = joined(inputs.rollouts, inputs.labels, inputs.scores)
    columns = columns_of(table)
    credit, shaped = credited(
        columns,
        [SHAPES.take(line) for line in settings.shape],
        ADVANTAGES.take(settings.advantage),
        NORMALIZERS.take(settings.normalize) if settings.normalize is not None else None,
    )
    mask = columns["mask"]
    made: dict[str, Any] = {name: table[name] for name in ("prompt_id", "sample", "prompt_tokens", "response_tokens")}
    made["advantages"] = ragged.unpad(credit.advantages, mask, pa.float32())
    made["returns"] = (
        pa.nulls(table.num_rows, pa.list_(pa.float32()))
        if credit.returns is None
        else ragged.unpad(credit.returns, mask, pa.float32())
    )
    made |= {name: table[name] for name in ("old_logprobs", "ref_logprobs", "values") if name in table.column_names}
    made["reward"] = table["reward"]
    made["shaped_reward"] = pa.array(np.where(mask, shaped, 0).sum(axis=1), pa.float32())
    made["correct"] = table["correct"]
    whole = pa.table(made)
    for index, (start, end) in enumerate(cuts(columns["group"], PART_ROWS)):
        out.write(index, whole.slice(start, end - start))
    _measure(credit, columns, made, out)


def cuts(group: np.ndarray, rows: int) -> list[tuple[int, int]]:
    """Ranges of about `rows` rows that do not cut through a group."""
    ends = np.append(np.flatnonzero(np.diff(group)) + 1, len(group))
    ranges, start = [], 0
    while start < len(group):
        end = int(ends[np.searchsorted(ends, min(start + rows, len(group)))])
        ranges.append((start, end))
        start = end
    return ranges


def _measure(credit: Credit, columns: Columns, made: Mapping[str, Any], out: Outbox) -> None:
    tokens = credit.advantages[columns["mask"]]
    rewards, shaped = np.asarray(made["reward"].to_numpy()), np.asarray(made["shaped_reward"])
    out.metrics.add("reward/kept_mean", float(rewards.mean()), "reward")
    out.metrics.add("reward/shaped_mean", float(shaped.mean()), "reward")
    out.metrics.add("advantage/mean", float(tokens.mean()), "reward")
    out.metrics.add("advantage/std", float(tokens.std()), "reward")
    out.metrics.add("advantage/zero_tokens", float((tokens == 0).mean()), "fraction")
    out.stats["groups"] = len(np.unique(columns["group"]))


if __name__ == "__main__":
    advantage.main()
