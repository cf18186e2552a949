"""Numbers over the iterations of a run, from what its stages measured: one value each iteration, kind and name.

What several artifacts of an iteration measured (the rounds of dynamic sampling) becomes one number: counts and seconds
add up, greatest values stay the greatest, everything else is a mean by rows. What was measured at every optimizer step
is a mean over the steps.
"""

from collections.abc import Sequence

import polars as pl

from pipeline.artifacts import METRICS_FILE
from pipeline.catalog import Entry

ADD_UP = ("rows", "responses", "groups", "prompts", "s")
"""Units of numbers that add up over the artifacts of an iteration."""

PLACE = {
    "run": pl.String, "phase": pl.String, "iteration": pl.Int32, "stage": pl.String, "kind": pl.String,
}  # fmt: skip
"""Which artifact measured."""


def by_step(entries: Sequence[Entry]) -> pl.DataFrame:
    """Everything that was measured: the columns of `PLACE`, rows (of the artifact), step, name, unit, value.

    Redone artifacts are left out: the run does not go by them.
    """
    files = [
        (str(path), one.run, one.phase, one.iteration, one.stage, one.kind, float(one.artifact.stats.get("rows", 1.0)))
        for one in entries
        if one.variant is None and (path := one.artifact.path / METRICS_FILE).exists()
    ]
    schema = {"path": pl.String, **PLACE, "rows": pl.Float64}
    places = pl.DataFrame(files, schema=schema, orient="row")
    if not files:
        return places.drop("path").with_columns(
            pl.lit(0, pl.Int64).alias("step"), pl.lit("").alias("name"), pl.lit("").alias("unit"), value=pl.lit(0.0)
        )
    measured = pl.scan_parquet([file[0] for file in files], include_file_paths="path", glob=False)
    numbers = measured.select("path", "step", "name", "unit", "value").collect()
    return places.join(numbers, on="path", how="inner", maintain_order="left_right").drop("path")


def by_artifact(entries: Sequence[Entry]) -> pl.DataFrame:
    """As `by_step`, with one row for each artifact and name: the mean over its optimizer steps.

    `steps` is how many those were; 0 for a number about the stage as a whole.
    """
    keys = [*PLACE, "rows", "name", "unit"]
    return (
        by_step(entries)
        .group_by(keys, maintain_order=True)
        .agg(pl.col("step").max().alias("steps"), pl.col("value").mean())
    )


def by_iteration(entries: Sequence[Entry]) -> pl.DataFrame:
    """Columns run, phase, iteration, kind, name, unit, value: one row each, sorted; foundations have iteration null."""
    value = (
        pl.when(pl.col("unit").first().is_in(ADD_UP))
        .then(pl.col("value").sum())
        .when(pl.col("name").first().str.contains("(^|[/_])max$"))
        .then(pl.col("value").max())
        .otherwise((pl.col("value") * pl.col("rows")).sum() / pl.col("rows").sum())
    )
    keys = ["run", "phase", "iteration", "kind", "name", "unit"]
    return by_artifact(entries).group_by(keys).agg(value.alias("value")).sort(keys)
