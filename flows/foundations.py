"""Before the loop: ingest what the experiment names, and make policy 0. Runs on the same base share all of it."""

from dataclasses import dataclass
from pathlib import Path

from flows.run import Run
from pipeline.algorithms.labels import LABELS as LABELERS
from pipeline.artifacts import Artifact
from pipeline.contracts import POLICY, PROMPTS
from pipeline.errors import ExperimentError
from pipeline.experiment import DataSlice
from stages.ingest import Settings as IngestSettings
from stages.ingest import ingest
from stages.label import refuse_unanswered
from stages.sft import Settings as SftSettings
from stages.sft import sft


@dataclass(frozen=True)
class Foundations:
    """What the loop starts from."""

    prompts: Artifact
    held_out: Artifact | None
    policy: Artifact


def foundations(run: Run) -> Foundations:
    """Ingest prompts, held-out prompts and demonstrations; imitate the demonstrations."""
    data = run.experiment.data
    prompts = _ingested(run, "prompts", data.prompts)
    held_out = None if data.held_out is None else _ingested(run, "held_out", data.held_out)
    if "verdicts" in LABELERS.take(run.experiment.recipe.label).needs:
        for asked in (prompts, held_out):
            if asked is not None:
                refuse_unanswered(asked.table(["prompt_id", "answer", "grader"]).to_pylist(), asked)
    if held_out is not None:
        refuse_leak(prompts, held_out)
    return Foundations(prompts, held_out, _policy(run))


def _ingested(run: Run, part: str, wanted: DataSlice) -> Artifact:
    if wanted.artifact is not None:
        return Artifact.open(Path(wanted.artifact), None if part == "demonstrations" else PROMPTS)
    folder = Path(run.experiment.data.folder)
    settings = IngestSettings.of(run.experiment, {"part": part})
    return run.do(ingest, run.base / part, settings, files=[folder / name for name in wanted.files])


def _policy(run: Run) -> Artifact:
    models, demonstrations = run.experiment.models, run.experiment.data.demonstrations
    start = None if models.policy is None else Path(models.policy)
    if not run.experiment.sft.enabled or demonstrations is None:
        return Artifact.open(Path(models.policy or ""), POLICY)
    examples = _ingested(run, "demonstrations", demonstrations)
    settings = SftSettings.of(run.experiment)
    return run.do(sft, run.base / "sft", settings, demonstrations=examples.path, policy=start)


def refuse_leak(prompts: Artifact, held_out: Artifact) -> None:
    """Raise `ExperimentError` when a held-out prompt is also trained on: its accuracy would mean nothing."""
    shared = set(prompts.table(["prompt_id"])["prompt_id"].to_pylist()) & set(
        held_out.table(["prompt_id"])["prompt_id"].to_pylist()
    )
    if shared:
        raise ExperimentError(
            f"{len(shared)} held-out prompts are also training prompts; first: {', '.join(sorted(shared)[:5])}",
            f"{held_out.path} and {prompts.path}",
            "separate the files named in data.prompts and data.held_out",
        )
