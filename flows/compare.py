"""How other recipes would have credited the stored rollouts of an iteration: nothing is sampled, no model is run.

Each recipe labels and credits the same responses, from the columns that the run has stored, into
`RUN/compare/ITERATION/RECIPE`, beside what the run itself has made. A recipe whose needs are not stored is named with
the reason.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc

from flows.sheets import Sheet
from pipeline import storage
from pipeline.algorithms.bind import Bound, bind
from pipeline.algorithms.recipe import Recipe
from pipeline.algorithms.shelf import FROM_MODELS
from pipeline.artifacts import Artifact
from pipeline.catalog import COMPARE, EXPERIMENT_FILE, is_redone, lies_at, refuse_no_run
from pipeline.contracts import SCORES
from pipeline.errors import ArtifactError, ExperimentError, PipelineError
from pipeline.experiment import Experiment
from pipeline.stage import Stage, StageSettings
from stages.advantage import Settings as AdvantageSettings
from stages.advantage import advantage
from stages.label import Settings as LabelSettings
from stages.label import label

PICTURE = "compare.html"

Rewards = Literal["recipe", "stored"]
Key = tuple[str, int]


@dataclass(frozen=True)
class Stored:
    """One iteration of a run, as its artifacts have it."""

    folder: Path
    iteration: int
    experiment: Experiment
    rollouts: tuple[Artifact, ...]
    labels: tuple[Artifact, ...]
    judgements: tuple[Artifact, ...]
    scores: Artifact | None

    @property
    def prompts(self) -> Path:
        """What the responses answer. Raises `ArtifactError` where that is gone."""
        (record,) = self.labels[0].manifest.inputs["prompts"]
        place = lies_at(record, [self.folder.resolve().parent])
        if place is None:
            raise ArtifactError("the prompts are gone", record.path, "put them back where they were")
        return place


@dataclass(frozen=True)
class Credited:
    """What one recipe gives the tokens of the iteration, in the order of the rollouts; NaN on rows that it drops."""

    recipe: str
    tokens: np.ndarray
    rows: int
    seconds: float

    @property
    def silent(self) -> float:
        """Share of all tokens that teach nothing: dropped, or with an advantage of 0."""
        return float((np.isnan(self.tokens) | (self.tokens == 0)).mean())


@dataclass(frozen=True)
class Comparison:
    """What came of it: the recipes that could be applied, and why the others could not."""

    stored: Stored
    credited: tuple[Credited, ...]
    unmet: Mapping[str, str]

    def agreement(self) -> tuple[np.ndarray, np.ndarray]:
        """Pearson correlation, and share of tokens whose advantages have opposite signs; [recipes, recipes].

        Both over the tokens that both recipes train on; NaN where there are fewer than two, or one never varies.
        """
        tokens = [one.tokens for one in self.credited]
        correlation = np.array([[_correlation(a, b) for b in tokens] for a in tokens])
        flips = np.array([[_sign_flips(a, b) for b in tokens] for a in tokens])
        return correlation, flips


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    both = ~(np.isnan(a) | np.isnan(b))
    if both.sum() < 2 or np.ptp(a[both]) == 0 or np.ptp(b[both]) == 0:
        return float("nan")
    return float(np.corrcoef(a[both], b[both])[0, 1])


def _sign_flips(a: np.ndarray, b: np.ndarray) -> float:
    both = ~(np.isnan(a) | np.isnan(b))
    return float((np.sign(a[both]) * np.sign(b[both]) < 0).mean()) if both.any() else float("nan")


def stored(folder: Path, iteration: int) -> Stored:
    """Open what a run has of an iteration. Raises `ArtifactError` when it has no such iteration."""
    here = folder / f"{iteration:04d}"
    refuse_no_run(folder)
    rollouts = _opened(here, "rollouts-*")
    labels = _opened(here, "labels-*")
    if not rollouts or len(rollouts) != len(labels):
        there = ", ".join(sorted(p.name for p in folder.glob("[0-9]*"))) or "none"
        raise ArtifactError(
            f"no labelled rollouts in iteration {iteration}; iterations there: {there}", str(here), "name another"
        )
    scores = here / "scores"
    return Stored(
        folder, iteration, Experiment.load(folder / EXPERIMENT_FILE), rollouts, labels,
        _opened(here, "judgements-*"), Artifact.open(scores, SCORES) if scores.exists() else None,
    )  # fmt: skip


def _opened(here: Path, pattern: str) -> tuple[Artifact, ...]:
    found = [path for path in here.glob(pattern) if not is_redone(path)]
    return tuple(Artifact.open(path) for path in sorted(found, key=lambda path: int(path.name.split("-")[1])))


def compare(source: Stored, recipes: Sequence[str], rewards: Rewards = "recipe") -> Comparison:
    """Credit the stored rollouts under each recipe; what is there already is used again.

    `rewards` says whose: each recipe's own labeler and filters, or what the run has stored for all of them.
    Raises `RecipeError` for a name that no recipe has.
    """
    loaded = {name: _adapted(name, source) for name in recipes}
    places = _places(source.rollouts)
    credited, unmet = [], {}
    for name, recipe in loaded.items():
        try:
            credited.append(_credit(name, recipe, source, rewards, places))
        except PipelineError as error:  # the reason is what was asked for: the others still count
            unmet[name] = error.what
    return Comparison(source, tuple(credited), unmet)


def _adapted(name: str, source: Stored) -> Recipe:
    """The recipe with the experiment's changes to it, and the group size of the stored rollouts."""
    recipe = Recipe.load(name)
    return recipe.changed(source.experiment.recipe_changes.get(recipe.name, {}))


