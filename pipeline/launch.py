"""How a stage is run. The stage is the same, and so is its artifact; where the work happens is a resource.

inline    in this process: engines and models stay warm from one iteration to the next
process   the command that a person would type, in a process of its own: memory comes back when it ends, and
          each stage can have its own interpreter
"""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.artifacts import Artifact
from pipeline.errors import ExperimentError, PipelineError
from pipeline.experiment import Experiment
from pipeline.stage import LIFELINE, Stage, StageSettings


def launch(
    stage: Stage,
    out: Path,
    settings: StageSettings,
    experiment: tuple[Experiment, Path],
    **paths: Path | Sequence[Path] | None,
) -> Artifact:
    """Run `stage` the way the experiment's resources say, and return its artifact.

    `experiment` is the resolved experiment and the file that holds it, which a process of its own reads again.
    Raises what the stage raises; from a process, an error of the same exit code that names the command.
    """
    resources = experiment[0].resources
    if resources.launcher == "inline":
        return stage.run(out, settings, **paths)
    python = resources.python.get(stage.name, sys.executable)
    command = stage.command(out, settings, experiment, python, **paths)
    code = _run(command)
    if code == 0:
        return Artifact.open(out)
    kind = ExperimentError if code == ExperimentError.exit_code else PipelineError
    raise kind(
        f"stage {stage.name} ended with exit code {code}",
        str(out),
        f"its message is above; try it alone: {shlex.join(command)}",
    )


def _run(command: list[str]) -> int:
    """Run in a session of its own that ends when this process does: by an exception here, by the pipe otherwise."""
    theirs, ours = os.pipe()
    environment = {**os.environ, LIFELINE: str(theirs)}
    child = subprocess.Popen(command, start_new_session=True, pass_fds=(theirs,), env=environment)  # noqa: S603
    try:
        return child.wait()
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        os.close(theirs)
        os.close(ours)
