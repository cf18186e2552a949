"""The papers' claims as files: arms to run, what to measure of them, and what must hold for a claim to be reproduced.

    flows/experiments/claims/NAME.toml              the claim, its hypothesis (written before it was run), arms, checks
    flows/experiments/claims/worlds/NAME.toml       the experiments that arms change
    flows/experiments/claims/results/NAME.parquet   every number that every run measured

A check says that one number is above another. Over seeds s:

    d_s = a_s - b_s - least        paired: both arms of a seed start from the same policy and ask the same prompts
    mean(d) +- t(0.975, n-1) sd(d) / sqrt(n)

The interval above 0: reproduced. Below 0: not reproduced. Around 0, or fewer than `ENOUGH` seeds: inconclusive.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Literal, Self

import polars as pl
from pydantic import AfterValidator, Field, ValidationError, model_validator

from pipeline.errors import ArtifactError, ExperimentError
from pipeline.settings import Settings, explain, plain_name, read_toml

CLAIMS = Path(__file__).parent / "experiments" / "claims"
"""Those of this project."""
ENOUGH = 3
"""Seeds without which nothing is said."""

Phase = Literal["foundations", "loop", "evaluation"]
Verdict = Literal["reproduced", "not reproduced", "inconclusive", "not run"]

SCHEMA = {
    "arm": pl.Categorical, "seed": pl.Int32, "phase": pl.Categorical, "iteration": pl.Int32, "kind": pl.Categorical,
    "name": pl.Categorical, "unit": pl.Categorical, "value": pl.Float64, "experiment": pl.Categorical,
    "commit": pl.Categorical,
}  # fmt: skip
"""Of the stored results: a number of an iteration of a run; digest of the run's resolved experiment, commit."""


class Arm(Settings):
    """One way to run the experiment."""

    doc: str
    """What it is, in a few words."""
    recipe: str
    """Its recipe."""
    experiment: str | None = None
    """Another world than the claim's."""
    changes: tuple[str, ...] = ()
    """As `--set` takes them."""


class Source(Settings):
    """Which number of a run."""

    phase: Phase
    """Where in the run it was measured."""
    kind: str
    """Kind of artifact that measured it."""
    name: str
    """Of the metric: `rlhf metrics` lists them."""

    def among(self, numbers: pl.DataFrame) -> pl.DataFrame:
        """The rows of this number."""
        return numbers.filter(pl.col("phase") == self.phase, pl.col("kind") == self.kind, pl.col("name") == self.name)


Take = Literal["first", "last", "mean", "greatest", "least", "change", "mean_square"]


class Measure(Source):
    """One number of a whole run."""

    doc: str
    """What it is, in a few words, with its unit."""
    take: Take = "last"
    """Which of the run's iterations, or what over them; `change` is last less first."""
    since: int = 0
    """First iteration that counts."""
    until: int | None = None
    """Last iteration that counts; all when absent."""

    def of(self, numbers: pl.DataFrame) -> float | None:
        """The number of one run; None where nothing was measured."""
        last = math.inf if self.until is None else self.until
        there = (
            self.among(numbers)
            .filter(pl.col("iteration").fill_null(0).is_between(self.since, last))
            .sort("iteration")["value"]
            .to_list()
        )
        if not there:
            return None
        values: dict[Take, float] = {
            "first": there[0], "last": there[-1], "mean": fmean(there), "greatest": max(there), "least": min(there),
            "change": there[-1] - there[0], "mean_square": fmean(value * value for value in there),
        }  # fmt: skip
        return values[self.take]


class Check(Settings):
    """Something that must hold: `a` is above `b`.

    Both are `ARM.MEASURE` or a ratio, `ARM.MEASURE / ARM.MEASURE`; one of them may be a number.
    """

    says: str
    """In words."""
    a: str | float
    """The greater one."""
    b: str | float
    """The lesser one."""
    least: float = 0.0
    """By how much at least."""


