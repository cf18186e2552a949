import subprocess
import sys

import pytest

from pipeline.contracts import PROMPTS, ROLLOUTS
from pipeline.errors import ContractError, ExperimentError
from stages.rank import Settings, rank

PROMPT = {"answer": "3", "grader": "exact", "source": "hand"}


def settings(**changes):
    return Settings.of(None, changes)


@pytest.fixture(scope="module")
def asked(by_hand):
    """Write prompts of these names, all with the answer 3."""

    def write(*names, **changes):
        messages = {name: [{"role": "user", "content": f"{name}?"}] for name in names}
        return by_hand(PROMPTS, [{"prompt_id": n, "messages": messages[n], **PROMPT, **changes} for n in names]).path

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


def test_right_beats_wrong_and_equals_tie(asked, said, tmp_path, sound):
    made = rank.run(tmp_path / "out", settings(), prompts=asked("a"), rollouts=said({"a": ["4", "3", "x;3", "5", ""]}))
    sound(made)
    (row,) = made.table().to_pylist()
    assert row["responses"] == ["4", "3", "x;3", "5", ""]
    assert row["ranks"] == [1, 0, 0, 1, 1]
    assert row["messages"] == [{"role": "user", "content": "a?"}]
    assert (row["prompt_id"], row["annotator"], row["source"]) == ("a", "grader", "hand")
    assert made.stats["pairs"] == 6


def test_what_makes_no_ranking_is_counted(asked, said, tmp_path, numbers):
    responses = {
        "tie": ["3", "1;3"], "wrong": ["1", "2"], "alone": ["3", "3"], "cut": ["3|", "4"], "good": ["3", "4", "4", "5|"]
    }  # fmt: skip
    made = rank.run(tmp_path / "out", settings(), prompts=asked(*responses), rollouts=said(responses))
    (row,) = made.table().to_pylist()
    assert (row["prompt_id"], row["responses"], row["ranks"]) == ("good", ["3", "4"], [0, 1])
    measured = {name: value for (name, _), value in numbers(made).items()}
    assert {name.partition("/")[2]: measured[name] for name in measured if name.startswith("rejected/")} == {
        "cut": 2, "duplicate": 2, "unjudged": 0, "too_few": 2, "tie": 2
    }  # fmt: skip
    assert made.stats["rejected"] == measured["rows/rejected"] == 4
    assert "4 prompts make no ranking: cut 2 responses" in (made.path / "log.txt").read_text()


def test_later_draws_of_a_prompt_join_its_ranking(asked, said, tmp_path):
    rollouts = said({"a": ["3", "4"], "b": ["3", "3"]}, {"b#1": ["3", "7"], "a#1": ["4", "5"]})
    rows = rank.run(tmp_path / "out", settings(), prompts=asked("a", "b"), rollouts=rollouts).table().to_pylist()
    assert [(row["prompt_id"], row["responses"]) for row in rows] == [("a", ["3", "4", "5"]), ("b", ["3", "7"])]
    assert len({row["ranking_id"] for row in rows}) == 2


def test_the_annotator_errs_as_often_as_asked_and_the_same_way_every_time(asked, said, tmp_path, numbers):
    names = [f"p{n}" for n in range(150)]
    rollouts, prompts = said({name: ["3", "1;3", "4", "5"] for name in names}), asked(*names)

    def ranked(place, **changes):
        chosen = settings(error_rate=0.25, **changes)
        return rank.run(tmp_path / place, chosen, prompts=prompts, rollouts=rollouts)

    made = ranked("one")
    rows = made.table().to_pylist()
    turned = [sum(rank != truth for rank, truth in zip(row["ranks"], (0, 0, 1, 1), strict=True)) for row in rows]
    assert {0, 1, 2, 3} <= set(turned)
    assert numbers(made)["annotator/turned", 0] == pytest.approx(0.25, abs=0.05)
    assert ranked("again").manifest.digest == made.manifest.digest != ranked("other", seed=1).manifest.digest
    assert made.stats["rejected"] == 150 - len(rows) > 0


def test_an_error_belongs_to_a_response_whatever_else_is_ranked(asked, said, tmp_path):
    names = [f"p{n}" for n in range(40)]
    some = rank.run(
        tmp_path / "some", settings(error_rate=0.4), prompts=asked(*names),
        rollouts=said({name: ["3", "4", "5"] for name in names[20:]}),
    )  # fmt: skip
    everything = rank.run(
        tmp_path / "all", settings(error_rate=0.4), prompts=asked(*names),
        rollouts=said({name: ["3", "4", "5", "6"] for name in names}),
    )  # fmt: skip
    ranks = {row["prompt_id"]: row["ranks"] for row in everything.table().to_pylist()}
    shared = [row for row in some.table().to_pylist() if row["prompt_id"] in ranks]
    assert len(shared) > 5
    assert all(row["ranks"] == ranks[row["prompt_id"]][:3] for row in shared)


def test_what_the_grader_cannot_judge_is_in_no_ranking(by_hand, asked, said, tmp_path, numbers):
    unreadable = [
        {"prompt_id": name, "messages": [{"role": "user", "content": name}], **PROMPT, "answer": answer}
        for name, answer in (("a", "3"), ("b", ";"))
    ]
    rollouts = said({"a": ["3", "4"], "b": ["3", "4"]})
    made = rank.run(tmp_path / "out", settings(), prompts=by_hand(PROMPTS, unreadable).path, rollouts=rollouts)
    assert made.table()["prompt_id"].to_pylist() == ["a"]
    measured = numbers(made)
    assert (measured["rejected/unjudged", 0], measured["rejected/too_few", 0]) == (2, 1)


def test_the_sessions_rollouts_can_be_ranked(rollouts, prompts, tmp_path, sound):
    made = rank.run(tmp_path / "out", settings(), prompts=prompts.path, rollouts=rollouts.path)
    sound(made)
    answers = {row["prompt_id"]: row["answer"] for row in prompts.table().to_pylist()}
    for row in made.table().to_pylist():
        right = [text.rpartition(";")[2] == answers[row["prompt_id"]] for text in row["responses"]]
        assert row["ranks"] == [0 if one else 1 for one in right]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"answer": None}, "1 prompts have no answer or grader"), ({"grader": "none"}, "1 prompts have no answer")],
)
def test_prompts_that_nobody_can_judge(asked, said, tmp_path, change, message):
    with pytest.raises(ContractError, match=message):
        rank.run(tmp_path / "out", settings(), prompts=asked("a", **change), rollouts=said({"a": ["3", "4"]}))


def test_rollouts_of_other_prompts(asked, said, tmp_path):
    with pytest.raises(ContractError, match="1 prompts of the rollouts are not among the prompts: b"):
        rank.run(tmp_path / "out", settings(), prompts=asked("a"), rollouts=said({"b": ["3", "4"]}))


def test_nothing_to_rank_says_why(asked, said, tmp_path):
    with pytest.raises(ContractError, match=r"no prompt has responses of which one is better .* tie 1 prompts"):
        rank.run(tmp_path / "out", settings(), prompts=asked("a"), rollouts=said({"a": ["4", "5"]}))
    assert not (tmp_path / "out").exists()


def test_an_annotator_that_always_errs(asked):
    with pytest.raises(ExperimentError, match="error_rate"):
        settings(error_rate=1.0)


def test_it_starts_without_torch():
    code = "import sys, stages.rank; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
