"""`rlhf deploy` tells a Prefect server what it can start; `rlhf serve` runs all that this takes, on this machine.

    server     keeps schedules and states, draws the pages; only started where none answers
    worker     starts a process for each run that is due

Whatever of it ends is started again, until Ctrl-C. What a worker that was killed had started is ended before the next
worker begins: nobody could cancel it any more. Its run goes on with the next schedule.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import psutil
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, WorkPoolCreate
from prefect.client.schemas.objects import State, StateType
from prefect.events import AutomationCore, EventTrigger, Posture, ResourceSpecification
from prefect.events.actions import ChangeFlowRunState
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
from prefect.states import Crashed
from prefect.workers.process import ProcessWorker

from pipeline.errors import ExperimentError, PipelineError
from pipeline.metrics import console

PREFECT_FILE = Path(__file__).parent / "prefect.yaml"

POOL = "rlhf"
LIMITS = {"gpu": 1}
"""Concurrency limits that are made where they are missing; `resources.limits` of an experiment names them."""

PORT = 4200
SILENCE = 90
"""Seconds without a sign of life after which a run is declared dead; it gives one every 30 (flows/prefect.yaml)."""

START = 120.0
"""Seconds within which a server has to answer."""

END = 15.0
"""Seconds that what a server or a worker has started has to end; a stage takes up to 5 (pipeline/launch.py)."""

LAST = 3.0
"""Seconds that the server or the worker itself has after that: an idle worker takes half a minute otherwise."""

TRIES = 3
"""Starts after which no other is made, where all of them lasted no longer than `SHORT` on average."""

SHORT = 20.0
"""Seconds."""

PAUSE = 0.5
"""Seconds between two looks at what runs."""

FLOW_RUN = "PREFECT__FLOW_RUN_ID"
"""Environment variable of a process that works on a flow run."""

DEAD = "rlhf: runs that fell silent are dead"


def deploy(folder: Path) -> None:
    """Register what flows/prefect.yaml names with the server at PREFECT_API_URL; runs will start in `folder`.

    The work pool, the concurrency limits and the automation that buries dead runs are made where they are missing.
    Raises `ExperimentError` where no server answers.
    """
    url = PREFECT_API_URL.value()
    if url is None or not _answers(url):
        raise ExperimentError(
            "PREFECT_API_URL names no Prefect server" if url is None else f"no Prefect server answers at {url}", "",
            "`rlhf serve` runs one and deploys; or `prefect server start`, then `export "
            f"PREFECT_API_URL=http://127.0.0.1:{PORT}/api`",
        )  # fmt: skip
    with get_client(sync_client=True) as client:
        _prepare(client)
    words = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--prefect-file", str(PREFECT_FILE), "--all"]
    done = subprocess.run(  # noqa: S603
        words, cwd=folder, env={**os.environ, "PREFECT_API_URL": url}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise PipelineError(
            f"Prefect did not take the deployments:\n{done.stdout}{done.stderr}", str(PREFECT_FILE), "correct the file"
        )
    console.line(f"deployed to {url}; runs start in {folder}")


def _prepare(client: SyncPrefectClient) -> None:
    with suppress(ObjectAlreadyExists):
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=template))
    for name, limit in LIMITS.items():
        try:
            client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=limit))
    if not client.read_automations_by_name(DEAD):
        client.create_automation(_burial())


def _burial() -> AutomationCore:
    """Prefect waits for ever for a run whose worker died with it. Where signs of life stop, it is declared dead."""
    ends = [f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")]
    sign = "prefect.flow-run.heartbeat"
    trigger = EventTrigger(
        match=ResourceSpecification.model_validate({"prefect.resource.id": "prefect.flow-run.*"}),
        for_each={"prefect.resource.id"}, after={sign}, expect={sign, *ends}, posture=Posture.Proactive, threshold=1,
        within=timedelta(seconds=SILENCE),
    )  # fmt: skip
    crashed = ChangeFlowRunState(
        state=StateType.CRASHED, name="Crashed", message=f"No sign of life for {SILENCE} s; the next run goes on."
    )
    return AutomationCore(name=DEAD, trigger=trigger, actions=[crashed])


@dataclass
class Service:
    """A program that is kept running."""

    name: str
    words: list[str]
    environment: dict[str, str]
    log: Path | None = None
    """Where its words go; to the terminal when absent."""
    ready: Callable[[], bool] | None = None
    """Whether it answers; not asked when absent."""
    process: "subprocess.Popen[bytes] | None" = None
    starts: list[float] = field(default_factory=list)

    def start(self) -> None:
        """Start it and wait until it answers. Raises `PipelineError` where it does not."""
        self.starts.append(time.monotonic())
        with ExitStack() as stack:
            said = None if self.log is None else stack.enter_context(self.log.open("ab"))
            # A session of its own: Ctrl-C is for us, and we end things in their order.
            self.process = subprocess.Popen(  # noqa: S603
                self.words, env=self.environment, start_new_session=True, stdin=subprocess.DEVNULL,
                stdout=said, stderr=said,
            )  # fmt: skip
        while self.ready is not None and not self.ready():
            if not self.runs() or time.monotonic() > self.starts[-1] + START:
                raise PipelineError(f"the {self.name} does not start", " ".join(self.words), f"read {self._told()}")
            time.sleep(PAUSE)

    def _told(self) -> str:
        return "what it said above" if self.log is None else str(self.log)

    def runs(self) -> bool:
        """Whether it is still there."""
        return self.process is not None and self.process.poll() is None

    def restart(self) -> None:
        """Start it again after it ended by itself. Raises `PipelineError` where it ends again and again."""
        if len(self.starts) >= TRIES and time.monotonic() - self.starts[-TRIES] < TRIES * SHORT:
            raise PipelineError(
                f"the {self.name} ends as soon as it starts", " ".join(self.words), f"read {self._told()}"
            )
        console.line(f"the {self.name} has ended; starting it again")
        self.end()
        self.start()

    def end(self) -> None:
        """End it and all that it started, in good order where that does not take too long."""
        if self.process is None:
            return
        started = [member for member in _members(self.process.pid) if member.pid != self.process.pid]
        flow_runs = _flow_runs(started)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        _wait(END, lambda: any(map(_alive, started)))
        _wait(LAST, self.runs)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        _declare_dead(flow_runs)


def _flow_runs(processes: Sequence[psutil.Process]) -> set[str]:
    """The flow runs that these processes work on."""
    found = set()
    for process in processes:
        with suppress(psutil.Error):
            found.add(process.environ().get(FLOW_RUN, ""))
    return found - {""}


def _declare_dead(flow_runs: set[str]) -> None:
    """Tell the server of flow runs that were ended: they die without saying so (a signal ends them within a task)."""
    if not flow_runs:
        return
    dead: State[None] = Crashed(message="Ended with its worker; the next run goes on.")
    with get_client(sync_client=True) as client:
        for flow_run in flow_runs if client.api_healthcheck() is None else ():
            state = client.read_flow_run(UUID(flow_run)).state
            if state is None or not state.is_final():
                client.set_flow_run_state(UUID(flow_run), dead)


def _wait(seconds: float, going_on: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and going_on():
        time.sleep(PAUSE / 5)


def _members(group: int) -> list[psutil.Process]:
    """The processes of a group, also where its leader is gone."""
    found = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError):
            if os.getpgid(process.pid) == group:
                found.append(process)
    return found


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def serve(folder: Path, port: int | None = None, database: str | None = None) -> None:
    """Run a server where none answers, the deployments and a worker, until Ctrl-C or SIGTERM ends all of them."""
    url = f"http://127.0.0.1:{port}/api" if port else PREFECT_API_URL.value() or f"http://127.0.0.1:{PORT}/api"
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    services: list[Service] = []
    with temporary_settings({PREFECT_API_URL: url}):
        try:
            _start(services, url, folder, database)
            while True:
                for service in services:
                    if not service.runs():
                        service.restart()
                time.sleep(PAUSE)
        except KeyboardInterrupt:
            console.line("ending")
        finally:
            with _deaf(), ExitStack() as stack:
                for service in services:
                    stack.callback(service.end)  # the last one first


def _start(services: list[Service], url: str, folder: Path, database: str | None) -> None:
    environment = {**os.environ, "PREFECT_API_URL": url}
    if not _answers(url):
        services.append(_server(url, environment, database))
        console.line(f"starting a server at {url}; it writes to {services[0].log}")
        services[0].start()
    deploy(folder)
    _tell(url)
    services.append(_worker(environment))
    services[-1].start()


@contextmanager
def _deaf() -> Iterator[None]:
    """Do not be interrupted: a second Ctrl-C would leave things behind."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _server(url: str, environment: dict[str, str], database: str | None) -> Service:
    place = urlsplit(url)
    if place.hostname not in ("127.0.0.1", "localhost"):
        raise ExperimentError(
            f"no Prefect server answers at {url}", "PREFECT_API_URL", "start it there, or unset it: one is started here"
        )
    words = [
        sys.executable,
        "-m",
        "prefect",
        "server",
        "start",
        "--host",
        "127.0.0.1",
        "--port",
        str(place.port or PORT),
    ]
    # Who holds which place under a limit is kept in files: from memory it would be lost with the server, and the places
    # stay taken for ever.
    own = {
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
    } | ({} if database is None else {"PREFECT_API_DATABASE_CONNECTION_URL": database})
    # Not to the terminal: with SQLite it often says that its database is locked, and tries again.
    log = PREFECT_HOME.value() / "rlhf-server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    return Service("server", words, {**environment, **own}, log, lambda: _answers(url))


def _worker(environment: dict[str, str]) -> Service:
    words = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process"]
    return Service("worker", words, environment)


def _tell(url: str) -> None:
    """Where the pages are, and what to type to resume a schedule."""
    lines = [f"pages: {url.removesuffix('/api')}", "schedules that do nothing yet, and how to resume them:"]
    typed = f"PREFECT_API_URL={url} prefect deployment schedule resume"
    with get_client(sync_client=True) as client:
        flows: dict[Any, str] = {}
        for deployment in client.read_deployments():
            name = flows.setdefault(deployment.flow_id, client.read_flow(deployment.flow_id).name)
            idle = [schedule for schedule in deployment.schedules if not schedule.active]
            lines += [f"  {typed} {name}/{deployment.name} {schedule.id}" for schedule in idle]
    console.line("\n".join([*lines, "Ctrl-C ends the server, the worker and what it runs"]))


def _answers(url: str) -> bool:
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        return client.api_healthcheck() is None
