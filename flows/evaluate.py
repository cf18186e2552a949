"""How good is a policy? Sample on held-out prompts and label; the same stages as in training, nothing filtered.

Where there are answers the verifier judges, whatever rewards the training: accuracy is against the truth.
"""

from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from flows.foundations import Foundations
from flows.run import Run
from pipeline.algorithms.shelf import Line
from pipeline.artifacts import Artifact
from stages.label import Settings as LabelSettings
from stages.label import label
from stages.perplexity import Settings as PerplexitySettings
from stages.perplexity import perplexity
from stages.rollout import Settings as RolloutSettings
from stages.rollout import rollout
from stages.score import Settings as ScoreSettings
from stages.score import score

VERIFIER = Line(kind="verifier")


def answered(prompts: Artifact) -> bool:
    """Whether every prompt has an answer and a grader to compare with it."""
    table = prompts.table(["answer", "grader"])
    return table["answer"].null_count == 0 and "none" not in pc.unique(table["grader"]).to_pylist()


def evaluate(run: Run, base: Foundations, policy: Artifact, iteration: int) -> Artifact | None:
    """Label `samples` responses to every held-out prompt; accuracy, pass@k and maj@k are in the artifact's stats.

    Beside the labels lie, where there is a reward model, what the first one says of the responses and how far they are
    from the first policy (`scores`), and where there are held-out documents, the loss on them (`perplexity`).
    None where the experiment holds no prompts out.
    """
    where = run.folder / "eval" / f"{iteration:04d}"
    if base.held_out_documents is not None:
        reading = PerplexitySettings.of(run.experiment)
        run.do(perplexity, where / "perplexity", reading, documents=base.held_out_documents.path, policy=policy.path)
    held_out = base.held_out
    if held_out is None:
        return None
    plan = run.experiment.evaluation
    sampling = RolloutSettings.of(
        run.experiment,
        {
            "group_size": plan.samples, "temperature": plan.temperature, "top_p": plan.top_p, "top_k": None,
            "greedy": False, "draw": f"eval/{iteration}",
        },
    )  # fmt: skip
    rollouts = run.do(rollout, where / "rollouts", sampling, prompts=held_out.path, policy=policy.path)
    scores = _scores(run, base, policy, where / "scores", rollouts)
    changes: dict[str, Any] = {"filter": ()}
    if answered(held_out):
        changes |= {"label": VERIFIER}
    judging = LabelSettings.of(run.experiment, changes)
    labels = run.do(
        label, where / "labels", judging, rollouts=rollouts.path, prompts=held_out.path,
        judgements=scores if "label" not in changes else None,
    )  # fmt: skip
    run.after_evaluation(run)
    return labels


def _scores(run: Run, base: Foundations, policy: Artifact, out: Path, rollouts: Artifact) -> Path | None:
    """The first reward model judges every evaluation: one yardstick, also where later ones take its place."""
    if base.reward_model is None:
        return None
    needs = ("old_logprobs", "ref_logprobs", "reward_scores")
    settings = ScoreSettings.of(run.experiment, {"needs": needs, "temperature": run.experiment.evaluation.temperature})
    return run.do(
        score, out, settings, rollouts=[rollouts.path], policy=policy.path, reference=base.policy.path,
        reward_model=base.reward_model.path,
    ).path  # fmt: skip
