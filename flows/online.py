"""The loop: sample, judge, read, credit, fit the critic, step the policy; repeat.

It knows stages and files, and no algorithm: a model is there or not because the recipe's pieces ask for it.
"""

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Self

from flows import gates, hacking
from flows.evaluate import evaluate
from flows.feedback import Feedback, renewed
from flows.foundations import Foundations, judged
from flows.run import Run, look_up, path_of
from pipeline.algorithms.recipe import KlController
from pipeline.artifacts import Artifact
from pipeline.experiment import Experiment
from pipeline.launch import meanwhile
from stages.advantage import Settings as AdvantageSettings
from stages.advantage import advantage
from stages.label import Settings as LabelSettings
from stages.label import label
from stages.rollout import Settings as RolloutSettings
from stages.rollout import rollout
from stages.score import MODEL_OF, score
from stages.score import Settings as ScoreSettings
from stages.update import Settings as UpdateSettings
from stages.update import update
from stages.value import Settings as ValueSettings
from stages.value import value

MOST_OVERSAMPLING = 3.0
"""A round asks for at most so many times the groups still wanted: DAPO's script samples 1536 prompts for 512."""


_UNCHANGED = "; the policy stays as it is"


@dataclass(frozen=True)
class Now:
    """What one iteration hands to the next."""

    policy: Artifact
    critic: Artifact | None = None
    divergence_scale: float = 1.0
    """What the controller of the divergence has made of its coefficients."""
    cursor: int = 0
    """Prompts taken from the stream so far."""
    keep_rate: float = 1.0
    """Share of the groups that the last iteration's filters kept."""
    feedback: Feedback | None = None
    """The reward model that judges now."""
    judged: tuple[hacking.Point, ...] = ()
    """What it said of the iterations that it judged, beside what was right."""
    before: Artifact | None = None
    """The policy that the last update began with, where sampling overlaps with it; None otherwise."""

    @classmethod
    def start(cls, base: Foundations) -> Self:
        """Before the first iteration."""
        return cls(base.policy, base.critic, feedback=base.feedback)

    @property
    def reward_model(self) -> Artifact | None:
        """What judges responses; None where the recipe needs no reward model."""
        return None if self.feedback is None else self.feedback.model


@dataclass(frozen=True)
class Round:
    """What is sampled at once."""

    number: int
    """Of the iteration."""
    turn: int
    """Of the round in it, from 0."""
    first: int
    """Prompts taken from the stream before."""
    since: int
    """Those taken before the iteration."""
    count: int
    """Prompts."""
    staleness: int | None
    """Updates between the policy that samples and the one that learns; None where they never differ."""


@dataclass(frozen=True)
class Collected:
    """The rounds of one iteration."""

    rollouts: tuple[Artifact, ...]
    labels: tuple[Artifact, ...]

    @property
    def kept(self) -> int:
        """Groups that train."""
        return sum(int(labels.stats["groups/kept"]) for labels in self.labels)

    @property
    def passed(self) -> float:
        """Share of the groups seen that filters kept, surplus counted as kept."""
        seen = sum(labels.stats["groups/seen"] for labels in self.labels)
        rows = sum(labels.stats["rows"] - labels.stats.get("dropped/greedy_baseline", 0.0) for labels in self.labels)
        surplus = sum(labels.stats.get("dropped/surplus_group", 0.0) for labels in self.labels)
        return (self.kept + surplus * seen / rows) / seen


def online(run: Run, base: Foundations, now: Now, first: int, at_most: int | None = None) -> tuple[Artifact, int]:
    """Walk the loop from iteration `first` to `scale.iterations`; return the last policy and where it stands.

    `at_most` ends the walk after so many iterations that were not there yet.
    """
    total, started, new = run.experiment.scale.iterations, time.monotonic(), 0
    for number in range(first, total):
        if new == at_most:
            return now.policy, number
        there = (run.iteration(number) / "policy").exists()
        new += not there
        began = time.monotonic()
        made, now = iterate(run, base, now, number)
        spent = time.monotonic() - began
        left = (time.monotonic() - started) / (number + 1 - first) * (total - number - 1)
        run.say(_line(number, total, made, run.experiment.scale.groups, spent, left))
        if made.kept < run.experiment.scale.groups:
            run.say(f"  short of groups: {made.kept} kept in {len(made.labels)} rounds" + _UNCHANGED * (made.kept == 0))
        if not there:
            run.after_iteration(run, number)
        every = run.experiment.evaluation.every
        if every and (number + 1) % every == 0 and number + 1 < total:
            evaluate(run, base, now.policy, number + 1)
    return now.policy, total


