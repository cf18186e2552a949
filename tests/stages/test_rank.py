import csv
import json
import subprocess
import sys

import pytest

from pipeline.annotating.sheets import write_csv, write_jsonl
from pipeline.artifacts import Artifact
from pipeline.contracts import PROMPTS, QUESTIONS
from pipeline.errors import ContractError, ExperimentError, InputError, WaitingError
from pipeline.experiment import Experiment
from stages.rank import Settings, rank

PROMPT = {"answer": "3", "grader": "exact", "source": "hand"}


def settings(**changes):
    return Settings.of(None, changes)


def user(text):
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def known(by_hand):
    """Write prompts of these names, all with the answer 3."""

    def write(*names, **changes):
        return by_hand(PROMPTS, [{"prompt_id": n, "messages": user(f"{n}?"), **PROMPT, **changes} for n in names]).path

    return write


@pytest.fixture(scope="module")
def ask(by_hand):
    """Write questions: prompt -> responses; the question to prompt p is `q-p`, its responses are `p/0`, `p/1`, ..."""

    def write(texts, *annotators):
        return by_hand(QUESTIONS, [
            {
                "question_id": f"q-{name}", "prompt_id": name, "messages": user(f"{name}?"), "responses": responses,
                "response_ids": [f"{name}/{sample}" for sample in range(len(responses))],
                "annotators": annotators, "source": "hand",
            }
            for name, responses in texts.items()
        ]).path  # fmt: skip

    return write


def line(name, annotator, ranks, **more):
    ids = {f"{name}/{sample}": rank for sample, rank in enumerate(ranks)}
    return {"question_id": f"q-{name}", "annotator": annotator, "ranks": ids, **more}


def measured(numbers, made):
    return {name: value for (name, _), value in numbers(made).items()}


def unchanged(made, tmp_path, files):
    """Nothing new stands beside the files, and they hold what they held."""
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    assert not made.exists()
    assert not list(tmp_path.glob(".part-*"))


def test_right_beats_wrong_and_equals_tie(known, ask, tmp_path, sound):
    questions = ask({"a": ["4", "3", "x;3", "5", ""]})
    made = rank.run(tmp_path / "out", settings(), questions=questions, prompts=known("a"))
    sound(made)
    (row,) = made.table().to_pylist()
    assert row["responses"] == ["4", "3", "x;3", "5", ""]
    assert row["ranks"] == [1, 0, 0, 1, 1]
    assert (row["messages"], row["prompt_id"]) == (user("a?"), "a")
    assert (row["annotator"], row["source"]) == ("grader", "hand")
    assert made.stats["pairs"] == 6


def test_what_makes_no_ranking_is_counted(known, ask, by_hand, tmp_path, numbers):
    texts = {"tie": ["3", "1;3"], "wrong": ["1", "2"], "lost": ["3", "4"], "good": ["3", "4", "5"]}
    answers = dict.fromkeys(texts, "3") | {"lost": ";"}
    prompts = by_hand(
        PROMPTS, [{"prompt_id": n, "messages": user(n), **PROMPT, "answer": answer} for n, answer in answers.items()]
    )
    made = rank.run(tmp_path / "out", settings(), questions=ask(texts, "anna", "ben"), prompts=prompts.path)
    assert [(row["prompt_id"], row["ranks"]) for row in made.table().to_pylist()] == [("good", [0, 1, 1])] * 2
    found = measured(numbers, made)
    assert {name.partition("/")[2]: found[name] for name in found if name.startswith("rejected/")} == {
        "unjudged": 2, "too_few": 2, "tie": 4, "unanswered": 0, "blank": 0
    }  # fmt: skip
    assert made.stats["rejected"] == found["rows/rejected"] == 6
    assert found["ranking/responses"] == 3
    log = (made.path / "log.txt").read_text()
    assert "left out: unjudged 2 responses, too few 2 rankings, tie 4 rankings\n" in log


