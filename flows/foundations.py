"""Before the loop: ingest what the experiment names, make policy 0 and, where the recipe asks, the models that judge.

    demonstrations (, documents) --> sft --> policy 0
    policy 0 --> candidates, rankings --> reward --> reward model              (flows/feedback.py)
    policy 0 --> rollout, label, advantage (Monte-Carlo returns) --> value --> critic 0

Runs on the same base share all of it but critic 0, which depends on the recipe.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.feedback import Feedback, Preferring, learned, needs_reward_model, ranked, ranks_again, ranks_candidates
from flows.run import Run
from pipeline.algorithms.bind import bind
from pipeline.algorithms.shelf import Line
from pipeline.artifacts import Artifact
from pipeline.contracts import CRITIC, DEMONSTRATIONS, DOCUMENTS, POLICY, PROMPTS, RANKINGS, REWARD_MODEL, Contract
from pipeline.errors import ExperimentError
from pipeline.experiment import DataSlice
from stages.advantage import Settings as AdvantageSettings
from stages.advantage import advantage
from stages.ingest import Settings as IngestSettings
from stages.ingest import ingest
from stages.label import Settings as LabelSettings
from stages.label import label, refuse_unanswered, refuse_ungraded
from stages.rollout import Settings as RolloutSettings
from stages.rollout import rollout
from stages.score import Settings as ScoreSettings
from stages.score import score
from stages.sft import Settings as SftSettings
from stages.sft import sft
from stages.value import Settings as ValueSettings
from stages.value import value

CONTRACT_OF: dict[str, Contract] = {
    "prompts": PROMPTS, "held_out": PROMPTS, "demonstrations": DEMONSTRATIONS, "documents": DOCUMENTS,
    "held_out_documents": DOCUMENTS, "rankings": RANKINGS, "held_out_rankings": RANKINGS,
}  # fmt: skip
"""Part of the experiment's data -> what `ingest` makes of it."""


@dataclass(frozen=True)
class Foundations:
    """What the loop starts from."""

    prompts: Artifact
    held_out: Artifact | None
    policy: Artifact
    documents: Artifact | None = None
    held_out_documents: Artifact | None = None
    critic: Artifact | None = None
    feedback: Feedback | None = None
    """The first reward model and what it learned from, where the recipe needs one."""
    preferring: Preferring | None = None
    """What later reward models are made with."""

    @property
    def reward_model(self) -> Artifact | None:
        """The first reward model."""
        return None if self.feedback is None else self.feedback.model


def foundations(run: Run) -> Foundations:
    """Make everything that the recipe needs before its first iteration."""
    data, recipe = run.experiment.data, run.experiment.recipe
    prompts = _ingested(run, "prompts", data.prompts)
    held_out = _ingested_if_named(run, "held_out")
    _refuse_unjudgeable(run, prompts, held_out)
    demonstrations = _ingested_if_named(run, "demonstrations") if run.experiment.sft.enabled else None
    if data.test_time:
        _refuse_reading_answers(run)
    for trained in (demonstrations, None if data.test_time else prompts):
        if held_out is not None and trained is not None:
            refuse_leak(trained, held_out)
    documents, held_out_documents = _documents(run), _ingested_if_named(run, "held_out_documents")
    if documents is not None and held_out_documents is not None:
        refuse_leak(documents, held_out_documents, "document_id")
    ordinary = _policy(run, demonstrations, documents)
    policy = _own_policy(run, demonstrations, documents) or ordinary
    feedback = preferring = None
    if needs_reward_model(recipe):
        preferring = Preferring(prompts, ordinary, demonstrations, _ingested_if_named(run, "held_out_rankings"))
        feedback = _feedback(run, preferring)
    critic = _critic(run, prompts, policy, None if feedback is None else feedback.model)
    return Foundations(prompts, held_out, policy, documents, held_out_documents, critic, feedback, preferring)


