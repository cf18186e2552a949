"""Two artifacts, two runs: what was asked for differently, and which rows came out differently."""

import pyarrow as pa
import pytest

from pipeline.artifacts import Outbox
from pipeline.catalog import EXPERIMENT_FILE
from pipeline.contracts import DEMONSTRATIONS, DOCUMENTS, LABELS, POLICY
from pipeline.errors import ArtifactError
from pipeline.inspecting.differences import difference, row_difference, run_difference


def put(path, contract, rows, settings=None, inputs=None, fingerprint="f"):
    outbox = Outbox(path, contract, "planted", 1, fingerprint * 64, settings or {}, inputs or {})
    outbox.write(0, pa.Table.from_pylist(rows, schema=contract.schema(rows[0])))
    outbox.stats["reward/mean"] = sum(row.get("reward", 0) for row in rows)
    return outbox.commit()


def label(prompt, sample, reward, verdict="correct"):
    return {
        "prompt_id": prompt, "sample": sample, "reward": reward, "correct": None, "gold": None, "extracted": None,
        "target": None, "verdict": verdict, "vote_share": None, "keep": True, "dropped": None,
    }  # fmt: skip


@pytest.fixture
def pair(tmp_path):
    a = [label("p", 0, 1.0), label("p", 1, 1.0), label("q", 0, 0.0), label("q", 1, 0.0)]
    b = [label("p", 0, 1.0), label("p", 1, -1.0), label("q", 0, -1.0, "wrong"), label("r", 0, 0.0)]
    one = put(tmp_path / "a", LABELS, a, {"label": {"wrong": 0.0}, "seed": 0})
    other = put(tmp_path / "b", LABELS, b, {"label": {"wrong": -1.0}, "seed": 0})
    return one, other


def test_rows_are_matched_by_their_key_and_told_by_column(pair):
    rows = difference(*pair).rows
    assert (rows.only_a, rows.only_b, rows.both, rows.changed) == (1, 1, 3, 2)
    assert rows.columns == {"reward": 2, "verdict": 1}
    assert rows.first == [
        {"prompt_id": "q", "sample": 0, "reward": (0.0, -1.0), "verdict": ("correct", "wrong")},
        {"prompt_id": "p", "sample": 1, "reward": (1.0, -1.0)},
    ]


def test_so_many_rows_are_shown_and_all_are_counted(pair):
    rows = difference(*pair, shown=1).rows
    assert (len(rows.first), rows.changed) == (1, 2)


def test_settings_and_statistics_are_told_with_both_values(pair):
    found = difference(*pair)
    assert found.settings == [("label.wrong", 0.0, -1.0)]
    assert found.stats == [("reward/mean", 2.0, -1.0)]
    assert found.why == "settings: label.wrong"


def test_a_null_differs_from_a_value_and_not_from_a_null(tmp_path):
    a = put(tmp_path / "a", LABELS, [label("p", 0, 1.0, None), label("p", 1, 1.0, None)])
    b = put(tmp_path / "b", LABELS, [label("p", 0, 1.0, None), label("p", 1, 1.0, "wrong")])
    rows = difference(a, b).rows
    assert rows.changed == 1
    assert rows.first == [{"prompt_id": "p", "sample": 1, "verdict": (None, "wrong")}]


def test_rows_without_a_key_are_compared_as_wholes_and_counted_as_often_as_they_stand(tmp_path):
    def row(text):
        return {"prompt_id": "p", "messages": [{"role": "assistant", "content": text}], "source": "s"}

    a = put(tmp_path / "a", DEMONSTRATIONS, [row("x"), row("x"), row("y")])
    b = put(tmp_path / "b", DEMONSTRATIONS, [row("x"), row("z")])
    rows = difference(a, b).rows
    assert (rows.only_a, rows.only_b, rows.both) == (2, 1, 1)


def test_the_same_bytes_have_no_rows_that_differ(tmp_path):
    rows = [{"document_id": "d", "text": "t", "source": "s"}]
    found = difference(put(tmp_path / "a", DOCUMENTS, rows), put(tmp_path / "b", DOCUMENTS, rows))
    assert (found.rows, found.settings, found.stats) == (None, [], [])
    assert found.why == "nothing it was asked for"


def test_tables_with_the_same_rows_differ_in_none(pair):
    rows = row_difference(pair[0], pair[0], 5)
    assert (rows.only_a, rows.only_b, rows.both, rows.changed, rows.columns, rows.first) == (0, 0, 4, 0, {}, [])


def test_files_of_a_checkpoint_are_told_by_size_and_hash(tmp_path):
    made = []
    for name, text in (("a", "1"), ("b", "22")):
        outbox = Outbox(tmp_path / name, POLICY, "planted", 1, "f" * 64, {}, {})
        (outbox.path / "config.json").write_text(text)
        (outbox.path / "same.json").write_text("0")
        made.append(outbox.commit())
    ((name, one, other),) = difference(*made).files
    assert (name, one.split(",")[0], other.split(",")[0]) == ("config.json", "1 bytes", "2 bytes")


def test_two_kinds_are_refused(pair, tmp_path):
    other = put(tmp_path / "c", DOCUMENTS, [{"document_id": "d", "text": "t", "source": "s"}])
    with pytest.raises(ArtifactError, match="labels and documents cannot be compared"):
        difference(pair[0], other)


@pytest.fixture
def runs(tmp_path):
    """Two runs that are the same in iteration 0 and part in iteration 1, where other labels were asked for."""
    for name, wrong in (("a", 0.0), ("b", -1.0)):
        run = tmp_path / name
        first = put(run / "0000/labels-0", LABELS, [label("p", 0, 1.0)])
        second = put(run / "0001/labels-0", LABELS, [label("p", 0, wrong)], {"wrong": wrong})
        put(run / "0002/labels-0", LABELS, [label("p", 0, wrong)], inputs={"labels": [second.record()]})
        put(run / "0003/labels-0", LABELS, [label("p", 0, wrong)], inputs={"labels": [first.record()]})
        (run / EXPERIMENT_FILE).write_text(
            f'name = "{name}"\n[recipe]\nidea = "{name}"\n[recipe.label]\nwrong = {wrong}\n'
        )
    put(tmp_path / "b/0004/labels-0", LABELS, [label("p", 0, 1.0)])
    return tmp_path / "a", tmp_path / "b"


def test_two_runs_part_where_their_artifacts_do_and_the_reason_is_told(runs):
    found = run_difference(*runs)
    assert found.experiment == [("name", "a", "b"), ("recipe.label.wrong", 0.0, -1.0)]
    assert (found.same, found.only_a, found.only_b) == (1, 0, 1)
    assert found.parted == [
        ("0001/labels-0", "settings: wrong"), ("0002/labels-0", "inputs: labels"),
        ("0003/labels-0", "nothing it was asked for"),
    ]  # fmt: skip


def test_a_run_and_something_else_are_refused(runs):
    with pytest.raises(ArtifactError, match="not a run"):
        run_difference(runs[0], runs[1] / "0000")
