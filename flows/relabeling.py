"""Label stored rollouts again: another labeler, grader, recipe or setting, beside the old labels, in seconds.

    RUN/relabeled/NAME/0003/labels-0      the same responses, judged anew
    RUN/relabeled/NAME/0003/advantages    and what credit they get for it, where all that it takes is stored

The run itself goes by its own labels as before, and nothing of it becomes stale.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flows.compare import Stored, stored
from flows.differing import show_rows
from flows.run import name_given
from flows.sheets import Sheet, out, print_sheet
from pipeline.algorithms.recipe import Recipe
from pipeline.artifacts import Artifact
from pipeline.catalog import RELABELED
from pipeline.errors import ExperimentError, PipelineError
from pipeline.inspecting.differences import row_difference
from pipeline.settings import override
from stages.advantage import Settings as AdvantageSettings
from stages.advantage import advantage
from stages.label import Settings as LabelSettings
from stages.label import label as label_stage

SHOWN = 3
"""Changed rows that are shown of each round."""


def relabel(
    folder: Path, iteration: int, name: str, label: str | None, grader: str | None, recipe: str | None,
    changes: Sequence[str], say: Callable[[str], None],
) -> None:  # fmt: skip
    """Label the rollouts of an iteration again and print what that changes.

    `recipe` gives labeler and filters of another recipe, `label` another labeler with its defaults, `grader` another
    grader of the answers, `changes` single settings (`label.wrong=-1`). Raises `ExperimentError` where nothing is
    changed, and what the stage raises; the old labels are untouched in any case.
    """
    if label is None and grader is None and recipe is None and not changes:
        raise ExperimentError(
            "nothing is to be different", do="give --label, --grader, --recipe, or --set label.wrong=-1.0"
        )
    source = stored(folder, iteration)
    here = folder / RELABELED / name_given(name) / f"{iteration:04d}"
    changed = source.experiment.recipe if recipe is None else Recipe.load(recipe)
    made = []
    for turn, rollouts in enumerate(source.rollouts):
        settings = _settings(source, turn, changed if recipe is not None else None, label, grader, changes)
        judgements = source.judgements[turn].path if turn < len(source.judgements) else None
        made.append(
            label_stage.run(
                here / f"labels-{turn}", settings, rollouts=rollouts.path, prompts=source.prompts, judgements=judgements
            )
        )
    _show(source, made)
    _credit(source, changed, here, made, say)


def _settings(
    source: Stored, turn: int, recipe: Recipe | None, label: str | None, grader: str | None, changes: Sequence[str]
) -> LabelSettings:
    """The settings of the old labels with the changes on top."""
    values: dict[str, Any] = dict(source.labels[turn].manifest.settings)
    if recipe is not None:
        taken = source.experiment.model_copy(update={"recipe": recipe})
        values |= LabelSettings.slice(taken, {})
    if label is not None:
        values["label"] = {"kind": label}
    if grader is not None:
        values["grader"] = grader
    return LabelSettings.of(None, override(values, changes))


def _show(source: Stored, made: Sequence[Artifact]) -> None:
    """Numbers before and after, verdicts that moved, and the first rows."""
    names = ("reward/mean", "reward/std", "accuracy/mean", "groups/kept", "reward/zero_spread_groups")
    rows = []
    for name in names:
        pairs = [(a.stats.get(name), b.stats.get(name)) for a, b in zip(source.labels, made, strict=True)]
        cells = [_total(name, [pair[side] for pair in pairs], source.labels) for side in (0, 1)]
        if any(cells):
            rows.append((name, *cells))
    print_sheet(Sheet(f"iteration {source.iteration} of {source.folder}", ("", "before", "after"), tuple(rows)))
    for old, new in zip(source.labels, made, strict=True):
        out.print(f"{old.path} -> {new.path}", markup=False, highlight=False)
        _moved(old, new)
        show_rows(row_difference(old, new, SHOWN))


def _total(name: str, values: Sequence[float | None], labels: Sequence[Artifact]) -> str:
    """Over the rounds: groups add up, everything else is a mean by rows."""
    there = [(value, one.stats["rows"]) for value, one in zip(values, labels, strict=True) if value is not None]
    if not there:
        return ""
    if name.startswith("groups/"):
        return f"{sum(value for value, _ in there):,.0f}"
    return f"{np.average([value for value, _ in there], weights=[rows for _, rows in there]):.4f}"


def _moved(old: Artifact, new: Artifact) -> None:
    """How many responses went from which verdict to which."""
    before, after = (one.table(["prompt_id", "sample", "verdict"]).to_pylist() for one in (old, new))
    verdicts = {(row["prompt_id"], row["sample"]): row["verdict"] for row in after}
    counts: dict[tuple[str, str], int] = {}
    for row in before:
        pair = (row["verdict"] or "none", verdicts[row["prompt_id"], row["sample"]] or "none")
        counts[pair] = counts.get(pair, 0) + 1
    rows = tuple((a, b, f"{count:,}") for (a, b), count in sorted(counts.items()) if a != b)
    if rows:
        print_sheet(Sheet("verdicts that moved", ("before", "after", "responses"), rows))


def _credit(source: Stored, recipe: Recipe, here: Path, labels: Sequence[Artifact], say: Callable[[str], None]) -> None:
    """What the new labels mean for the advantages, where the recipe's models have read the responses."""
    experiment = source.experiment.model_copy(update={"recipe": recipe})
    try:
        new = advantage.run(
            here / "advantages", AdvantageSettings.of(experiment), rollouts=[one.path for one in source.rollouts],
            labels=[one.path for one in labels], scores=None if source.scores is None else source.scores.path,
        )  # fmt: skip
    except PipelineError as error:
        say(f"no advantages: {error.what}")
        return
    say(f"{new.path}: {new.stats['rows']:,.0f} rows train, mean {_mean(new):+.4f}")
    old = source.folder / f"{source.iteration:04d}" / "advantages"
    if old.exists():
        before = Artifact.open(old)
        say(f"{old}: {before.stats['rows']:,.0f} rows train, mean {_mean(before):+.4f}")
        say(f"next:\n  rlhf diff {old} {new.path}")


def _mean(table: Artifact) -> float:
    return float(np.concatenate([part["advantages"].combine_chunks().flatten() for part in table.parts()]).mean())
