"""A stage as a Prefect task: Prefect sees when it runs and for how long; the manifest decides whether."""

import re
from collections.abc import Sequence
from pathlib import Path

from prefect import task
from prefect.artifacts import create_link_artifact
from prefect.cache_policies import NO_CACHE

from flows.run import Run, name_of
from pipeline.artifacts import Artifact
from pipeline.launch import launch
from pipeline.stage import Stage, StageSettings


def as_task(
    run: Run, stage: Stage, out: Path, settings: StageSettings, **paths: Path | Sequence[Path] | None
) -> Artifact:
    """Perform a stage as a task named after its artifact; what is already there starts no task."""
    done = stage.committed(out, settings, **paths)
    if done is not None:
        return done
    name = name_of(out, run.root)

    def perform() -> Artifact:
        """Run the stage and leave a link to what it made."""
        artifact = launch(stage, out, settings, (run.experiment, run.file), **paths)
        _link(artifact, run.experiment.name, name)
        return artifact

    # Prefect's result cache has another idea of sameness (inputs + source + run id), so it stays off. No tags: Prefect
    # asks its server for a concurrency slot for each, which cost two seconds at every sixth task.
    decorate = task(name=stage.name, task_run_name=name, cache_policy=NO_CACHE, persist_result=False)
    return decorate(perform)()


def _link(artifact: Artifact, run: str, name: str) -> None:
    numbers = [f"{key}: {value:g}" for key, value in artifact.stats.items()]
    create_link_artifact(
        link=artifact.path.absolute().as_uri(),
        link_text=str(artifact.path),
        key=re.sub(r"[^a-z0-9]+", "-", f"{run}-{name}".lower()).strip("-"),
        description=", ".join(numbers),
    )
