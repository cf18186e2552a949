"""A run from one command: what it leaves, what it says, and that it does nothing twice."""

import re
import shlex
import time
from pathlib import Path

import duckdb
import polars as pl
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from flows.tables import load_stage
from pipeline.artifacts import METRICS_FILE, Artifact, Manifest
from pipeline.catalog import artifacts_of
from pipeline.contracts import CONTRACTS, METRICS
from pipeline.settings import override

ROOT = Path(__file__).resolve().parents[2]
DETERMINISTIC = {"ingest", "label", "advantage"}


def everything(desk) -> list[Artifact]:
    return [*artifacts_of(desk.folder / "runs/small-base"), *artifacts_of(desk.folder / "runs/small")]


def test_the_last_lines_say_accuracy_place_and_what_to_type_next(finished):
    desk, said = finished
    lines = said.stdout.splitlines()
    assert lines[0].startswith("held-out accuracy before: 0.")
    assert lines[1].startswith("held-out accuracy after:  0.")
    assert "the run lies in runs/small" in lines
    commands = [line.split() for line in lines if line.startswith("  rlhf ")]
    assert len(commands) == 5
    for words in commands[:4]:
        desk.rlhf(*shlex.split(" ".join(words[1:])))


def test_progress_names_iteration_reward_speed_and_time_left(finished):
    _, said = finished
    line = next(line for line in said.stderr.splitlines() if line.startswith("iteration 1/2"))
    assert "reward" in line and "tokens/s" in line and "left" in line


def test_every_artifact_keeps_its_contract_and_opens_everywhere(finished, tmp_path):
    desk, _ = finished
    artifacts = everything(desk)
    assert {a.manifest.stage for a in artifacts} == {
        "ingest", "sft", "rollout", "label", "score", "advantage", "update",
    }  # fmt: skip
    for artifact in artifacts:
        METRICS.check(pq.read_table(artifact.path / METRICS_FILE), str(artifact.path))
        if not artifact.contract.is_table:
            continue
        artifact.check()
        files = [str(path) for path in artifact.part_paths()]
        rows = artifact.stats["rows"]
        assert pl.read_parquet(files).height == rows
        assert duckdb.sql(f"select count(*) from read_parquet({files!r})").fetchall() == [(rows,)]
        assert load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path)).num_rows == rows
    METRICS.check(pq.read_table(desk.folder / "runs/small" / METRICS_FILE))


def test_policies_load_as_ordinary_checkpoints(finished):
    from transformers import AutoModelForCausalLM

    desk, _ = finished
    model = AutoModelForCausalLM.from_pretrained(desk.folder / "runs/small/0001/policy")
    assert model.config.model_type == "qwen3"


def test_typed_again_it_recomputes_nothing(finished):
    desk, said = finished
    before = {a.path: (a.path / "manifest.json").stat().st_mtime_ns for a in everything(desk)}
    started = time.monotonic()
    again = desk.rlhf("run", str(desk.experiment))
    assert time.monotonic() - started < 60  # no server, no engine; the figure for people is in the README
    assert again.stdout == said.stdout
    assert "iteration 1/" not in again.stderr
    assert {a.path: (a.path / "manifest.json").stat().st_mtime_ns for a in everything(desk)} == before


def test_another_recipe_reuses_the_foundations(finished):
    desk, _ = finished
    base = desk.folder / "runs/small-base"
    before = (base / "sft/manifest.json").stat().st_mtime_ns
    desk.rlhf("run", str(desk.experiment), "--recipe", "grpo", "--name", "g1")
    assert (base / "sft/manifest.json").stat().st_mtime_ns == before
    scores = Artifact.open(desk.folder / "runs/g1/0000/scores").table()
    assert {"old_logprobs", "ref_logprobs"} <= set(scores.column_names)
    assert Manifest.read(desk.folder / "runs/g1/0000/labels-0").settings["label"]["wrong"] == 0.0
    assert not (desk.folder / "runs/g1/0000/rollouts-1").exists()


def test_every_stage_runs_alone_in_a_new_process(finished, tmp_path):
    desk, _ = finished
    one_of_each = {artifact.manifest.stage: artifact for artifact in everything(desk)}
    for name, artifact in one_of_each.items():
        manifest = artifact.manifest
        words = ["stage", name]
        for given, records in manifest.inputs.items():
            words += [f"--{given}", *[record.path for record in records]]
        stage = load_stage(name)
        settings = stage.settings_type.of(None, manifest.settings)
        for word in stage.command(Path("unused"), settings)[3:-2]:
            words.append(word)
        desk.rlhf(*words, "--out", str(tmp_path / name))
        alone = Manifest.read(tmp_path / name)
        assert alone.fingerprint == manifest.fingerprint, name
        if name in DETERMINISTIC:
            assert alone.digest == manifest.digest, name