def _refuse_unjudgeable(run: Run, prompts: Artifact, held_out: Artifact | None) -> None:
    """Raise `ContractError`, before anything is trained, for prompts that lack what their responses are judged by."""
    needs = bind(run.experiment.recipe).labeler.needs
    if "verdicts" in needs and held_out is not None:
        refuse_unanswered(_graded(held_out), held_out)
    by_grader = run.experiment.feedback.by == "grader"
    if "verdicts" in needs or (by_grader and (ranks_candidates(run.experiment) or ranks_again(run.experiment))):
        refuse_unanswered(_graded(prompts), prompts)
    elif "answers" in needs:
        refuse_ungraded(_graded(prompts), prompts)


def _refuse_reading_answers(run: Run) -> None:
    """Raise `ExperimentError` where training on the test's prompts would be training on its answers."""
    recipe = run.experiment.recipe
    in_credit = any("verdicts" in piece.needs for piece in bind(recipe).crediting)
    in_loss = any(line.on == "correct" for line in recipe.loss)
    if in_credit or in_loss or needs_reward_model(recipe):
        raise ExperimentError(
            f"data.test_time trains on held-out prompts, and recipe {recipe.name} learns from answers",
            do="name a recipe that reads none (`rlhf recipes`), or take test_time out and name other prompts",
        )


def _graded(prompts: Artifact) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = prompts.table(["prompt_id", "answer", "grader"]).to_pylist()
    return rows


def _ingested(run: Run, part: str, wanted: DataSlice) -> Artifact:
    if wanted.artifact is not None:
        return Artifact.open(Path(wanted.artifact), CONTRACT_OF[part])
    folder = Path(run.experiment.data.folder)
    settings = IngestSettings.of(run.experiment, {"part": part})
    return run.do(ingest, run.base / part, settings, files=[folder / name for name in wanted.files])


def _ingested_if_named(run: Run, part: str) -> Artifact | None:
    wanted: DataSlice | None = getattr(run.experiment.data, part)
    return None if wanted is None else _ingested(run, part, wanted)


def _documents(run: Run) -> Artifact | None:
    """Plain text, where anything of this run mixes it in."""
    experiment, own = run.experiment, run.experiment.recipe.sft
    shares = (experiment.sft.documents_share, own.documents_share if own is not None else 0.0)
    if experiment.recipe.mix is None and not (experiment.sft.enabled and any(shares)):
        return None
    if experiment.data.documents is None:
        raise ExperimentError(
            f"recipe {experiment.recipe.name} mixes in documents, and the experiment names none",
            "data.documents",
            "name them as data.prompts are named; or take `mix` and `sft` out: [recipe_changes."
            f"{experiment.recipe.name}] mix = false, sft = false",
        )
    return _ingested(run, "documents", experiment.data.documents)


def _policy(run: Run, demonstrations: Artifact | None, documents: Artifact | None) -> Artifact:
    """The experiment's ordinary SFT, or the policy that it names."""
    named = run.experiment.models.policy
    if demonstrations is None:
        return Artifact.open(Path(named or ""), POLICY)
    settings = SftSettings.of(run.experiment)
    return _imitating(run, run.base / "sft", settings, demonstrations, documents)


def _own_policy(run: Run, demonstrations: Artifact | None, documents: Artifact | None) -> Artifact | None:
    """The policy that the loop starts from, where the recipe wants another than the ordinary SFT."""
    recipe = run.experiment.recipe
    if recipe.sft is None or demonstrations is None:
        return None
    changes = recipe.sft.model_dump(exclude_none=True)
    return _imitating(
        run, run.base / f"sft-{recipe.name}", SftSettings.of(run.experiment, changes), demonstrations, documents
    )


def _imitating(
    run: Run, out: Path, settings: SftSettings, demonstrations: Artifact, documents: Artifact | None
) -> Artifact:
    start = run.experiment.models.policy
    mixed = documents.path if documents is not None and settings.documents_share else None
    return run.do(
        sft, out, settings, demonstrations=demonstrations.path, documents=mixed,
        policy=None if start is None else Path(start),
    )  # fmt: skip


def _feedback(run: Run, using: Preferring) -> Feedback:
    """The reward model that the experiment names, or one trained on rankings: given ones, or of sampled candidates."""
    experiment = run.experiment
    if experiment.models.reward_model is not None:
        return Feedback(Artifact.open(Path(experiment.models.reward_model), REWARD_MODEL))
    given = experiment.data.rankings
    rankings = (
        ranked(run, run.base, using.policy, using.prompts) if given is None else _ingested(run, "rankings", given)
    )
    return learned(run, run.base / "reward", using, [rankings])


