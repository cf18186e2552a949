import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.artifacts import Artifact, Outbox
from pipeline.contracts import ADVANTAGES, CONTRACTS, DEMONSTRATIONS, DOCUMENTS, LABELS, PROMPTS, RANKINGS, ROLLOUTS
from pipeline.errors import ArtifactError, ContractError, ExperimentError, StorageError
from pipeline.exchange import SHAPES, exported, write


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def made(tmp_path):
    """Writes an artifact of some rows, made of others."""

    def make(contract, rows, name=None, settings=None, columns=None, **inputs):
        target = tmp_path / (name or contract.name)
        given = {kind: [one.record()] for kind, one in inputs.items()}
        fingerprint = f"{abs(hash((str(target), str(rows)))):064x}"
        out = Outbox(target, contract, "hand", 1, fingerprint, settings or {}, given)
        out.write(0, pa.Table.from_pylist(rows, schema=contract.schema(columns or rows[0])))
        return out.commit()

    return make


def rows_of(artifact, to):
    return list(exported(artifact, to).rows)


@pytest.fixture
def prompts(made):
    rows = [
        {"prompt_id": "a", "messages": [user("1+1=")], "answer": "2", "grader": "math", "source": "sums"},
        {"prompt_id": "b", "messages": [{"role": "system", "content": "Be brief."}, user("?")], "answer": None,
         "grader": "none", "source": "sums"},
    ]  # fmt: skip
    return made(PROMPTS, rows, settings={"split": "held_out"})


def test_prompts_are_rows_of_verls(prompts):
    assert rows_of(prompts, "verl") == [
        {
            "data_source": "sums", "prompt": [user("1+1=")], "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "2"},
            "extra_info": {"index": 0, "split": "test", "prompt_id": "a"},
        },
        {
            "data_source": "sums", "prompt": [{"role": "system", "content": "Be brief."}, user("?")],
            "ability": "none", "reward_model": {"style": "rule", "ground_truth": None},
            "extra_info": {"index": 1, "split": "test", "prompt_id": "b"},
        },
    ]  # fmt: skip


def test_prompts_are_prompts_with_a_solution_for_trl(prompts):
    first, second = rows_of(prompts, "trl")
    assert first == {
        "prompt": [user("1+1=")], "solution": "2", "grader": "math", "source": "sums", "prompt_id": "a"
    }  # fmt: skip
    assert second["solution"] is None


@pytest.fixture
def demonstrations(made):
    turns = [[user("Hi"), assistant("Hello"), user("Bye"), assistant("Bye!")], [assistant("I begin")]]
    return made(DEMONSTRATIONS, [{"prompt_id": str(n), "messages": m, "source": "s"} for n, m in enumerate(turns)])


def test_demonstrations_are_messages_for_verl(demonstrations):
    assert rows_of(demonstrations, "verl") == [
        {"messages": [user("Hi"), assistant("Hello"), user("Bye"), assistant("Bye!")], "data_source": "s"},
        {"messages": [assistant("I begin")], "data_source": "s"},
    ]


def test_demonstrations_are_prompt_and_completion_for_trl(demonstrations):
    export = exported(demonstrations, "trl")
    assert list(export.rows) == [
        {"prompt": [user("Hi"), assistant("Hello"), user("Bye")], "completion": [assistant("Bye!")], "source": "s"}
    ]
    assert export.left_out == {"a conversation that the assistant begins: there is no prompt": 1}


def test_documents_are_text_for_trl_and_nothing_for_verl(made):
    documents = made(DOCUMENTS, [{"document_id": "a", "text": "once", "source": "s"}])
    assert rows_of(documents, "trl") == [{"text": "once", "source": "s"}]
    with pytest.raises(ExperimentError, match="verl has no rows for documents") as refusal:
        exported(documents, "verl")
    assert "--to trl" in refusal.value.do


@pytest.fixture
def rankings(made):
    def make(*judged, messages=None, name="rankings"):
        rows = [
            {
                "ranking_id": str(n), "prompt_id": "p", "messages": messages or [user("Who?")],
                "responses": responses, "ranks": ranks, "ratings": ratings, "annotator": "anna", "source": "s",
            }
            for n, (responses, ranks, ratings) in enumerate(judged)
        ]  # fmt: skip
        return made(RANKINGS, rows, name=name)

    return make