def test_inline_and_process_make_the_same(finished):
    desk, _ = finished
    changes = ("resources.launcher=process", "scale.iterations=1", "data.held_out=")
    desk.rlhf("run", str(desk.experiment), "--name", "p1", *(word for c in changes for word in ("--set", c)))
    made = artifacts_of(desk.folder / "runs/p1")
    assert {artifact.manifest.stage for artifact in made} == {"rollout", "label", "score", "advantage", "update"}
    for artifact in made:
        inline = desk.folder / "runs/small" / artifact.path.relative_to(desk.folder / "runs/p1")
        assert artifact.manifest.fingerprint == Manifest.read(inline).fingerprint, inline


def test_a_changed_mind_overwrites_nothing(finished):
    desk, _ = finished
    refused = desk.rlhf("run", str(desk.experiment), "--set", "sft.epochs=31", code=2)
    assert "sft.epochs: 30 -> 31" in refused.stderr
    assert "runs/small-base/sft" in refused.stderr
    assert "epochs = 30" in (desk.folder / "runs/small/experiment.toml").read_text()


def test_more_iterations_go_on_from_the_last(finished):
    desk, _ = finished
    shared = {p: p.stat().st_mtime_ns for p in (desk.folder / "runs/small").rglob("0*/*/manifest.json")}
    planned = desk.rlhf("run", str(desk.experiment), "--set", "scale.iterations=3", "--dry-run").stdout
    assert "next: 0002/rollouts-0" in planned
    assert all(path.stat().st_mtime_ns == made for path, made in shared.items())


def test_dry_run_prints_the_resolved_experiment_and_makes_nothing(desk):
    said = desk.rlhf("run", str(desk.experiment), "--name", "not-there", "--set", "base=not-there-base", "--dry-run")
    assert 'kind = "mixed_outcomes"' in said.stdout
    assert "next: prompts" in said.stdout
    assert not (desk.folder / "runs/not-there").exists()


def test_status_lists_every_artifact_and_what_is_stale(finished, tmp_path):
    import shutil

    desk, _ = finished
    said = desk.rlhf("status", "runs/small").stdout
    assert "0001/advantages" in said and "stale" not in said
    shutil.copytree(desk.folder / "runs", tmp_path / "runs")
    labels = tmp_path / "runs/small/0001/labels-0/manifest.json"
    labels.write_text(override_digest(labels.read_text()))
    stale = desk.__class__(tmp_path).rlhf("status", "runs/small").stdout
    assert any("0001/advantages" in line and "stale" in line for line in stale.splitlines())


def override_digest(manifest: str) -> str:
    import json

    return json.dumps(override(json.loads(manifest), ["digest=changed"]))


def test_show_explains_columns_and_selects_rows(finished):
    desk, _ = finished
    said = desk.rlhf("show", "runs/small/0000/labels-0", "--rows", "2", "--where", "not keep").stdout
    assert "what the labeler said, before any shaping" in said
    assert "rows where not keep" in said
    assert "groups/kept" in said
    wrong = desk.rlhf("show", "runs/small/0000/labels-0", "--where", "nonsense = 1", code=2)
    assert "nonsense" in wrong.stderr


@pytest.mark.parametrize("name", list(CONTRACTS))
def test_contracts_are_printed(desk, name):
    if CONTRACTS[name].is_table:
        assert CONTRACTS[name].fields[0].name in desk.rlhf("contracts", name).stdout


def test_the_recipe_of_the_contributing_page_runs(finished):
    desk, _ = finished
    page = (ROOT / ".github/CONTRIBUTING.md").read_text(encoding="utf-8")
    (desk.folder / "mine.toml").write_text(re.search(r"```toml\n(.*?)```", page, re.DOTALL)[1])
    desk.rlhf("run", str(desk.experiment), "--recipe", "mine.toml", "--name", "mine", "--set", "scale.iterations=1")
    made = desk.folder / "runs/mine/0000"
    assert sorted(path.name for path in made.iterdir()) == ["advantages", "labels-0", "policy", "rollouts-0"]
