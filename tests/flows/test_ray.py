"""Shards on a Ray cluster of two CPUs on this machine: workers are killed, errors come back, rows are the same."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from flows.execute import walk
from flows.run import Run
from pipeline.catalog import artifacts_of
from pipeline.experiment import Experiment

ROOT = Path(__file__).parents[2]

SIZES = (
    "data.world.terms=[2,2]", "data.world.largest=60", "data.demonstrations.count=1000", "data.prompts.count=200",
    "data.held_out.count=16", "sft.batch=20", "sft.epochs=2", "scale.response_tokens=24", "scale.iterations=1",
    "scale.responses=1040", "evaluation.samples=2", "evaluation.every=1", "feedback.prompts=40", "reward.epochs=1",
    "gates.reward_hacking=off", "gates.zero_spread=off", "resources.engine=transformers",
)  # fmt: skip
"""`arithmetic` with a reward model, which labels ask, and the log-probabilities of a reference; three shards."""


@pytest.fixture
def running(tmp_path, server):
    """Starts `rlhf run arithmetic` in a process group of its own."""

    def start(root, *changes):
        words = ["run", "arithmetic", "--recipe", "reinforce_pp", "--root", root, "--name", "one"]
        words += [word for change in (*SIZES, *changes) for word in ("--set", change)]
        environment = os.environ | {"PREFECT_API_URL": server, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [sys.executable, "-m", "flows.cli", *words], cwd=tmp_path, env=environment, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    return start


def ended_well(process):
    told, _ = process.communicate(timeout=300)
    assert process.returncode == 0, told
    return told


def digests(root):
    made = (one for run in sorted(root.iterdir()) for one in artifacts_of(run))
    return {one.path.relative_to(root).as_posix(): one.manifest.digest for one in made}


def workers_at_work(process):
    """Ray calls a process after what it is doing."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            found += [child] if "ray::Worker.do" in " ".join(child.cmdline()) else []
        except psutil.NoSuchProcess:
            continue
    return found


WAITING = """
    import time
    from pipeline.cluster import Workers
    from pipeline.experiment import Ray
    from pipeline.shards import done_by, spread

    class Work:
        def __call__(self, shard):
            time.sleep(1000)

    with done_by(Workers(Ray(), "rollout", "cpu")):
        list(spread(Work(), ["a"], lambda part: [part]))
"""


@pytest.fixture(scope="module", autouse=True)
def survivors(tmp_path_factory):
    """The processes of a cluster whose owner was killed; Ray's agents look around about once a minute."""
    script = tmp_path_factory.mktemp("killed") / "waiting.py"
    script.write_text(textwrap.dedent(WAITING))
    process = subprocess.Popen([sys.executable, str(script)], env=os.environ | {"PYTHONPATH": str(ROOT)})
    while not workers_at_work(process):
        assert process.poll() is None
        time.sleep(0.05)
    started = psutil.Process(process.pid).children(recursive=True)
    assert any("raylet" in one.name() for one in started)
    process.kill()
    process.wait()
    return started


def test_a_run_on_a_cluster_whose_worker_is_killed_in_the_middle_of_sampling_has_the_rows_of_one_process(
    tmp_path, running
):
    ended_well(running("inline"))
    process = running("ray", "resources.launcher=ray", "resources.ray.demands.rollout.workers=2")
    iteration, killed = tmp_path / "ray" / "one" / "0000", None
    while killed is None:
        assert process.poll() is None, process.stdout.read()
        busy = workers_at_work(process) if list(iteration.glob(".part-rollouts-0-*")) else []
        if len(busy) == 2:
            time.sleep(0.3)
            killed = busy[0]
            killed.kill()
            assert not (iteration / "rollouts-0").exists()
    ended_well(process)
    whole = digests(tmp_path / "inline")
    assert {"one/0000/rollouts-0", "one/0000/labels-0", "one/0000/scores", "one/0000/policy"} <= whole.keys()
    assert digests(tmp_path / "ray") == whole


