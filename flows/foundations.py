"""Before the loop: ingest what the experiment names, and make policy 0. Runs on the same base share all of it."""

from dataclasses import dataclass
from pathlib import Path

from flows.run import Run
from pipeline.algorithms.labels import LABELS as LABELERS
from pipeline.artifacts import Artifact
from pipeline.contracts import DEMONSTRATIONS, POLICY, PROMPTS
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
    wanted = data.demonstrations if run.experiment.sft.enabled else None
    demonstrations = None if wanted is None else _ingested(run, "demonstrations", wanted)
    for trained in (prompts, demonstrations):
        if held_out is not None and trained is not None:
            refuse_leak(trained, held_out)
    return Foundations(prompts, held_out, _policy(run, demonstrations))


def _ingested(run: Run, part: str, wanted: DataSlice) -> Artifact:
    if wanted.artifact is not None:
        return Artifact.open(Path(wanted.artifact), DEMONSTRATIONS if part == "demonstrations" else PROMPTS)
    folder = Path(run.experiment.data.folder)
    settings = IngestSettings.of(run.experiment, {"part": part})
    return run.do(ingest, run.base / part, settings, files=[folder / name for name in wanted.files])


def _policy(run: Run, demonstrations: Artifact | None) -> Artifact:
    named = run.experiment.models.policy
    if demonstrations is None:
        return Artifact.open(Path(named or ""), POLICY)
    start = None if named is None else Path(named)
    settings = SftSettings.of(run.experiment)
    return run.do(sft, run.base / "sft", settings, demonstrations=demonstrations.path, policy=start)


def refuse_leak(trained: Artifact, held_out: Artifact) -> None:
    """Raise `ExperimentError` when a held-out prompt is also trained on: its accuracy would mean nothing."""
    known, kept = (set(a.table(["prompt_id"])["prompt_id"].to_pylist()) for a in (trained, held_out))
    if shared := known & kept:
        raise ExperimentError(
            f"{len(shared)} held-out prompts are also trained on; first: {', '.join(sorted(shared)[:5])}",
            f"{held_out.path} and {trained.path}",
            "separate the files named in data.held_out from those in data.prompts and data.demonstrations",
        )
