"""rollouts, labels (, scores) -> advantages: shaping, credit, normalization, importance; the one join.

All rows of the iteration are handed to the pieces at once: statistics over groups or over the batch then cannot
depend on how the rows are split into parts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float

from pipeline import ragged
from pipeline.algorithms.advantages import ADVANTAGES, Credit
from pipeline.algorithms.importance import IMPORTANCE
from pipeline.algorithms.normalizers import NORMALIZERS
from pipeline.algorithms.shaping import SHAPES, on_last_token
from pipeline.algorithms.shelf import FROM_MODELS, Line, Piece
from pipeline.artifacts import Artifact, Outbox
from pipeline.contracts import ADVANTAGES as TABLE
from pipeline.contracts import LABELS, ROLLOUTS, SCORES
from pipeline.errors import ContractError
from pipeline.experiment import Experiment
from pipeline.stage import StageSettings, stage
from pipeline.training.explained import explained_variance

Columns = dict[str, Any]
PART_ROWS = 4096
KEY = ["prompt_id", "sample"]
READ = (*KEY, "prompt_tokens", "response_tokens", "finish")
"""Columns of the rollouts."""
GREEDY = -1
"""The `sample` of the greedy response."""


class Settings(StageSettings):
    """The recipe's lines between reward and update."""

    shape: tuple[Line, ...] = ()
    """Recipe lines of the shape shelf, applied in this order."""
    advantage: Line
    """A recipe line of the advantage shelf."""
    normalize: Line | None = None
    """A recipe line of the normalize shelf."""
    importance: Line | None = None
    """A recipe line of the importance shelf."""

    @classmethod
    def slice(cls, experiment: Experiment, changes: Mapping[str, Any]) -> dict[str, Any]:
        """`recipe.shape`, `recipe.advantage`, `recipe.normalize`, `recipe.importance`."""
        recipe = experiment.recipe
        return {
            "shape": recipe.shape, "advantage": recipe.advantage, "normalize": recipe.normalize,
            "importance": recipe.importance,
        }  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """The rounds of one iteration, their labels in the same order, and what models read."""

    rollouts: Annotated[tuple[Artifact, ...], ROLLOUTS]
    labels: Annotated[tuple[Artifact, ...], LABELS]
    scores: Annotated[Artifact | None, SCORES] = None


def joined(
    rollouts: Sequence[Artifact], labels: Sequence[Artifact], scores: Artifact | None, *, sampler: bool = True
) -> pa.Table:
    """One table of the kept rows: rollouts with their labels and, where there are any, their scores.

    The `sampler`'s log-probabilities are as large as all else and may be left out. Columns that training does not read
    are not read here.

    Column `greedy` is the reward of the greedy response to the same prompt, kept or not; null without one.
    Raises `ContractError` when keys do not match.
    """
    if len(rollouts) != len(labels):
        raise ContractError(f"{len(rollouts)} rollouts but {len(labels)} labels", do="name both once per round")
    names = [*READ, *(["sampler_logprobs"] if sampler else [])]
    rounds = [_with_labels(a, b, names) for a, b in zip(rollouts, labels, strict=True)]
    table = pa.concat_tables(rounds)
    if not table.num_rows:
        raise ContractError(
            "no rows are kept: there is nothing to learn from", str(labels[0].path), "`rlhf show` it for the reasons"
        )
    return table if scores is None else _with_scores(table, scores)


def _with_labels(rollouts: Artifact, labels: Artifact, names: list[str]) -> pa.Table:
    responses, marks = rollouts.table(names), labels.table([*KEY, "reward", "correct", "keep"])
    if responses.select(KEY) != marks.select(KEY):
        raise ContractError("the labels are of other rollouts", f"{labels.path} and {rollouts.path}")
    for name in ("reward", "correct", "keep"):
        responses = responses.append_column(name, marks[name])
    responses = responses.append_column("greedy", _greedy_rewards(marks))
    return responses.filter(marks["keep"]).replace_schema_metadata(None)


def _greedy_rewards(marks: pa.Table) -> pa.Array:
    """The reward of the greedy response to each row's prompt; null where there is none."""
    rows = marks.filter(pc.equal(marks["sample"], GREEDY))
    if not rows.num_rows:
        return pa.nulls(marks.num_rows, pa.float32())
    greedy = dict(zip(rows["prompt_id"].to_pylist(), rows["reward"].to_pylist(), strict=True))
    return pa.array([greedy.get(prompt_id) for prompt_id in marks["prompt_id"].to_pylist()], pa.float32())


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
    """The columns that pieces may ask for, padded to [B, T]; those that some row lacks are left out."""
    mask = ragged.mask_of(ragged.lengths(table["response_tokens"]))
    columns: Columns = {
        "mask": mask,
        "group": np.asarray(table["prompt_id"].combine_chunks().dictionary_encode().indices, dtype=np.int64),
        "finished": np.asarray(pc.equal(table["finish"], "stop")),
        "rewards": on_last_token(table["reward"].to_numpy(), mask),
    }
    for name in ("old_logprobs", "ref_logprobs", "values", "sampler_logprobs"):
        if name in table.column_names and table[name].null_count == 0:
            columns[name] = ragged.pad(table[name], mask.shape[1])
    if table["greedy"].null_count == 0:
        columns["greedy"] = table["greedy"].to_numpy()
    return columns


