"""How a stage is run. The stage is the same, and so is its artifact; where the work happens is a resource.

inline     in this process: engines and models stay warm from one iteration to the next
process    the command that a person would type, in a process of its own: memory comes back when it ends, and
           each stage can have its own interpreter
torchrun   the same, in as many processes as torchrun is told to start, for the stages that train or read with a model;
           the others as under `process`
ray        as inline, but for stages made of shards: a cluster's workers do those
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import psutil

from pipeline.artifacts import Artifact
from pipeline.cluster import Workers
from pipeline.errors import ExperimentError, PipelineError
from pipeline.experiment import Experiment
from pipeline.lifeline import LIFELINE
from pipeline.shards import done_by
from pipeline.stage import ERROR_FILE, Stage, StageSettings

GRACE = 5.0
"""Seconds in which a process that is ended may put its things in order."""

PAUSE = 0.05
"""Seconds between two looks whether processes have ended."""

OUT_OF_MEMORY = Path("/proc/vmstat")
"""Where the kernel counts (`oom_kill`) the processes that it killed for lack of memory."""


_given_up: ContextVar[threading.Event | None] = ContextVar("given_up", default=None)


@contextmanager
def meanwhile(work: Callable[[], object]) -> Iterator[None]:
    """Do `work` in a thread while the block runs, and leave when both are done.

    Where the block raises, processes that `work` has launched are ended. Raises what `work` does after the block.
    """
    given_up, own = threading.Event(), copy_context()
    own.run(_given_up.set, given_up)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(own.run, work)
        try:
            yield
        except BaseException:
            given_up.set()
            raise
        done.result()


def launch(
    stage: Stage,
    out: Path,
    settings: StageSettings,
    experiment: tuple[Experiment, Path],
    **paths: Path | Sequence[Path] | None,
) -> Artifact:
    """Run `stage` the way the experiment's resources say, and return its artifact.

    `experiment` is the resolved experiment and the file that holds it, which a process of its own reads again.
    Raises what the stage raises, the same from a process; where that ended without a word, a `PipelineError` that names
    the command, or the signal that killed it. Whatever is raised here, no process is left behind.
    """
    resources = experiment[0].resources
    launcher = resources.launcher_of(stage.name)
    if launcher == "ray" and stage.shards:
        # Only who samples has engines of several devices, and settings that say so.
        devices = getattr(settings, "tensor_parallel", 1)
        with done_by(Workers(resources.ray, stage.name, stage.hardware, devices)):
            return stage.run(out, settings, **paths)
    if launcher in ("inline", "ray"):
        return _run_here(stage, out, settings, **paths)
    python = resources.python.get(stage.name, sys.executable)
    command = stage.command(out, settings, experiment, python, **paths)
    if launcher == "torchrun" and stage.ranks:
        command[1:1] = ["-m", "pipeline.torchrun", *resources.torchrun]
    ended = _run(command)
    if ended.code == 0:
        return Artifact.open(out)
    if ended.error is not None:
        raise ended.error
    raise _silent(f"stage {stage.name}", out, command, ended)


def _run_here(stage: Stage, out: Path, settings: StageSettings, **paths: Path | Sequence[Path] | None) -> Artifact:
    try:
        return stage.run(out, settings, **paths)
    finally:
        if stage.hardware == "gpu":
            from pipeline.models.device import give_back  # torch, which such a stage has loaded

            give_back()


@dataclass(frozen=True)
class _Ended:
    """How a process ended."""

    code: int
    error: PipelineError | None
    """What it said that went wrong."""
    starved: bool
    """Whether the kernel killed processes for lack of memory while it ran."""


def _silent(who: str, out: Path, command: list[str], ended: _Ended) -> PipelineError:
    """The error for a process that did not say what went wrong, or could not."""
    typed = shlex.join(command)
    # A shell that passes on that its child was killed adds 128.
    number = -ended.code if ended.code < 0 else ended.code - 128
    if number not in {*signal.Signals}:
        kind = ExperimentError if ended.code == ExperimentError.exit_code else PipelineError
        return kind(
            f"{who} ended with exit code {ended.code}", str(out), f"its message is above; try it alone: {typed}"
        )
    name = signal.Signals(number).name
    if number != signal.SIGKILL:
        return PipelineError(
            f"{who} was killed by {name}", str(out), f"run again: what was finished is kept; or try it alone: {typed}"
        )
    why = "the kernel killed processes for lack of memory meanwhile" if ended.starved else "out of memory?"
    return PipelineError(
        f"{who} was killed by {name} ({why})", str(out),
        "lower resources.micro_batch_tokens, or give it more memory; then run again: what was finished is kept",
    )  # fmt: skip


def _run(command: list[str]) -> _Ended:
    """Run in a session of its own that ends when this process does: by an exception here, by the pipe otherwise."""
    killed_before = _killed_for_memory()
    # Our own stdout or stderr that a child inherited would stay open as long as it lives, and whoever reads the other
    # end (a Prefect worker) would take us for alive. A terminal it may have: progress shows there.
    output = None if os.isatty(2) else subprocess.PIPE
    theirs, ours = os.pipe()
    try:
        with tempfile.TemporaryDirectory() as folder:
            said = Path(folder) / "error.json"
            environment = {**os.environ, LIFELINE: str(theirs), ERROR_FILE: str(said)}
            child = subprocess.Popen(  # noqa: S603
                command, start_new_session=True, pass_fds=(theirs,), env=environment,
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT if output else None,
            )  # fmt: skip
            with child, _relayed(child), _ended_with_us(child):
                code = _waited(child)
            return _Ended(code, _error_in(said), _killed_for_memory() > killed_before)
    finally:
        os.close(theirs)
        os.close(ours)


def _waited(child: "subprocess.Popen[bytes]") -> int:
    given_up = _given_up.get()
    if given_up is None:
        return child.wait()
    while (code := child.poll()) is None:
        if given_up.wait(PAUSE):
            raise PipelineError("given up, as what goes on beside it has failed")
    return code


@contextmanager
def _relayed(child: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Pass on what a child writes."""
    if child.stdout is None:
        yield
        return
    relay = threading.Thread(target=_relay, args=(child.stdout,), daemon=True)
    relay.start()
    try:
        yield
    finally:
        relay.join(GRACE)  # ends with the last process that holds the pipe


