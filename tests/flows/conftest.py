"""A small run, made once by the command line, with Prefect's own server and a model that learns in seconds."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect.events.worker import EventsWorker

from flows import cli
from flows.execute import walk
from flows.run import Run
from pipeline.artifacts import Artifact
from pipeline.engines import close_engines
from pipeline.experiment import Experiment

EXPERIMENT = """
recipe = "dapo"

[recipe_changes.dapo]
rollout = { group_size = 4, rounds = 2 }
shape   = [{ kind = "overlong_penalty", limit = 16, buffer = 4 }]
update  = { minibatches = 2 }

[recipe_changes.grpo]
rollout = { group_size = 4 }
update  = { minibatches = 2 }

[models.new]
layers = 1
width  = 64
heads  = 2
kv_heads = 1
max_position = 32

[data.world]
terms   = [2, 2]
largest = 6
held_out_share = 0.3

[data.demonstrations]
source = "arithmetic"
count  = 20

[data.prompts]
source = "arithmetic"
count  = 20

[data.held_out]
source = "arithmetic"
split  = "held_out"
count  = 6

[sft]
epochs        = 30
batch         = 20
learning_rate = 1e-2

[scale]
iterations      = 2
groups          = 6
prompt_tokens   = 8
response_tokens = 16
learning_rate   = 1e-3

[evaluation]
samples = 4

[resources]
engine = "transformers"
"""

ALL_RECIPES = """
recipe = "grpo"

[recipe_changes]
dapo                  = { rollout = { group_size = 4, rounds = 2 }, update = { minibatches = 2 }, shape = [{ kind = "overlong_penalty", limit = 16, buffer = 4 }] }
grpo                  = { rollout = { group_size = 4 } }
instructgpt           = { sft = { epochs = 10 }, mix = { per_response = 1.0 }, update = { minibatches = 2 } }
ppo                   = { update = { epochs = 2 } }
reinforce_pp          = { update = { minibatches = 2 } }
reinforce_pp_baseline = { rollout = { group_size = 4 } }
rlsc                  = { rollout = { group_size = 4 } }
ttrl                  = { rollout = { group_size = 8 }, filter = [{ kind = "first", n = 4 }], update = { minibatches = 2 } }
vapo                  = { rollout = { group_size = 4 }, update = { minibatches = 2 }, critic = { pretrain_steps = 4 } }
vc_ppo                = { rollout = { group_size = 2 }, update = { minibatches = 2 }, critic = { pretrain_steps = 4 } }

[models.new]
layers = 1
width  = 64
heads  = 2
kv_heads = 1
max_position = 32

[data.world]
terms   = [2, 2]
largest = 6
held_out_share = 0.3

[data]
demonstrations = { source = "arithmetic", count = 20 }
prompts        = { source = "arithmetic", count = 20 }
documents      = { source = "arithmetic", count = 20 }

[sft]
epochs        = 20
batch         = 20
learning_rate = 1e-2

[feedback]
prompts   = 20
responses = 4

[reward]
epochs        = 2
batch         = 8
learning_rate = 1e-3

[critic]
pretrain_responses = 16
pretrain_batch     = 8

[scale]
iterations      = 3
responses       = 24
prompt_tokens   = 8
response_tokens = 16
learning_rate   = 1e-4

[resources]
engine = "vllm"
"""  # noqa: E501


@dataclass(frozen=True)
class Desk:
    """A folder with an experiment file, and `rlhf` run in it."""

    folder: Path

    @property
    def experiment(self) -> Path:
        return self.folder / "small.toml"

    def refusal(self, *words: str) -> str:
        """What `rlhf` says on stderr when it refuses the request, run in this process: most of its time is imports."""
        told = io.StringIO()
        with (
            chdir(self.folder),
            redirect_stderr(told),
            redirect_stdout(io.StringIO()),
            pytest.raises(SystemExit) as left,
        ):
            sys.argv = ["rlhf", *words]
            cli.main()
        assert left.value.code == 2, told.getvalue()
        assert "Traceback" not in told.getvalue()
        return told.getvalue()

    def rlhf(self, *words: str, code: int = 0, server: str | None = None) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        if server is not None:
            environment |= {"PREFECT_API_URL": server}
        done = subprocess.run(
            [sys.executable, "-m", "flows.cli", *words],
            cwd=self.folder, env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == code, f"{words} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done


@pytest.fixture(scope="session", autouse=True)
def prefect_home(tmp_path_factory) -> Path:
    """A home of its own for Prefect, so that no test reads or writes the user's."""
    home = tmp_path_factory.mktemp("prefect")
    os.environ["PREFECT_HOME"] = str(home)
    os.environ["PREFECT_MEMO_STORE_PATH"] = str(home / "memo_store.toml")
    os.environ["PREFECT_LOCAL_STORAGE_PATH"] = str(home / "storage")
    os.environ.pop("PREFECT_API_URL", None)
    return home