@dataclass(frozen=True)
class Pieces:
    """A recipe between reward and update."""

    shapers: Sequence[Piece[Any]]
    advantage: Piece[Credit]
    normalizer: Piece[Any] | None = None
    importance: Piece[Any] | None = None

    @classmethod
    def of(cls, settings: Settings) -> "Pieces":
        """Take the pieces from their shelves. Raises `RecipeError`."""
        return cls(
            [SHAPES.take(line) for line in settings.shape],
            ADVANTAGES.take(settings.advantage),
            NORMALIZERS.take(settings.normalize) if settings.normalize is not None else None,
            IMPORTANCE.take(settings.importance) if settings.importance is not None else None,
        )

    def read(self, name: str) -> bool:
        """Whether any of them reads this column."""
        every = (*self.shapers, self.advantage, self.normalizer, self.importance)
        return any(name in piece.needs for piece in every if piece is not None)

    def refuse_gaps(self, table: pa.Table) -> None:
        """Raise `ContractError` where a piece reads what rollouts and labels may lack, and some rows do."""
        for piece in (self.advantage, self.importance):
            if piece is None:
                continue
            for name in piece.needs:
                if name in GAPS and table[name].null_count:
                    rows = table.filter(table[name].is_null())
                    first = ", ".join(dict.fromkeys(rows["prompt_id"].to_pylist()[:5]))
                    raise ContractError(
                        f"{piece.card.shelf} {piece.name!r} needs {name}, and {rows.num_rows} kept rows have none",
                        f"prompts {first}",
                        GAPS[name],
                    )


GAPS = {
    "greedy": "sample with rollout.greedy = true, so that every group has its greedy response",
    "sampler_logprobs": "sample with an engine that tells its log-probabilities, or take `importance` out",
}
"""Columns that rollouts and labels may be without, and what to do then."""


@dataclass(frozen=True)
class Credited:
    """What the pieces made of the rewards."""

    credit: Credit
    shaped: Float[np.ndarray, "B T"]
    """The reward of each token after shaping."""
    weights: Float[np.ndarray, "B T"] | None
    """What the advantages were multiplied by against the sampler's mismatch; None where nothing was."""


def credited(columns: Columns, pieces: Pieces) -> Credited:
    """Shape, assign credit, normalize, weigh. Returns are not weighed: a critic learns what was, not what counts."""
    for shaper in pieces.shapers:
        columns = {**columns, "rewards": shaper(columns)}
    credit = pieces.advantage(columns)
    if pieces.normalizer is not None:
        credit = replace(credit, advantages=pieces.normalizer({**columns, "advantages": credit.advantages}))
    weights = None
    if pieces.importance is not None:
        weights = pieces.importance(columns)
        credit = replace(credit, advantages=np.where(columns["mask"], credit.advantages * weights, 0))
    return Credited(credit, columns["rewards"], weights)


@stage(writes=TABLE, version=2)
def advantage(inputs: Inputs, settings: Settings, out: Outbox) -> None:
    """Turn rewards into credit per token, in one self-contained training table."""
    pieces = Pieces.of(settings)
    table = joined(inputs.rollouts, inputs.labels, inputs.scores, sampler=pieces.read("sampler_logprobs"))
    pieces.refuse_gaps(table)
    columns = columns_of(table)
    result = credited(columns, pieces)
    credit = result.credit
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
    made["shaped_reward"] = pa.array(np.where(mask, result.shaped, 0).sum(axis=1), pa.float32())
    made["correct"] = table["correct"]
    made["finished"] = pa.array(columns["finished"])
    whole = pa.table(made)
    for index, (start, end) in enumerate(cuts(columns["group"], PART_ROWS)):
        out.write(index, whole.slice(start, end - start))
    rewards = {name: np.asarray(made[name].to_numpy(), np.float64) for name in ("reward", "shaped_reward")}
    for name, (value, unit) in measured(result, columns, pieces, rewards).items():
        out.metrics.add(name, value, unit)
    out.stats["groups"] = len(np.unique(columns["group"]))


def cuts(group: np.ndarray, rows: int) -> list[tuple[int, int]]:
    """Ranges of about `rows` rows that do not cut through a group."""
    ends = np.append(np.flatnonzero(np.diff(group)) + 1, len(group))
    ranges, start = [], 0
    while start < len(group):
        end = int(ends[np.searchsorted(ends, min(start + rows, len(group)))])
        ranges.append((start, end))
        start = end
    return ranges


Metrics = dict[str, tuple[float, str]]


def measured(
    result: Credited, columns: Columns, pieces: Pieces, rewards: Mapping[str, Float[np.ndarray, " B"]]
) -> Metrics:
    """Metric -> value and unit, over all response tokens where nothing else is said."""
    mask, group = columns["mask"], columns["group"]
    tokens = result.credit.advantages[mask].astype(np.float64)
    signal = np.bincount(group, weights=((result.credit.advantages != 0) & mask).any(axis=1))
    numbers: Metrics = {
        "reward/kept_mean": (float(rewards["reward"].mean()), "reward"),
        "reward/shaped_mean": (float(rewards["shaped_reward"].mean()), "reward"),
        "reward/zero_signal_groups": (float((signal == 0).mean()), "fraction"),
        "advantage/mean": (float(tokens.mean()), "reward"),
        "advantage/std": (float(tokens.std()), "reward"),
        "advantage/zero_tokens": (float((tokens == 0).mean()), "fraction"),
    }
    if result.credit.returns is not None:
        returns = result.credit.returns[mask].astype(np.float64)
        numbers["returns/mean"] = (float(returns.mean()), "reward")
        if "values" in columns and returns.var() > 0:
            explained = explained_variance(columns["values"][mask].astype(np.float64), returns)
            numbers["value/explained_variance"] = (explained, "")
    if result.weights is not None and pieces.importance is not None:
        weights = result.weights[mask].astype(np.float64)
        cap = np.float32(pieces.importance.settings.get("cap", np.inf))
        numbers["importance/mean"] = (float(weights.mean()), "1")
        numbers["importance/capped"] = (float((weights >= cap).mean()), "fraction")
    return numbers


if __name__ == "__main__":
    advantage.main()
