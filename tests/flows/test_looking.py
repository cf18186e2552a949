"""`rlhf show` and `rlhf sql` at the command line: on a real run, and with hostile words."""

import json
from pathlib import Path

import polars as pl
import pytest

from flows import heat, looking
from flows.sheets import out
from pipeline.artifacts import Artifact
from pipeline.errors import ArtifactError, ExperimentError, StorageError


def printed(function, *words, width=200):
    with out.capture() as shown:
        before, out.width = out.width, width
        try:
            function(*words)
        finally:
            out.width = before
    return shown.get()


def asked(*words, query=None, changes=(), rows=40, file=None):
    return printed(looking.sql, [str(word) for word in words], query, changes, rows, file)


def test_rollouts_are_shown_with_their_reward_and_verdict(walked):
    place = walked("grpo").iteration(1)
    shown = printed(looking.show, place / "rollouts-0", 2, None)
    first = Artifact.open(place / "labels-0").table().to_pylist()[0]
    assert "2 of 24 rows" in shown and f"verdict           {first['verdict']}" in shown
    assert f"reward            {first['reward']}" in shown
    assert "under the sampling distribution" in shown  # what the column means


def test_a_condition_chooses_rows_and_counts_them(walked):
    labels = walked("grpo").iteration(0) / "labels-0"
    wrong = sum(row["verdict"] == "wrong" for row in Artifact.open(labels).table().to_pylist())
    assert f"{min(3, wrong)} of {wrong} rows where verdict = 'wrong'" in printed(
        looking.show, labels, 3, "verdict = 'wrong'"
    )


def test_a_checkpoint_is_shown_without_rows(walked):
    shown = printed(looking.show, walked("grpo").iteration(0) / "policy", 5, None)
    assert "made by stage update" in shown and "rows where" not in shown


@pytest.mark.parametrize(
    "condition",
    [
        "true; drop view data",
        "nothere = 1",
        "reward < (select max(x) from read_csv('/etc/passwd') t(x))",
        "(",
        "1=1) --",
    ],
)
def test_a_condition_that_is_none_is_refused(walked, condition):
    with pytest.raises(ExperimentError):
        looking.show(walked("grpo").iteration(0) / "labels-0", 3, condition)


def test_a_statement_is_answered_over_several_runs(walked):
    runs = [walked("grpo").folder, walked("rloo").folder]
    shown = asked(*runs, "select run, count(*) as n from labels where phase = 'loop' group by all order by all")
    assert [line.split() for line in shown.splitlines()][-3:-1] == [["grpo", "72"], ["rloo", "72"]]