def _credit(name: str, recipe: Recipe, source: Stored, rewards: Rewards, places: "Places") -> Credited:
    bound = bind(recipe.changed({"rollout": _as_sampled(recipe, source)}))
    needs = _needs(bound, rewards)
    _refuse_unstored(needs, source)
    experiment = source.experiment.model_copy(update={"recipe": recipe})
    here = source.folder / COMPARE / f"{source.iteration:04d}" / (name if rewards == "recipe" else f"{name}-{rewards}")
    labels = source.labels if rewards == "stored" else _labelled(here, experiment, source)
    scores = source.scores.path if needs - {"reward_scores"} and source.scores is not None else None
    table = _anew(
        advantage, here / "advantages", AdvantageSettings.of(experiment), rollouts=[a.path for a in source.rollouts],
        labels=[a.path for a in labels], scores=scores,
    )  # fmt: skip
    seconds = table.stats["seconds"] + sum(a.stats["seconds"] for a in labels if rewards == "recipe")
    return Credited(name, places.spread(table), int(table.stats["rows"]), seconds)


def _needs(bound: Bound, rewards: Rewards) -> set[str]:
    """The columns of models without which the recipe gives no credit; stored rewards take the labeler's place."""
    judging = {"label", "filter"} if rewards == "stored" else set()
    pieces = (piece for piece in bound.crediting if piece.card.shelf not in judging)
    return {name for piece in pieces for name in piece.needs} & set(FROM_MODELS)


def _refuse_unstored(needs: set[str], source: Stored) -> None:
    there = set(source.scores.table().column_names) if source.scores is not None else set()
    there |= {"reward_scores"} if source.judgements else set()
    if missing := sorted(needs - there):
        raise ArtifactError(f"needs {', '.join(missing)}, which the run has not stored", str(source.folder))


def _as_sampled(recipe: Recipe, source: Stored) -> dict[str, Any]:
    """How the stored responses were sampled, as far as the recipe's pieces depend on it."""
    samples = source.rollouts[0].table(["sample"])["sample"].to_numpy()
    return {
        "group_size": int(samples.max()) + 1,
        "greedy": recipe.rollout.greedy and bool((samples == -1).any()),
    }


def _anew(stage: Stage, out: Path, settings: StageSettings, **paths: Path | Sequence[Path] | None) -> Artifact:
    """What lies at `out`, made again where it is of another recipe or other inputs: nobody goes by it."""
    try:
        stage.committed(out, settings, **paths)
    except ArtifactError:
        if not out.exists():
            raise  # an input is at fault, not what was made
        shutil.rmtree(out)
        storage.removed(out)
    return stage.run(out, settings, **paths)


def _labelled(here: Path, experiment: Experiment, source: Stored) -> tuple[Artifact, ...]:
    made = []
    for turn, rollouts in enumerate(source.rollouts):
        judgements = source.judgements[turn].path if turn < len(source.judgements) else None
        made.append(
            _anew(
                label, here / f"labels-{turn}", LabelSettings.of(experiment), rollouts=rollouts.path,
                prompts=source.prompts, judgements=judgements,
            )
        )  # fmt: skip
    return tuple(made)


