"""A fork: a run that goes on from where another one stood. What lies before is the other's, and stays there."""

from dataclasses import replace
from pathlib import Path

from flows.foundations import Foundations, foundations
from flows.online import Now, iterate
from flows.run import MissingError, Run, look_up, name_given
from pipeline import storage
from pipeline.artifacts import Artifact
from pipeline.catalog import EXPERIMENT_FILE, refuse_no_run
from pipeline.errors import ArtifactError, ExperimentError
from pipeline.experiment import Experiment, Fork


def fork(folder: Path, at: int, name: str, recipe: str | None = None, changes: tuple[str, ...] = ()) -> Path:
    """Write the experiment of a run `name` beside `folder` that shares everything up to iteration `at`.

    Nothing is copied: the new run names the old one. Returns the experiment's file. Raises
    `ExperimentError` or `ArtifactError` where the name is taken, or the run has not come so far.
    """
    refuse_no_run(folder)
    root = folder.resolve().parent
    target = root / name_given(name)
    if target.exists():
        raise ExperimentError(f"there is a run called {name!r} already", str(target), "choose another --as")
    read = Experiment.load(folder / EXPERIMENT_FILE, changes, recipe, name)
    forked = read.model_copy(update={"fork": Fork(run=folder.resolve().name, at=at)})
    if at > read.scale.iterations:
        raise ExperimentError(
            f"iteration {at} is beyond the {read.scale.iterations} that the fork would have", "--at",
            f"lower --at, or --set scale.iterations={at + read.scale.iterations}",
        )  # fmt: skip
    stood(folder.parent, Fork(run=folder.resolve().name, at=at))
    target.mkdir()
    (target / EXPERIMENT_FILE).write_text(forked.dump(), encoding="utf-8")
    storage.carry(target)
    return target / EXPERIMENT_FILE


def branch(run: Run, base: Foundations) -> tuple[Foundations, Now, int]:
    """What the run's loop starts from, and with which iteration: its own beginning, or where another run stood.

    The reference stays the other run's first policy. Critic and reward model are the other run's where both recipes
    have one, and the fork's own foundations otherwise.
    """
    plan = run.experiment.fork
    if plan is None:
        return base, Now.start(base), 0
    policy, now = stood(run.root, plan)
    critic = None if base.critic is None else now.critic or base.critic
    feedback = None if base.feedback is None else now.feedback or base.feedback
    return replace(base, policy=policy), replace(now, critic=critic, feedback=feedback), plan.at


def stood(root: Path, plan: Fork) -> tuple[Artifact, Now]:
    """The first policy of a run, and what its iteration `plan.at` starts from. Makes nothing.

    Raises `ArtifactError` where the run has not come so far.
    """
    folder = root / plan.run
    storage.bring(folder)
    refuse_no_run(folder)
    parent = Run(Experiment.load(folder / EXPERIMENT_FILE), root, look_up)
    try:
        base, now, first = branch(parent, foundations(parent))
        if plan.at < first:
            raise ExperimentError(
                f"{plan.run} is itself a fork and begins with iteration {first}", f"iteration {plan.at}",
                "fork the run that it was forked from",
            )  # fmt: skip
        for number in range(first, plan.at):
            _, now = iterate(parent, base, now, number)
    except MissingError as missing:
        raise ArtifactError(
            f"{plan.run} has not come to iteration {plan.at}: {missing.path} is missing", str(folder),
            f"`rlhf run {folder / EXPERIMENT_FILE}` goes on with it, or take an earlier iteration",
        ) from missing  # fmt: skip
    return base.policy, now