def test_every_simulated_annotator_errs_as_often_as_asked_and_in_its_own_way(known, ask, tmp_path, numbers):
    names, annotators = [f"p{n}" for n in range(150)], ["anna", "ben", "cleo"]
    questions, prompts = ask({name: ["3", "1;3", "4", "5"] for name in names}, *annotators), known(*names)

    def ranked(place, **changes):
        return rank.run(tmp_path / place, settings(error_rate=0.25, **changes), questions=questions, prompts=prompts)

    made = ranked("one")
    rows = made.table().to_pylist()
    said = {name: {row["prompt_id"]: row["ranks"] for row in rows if row["annotator"] == name} for name in annotators}
    wrong = {
        name: {(prompt, place) for prompt, ranks in by.items() for place in range(4) if ranks[place] != (place > 1)}
        for name, by in said.items()
    }
    for name in annotators:
        assert len(wrong[name]) / (4 * len(said[name])) == pytest.approx(0.25, abs=0.06)
    everywhere = [prompt for prompt in names if all(prompt in by for by in said.values())]
    both = [pair for pair in wrong["anna"] & wrong["ben"] if pair[0] in everywhere]
    assert len(both) / (4 * len(everywhere)) == pytest.approx(0.25**2, abs=0.03)
    found = measured(numbers, made)
    assert found["annotator/turned"] == pytest.approx(0.25, abs=0.03)
    assert found["annotator/ben/rankings"] == len(said["ben"])
    assert found["agreement/questions"] == 150
    # Two verdicts of one annotator are each right with 3/4. A pair of equals it ties with 9/16 + 1/16, or strictly
    # orders with 3/16 either way; an unequal pair it orders rightly with 9/16, wrongly with 1/16, ties with 6/16.
    equals, others = (10**2 + 3**2 + 3**2) / 16**2, (9**2 + 1**2 + 6**2) / 16**2
    assert found["agreement/pairwise"] == pytest.approx((2 * equals + 4 * others) / 6, abs=0.04)
    assert ranked("again").manifest.digest == made.manifest.digest != ranked("other", seed=1).manifest.digest


def test_an_error_belongs_to_annotator_and_response_whatever_else_is_ranked(known, ask, tmp_path):
    names = [f"p{n}" for n in range(40)]
    prompts = known(*names)
    some = ask({name: ["3", "4", "5"] for name in names[20:]}, "anna")
    everything = ask({name: ["3", "4", "5", "6"] for name in names}, "ben", "anna")
    said = [
        {
            (row["prompt_id"], row["annotator"]): row["ranks"]
            for row in rank.run(tmp_path / place, settings(error_rate=0.4), questions=questions, prompts=prompts)
            .table()
            .to_pylist()
        }
        for place, questions in (("some", some), ("all", everything))
    ]
    shared = said[0].keys() & said[1].keys()
    assert len(shared) > 5
    assert all(said[0][key] == said[1][key][:3] for key in shared)


def test_the_sessions_responses_can_be_ranked(rollouts, prompts, by_hand, tmp_path, sound):
    groups = {}
    for row in rollouts.table().to_pylist():
        groups.setdefault(row["prompt_id"], {})[row["response"]] = f"{row['prompt_id']}/{row['sample']}"
    about = {row["prompt_id"]: row for row in prompts.table().to_pylist()}
    questions = by_hand(QUESTIONS, [
        {
            "question_id": name, "prompt_id": name, "messages": about[name]["messages"], "responses": list(texts),
            "response_ids": list(texts.values()), "annotators": ["anna"], "source": "arithmetic",
        }
        for name, texts in groups.items() if len(texts) > 1
    ])  # fmt: skip
    made = rank.run(tmp_path / "out", settings(), questions=questions.path, prompts=prompts.path)
    sound(made)
    for row in made.table().to_pylist():
        right = [text.rpartition(";")[2] == about[row["prompt_id"]]["answer"] for text in row["responses"]]
        assert row["ranks"] == [0 if one else 1 for one in right]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"answer": None}, "1 prompts have no answer or grader"), ({"grader": "none"}, "1 prompts have no answer")],
)
def test_prompts_that_nobody_can_judge(known, ask, tmp_path, change, message):
    with pytest.raises(ContractError, match=message):
        rank.run(tmp_path / "out", settings(), questions=ask({"a": ["3", "4"]}), prompts=known("a", **change))


def test_questions_about_other_prompts(known, ask, tmp_path):
    with pytest.raises(ContractError, match="1 prompts of the questions are not among the prompts: b"):
        rank.run(tmp_path / "out", settings(), questions=ask({"b": ["3", "4"]}), prompts=known("a"))