def iterate(run: Run, base: Foundations, now: Now, number: int) -> tuple[Collected, Now]:
    """One walk of the loop. Where filters leave nothing to learn from, the models stay as they are."""
    now = _renewed(run, base, now, number)
    made, cursor = collect(run, base, now, number)
    before = now.policy if run.experiment.scale.overlap else None
    after = replace(now, cursor=cursor, keep_rate=made.passed, judged=_watched(run, now, made, number), before=before)
    if made.kept == 0:
        return made, after
    return made, _learned(run, base, after, made, number)


def _learned(run: Run, base: Foundations, now: Now, made: Collected, number: int) -> Now:
    """With policy and critic stepped along what was collected."""
    here, experiment = run.iteration(number), _adapted(run.experiment, now.divergence_scale)
    rollouts, labels = ([a.path for a in made.rollouts], [a.path for a in made.labels])
    scores = None
    if needs := ScoreSettings.slice(experiment, {})["needs"]:
        models = {"policy": now.policy, "reference": base.policy, "critic": now.critic}
        asked = {MODEL_OF[need]: path_of(models[MODEL_OF[need]]) for need in needs}
        settings = ScoreSettings.of(experiment)
        scores = run.do(score, here / "scores", settings, rollouts=rollouts, labels=labels, **asked)
        gates.look(run, scores, made.rollouts)
    table = run.do(
        advantage,
        here / "advantages",
        AdvantageSettings.of(experiment),
        rollouts=rollouts,
        labels=labels,
        scores=path_of(scores),
    )
    critic = now.critic
    # Not before `score` is done: both would ask a cluster for its workers.
    with _sampling_ahead(run, base, now, number + 1):
        if critic is not None:
            learning = ValueSettings.of(experiment)
            critic = run.do(value, here / "critic", learning, advantages=table.path, critic=critic.path)
        policy = run.do(
            update,
            here / "policy",
            UpdateSettings.of(experiment),
            advantages=table.path,
            policy=now.policy.path,
            documents=path_of(base.documents) if experiment.recipe.mix is not None else None,
        )
        gates.look(run, policy, made.rollouts)
    scale = _next_scale(experiment.recipe.kl_controller, now.divergence_scale, scores)
    return replace(now, policy=policy, critic=critic, divergence_scale=scale)


def _sampling_ahead(run: Run, base: Foundations, now: Now, number: int) -> AbstractContextManager[None]:
    """The first round of iteration `number`, sampled while critic and policy step; where stages run here, later."""
    plan, sampler = run.experiment, now.before
    last = number == plan.scale.iterations
    here = "inline" in (plan.resources.launcher_of(stage) for stage in (rollout.name, value.name, update.name))
    if sampler is None or last or here or run.perform is look_up:
        return nullcontext()
    count = _count(plan.scale.groups, now.keep_rate)
    return meanwhile(lambda: _sampled(run, base, Round(number, 0, now.cursor, now.cursor, count, 1), sampler))