def _critic(run: Run, prompts: Artifact, policy: Artifact, reward_model: Artifact | None) -> Artifact | None:
    """Critic 0: named, or made of the model that the recipe says, and pretrained where it says so."""
    experiment, plan = run.experiment, run.experiment.recipe.critic
    if plan is None:
        return None
    if experiment.models.critic is not None:
        return Artifact.open(Path(experiment.models.critic), CRITIC)
    start = {"policy": policy.path} if plan.start == "policy" or reward_model is None else {
        "reward_model": reward_model.path
    }  # fmt: skip
    here = run.folder / "pretraining"
    table = None if plan.pretrain_steps == 0 else _returns(run, here, prompts, policy, reward_model)
    settings = ValueSettings.of(experiment, {"steps": plan.pretrain_steps, "batch": experiment.critic.pretrain_batch})
    return run.do(value, here / "critic", settings, advantages=None if table is None else table.path, **start)


def _returns(run: Run, here: Path, prompts: Artifact, policy: Artifact, reward_model: Artifact | None) -> Artifact:
    """Monte-Carlo returns of responses of the frozen first policy (VC-PPO, arXiv:2503.01491; lambda = 1).

    The divergence is left out of the rewards: this policy is its own reference, so it is 0 on every token. One response
    per prompt, unless rewards are made of groups: a critic that sees few prompts learns them by heart.
    """
    experiment, recipe = run.experiment, run.experiment.recipe
    bound = bind(recipe)
    size = recipe.rollout.group_size if "group" in bound.labeler.needs else 1
    count = math.ceil(experiment.critic.pretrain_responses / size)
    sampling = RolloutSettings.of(
        experiment, {"group_size": size, "greedy": False, "count": count, "draw": "pretraining"}
    )
    rollouts = run.do(rollout, here / "rollouts", sampling, prompts=prompts.path, policy=policy.path)
    judgements = judged(run, here / "judgements", rollouts, reward_model)
    judging = LabelSettings.of(experiment, {"filter": ()})
    labels = run.do(
        label, here / "labels", judging, rollouts=rollouts.path, prompts=prompts.path, judgements=judgements
    )
    of_models = {piece.name for piece in bound.shapers if bound.credit_needs & set(piece.needs)}
    discount = {"gamma": bound.advantage.settings["gamma"]} if "gamma" in bound.advantage.settings else {}
    crediting = AdvantageSettings.of(
        experiment,
        {
            "shape": tuple(line for line in recipe.shape if line.kind not in of_models),
            "advantage": Line.model_validate({"kind": "reward_to_go", **discount}), "normalize": None,
            "importance": None,
        },
    )  # fmt: skip
    return run.do(advantage, here / "advantages", crediting, rollouts=[rollouts.path], labels=[labels.path])


def judged(run: Run, out: Path, rollouts: Artifact, reward_model: Artifact | None) -> Path | None:
    """What the reward model says of all responses, where the recipe's labeler asks for it."""
    if "reward_scores" not in bind(run.experiment.recipe).labeler.needs or reward_model is None:
        return None
    settings = ScoreSettings.of(run.experiment, {"needs": ("reward_scores",)})
    return run.do(score, out, settings, rollouts=[rollouts.path], reward_model=reward_model.path).path


def refuse_leak(trained: Artifact, held_out: Artifact, key: str = "prompt_id") -> None:
    """Raise `ExperimentError` when something held out is also trained on: what it measures would mean nothing."""
    known, kept = (set(a.table([key])[key].to_pylist()) for a in (trained, held_out))
    if shared := known & kept:
        what = key.removesuffix("_id") + "s"
        raise ExperimentError(
            f"{len(shared)} held-out {what} are also trained on; first: {', '.join(sorted(shared)[:5])}",
            f"{held_out.path} and {trained.path}",
            f"separate the files named for the held-out {what} from those that are trained on",
        )
