"""Views over a run's files: the columns of the contracts with their place before them; nothing else can be read."""

import shutil

import polars as pl
import pyarrow as pa
import pytest
from polars.testing import assert_frame_equal

from pipeline.artifacts import Artifact, Outbox
from pipeline.catalog import EXPERIMENT_FILE, catalog
from pipeline.contracts import METRICS, ROLLOUTS
from pipeline.errors import ExperimentError
from pipeline.inspecting.views import PLACE, Views


def frame(table):
    return pl.DataFrame(pl.from_arrow(table))


def test_every_kind_of_dataset_is_a_view_with_its_contracts_columns(views, table_contracts):
    for contract in table_contracts:
        if contract is not METRICS:
            names = [field.name for field in contract.fields]
            assert views.columns(contract.name) == [*PLACE, *names]
            assert views.columns(f"{contract.name}_redone") == [*PLACE, "variant", *names]


def test_rows_stand_where_their_files_lie(views, planted):
    found = frame(
        views.run("select run, phase, iteration, stage, count(*) as rows from labels group by all order by all")
    )
    assert found.rows() == [
        ("run", "evaluation", 0, "labels", 32), ("run", "evaluation", 2, "labels", 32),
        ("run", "loop", 0, "labels-0", 32), ("run", "loop", 1, "labels-0", 32), ("run", "loop", 2, "labels-0", 32),
    ]  # fmt: skip
    assert frame(views.run("select distinct run, phase, iteration, stage from prompts")).rows() == [
        ("base", "foundations", None, "prompts")
    ]


def test_candidates_are_apart_from_the_rollouts_of_their_iteration(views):
    assert frame(views.run("select iteration, count(*) as n from candidates group by all")).rows() == [(1, 8)]
    found = frame(views.run("select count(*) as n from responses where response = 'to be ranked'"))
    assert found.rows() == [(0,)]


def test_redone_labels_are_apart_and_say_who_they_are(views):
    found = frame(views.run("select distinct iteration, stage, variant, verdict from labels_redone"))
    assert found.rows() == [(1, "labels-0", "strict", "wrong")]


def test_a_column_that_the_run_has_not_stored_is_null_and_never_an_error(views):
    found = frame(views.run("select reward_scores, old_logprobs from scores limit 1"))
    assert found["reward_scores"].to_list() == [None]
    assert not views.stored("scores", "reward_scores")
    assert views.stored("scores", "old_logprobs")
    assert not views.stored("rankings", "ranks")
    assert frame(views.run("select count(*) as n from rankings")).rows() == [(0,)]


def test_responses_join_all_that_is_known_of_each(views, planted):
    columns = ["phase", "iteration", "prompt_id", "sample", "reward", "gold", "verdict", "finish", "keep", "response"]
    order = ["phase", "iteration", "prompt_id", "sample"]
    found = frame(views.run(f"select {', '.join(columns)} from responses")).sort(order)
    assert_frame_equal(found, planted.responses.select(columns).sort(order), check_dtypes=False)
    numbers = frame(views.run("select * from responses where phase = 'loop'")).sort(order)
    expected = planted.loop().sort(order)
    assert numbers["length"].to_list() == expected["response_tokens"].list.len().to_list()
    assert numbers["advantage"].is_null().to_list() == expected["advantages"].is_null().to_list()
    means = expected["advantages"].list.mean().drop_nulls()
    assert numbers["advantage"].drop_nulls().to_list() == pytest.approx(means.to_list(), rel=1e-5)
    gap = expected["old_logprobs"].list.sum() - expected["ref_logprobs"].list.sum()
    assert numbers["kl_reference"].to_list() == pytest.approx(gap.to_list(), rel=1e-4)
    assert numbers["value"].to_list() == pytest.approx(expected["values"].list.first().to_list())
    assert set(numbers["prompt"]) == {f"What is {prompt}?" for prompt in planted.prompts["prompt_id"]}