def test_nothing_to_prefer_says_why(known, ask, jsonl, tmp_path):
    questions = ask({"a": ["4", "5"]}, "anna")
    message = "no question has responses of which one is better than another: tie 1 rankings"
    for given in ({"prompts": known("a")}, {"annotations": jsonl(line("a", "anna", [1, 1]))}):
        with pytest.raises(ContractError, match=message):
            rank.run(tmp_path / "out", settings(), questions=questions, **given)
    assert not (tmp_path / "out").exists()


def test_nobody_to_rank(ask, tmp_path):
    with pytest.raises(InputError, match="nobody ranks") as caught:
        rank.run(tmp_path / "out", settings(), questions=ask({"a": ["3", "4"]}), annotations=[])
    assert "--annotations FILES" in caught.value.do
    assert "--prompts PATH" in caught.value.do
    assert not list(tmp_path.iterdir())


def test_people_rank_whatever_the_answers_are(known, ask, jsonl, tmp_path, numbers, sound):
    questions = ask({"a": ["3", "4", "5"], "b": ["3", "4"], "c": ["1", "2"]}, "anna", "ben")
    files = [
        jsonl(
            line("a", "anna", [9, 1, 4], seconds=10), line("b", "anna", [1, 2], seconds=40),
            line("c", "anna", [2, 2], seconds=0),
            name="anna.jsonl",
        ),
        jsonl(
            line("a", "ben", [3, 1, 2], seconds=13), line("c", "ben", [2, 1]), line("b", "ben", [2, 1]),
            name="ben.jsonl",
        ),
    ]  # fmt: skip
    made = rank.run(
        tmp_path / "out", settings(error_rate=0.9), questions=questions, prompts=known("a"), annotations=files
    )
    sound(made)
    rows = made.table().to_pylist()
    assert [(row["prompt_id"], row["annotator"], row["ranks"]) for row in rows] == [
        ("a", "anna", [2, 0, 1]), ("a", "ben", [2, 0, 1]), ("b", "anna", [0, 1]), ("b", "ben", [1, 0]),
        ("c", "ben", [1, 0]),
    ]  # fmt: skip
    assert rows[0] == {
        "ranking_id": rows[0]["ranking_id"], "prompt_id": "a", "messages": user("a?"), "responses": ["3", "4", "5"],
        "ranks": [2, 0, 1], "annotator": "anna", "source": "hand",
    }  # fmt: skip
    assert len({row["ranking_id"] for row in rows}) == 5
    found = measured(numbers, made)
    assert (found["annotator/anna/rankings"], found["annotator/ben/rankings"]) == (2, 3)
    assert (found["rejected/tie"], found["rejected/unanswered"], found["ranking/pairs"]) == (1, 0, 9)
    assert found["annotator/seconds"] == 11.5
    assert "annotator/turned" not in found
    # a: 3 of 3 pairs; b: 0 of 1; c: one ties, 0 of 1, and tau is undefined
    assert found["agreement/questions"] == made.stats["agreement/questions"] == 3
    assert (
        found["agreement/pairwise"] == found["agreement/pairwise/anna+ben"] == made.stats["agreement/pairwise"] == 3 / 5
    )
    assert found["agreement/untied"] == found["agreement/untied/anna+ben"] == 3 / 4
    assert found["agreement/kendall_tau"] == found["agreement/kendall_tau/anna+ben"] == 0
    assert made.stats["agreement/kendall_tau"] == 0
    assert (
        "5 rankings: anna 2, ben 3; of 3 questions ranked by several, annotators agree on 60.0% of the pairs, "
        "Kendall's tau 0.00\n"
    ) in (made.path / "log.txt").read_text()


def test_without_a_question_in_common_no_agreement_is_measured(ask, jsonl, tmp_path, numbers):
    file = jsonl(line("a", "anna", [1, 2]), line("b", "ben", [1, 2]))
    made = rank.run(tmp_path / "out", settings(), questions=ask({"a": ["3", "4"], "b": ["3", "4"]}), annotations=[file])
    agreement = {name: value for name, value in measured(numbers, made).items() if name.startswith("agreement/")}
    assert agreement == {"agreement/questions": 0}
    assert "agreement/pairwise" not in made.stats
    assert "2 rankings: anna 1, ben 1; no question was ranked by two annotators" in (made.path / "log.txt").read_text()


