"""Numbers over iterations: counts add up, means are by rows, greatest values stay the greatest."""

import pyarrow as pa
import pytest

from pipeline.artifacts import Outbox
from pipeline.catalog import Entry
from pipeline.contracts import DOCUMENTS
from pipeline.inspecting.curves import by_artifact, by_iteration, by_step


def measured(path, rows, numbers):
    """An artifact of so many rows that measured (name, value, unit, step)."""
    outbox = Outbox(path, DOCUMENTS, "planted", 1, "f" * 64, {}, {})
    table = [{"document_id": str(n), "text": "t", "source": "s"} for n in range(rows)]
    outbox.write(0, pa.Table.from_pylist(table, schema=DOCUMENTS.schema()))
    for name, value, unit, step in numbers:
        outbox.metrics.add(name, value, unit, step)
    return Entry.of(outbox.commit())


@pytest.fixture
def entries(tmp_path):
    run = tmp_path / "run"
    first = [("reward/mean", 1.0, "reward", 0), ("verdict/wrong", 2, "rows", 0), ("length/max", 9, "tokens", 0)]
    second = [("reward/mean", 0.0, "reward", 0), ("verdict/wrong", 3, "rows", 0), ("length/max", 7, "tokens", 0)]
    return [
        measured(run / "0002/labels-0", 3, first),
        measured(run / "0002/labels-1", 1, second),
        measured(run / "0002/labels-0.lenient", 3, [("reward/mean", 50.0, "reward", 0)]),
        measured(run / "0003/policy", 1, [("loss/total", 4.0, "", 1), ("loss/total", 2.0, "", 2)]),
        measured(run / "eval/0002/labels", 1, [("reward/mean", 8.0, "reward", 0)]),
        measured(tmp_path / "base/sft", 1, [("loss/total", 6.0, "", 1)]),
    ]


def value(table, **where):
    (row,) = table.filter(**where).to_dicts()
    return row["value"]


def test_rounds_of_an_iteration_become_one_number_each(entries):
    table = by_iteration(entries)
    here = {"phase": "loop", "iteration": 2}
    assert value(table, name="reward/mean", **here) == 0.75
    assert value(table, name="verdict/wrong", **here) == 5
    assert value(table, name="length/max", **here) == 9
    seconds = sum(entry.artifact.stats["seconds"] for entry in entries[:2])
    assert value(table, name="time/seconds", **here) == pytest.approx(seconds)


def test_optimizer_steps_become_their_mean_and_stay_single_by_step(entries):
    assert value(by_iteration(entries), name="loss/total", iteration=3) == 3.0
    (row,) = by_artifact(entries).filter(name="loss/total", iteration=3).to_dicts()
    assert (row["steps"], row["stage"]) == (2, "policy")
    assert by_step(entries).filter(name="loss/total", iteration=3)["value"].to_list() == [4.0, 2.0]


def test_evaluations_and_foundations_are_told_apart_from_the_loop(entries):
    table = by_iteration(entries)
    assert value(table, name="reward/mean", phase="evaluation", iteration=2) == 8.0
    assert value(table.filter(table["iteration"].is_null()), name="loss/total", run="base") == 6.0


def test_what_measured_nothing_gives_an_empty_table_of_the_same_columns(entries):
    assert by_iteration([]).columns == by_iteration(entries).columns
    assert by_iteration([]).schema == by_iteration(entries).schema
    assert by_step([]).schema == by_step(entries).schema
    assert by_iteration([]).height == 0