@pytest.fixture(scope="module", autouse=True)
def no_engine_stays() -> Iterator[None]:
    """Close what a module's runs left warm: a process holds one vLLM engine, and other tests build their own."""
    yield
    close_engines()


@pytest.fixture(scope="module", autouse=True)
def no_service_stays() -> Iterator[None]:
    """End what Prefect does beside a module's runs: its pings draw from `random`, which Hypothesis watches."""
    yield
    EventsWorker.drain_all(timeout=30, at_exit=False)  # of all its services


@pytest.fixture(scope="session")
def server(prefect_home) -> Iterator[str]:
    """The URL of a Prefect server of our own."""
    port = _free_port()
    words = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (prefect_home / "server.log").open("w") as log:
        # A home of its own: the temporary servers of other runs would write into the same database.
        own = os.environ | {"PREFECT_HOME": str(prefect_home / "server")}
        process = subprocess.Popen(words, env=own, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}/api"
    try:
        _wait_for(f"{url}/health", process)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


@dataclass(frozen=True)
class Served:
    """A folder with an experiment file, and `rlhf serve` in it: a server, the deployments and a worker of our own."""

    folder: Path
    url: str
    environment: dict[str, str]
    serve: psutil.Process

    @property
    def experiment(self) -> Path:
        return self.folder / "small.toml"

    def ask(self, place: str, body: object = None, method: str = "POST") -> Any:
        """What the server answers."""
        data = None if method == "GET" else json.dumps(body or {}).encode()
        request = urllib.request.Request(
            f"{self.url}/{place}", data, {"Content-Type": "application/json"}, method=method
        )
        for _ in range(20):
            try:
                # SQLite waits for a lock for up to a minute, or says at once that there is one.
                with urllib.request.urlopen(request, timeout=120) as answer:
                    text = answer.read()
                    return json.loads(text) if text else None
            except urllib.error.HTTPError as error:
                if error.code != 503:
                    raise
                time.sleep(0.5)
        raise TimeoutError(place)

    def deployment(self, name: str) -> dict[str, Any]:
        return self.ask(f"deployments/name/{name}/{name}", method="GET")

    def start(self, name: str, /, **parameters: Any) -> str:
        """Start a deployment now; the id of its flow run."""
        made = self.ask(f"deployments/{self.deployment(name)['id']}/create_flow_run", {"parameters": parameters})
        return made["id"]

    def state(self, flow_run: str) -> str:
        return self.ask(f"flow_runs/{flow_run}", method="GET")["state_type"]

    def runs(self, schedule: str) -> list[dict[str, Any]]:
        """The flow runs that a schedule has made."""
        all_runs = self.ask("flow_runs/filter", {"sort": "EXPECTED_START_TIME_ASC"})
        return [run for run in all_runs if (run["created_by"] or {}).get("id") == schedule]

    @contextmanager
    def every(self, seconds: int, name: str, /, **parameters: Any) -> Iterator[str]:
        """Start a deployment by a schedule, and in the end wait until nothing of it runs any more."""
        schedules = f"deployments/{self.deployment(name)['id']}/schedules"
        plan = {"schedule": {"interval": seconds}, "active": True, "parameters": parameters}
        schedule = self.ask(schedules, [plan])[0]["id"]
        try:
            yield schedule
        finally:
            self.ask(f"{schedules}/{schedule}", {"active": False}, "PATCH")
            assert wait_until(lambda: not [run for run in self.runs(schedule) if run["state_type"] not in ENDED])

    def worker(self) -> psutil.Process:
        """The process worker."""
        return next(child for child in self.serve.children() if "worker" in child.cmdline())


ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def wait_until(true: Callable[[], Any], seconds: float = 180.0) -> Any:
    """What `true` says once it is, or at the end of the time."""
    end = time.monotonic() + seconds
    while not (said := true()) and time.monotonic() < end:
        time.sleep(0.5)
    return said