def _renewed(run: Run, base: Foundations, now: Now, number: int) -> Now:
    """With a reward model that learned from candidates of the present policy as well, where it is time for it."""
    every = run.experiment.feedback.every
    if now.feedback is None or base.preferring is None or not every or number == 0 or number % every:
        return now
    feedback = renewed(run, run.iteration(number), base.preferring, now.feedback, now.policy, number // every)
    return replace(now, feedback=feedback)


def _watched(run: Run, now: Now, made: Collected, number: int) -> tuple[hacking.Point, ...]:
    """Look whether the reward model is being deceived. Raises `GateError` when it is and the run is to stop."""
    if now.feedback is None or not hacking.watched(made.labels, run.experiment.gates):
        return now.judged
    points = (*now.judged, hacking.point(number, made.labels))
    if warning := hacking.gate(points, run.experiment.gates, made.rollouts, made.labels):
        run.say(f"  {warning}")
    return points


def _adapted(experiment: Experiment, scale: float) -> Experiment:
    """The experiment with the coefficients of the divergence that the controller has arrived at."""
    if scale == 1.0:
        return experiment
    return experiment.model_copy(update={"recipe": experiment.recipe.with_divergence_scaled(scale)})


def _next_scale(controller: KlController | None, scale: float, scores: Artifact | None) -> float:
    if controller is None or scores is None:
        return scale
    return controller.next(scale, scores.stats["kl/reference_sum"], int(scores.stats["rows"]))


def collect(run: Run, base: Foundations, now: Now, number: int) -> tuple[Collected, int]:
    """Sample and label in rounds until filters have kept enough groups; without filters one round is enough.

    A round asks for as many prompts as the groups still wanted need at the rate at which groups were kept last.
    """
    here, wanted, cursor, rate = run.iteration(number), run.experiment.scale.groups, now.cursor, now.keep_rate
    made, overlaps = Collected((), ()), run.experiment.scale.overlap
    for turn in range(run.experiment.recipe.rollout.rounds):
        room = wanted - made.kept
        sampler = now.before if overlaps and now.before is not None and turn == 0 else now.policy
        staleness = int(sampler.path != now.policy.path) if overlaps else None
        asked = Round(number, turn, cursor, now.cursor, _count(room, rate), staleness)
        rollouts = _sampled(run, base, asked, sampler)
        gates.look(run, rollouts, [rollouts])
        judgements = judged(run, here / f"judgements-{turn}", rollouts, now.reward_model)
        judging = LabelSettings.of(run.experiment, {"room": room})
        labels = run.do(
            label, here / f"labels-{turn}", judging, rollouts=rollouts.path, prompts=base.prompts.path,
            judgements=judgements,
        )  # fmt: skip
        gates.look(run, labels, [rollouts])
        made = Collected((*made.rollouts, rollouts), (*made.labels, labels))
        cursor, rate = int(rollouts.stats["cursor"]), made.passed
        if made.kept >= wanted:
            break
    return made, cursor


def _count(room: int, rate: float) -> int:
    """Prompts to ask for `room` more groups, where filters keep a share `rate`."""
    return math.ceil(room / max(rate, 1 / MOST_OVERSAMPLING))


def _sampled(run: Run, base: Foundations, asked: Round, sampler: Artifact) -> Artifact:
    settings = RolloutSettings.of(
        run.experiment,
        {
            "first": asked.first, "since": asked.since, "count": asked.count, "draw": f"{asked.number}/{asked.turn}",
            "staleness": asked.staleness,
        },
    )  # fmt: skip
    out = run.iteration(asked.number) / f"rollouts-{asked.turn}"
    return run.do(rollout, out, settings, prompts=base.prompts.path, policy=sampler.path)


def _line(number: int, total: int, made: Collected, groups: int, spent: float, left: float) -> str:
    seen = sum(labels.stats["groups/seen"] for labels in made.labels)
    rewards = [labels.stats["reward/mean"] * labels.stats["groups/seen"] / seen for labels in made.labels]
    tokens = sum(rollouts.stats["tokens"] for rollouts in made.rollouts)
    seconds = sum(rollouts.stats["seconds"] for rollouts in made.rollouts)
    parts = [f"iteration {number + 1}/{total}", f"reward {sum(rewards):+.3f}"]
    if all("accuracy/mean" in labels.stats for labels in made.labels):
        right = sum(labels.stats["accuracy/mean"] * labels.stats["groups/seen"] for labels in made.labels) / seen
        parts.append(f"accuracy {right:.3f}")
    parts += [f"groups {made.kept}/{groups} of {seen:.0f}", f"{tokens / seconds:,.0f} tokens/s", f"{spent:.1f} s"]
    minutes, seconds_left = divmod(round(left), 60)
    return "  ".join([*parts, f"about {minutes}:{seconds_left:02d} left" if number + 1 < total else "done"])
