"""Every artifact of a real run, loaded by the libraries that its card names, as its card says."""

import re
from contextlib import chdir
from typing import Any

import datasets
import polars as pl
import pytest
import yaml

from flows.execute import walk
from flows.run import Run
from pipeline.cards import CARD
from pipeline.catalog import ROLES, catalog
from pipeline.experiment import Experiment
from pipeline.inspecting.curves import by_step
from pipeline.inspecting.names import look_up
from stages import ask, perplexity

TABLES = {
    "prompts", "demonstrations", "documents", "rollouts", "rankings", "questions", "labels", "scores", "advantages",
    "perplexities",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(every_recipe, here_and_now, tmp_path_factory):
    """A run of the recipe that makes the most, with a critic besides, and questions and perplexities of its policy."""
    folder = tmp_path_factory.mktemp("loading")
    (folder / "small.toml").write_text(every_recipe.replace('engine = "vllm"', 'engine = "transformers"'))
    changes = ["scale.iterations=1"]
    experiment = Experiment.load(folder / "small.toml", changes, recipe="instructgpt", name="run")
    made = Run(experiment, folder / "runs", here_and_now)
    made.folder.mkdir(parents=True)
    made.file.write_text(experiment.dump())
    policy = walk(made).policy.path
    lies = {entry.stage: entry.artifact.path for entry in catalog([made.folder]) if entry.phase == "foundations"}
    asked = {"rollouts": lies["candidates"], "prompts": lies["prompts"]}
    ask.ask.run(made.folder / "questions", ask.Settings(responses=2), **asked)
    read = {"policy": policy, "documents": lies["documents"]}
    perplexity.perplexity.run(made.folder / "perplexities", perplexity.Settings(), **read)
    return made.folder


@pytest.fixture(scope="module")
def artifacts(run):
    return [entry.artifact for entry in catalog([run])]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No network, and nothing written into anybody's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)


def card_of(artifact):
    _, front, body = (artifact.path / CARD).read_text("utf-8").split("---\n", 2)
    return yaml.safe_load(front), body


def code_of(artifact):
    """The card's ways to load it: library -> code."""
    blocks = re.findall(r"```python\n(.*?)```", card_of(artifact)[1], re.DOTALL)
    return {name: block for name in ("polars", "duckdb", "pandas", "datasets") for block in blocks if name in block}


def loaded(artifact, name):
    """What the code on the card loads, run where the folder lies, as a frame of polars."""
    there: dict[str, Any] = {}
    with chdir(artifact.path.parent):
        exec(code_of(artifact)[name], there)
        if name == "duckdb":  # it reads only now
            return there["rows"].pl()
        return {"polars": pl.DataFrame, "pandas": pl.from_pandas, "datasets": datasets.Dataset.to_polars}[name](
            there["rows"]
        )


def test_the_run_has_every_kind_of_table(artifacts):
    assert {one.manifest.kind for one in artifacts if one.contract.is_table} == TABLES


def test_every_artifact_has_a_card(artifacts):
    assert [one.path for one in artifacts if not (one.path / CARD).is_file()] == []
    assert {one.manifest.kind for one in artifacts} >= {"policy", "reward_model"}


def test_the_card_has_the_counts_and_the_columns_that_polars_loads(artifacts):
    for one in artifacts:
        if one.contract.is_table:
            rows = loaded(one, "polars")
            size = sum((one.path / name).stat().st_size for name in one.manifest.files)
            told = re.search(r"^([\d,]+) rows?, ([\d,]+) files?, ([\d,]+) bytes", card_of(one)[1], re.MULTILINE)
            assert [int(number.replace(",", "")) for number in told.groups()] == [
                rows.height, len(one.manifest.files), size
            ]  # fmt: skip
            assert (
                re.findall(r"^\| `(\w+)` \| `[^`]+` \| .* \| (?:yes|no) \|", card_of(one)[1], re.MULTILINE)
                == rows.columns
            )
            assert rows.equals(pl.from_arrow(one.table()))


@pytest.mark.parametrize("library", ["duckdb", "pandas", "datasets"])
def test_every_table_loads_as_its_card_says_with_the_same_rows(artifacts, library):
    for one in artifacts:
        if one.contract.is_table:
            rows = loaded(one, library)
            wanted = pl.from_arrow(one.table())
            assert rows.columns == wanted.columns
            assert rows.to_dicts() == wanted.to_dicts(), one.path


def test_load_dataset_finds_one_config_with_one_split_and_no_metrics(artifacts):
    for one in artifacts:
        if one.contract.is_table:
            found = datasets.load_dataset(str(one.path))
            assert list(found) == ["train"]
            assert found["train"].num_rows == one.manifest.stats["rows"]
            assert found["train"].column_names == one.table().column_names


def test_the_front_matter_is_that_of_a_dataset_or_of_a_model(artifacts):
    for one in artifacts:
        front = card_of(one)[0]
        assert ("configs" in front) == one.contract.is_table
        assert ("library_name" in front) != one.contract.is_table


def test_two_folders_of_one_name_are_not_taken_for_each_other(artifacts):
    """The cache of `datasets` goes by the name of a folder."""
    twins = [one for one in artifacts if one.path.name == "questions"]
    assert len(twins) == 2
    for one in (*twins, *twins):
        assert datasets.load_dataset(str(one.path), split="train")["question_id"][:] == [
            row["question_id"] for row in one.table(["question_id"]).to_pylist()
        ]


def test_every_number_of_real_runs_is_in_the_table_of_names_with_its_unit(run, every_recipe, here_and_now):
    """Of recipes that filter, vote, have a critic, and reward confidence; and of the one with a reward model."""
    runs = [run]
    for recipe in ("dapo", "ttrl", "vapo", "rlsc"):
        file = run.parents[1] / "small.toml"
        experiment = Experiment.load(file, ["scale.iterations=1"], recipe=recipe, name=recipe)
        made = Run(experiment, run.parent, here_and_now)
        made.folder.mkdir()
        made.file.write_text(experiment.dump())
        walk(made)
        runs.append(made.folder)
    rows = by_step(catalog(runs)).select("kind", "name", "unit").rows()
    measured = {(ROLES.get(kind, kind), name, unit) for kind, name, unit in rows}  # candidates measure what rollouts do
    assert len(measured) > 150
    assert [row for row in sorted(measured) if look_up(row[1], row[0]) is None] == []
    assert [row for row in sorted(measured) if (known := look_up(row[1], row[0])) and known.unit != row[2]] == []
