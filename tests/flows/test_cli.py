"""Wrong requests end with exit code 2, say what, where and what to type next, and load no model."""

import json
import subprocess
import sys

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
    "unknown engine": (["small.toml", "--set", "resources.engine=vlm"], "vllm, transformers, scripted"),
    "unknown stage": (["small.toml", "--set", "resources.launchers.updat=torchrun"], "no stage is called 'updat'"),
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
    "no documents to mix in": (
        [
            "small.toml",
            "--recipe",
            "instructgpt",
            "--name",
            "i",
            "--set",
            "base=i",
            "--set",
            "recipe_changes.instructgpt.update.minibatches=1",
        ],
        "data.documents",
    ),
    "beams at a temperature": (
        [
            "small.toml",
            "--recipe",
            "rloo",
            "--name",
            "b",
            "--set",
            "base=b",
            "--set",
            "feedback.beams=4",
            "--set",
            "feedback.temperature=0.7",
        ],
        "temperature",
    ),
    "a policy's loss for the critic": (
        [
            "small.toml",
            "--recipe",
            "vc_ppo",
            "--set",
            "recipe_changes.vc_ppo.update.minibatches=1",
            "--set",
            "recipe_changes.vc_ppo.critic.loss={kind='nll'}",
        ],
        "returns",
    ),
    "unreadable --set": (["small.toml", "--set", "scale"], "write --set table.name=value"),
}


@pytest.mark.parametrize(("words", "said"), BAD_RUNS.values(), ids=BAD_RUNS)
def test_wrong_requests(desk, words, said):
    before = list(desk.folder.glob("runs/*/sft"))
    assert said in desk.refusal("run", *words)
    assert list(desk.folder.glob("runs/*/sft")) == before


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
    rlhf = desk.refusal
    refused = rlhf("run", "small.toml", "--name", "u", "--set", "base=u", "--set", f"data.prompts={{files=['{path}']}}")
    assert "no answer" in refused
    assert not (desk.folder / "runs/u/sft").exists()


@pytest.mark.parametrize(("recipe", "grader"), [("rloo", "exact"), ("ttrl", "none")])
def test_prompts_that_nobody_can_judge_are_refused_before_any_model(desk, tmp_path, recipe, grader):
    path = rows(tmp_path / "open.jsonl", {"prompt": "1+1="}, {"prompt": "1+2="})
    data = f"data.prompts={{files=['{path}'], grader='{grader}'}}"
    less = [f"recipe_changes.{recipe}.update.minibatches=1", "data.held_out=", f"base=j-{recipe}"]
    words = [word for change in (data, *less) for word in ("--set", change)]
    refused = desk.refusal("run", "small.toml", "--recipe", recipe, "--name", f"j-{recipe}", *words)
    assert "answer" in refused or "grader" in refused
    assert not (desk.folder / f"runs/j-{recipe}/sft").exists()


def test_held_out_prompts_may_be_trained_on_without_their_answers(desk, tmp_path):
    path = rows(tmp_path / "same.jsonl", *({"prompt": f"1+1+{n}=", "answer": str(n + 2)} for n in range(1, 9)))
    words = ["run", "small.toml", "--set", "data.test_time=true", "--set", "scale.iterations=1"]
    for part in ("prompts", "held_out"):
        words += ["--set", f"data.{part}={{files=['{path}']}}"]
    refused = desk.refusal(*words, "--recipe", "grpo", "--name", "t-grpo", "--set", "base=t-grpo")
    assert "recipe grpo learns from answers" in refused
    assert not (desk.folder / "runs/t-grpo/0000").exists()
    demonstrated = f"data.demonstrations={{files=['{path}']}}"
    again = desk.refusal(*words, "--recipe", "ttrl", "--name", "t-d", "--set", "base=t-d", "--set", demonstrated)
    assert "8 held-out prompts are also trained on" in again
    desk.rlhf(*words, "--recipe", "rlsc", "--name", "t-rlsc", "--set", "base=t-rlsc")
    assert (desk.folder / "runs/t-rlsc/0000/policy").is_dir()


@pytest.mark.parametrize("part", ["prompts", "demonstrations"])
def test_held_out_prompts_may_not_be_trained_on(desk, tmp_path, part):
    path = rows(tmp_path / "same.jsonl", {"prompt": "1+1=", "answer": "2"})
    same = [f"data.{name}={{files=['{path}']}}" for name in (part, "held_out")]
    refused = desk.refusal(
        "run", "small.toml", "--name", f"h-{part}", "--set", f"base=h-{part}", "--set", same[0], "--set", same[1]
    )
    assert "1 held-out prompts are also trained on" in refused
    assert f"runs/h-{part}/{part}" in refused


def test_held_out_documents_may_not_be_trained_on(desk, tmp_path):
    path = rows(tmp_path / "same.jsonl", {"text": "1+1=2"})
    words = [
        "--recipe",
        "grpo",
        "--name",
        "h-documents",
        "--set",
        "base=h-documents",
        "--set",
        "sft.documents_share=0.1",
    ]
    for name in ("documents", "held_out_documents"):
        words += ["--set", f"data.{name}={{files=['{path}']}}"]
    assert "1 held-out documents are also trained on" in desk.refusal("run", "small.toml", *words)


def test_unknown_stage_and_missing_input(desk, tmp_path):
    assert "ingest, sft, rollout" in desk.refusal("stage", "labell")
    assert "--rollouts" in desk.refusal("stage", "label", "--out", str(tmp_path / "o"))


def test_comparing_under_a_name_that_no_recipe_has(desk, walked):
    folder = str(walked("rloo").folder)
    assert "did you mean 'rloo'" in desk.refusal("compare", folder, "--recipes", "grpo,rlo")
    assert "recipe, stored" in desk.refusal("compare", folder, "--rewards", "theirs")


def test_comparing_what_is_not_there(desk, walked):
    run = walked("rloo")
    assert "iterations there: 0000, 0001, 0002" in desk.refusal("compare", str(run.folder), "--iteration", "7")
    assert "not a run" in desk.refusal("compare", str(run.base))


def test_help_loads_nothing_heavy():
    listing = (
        "import sys; sys.argv = ['rlhf', '--help']\nfrom flows import cli\ntry: cli.main()\nexcept SystemExit: pass\n"
    )
    heavy = "print('LOADED', {'torch', 'prefect', 'transformers', 'vllm', 'polars', 'duckdb'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", listing + heavy], capture_output=True, text=True, check=True)
    assert "LOADED set()" in said.stdout


@pytest.mark.parametrize("words", [["recipes"], ["stages"], ["contracts"], ["recipes", "dapo"]], ids=" ".join)
def test_tables_are_printed(desk, words):
    assert len(desk.rlhf(*words).stdout.splitlines()) > 5


def test_results_of_what_is_no_run_or_not_evaluated_are_refused(desk, tmp_path):
    assert "not a run" in desk.refusal("results", str(tmp_path))
    (tmp_path / "experiment.toml").touch()
    assert "evaluated iterations there: none" in desk.refusal("results", str(tmp_path))


def test_the_summary_of_a_run_can_be_had_again_as_a_table(finished):
    desk, _ = finished
    said = desk.rlhf("results", "runs/small").stdout
    assert "small, iteration 2" in said
    assert "win rate" in said


def test_what_goes_with_tokens_is_refused_without_them(desk, walked):
    labels = walked("grpo").iteration(0) / "labels-0"
    assert "go with --tokens" in desk.refusal("show", str(labels), "--column", "advantages")
