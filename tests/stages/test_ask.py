import csv
import json
import re
import subprocess
import sys
from collections import Counter

import pytest

from pipeline.annotating.page import page
from pipeline.contracts import PROMPTS, ROLLOUTS
from pipeline.errors import ContractError, ExperimentError
from stages.ask import Settings, ask, question_id_of

PROMPT = {"answer": None, "grader": "none", "source": "hand"}
FILES = {"annotate.csv", "annotate.html", "annotate.jsonl"}


def settings(**changes):
    return Settings.of(None, changes)


@pytest.fixture(scope="module")
def prompts_of(by_hand):
    """Write prompts of these names."""

    def write(*names):
        messages = {name: [{"role": "user", "content": f"{name}?"}] for name in names}
        return by_hand(PROMPTS, [{"prompt_id": name, "messages": messages[name], **PROMPT} for name in names]).path

    return write


@pytest.fixture(scope="module")
def said(by_hand):
    """Write rollouts: prompt -> responses; a bar at the end marks a response as cut."""

    def write(*parts):
        rows = [
            [
                {
                    "prompt_id": name, "sample": sample, "prompt_tokens": [1], "response_tokens": [2],
                    "response": text.removesuffix("|"), "sampler_logprobs": None,
                    "finish": "length" if text.endswith("|") else "stop", "seed": 0,
                }
                for name, texts in part.items()
                for sample, text in enumerate(texts)
            ]
            for part in parts
        ]  # fmt: skip
        return by_hand(ROLLOUTS, *rows).path

    return write


@pytest.fixture
def made(prompts_of, said, tmp_path):
    """Ask about responses: prompt -> texts."""

    def make(*parts, name="questions", **changes):
        names = dict.fromkeys(prompt_id.partition("#")[0] for part in parts for prompt_id in part)
        return ask.run(tmp_path / name, settings(**changes), prompts=prompts_of(*names), rollouts=said(*parts))

    return make


def test_a_question_shows_the_different_responses_that_are_finished(made, sound, numbers):
    artifact = made({"a": ["3", "4", "3", "", "5|"], "alone": ["1", "1"], "cut": ["1|", "2|", "3"]}, {"b": ["x", "y"]})
    sound(artifact)
    first, second = artifact.table().to_pylist()
    assert dict(zip(first["response_ids"], first["responses"], strict=True)) == {"a/0": "3", "a/1": "4", "a/3": ""}
    assert (first["prompt_id"], first["source"], first["annotators"]) == ("a", "hand", [])
    assert first["messages"] == [{"role": "user", "content": "a?"}]
    assert (second["prompt_id"], sorted(second["responses"])) == ("b", ["x", "y"])
    measured = {name: value for (name, _), value in numbers(artifact).items() if name != "time/seconds"}
    assert measured == {
        "rejected/cut": 3, "rejected/duplicate": 2, "rejected/surplus": 0, "rejected/too_few": 2, "rows/rejected": 2,
        "questions/responses": 2.5, "questions/asked": 2,
    }  # fmt: skip
    assert artifact.stats["rejected"] == 2
    told = (artifact.path / "log.txt").read_text()
    assert "2 questions of 2.5 responses for anybody, 1 each" in told
    assert "2 prompts make no question: cut 3 responses, duplicate 2 responses, surplus 0 responses, too few 2" in told


def test_later_draws_of_a_prompt_join_its_question(made):
    rows = made({"a": ["3", "4"], "b": ["3", "3"]}, {"b#1": ["3", "7"], "a#1": ["4", "5"]}).table().to_pylist()
    found = [dict(zip(row["response_ids"], row["responses"], strict=True)) for row in rows]
    assert found == [{"a/0": "3", "a/1": "4", "a#1/1": "5"}, {"b/0": "3", "b#1/1": "7"}]


def test_more_responses_than_wanted_are_left_out_and_counted(made, numbers):
    artifact = made({"a": [*"abcdeac"], "b": [*"ab"]}, responses=3)
    first, second = artifact.table().to_pylist()
    assert (sorted(first["responses"]), sorted(second["responses"])) == (["a", "b", "c"], ["a", "b"])
    measured = numbers(artifact)
    assert (measured["rejected/surplus", 0], measured["rejected/duplicate", 0]) == (2, 2)
    assert "surplus 2 responses" in (artifact.path / "log.txt").read_text()


def test_the_place_of_a_response_tells_nothing_of_its_sample(made):
    parts = {f"p{number}": [*"abcd"] for number in range(200)}
    firsts = Counter(row["response_ids"][0][-1] for row in made(parts).table().to_pylist())
    assert len(firsts) == 4
    assert min(firsts.values()) > 25
    shuffled = {f"p{number}": [*"dcba"] for number in range(200)}
    places = [row["responses"] for row in made(parts, name="again").table().to_pylist()]
    assert [row["responses"] for row in made(shuffled, name="shuffled").table().to_pylist()] == places
    assert [row["responses"] for row in made(parts, name="other", seed=1).table().to_pylist()] != places