def _relay(source: BinaryIO) -> None:
    """Copy to stderr. Where nobody reads that any more, go on reading: the child's work is not to fail for it."""
    with suppress(ValueError):  # closed: whoever waited for the rest has given up
        while chunk := os.read(source.fileno(), 1 << 16):
            with suppress(OSError):
                os.write(2, chunk)


@contextmanager
def _ended_with_us(child: "subprocess.Popen[bytes]") -> Iterator[None]:
    """End a child and all that it started if anything is raised here, be it no `Exception`: a signal, a time limit."""
    try:
        yield
    finally:
        if child.poll() is None:
            _end(child)
        with suppress(ProcessLookupError):  # what it left behind
            os.killpg(child.pid, signal.SIGKILL)


def _end(child: "subprocess.Popen[bytes]") -> None:
    family = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
    try:
        _signal(child.pid, family, signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline and any(_alive(member) for member in family):
            child.poll()
            time.sleep(PAUSE)
    finally:  # also when a second signal comes while we wait
        _signal(child.pid, family, signal.SIGKILL)
        child.wait()


def _signal(group: int, family: Sequence[psutil.Process], number: signal.Signals) -> None:
    """Signal a process group, and those of the family that have left it (workers of a distributed training)."""
    with suppress(ProcessLookupError):
        os.killpg(group, number)
    for member in family:
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(member.pid) != group:
                member.send_signal(number)


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _error_in(said: Path) -> PipelineError | None:
    """The error that a child wrote: the same class with the same words."""
    if not said.exists():
        return None
    told = json.loads(said.read_bytes())
    kinds = {kind.__name__: kind for kind in _kinds(PipelineError)}
    return kinds[told["kind"]](told["what"], told["where"], told["do"])


def _kinds(kind: type[PipelineError]) -> Iterator[type[PipelineError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _kinds(below)


def _killed_for_memory() -> int:
    """Processes that the kernel has killed for lack of memory since it started; 0 where it does not say."""
    try:
        lines = OUT_OF_MEMORY.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