def test_agreement_where_all_that_is_shared_is_tied(ask, jsonl, tmp_path, numbers):
    file = jsonl(line("a", "anna", [1, 1]), line("a", "ben", [2, 2]), line("b", "ben", [1, 2]))
    made = rank.run(tmp_path / "out", settings(), questions=ask({"a": ["3", "4"], "b": ["3", "4"]}), annotations=[file])
    agreement = {name: value for name, value in measured(numbers, made).items() if name.startswith("agreement/")}
    assert agreement == {"agreement/questions": 1, "agreement/pairwise": 1, "agreement/pairwise/anna+ben": 1}


def in_a_spreadsheet(path, ranks):
    """Fill in the exported table: (question, annotator) -> response -> rank."""
    with path.open(newline="", encoding="utf-8-sig") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        row["rank"] = ranks[row["question_id"], row["annotator"]][row["response_id"]]
    with path.open("w", newline="", encoding="utf-8-sig") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def in_an_editor(path, ranks):
    """Fill in the exported lines."""
    rows = [json.loads(row) for row in path.read_text(encoding="utf-8").splitlines()]
    filled = ({**row, "ranks": ranks[row["question_id"], row["annotator"]]} for row in rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in filled))


def test_the_exported_files_filled_in_give_the_same_rankings_whichever_is_used(by_hand, tmp_path, jsonl, sound):
    rows = [
        {
            "question_id": f"q{n}", "prompt_id": f"p{n}", "messages": user(f'say "{n}",\nplease'),
            "responses": [f"=a, {n}", f'b\n"{n}"', "", "ü"], "response_ids": [f"p{n}/{k}" for k in (5, 0, 3, 1)],
            "annotators": ["ben", "anna"][: 1 + n % 2], "source": "hand",
        }
        for n in range(4)
    ]  # fmt: skip
    questions = by_hand(QUESTIONS, rows).path
    ranks = {
        (row["question_id"], name): dict(zip(row["response_ids"], [2, 1, 3, 1 + n], strict=True))
        for n, row in enumerate(rows)
        for name in row["annotators"]
    }
    table, lines = tmp_path / "annotate.csv", tmp_path / "annotate.jsonl"
    write_csv(table, rows)
    write_jsonl(lines, rows)
    in_a_spreadsheet(table, ranks)
    in_an_editor(lines, ranks)
    saved = ({"question_id": q, "annotator": who, "ranks": said, "seconds": 1} for (q, who), said in ranks.items())
    by_page = jsonl(*reversed(list(saved)), name="page.jsonl")
    made = [
        rank.run(tmp_path / f"from-{file.name}", settings(), questions=questions, annotations=[file])
        for file in (table, lines, by_page)
    ]
    assert len({one.manifest.digest for one in made}) == 1
    sound(made[0])
    kept = made[0].table().to_pylist()
    assert [(row["prompt_id"], row["annotator"]) for row in kept] == [
        ("p0", "ben"), ("p1", "ben"), ("p1", "anna"), ("p2", "ben"), ("p3", "ben"), ("p3", "anna")
    ]  # fmt: skip
    assert (kept[0]["ranks"], kept[-1]["ranks"]) == ([1, 0, 2, 0], [1, 0, 2, 3])
    assert kept[0]["responses"] == rows[0]["responses"]


def test_exported_files_that_nobody_filled_in_are_waited_for(ask, tmp_path):
    questions = ask({"a": ["3", "4"], "b": ["3", "4"]}, "anna")
    table, lines = tmp_path / "annotate.csv", tmp_path / "annotate.jsonl"
    write_csv(table, Artifact.open(questions).table().to_pylist())
    write_jsonl(lines, Artifact.open(questions).table().to_pylist())
    for file in (table, lines):
        with pytest.raises(WaitingError, match=r"2 of 2 rankings asked .* anna 2; handed back blank: 2"):
            rank.run(tmp_path / "out", settings(), questions=questions, annotations=[file])


def test_a_ranking_keeps_its_id_whoever_else_ranks(ask, jsonl, tmp_path):
    texts = {"a": ["3", "4"], "b": ["3", "4"]}
    alone = jsonl(line("b", "anna", [1, 2]), name="alone.jsonl")
    more = jsonl(line("b", "ben", [1, 2]), line("a", "anna", [1, 2]), line("b", "anna", [2, 1]), name="more.jsonl")
    few = rank.run(tmp_path / "few", settings(), questions=ask({"b": texts["b"]}), annotations=[alone]).table()
    all_of_them = rank.run(tmp_path / "all", settings(), questions=ask(texts), annotations=[more]).table()
    ids = {(row["prompt_id"], row["annotator"]): row["ranking_id"] for row in all_of_them.to_pylist()}
    assert few["ranking_id"].to_pylist() == [ids["b", "anna"]]