@dataclass(frozen=True)
class Places:
    """Where the tokens of each sampled response stand when all of them are laid end to end."""

    start: Mapping[Key, int]
    total: int

    def spread(self, table: Artifact) -> np.ndarray:
        """The advantages of a training table at the places of their tokens; NaN elsewhere."""
        tokens = np.full(self.total, np.nan)
        rows = table.table(["prompt_id", "sample", "advantages"])
        keys = zip(rows["prompt_id"].to_pylist(), rows["sample"].to_pylist(), strict=True)
        for key, advantages in zip(keys, rows["advantages"], strict=True):
            values = np.asarray(advantages.values.to_numpy())
            tokens[self.start[key] : self.start[key] + len(values)] = values
        return tokens


def _places(rollouts: Sequence[Artifact]) -> Places:
    start: dict[Key, int] = {}
    total = 0
    for artifact in rollouts:
        rows = artifact.table(["prompt_id", "sample", "response_tokens"])
        lengths = pc.list_value_length(rows["response_tokens"]).to_pylist()
        for prompt, sample, length in zip(
            *(rows[n].to_pylist() for n in ("prompt_id", "sample")), lengths, strict=True
        ):
            if sample >= 0:
                start[prompt, sample] = total
                total += length
    return Places(start, total)


def sheets(made: Comparison) -> list[Sheet]:
    """Two tables: what each recipe makes of the responses, and how each pair agrees."""
    where = f"iteration {made.stored.iteration} of {made.stored.folder}"
    rows = [
        (one.recipe, f"{one.rows:,}", f"{one.silent:.3f}", f"{np.nanmean(one.tokens):+.3f}",
         f"{np.nanstd(one.tokens):.3f}", f"{one.seconds:.2f}")
        for one in made.credited
    ]  # fmt: skip
    rows += [(name, "", "", "", "", reason) for name, reason in made.unmet.items()]
    header = ("recipe", "rows that train", "tokens without signal", "mean", "deviation", "seconds, or why not")
    names = [one.recipe for one in made.credited]
    correlation, flips = made.agreement()
    pairs = tuple(
        (names[i], names[j], f"{correlation[i, j]:+.3f}", f"{flips[i, j]:.3f}")
        for i in range(len(names)) for j in range(i + 1, len(names))
    )  # fmt: skip
    return [
        Sheet(f"advantages: {where}", header, tuple(rows)),
        Sheet("agreement, over the tokens that both train on", ("recipe", "and", "correlation", "sign flips"), pairs),
    ]


def picture(made: Comparison) -> Path:
    """Draw correlation, sign flips and silence into one HTML file that opens offline; return its path.

    Raises `ExperimentError` when no recipe could be applied.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    if not made.credited:
        raise ExperimentError("none of the recipes could be applied: " + "; ".join(made.unmet.values()))
    names = [one.recipe for one in made.credited]
    correlation, flips = made.agreement()
    titles = ("correlation of advantages", "share of tokens with opposite signs", "share of tokens without signal")
    figure = make_subplots(rows=1, cols=3, subplot_titles=titles, horizontal_spacing=0.12)
    for column, (values, low, scale) in enumerate(((correlation, -1, "RdBu"), (flips, 0, "Reds")), start=1):
        figure.add_trace(
            go.Heatmap(
                z=values, x=names, y=names, zmin=low, zmax=1, colorscale=scale, text=np.round(values, 2),
                texttemplate="%{text}", showscale=False, hovertemplate="%{y} and %{x}: %{z:.4f}<extra></extra>",
            ),
            row=1, col=column,
        )  # fmt: skip
        figure.update_yaxes(autorange="reversed", row=1, col=column)
    figure.add_trace(go.Bar(x=names, y=[one.silent for one in made.credited], showlegend=False), row=1, col=3)
    figure.update_yaxes(range=[0, 1], row=1, col=3)
    source = made.stored
    figure.update_layout(
        title=f"One set of rollouts, {len(names)} recipes: {source.folder.name}, iteration {source.iteration}",
        template="plotly_white", height=480,
    )  # fmt: skip
    path = source.folder / COMPARE / f"{source.iteration:04d}" / PICTURE
    figure.write_html(path, include_plotlyjs=True)
    return path
