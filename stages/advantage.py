"""rollouts, labels (, scores) -> advantages: shaping, credit, normalization, importance; the one join.

Rows are read in blocks of whole groups and never held all at once. Statistics over groups then cannot depend on how the
rows are split into parts; those over the iteration are gathered over the blocks first, and the blocks are a function of
the rows alone. Padding is as wide as the longest kept response of all: sums over tokens are taken in the same order
whichever rows stand beside.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float

from pipeline import ragged
from pipeline.algorithms.advantages import ADVANTAGES, Credit
from pipeline.algorithms.importance import IMPORTANCE
from pipeline.algorithms.moments import Moments
from pipeline.algorithms.normalizers import NORMALIZERS
from pipeline.algorithms.shaping import SHAPES, on_last_token
from pipeline.algorithms.shelf import Line, Piece
from pipeline.artifacts import Artifact, Outbox
from pipeline.contracts import ADVANTAGES as TABLE
from pipeline.contracts import LABELS, ROLLOUTS, SCORES
from pipeline.errors import ContractError
from pipeline.experiment import Experiment
from pipeline.joining import KEY, Scores, blocks, cuts, groups, kept, with_columns
from pipeline.stage import StageSettings, stage

Columns = dict[str, Any]
PART_ROWS = 4096
ELEMENTS = 1 << 20
"""Padded tokens that pieces are handed at once, where a group has no more."""
READ = (*KEY, "prompt_tokens", "response_tokens", "finish")
"""Columns of the rollouts."""
SAMPLER = "sampler_logprobs"
READ_BY_MODELS = ("old_logprobs", "ref_logprobs", "values")
"""Columns of the scores."""


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


def columns_of(table: pa.Table, width: int | None = None) -> Columns:
    """The columns that pieces may ask for, padded to [B, T]; those that some row lacks are left out.

    T is the longest row unless `width` says more.
    """
    mask = ragged.mask_of(ragged.lengths(table["response_tokens"]), width)
    columns: Columns = {
        "mask": mask,
        "group": groups(table),
        "finished": np.asarray(pc.equal(table["finish"], "stop")),
        "rewards": on_last_token(table["reward"].to_numpy(), mask),
    }
    for name in (*READ_BY_MODELS, SAMPLER):
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

    @property
    def gaps(self) -> list[tuple[Piece[Any], str]]:
        """The columns they read that rollouts and labels may lack, and which piece does."""
        several = [piece for piece in (self.advantage, self.importance) if piece is not None]
        return [(piece, name) for piece in several for name in piece.needs if name in GAPS]


GAPS: Mapping[str, str] = {
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


def earned(columns: Columns, pieces: Pieces) -> Credited:
    """Shape the rewards and assign the credit."""
    for shaper in pieces.shapers:
        columns = {**columns, "rewards": shaper(columns)}
    return Credited(pieces.advantage(columns), columns["rewards"], None)


def credited(columns: Columns, pieces: Pieces, gathered: Any = None) -> Credited:
    """Shape, assign credit, normalize, weigh. Returns are not weighed: a critic learns what was, not what counts.

    `gathered` is what the normalizer must know of all rows where these are some of them.
    """
    made = earned(columns, pieces)
    credit, weights = made.credit, None
    if pieces.normalizer is not None:
        scaled = pieces.normalizer({**columns, "advantages": credit.advantages}, gathered)
        credit = replace(credit, advantages=scaled)
    if pieces.importance is not None:
        weights = pieces.importance(columns)
        credit = replace(credit, advantages=np.where(columns["mask"], credit.advantages * weights, 0))
    return Credited(credit, made.shaped, weights)


@dataclass(frozen=True)
class Walk:
    """The kept rows of an iteration with what models read, to be gone through more than once."""

    inputs: Inputs
    width: int
    """Tokens of the longest response."""
    in_order: bool
    """Whether the scores are in the order of the kept rows."""

    @classmethod
    def over(cls, inputs: Inputs, pieces: Pieces) -> "Walk":
        """Look at keys and lengths. Raises `ContractError` where keys do not match, nothing is kept or data is missing.

        What is missing is what a piece reads, rollouts and labels may lack, and some rows do.
        """
        width, found = 0, {name: Gap(piece) for piece, name in pieces.gaps}
        names = [*KEY, "response_tokens", *([SAMPLER] if SAMPLER in found else [])]
        scores = None if inputs.scores is None else Scores(inputs.scores, ())
        for block in blocks(kept(inputs.rollouts, inputs.labels, names), PART_ROWS):
            width = max(width, int(ragged.lengths(block["response_tokens"]).max()))
            for name, gap in found.items():
                gap.look(block, name)
            if scores is not None and scores.take(block.select(KEY)) is None:
                scores = None
        if not width:
            raise ContractError(
                "no rows are kept: there is nothing to learn from", str(inputs.labels[0].path),
                "`rlhf show` it for the reasons",
            )  # fmt: skip
        for name, gap in found.items():
            gap.refuse(name)
        return cls(inputs, width, (inputs.scores is None) == (scores is None))

    def reads(self, name: str) -> bool:
        """Whether a model has read this column."""
        return self.inputs.scores is not None and name in pq.read_schema(self.inputs.scores.part_paths()[0]).names

    def blocks(self, of_rollouts: Sequence[str], of_scores: Sequence[str]) -> Iterator[pa.Table]:
        """Blocks of whole groups with these columns; those of the scores only where the scores have them."""
        rows = blocks(kept(self.inputs.rollouts, self.inputs.labels, of_rollouts), PART_ROWS)
        if self.inputs.scores is None:
            yield from rows
            return
        columns = [name for name in of_scores if self.reads(name)]
        order = None if self.in_order else kept(self.inputs.rollouts, self.inputs.labels, KEY)
        scores = Scores(self.inputs.scores, columns, None if order is None else (part.select(KEY) for part in order))
        for block in rows:
            read = scores.take(block.select(KEY))
            if read is None:
                raise ContractError("not the scores that were looked at just now", str(self.inputs.scores.path))
            yield with_columns(block, {name: read[name] for name in columns})

    def portions(self, block: pa.Table) -> Iterator[tuple[pa.Table, Columns]]:
        """A block in portions of whole groups that pieces take at once, with their columns."""
        for start, end in cuts(groups(block), max(1, ELEMENTS // self.width)):
            rows = block.slice(start, end - start)
            yield rows, columns_of(rows, self.width)

    def gathered(self, pieces: Pieces) -> Any:
        """What the normalizer must know of all rows; None where it needs nothing of that kind."""
        if pieces.normalizer is None or pieces.normalizer.card.gather is None:
            return None
        names = [*KEY, "response_tokens", "finish"]
        total = None
        for block in self.blocks(names, [name for name in READ_BY_MODELS if pieces.read(name)]):
            for _, columns in self.portions(block):
                credit = earned(columns, pieces).credit
                lot = pieces.normalizer.gather({**columns, "advantages": credit.advantages})
                total = lot if total is None else total + lot
        return total


@dataclass
class Gap:
    """Rows without a column that a piece reads."""

    piece: Piece[Any]
    rows: int = 0
    first: list[str] = field(default_factory=list)
    """Prompts of the first five."""

    def look(self, table: pa.Table, name: str) -> None:
        """Count the rows of a table."""
        if table[name].null_count:
            lacking = table["prompt_id"].filter(table[name].is_null())
            self.rows += len(lacking)
            self.first = [*self.first, *lacking.slice(0, 5).to_pylist()][:5]

    def refuse(self, name: str) -> None:
        """Raise `ContractError` where there are such rows."""
        if self.rows:
            raise ContractError(
                f"{self.piece.card.shelf} {self.piece.name!r} needs {name}, and {self.rows} kept rows have none",
                f"prompts {', '.join(dict.fromkeys(self.first))}",
                GAPS[name],
            )


@stage(writes=TABLE, version=3)
def advantage(inputs: Inputs, settings: Settings, out: Outbox) -> None:
    """Turn rewards into credit per token, in one self-contained training table."""
    pieces = Pieces.of(settings)
    walk = Walk.over(inputs, pieces)
    gathered = walk.gathered(pieces)
    of_rollouts = [*READ, *([SAMPLER] if pieces.read(SAMPLER) or not walk.reads("old_logprobs") else [])]
    tally = Tally()
    for index, block in enumerate(walk.blocks(of_rollouts, READ_BY_MODELS)):
        made = []
        for rows, columns in walk.portions(block):
            result = credited(columns, pieces, gathered)
            made.append(credit_of(rows, columns, result))
            tally.add(made[-1], columns, result, pieces)
        out.write(index, pa.concat_tables(made))
    if len(inputs.rollouts) > 1:  # what holds in each round need not hold in all
        TABLE.check_keys(pa.concat_tables(out.parts(KEY)), str(out.target))
    for name, (value, unit) in tally.numbers().items():
        out.metrics.add(name, value, unit)
    out.stats["groups"] = tally.groups


def credit_of(rows: pa.Table, columns: Columns, result: Credited) -> pa.Table:
    """Rows of the advantages contract."""
    credit, mask = result.credit, columns["mask"]
    made: dict[str, Any] = {name: rows[name] for name in ("prompt_id", "sample", "prompt_tokens", "response_tokens")}
    made["advantages"] = ragged.unpad(credit.advantages, mask, pa.float32())
    made["returns"] = (
        pa.nulls(rows.num_rows, pa.list_(pa.float32()))
        if credit.returns is None
        else ragged.unpad(credit.returns, mask, pa.float32())
    )
    made |= {name: rows[name] for name in READ_BY_MODELS if name in rows.column_names}
    if "old_logprobs" not in made:
        made[SAMPLER] = rows[SAMPLER]  # `update` finds the others itself, and says how far they are apart
    made["reward"] = rows["reward"]
    made["shaped_reward"] = pa.array(np.where(mask, result.shaped, 0).sum(axis=1), pa.float32())
    made["correct"] = rows["correct"]
    made["finished"] = pa.array(columns["finished"])
    return pa.table(made)


Metrics = dict[str, tuple[float, str]]


@dataclass
class Tally:
    """What the rows add up to."""

    moments: dict[str, Moments] = field(default_factory=dict)
    """Of rewards over rows, of everything else over response tokens."""
    groups: int = 0
    silent: int = 0
    """Groups in which no token has any credit."""
    zeros: int = 0
    capped: int = 0
    lowest: float = np.inf
    highest: float = -np.inf
    """Of the returns."""

    def add(self, made: pa.Table, columns: Columns, result: Credited, pieces: Pieces) -> None:
        """Count some rows; their groups are whole."""
        mask, group, credit = columns["mask"], columns["group"], result.credit
        for name in ("reward", "shaped_reward"):
            self._gather(name, made[name].to_numpy())
        tokens = credit.advantages[mask]
        self._gather("advantage", tokens)
        self.zeros += int((tokens == 0).sum())
        signal = np.bincount(group, weights=((credit.advantages != 0) & mask).any(axis=1))
        self.groups += len(signal)
        self.silent += int((signal == 0).sum())
        if credit.returns is not None:
            returns = credit.returns[mask].astype(np.float64)
            self._gather("returns", returns)
            self.lowest, self.highest = min(self.lowest, returns.min()), max(self.highest, returns.max())
            if "values" in columns:
                self._gather("unexplained", returns - columns["values"][mask].astype(np.float64))
        if result.weights is not None and pieces.importance is not None:
            weights = result.weights[mask].astype(np.float64)
            self._gather("importance", weights)
            self.capped += int((weights >= np.float32(pieces.importance.settings.get("cap", np.inf))).sum())

    def _gather(self, name: str, values: Float[np.ndarray, " N"]) -> None:
        self.moments[name] = self.moments.get(name, Moments()) + Moments.of(values)

    def numbers(self) -> Metrics:
        """Metric -> value and unit, over all response tokens where nothing else is said."""
        of = self.moments
        numbers: Metrics = {
            "reward/kept_mean": (of["reward"].mean, "reward"),
            "reward/shaped_mean": (of["shaped_reward"].mean, "reward"),
            "reward/zero_signal_groups": (self.silent / self.groups, "fraction"),
            "advantage/mean": (of["advantage"].mean, "reward"),
            "advantage/std": (of["advantage"].std, "reward"),
            "advantage/zero_tokens": (self.zeros / of["advantage"].count, "fraction"),
        }
        if "returns" in of:
            numbers["returns/mean"] = (of["returns"].mean, "reward")
            if "unexplained" in of and of["returns"].squares > 0:
                share = of["unexplained"].variance() / of["returns"].variance()
                # As `explained_variance`: where all are equal there is nothing to explain, whatever rounding says.
                numbers["value/explained_variance"] = (1 - share if self.highest > self.lowest else 0.0, "")
        if "importance" in of:
            numbers["importance/mean"] = (of["importance"].mean, "1")
            numbers["importance/capped"] = (self.capped / of["importance"].count, "fraction")
        return numbers


if __name__ == "__main__":
    advantage.main()
