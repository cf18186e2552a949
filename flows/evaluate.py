"""How good is a policy? Sample on held-out prompts and label; the same stages as in training, nothing filtered."""

from flows.run import Run
from pipeline.artifacts import Artifact
from stages.label import Settings as LabelSettings
from stages.label import label
from stages.rollout import Settings as RolloutSettings
from stages.rollout import rollout


def evaluate(run: Run, policy: Artifact, held_out: Artifact, iteration: int) -> Artifact:
    """Label `samples` responses to every held-out prompt; accuracy, pass@k and maj@k are in the artifact's stats."""
    plan, where = run.experiment.evaluation, run.folder / "eval" / f"{iteration:04d}"
    sampling = RolloutSettings.of(
        run.experiment,
        {
            "group_size": plan.samples, "temperature": plan.temperature, "top_p": plan.top_p, "top_k": None,
            "greedy": False, "draw": f"eval/{iteration}",
        },
    )  # fmt: skip
    rollouts = run.do(rollout, where / "rollouts", sampling, prompts=held_out.path, policy=policy.path)
    judging = LabelSettings.of(run.experiment, {"filter": ()})
    return run.do(label, where / "labels", judging, rollouts=rollouts.path, prompts=held_out.path)
