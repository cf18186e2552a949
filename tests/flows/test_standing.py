"""What a run says of itself: lineage, staleness, verification, status; on real runs that are then harmed."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows import looking, reports
from flows.lineage import Ledger, tree
from flows.status import Line, _folded, status
from flows.verifying import verified
from pipeline.artifacts import PRUNED, Artifact
from pipeline.catalog import Survey, artifacts_of
from pipeline.errors import ArtifactError, ExperimentError
from pipeline.storage import MANIFEST, SCRATCH


@pytest.fixture
def root(tmp_path, walked):
    """A copy of the runs of a recipe and its base, in another place than they were made."""
    run = walked("dapo")
    for name in (run.experiment.name, run.experiment.base):
        shutil.copytree(run.root / name, tmp_path / "runs" / name)
    return tmp_path / "runs"


def remade(path: Path) -> None:
    """Another artifact in the place of one: the manifest says other bytes."""
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["digest"] = "0" * 64
    (path / MANIFEST).write_text(json.dumps(manifest))


def states(root: Path) -> dict[str, str]:
    _, sheet = status(root / "dapo", every=True)
    return {row[0]: row[1] for row in sheet.rows}


def test_an_untouched_run_is_done_wherever_it_lies(root):
    found = states(root)
    assert {"0000/rollouts-0", "0001/labels-0", "0002/policy"} <= found.keys()
    assert set(found.values()) == {"done"}
    assert all(not one.faults and not one.remarks for one in verified(root))


def test_what_was_made_of_other_bytes_is_stale_and_so_is_what_was_made_of_that(root, walked):
    # The runs that these were copied from are still where the manifests say; a run that was moved has only its own.
    run = walked("dapo")
    hidden = run.root.with_name("hidden")
    run.root.rename(hidden)
    try:
        remade(root / "dapo" / "0001" / "labels-0")
        found = states(root)
    finally:
        hidden.rename(run.root)
    assert found["0001/advantages"].endswith("labels-0 has other bytes)")
    assert found["0001/policy"] == "stale (advantages is stale)"
    assert found["0002/rollouts-0"] == "stale (policy is stale)" and found["0002/policy"].startswith("stale")
    assert found["0001/rollouts-0"] == found["0000/policy"] == "done"


def test_what_was_redone_under_another_name_makes_what_came_after_stale(root, walked):
    run = walked("dapo")
    hidden = run.root.with_name("hidden")
    run.root.rename(hidden)
    try:
        here = root / "dapo" / "0001"
        shutil.copytree(here / "labels-0", here / "labels-0.lenient")
        found = states(root)
        ledger = Ledger.of(root)
        downstream = [ledger.name(path) for path in ledger.downstream(here / "labels-0")]
    finally:
        hidden.rename(run.root)
    assert found["0001/labels-0.lenient"] == "redone" and found["0001/labels-0"] == "done"
    assert found["0001/advantages"] == "stale (labels-0 was redone as labels-0.lenient)"
    assert downstream[0] in ("dapo/0001/scores", "dapo/0001/advantages") and "dapo/0002/policy" in downstream
    assert not [name for name in downstream if "/0000/" in name]


def test_lineage_goes_back_to_the_files_and_tells_what_is_shared_once(root, capsys):
    reports.out.width = 200
    reports.out.print(tree(root / "dapo" / "0001" / "policy"))
    said = capsys.readouterr().out
    assert said.count("advantages: ") == 2 and "dapo/0000/policy" in said and "see above" in said
    assert "prompts: " in said and "-base/prompts" in said
    (root / "dapo" / "0001" / "advantages" / MANIFEST).unlink()
    with pytest.raises(ArtifactError):
        tree(root / "dapo" / "0009" / "policy")
    shallow = tree(root / "dapo" / "0002" / "policy", 0)
    assert shallow.children == []


def harm_part(path):
    part = next(path.glob("part-*.parquet"))
    content = bytearray(part.read_bytes())
    content[50] ^= 4
    part.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "harm", "said"),
    [
        ("0001/labels-0", harm_part, "other bytes"),
        ("0001/policy", lambda path: (path / "model.safetensors").write_bytes(b"x"), "1 bytes, made with"),
        ("0000/rollouts-0", lambda path: next(path.glob("part-*")).unlink(), "gone"),
        ("0002/scores", remade, "its digest is not that"),
    ],
)
def test_verify_names_the_file_and_what_makes_it_again(root, name, harm, said, capsys):
    harm(root / "dapo" / name)
    [bad] = [one for one in verified(root) if one.faults]
    assert said in bad.faults[0] and bad.artifact.path == root / "dapo" / name
    assert bad.do == f"rlhf redo {root}/dapo {name}"
    assert not reports.verify(root / "dapo")
    assert "1 of them are not as they were made" in capsys.readouterr().out
    assert [one for one in verified(root / "dapo" / name) if one.faults]


def test_verify_of_what_the_runs_share_names_a_run_that_makes_it_again(root):
    base = next(path for path in root.iterdir() if path.name != "dapo")
    (base / "sft" / "config.json").unlink()
    [bad] = [one for one in verified(root) if one.faults]
    assert bad.do == f"rlhf redo {root}/dapo sft"


def test_pruned_weights_are_no_fault_and_a_stage_that_wants_them_is_told(root):
    policy = root / "dapo" / "0000" / "policy"
    (policy / PRUNED).touch()
    (policy / "model.safetensors").unlink()
    assert not [one for one in verified(root) if one.faults]
    assert states(root)["0000/policy"] == "pruned" and states(root)["0001/rollouts-0"] == "done"
    with pytest.raises(ArtifactError, match="pruned: its weights were deleted"):
        Artifact.open(policy).ensure_whole()


LOCKED = """
import fcntl, sys, time
log = open(sys.argv[1], "a")
fcntl.flock(log, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


def test_status_tells_running_from_unfinished_and_what_is_missing(root):
    here = root / "dapo" / "0002"
    shutil.rmtree(here / "policy")
    shutil.rmtree(here / "advantages")
    for name in ("advantages", "policy"):
        scratch = here / f"{SCRATCH}{name}-01234567"
        (scratch / "working").mkdir(parents=True)
        (scratch / "log.txt").touch()
        note = {"pid": os.getpid(), "host": "here", "since": "now", "command": "rlhf run"}
        (scratch / "working" / "holder.json").write_text(json.dumps(note))
    (here / f"{SCRATCH}advantages-01234567" / "part-00000.parquet").touch()
    log = here / f"{SCRATCH}policy-01234567" / "log.txt"
    with subprocess.Popen([sys.executable, "-c", LOCKED, str(log)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        _, sheet = status(root / "dapo", every=True)
        process.kill()
    rows = {row[0]: row for row in sheet.rows}
    assert rows["0002/advantages"][1] == "unfinished" and "1 parts" in rows["0002/advantages"][4]
    assert rows["0002/policy"][1] == "running" and f"process {os.getpid()} on here" in rows["0002/policy"][4]
    assert len(Survey.of(root).scratches) == 2
    for scratch in Survey.of(root).scratches:
        shutil.rmtree(scratch)
    missing = [name for name, state in states(root).items() if state == "missing"]
    assert missing == ["0002/advantages", "0002/policy"]


def test_a_long_run_is_told_in_a_second_on_few_lines(root):
    run = root / "dapo"
    (run / "experiment.toml").write_text(
        (run / "experiment.toml").read_text().replace("iterations = 3", "iterations = 110")
    )
    for number in range(3, 100):
        shutil.copytree(run / "0002", run / f"{number:04d}")
    began = time.process_time()
    _, sheet = status(run)
    assert time.process_time() - began < 10  # a smoke alarm: issue 7 measures
    rows = [row[:2] for row in sheet.rows]
    assert [row[1] for row in rows if row[0].startswith("0000 to 0087/ (")] == ["done"]
    assert ("0099/policy", "done") in rows and ("0100 to 0109", "missing") in rows
    assert len(rows) < 50
    assert len(status(run, every=True)[1].rows) > 500


def test_an_iteration_long_ago_that_is_not_well_stands_apart():
    lines = [Line(f"{number:04d}/{name}", "done", 1.0, 2.0) for number in range(40) for name in ("labels-0", "policy")]
    lines[21] = Line("0010/policy", "stale (labels-0 has other bytes)")
    folded = list(_folded(lines))
    assert [(line.name, line.state, line.seconds) for line in folded[:4]] == [
        ("0000 to 0009/ (20 artifacts)", "done", 20.0), ("0010/labels-0", "done", 1.0),
        ("0010/policy", "stale (labels-0 has other bytes)", None), ("0011 to 0027/ (34 artifacts)", "done", 34.0),
    ]  # fmt: skip
    assert [line.name for line in folded[4:6]] == ["0028/ (2 artifacts)", "0029/ (2 artifacts)"]
    assert [line.name for line in folded[-4:]] == ["0038/labels-0", "0038/policy", "0039/labels-0", "0039/policy"]


def test_a_folder_that_is_no_run_is_refused(tmp_path, root):
    with pytest.raises(ArtifactError, match="not a run"):
        status(tmp_path / "none")
    empty = tmp_path / "runs" / "empty"
    empty.mkdir(parents=True)
    with pytest.raises(ArtifactError, match="not a run"):
        status(empty)
    with pytest.raises(ArtifactError, match="no artifacts here"):
        list(verified(empty))


@pytest.mark.parametrize(
    "condition",
    [
        "1=1; copy (select 1) to '{bait}'", "exists (select * from read_text('/etc/passwd'))",
        "prompt_id in (select * from read_csv('/etc/passwd'))", "1=1) limit 1; attach '{bait}' as x; select (1",
        "1=1) limit 1; set enable_external_access=true; select (1", "nonsense = 1",
        "exists (select * from glob('/*'))", "exists (from '/etc/passwd')",
    ],
)  # fmt: skip
def test_what_is_typed_to_select_rows_reads_and_writes_nothing_else(root, tmp_path, condition, capsys):
    bait = tmp_path / "bait"
    with pytest.raises(ExperimentError, match=r"cannot select|one condition is wanted") as caught:
        looking.show(root / "dapo" / "0000" / "labels-0", 2, condition.format(bait=bait))
    assert caught.value.exit_code == 2 and not bait.exists()
    assert "root:" not in capsys.readouterr().out


def test_every_artifact_of_a_run_is_known_to_its_ledger(root):
    ledger = Ledger.around(root / "dapo" / "0001" / "policy")
    assert ledger.root == root.resolve()
    assert {one.path.resolve() for one in artifacts_of(root / "dapo")} <= ledger.manifests.keys()