def test_it_waits_for_those_who_have_not_ranked(ask, jsonl, tmp_path):
    questions = ask({name: ["3", "4"] for name in "abc"}, "anna", "ben")
    file = jsonl(
        line("a", "anna", [1, 2]), line("b", "anna", [1, 2]), line("c", "anna", []), line("c", "ben", [2, 1])
    )  # fmt: skip
    with pytest.raises(WaitingError) as caught:
        rank.run(tmp_path / "out", settings(), questions=questions, annotations=[file])
    assert caught.value.what == "3 of 6 rankings asked for are not in the files: anna 1, ben 2; handed back blank: 1"
    assert str(questions) in caught.value.where
    assert "feedback.answered_share, now 1" in caught.value.do
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("share", "enough"), [(0.28, True), (0.2801, False)])
def test_a_share_of_the_rankings_may_do(ask, jsonl, tmp_path, numbers, share, enough):
    """7 of 25; in floating point 0.28 * 25 is above 7."""
    questions = ask({f"p{n}": ["3", "4"] for n in range(25)})
    file = jsonl(*(line(f"p{n}", who, [1, 2]) for n in range(7) for who in ("anna", "ben")))
    chosen = settings(answered_share=share)
    if not enough:
        with pytest.raises(WaitingError, match="18 of 25 rankings asked for are not in the files: anybody 18"):
            rank.run(tmp_path / "out", chosen, questions=questions, annotations=[file])
        return
    made = rank.run(tmp_path / "out", chosen, questions=questions, annotations=[file])
    assert made.stats["rows"] == 14
    assert numbers(made)["rejected/unanswered", 0] == 18