def test_a_ranking_is_every_pair_of_better_and_worse_and_ties_are_counted(rankings):
    export = exported(rankings((["x", "y", "z"], [2, 0, 0], [1.0, 4.5, 4.0])), "trl")
    about = {"annotator": "anna", "source": "s", "prompt": [user("Who?")], "rejected": [assistant("x")]}
    assert list(export.rows) == [
        {**about, "chosen": [assistant("y")], "margin": 3.5}, {**about, "chosen": [assistant("z")], "margin": 3.0},
    ]  # fmt: skip
    assert export.left_out == {"pairs that tie": 1}
    assert export.remarks == []


def test_there_are_no_margins_unless_all_rankings_have_ratings(rankings):
    export = exported(rankings((["x", "y"], [0, 1], [2.0, 1.0]), (["x", "y"], [1, 0], None)), "trl")
    assert [sorted(row) for row in export.rows] == [["annotator", "chosen", "prompt", "rejected", "source"]] * 2
    assert export.remarks == ["no column margin: not every ranking has ratings"]
    assert "margin" not in export.schema.names


def test_pairs_are_dialogues_of_text_for_verl(rankings):
    talk = [user("Hi"), assistant("Yes?"), user("Who?")]
    assert rows_of(rankings((["x", "y"], [1, 0], None), messages=talk), "verl") == [
        {
            "prompt": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Who?\n\nAssistant:", "chosen": " y",
            "rejected": " x", "annotator": "anna", "data_source": "s",
        }
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([user("Who?")], "I am\n\nHuman: you"),
        ([user("Who?")], " padded"),
        ([{"role": "system", "content": "Be brief."}, user("Who?")], "x"),
        ([user("Who?\n\nAssistant: I")], "x"),
    ],
)
def test_what_a_dialogue_of_text_cannot_hold_is_left_out_and_counted(rankings, messages, text):
    export = exported(rankings(([text, "fine"], [0, 1], None), messages=messages), "verl")
    assert list(export.rows) == []
    assert export.left_out == {"pairs that no dialogue of Human: and Assistant: can hold": 1}


@pytest.mark.parametrize("to", SHAPES)
def test_what_has_no_rows_says_which_have(made, to):
    row = {"prompt_id": "a", "sample": 0, "old_logprobs": [-1.0]}
    with pytest.raises(ExperimentError, match=f"{to} has no rows for scores") as refusal:
        exported(made(CONTRACTS["scores"], [row]), to)
    assert "prompts, demonstrations" in refusal.value.do


# Rollouts -------------------------------------------------------------------------------------------------------------


def rollout(prompt_id, sample, text="two", **columns):
    return {
        "prompt_id": prompt_id, "sample": sample, "prompt_tokens": [5, 6], "response_tokens": [7, 8], "response": text,
        "sampler_logprobs": [-0.5, -0.25], "finish": "stop", "seed": 3, **columns,
    }  # fmt: skip


def label(prompt_id, sample, reward, keep=True):
    row = {field.name: None for field in LABELS.fields} | {"prompt_id": prompt_id, "sample": sample}
    return row | {"reward": reward, "keep": keep, "dropped": None if keep else "constant outcomes"}


def credit(prompt_id, sample, advantages):
    return {
        "prompt_id": prompt_id, "sample": sample, "prompt_tokens": [5, 6], "response_tokens": [7, 8],
        "advantages": advantages, "returns": None, "reward": 1.0, "shaped_reward": 1.0, "correct": None,
        "finished": True,
    }  # fmt: skip


@pytest.fixture
def iteration(made, prompts):
    """Rollouts of iteration 4; and, as asked for, their labels and advantages beside them."""

    def make(labels=None, advantages=None):
        rows = [rollout("a", 0), rollout("a", 1, "three"), rollout("b#1", -1), rollout("b#1", 0)]
        rollouts = made(ROLLOUTS, rows, "run/0004/rollouts-0", prompts=prompts)
        if labels:
            one = made(LABELS, labels, "run/0004/labels-0", rollouts=rollouts, prompts=prompts)
            other = [{**row, "reward": 99.0} for row in labels]
            made(LABELS, other, "run/0004/labels-0.lenient", rollouts=rollouts, prompts=prompts)
            if advantages:
                made(ADVANTAGES, advantages, "run/0004/advantages", rollouts=rollouts, labels=one)
        return rollouts

    return make


LABELLED = [label("b#1", 0, 0.0), label("a", 1, -1.0, keep=False), label("a", 0, 1.0)]


