import json
import shutil
import subprocess

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import exchange
from pipeline.artifacts import Artifact
from pipeline.contracts import DEMONSTRATIONS, DOCUMENTS, PROMPTS, RANKINGS, ROLLOUTS
from pipeline.errors import ArtifactError, ExperimentError, InputError
from pipeline.experiment import Experiment
from pipeline.models.checkpoint import save
from pipeline.models.fresh import ModelSpec, create
from pipeline.sources.rows import identity, reference
from pipeline.text import Chat
from stages.ingest import REJECTED, Settings, grouped, ingest, parts
from stages.label import Settings as LabelSettings
from stages.label import label

GSM8K = {"question": "What is 6 times 7?", "answer": "6 times 7 is <<6*7=42>>42.\n#### 42"}


@pytest.fixture
def ingested(tmp_path):
    """`ingest` of files with settings, into a new place."""

    def run(*files, tokenizer=None, out="out", **settings):
        given = Settings.of(None, {"kind": "prompts", **settings})
        return ingest.run(tmp_path / out, given, files=list(files), tokenizer=tokenizer)

    return run


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A checkpoint whose tokenizer knows every byte."""
    place = tmp_path_factory.mktemp("bytes") / "policy"
    save(*create(ModelSpec(layers=1, width=32, heads=1, kv_heads=1, tokenizer="bpe"), ["\\boxed{42}"], 0), place)
    return place


def rejected(artifact):
    return [json.loads(line) for line in (artifact.path / REJECTED).read_text(encoding="utf-8").splitlines()]


def user(text):
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("kind", "contract"), [("prompts", PROMPTS), ("demonstrations", DEMONSTRATIONS), ("documents", DOCUMENTS)]
)
def test_the_built_in_world(made_of, tmp_path, sound, kind, contract):
    made, again = made_of(tmp_path / "one", kind, 15), made_of(tmp_path / "two", kind, 15)
    sound(made)
    assert (made.contract, made.stats["rows"]) == (contract, 15)
    assert made.manifest.digest == again.manifest.digest


def test_training_and_held_out_prompts_share_nothing(made_of, tmp_path, prompts):
    held_out = made_of(tmp_path / "held_out", "prompts", 2, split="held_out").table()
    assert not set(held_out["prompt_id"].to_pylist()) & set(prompts.table()["prompt_id"].to_pylist())
    assert set(held_out["source"].to_pylist()) == {"arithmetic/held_out"}


def test_ids_of_built_in_prompts_and_demonstrations_are_those_of_their_messages(prompts, demonstrations):
    for row in prompts.table().to_pylist():
        assert row["prompt_id"] == identity(row["messages"])
    for row in demonstrations.table().to_pylist():
        assert row["prompt_id"] == identity(row["messages"][:-1])


def test_documents_of_the_built_in_world_have_splits(made_of, tmp_path):
    train, held_out = (
        set(made_of(tmp_path / split, "documents", 2, split=split).table()["text"].to_pylist())
        for split in ("train", "held_out")
    )
    assert len(train) == len(held_out) == 2
    assert not train & held_out


def test_what_the_built_in_world_cannot_do_is_said(made_of, tmp_path):
    with pytest.raises(ExperimentError, match="how many rows"):
        made_of(tmp_path / "a", "prompts", None)
    with pytest.raises(ExperimentError, match="no split 'test'"):
        made_of(tmp_path / "b", "prompts", 3, split="test")
    with pytest.raises(ExperimentError, match="no split 'test'"):
        made_of(tmp_path / "d", "documents", 3, split="test")
    with pytest.raises(ExperimentError, match="no rankings"):
        made_of(tmp_path / "c", "rankings", 3)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("one step\nanother\n#### 42", "42"),
        ("#### 1,234 ", "1,234"),
        ("6 * 7 = 42\nA: 42", "42"),
        ("A: 42", "42"),
        ("\\frac{1}{2}", "\\frac{1}{2}"),
        ("a #### b #### 7", "7"),
        (42, "42"),
        ("", None),
        ("  ", None),
        (None, None),
        ("#### ", None),
        ("A:", None),
    ],
)
def test_the_reference_is_cut_out_of_a_worked_answer(answer, expected):
    assert reference(answer) == expected


def test_prompts_like_gsm8k(ingested, jsonl, sound):
    made = ingested(jsonl(GSM8K, {"question": "And 2 + 2?", "answer": "A: 4"}, name="gsm8k.jsonl"), grader="math")
    sound(made)
    assert made.stats["rejected"] == 0
    assert not (made.path / REJECTED).exists()
    first, second = made.table().to_pylist()
    assert first == {
        "prompt_id": identity(user(GSM8K["question"])), "messages": user(GSM8K["question"]), "answer": "42",
        "grader": "math", "source": "gsm8k",
    }  # fmt: skip
    assert second["answer"] == "4"


def test_conversations_and_prompts_that_are_lists_of_turns(ingested, jsonl):
    turns = [{"role": "system", "content": "Be brief."}, *user("1+1?")]
    made = ingested(jsonl({"messages": turns, "answer": "2"}, {"prompt": [*turns, *user("Now!")], "answer": None}))
    first, second = made.table().to_pylist()
    assert first["messages"] == turns
    assert second["messages"] == [*turns, *user("Now!")]
    assert second["answer"] is None


def test_names_from_the_wild_and_the_names_of_the_file_given(ingested, jsonl):
    verl = {"data_source": "openai/gsm8k", "prompt": user("1+1?"), "reward_model": {"ground_truth": "2"}}
    (row,) = ingested(jsonl(verl, name="verl.jsonl")).table().to_pylist()
    assert (row["messages"], row["answer"], row["source"]) == (user("1+1?"), "2", "openai/gsm8k")
    odd = jsonl({"question": "no", "ask": "1+2?", "meta": {"gold": 3}}, name="odd.jsonl")
    made = ingested(odd, columns={"prompt": "ask", "answer": "meta.gold"}, name="mine", out="odd")
    (row,) = made.table().to_pylist()
    assert (row["messages"], row["answer"], row["source"]) == (user("1+2?"), "3", "mine")


def test_files_may_name_their_columns_differently(ingested, jsonl):
    one = jsonl({"question": "1+1?", "answer": "2"}, name="one.jsonl")
    two = jsonl({"problem": "1+2?"}, {"problem": "1+3?", "solution": "4"}, name="two.jsonl")
    assert ingested(one, two).table()["answer"].to_pylist() == ["2", None, "4"]


def test_misfits_are_kept_aside_with_place_and_reason(ingested, jsonl):
    rows = [
        GSM8K,
        {"question": "", "answer": "1"},
        {"question": None, "answer": "1"},
        {"question": 7, "answer": "1"},
        {"messages": [{"role": "user"}]},
        {"messages": [*user("1+1?"), {"role": "assistant", "content": "2"}]},
        {"answer": "nothing asked"},
        GSM8K,
    ]
    path = jsonl(*rows)
    made = ingested(path)
    aside = rejected(made)
    assert [row["where"] for row in aside] == [f"{path}:{line}" for line in range(2, 9)]
    assert [row["row"] for row in aside] == rows[1:]
    for row, reason in zip(
        aside,
        ["empty turn", "no messages", "no messages", "without role and content", "not end with a turn of the user",
         "no messages", "repetition of prompt_id"],
        strict=True,
    ):  # fmt: skip
        assert reason in row["reason"]
    assert made.stats["rows"] + made.stats["rejected"] == len(rows)
    assert "7 do not fit" in (made.path / "log.txt").read_text()


def test_half_a_surrogate_pair_is_a_misfit_and_no_crash(ingested, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"question": "\\ud800?"}\n{"question": "1+1?", "answer": "\\udfff"}\n{"question": "whole?"}\n')
    made = ingested(path)
    assert made.stats["rows"] == 1
    assert ["surrogate" in row["reason"] for row in rejected(made)] == [True, True]
    assert rejected(made)[0]["row"]["question"] == "\ud800?"


def test_nothing_is_lost_when_nothing_fits(ingested, jsonl, tmp_path):
    path = jsonl({"question": ""}, {"question": "  "})
    with pytest.raises(InputError, match="none of 2 rows fits; the first: an empty turn") as error:
        ingested(path)
    assert error.value.where == f"{path}:1"
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_line_that_is_not_json_is_named(ingested, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GSM8K) + "\n{'question': \n")
    with pytest.raises(InputError) as error:
        ingested(path)
    assert error.value.where == f"{path}:2"


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_file(ingested, tmp_path, text):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match="no rows"):
        ingested(path)


def test_a_missing_column_is_told_with_what_there_is_and_how_to_name_it(ingested, jsonl):
    path = jsonl({"frage": "1+1?", "antwort": "2"})
    with pytest.raises(InputError) as error:
        ingested(path)
    told = str(error.value)
    assert "frage, antwort" in told
    assert f"{path}:1" in told
    assert "--set columns.messages=YOURS" in told
    assert "question" in told
    with pytest.raises(InputError, match="no column 'fragen' for prompt; found frage, antwort"):
        ingested(path, columns={"prompt": "fragen"})
    with pytest.raises(InputError, match="prompts have no column 'anwser'"):
        ingested(path, columns={"prompt": "frage", "anwser": "antwort"})
    made = ingested(path, columns={"prompt": "frage", "answer": "antwort"})
    assert made.table()["answer"].to_pylist() == ["2"]


def test_no_files_and_no_such_grader(ingested, jsonl, tmp_path):
    with pytest.raises(InputError, match="no files"):
        ingested()
    with pytest.raises(InputError, match="no such file"):
        ingested(tmp_path / "nowhere.jsonl")
    with pytest.raises(InputError, match="no grader is called 'maths'"):
        ingested(jsonl(GSM8K), grader="maths")


def test_count_takes_the_first_rows(ingested, jsonl):
    made = ingested(jsonl(*({"question": f"{n}?"} for n in range(5))), count=2)
    assert [turns[0]["content"] for turns in made.table()["messages"].to_pylist()] == ["0?", "1?"]


def test_demonstrations_from_messages_responses_and_worked_answers(ingested, jsonl, sound):
    whole = [*user("1+1?"), {"role": "assistant", "content": "2"}]
    made = ingested(
        jsonl({"messages": whole}, {"prompt": "1+2?", "response": "3"}, GSM8K, {"prompt": "1+3?"}),
        kind="demonstrations",
    )  # fmt: skip
    sound(made)
    rows = made.table().to_pylist()
    assert [row["messages"][-1]["content"] for row in rows] == ["2", "3", GSM8K["answer"]]
    assert rows[0]["prompt_id"] == identity(user("1+1?"))
    assert "no turn of the assistant" in rejected(made)[0]["reason"]


def test_documents(ingested, jsonl, sound):
    made = ingested(jsonl({"text": "One."}, {"text": ""}, {"text": "One."}, {"text": "Two."}), kind="documents")
    sound(made)
    assert made.table()["text"].to_pylist() == ["One.", "Two."]
    assert [row["reason"].split(" ")[0] for row in rejected(made)] == ["no", "a"]


def test_preferences_as_pairs_and_as_rankings(ingested, jsonl, sound):
    rows = [
        {"prompt": "1+1?", "chosen": "2", "rejected": "3"},
        {"prompt": "1+1?", "responses": ["2", "3", "11"], "ranks": [0, 1, 1], "annotator": 17},
    ]
    made = ingested(jsonl(*rows), kind="rankings")
    sound(made)
    pair, three = made.table().to_pylist()
    assert (pair["responses"], pair["ranks"], pair["annotator"]) == (["2", "3"], [0, 1], None)
    assert (three["responses"], three["ranks"], three["annotator"]) == (["2", "3", "11"], [0, 1, 1], "17")
    assert pair["prompt_id"] == three["prompt_id"] == identity(user("1+1?"))
    assert pair["ranking_id"] != three["ranking_id"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "?", "chosen": "a"}, "chosen without rejected"),
        ({"prompt": "?", "chosen": "a", "rejected": None}, "chosen without rejected"),
        ({"prompt": "?", "responses": ["a"], "ranks": [0]}, "fewer than two"),
        ({"prompt": "?", "responses": ["a", "b"], "ranks": [0]}, "as many ranks"),
        ({"prompt": "?", "responses": ["a", "b"], "ranks": ["first", "second"]}, "whole numbers"),
        ({"prompt": "?", "responses": ["a", "b"], "ranks": [0, 0.5]}, "whole numbers"),
        ({"messages": [*user("?"), {"role": "assistant", "content": "!"}], "chosen": "a", "rejected": "b"},
         "turn of the user"),
    ],
)  # fmt: skip
def test_a_preference_that_is_none_is_a_misfit(ingested, jsonl, row, reason):
    made = ingested(jsonl({"prompt": "?", "chosen": "yes", "rejected": "no", "ranks": None}, row), kind="rankings")
    assert made.stats["rows"] == 1
    assert reason in rejected(made)[0]["reason"]


LATEX = [
    ("What is half of a half?", "\\frac{1}{4}",
     ["It is $\\frac{1}{2} \\cdot \\frac{1}{2}$, so $\\boxed{\\frac{1}{4}}$.", "So 0.25 it is: \\boxed{0.25}",
      "I say \\boxed{\\frac{1}{2}}."]),
    ("What is 1000 times 1234?", "1,234,000",
     ["That makes $1{,}234{,}000$.", "The answer is 1234000.", "#### 1,234,000", "I do not know."]),
    ("Solve x - 5 = 0.", "5", "We find \\boxed{x = 5}."),
]  # fmt: skip
RIGHT = [[True, True, False], [True, True, True, False], [True]]


def test_responses_from_elsewhere_are_labelled_with_the_prompts_of_the_same_file(
    ingested, jsonl, tmp_path, tokenizer, sound
):
    path = jsonl(*({"question": q, "answer": a, "responses": r} for q, a, r in LATEX), name="elsewhere.jsonl")
    asked = ingested(path, grader="math", out="prompts")
    adopted = ingested(path, kind="rollouts", tokenizer=tokenizer, out="rollouts")
    sound(adopted)
    rows = adopted.table().to_pylist()
    assert [row["sample"] for row in rows] == [0, 1, 2, 0, 1, 2, 3, 0]
    assert [row["response"] for row in rows] == [*LATEX[0][2], *LATEX[1][2], LATEX[2][2]]
    chat = Chat(tokenizer)
    for row in rows:
        assert chat.decode(row["response_tokens"]) == row["response"]
        assert (row["response_tokens"][-1], row["finish"]) == (chat.stop_ids[0], "stop")
        assert row["sampler_logprobs"] is None
    assert rows[0]["prompt_tokens"] == chat.prompt_tokens(user(LATEX[0][0]))

    settings = LabelSettings.of(None, {"label": {"kind": "verifier"}})
    judged = label.run(tmp_path / "labels", settings, rollouts=adopted.path, prompts=asked.path)
    assert judged.table()["correct"].to_pylist() == [right for group in RIGHT for right in group]
    assert judged.table()["target"].to_pylist()[:3] == ["\\frac{1}{4}"] * 3
    assert judged.table()["reward"].to_pylist() == [float(right) for group in RIGHT for right in group]


def test_adopted_rollouts_say_whose_tokens_they_are(ingested, jsonl, tokenizer):
    adopted = ingested(jsonl({"prompt": "1+1?", "response": "2"}), kind="rollouts", tokenizer=tokenizer)
    metadata = pq.read_schema(adopted.part_paths()[0]).metadata
    told = Chat(tokenizer).metadata()
    assert {name: metadata[name.encode()].decode() for name in told} == told
    assert metadata[b"engine"] == b"elsewhere"
    assert adopted.manifest.inputs["tokenizer"][0].path == str(tokenizer)


def test_tokens_and_log_probabilities_from_elsewhere_are_kept(ingested, jsonl, tokenizer):
    end = Chat(tokenizer).stop_ids[0]
    rows = [
        {"prompt": "1+1?", "prompt_ids": [7, 8], "response": "2", "response_ids": [40, end], "logprobs": [-0.5, 0]},
        {"prompt": "1+2?", "response": "3", "response_ids": [41, 42], "finish_reason": None},
        {"prompt": "1+3?", "response": "4", "logprobs": [-0.25]},
        {"prompt": "1+4?", "responses": ["5", "6"], "response_ids": [[43], [44, end]], "logprobs": [[-1], [-2, -3]],
         "finish_reason": ["length", "stop"]},
    ]  # fmt: skip
    one, two, three, four, five = (
        ingested(jsonl(*rows), kind="rollouts", tokenizer=tokenizer).table().to_pylist()
    )  # fmt: skip
    assert (one["prompt_tokens"], one["response_tokens"], one["sampler_logprobs"]) == ([7, 8], [40, end], [-0.5, 0.0])
    assert (two["response_tokens"], two["sampler_logprobs"], two["finish"]) == ([41, 42], None, "length")
    assert (three["sampler_logprobs"], three["finish"]) == (None, "stop")
    assert (four["response_tokens"], four["sampler_logprobs"], four["finish"]) == ([43], [-1.0], "length")
    assert (five["response_tokens"], five["sampler_logprobs"], five["finish"]) == ([44, end], [-2.0, -3.0], "stop")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"response": None}, "no response"),
        ({"response": ""}, "no response"),
        ({"responses": []}, "no response"),
        ({"responses": ["2", None]}, "no response"),
        ({"response": "2", "response_ids": [5], "logprobs": [-1.0, -2.0]}, "2 log-probabilities for 1 tokens"),
        ({"response": "2", "response_ids": [5], "logprobs": [0.5]}, "finite numbers <= 0"),
        ({"response": "2", "response_ids": [5], "logprobs": [None]}, "finite numbers <= 0"),
        ({"response": "2", "response_ids": [10**6]}, "not ids of this tokenizer"),
        ({"response": "2", "response_ids": ["x"]}, "not ids of this tokenizer"),
        ({"response": "2", "response_ids": "5 6"}, "expected a list"),
        ({"response": "2", "prompt_ids": [-1]}, "not ids of this tokenizer"),
        ({"responses": ["2", "3"], "response_ids": [[5]]}, "1 lists of tokens for 2 responses"),
        ({"response": "2", "finish_reason": "abort"}, "'abort', neither stop nor length"),
        ({"responses": ["2", "3"], "finish_reason": ["stop"]}, "1 times finish for 2 responses"),
    ],
)
def test_a_response_that_cannot_be_adopted_is_a_misfit(ingested, jsonl, tokenizer, fields, reason):
    path = jsonl({"prompt": "0+0?", "response": "0"}, {"prompt": "1+1?", **fields})
    made = ingested(path, kind="rollouts", tokenizer=tokenizer)
    assert made.stats["rows"] == 1
    (aside,) = rejected(made)
    assert (aside["where"], reason in aside["reason"]) == (f"{path}:2", True), aside["reason"]


def test_a_conversation_that_the_template_refuses_is_a_misfit(ingested, jsonl, tokenizer, tmp_path):
    strict = shutil.copytree(tokenizer, tmp_path / "strict")
    template = strict / "chat_template.jinja"
    template.write_text("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
                        + template.read_text())  # fmt: skip
    refused = {"messages": [{"role": "system", "content": "Be brief."}, *user("1+1?")], "response": "2"}
    path = jsonl({"messages": user("1+1?"), "response": "2"}, refused)
    made = ingested(path, kind="rollouts", tokenizer=strict)
    assert made.stats["rows"] == 1
    assert "no system" in rejected(made)[0]["reason"]


def test_responses_to_one_prompt_in_several_rows_are_one_group(ingested, jsonl, tokenizer):
    rows = [("1+1?", "2"), ("1+2?", "3"), ("1+1?", "11"), ("1+2?", "12"), ("1+1?", "two")]
    path = jsonl(*({"prompt": prompt, "response": response} for prompt, response in rows))
    made = ingested(path, kind="rollouts", tokenizer=tokenizer)
    made.check()
    found = made.table().to_pylist()
    assert [(row["sample"], row["response"]) for row in found] == [(0, "2"), (1, "11"), (2, "two"), (0, "3"), (1, "12")]
    assert len({row["prompt_id"] for row in found}) == 2


def test_groups_are_numbered_in_the_order_of_the_file():
    rows = [{"prompt_id": name, "n": n} for n, name in enumerate("abacb")]
    assert [(row["prompt_id"], row["sample"], row["n"]) for row in grouped(rows)] == [
        ("a", 0, 0), ("a", 1, 2), ("b", 0, 1), ("b", 1, 4), ("c", 0, 3),
    ]  # fmt: skip


@given(sizes=st.lists(st.integers(1, 4), min_size=1), size=st.integers(1, 9))
def test_parts_hold_whole_groups(sizes, size):
    rows = [{"prompt_id": str(n), "sample": sample} for n, count in enumerate(sizes) for sample in range(count)]
    made = list(parts(rows, size))
    assert [row for part in made for row in part] == rows
    assert all(part[0]["sample"] == 0 for part in made)
    assert all(len(part) < size + 4 for part in made)
    assert all(len(part) >= size for part in made[:-1])
    plain = [{"prompt_id": str(n)} for n in range(len(rows))]
    assert [len(part) for part in parts(plain, size)][:-1] == [size] * ((len(rows) - 1) // size)


def test_responses_from_elsewhere_need_a_tokenizer(ingested, jsonl, tmp_path):
    path = jsonl({"prompt": "1+1?", "response": "2"})
    with pytest.raises(InputError, match="need a tokenizer"):
        ingested(path, kind="rollouts")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="no tokenizer"):
        ingested(path, kind="rollouts", tokenizer=tmp_path / "bare")


LOG = "log.txt"
PAIRS = [{"chosen": "good", "rejected": "bad"}, {"chosen": "fine", "rejected": "poor"}]
DIALOGUES = [
    {side: f"\n\nHuman: {n}+1?\n\nAssistant: Hm.\n\nHuman: Well?\n\nAssistant: {said}" for side, said in row.items()}
    for n, row in enumerate(PAIRS)
]  # fmt: skip
SHAPES = {
    "prompt, chosen, rejected": [{"prompt": f"{n}?", **row} for n, row in enumerate(PAIRS)],
    "with margin": [{"question": f"{n}?", **row, "margin": n + 0.5} for n, row in enumerate(PAIRS)],
    "with scores": [
        {"prompt": f"{n}?", **row, "chosen_score": 3 + n, "score_rejected": 1} for n, row in enumerate(PAIRS)
    ],
    "dialogues": DIALOGUES,
    "two and who won": [
        {"prompt": "0?", "response_a": "good", "response_b": "bad", "winner": "model_a", "worker_id": "w"},
        {"prompt": "1?", "response_a": "poor", "response_b": "fine", "winner": "b", "worker_id": "v"},
    ],
    "two numbered": [
        {"prompt": "0?", "response_0": "good", "response_1": "bad", "better_response_id": 0},
        {"prompt": "1?", "response_0": "poor", "response_1": "fine", "better_response_id": 1},
    ],
}  # fmt: skip


def write(path, rows):
    if path.suffix == ".csv":
        pa_csv.write_csv(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_preferences_from_every_format(ingested, tmp_path, sound, shape, suffix):
    made = ingested(write(tmp_path / f"rows{suffix}", SHAPES[shape]), kind="rankings")
    sound(made)
    assert made.stats["rejected"] == 0
    rows = made.table().to_pylist()
    better = [row["responses"][row["ranks"].index(0)] for row in rows]
    assert (better, [sorted(row["ranks"]) for row in rows]) == (["good", "fine"], [[0, 1], [0, 1]])
    ratings = {"with margin": [[0.5, 0], [1.5, 0]], "with scores": [[3, 1], [4, 1]]}
    assert [row.get("ratings") for row in rows] == ratings.get(shape, [None, None])
    assert ("ratings" in made.table().column_names) == (shape in ratings)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rankings_of_many_like_ultrafeedback(ingested, tmp_path, sound, suffix):
    rows = [{"instruction": "1+1?", "models": ["m"], "completions": [
        {"response": "2", "overall_score": 8.5, "model": "a"}, {"response": "3", "overall_score": 1.0, "model": "b"},
        {"response": "two", "overall_score": 8.5, "model": "c"},
    ]}]  # fmt: skip
    made = ingested(write(tmp_path / f"rows{suffix}", rows), kind="rankings")
    sound(made)
    (row,) = made.table().to_pylist()
    assert (row["responses"], row["ranks"], row["ratings"]) == (["2", "3", "two"], [0, 1, 0], [8.5, 1.0, 8.5])
    assert (
        "columns: messages <- instruction; responses <- completions.response; ranks <- completions.overall_score; "
        "ratings <- completions.overall_score; not used: models\n"
    ) in (made.path / LOG).read_text()


def test_ratings_are_null_where_unknown(ingested, jsonl, sound):
    scored = {"prompt": "0?", "chosen": "a", "rejected": "b", "score_chosen": 2, "score_rejected": 1}
    made = ingested(jsonl(scored, {**scored, "prompt": "1?", "score_chosen": None}), kind="rankings")
    sound(made)
    assert made.table()["ratings"].to_pylist() == [[2.0, 1.0], None]


def test_the_found_mapping_is_told_once_and_names_what_is_not_used(ingested, jsonl):
    hh = [{**row, "score_chosen": 2, "score_rejected": 1, "id": n, "meta": {}} for n, row in enumerate(DIALOGUES)]
    told = (ingested(jsonl(*hh), kind="rankings").path / LOG).read_text()
    assert told.count("columns:") == 1
    assert (
        "columns: messages <- the dialogue that chosen and rejected share; responses <- chosen, rejected; "
        "ratings <- score_chosen, score_rejected; not used: id, meta\n"
    ) in told
    rows = [{"ask": "1?", "meta": {"gold": 1, "x": 2}, "id": 3}, {"ask": "2?", "id": 4}]
    made = ingested(jsonl(*rows), columns={"prompt": "ask", "answer": "meta.gold"}, out="prompts")
    assert "columns: prompt <- ask; answer <- meta.gold; not used: id\n" in (made.path / LOG).read_text()
    made = ingested(jsonl({"messages": user("1?"), "prompt": "2?", "url": "x"}), out="both")
    assert "columns: messages <- messages; not used: prompt, url\n" in (made.path / LOG).read_text()
    made = ingested(jsonl({"text": "One."}, {"content": "Two.", "n": 1}), kind="documents", out="documents")
    told = (made.path / LOG).read_text()
    assert "columns: text <- text\n" in told
    assert "columns: text <- content; not used: n\n" in told


def test_the_reasons_are_counted(ingested, jsonl):
    pair = {"prompt": "?", "chosen": "a", "rejected": "b"}
    rows = [pair, {**pair, "margin": -1}, {**pair, "margin": -2}, {**pair, "margin": "high"}, pair]
    made = ingested(jsonl(*rows), kind="rankings")
    told = (made.path / LOG).read_text()
    assert "1 rows kept, 4 do not fit" in told
    assert "2 x a negative margin" in told
    assert "1 x a rating or margin that is not a number\n" in told
    assert "1 x a repetition of ranking_id\n" in told
    assert [row["reason"][-4:] for row in rejected(made)[:2]] == ["-1.0", "-2.0"]


def test_two_annotators_of_a_pair_are_two_rankings_and_so_are_two_verdicts(ingested, jsonl):
    row = {"prompt": "?", "response_a": "a", "response_b": "b", "winner": "a", "annotator": "ann"}
    rows = [row, {**row, "annotator": "ben"}, {**row, "winner": "b"}, row]
    made = ingested(jsonl(*rows), kind="rankings")
    assert made.stats["rows"] == 3
    assert "repetition of ranking_id" in rejected(made)[0]["reason"]


def test_winners_that_count_from_one_stop_everything(ingested, jsonl):
    rows = [{"prompt": f"{n}?", "response_a": "a", "response_b": "b", "winner": n % 2 + 1} for n in range(4)]
    with pytest.raises(InputError, match="count from 1"):
        ingested(jsonl(*rows), kind="rankings")
    made = ingested(jsonl(*rows, {**rows[0], "winner": 0}), kind="rankings", out="zero")
    assert (made.stats["rows"], made.stats["rejected"]) == (3, 2)
    rows = [{"prompt": row["prompt"], "response_1": "a", "response_2": "b", "winner": row["winner"]} for row in rows]
    made = ingested(jsonl(*rows), kind="rankings", columns={"response_a": "response_1", "response_b": "response_2"},
                    out="numbered")  # fmt: skip
    assert made.table()["ranks"].to_pylist() == [[0, 1], [1, 0]] * 2


def test_columns_that_make_no_rankings_are_told_with_what_would(ingested, jsonl):
    with pytest.raises(InputError) as error:
        ingested(jsonl({"q": "?", "good": "a", "bad": "b"}), kind="rankings")
    told = str(error.value)
    for part in ("chosen + rejected or response_a + response_b + winner or", "found q, good, bad",
                 "--set columns.chosen=YOURS", "better_response_id"):  # fmt: skip
        assert part in told, told
    with pytest.raises(InputError, match="none of 1 rows fits; the first: no prompt") as error:
        ingested(jsonl({"q": "?", "chosen": "a", "rejected": "b"}), kind="rankings")
    assert "prompt: prompt, question" in error.value.do
    made = ingested(jsonl({"q": "?", "good": "a", "bad": "b"}), kind="rankings",
                    columns={"prompt": "q", "chosen": "good", "rejected": "bad"})  # fmt: skip
    assert made.table()["responses"].to_pylist() == [["a", "b"]]


@pytest.mark.parametrize(
    ("part", "kind"),
    [("held_out", "prompts"), ("held_out_documents", "documents"), ("held_out_rankings", "rankings"),
     ("rankings", "rankings")],
)  # fmt: skip
def test_every_part_of_an_experiment_has_its_kind(tmp_path, part, kind):
    path = tmp_path / "e.toml"
    path.write_text(
        'recipe = "grpo"\n[models.new]\nlayers = 2\n[data.prompts]\nsource = "arithmetic"\ncount = 3\n'
        '[data.demonstrations]\nsource = "arithmetic"\ncount = 3\n'
        f'[data.{part}]\nfiles = ["a.jsonl"]\nsplit = "held_out"\n'
        "[scale]\niterations = 1\ngroups = 1\nprompt_tokens = 8\nresponse_tokens = 8\nlearning_rate = 1e-3\n"
    )
    made = Settings.of(Experiment.load(path), {"part": part})
    assert (made.kind, made.part, made.split) == (kind, part, "held_out")


def test_settings_are_the_part_of_the_experiment(tmp_path):
    path = tmp_path / "e.toml"
    path.write_text(
        'recipe = "grpo"\nseed = 3\n[models.new]\nlayers = 2\n[data]\nworld = {largest = 9}\n'
        '[data.demonstrations]\nsource = "arithmetic"\ncount = 5\n'
        '[data.prompts]\nfiles = ["a.jsonl"]\ngrader = "math"\ncolumns = {prompt = "ask"}\n'
        "[scale]\niterations = 1\ngroups = 1\nprompt_tokens = 8\nresponse_tokens = 8\nlearning_rate = 1e-3\n"
    )
    experiment = Experiment.load(path)
    demonstrations, prompts = (Settings.of(experiment, {"part": part}) for part in ("demonstrations", "prompts"))
    assert (demonstrations.kind, demonstrations.source, demonstrations.count) == ("demonstrations", "arithmetic", 5)
    assert (demonstrations.world.largest, demonstrations.world.seed) == (9, 3)
    assert (prompts.kind, prompts.grader, prompts.columns) == ("prompts", "math", {"prompt": "ask"})
    for part in ("held_out", None):
        with pytest.raises(ExperimentError, match="which dataset"):
            Settings.of(experiment, {"part": part})


def test_the_command_does_the_same(ingested, jsonl, tmp_path):
    path = jsonl(GSM8K, {"question": ""})
    made = ingested(path, grader="math", columns={"prompt": "question"})
    settings = Settings.of(None, made.manifest.settings)
    subprocess.run(ingest.command(tmp_path / "typed", settings, files=[path]), check=True, capture_output=True)
    typed = Artifact.open(tmp_path / "typed")
    assert typed.manifest.fingerprint == made.manifest.fingerprint
    assert typed.manifest.digest == made.manifest.digest


def test_every_contract_of_ingest_is_covered_here():
    assert set(ingest.writes) == {PROMPTS, DEMONSTRATIONS, DOCUMENTS, RANKINGS, ROLLOUTS}


# There and back -------------------------------------------------------------------------------------------------------

WAYS = [(to, suffix) for to in ("verl", "trl") for suffix in (".jsonl", ".parquet")]


@pytest.fixture
def back(ingested, tmp_path):
    """An artifact after `rlhf export` and `ingest`."""

    def take(artifact, to, suffix, **settings):
        file = tmp_path / f"{artifact.manifest.kind}{suffix}"
        exchange.write(exchange.exported(artifact, to), file)
        return ingested(file, **{"kind": artifact.manifest.kind, **settings})

    return take


@pytest.mark.parametrize(("to", "suffix"), WAYS)
def test_prompts_and_demonstrations_come_back_as_they_were(back, prompts, demonstrations, to, suffix):
    again = back(prompts, to, suffix, grader="exact")
    assert again.table().equals(prompts.table())
    again = back(demonstrations, to, suffix, out="again")
    assert again.table().equals(demonstrations.table())


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_documents_come_back_as_they_were(back, made_of, tmp_path, suffix):
    documents = made_of(tmp_path / "documents", "documents", 20)
    assert back(documents, "trl", suffix).table().equals(documents.table())


def pairs_of(rankings):
    """What rankings say: prompt, better, worse, annotator, margin."""
    found = []
    for row in rankings.table().to_pylist():
        ratings = row.get("ratings") or [0] * len(row["ranks"])
        judged = list(zip(row["ranks"], row["responses"], ratings, strict=True))
        found += [
            (row["prompt_id"], better, worse, row["annotator"], high - low, row["source"])
            for rank, better, high in judged
            for lower, worse, low in judged
            if rank < lower
        ]
    return sorted(found)


@pytest.mark.parametrize(("to", "suffix"), WAYS)
def test_rankings_come_back_as_the_pairs_that_they_imply(back, ingested, jsonl, to, suffix):
    talk = [*user("Hi"), {"role": "assistant", "content": "Yes?"}, *user("Who?")]
    rankings = ingested(
        jsonl(
            {"prompt": "Who?", "responses": ["x", "y", "z"], "ranks": [1, 0, 0], "annotator": "anna", "source": "s"},
            {"messages": talk, "responses": ["x", "y"], "ranks": [1, 0], "annotator": "ben", "source": "t"},
            {"messages": talk, "responses": ["x", "y"], "ranks": [0, 1], "annotator": "anna", "source": "t"},
        ),
        kind="rankings", out="rankings",
    )  # fmt: skip
    again = back(rankings, to, suffix)
    assert len(pairs_of(rankings)) == again.stats["rows"] == 4
    assert pairs_of(again) == pairs_of(rankings)


def test_differences_of_ratings_come_back_as_margins(back, ingested, jsonl):
    row = {"prompt": "Who?", "responses": ["x", "y", "z"], "ratings": [1.5, 4.0, -2.0], "annotator": "a", "source": "s"}
    rankings = ingested(jsonl(row), kind="rankings", out="rankings")
    assert pairs_of(back(rankings, "trl", ".parquet")) == pairs_of(rankings)


@pytest.mark.parametrize(("to", "suffix"), WAYS)
def test_responses_come_back_with_keys_tokens_and_texts(back, rollouts, labels, policy, sound, to, suffix):
    again = back(rollouts, to, suffix, tokenizer=policy.path)
    sound(again)
    assert again.table().equals(rollouts.table())


@pytest.mark.parametrize("to", ["verl", "trl"])
def test_a_second_draw_and_a_greedy_response_keep_their_numbers(ingested, jsonl, tokenizer, to):
    prompt_id = identity(user("Hi"))
    sides = {
        "verl": {"input": "user Hi", "output": "Yo", "gts": None, "score": 1.0, "step": 0, "prompt": user("Hi")},
        "trl": {"step": 0, "prompt": user("Hi"), "completion": [{"role": "assistant", "content": "Yo"}]},
    }
    keys = [(f"{prompt_id}#1", 3), (prompt_id, 0), (prompt_id, -1), (f"{prompt_id}#1", -1)]
    rows = [{**sides[to], "prompt_id": name, "sample": sample, "seed": 5} for name, sample in keys]
    made = ingested(jsonl(*rows), kind="rollouts", tokenizer=tokenizer).table().to_pylist()
    assert [(row["prompt_id"], row["sample"]) for row in made] == [keys[0], keys[3], keys[1], keys[2]]
    assert {(row["response"], row["seed"]) for row in made} == {("Yo", 5)}


@pytest.mark.parametrize("strange", [True, 2**40, "0", 0.5, None])
def test_numbers_that_are_none_are_given_anew(ingested, jsonl, tokenizer, strange):
    row = {"prompt": "Hi", "response": "Yo", "prompt_id": identity(user("Hi")), "sample": strange}
    made = ingested(jsonl(row, row), kind="rollouts", tokenizer=tokenizer).table().to_pylist()
    assert [row["sample"] for row in made] == [0, 1]


def test_ids_of_others_are_not_taken_for_ours(ingested, jsonl, tokenizer):
    row = {"prompt": "Hi", "response": "Yo", "prompt_id": "their-7", "sample": 9, "seed": 4}
    made = ingested(jsonl(row), kind="rollouts", tokenizer=tokenizer).table().to_pylist()
    assert [(row["prompt_id"], row["sample"], row["seed"]) for row in made] == [(identity(user("Hi")), 0, 0)]


def test_the_same_rows_twice_are_numbered_anew(ingested, jsonl, tokenizer):
    row = {"prompt": "Hi", "response": "Yo", "prompt_id": identity(user("Hi")), "sample": 2}
    made = ingested(jsonl(row, row), kind="rollouts", tokenizer=tokenizer).table().to_pylist()
    assert [row["sample"] for row in made] == [0, 1]


def test_a_dump_of_verls_own_is_refused_because_its_turns_are_gone(ingested, jsonl, tokenizer):
    dump = jsonl({"input": "user\nHi\nassistant\n", "output": "Yo", "gts": "Yo", "score": 1.0, "step": 3})
    with pytest.raises(InputError, match=r"no column for messages \+ response or prompt \+ response") as refusal:
        ingested(dump, kind="rollouts", tokenizer=tokenizer)
    assert "as a chat template wrote it" in refusal.value.do
    made = ingested(dump, kind="rollouts", tokenizer=tokenizer, columns={"prompt": "input"})
    assert made.table()["response"].to_pylist() == ["Yo"]


def test_a_completion_of_several_turns_is_imitated_whole(ingested, jsonl):
    said = [{"role": "assistant", "content": "Who?"}, *user("Me"), {"role": "assistant", "content": "Oh"}]
    made = ingested(
        jsonl({"prompt": user("Hi"), "completion": said}, {"prompt": user("Hi"), "completion": said[:2]}),
        kind="demonstrations",
    )
    assert made.table()["messages"].to_pylist() == [[*user("Hi"), *said]]
    assert [row["reason"] for row in rejected(made)] == ["no turn of the assistant to imitate"]


def test_a_part_never_cuts_through_a_group_that_begins_with_a_greedy_response():
    rows = [{"prompt_id": name, "sample": sample} for name in "ab" for sample in (-1, 0, 1)]
    assert [len(part) for part in parts(rows, 1)] == [3, 3]
