"""A stage as a Prefect task: Prefect sees when it runs and for how long; the manifest decides whether."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL
from prefect.task_engine import TaskRunTimeoutError

from flows import pictures
from flows.run import Run
from pipeline.artifacts import Artifact
from pipeline.catalog import name_of
from pipeline.errors import BusyError, EngineError, ExperimentError, GraderError, PipelineError
from pipeline.experiment import Resources
from pipeline.launch import launch
from pipeline.locks import PAUSE, held
from pipeline.metrics import console
from pipeline.stage import Stage, StageSettings

WORTH_ANOTHER_TRY = (EngineError, GraderError)
"""What may go well the next time; whatever was asked wrongly will not."""

LEASE = 60.0
"""Seconds for which Prefect keeps a place under a limit for a process that it hears nothing of any more."""


def as_task(
    run: Run, stage: Stage, out: Path, settings: StageSettings, **paths: Path | Sequence[Path] | None
) -> Artifact:
    """Perform a stage as a task named after its artifact; what is already there starts no task."""
    done = stage.committed(out, settings, **paths)
    if done is not None:
        return done
    name = name_of(out, run.root)

    def work() -> Artifact:
        return launch(stage, out, settings, (run.experiment, run.file), **paths)

    return perform(work, stage, out, run.experiment.resources, name, f"{run.experiment.name}-{name}")


def perform(
    work: Callable[[], Artifact], stage: Stage, out: Path, resources: Resources, name: str, key: str
) -> Artifact:
    """Do `work`, which makes `out`, as a task called `name`, and leave a link to it under `key`.

    A fault of the engine or the graders is tried again; every try has the stage's time limit; a limit on its hardware
    is waited for first.
    """
    seconds = resources.timeouts.get(stage.name)
    attempts = _task(stage.name, seconds, resources.retries, resources.retry_seconds)
    with holding(resources.limits.get(stage.hardware)):
        try:
            return attempts(name, work, key)
        except TaskRunTimeoutError as error:
            raise PipelineError(
                f"stage {stage.name} was ended after {seconds:g} s", str(out),
                f"raise resources.timeouts.{stage.name}; run again: what was finished is kept",
            ) from error  # fmt: skip


@cache
def _task(
    stage: str, seconds: float | None, retries: int, pause: float
) -> Task[[str, Callable[[], Artifact], str], Artifact]:
    """What Prefect knows of a stage.

    Its result cache has another idea of sameness (inputs + source + run id), so it stays off. No tags: Prefect asks
    its server for a concurrency slot for each, which cost two seconds at every sixth task.
    """
    return task(
        name=stage, task_run_name="{name}", cache_policy=NO_CACHE, persist_result=False, timeout_seconds=seconds,
        retries=retries, retry_condition_fn=_worth_another_try,
        retry_delay_seconds=[pause * 2**number for number in range(retries)],
    )(_attempt)  # fmt: skip


def _attempt(name: str, work: Callable[[], Artifact], key: str) -> Artifact:
    try:
        artifact = work()
    except WORTH_ANOTHER_TRY as error:
        console.line(f"  {name}: {error.what}")
        raise
    pictures.link(artifact, key)
    return artifact


def _worth_another_try(_: Any, __: Any, state: Any) -> bool:
    return isinstance(state.data, WORTH_ANOTHER_TRY)


@contextmanager
def holding(limit: str | None) -> Iterator[None]:
    """Hold a place under a limit of Prefect's, waiting until there is one.

    Prefect's own count is for all machines and for its pages; it lasts up to a minute longer than a process that was
    killed, and Prefect may give it away when its server restarts. So as many files as there are places are locked
    on this machine as well, which the kernel undoes at once. A server that lives only as long as this run knows of
    no other run: then there is one place, and its file alone. Raises `ExperimentError` where there is no such limit.
    """
    if limit is None:
        yield
        return
    with ExitStack() as stack:
        if PREFECT_API_URL.value() is None:
            stack.enter_context(_locked(limit, 1))
        else:
            stack.enter_context(_locked(limit, _places(limit)))
            stack.enter_context(
                concurrency(limit, strict=True, lease_duration=LEASE, raise_on_lease_renewal_failure=False)
            )
        yield


def _places(limit: str) -> int:
    with get_client(sync_client=True) as client:
        try:
            return client.read_global_concurrency_limit_by_name(limit).limit
        except ObjectNotFound as error:
            raise ExperimentError(
                f"Prefect has no concurrency limit {limit!r}", "resources.limits",
                f"`prefect gcl create {limit} --limit 1`; `rlhf deploy` makes those of flows/prefect.yaml",
            ) from error  # fmt: skip


@contextmanager
def _locked(limit: str, places: int) -> Iterator[None]:
    """Lock one of the files of a limit. They lie where all runs of this machine find them, wherever their roots are.

    Who waits holds the door: whoever let go a moment ago, and wants to come back, waits behind it.
    """
    folder = Path(tempfile.gettempdir()) / f"rlhf-limits-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    files = [folder / f"{quote(limit, safe='')}-{number}" for number in range(max(places, 1))]
    with ExitStack() as stack:
        with ExitStack() as waiting:
            _enter(waiting, [folder / f"{quote(limit, safe='')}-door"], limit)
            _enter(stack, files, limit)
        yield


def _enter(stack: ExitStack, files: Sequence[Path], limit: str) -> None:
    """Wait until one of the files can be locked, and leave it to the stack."""
    while True:
        for file in files:
            try:
                stack.enter_context(held(file, f"limit {limit}"))
                return
            except BusyError as busy:
                console.progress(f"waiting: {busy.what}")
        time.sleep(PAUSE)