def living(environment: dict[str, str]) -> list[str]:
    """Command lines of the processes that belong to a server's home."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            home = process.environ().get("PREFECT_HOME")
            if home == environment["PREFECT_HOME"] and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
    return found


@pytest.fixture(scope="session")
def served(tmp_path_factory) -> Iterator[Served]:
    """`rlhf serve`, impatient; when it has been ended, no process of it is left."""
    folder, home = tmp_path_factory.mktemp("served"), tmp_path_factory.mktemp("home")
    (folder / "small.toml").write_text(EXPERIMENT)
    (home / "temporary").mkdir()
    url = f"http://127.0.0.1:{_free_port()}/api"
    environment = os.environ | {
        "PREFECT_HOME": str(home), "PREFECT_LOCAL_STORAGE_PATH": str(home / "storage"),
        "PREFECT_MEMO_STORE_PATH": str(home / "memo.toml"), "TMPDIR": str(home / "temporary"),
        "PREFECT_API_URL": url, "OMP_NUM_THREADS": "1", "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5", "PREFECT_SERVER_SERVICES_SCHEDULER_MAX_RUNS": "3",
        "PREFECT_SERVER_SERVICES_SCHEDULER_MIN_RUNS": "2",
        "PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS": "2",
        "PREFECT_SERVER_CONCURRENCY_MAXIMUM_CONCURRENCY_SLOT_WAIT_SECONDS": "1",
    }  # fmt: skip
    log = home / "serve.log"
    words = [sys.executable, "-m", "flows.cli", "serve"]
    with log.open("w") as said:
        process = subprocess.Popen(words, cwd=folder, env=environment, stdout=said, stderr=said)
    try:
        assert wait_until(lambda: "started!" in log.read_text() or process.poll() is not None, 240)
        assert process.poll() is None, log.read_text()
        yield Served(folder, url, environment, psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait(60)
    assert living(environment) == []


@pytest.fixture(scope="session")
def free_port() -> int:
    """A port of this machine that nobody listens on."""
    return _free_port()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(240):
        assert process.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(url)


@pytest.fixture(scope="session")
def desk(tmp_path_factory) -> Desk:
    folder = tmp_path_factory.mktemp("desk")
    (folder / "small.toml").write_text(EXPERIMENT)
    return Desk(folder)


@pytest.fixture(scope="session")
def finished(desk, server) -> tuple[Desk, subprocess.CompletedProcess[str]]:
    """The desk after `rlhf run small.toml` under a running server, and what the command said.

    The other runs of these tests have no server, and start none by hand.
    """
    return desk, desk.rlhf("run", str(desk.experiment), server=server)


def direct(run, stage, out, settings, **paths) -> Artifact:
    """Perform a stage here and now, without Prefect."""
    return stage.run(out, settings, **paths)


@pytest.fixture(scope="session")
def recipes_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("recipes")


@pytest.fixture(scope="session")
def walked(recipes_folder):
    """The run of a recipe, walked once: all recipes stand on one base."""
    file = recipes_folder / "small.toml"
    file.write_text(ALL_RECIPES)
    done: dict[str, Run] = {}

    def run_of(name: str) -> Run:
        if name not in done:
            experiment = Experiment.load(file, recipe=name, name=name)
            done[name] = Run(experiment, recipes_folder / "runs", direct)
            done[name].folder.mkdir(parents=True)
            done[name].file.write_text(experiment.dump())
            walk(done[name])
        return done[name]

    return run_of


@pytest.fixture(scope="session")
def every_recipe() -> str:
    """An experiment in which every recipe runs within seconds."""
    return ALL_RECIPES


@pytest.fixture(scope="session")
def here_and_now():
    """Performs stages in this process, without Prefect."""
    return direct