class Picture(Source):
    """A number by iteration, a line for each arm."""

    title: str
    """Above the picture, with the unit."""
    arms: tuple[str, ...] = ()
    """Which; all when absent."""


class Claim(Settings):
    """A paper's claim, made small."""

    name: Annotated[str, AfterValidator(plain_name)]
    """Of its file."""
    folder: Path
    """Where its file lies, with worlds and results beside it."""
    title: str
    """In a line."""
    source: str
    """Paper and place."""
    paper: str
    """What the paper found, with its numbers."""
    hypothesis: str
    """What was expected here; written before it was run."""
    written: str
    """The day on which it was written."""
    experiment: str
    """The world: a file in `claims/worlds`."""
    remark: str = ""
    """What is to be said of the outcome; written after it."""
    arms: dict[Annotated[str, AfterValidator(plain_name)], Arm] = Field(min_length=1)
    """Name -> a way to run it."""
    measures: dict[str, Measure] = Field(min_length=1)
    """Name -> a number of each run."""
    checks: tuple[Check, ...] = Field(min_length=1)
    """What must hold."""
    pictures: tuple[Picture, ...] = ()
    """What is drawn."""

    @model_validator(mode="after")
    def _names_what_is_there(self) -> Self:
        for check in self.checks:
            if not isinstance(check.a, str) and not isinstance(check.b, str):
                raise ValueError(f"check {check.says!r} compares two numbers: one of them must be ARM.MEASURE")
            for side in (part for whole in (check.a, check.b) if isinstance(whole, str) for part in _parts(whole)):
                arm, _, measure = side.partition(".")
                if arm not in self.arms or measure not in self.measures:
                    raise ValueError(f"check {side!r}: write ARM.MEASURE, with names of this file")
        for picture in self.pictures:
            if unknown := set(picture.arms) - set(self.arms):
                raise ValueError(f"picture {picture.title!r}: no arm is called {', '.join(sorted(unknown))}")
        return self

    @classmethod
    def load(cls, name: str, folder: Path = CLAIMS) -> Self:
        """Read the file of a claim. Raises `ExperimentError` where there is none of this name, or it is wrong."""
        path = folder / f"{name}.toml"
        if not path.is_file():
            raise ExperimentError(
                f"no claim is called {name!r}; there are: {', '.join(names(folder))}", do="`rlhf claims` lists them"
            )
        try:
            return cls.model_validate({"name": name, "folder": folder, **read_toml(path)})
        except ValidationError as error:
            raise ExperimentError(explain(error), str(path)) from error

    @property
    def results(self) -> Path:
        """The file of what its runs measured."""
        return self.folder / "results" / f"{self.name}.parquet"

    def numbers(self) -> pl.DataFrame:
        """Every number that its runs measured; no rows where none was run yet."""
        if not self.results.is_file():
            return pl.DataFrame(schema=SCHEMA)
        try:
            return pl.read_parquet(self.results, schema=SCHEMA)
        except (pl.exceptions.PolarsError, OSError) as error:
            raise ArtifactError(f"unreadable results: {error}", str(self.results), "delete it and run again") from error

    def values(self, numbers: pl.DataFrame) -> dict[str, dict[int, float]]:
        """`ARM.MEASURE` -> seed -> value, of everything that was measured."""
        found: dict[str, dict[int, float]] = {}
        for (arm, seed), of_run in sorted(numbers.partition_by("arm", "seed", as_dict=True).items()):
            for name, measure in self.measures.items():
                value = measure.of(of_run)
                if value is not None:
                    found.setdefault(f"{arm}.{name}", {})[int(seed)] = value
        return found

    def findings(self, numbers: pl.DataFrame) -> list["Finding"]:
        """What came of each check."""
        values = self.values(numbers)
        return [_finding(check, values) for check in self.checks]


def _parts(side: str) -> list[str]:
    """`ARM.MEASURE`, or the two of a ratio."""
    return [part.strip() for part in side.split("/")]


