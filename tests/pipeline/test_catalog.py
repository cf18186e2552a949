"""What lies in a run, and where each artifact belongs."""

from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.artifacts import Outbox
from pipeline.catalog import EXPERIMENT_FILE, Entry, artifacts_of, catalog, find_runs, lies_at
from pipeline.contracts import DOCUMENTS
from pipeline.errors import ArtifactError

PLACES = {
    "base/prompts": ("base", "foundations", None, "prompts", None),
    "run/0003/labels-0": ("run", "loop", 3, "labels-0", None),
    "run/0003/labels-0.lenient": ("run", "loop", 3, "labels-0", "lenient"),
    "run/pretraining/critic": ("run", "foundations", None, "critic", None),
    "run/eval/0000/labels": ("run", "evaluation", 0, "labels", None),
    "run/relabeled/votes/0003/labels-0": ("run", "loop", 3, "labels-0", "votes"),
    "run/compare/0003/grpo/advantages": None,
}
"""Where it lies -> run, phase, iteration, stage, variant; None: in no catalog."""


def put(path, inputs=()):
    outbox = Outbox(path, DOCUMENTS, "planted", 1, "f" * 64, {}, {"documents": [one.record() for one in inputs]})
    row = {"document_id": str(path), "text": "t", "source": "s"}
    outbox.write(0, pa.Table.from_pylist([row], schema=DOCUMENTS.schema()))
    return outbox.commit()


@pytest.fixture
def root(tmp_path):
    base = put(tmp_path / "runs/base/prompts")
    for place in [place for place in PLACES if not place.startswith("base")]:
        put(tmp_path / "runs" / place, [base])
    (tmp_path / "runs/run" / EXPERIMENT_FILE).touch()
    return tmp_path / "runs"


def told(entry: Entry):
    return entry.run, entry.phase, entry.iteration, entry.stage, entry.variant


def test_everything_of_a_run_is_told_with_its_place_and_so_is_what_it_was_made_of(root):
    expected = {root / place: where for place, where in PLACES.items() if where is not None}
    assert {entry.artifact.path: told(entry) for entry in catalog([root / "run"])} == expected


def test_a_run_goes_by_neither_redone_nor_relabelled_nor_compared_artifacts(root):
    names = {str(one.path.relative_to(root / "run")) for one in artifacts_of(root / "run")}
    assert names == {"0003/labels-0", "eval/0000/labels", "pretraining/critic"}


def test_what_a_run_was_made_of_is_found_where_the_root_was_moved_to(root, tmp_path):
    moved = root.rename(tmp_path / "elsewhere")
    assert moved / "base/prompts" in {entry.artifact.path for entry in catalog([moved / "run"])}


def test_what_is_gone_is_left_out(root):
    record = Entry.of(next(iter(artifacts_of(root / "run")))).artifact.manifest.inputs["documents"][0]
    assert lies_at(record, [root]) == root / "base/prompts"
    (root / "base").rename(root.parent / "away")
    assert lies_at(record, [root]) is None
    assert {entry.run for entry in catalog([root / "run"])} == {"run"}


def test_runs_are_found_by_name_by_their_root_and_by_pattern_each_once(root):
    put(root / "other/0000/labels-0")
    (root / "other" / EXPERIMENT_FILE).touch()
    both = [root / "other", root / "run"]
    assert find_runs([root / "run"]) == [root / "run"]
    assert find_runs([root]) == both
    assert find_runs([f"{root}/*"]) == both
    assert find_runs([root / "run", f"{root}/r*", root]) == [root / "run", root / "other"]


@pytest.mark.parametrize("given", ["base", "run/0003", "nothing*", "no/such/place"])
def test_what_is_no_run_is_refused(root, given):
    with pytest.raises(ArtifactError, match="no"):
        find_runs([root / given])


def test_a_pattern_that_begins_here_is_read_from_here(root, monkeypatch):
    monkeypatch.chdir(root)
    assert find_runs(["r*"]) == [Path("run")]
