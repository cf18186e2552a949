"""The loop's own decisions: rounds of sampling, surplus, shortage. A script speaks, so every outcome is known."""

import json
import math

import pytest

from flows.foundations import Foundations, foundations
from flows.online import Now, collect, online
from flows.run import Run
from pipeline.artifacts import Artifact
from pipeline.experiment import Experiment
from pipeline.models import checkpoint
from pipeline.models.fresh import ModelSpec, create
from pipeline.text import Chat


def direct(run, stage, out, settings, **paths) -> Artifact:
    """Perform a stage here and now, without Prefect."""
    return stage.run(out, settings, **paths)


@pytest.fixture
def make(desk, tmp_path):
    """A run whose policy gives mixed answers to the prompts that `mixed` picks, and a wrong one to all others."""

    def made(mixed, *changes: str) -> tuple[Run, Foundations]:
        model, tokenizer = create(
            ModelSpec(layers=1, width=64, heads=2, kv_heads=1, max_position=32), ["0123456789+=,;"], 0
        )
        policy = tmp_path / "policy"
        checkpoint.save(model, tokenizer, policy)
        experiment = Experiment.load(
            desk.experiment,
            [
                f"models.policy={policy}",
                "sft.enabled=false",
                "resources.engine=scripted",
                "scale.iterations=1",
                "gates.mismatch=off",  # a script does not know how likely its words are
                *changes,
            ],
            name="scripted",
        )
        run = Run(experiment, tmp_path / "runs", direct)
        base = foundations(run)
        chat = Chat(policy)
        script = {"*": [chat.response_tokens(";0")]}
        for number, row in enumerate(base.prompts.table().to_pylist()):
            if mixed(number):
                answers = [chat.response_tokens(f";{row['answer']}"), chat.response_tokens(";0")]
                script[",".join(map(str, chat.prompt_tokens(row["messages"])))] = answers
        (policy / "script.json").write_text(json.dumps(script))
        return Run(experiment, tmp_path / "runs", direct), foundations(run)

    return made


def test_enough_mixed_groups_need_one_round(make):
    run, base = make(lambda number: True)
    made, cursor = collect(run, base, Now(base.policy), 0)
    assert (len(made.rollouts), made.kept, cursor) == (1, 6, 6)


def test_a_second_round_asks_for_what_the_first_lacked(make):
    run, base = make(lambda number: number % 2 == 0)
    made, cursor = collect(run, base, Now(base.policy), 0)
    first, second = made.labels
    kept = int(first.stats["groups/kept"])
    assert 0 < kept < 6
    assert second.stats["groups/seen"] == math.ceil((6 - kept) / max(kept / 6, 1 / 3))
    assert cursor == 6 + second.stats["groups/seen"]
    assert made.kept <= 6


def test_surplus_groups_are_kept_on_disk_and_marked(make):
    run, base = make(lambda number: True)
    made, _ = collect(run, base, Now(base.policy, keep_rate=0.5), 0)
    labels = made.labels[0]
    assert labels.stats["groups/seen"] == 12
    reasons = labels.table()["dropped"].to_pylist()
    assert reasons.count("surplus group") == 6 * 4
    assert made.passed == 1.0


def test_without_any_mixed_group_the_policy_stays(make, capsys):
    run, base = make(lambda number: False)
    assert online(run, base, Now.start(base), 0)[0].path == base.policy.path
    assert not (run.folder / "0000/policy").exists()
    assert (run.folder / "0000/labels-1").exists()
    reasons = Artifact.open(run.folder / "0000/labels-1").table()["dropped"].to_pylist()
    assert set(reasons) == {"constant outcomes"}


def test_a_short_iteration_trains_on_what_there_is(make):
    run, base = make(lambda number: number == 0, "scale.groups=20", "recipe_changes.dapo.update.minibatches=1")
    policy = online(run, base, Now.start(base), 0)[0]
    assert policy.path == run.folder / "0000/policy"
    table = Artifact.open(run.folder / "0000/advantages").table()
    drawn = sorted(set(table["prompt_id"].to_pylist()))
    assert len({name.partition("#")[0] for name in drawn}) == 1  # one prompt, each draw of it a group of its own
    assert table.num_rows == 4 * len(drawn) < 4 * 20


def test_the_cursor_goes_on_where_the_last_iteration_stopped(make):
    run, base = make(lambda number: True, "scale.iterations=2")
    online(run, base, Now.start(base), 0)
    ids = [
        set(Artifact.open(run.folder / f"{i:04d}/rollouts-0").table()["prompt_id"].to_pylist()) for i in range(2)
    ]  # fmt: skip
    assert not ids[0] & ids[1]


def test_resuming_performs_only_what_is_missing(make):
    import shutil

    run, base = make(lambda number: True)
    online(run, base, Now.start(base), 0)
    digest = Artifact.open(run.folder / "0000/policy").manifest.digest
    shutil.rmtree(run.folder / "0000/policy")
    shutil.rmtree(run.folder / "0000/advantages")
    performed = []

    def counting(run, stage, out, settings, **paths):
        if stage.committed(out, settings, **paths) is None:
            performed.append(stage.name)
        return stage.run(out, settings, **paths)

    online(Run(run.experiment, run.root, counting), base, Now.start(base), 0)
    assert performed == ["advantage", "update"]
    assert Artifact.open(run.folder / "0000/policy").manifest.digest == digest


def test_an_instruct_checkpoint_takes_the_new_models_place_with_one_change(desk, tmp_path):
    """Its own chat template, end token and longer positions; `models.new` of the experiment stays where it is."""
    model, tokenizer = create(
        ModelSpec(layers=1, width=64, heads=2, kv_heads=1, max_position=128), ["0123456789+=,;<|>\nuserainst"], 0
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    checkpoint.save(model, tokenizer, tmp_path / "instruct")
    longer = ["scale.prompt_tokens=60", "scale.response_tokens=60", "scale.iterations=1"]
    experiment = Experiment.load(desk.experiment, [f"models.policy={tmp_path / 'instruct'}", *longer], name="instruct")
    base = foundations(Run(experiment, tmp_path / "runs", direct))
    assert base.policy.manifest.inputs["policy"][0].path == str(tmp_path / "instruct")
    made, _ = collect(Run(experiment, tmp_path / "runs", direct), base, Now(base.policy), 0)
    asked = Chat(base.policy.path).tokenizer.decode(made.rollouts[0].table()["prompt_tokens"][0].as_py())
    assert asked.startswith("<|user|>\n") and asked.endswith("\n<|assistant|>\n")
