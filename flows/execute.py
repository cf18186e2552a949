"""One run from its experiment to its end: foundations, evaluation of policy 0, the loop, evaluation of the last."""

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from prefect import flow, runtime

from flows import hacking, pictures, reporting
from flows.evaluate import evaluate
from flows.feedback import candidate_sampling, needs_reward_model, ranks_again, ranks_candidates
from flows.forking import branch
from flows.foundations import foundations
from flows.online import online
from flows.planning import here, refuse_what_cannot_fit
from flows.promotion import settle
from flows.run import MissingError, Outcome, Run, find_experiment, look_up, write_metrics
from flows.tables import STAGES
from flows.tasks import as_task
from pipeline import storage
from pipeline.algorithms.bind import bind
from pipeline.errors import ExperimentError
from pipeline.experiment import Experiment, Resources
from pipeline.grading import open_grader
from pipeline.heaps import let_go
from pipeline.metrics import console
from pipeline.stage import Stage
from stages.advantage import advantage
from stages.ask import ask
from stages.label import label
from stages.rank import rank
from stages.reward import reward
from stages.rollout import rollout
from stages.score import score
from stages.sft import sft
from stages.update import update
from stages.value import value


def check(experiment: Experiment) -> None:
    """Raise `ExperimentError` for whatever can be told of a run before it does anything: every stage's settings."""
    bind(experiment.recipe)
    _refuse_strangers(experiment.resources)
    for data in (experiment.data.prompts, experiment.data.held_out):
        if data is not None:
            open_grader(data.grader)
    stages: list[Stage] = [sft, rollout, label, score, advantage, update]
    if needs_reward_model(experiment.recipe):
        stages.append(reward)
    if ranks_candidates(experiment) or ranks_again(experiment):
        stages += [ask, rank]
        candidate_sampling(experiment)
    if experiment.recipe.critic is not None:
        stages.append(value)
    for stage in stages:
        stage.settings_type.of(experiment)


def _refuse_strangers(resources: Resources) -> None:
    """Raise `ExperimentError` for what is said of a stage that there is not."""
    said: dict[str, Mapping[str, object]] = {
        "launchers": resources.launchers, "python": resources.python, "timeouts": resources.timeouts,
        "ray.demands": resources.ray.demands,
    }  # fmt: skip
    for name, by_stage in said.items():
        if strangers := sorted(by_stage.keys() - set(STAGES)):
            raise ExperimentError(
                f"no stage is called {strangers[0]!r}", f"resources.{name}", f"one of {', '.join(STAGES)}"
            )  # fmt: skip


def walk(run: Run, at_most: int | None = None) -> Outcome:
    """Perform everything, in order. What `run.perform` does decides whether this works or only looks.

    `at_most` ends it after so many new iterations; the outcome then has no last evaluation.
    """
    check(run.experiment)
    base, start, first = branch(run, foundations(run))
    before = evaluate(run, base, start.policy, first)
    policy, reached = online(run, base, start, first, at_most)
    total = run.experiment.scale.iterations
    return Outcome(policy, before, evaluate(run, base, policy, total) if reached == total else None)


def finished(experiment: Experiment, root: Path) -> Outcome | MissingError:
    """The outcome if everything is there, or what is missing first. Starts nothing.

    Raises `ArtifactError` where a place is taken by another computation.
    """
    try:
        return walk(Run(experiment, root, look_up))
    except MissingError as missing:
        return missing


def _flow_run_name() -> str:
    """Prefect shows a run under the name of its directory."""
    given = runtime.flow_run.parameters
    return str(given["name"] or Path(given["experiment"]).stem)


def _tell(run: Run, number: int) -> None:
    """Show an iteration that is done to whoever looks from outside."""
    pictures.show(run, number)
    _track(run)


@contextmanager
def _nothing_old_collected() -> Iterator[None]:
    """Have Python's garbage collector leave out what was there before: half a second of the first iteration."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def settle_again(run: Run) -> None:
    """What may still be wanted of a run that is done: another word on promotion, event files."""
    settle(run)
    _track(run)


def _track(run: Run) -> None:
    """Bring the event files up to date, where they are wanted."""
    if run.experiment.tracking.tensorboard:
        from pipeline.inspecting import tensorboard

        tensorboard.write(run.folder, run.experiment.tracking.names)


@flow(name="run", flow_run_name=_flow_run_name)
def run_experiment(
    experiment: str,
    recipe: str | None = None,
    name: str | None = None,
    changes: list[str] | None = None,
    root: str = "runs",
    at_most: int | None = None,
    wait: bool = False,
) -> str:
    """Run an experiment to its end, or `at_most` so many iterations further; run it again and it resumes.

    Returns the directory of the last policy. Raises `BusyError` where another process is at this run, unless told to
    `wait` for it.
    """
    resolved = Experiment.load(find_experiment(experiment), changes or (), recipe, name)
    memory = refuse_what_cannot_fit(resolved, here())
    place = storage.place(root)
    finished(resolved, place)  # a place taken by another computation is told before anything is written
    run = Run(resolved, place, as_task, console.line, settle, _tell)
    with run.held(wait=wait):
        run.write_experiment()
        storage.carry(run.folder)
        console.line(
            f"{resolved.name}: recipe {resolved.recipe.name}, {resolved.scale.iterations} iterations, in {run.folder}"
        )
        console.line(memory)
        try:
            with _nothing_old_collected():
                outcome = walk(run, at_most)
        finally:  # what a run that stopped has measured is to be seen as well
            let_go()
            pictures.catch_up(run)
            write_metrics(run.folder)
            hacking.draw([run.folder])
            _track(run)
            storage.carry(run.folder)
        if outcome.policy.path == run.iteration(resolved.scale.iterations - 1) / "policy":
            reporting.write([run.folder])
            storage.carry(run.folder)
    pictures.wait()
    return str(outcome.policy.path)