def test_a_second_draw_of_a_prompt_answers_the_same_question(planted, tmp_path):
    shutil.copytree(planted.folder.parent / "base", tmp_path / "runs/base")
    row = {
        "prompt_id": "aaaa#1", "sample": 0, "prompt_tokens": [1], "response_tokens": [1], "response": "x",
        "sampler_logprobs": [-0.5], "finish": "stop", "seed": 0,
    }  # fmt: skip
    folder = tmp_path / "runs/twice"
    outbox = Outbox(folder / "0000/rollouts-0", ROLLOUTS, "planted", 1, "f" * 64, {}, {
        "prompts": [Artifact.open(tmp_path / "runs/base/prompts").record()]
    })  # fmt: skip
    outbox.write(0, pa.Table.from_pylist([row], schema=ROLLOUTS.schema(row)))
    outbox.commit()
    (folder / EXPERIMENT_FILE).touch()
    with Views(catalog([folder])) as views:
        found = frame(views.run("select prompt_id, prompt, answer from responses")).rows()
    assert found == [("aaaa#1", "What is aaaa?", "42")]


def test_metrics_and_artifacts_are_there_with_their_place(views):
    rows = frame(
        views.run("select kind, count(*) as n from metrics where name = 'reward/mean' group by all order by all")
    )
    assert dict(rows.rows()) == {
        "advantages": 3, "candidates": 1, "labels": 5, "prompts": 1, "rollouts": 5, "scores": 3
    }  # fmt: skip
    found = frame(views.run("select kind, variant, rows from artifacts where iteration = 1 order by all")).rows()
    assert found == [
        ("advantages", None, 27), ("candidates", None, 8), ("labels", "strict", 32), ("labels", None, 32),
        ("rollouts", None, 32), ("scores", None, 32),
    ]  # fmt: skip


def test_several_runs_are_told_apart(planted, tmp_path):
    shutil.copytree(planted.folder.parent, tmp_path / "runs")
    (tmp_path / "runs/run").rename(tmp_path / "runs/other")
    with Views(catalog([planted.folder, tmp_path / "runs/other"])) as both:
        rows = frame(both.run("select run, count(*) as n from labels group by all order by all")).rows()
    assert rows == [("other", 160), ("run", 160)]


@pytest.mark.parametrize(
    "statement",
    [
        "select * from read_csv('/etc/passwd')", "select * from '/etc/passwd'", "select * from glob('/etc/*')",
        "select * from read_text('/etc/hostname')", "select * from read_blob('/etc/hostname')",
        "select * from sniff_csv('/etc/passwd')", "select getenv('HOME')", "copy labels to '/tmp/labels.csv'",
        "copy (select 1) to '/tmp/one.csv'", "attach '/tmp/some.db'", "install httpfs", "load httpfs",
        "set threads = 1", "reset threads", "create table mine as select 1", "drop view labels",
        "insert into places values ('x')", "delete from places", "update places set run = 'x'", "pragma database_list",
        "call pragma_version()", "export database '/tmp/all'", "select 1; select 2", "", "prepare x as select 1",
        "use temp", "checkpoint", "vacuum", "begin transaction",
    ],
)  # fmt: skip
def test_a_statement_that_does_more_than_read_the_views_is_refused(views, statement):
    with pytest.raises(ExperimentError):
        views.run(statement)


@pytest.mark.parametrize(
    "statement",
    [
        "select 1 as one", "from labels limit 1", "with few as (select 1 as one) select * from few",
        "describe labels", "summarize labels", "show tables", "explain select 1", "values (1)",
    ],
)  # fmt: skip
def test_whatever_only_reads_is_answered(views, statement):
    assert views.run(statement).num_rows >= 1


def test_a_wrong_name_is_told_with_the_names_that_there_are(views):
    with pytest.raises(ExperimentError, match=r"(?s)nothere.*views: .*rollouts.*responses"):
        views.run("select * from nothere")
    with pytest.raises(ExperimentError, match=r"(?s)nocolumn.*describe"):
        views.run("select nocolumn from labels")
    with pytest.raises(ExperimentError, match="syntax error"):
        views.run("select * frm labels")


def test_a_path_may_hold_any_characters(planted, tmp_path):
    strange = tmp_path / "it's a run; drop"
    shutil.copytree(planted.folder.parent, strange)
    with Views(catalog([strange / "run"])) as views:
        assert frame(views.run("select count(*) as n from labels")).rows() == [(160,)]
