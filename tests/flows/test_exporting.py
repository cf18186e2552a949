"""`rlhf export` of a real run: every dataset that verl and TRL have rows for, loaded again by `datasets`."""

import json
import sys

import datasets
import pytest

from flows import cli
from flows.execute import walk
from flows.exporting import export
from flows.run import Run
from pipeline.artifacts import Artifact
from pipeline.catalog import catalog
from pipeline.errors import ExperimentError
from pipeline.exchange import SHAPES
from pipeline.experiment import Experiment

KINDS = ("prompts", "demonstrations", "documents", "rankings", "rollouts", "labels")


@pytest.fixture(scope="module")
def made(every_recipe, here_and_now, tmp_path_factory):
    """The artifacts of a run with a reward model, by kind: those of the loop where there are any."""
    folder = tmp_path_factory.mktemp("exporting")
    (folder / "small.toml").write_text(every_recipe.replace('engine = "vllm"', 'engine = "transformers"'))
    experiment = Experiment.load(folder / "small.toml", ["scale.iterations=1"], recipe="instructgpt", name="run")
    run = Run(experiment, folder / "runs", here_and_now)
    run.folder.mkdir(parents=True)
    run.file.write_text(experiment.dump())
    walk(run)
    entries = sorted(catalog([run.folder]), key=lambda entry: entry.phase == "loop")
    return {entry.kind: entry.artifact for entry in entries}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)


def loaded(file, tmp_path):
    name = {".jsonl": "json", ".parquet": "parquet"}[file.suffix]
    return datasets.load_dataset(name, data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(("to", "kind"), [(to, kind) for to in SHAPES for kind in KINDS if kind in SHAPES[to]])
def test_datasets_loads_what_was_exported(made, tmp_path, capsys, to, kind, suffix):
    file = tmp_path / f"rows{suffix}"
    export(made[kind].path, to, file)
    rows = loaded(file, tmp_path)
    told = capsys.readouterr().out
    assert told.startswith(f"{len(rows):,} rows for {to} in {file}\n")
    if kind != "rankings":
        assert len(rows) == made[kind].stats["rows"]
    if kind in ("rollouts", "labels"):
        keys = [(row["prompt_id"], row["sample"]) for row in rows]
        assert keys == [tuple(row.values()) for row in made["rollouts"].table(["prompt_id", "sample"]).to_pylist()]


def test_a_pair_for_each_pair_that_does_not_tie(made, tmp_path, capsys):
    export(made["rankings"].path, "trl", tmp_path / "rows.jsonl")
    ranks = made["rankings"].table(["ranks"])["ranks"].to_pylist()
    wanted = sum(one < other for row in ranks for one in row for other in row)
    ties = sum(len(row) * (len(row) - 1) // 2 for row in ranks) - wanted
    assert len(loaded(tmp_path / "rows.jsonl", tmp_path)) == wanted
    assert (f"left out: {ties:,} pairs that tie" in capsys.readouterr().out) == bool(ties)


def test_rewards_are_those_of_the_labels_beside_the_rollouts(made, tmp_path):
    export(made["rollouts"].path, "verl", tmp_path / "verl.jsonl")
    export(made["labels"].path, "trl", tmp_path / "trl.parquet")
    keys, rewards = ("prompt_id", "sample"), {}
    for row in made["labels"].table([*keys, "reward"]).to_pylist():
        rewards[row["prompt_id"], row["sample"]] = row["reward"]
    for name, column in (("verl.jsonl", "score"), ("trl.parquet", "reward")):
        found = {(row["prompt_id"], row["sample"]): row[column] for row in loaded(tmp_path / name, tmp_path)}
        assert found == rewards


def refusal(capsys, *words):
    """What `rlhf` says when it refuses."""
    with pytest.raises(SystemExit) as left:
        sys.argv = ["rlhf", *map(str, words)]
        cli.main()
    assert left.value.code == 2
    return capsys.readouterr().err


def test_the_command_line_writes_and_never_overwrites(made, tmp_path, capsys, monkeypatch):
    file = tmp_path / "rows.jsonl"
    words = ["rlhf", "export", str(made["prompts"].path), "--to", "trl", "--out", str(file)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 0
    before = file.read_bytes()
    assert json.loads(before.splitlines()[0])["prompt"][-1]["role"] == "user"
    assert "something is there already" in refusal(capsys, *words[1:])
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("to", "name", "words"),
    [
        ("openrlhf", "rows.jsonl", "--to openrlhf: nobody's rows are known by this name"),
        ("trl", "rows.csv", "cannot write .csv"),
        ("trl", "rows", "cannot write a file without a suffix"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(made, tmp_path, to, name, words):
    with pytest.raises(ExperimentError, match=words):
        export(made["prompts"].path, to, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_not_exported(made, tmp_path, capsys):
    told = refusal(capsys, "export", made["policy"].path, "--to", "verl", "--out", tmp_path / "rows.jsonl")
    assert "verl has no rows for policy" in told
    assert Artifact.open(made["policy"].path)