def test_answers_are_kept_whole_in_a_file(walked, tmp_path):
    run, statement = (
        walked("grpo").folder,
        "select prompt_id, sample, reward from labels where phase = 'loop' order by all",
    )
    for suffix, read in ((".parquet", pl.read_parquet), (".csv", pl.read_csv), (".jsonl", pl.read_ndjson)):
        file = tmp_path / f"rows{suffix}"
        assert "72 rows" in asked(run, statement, file=file, rows=1)
        assert read(file).height == 72 and read(file).columns == ["prompt_id", "sample", "reward"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.csv", "rows.jsonl", "rows.parquet"]
    with pytest.raises(ExperimentError, match=r"cannot write \.xlsx"):
        asked(run, statement, file=tmp_path / "rows.xlsx")


def test_fewer_rows_than_there_are_is_said(walked):
    assert "2 of 72 rows" in asked(walked("grpo").folder, "select * from labels where phase = 'loop'", rows=2)


def test_a_named_query_answers_and_says_what(walked):
    shown = asked(walked("grpo").folder, query="pass_rates")
    assert "how hard are the prompts" in shown and "below_quarter" in shown
    assert "no rows" in asked(walked("grpo").folder, query="grader_failures")


def test_alone_it_lists_the_queries_with_their_settings():
    shown = asked()
    assert "solved_then_lost" in shown and "(k = 20)" in shown


@pytest.mark.parametrize(
    ("words", "query", "told"),
    [
        (["select 1"], None, "name a run"), ([], "flipped", "name a run"),
        (["RUN"], "fliped", "did you mean 'flipped'"),
        (["RUN", "select 1; select 2"], None, "one statement"), (["RUN", "drop view labels"], None, "DROP"),
    ],
)  # fmt: skip
def test_wrong_requests_are_refused(walked, words, query, told):
    folder = str(walked("grpo").folder)
    with pytest.raises(ExperimentError, match=told):
        asked(*(folder if word == "RUN" else word for word in words), query=query)


def test_what_is_no_run_is_refused(walked):
    with pytest.raises(ArtifactError, match="not a run"):
        asked(walked("grpo").iteration(0), "select 1")


def test_control_characters_of_a_model_never_reach_the_terminal(walked):
    shown = asked(walked("grpo").folder, "select chr(27) || '[31mred[bold]' || chr(8238) as text")
    assert "\\u001b[31mred[bold]\\u202e" in shown and "\x1b[31m" not in shown and "\u202e" not in shown


# token by token


def test_responses_are_shown_token_by_token_with_the_numbers_where_there_is_no_colour(walked):
    shown = printed(heat.show, walked("vapo").iteration(1) / "advantages", 2, None, "values", None)
    row = Artifact.open(walked("vapo").iteration(1) / "advantages").table().to_pylist()[0]
    assert f"{row['prompt_id']}/{row['sample']}" in shown
    assert f"({row['values'][0]:.2g})" in shown and "<eos>" in shown and "critic's estimate" in shown


def test_with_colours_a_token_has_the_colour_of_its_number(walked, monkeypatch):
    from rich.console import Console

    console = Console(force_terminal=True, color_system="truecolor", width=200)
    monkeypatch.setattr(heat, "out", console)
    with console.capture() as shown:
        heat.show(walked("grpo").iteration(0) / "rollouts-0", 1, None, "logprobs", None)
    assert "\x1b[38;2;0;0;0;48;2;" in shown.get()


def test_a_condition_on_labels_chooses_which_responses(walked):
    labels = walked("grpo").iteration(0) / "labels-0"
    keys = looking.first_keys(Artifact.open(labels), "reward > 0", 3)
    shown = printed(heat.show, labels, 3, "reward > 0", "logprobs", None)
    assert [line.split()[0] for line in shown.splitlines() if "finish stop" in line or "finish length" in line] == [
        f"{prompt}/{sample}" for prompt, sample in keys
    ]


def test_the_page_holds_the_same_responses_and_opens(walked, tmp_path, opened):
    rollouts = walked("vapo").iteration(0) / "rollouts-0"
    printed(heat.show, rollouts, 2, None, None, tmp_path / "tokens.html")
    page = opened(tmp_path / "tokens.html")
    assert page.locator("article").count() == 2
    pieces = page.locator("article").first.locator(".token")
    row = Artifact.open(rollouts).table().to_pylist()[0]
    assert pieces.count() == len(row["response_tokens"])
    assert "".join(pieces.all_inner_texts()).startswith(row["response"][:4])
    pieces.nth(0).hover()
    assert "values" in page.locator(".heat-told").first.inner_text()
    before = pieces.nth(0).evaluate("token => token.style.backgroundColor")
    page.locator("#column").select_option("logprobs")
    assert page.locator("article .token").nth(0).evaluate("token => token.style.backgroundColor") != before


@pytest.mark.parametrize(
    ("stage", "column", "told"),
    [("labels-0", "colour", "tokens have no 'colour'"), ("labels-0", "values", "values is not stored")],
)
def test_a_number_that_tokens_do_not_have_is_refused(walked, stage, column, told):
    with pytest.raises(ExperimentError, match=told):
        heat.show(walked("grpo").iteration(0) / stage, 2, None, column, None)


def test_what_no_rollouts_belong_to_is_refused(walked):
    with pytest.raises(ArtifactError, match="no rollouts belong to"):
        heat.show(walked("grpo").base / "prompts", 2, None, None, None)


def test_hostile_text_stays_text_in_the_page(tmp_path, opened):
    from pipeline import pages

    hostile = ["</script><script>document.title='owned'</script>", "<img src=x onerror=alert(1)>", "\u2028\x1b[31m"]
    reading = {
        "prompt_id": "p", "sample": 0, "prompt": hostile[0], "pieces": hostile, "facts": {"verdict": hostile[1]},
        "columns": {"advantages": [1.0, -1.0, 0.0]},
    }  # fmt: skip
    columns = {"advantages": {"doc": hostile[0], "unit": hostile[1], "span": [-1, 1]}}
    data = {"where": hostile[0], "column": "advantages", "columns": columns, "readings": [reading]}
    (tmp_path / "page.html").write_text(pages.page("pipeline.inspecting", "tokens.html", data))
    page = opened(tmp_path / "page.html")
    assert page.title() == "Responses token by token"
    assert page.locator("img").count() == 0
    assert page.locator(".token").all_inner_texts() == [*hostile[:2], "\\u2028\\u001b[31m"]
    assert json.loads(page.locator("#data").inner_text())["where"] == hostile[0]


def test_a_place_that_cannot_be_written_is_told_and_nothing_is_left(walked):
    run = walked("grpo")
    with pytest.raises(StorageError, match="cannot write"):
        asked(run.folder, "select 1", file=Path("/proc/rows.csv"))
    with pytest.raises(StorageError, match="cannot write"):
        heat.show(run.iteration(0) / "rollouts-0", 1, None, None, Path("/proc/tokens.html"))