def test_a_question_keeps_its_id_whatever_the_seed_order_and_annotators(made):
    def ids(name, *parts, **changes):
        return {row["prompt_id"]: row["question_id"] for row in made(*parts, name=name, **changes).table().to_pylist()}

    one = ids("one", {"a": ["1", "2", "3"], "b": ["1", "2", "3"]})
    assert (
        ids("two", {"b": ["3", "2", "1"], "a": ["2", "2", "1", "3"]}, seed=5, annotators=["x", "y"], overlap=2) == one
    )
    assert ids("three", {"a": ["1", "2", "4"]})["a"] != one["a"] != one["b"]
    assert one["a"] == question_id_of("a", {"3", "2", "1"})
    assert all(re.fullmatch(r"q[0-9a-f]{16}", question_id) for question_id in one.values())


def test_named_annotators_share_the_questions(made, numbers):
    artifact = made({f"p{n}": ["1", "2"] for n in range(31)}, annotators=["dora", "ben", "Çelik"], overlap=2)
    rows = artifact.table().to_pylist()
    loads = Counter(name for row in rows for name in row["annotators"])
    assert sorted(loads.values()) == [20, 21, 21]
    assert {tuple(row["annotators"]) for row in rows} == {("dora", "ben"), ("dora", "Çelik"), ("ben", "Çelik")}
    assert numbers(artifact)["questions/per_annotator", 0] == pytest.approx(62 / 3)
    assert artifact.stats["asked"] == numbers(artifact)["questions/asked", 0] == 62
    told = ", ".join(f"{name} {loads[name]}" for name in ("dora", "ben", "Çelik"))
    assert f"31 questions of 2.0 responses for {told}" in (artifact.path / "log.txt").read_text(encoding="utf-8")


def test_the_files_for_annotators_hold_the_questions_and_belong_to_the_artifact(made):
    parts = {"a": ["=1", "</script>", "x\ny"], "b": ["", "\x00\U0001f9ea"]}
    artifact = made(parts, annotators=["anna", "ben"], overlap=2)
    rows = artifact.table().to_pylist()
    assert set(artifact.manifest.files) == {"part-00000.parquet", *FILES}
    assert (artifact.path / "annotate.html").read_text(encoding="utf-8") == page(rows, 2)
    with (artifact.path / "annotate.csv").open(encoding="utf-8-sig", newline="") as stream:
        asked = [(row["annotator"], row["question_id"], row["response_id"]) for row in csv.DictReader(stream)]
    with (artifact.path / "annotate.jsonl").open(encoding="utf-8") as stream:
        lines = [json.loads(line) for line in stream]
    wanted = [
        (name, row["question_id"], one) for name in ("anna", "ben") for row in rows for one in row["response_ids"]
    ]
    assert asked == wanted
    assert [
        (line["annotator"], line["question_id"], one["response_id"]) for line in lines for one in line["responses"]
    ] == wanted
    again = made(parts, name="again", annotators=["anna", "ben"], overlap=2)
    assert again.manifest.digest == artifact.manifest.digest
    assert all((again.path / name).read_bytes() == (artifact.path / name).read_bytes() for name in FILES)
    assert made(parts, name="other", annotators=["anna", "ben"]).manifest.digest != artifact.manifest.digest


def test_the_sessions_rollouts_can_be_asked_about(rollouts, prompts, tmp_path, sound):
    artifact = ask.run(tmp_path / "out", settings(responses=4), prompts=prompts.path, rollouts=rollouts.path)
    sound(artifact)
    texts = {f"{row['prompt_id']}/{row['sample']}": row["response"] for row in rollouts.table().to_pylist()}
    for row in artifact.table().to_pylist():
        assert [texts[response_id] for response_id in row["response_ids"]] == row["responses"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"annotators": ["anna", "ben"], "overlap": 3},
            "overlap: 3 annotators per question, and 2 are named: anna, ben",
        ),
        ({"annotators": ["anna", "ben", "anna"]}, "anna more than once"),
        ({"annotators": [""]}, "'' is no name"),
        ({"annotators": ["anna\nben"]}, "is no name"),
        ({"annotators": [" anna"]}, "' anna' is no name"),
        ({"annotators": ["a\u200bb"]}, "is no name"),
        ({"annotators": ["=anna"]}, "a spreadsheet would take this name for a formula"),
        ({"overlap": 0}, "overlap"),
        ({"responses": 1}, "responses"),
        ({"responses": 100}, "responses"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ExperimentError, match=re.escape(message)):
        settings(**changes)


def test_where_nobody_is_named_any_number_may_rank(made):
    artifact = made({"a": ["1", "2"]}, overlap=3)
    assert artifact.table()["annotators"].to_pylist() == [[]]
    assert artifact.stats["asked"] == 3


def test_rollouts_of_other_prompts(prompts_of, said, tmp_path):
    with pytest.raises(ContractError, match="1 prompts of the rollouts are not among the prompts: b"):
        ask.run(tmp_path / "out", settings(), prompts=prompts_of("a"), rollouts=said({"b": ["3", "4"]}))


def test_nothing_to_ask_says_why(made, tmp_path):
    with pytest.raises(ContractError, match=r"no prompt has two different .* cut 1 responses, .* too few 2 prompts"):
        made({"a": ["4", "4"], "b": ["3|", "5"]})
    assert not (tmp_path / "questions").exists()


def test_it_starts_without_torch():
    code = "import sys, stages.ask; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