def test_rollouts_alone_are_prompts_and_completions(iteration):
    export = exported(iteration(), "trl")
    first, *_ = list(export.rows)
    assert first == {
        "step": 4, "prompt": [user("1+1=")], "completion": [assistant("two")], "prompt_id": "a", "sample": 0,
        "prompt_tokens": [5, 6], "response_tokens": [7, 8], "sampler_logprobs": [-0.5, -0.25], "finish": "stop",
        "seed": 3,
    }  # fmt: skip
    assert export.remarks == [
        "no column reward: nothing beside tells of it", "no column advantage: nothing beside tells of it"
    ]  # fmt: skip


def test_rewards_and_advantages_are_found_by_key_and_by_what_they_were_made_of(iteration):
    given = [credit("b#1", 0, [0.5, 0.75]), credit("a", 0, [2.0, 2.0])]
    export = exported(iteration(LABELLED, given), "trl")
    rows = list(export.rows)
    assert [(row["prompt_id"], row["sample"]) for row in rows] == [("a", 0), ("a", 1), ("b#1", -1), ("b#1", 0)]
    assert [row["reward"] for row in rows] == [1.0, -1.0, None, 0.0]
    assert [row["advantage"] for row in rows] == [2.0, None, None, None]
    assert [row["prompt"][-1]["content"] for row in rows] == ["1+1=", "1+1=", "?", "?"]
    assert export.left_out == {
        "rewards of rows without a label": 1, "advantages of rows that do not train": 2,
        "advantages that differ from token to token": 1,
    }  # fmt: skip
    assert export.remarks == []


def test_labels_that_are_named_are_those_that_are_taken(iteration):
    rollouts = iteration(LABELLED)
    lenient = Artifact.open(rollouts.path.parent / "labels-0.lenient")
    assert [row["reward"] for row in rows_of(lenient, "trl")] == [99.0, 99.0, None, 99.0]


def test_prompts_that_are_gone_or_other_than_they_were_are_named(iteration, prompts, made):
    rollouts = iteration()
    place = prompts.path.rename(prompts.path.with_name("elsewhere"))
    with pytest.raises(ArtifactError, match="its prompts are gone"):
        exported(rollouts, "trl")
    place.rename(prompts.path.with_name("kept"))
    made(PROMPTS, prompts_of("zzz"))
    with pytest.raises(ArtifactError, match="the prompts are not those"):
        exported(rollouts, "trl")


def prompts_of(*ids):
    return [
        {"prompt_id": name, "messages": [user("?")], "answer": None, "grader": "none", "source": "s"} for name in ids
    ]


def test_responses_that_answer_no_prompt_are_refused(made):
    rollouts = made(ROLLOUTS, [rollout("a", 0), rollout("x", 0)], prompts=made(PROMPTS, prompts_of("a")))
    with pytest.raises(ContractError, match="1 rows answer no prompt"):
        rows_of(rollouts, "trl")


def test_rollouts_that_were_brought_in_need_labels_to_know_their_prompts(made, prompts):
    rollouts = made(ROLLOUTS, [rollout("a", 0)])
    with pytest.raises(ArtifactError, match="nothing says which prompts"):
        exported(rollouts, "trl")
    made(LABELS, [label("a", 0, 1.0)], rollouts=rollouts, prompts=prompts)
    assert [row["reward"] for row in rows_of(rollouts, "trl")] == [1.0]


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", SHAPES)
def test_both_kinds_of_file_hold_the_same_rows(prompts, tmp_path, to):
    lines, parquet = tmp_path / "new" / "a.jsonl", tmp_path / "a.parquet"
    assert write(exported(prompts, to), lines) == write(exported(prompts, to), parquet) == 2
    assert [json.loads(line) for line in lines.read_text("utf-8").splitlines()] == pq.read_table(parquet).to_pylist()
    assert pq.read_table(parquet).schema.equals(exported(prompts, to).schema)


def test_a_file_is_there_whole_or_not_at_all(prompts, tmp_path):
    def broken():
        yield next(export.rows)
        raise RuntimeError("killed")

    for name in ("a.jsonl", "a.parquet"):
        export = exported(prompts, "trl")
        with pytest.raises(RuntimeError, match="killed"):
            write(type(export)(export.schema, broken()), tmp_path / "out" / name)
    assert list((tmp_path / "out").iterdir()) == []


def test_no_rows_make_no_file(rankings, tmp_path):
    export = exported(rankings((["x", "y"], [0, 0], None)), "trl")
    assert write(export, tmp_path / "out" / "a.jsonl") == 0
    assert list((tmp_path / "out").iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(prompts, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write"):
        write(exported(prompts, "trl"), tmp_path / "file" / "a.jsonl")
