"""Wrong requests end with exit code 2, say what, where and what to type next, and load no model."""

import json
import subprocess
import sys
import time

import pytest

BAD_RUNS = {
    "unknown experiment": (["nosuch"], "no experiment is called 'nosuch'"),
    "missing file": (["nosuch.toml"], "no such file: nosuch.toml"),
    "unknown recipe": (["small.toml", "--recipe", "dappo"], "did you mean 'dapo'"),
    "unknown piece": (
        ["small.toml", "--set", "recipe_changes.dapo.advantage.kind=gaee"],
        "no advantage is called 'gaee'",
    ),
    "unknown setting of a piece": (
        ["small.toml", "--set", "recipe_changes.dapo.normalize={kind='group_std', epsilon=1.0}"],
        "epsilon",
    ),
    "unknown field": (["small.toml", "--set", "scale.iteration=3"], "scale.iteration"),
    "wrong type": (["small.toml", "--set", "scale.groups=many"], "scale.groups"),
    "group of one": (["small.toml", "--set", "recipe_changes.dapo.rollout.group_size=1"], "group_size >= 2"),
    "unknown engine": (["small.toml", "--set", "resources.engine=vlm", "--name", "e"], "vllm, transformers, scripted"),
    "unknown grader": (
        ["small.toml", "--set", "data.prompts.grader=maths", "--set", "data.prompts.source=files"],
        "maths",
    ),
    "no such data": (
        ["small.toml", "--name", "d", "--set", "base=d", "--set", "data.prompts={files=['nowhere.jsonl']}"],
        "nowhere.jsonl",
    ),
    "not a checkpoint": (
        ["small.toml", "--name", "c", "--set", "base=c", "--set", "models.policy=runs"],
        "config.json",
    ),
    "unreadable --set": (["small.toml", "--set", "scale"], "write --set table.name=value"),
}


@pytest.mark.parametrize(("words", "said"), BAD_RUNS.values(), ids=BAD_RUNS)
def test_wrong_requests(desk, words, said):
    refused = desk.rlhf("run", *words, code=2)
    assert said in refused.stderr
    assert "Traceback" not in refused.stderr


def rows(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_garbage_in_a_jsonl_is_named_with_file_and_line(desk, tmp_path):
    good = {"question": "1+1=", "answer": "2"}
    path = rows(tmp_path / "bad.jsonl", good, good | {"question": "2+1="}, '{"question": "x", \n', good)
    refused = desk.rlhf(
        "stage", "ingest", "--files", path, "--set", "kind=prompts", "--out", str(tmp_path / "o"), code=2
    )
    assert f"{path}:3" in refused.stderr
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "no rows"),
        ([{"text": "x"}], "no column for messages or prompt; found text"),
        ([{"prompt": 7}], "none of 1 rows fits"),
    ],
    ids=["empty dataset", "missing column", "wrong type"],
)
def test_unusable_data(desk, tmp_path, lines, said):
    path = rows(tmp_path / "data.jsonl", *lines)
    refused = desk.rlhf(
        "stage", "ingest", "--files", path, "--set", "kind=prompts", "--out", str(tmp_path / "o"), code=2
    )
    assert said in refused.stderr


def test_prompts_without_answers_are_refused_before_any_model(desk, tmp_path):
    path = rows(tmp_path / "open.jsonl", {"prompt": "1+1="}, {"prompt": "1+2="})
    refused = desk.rlhf(
        "run", "small.toml", "--name", "u", "--set", "base=u-base",
        "--set", f"data.prompts={{files=['{path}']}}", code=2,
    )  # fmt: skip
    assert "no answer" in refused.stderr
    assert not (desk.folder / "runs/u-base/sft").exists()


def test_held_out_prompts_may_not_be_trained_on(desk, tmp_path):
    path = rows(tmp_path / "same.jsonl", {"prompt": "1+1=", "answer": "2"})
    refused = desk.rlhf(
        "run", "small.toml", "--name", "h", "--set", "base=h-base",
        "--set", f"data.prompts={{files=['{path}']}}", "--set", f"data.held_out={{files=['{path}']}}", code=2,
    )  # fmt: skip
    assert "held-out prompts are also training prompts" in refused.stderr


def test_unknown_stage_and_missing_input(desk, tmp_path):
    assert "ingest, sft, rollout" in desk.rlhf("stage", "labell", code=2).stderr
    assert "--rollouts" in desk.rlhf("stage", "label", "--out", str(tmp_path / "o"), code=2).stderr


def test_help_loads_nothing_heavy():
    listing = (
        "import sys; sys.argv = ['rlhf', '--help']\nfrom flows import cli\ntry: cli.main()\nexcept SystemExit: pass\n"
    )
    heavy = "print('LOADED', [m for m in ('torch', 'prefect', 'transformers', 'vllm', 'polars', 'duckdb') if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", listing + heavy], capture_output=True, text=True, check=True)
    assert "LOADED []" in said.stdout


@pytest.mark.parametrize("words", [["recipes"], ["stages"], ["contracts"], ["recipes", "dapo"]], ids=" ".join)
def test_tables_are_printed(desk, words):
    started = time.monotonic()
    assert len(desk.rlhf(*words).stdout.splitlines()) > 5
    assert time.monotonic() - started < 60
