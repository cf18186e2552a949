"""Which responses the page holds, and how they were chosen: so many bytes, the same ones every time.

    of every iteration    best, worst, random, longest, cut at the limit, dropped; each kind takes its next one in turn
    of evaluations        the same prompts in all of them: half those whose answers changed most, half at random
    of the loop           prompts that several iterations asked

All responses are looked at for the choice, as columns; only what is chosen is read token by token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from pipeline.catalog import Entry
from pipeline.contracts import CONTRACTS
from pipeline.inspecting.subject import Subject
from pipeline.seeds import derive

EACH = 16
"""Of every kind and iteration, at most."""
PROMPTS = 48
"""Held-out prompts that are followed through the evaluations, at most; as many of the loop."""
REPEATS = 2
"""Responses to each of them."""
HEAD, TAIL = 900, 300
"""Tokens that are kept of a longer response."""

PLACE = ["phase", "iteration", "round"]
KEY = [*PLACE, "prompt_id", "sample"]
LABELS = ["reward", "gold", "correct", "verdict", "extracted", "target", "vote_share", "keep", "dropped"]


def responses(subject: Subject) -> pl.DataFrame:
    """Every response of loop and evaluations: its key, length, finish and label, but neither text nor tokens."""
    length = pl.col("response_tokens").list.len().alias("length")
    sampled = _rows(subject, "rollouts", ["prompt_id", "sample", "finish", length])
    labelled = _rows(subject, "labels", ["prompt_id", "sample", *LABELS])
    found = sampled.join(labelled, on=KEY, how="left", maintain_order="left")
    return found.sort(KEY).with_columns(base=pl.col("prompt_id").str.split("#").list.first())


def _rows(subject: Subject, kind: str, columns: Sequence[str | pl.Expr]) -> pl.DataFrame:
    return scan(subject, kind, columns).collect(engine="streaming")


def scan(subject: Subject, kind: str, columns: Sequence[str | pl.Expr]) -> pl.LazyFrame:
    """Columns of all rollouts or labels that a run goes by, beside `PLACE`."""
    entries = [one for phase in ("loop", "evaluation") for one in subject.of_kind(kind, phase)]
    places = pl.LazyFrame(
        [(str(path), one.phase, one.iteration, round_of(one)) for one in entries for path in one.artifact.part_paths()],
        schema={"path": pl.String, "phase": pl.String, "iteration": pl.Int32, "round": pl.String}, orient="row",
    )  # fmt: skip
    if not entries:
        none = pl.DataFrame(pl.from_arrow(CONTRACTS[kind].schema().empty_table()))
        return places.drop("path").join(none.lazy().select(columns), how="cross")
    files = [str(path) for one in entries for path in one.artifact.part_paths()]
    rows = pl.scan_parquet(files, include_file_paths="path", glob=False).select("path", *columns)
    return rows.join(places, on="path").drop("path")


def round_of(one: Entry) -> str:
    """Which round of sampling an artifact belongs to; evaluations have none."""
    return one.stage.partition("-")[2]


@dataclass(frozen=True)
class Choice:
    """Responses in the order in which they are wanted, and of how many they were chosen."""

    rows: pl.DataFrame
    """As `responses`, with `why`: the kinds for which each was taken."""
    of: dict[str, int]
    """Phase -> all its responses."""


def choose(subject: Subject, found: pl.DataFrame, budget: int) -> Choice:
    """Within `budget` bytes as far as can be told by then; the same rows give the same choice."""
    seed = derive(int(subject.experiment.get("seed", 0)), "page")
    parts = []
    for phase in ("evaluation", "loop"):  # each for itself: later iterations leave the choice of earlier ones alone
        rows = found.filter(pl.col("phase") == phase)
        drawn = np.random.default_rng(derive(seed, phase)).random(rows.height)
        parts.append(rows.with_columns(drawn=drawn, bytes=_estimate()))
    evaluation, loop = parts
    wanted = [(_followed(evaluation), 0.25), (_recurring(loop), 0.4), (_kinds(loop), 1.0)]
    merged = found.clear().select(KEY).with_columns(bytes=pl.lit(0, pl.Int64), why=pl.lit([""]))
    for rows, share in wanted:
        merged = _merged(pl.concat([merged, rows.with_columns(why=pl.concat_list("why"))]))
        merged = merged.filter(pl.col("bytes").cum_sum() <= budget * share)
    rows = merged.drop("bytes").join(found, on=KEY, how="left", maintain_order="left")
    return Choice(rows, dict(found.group_by("phase", maintain_order=True).len().iter_rows()))


def _merged(rows: pl.DataFrame) -> pl.DataFrame:
    """Each response once, in the order of its first row, with every reason for which it was wanted."""
    each = rows.explode("why").group_by(KEY, maintain_order=True)
    return each.agg(pl.col("bytes").first(), pl.col("why").unique(maintain_order=True))


def _estimate() -> pl.Expr:
    """Bytes that a response will take, roughly."""
    return 200 + 40 * pl.col("length").cast(pl.Int64).clip(upper_bound=HEAD + TAIL)


def _kinds(rows: pl.DataFrame) -> pl.DataFrame:
    """Of every iteration the first of each kind, then the second of each, and so on; of a prompt only one per kind."""
    best = pl.col("reward").rank("dense", descending=True)
    kinds = {
        "best": (pl.col("reward").is_not_null(), best), "worst": (pl.col("reward").is_not_null(), -best.cast(pl.Int64)),
        "random": (pl.lit(True), pl.lit(0)), "longest": (pl.lit(True), -pl.col("length").cast(pl.Int64)),
        "truncated": (pl.col("finish") == "length", pl.lit(0)), "dropped": (pl.col("dropped").is_not_null(), pl.lit(0)),
    }  # fmt: skip
    taken = []
    for place, (why, (which, by)) in enumerate(kinds.items()):
        ordered = rows.filter(which).with_columns(by=by.cast(pl.Int64)).sort("iteration", "by", "drawn", *KEY)
        each = ordered.unique(["iteration", "prompt_id"], keep="first", maintain_order=True)
        ranked = each.with_columns(turn=pl.int_range(pl.len()).over("iteration"), kind=pl.lit(place), why=pl.lit(why))
        taken.append(ranked.filter(pl.col("turn") < EACH).select(*KEY, "bytes", "why", "turn", "kind"))
    return pl.concat(taken).sort("turn", "kind", "iteration", maintain_order=True).drop("turn", "kind")


def _followed(rows: pl.DataFrame) -> pl.DataFrame:
    """The same prompts of every evaluation: by turns one whose verdicts changed much and one at random."""
    right = pl.col("gold").cast(pl.Float64).fill_null(pl.col("reward").cast(pl.Float64)).mean()
    change = (pl.col("right").last() - pl.col("right").first()).abs()
    by_prompt = (
        rows.group_by("base", "iteration").agg(right.alias("right"), pl.col("drawn").min())
        .sort("base", "iteration").group_by("base", maintain_order=True)
        .agg(pl.col("drawn").min(), evaluations=pl.len(), change=change)
        .sort("evaluations", "change", "drawn", descending=[True, True, False], nulls_last=True)
        .with_row_index("changed").sort("evaluations", "drawn", descending=[True, False]).with_row_index("chance")
        .with_columns(order=pl.min_horizontal(2 * pl.col("changed"), 2 * pl.col("chance") + 1))
        .sort("order").head(PROMPTS).select("base", "order")
    )  # fmt: skip
    each = rows.join(by_prompt, on="base").sort("order", *KEY)
    first = each.with_columns(turn=pl.int_range(pl.len()).over("base", "iteration")).filter(pl.col("turn") < REPEATS)
    return first.select(*KEY, "bytes", why=pl.lit("evaluation prompt"))


def _recurring(rows: pl.DataFrame) -> pl.DataFrame:
    """Prompts that several iterations asked: one response of each iteration."""
    asked = rows.group_by("base").agg(pl.col("iteration").n_unique().alias("times"), pl.col("drawn").min())
    often = asked.filter(pl.col("times") > 1).sort("times", "drawn", descending=[True, False]).head(PROMPTS)
    ordered = often.with_row_index("order").select("base", "order")
    each = rows.join(ordered, on="base").sort("order", "iteration", "drawn")
    first = each.unique(["base", "iteration"], keep="first", maintain_order=True)
    return first.select(*KEY, "bytes", why=pl.lit("recurring prompt"))


def kinds() -> Iterator[str]:
    """What the page says of the choice, a sentence each."""
    yield (
        f"Of every iteration up to {EACH} each of: the best and the worst by reward, random ones, the longest, those "
        "cut at the limit, those dropped; one to a prompt in each kind, drawn among equals by the run's seed."
    )
    yield (
        f"Of evaluations up to {PROMPTS} prompts, the same in each: by turns one whose verdicts changed much and one "
        f"at random, {REPEATS} responses each. Of prompts that several iterations asked, one of each iteration."
    )