def names(folder: Path = CLAIMS) -> list[str]:
    """The claims that there are. Raises `ExperimentError` for a folder without any."""
    found = sorted(path.stem for path in folder.glob("*.toml"))
    if not found:
        raise ExperimentError("no claims there", str(folder), f"write one as those in {CLAIMS}, or leave --folder out")
    return found


@dataclass(frozen=True)
class Interval:
    """A mean over seeds, and where it would lie in 95 of 100 repetitions."""

    mean: float
    low: float
    high: float
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        """By Student's t; of a single value nothing is known but itself."""
        mean, count = fmean(values), len(values)
        if count == 1:
            return cls(mean, -math.inf, math.inf, 1)
        from scipy import stats

        half = float(stats.t.ppf(0.975, count - 1)) * stdev(values) / math.sqrt(count)
        return cls(mean, mean - half, mean + half, count)

    def plus(self, number: float) -> "Interval":
        """Of the values plus a number."""
        return Interval(self.mean + number, self.low + number, self.high + number, self.seeds)

    def taken_from(self, number: float) -> "Interval":
        """Of a number less the values."""
        return Interval(number - self.mean, number - self.high, number - self.low, self.seeds)

    def __str__(self) -> str:
        if self.seeds == 1:
            return f"{self.mean:.3g}"
        digits = max(0, 2 - _magnitude(self.high - self.low))
        return f"{self.mean:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def _magnitude(width: float) -> int:
    return 0 if width <= 0 else math.floor(math.log10(width)) + 1


@dataclass(frozen=True)
class Finding:
    """What came of a check."""

    check: Check
    difference: Interval | None
    """Of `a` and `b`; None where no seed has both."""

    @property
    def verdict(self) -> Verdict:
        """Whether the whole interval lies above `least`, below it, or neither."""
        if self.difference is None:
            return "not run"
        if self.difference.seeds < ENOUGH:
            return "inconclusive"
        if self.difference.low > self.check.least:
            return "reproduced"
        return "not reproduced" if self.difference.high < self.check.least else "inconclusive"

    @property
    def why(self) -> str:
        """The verdict's reason in a sentence."""
        if self.difference is None:
            return "no seed has been run"
        found, check, least = self.difference, self.check, self.check.least
        if isinstance(check.a, str) and isinstance(check.b, str):
            told = f"{check.a} less {check.b}: {found}"
            wanted = f", wanted above {least:g}" if least else ""
        elif isinstance(check.a, str):
            told, wanted = f"{check.a}: {found.plus(float(check.b))}", f", wanted above {float(check.b) + least:g}"
        else:
            told, wanted = f"{check.b}: {found.taken_from(check.a)}", f", wanted below {check.a - least:g}"
        few = f"; fewer than {ENOUGH} say nothing" if found.seeds < ENOUGH else ""
        return f"{told} over {found.seeds} seed{'s' if found.seeds > 1 else ''}{wanted}{few}"


def _finding(check: Check, values: dict[str, dict[int, float]]) -> Finding:
    seeds = {seed for of_seeds in values.values() for seed in of_seeds}
    a, b = (_side(side, values) if isinstance(side, str) else dict.fromkeys(seeds, side) for side in (check.a, check.b))
    both = sorted(a.keys() & b.keys())
    return Finding(check, Interval.of([a[seed] - b[seed] for seed in both]) if both else None)


def _side(side: str, values: dict[str, dict[int, float]]) -> dict[int, float]:
    """Seed -> value of a side of a check."""
    above, *below = (values.get(part, {}) for part in _parts(side))
    for other in below:
        above = {seed: value / other[seed] for seed, value in above.items() if other.get(seed)}
    return above


def verdict(findings: Sequence[Finding]) -> Verdict:
    """Of a claim: reproduced where every check is, not reproduced where one is not, inconclusive otherwise."""
    verdicts = {finding.verdict for finding in findings}
    for worst in ("not run", "not reproduced", "inconclusive"):
        if worst in verdicts:
            return worst
    return "reproduced"