CREW = """
    import json, os, signal, sys, time
    from dataclasses import dataclass
    from pathlib import Path

    from pipeline import cluster
    from pipeline.cluster import Workers
    from pipeline.errors import ContractError, PipelineError
    from pipeline.experiment import Demand, Ray
    from pipeline.shards import done_by, processors, spread

    @dataclass
    class Work:
        folder: str
        loaded: int = 0

        def __call__(self, shard):
            self.loaded += 1
            Path(self.folder, f"{shard}-{os.getpid()}-{time.time_ns()}").touch()
            if shard == "once" and len(list(Path(self.folder).glob("once-*"))) == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            if shard == "deadly":
                os.kill(os.getpid(), signal.SIGKILL)
            if shard == "wrong":
                raise ContractError("three rows are missing", "rollouts, rows 4 to 6", "sample again")
            time.sleep(0.1 if shard == "first" else 0)
            return shard, os.getpid(), self.loaded, int(os.environ["OMP_NUM_THREADS"])

        def rest(self):
            Path(self.folder, f"rest-{os.getpid()}").touch()

    def done(parts, resources=Ray(), stage="rollout", cut=lambda part: [part], reads=()):
        try:
            with done_by(Workers(resources, stage, "cpu")):
                assert processors() == int(resources.demands.get(stage, Demand()).cpus)
                return list(spread(Work(sys.argv[1]), parts, cut, reads))
        except PipelineError as error:
            return [type(error).__name__, error.what, error.where, error.do]

    numbers = [str(n) for n in range(20)]
    told = {
        "order": done(["first", *numbers]),
        "again": done(numbers),
        "cut": done([["a", "b", "c"], ["d"], ["e", "f"]], cut=lambda part: part),
        "two_cpus": done(["a"], Ray(demands={"label": Demand(cpus=2)}), "label"),
        "nothing": done([]),
        "once": done(["a", "once", "b"]),
        "wrong": done(["a", "wrong", "b"]),
        "after": done(["a"]),
        "deadly": done(["a", "deadly", "b"]),
        "too_much": done(["a"], Ray(demands={"rollout": Demand(gpus=8)})),
        "too_wide": done(["a"], Ray(demands={"rollout": Demand(cpus=1000)})),
        "unseen": done(["a"], reads=[Path(sys.argv[1]) / "not-there"]),
    }
    cluster.close()
    started = time.monotonic()
    told["unreachable"] = done(["a"], Ray(address="127.0.0.1:9"))
    told["seconds"] = time.monotonic() - started
    print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What a crew says of shards that are done, die, or go wrong."""
    folder = tmp_path_factory.mktemp("crew")
    script = folder / "crew.py"
    script.write_text(textwrap.dedent(CREW))
    (folder / "seen").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, str(script), str(folder / "seen")], env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {
        "seen": sorted(path.name for path in (folder / "seen").iterdir())
    }


def test_what_comes_of_shards_is_in_their_order_and_workers_stay(told):
    names = [shard for ((shard, *_),) in told["order"]]
    assert names == ["first", *map(str, range(20))]
    pids = {pid for ((_, pid, *_),) in told["order"]}
    assert 1 <= len(pids) <= os.cpu_count()
    assert {pid for ((_, pid, *_),) in told["again"]} <= pids
    assert max(loaded for ((_, _, loaded, _),) in told["order"]) > 1, "a worker keeps its work from shard to shard"
    assert [[shard for shard, *_ in part] for part in told["cut"]] == [["a", "b", "c"], ["d"], ["e", "f"]]
    assert {f"rest-{pid}" for pid in pids} <= {*told["seen"]}
    assert told["nothing"] == []


def test_a_worker_holds_what_is_demanded_for_the_stage(told):
    assert [threads for ((*_, threads),) in told["order"]] == [1] * 21
    assert [threads for ((*_, threads),) in told["two_cpus"]] == [2]


def test_a_shard_whose_worker_dies_is_done_again_once(told):
    assert [shard for ((shard, *_),) in told["once"]] == ["a", "once", "b"]
    assert len([name for name in told["seen"] if name.startswith("once-")]) == 2


def test_errors_of_a_worker_come_back_with_class_and_words(told):
    assert told["wrong"] == ["ContractError", "three rows are missing", "rollouts, rows 4 to 6", "sample again"]
    assert [shard for ((shard, *_),) in told["after"]] == ["a"]
    kind, what, where, do = told["unseen"]
    assert kind == "ArtifactError" and "cannot see it" in what and "not-there" in where and "--root" in do


