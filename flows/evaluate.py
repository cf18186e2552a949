"""How good is a policy? Sample on held-out prompts and label; the same stages as in training, nothing filtered.

Where there are answers the verifier judges, whatever rewards the training: accuracy is against the truth.
"""

from typing import Any

import pyarrow.compute as pc

from flows.foundations import Foundations, judged
from flows.run import Run
from pipeline.algorithms.shelf import Line
from pipeline.artifacts import Artifact
from stages.label import Settings as LabelSettings
from stages.label import label
from stages.rollout import Settings as RolloutSettings
from stages.rollout import rollout

VERIFIER = Line(kind="verifier")


def answered(prompts: Artifact) -> bool:
    """Whether every prompt has an answer and a grader to compare with it."""
    table = prompts.table(["answer", "grader"])
    return table["answer"].null_count == 0 and "none" not in pc.unique(table["grader"]).to_pylist()


def evaluate(run: Run, base: Foundations, policy: Artifact, iteration: int) -> Artifact | None:
    """Label `samples` responses to every held-out prompt; accuracy, pass@k and maj@k are in the artifact's stats.

    None where the experiment holds no prompts out.
    """
    held_out = base.held_out
    if held_out is None:
        return None
    plan, where = run.experiment.evaluation, run.folder / "eval" / f"{iteration:04d}"
    sampling = RolloutSettings.of(
        run.experiment,
        {
            "group_size": plan.samples, "temperature": plan.temperature, "top_p": plan.top_p, "top_k": None,
            "greedy": False, "draw": f"eval/{iteration}",
        },
    )  # fmt: skip
    rollouts = run.do(rollout, where / "rollouts", sampling, prompts=held_out.path, policy=policy.path)
    changes: dict[str, Any] = {"filter": ()}
    judgements = None
    if answered(held_out):
        changes |= {"label": VERIFIER}
    else:
        judgements = judged(run, where / "judgements", rollouts, base.reward_model)
    judging = LabelSettings.of(run.experiment, changes)
    return run.do(
        label, where / "labels", judging, rollouts=rollouts.path, prompts=held_out.path, judgements=judgements
    )