GOOD = {"question_id": "q-a", "annotator": "anna", "ranks": {"a/0": 1, "a/1": 2}}
HEADER = "question_id,annotator,response_id,rank\n"
MALFORMED = {
    "unknown question": ("x.jsonl", {**GOOD, "question_id": "q-z"}, 1, "question_id 'q-z'", "rank with the questions"),
    "unknown response": ("x.jsonl", {**GOOD, "ranks": {"a/0": 1, "a/1": 1, "a/9": 2}}, 1, "a/9", "are a/0, a/1"),
    "response without a rank": ("x.jsonl", {**GOOD, "ranks": {"a/0": 1}}, 1, "response a/1", "rank all responses"),
    "response twice": (
        "x.csv", f"{HEADER}q-a,anna,a/0,1\nq-a,anna,a/1,1\nq-a,anna,a/0,2\n", 4, "a/0 of question q-a", "keep one",
    ),
    "rank left blank": ("x.csv", f"{HEADER}q-a,anna,a/0,1\nq-a,anna,a/1,\n", 3, "response a/1", "rank all responses"),
    "somebody else": ("x.jsonl", {**GOOD, "annotator": "dan"}, 1, "'dan' was not asked", "who was asked: anna, ben"),
    "nobody": ("x.jsonl", {**GOOD, "annotator": ""}, 1, "no annotator", "who was asked: anna, ben"),
    "text for a rank": ("x.jsonl", {**GOOD, "ranks": {"a/0": "best", "a/1": 2}}, 1, "'best'", "a whole number from 1"),
    "rank 0": ("x.csv", f"{HEADER}q-a,anna,a/0,0\nq-a,anna,a/1,2\n", 2, "'0'", "a whole number from 1"),
    "ranks in a list": ("x.jsonl", {**GOOD, "ranks": [1, 2]}, 1, "[1, 2], no object", 'write {"response_id": rank'),
    "missing field": ("x.jsonl", {"question_id": "q-a", "ranks": {}}, 1, "no annotator; found", "as it is"),
    "missing column": ("x.csv", "question_id,annotator\nq-a,anna\n", 1, "no response_id, no rank", "leave the header"),
    "broken line": ("x.jsonl", '{"question_id"', 1, "not JSON", "correct or remove this line"),
    "cut table": ("x.csv", f"{HEADER}q-a,anna\n", 2, "expected 4 fields", "save it as CSV"),
    "empty file": ("x.csv", "", None, "the file is empty", "leave it out"),
    "wrong type": ("x.xlsx", "PK", None, "cannot read files of type '.xlsx'", "saves .csv"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_file_is_refused_by_file_and_row_and_changes_nothing(kind, ask, tmp_path, jsonl):
    name, content, row, *expected = MALFORMED[kind]
    text = content if isinstance(content, str) else json.dumps(content) + "\n"
    (tmp_path / name).write_text(text)
    sound_one = jsonl({**GOOD, "annotator": "ben"}, name="ben.jsonl")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError) as caught:
        questions = ask({"a": ["3", "4"]}, "anna", "ben")
        rank.run(tmp_path / "out", settings(), questions=questions, annotations=[sound_one, tmp_path / name])
    place = tmp_path / name if row is None else f"{tmp_path / name}:{row}"
    fault = next(line for line in caught.value.what.splitlines() if line.startswith(f"  {place}: "))
    assert all(part in fault for part in expected), fault
    assert caught.value.where.startswith(f"{tmp_path / name} (")
    assert caught.value.exit_code == 2
    unchanged(tmp_path / "out", tmp_path, before)


def test_all_faults_of_all_files_are_told_before_anybody_is_waited_for(ask, tmp_path, jsonl):
    one = jsonl({**GOOD, "ranks": {"a/0": 0, "a/1": 1.5}}, name="one.jsonl")
    two = jsonl({**GOOD, "annotator": "ben"}, {**GOOD, "annotator": "ben"}, name="two.jsonl")
    with pytest.raises(InputError) as caught:
        questions = ask({"a": ["3", "4"], "b": ["3", "4"]}, "anna", "ben")
        rank.run(tmp_path / "out", settings(), questions=questions, annotations=[one, two])
    first, *listed = caught.value.what.splitlines()
    assert first == "3 faults in the annotators' files:"
    assert [fault.partition(": ")[0].strip() for fault in listed] == [f"{one}:1", f"{one}:1", f"{two}:2"]
    assert f"the first time at {two}:1" in listed[-1]


def test_settings_come_from_the_experiment(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'recipe = "dapo"\nseed = 3\n[models.new]\nlayers = 2\n[data.demonstrations]\nsource = "arithmetic"\n'
        '[data.prompts]\nsource = "arithmetic"\n[resources]\ngrader_seconds = 7.5\n'
        "[scale]\niterations = 1\ngroups = 1\nprompt_tokens = 8\nresponse_tokens = 8\nlearning_rate = 1e-3\n"
        "[feedback]\nerror_rate = 0.2\nanswered_share = 0.8\n"
    )
    chosen = Settings.of(Experiment.load(path))
    assert chosen == settings(error_rate=0.2, answered_share=0.8, grader_seconds=7.5, seed=3)


@pytest.mark.parametrize("change", [{"error_rate": 1.0}, {"answered_share": 0}, {"answered_share": 1.1}])
def test_settings_that_cannot_be(change):
    with pytest.raises(ExperimentError, match=next(iter(change))):
        settings(**change)


def test_a_command_line_ranks_what_people_filled_in(ask, jsonl, tmp_path):
    questions = ask({"a": ["3", "4"]}, "anna", "ben")
    files = [jsonl(GOOD, name="anna.jsonl"), jsonl({**GOOD, "annotator": "ben", "ranks": {}}, name="ben.jsonl")]
    command = rank.command(tmp_path / "out", settings(answered_share=0.5), questions=questions, annotations=files)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 rankings: anna 1; no question was ranked by two annotators" in done.stderr
    assert "left out: unanswered 1 rankings, blank 1 rankings" in done.stderr


def test_it_ranks_without_torch(ask, known, jsonl, tmp_path):
    """Not even while it works: agreement is measured, answers are graded."""
    questions, file = ask({"a": ["3", "4"]}, "anna", "ben"), jsonl(GOOD, {**GOOD, "annotator": "ben"})
    code = f"""
import sys
from pathlib import Path
from stages.rank import Settings, rank
given = {{"questions": Path({str(questions)!r})}}
rank.run(Path({str(tmp_path / "a")!r}), Settings(), annotations=[Path({str(file)!r})], **given)
rank.run(Path({str(tmp_path / "b")!r}), Settings(), prompts=Path({str(known("a"))!r}), **given)
sys.exit("torch" in sys.modules or "transformers" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