def test_a_shard_that_kills_its_workers_is_given_up(told):
    kind, what, where, do = told["deadly"]
    assert kind == "EngineError" and "3 workers in a row died" in what and "shard 2" in where and "demands" in do
    assert len([name for name in told["seen"] if name.startswith("deadly-")]) == 3


def test_clusters_that_are_too_small_or_do_not_answer(told):
    kind, what, where, _ = told["too_much"]
    assert kind == "ExperimentError" and "8 GPUs" in what and where == "resources.ray.demands.rollout"
    assert "1000 CPUs and 0 GPUs of one machine" in told["too_wide"][1]
    kind, what, where, do = told["unreachable"]
    assert kind == "ExperimentError" and "127.0.0.1:9" in where and "ray start" in do
    assert told["seconds"] < 60


@pytest.fixture
def address(free_port):
    """Where a Ray cluster of somebody else listens: two processors, and by its word four GPUs."""
    # Not in pytest's folder, which is too long for the names of Ray's sockets.
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    ray, log = Path(sys.executable).with_name("ray"), folder / "log.txt"
    words = [
        str(ray), "start", "--head", "--block", f"--port={free_port}", "--node-ip-address=127.0.0.1", "--num-cpus=2",
        "--num-gpus=4", "--object-store-memory=100000000", "--include-dashboard=false", "--include-log-monitor=false",
        "--disable-usage-stats", f"--temp-dir={folder}",
    ]  # fmt: skip
    with log.open("w") as said:
        process = subprocess.Popen(words, stdout=said, stderr=said, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield f"127.0.0.1:{free_port}"
    finally:
        if process.poll() is None:
            family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
            for one in family:
                one.kill()
            psutil.wait_procs(family, timeout=30)
        process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


THERE = """
    import json, os, sys
    from pathlib import Path

    import ray

    from flows.execute import walk
    from flows.run import Run
    from pipeline import cluster
    from pipeline.experiment import Experiment, Ray
    from pipeline.launch import launch
    from pipeline.shards import done_by, spread

    class Work:
        def __call__(self, shard):
            return os.environ["CUDA_VISIBLE_DEVICES"]

        def rest(self):
            pass

    def launched(run, stage, out, settings, **paths):
        return launch(stage, out, settings, (run.experiment, run.file), **paths)

    file, address, root, *changes = sys.argv[1:]
    there = ("resources.launcher=ray", f"resources.ray.address={address}")
    walk(Run(Experiment.load(Path(file), (*changes, *there), "grpo"), Path(root), launched))
    cluster.close()
    with done_by(cluster.Workers(Ray(address=address), "rollout", "gpu", 2)):
        cards = {one for part in spread(Work(), range(4), lambda part: [part]) for one in part}
    print(json.dumps([ray.get_runtime_context().get_job_id(), *sorted(cards)]))
"""


def test_a_run_on_somebody_s_cluster_has_the_rows_of_one_process_and_leaves_it_to_others(
    tmp_path, desk, here_and_now, address
):
    changes = ("data.held_out=", "scale.iterations=1")
    inline = Run(Experiment.load(desk.experiment, changes, "grpo"), tmp_path / "inline", here_and_now)
    inline.folder.mkdir(parents=True)
    walk(inline)
    shutil.copytree(inline.base, tmp_path / "ray" / inline.base.name)
    (tmp_path / "there.py").write_text(textwrap.dedent(THERE))
    words = [str(tmp_path / "there.py"), str(desk.experiment), address, str(tmp_path / "ray"), *changes]
    done = subprocess.run(
        [sys.executable, *words], env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert digests(tmp_path / "ray") == digests(tmp_path / "inline")
    job, *cards = json.loads(done.stdout.splitlines()[-1])
    assert job.startswith("02"), "the cluster's first was the run"
    assert cards == ["0,1", "2,3"], "where no demand says otherwise, a worker has the devices of its engine"


def test_a_process_that_is_killed_leaves_no_cluster(survivors):
    _, alive = psutil.wait_procs(survivors, timeout=120)
    assert not alive
