"""Feedback: candidates of a policy, put in order by people or by simulated annotators, make a reward model.

    policy --> rollout (candidates) --> ask --> questions --> [people] --> rank --> rankings
    rankings so far --> reward --> reward model

Where people rank, the run stops with a `WaitingError` until their files lie in `annotations/` beside the questions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.run import Run, path_of
from pipeline.algorithms.bind import bind
from pipeline.algorithms.recipe import Recipe
from pipeline.artifacts import Artifact
from pipeline.errors import WaitingError
from pipeline.experiment import Experiment
from stages.ask import Settings as AskSettings
from stages.ask import ask
from stages.rank import Settings as RankSettings
from stages.rank import rank
from stages.reward import Settings as RewardSettings
from stages.reward import reward
from stages.rollout import Settings as RolloutSettings
from stages.rollout import rollout

ANNOTATIONS = "annotations"
"""Folder beside the questions in which people's files are looked for."""


@dataclass(frozen=True)
class Feedback:
    """What has been preferred so far, and the model that learned it."""

    model: Artifact
    """What judges responses."""
    rankings: tuple[Artifact, ...] = ()
    """All of them; none where the experiment names a reward model."""


@dataclass(frozen=True)
class Preferring:
    """What every round of feedback uses."""

    prompts: Artifact
    policy: Artifact
    """The ordinary SFT policy: every reward model starts from it."""
    demonstrations: Artifact | None
    """They are to score 0 on average."""
    held_out: Artifact | None = None
    """Rankings that only measure."""


def needs_reward_model(recipe: Recipe) -> bool:
    """Whether responses are judged by a reward model, or the critic starts from one."""
    by_critic = recipe.critic is not None and recipe.critic.start == "reward_model"
    return by_critic or "reward_scores" in bind(recipe).needs


def ranks_candidates(experiment: Experiment) -> bool:
    """Whether responses are sampled to be ranked before the loop: neither a reward model nor rankings are named."""
    named = experiment.models.reward_model is not None or experiment.data.rankings is not None
    return needs_reward_model(experiment.recipe) and not named


def ranks_again(experiment: Experiment) -> bool:
    """Whether candidates of later policies are ranked as well."""
    return needs_reward_model(experiment.recipe) and experiment.feedback.every > 0


def candidate_sampling(experiment: Experiment, turn: int = 0) -> RolloutSettings:
    """How the responses that are ranked are sampled, or searched for; every turn goes on along the prompts."""
    plan = experiment.feedback
    return RolloutSettings.of(
        experiment,
        {
            "group_size": plan.responses, "temperature": plan.temperature, "top_p": 1.0, "top_k": None,
            "beams": plan.beams, "greedy": False, "count": plan.prompts, "first": turn * plan.prompts,
            "draw": f"candidates/{turn}",
        },
    )  # fmt: skip


def ranked(run: Run, here: Path, policy: Artifact, prompts: Artifact, turn: int = 0) -> Artifact:
    """Rankings of the policy's candidates. Raises `WaitingError` where people have not ranked them yet."""
    sampling = candidate_sampling(run.experiment, turn)
    candidates = run.do(rollout, here / "candidates", sampling, prompts=prompts.path, policy=policy.path)
    asking = AskSettings.of(run.experiment)
    questions = run.do(ask, here / "questions", asking, rollouts=candidates.path, prompts=prompts.path)
    ranking = RankSettings.of(run.experiment)
    if run.experiment.feedback.by == "people":
        files = _annotations(here / ANNOTATIONS, questions)
        return run.do(rank, here / "rankings", ranking, questions=questions.path, annotations=files)
    return run.do(rank, here / "rankings", ranking, questions=questions.path, prompts=prompts.path)


def _annotations(folder: Path, questions: Artifact) -> list[Path]:
    files = sorted(path for path in folder.glob("*") if not path.name.startswith("."))
    if not files:
        folder.mkdir(parents=True, exist_ok=True)
        raise WaitingError(
            f"{questions.stats['rows']:.0f} questions wait for people's rankings",
            f"{questions.path / 'annotate.html'} (or annotate.csv, annotate.jsonl beside it)",
            f"open it in a browser, rank, put the saved files into {folder}, and run again",
        )
    return files


def learned(run: Run, out: Path, using: Preferring, rankings: Sequence[Artifact]) -> Feedback:
    """A reward model of all these rankings."""
    model = run.do(
        reward, out, RewardSettings.of(run.experiment), rankings=[a.path for a in rankings], policy=using.policy.path,
        demonstrations=path_of(using.demonstrations), held_out=path_of(using.held_out),
    )  # fmt: skip
    return Feedback(model, tuple(rankings))


def renewed(run: Run, here: Path, using: Preferring, before: Feedback, policy: Artifact, turn: int) -> Feedback:
    """Rank candidates of the present policy too, and learn a reward model of everything ranked so far.

    Comparisons are collected on the present policy, and a new reward model made (arXiv:2203.02155, section 3.1); policy
    and critic go on from where they are.
    """
    rankings = ranked(run, here, policy, using.prompts, turn)
    return learned(run, here / "reward", using, (*before.rankings, rankings))
