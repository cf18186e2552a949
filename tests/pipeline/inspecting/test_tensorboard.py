import json
import re
import subprocess
import sys
import time
import urllib.request
from datetime import datetime

import pyarrow as pa
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.artifacts import Outbox
from pipeline.catalog import EXPERIMENT_FILE
from pipeline.contracts import CRITIC, DOCUMENTS, LABELS, POLICY
from pipeline.errors import ArtifactError, ExperimentError
from pipeline.inspecting.curves import by_iteration
from pipeline.inspecting.names import alias, tag
from pipeline.inspecting.tensorboard import FOLDER, write


@pytest.fixture
def run(tmp_path):
    """Makes artifacts of a run with the numbers that they measured: name -> value, or values by optimizer step."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / EXPERIMENT_FILE).touch()

    def make(place, contract, numbers, **inputs):
        given = {name: [one.record()] for name, one in inputs.items()}
        fingerprint = f"{abs(hash((place, str(numbers)))):064x}"
        out = Outbox(tmp_path / "run" / place, contract, "hand", 1, fingerprint, {}, given)
        if contract is LABELS:
            row = {field.name: None for field in LABELS.fields} | {"prompt_id": "a", "sample": 0, "reward": 1.0}
            out.write(0, pa.Table.from_pylist([row | {"keep": True}], schema=LABELS.schema()))
        elif contract is DOCUMENTS:
            row = {"document_id": "a", "text": "b", "source": "c"}
            out.write(0, pa.Table.from_pylist([row], schema=DOCUMENTS.schema()))
        else:
            (out.path / "config.json").write_text(place)
        for name, value in numbers.items():
            steps = value if isinstance(value, dict) else {0: value}
            for step, number in steps.items():
                out.metrics.add(name, number, step=step)
        return out.commit()

    make.folder = tmp_path / "run"
    return make


@pytest.fixture
def small(run):
    """Two iterations of a policy and a critic, the foundations before and an evaluation after."""
    documents = run("documents", DOCUMENTS, {})
    sft = run("sft", POLICY, {"loss/nll": {1: 3.0, 2: 2.0}}, documents=documents)
    for iteration in range(2):
        labels = run(f"000{iteration}/labels-0", LABELS, {"reward/mean": 0.25 + iteration}, policy=sft)
        for kind, contract in (("policy", POLICY), ("critic", CRITIC)):
            first = 2 * iteration + 1
            losses = {"loss/total": {first: 8.0 - first, first + 1: 7.0 - first}, "grad/norm": {first: 1.0}}
            run(f"000{iteration}/{kind}", contract, losses, labels=labels)
    run("eval/0000/labels", LABELS, {"accuracy/mean": 0.5}, policy=sft)
    return run


def curves(folder, phase):
    """Tag -> [(step, value)] as TensorBoard reads them."""
    read = EventAccumulator(str(folder / FOLDER / phase))
    read.Reload()
    return {name: [(e.step, e.value) for e in read.Scalars(name)] for name in read.Tags()["scalars"]}


def files(folder):
    return {
        path.relative_to(folder / FOLDER).as_posix(): path for path in (folder / FOLDER).rglob("*") if path.is_file()
    }


def test_iterations_are_the_steps_and_kinds_tell_apart_what_several_measure(small):
    write(small.folder)
    loop = curves(small.folder, "loop")
    assert loop["reward/mean"] == [(0, 0.25), (1, 1.25)]
    assert loop["policy/loss/total"] == loop["critic/loss/total"] == [(0, 6.5), (1, 4.5)]
    assert "loss/total" not in loop


def test_what_is_measured_at_every_optimizer_step_stands_by_it_as_well(small):
    write(small.folder)
    assert curves(small.folder, "loop")["steps/policy/loss/total"] == [(1, 7.0), (2, 6.0), (3, 5.0), (4, 4.0)]
    assert not [name for name in curves(small.folder, "loop") if name.startswith("steps/reward")]


def test_foundations_and_evaluations_are_curves_of_their_own(small):
    write(small.folder)
    foundations = curves(small.folder, "foundations")
    assert foundations["sft/loss/nll"] == [(0, 2.5)]
    assert foundations["steps/sft/loss/nll"] == [(1, 3.0), (2, 2.0)]
    assert curves(small.folder, "evaluation")["accuracy/mean"] == [(0, 0.5)]


def test_every_number_of_the_table_of_curves_is_there(small):
    from pipeline.catalog import catalog

    write(small.folder)
    for phase in ("loop", "evaluation"):
        entries = [entry for entry in catalog([small.folder]) if entry.phase == phase]
        wanted = {
            (tag(name, kind), iteration, value)
            for iteration, kind, name, value in by_iteration(entries)
            .select("iteration", "kind", "name", "value")
            .rows()
        }
        found = {(name, *point) for name, points in curves(small.folder, phase).items() for point in points}
        found = {point for point in found if not point[0].startswith("steps/")}
        assert {(name, step) for name, step, _ in found} == {(name, step) for name, step, _ in wanted}
        assert sorted(found) == [(name, step, pytest.approx(value, rel=1e-6)) for name, step, value in sorted(wanted)]


@pytest.mark.parametrize(
    ("whose", "reward", "norm"), [("trl", "reward", "grad_norm"), ("verl", "reward/mean", "actor/grad_norm")]
)
def test_their_names_stand_where_they_have_one(small, whose, reward, norm):
    write(small.folder, whose)
    loop = curves(small.folder, "loop")
    assert loop[reward] == [(0, 0.25), (1, 1.25)]
    assert loop[norm] == [(0, 1.0), (1, 1.0)]
    assert loop[f"steps/{norm}"] == [(1, 1.0), (3, 1.0)]
    assert (alias("grad/norm", "critic", whose) or "critic/grad/norm") in loop
    assert "sft/loss/nll" in curves(small.folder, "foundations")


def test_times_are_those_of_the_making(small):
    write(small.folder)
    read = EventAccumulator(str(small.folder / FOLDER / "loop"))
    read.Reload()
    made = json.loads((small.folder / "0001/labels-0/manifest.json").read_text())["made"]["time"]
    time_of = datetime.strptime(made, "%Y-%m-%dT%H:%M:%S%z").timestamp()
    assert read.Scalars("reward/mean")[1].wall_time == time_of


def test_a_file_for_each_iteration_in_the_order_of_iterations(small):
    written = write(small.folder)
    assert sorted(written) == sorted(files(small.folder).values())
    names = [re.sub(r"\.[0-9a-f]{16}$", "", name) for name in sorted(files(small.folder))]
    assert names == [
        "evaluation/events.out.tfevents.0000000000", "foundations/events.out.tfevents.0000000000",
        "loop/events.out.tfevents.0000000000", "loop/events.out.tfevents.0000000001",
    ]  # fmt: skip


def test_what_is_there_is_not_written_again_and_a_new_iteration_adds_a_file(small):
    write(small.folder)
    before = {name: (path.stat().st_mtime_ns, path.stat().st_ino) for name, path in files(small.folder).items()}
    assert write(small.folder) == []
    small("0002/labels-0", LABELS, {"reward/mean": 9.0})
    assert [path.name.split(".")[3] for path in write(small.folder)] == ["0000000002"]
    after = {name: (path.stat().st_mtime_ns, path.stat().st_ino) for name, path in files(small.folder).items()}
    assert after.items() >= before.items()
    assert curves(small.folder, "loop")["reward/mean"] == [(0, 0.25), (1, 1.25), (2, 9.0)]


def test_what_was_made_again_or_taken_away_leaves_no_second_point(small):
    import shutil

    write(small.folder)
    shutil.rmtree(small.folder / "0001/labels-0")
    small("0001/labels-0", LABELS, {"reward/mean": 5.0})
    write(small.folder)
    assert curves(small.folder, "loop")["reward/mean"] == [(0, 0.25), (1, 5.0)]
    shutil.rmtree(small.folder / "0001")
    assert write(small.folder) == []
    assert curves(small.folder, "loop")["reward/mean"] == [(0, 0.25)]


def test_variants_beside_an_artifact_are_not_what_the_run_goes_by(small):
    small("0001/labels-0.lenient", LABELS, {"reward/mean": 99.0})
    write(small.folder)
    assert curves(small.folder, "loop")["reward/mean"] == [(0, 0.25), (1, 1.25)]


def test_other_names_replace_the_files(small):
    write(small.folder)
    write(small.folder, "trl")
    assert "reward/mean" not in curves(small.folder, "loop")
    assert len(files(small.folder)) == 4


def test_files_of_others_stay(small):
    mine = small.folder / FOLDER / "mine" / "events.out.tfevents.1.host"
    mine.parent.mkdir(parents=True)
    mine.touch()
    write(small.folder)
    assert mine.exists()


def test_a_half_written_file_is_never_seen_under_its_name(small, monkeypatch):
    from pipeline.inspecting import tensorboard

    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(tensorboard, "flush", killed)
    with pytest.raises(KeyboardInterrupt):
        write(small.folder)
    assert files(small.folder) == {}


def test_what_cannot_be_asked_for_is_refused(small, tmp_path):
    with pytest.raises(ExperimentError, match="nobody's names are called 'ours'"):
        write(small.folder, "ours")
    with pytest.raises(ArtifactError, match="not a run"):
        write(tmp_path)


def test_it_loads_neither_torch_nor_tensorflow_and_warns_of_nothing():
    script = (
        "import sys; import pipeline.inspecting.tensorboard; "
        "print({'torch', 'tensorflow', 'transformers'} & set(sys.modules))"
    )
    told = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    assert (told.stdout, told.stderr) == ("set()\n", "")


def test_a_real_server_shows_the_tags(small, tmp_path):
    write(small.folder)
    words = [
        sys.executable, "-m", "tensorboard.main", "--logdir", str(small.folder / FOLDER), "--host", "127.0.0.1",
        "--port", "0",
    ]  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(words, stdout=log, stderr=log)
    try:
        url, wanted = None, {"evaluation", "foundations", "loop"}
        for _ in range(300):
            url = url or re.search(r"http://127\.0\.0\.1:\d+", (tmp_path / "log").read_text())
            tags = json.load(urllib.request.urlopen(f"{url[0]}/data/plugin/scalars/tags")) if url else {}
            if set(tags) == wanted and all(tags.values()):
                break
            assert server.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        assert set(tags["loop"]) == set(curves(small.folder, "loop"))
        assert "sft/loss/nll" in tags["foundations"]
        asked = f"{url[0]}/data/plugin/scalars/scalars?run=loop&tag=reward%2Fmean"
        assert [point[1:] for point in json.load(urllib.request.urlopen(asked))] == [[0, 0.25], [1, 1.25]]
    finally:
        server.terminate()
        server.wait(30)
